//! GetTree: the directories below a root, in pages.
//!
//! One call streams the whole tree in pages (CAS-27). The store walks the tree ([`Walk`]) and bounds what all walks take together. A
//! page token counts the directories of the walk up to the end of its page; resuming walks again from the root and skips so
//! many. The server keeps nothing in between.
//!
//! So that a client that does not read cannot hold up all others, its walk ends after [`PAGE_WAIT`].

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

/// Directories in a page when the client does not say, and at most.
pub const PAGE_MAX_DIRECTORIES: usize = 1_000;
/// Bytes of Directories in a page; what 4 MiB leave over is for the page token and framing (GEN-25). A larger directory
/// travels alone, in a message that only clients with a raised limit take.
pub const PAGE_MAX_BYTES: usize = inline::MESSAGE_MAX_BYTES - 4 * 1024;
/// How long a walk waits for room for a page, and for its client to take it; a full one passes at 35 kB/s.
pub const PAGE_WAIT: Duration = Duration::from_secs(120);
/// Tag and length of one directory in a page, rounded up.
const ENTRY_BYTES: usize = 8;

/// What one call wants of a tree, and the page that is being made.
#[derive(Debug)]
pub struct Paging {
    root: Digest,
    /// Directories of the walk up to here; those that are not stored count too.
    position: u64,
    /// Directories that an earlier call has sent.
    skip: u64,
    page_size: usize,
    page: Vec<Directory>,
    page_bytes: usize,
    /// What `page` takes in memory.
    page_weight: usize,
}

impl Paging {
    /// What a request asks for.
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

    /// Takes the next directory of the walk. Gives a page when this directory does not fit into it any more; so there is
    /// always at least one directory after such a page.
    fn take(&mut self, visited: Visited) -> Option<GetTreeResponse> {
        let Visited { directory, weight } = visited;
        let mut page = None;
        if let Some(directory) = directory {
            let bytes = directory.encoded_len() + ENTRY_BYTES;
            let is_full = !self.page.is_empty()
                && (self.page.len() >= self.page_size || self.page_bytes + bytes > PAGE_MAX_BYTES);
            // Before this directory is counted: the token of a page points right behind its last directory.
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

    /// The page as far as it is made. The last one is empty only if the tree has shrunk since the token was made.
    fn take_page(&mut self, more: bool) -> GetTreeResponse {
        (self.page_bytes, self.page_weight) = (0, 0);
        let next_page_token =
            if more { page_token::seal(&binding(&self.root), self.position) } else { String::new() };
        GetTreeResponse { directories: std::mem::take(&mut self.page), next_page_token }
    }
}

/// What a token is bound to: a token of another root is refused (CAS-28).
fn binding(root: &Digest) -> String {
    format!("tree of {}/{root}", root.function().name())
}

/// The pages of a tree, once there is a place for its walk. A stream that is dropped frees its place, or leaves the line.
///
/// A page is sent when there is room for it among the answers.
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

/// These pages, each given when there is room for it among the answers. A page is made before that: until it is given, its
/// memory is a part of what its walk may take, and a walk that waits for its place holds no room.
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

/// The pages of a walk that goes on by itself, one page ahead, so that it ends when its client takes none for [`PAGE_WAIT`].
fn attended(
    pages: impl Stream<Item = Result<GetTreeResponse>> + Send + 'static,
) -> impl Stream<Item = Result<GetTreeResponse>> + Send {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut pages = pin!(pages);
        // The walk stands still until its last page was taken, and gives up its place when it ends here.
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
    let problem = "no page of this tree was taken for too long; go on with the token of the last one";
    Error::Unavailable(problem.into())
}

#[cfg(test)]
mod tests;
