//! GetTree: the directories below a root, in pages.
//!
//! One call streams the whole tree in pages (CAS-27). The store walks the tree ([`Walk`]) and bounds the memory of all
//! walks. A page token contains the number of directories up to the end of its page. A call with a token walks from the
//! root again and skips that many. The server keeps no state between calls.
//!
//! The walk of a client that does not read ends after [`PAGE_WAIT`], so that it cannot block others.

use super::{TreeStream, convert, inline, page_token};
use crate::{
    actors::cas::{
        client::Cas,
        trees::walk::{Visited, Walk},
    },
    call::Call,
    instance::Instance,
};
use futures::stream::{self, BoxStream, Stream, StreamExt as _, TryStreamExt as _};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi::{Directory, GetTreeRequest, GetTreeResponse},
};
use prost::Message as _;
use std::{pin::pin, time::Duration};
use tokio::{sync::mpsc, time::timeout};

/// Default and largest number of directories in a page.
pub const PAGE_MAX_DIRECTORIES: usize = 1_000;
/// Size limit of the directories in a page. The rest of 4 MiB is for the page token and framing (GEN-25). A larger
/// directory is sent in a page of its own, which only clients with a raised limit accept.
pub const PAGE_MAX_BYTES: usize = inline::MESSAGE_MAX_BYTES - 4 * 1024;
/// Time limit for getting room for a page, and for the client to take it. In this time, a full page can be sent at 35
/// kB/s.
pub const PAGE_WAIT: Duration = Duration::from_secs(120);
/// Tag and length of one directory in a page, rounded up.
const ENTRY_BYTES: usize = 8;

/// The request of one call, and the page that is being filled.
#[derive(Debug)]
pub struct Paging {
    root: Digest,
    /// Number of directories of the walk so far, including those that are not stored.
    position: u64,
    /// Number of directories that earlier calls have sent.
    skip: u64,
    page_size: usize,
    page: Vec<Directory>,
    page_bytes: usize,
    /// The memory that the directories in `page` take.
    page_weight: usize,
}

impl Paging {
    /// Parses a request.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed digest, a negative page size, or a token of another tree (CAS-28).
    pub fn decode(instance: &Instance, request: &GetTreeRequest) -> Result<Self> {
        let root =
            convert::digest(instance, request.digest_function, request.root_digest.as_ref(), "root_digest")?;
        let page_size = match usize::try_from(request.page_size) {
            Ok(0) => PAGE_MAX_DIRECTORIES,
            Ok(size) => size.min(PAGE_MAX_DIRECTORIES),
            Err(_) => return Err(Error::invalid("page_size is negative")),
        };
        let skip = match request.page_token.as_str() {
            "" => 0,
            token => page_token::open(&binding(&root), token)?,
        };
        Ok(Self { root, position: 0, skip, page_size, page: Vec::new(), page_bytes: 0, page_weight: 0 })
    }

    /// Adds the next directory of the walk. Returns the page if the directory does not fit into it, so at least one
    /// directory follows such a page.
    fn take(&mut self, visited: Visited) -> Option<GetTreeResponse> {
        let Visited { directory, weight } = visited;
        let mut page = None;
        if let Some(directory) = directory {
            let bytes = directory.encoded_len() + ENTRY_BYTES;
            let is_full = !self.page.is_empty()
                && (self.page.len() >= self.page_size || self.page_bytes + bytes > PAGE_MAX_BYTES);
            // This comes before the position is increased, because the token points behind the last directory of its
            // page.
            page = is_full.then(|| self.take_page(true));
            if self.position >= self.skip {
                self.page_bytes += bytes;
                self.page_weight += weight;
                self.page.push(directory);
            }
        }
        self.position += 1;
        page
    }

    /// The current page. The last page is empty only if the tree has become smaller since the token was made.
    fn take_page(&mut self, more: bool) -> GetTreeResponse {
        (self.page_bytes, self.page_weight) = (0, 0);
        let next_page_token =
            if more { page_token::seal(&binding(&self.root), self.position) } else { String::new() };
        GetTreeResponse { directories: std::mem::take(&mut self.page), next_page_token }
    }
}

/// The binding of a token. A token of another root is refused (CAS-28).
fn binding(root: &Digest) -> String {
    format!("tree of {}/{root}", root.function().name())
}

/// The pages of a tree. The walk starts when there is a place for it. Dropping the stream frees the place or stops
/// waiting for one.
///
/// A page is sent when the connection has room for it.
pub(super) fn pages(cas: &Cas, instance: &Instance, paging: Paging, call: Call) -> TreeStream {
    let walk = cas.walk_tree(instance, paging.root);
    attended(with_room(run(paging, walk).boxed(), call)).map(|page| page.map_err(Into::into)).boxed()
}

/// The pages that a walk makes.
fn run(paging: Paging, walk: Walk) -> impl Stream<Item = Result<GetTreeResponse>> + Send {
    stream::try_unfold(Some((paging, walk)), |state| async move {
        let Some((mut paging, mut walk)) = state else { return Ok(None) };
        while let Some(visited) = walk.next(paging.page_weight).await? {
            if let Some(page) = paging.take(visited) {
                return Ok(Some((page, Some((paging, walk)))));
            }
        }
        Ok(Some((paging.take_page(false), None)))
    })
}

/// Yields each page when the connection has room for it. The page exists before it has room. Until it is yielded, its
/// memory counts for its walk, and a walk that waits for its place holds no room.
fn with_room(
    pages: BoxStream<'static, Result<GetTreeResponse>>,
    call: Call,
) -> impl Stream<Item = Result<GetTreeResponse>> {
    stream::try_unfold(Some(pages), move |pages| {
        let call = call.clone();
        async move {
            let Some(mut pages) = pages else { return Ok(None) };
            let Some(page) = pages.try_next().await? else { return Ok(None) };
            let room = timeout(PAGE_WAIT, call.reserve(page.encoded_len())).await;
            room.unwrap_or_else(|_| Err(not_taken()))?;
            let is_last = page.next_page_token.is_empty();
            Ok(Some((page, (!is_last).then_some(pages))))
        }
    })
}

/// Runs a walk in a task of its own, one page ahead, so that it ends when its client takes no page for [`PAGE_WAIT`].
fn attended(
    pages: impl Stream<Item = Result<GetTreeResponse>> + Send + 'static,
) -> impl Stream<Item = Result<GetTreeResponse>> + Send {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut pages = pin!(pages);
        // The walk pauses until its last page was taken. Returning from here frees its place.
        while let Ok(Ok(room)) = timeout(PAGE_WAIT, sender.reserve()).await {
            let page = tokio::select! {
                page = pages.next() => page,
                () = sender.closed() => return,
            };
            let is_last = !matches!(page, Some(Ok(_)));
            room.send(page);
            if is_last {
                return;
            }
        }
    });
    stream::unfold(Some(receiver), |receiver| async move {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(page) => page.map(|page| {
                let rest = page.is_ok().then_some(receiver);
                (page, rest)
            }),
            None => Some((Err(not_taken()), None)),
        }
    })
}

fn not_taken() -> Error {
    let problem =
        "the client took no page of this tree for too long; continue with the token of its last page";
    Error::Unavailable(problem.into())
}

#[cfg(test)]
mod tests;
