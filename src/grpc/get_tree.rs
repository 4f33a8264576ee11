//! GetTree: a walk over the distinct directories below a root, breadth first, root first.
//!
//! One call streams the whole tree in pages (CAS-27). Each distinct directory is read and sent once, so a tree that refers to
//! one directory a million times costs as much as one that does so once (CAS-24). Directories are sent as their blobs say, not
//! as this server would write them: clients find children by the digest of what they get.
//!
//! The walk is pure: it names what it wants to know next, is told, and gives pages. A page token counts the directories of the
//! walk up to the end of its page; resuming walks again from the root and skips so many. The server keeps nothing in between.
//!
//! Memory is bounded for all walks together: [`WALKS_MAX`] go on at a time, with [`SMALL_WALK_BYTES`] each, and a walk that
//! needs more waits until it is one of [`LARGE_WALKS_MAX`]. Both are shared out by peer ([`Budget`]). The others wait in turn,
//! which costs next to nothing. So that a client that does not read cannot hold up all others, its walk ends after
//! [`PAGE_WAIT`].

use super::{TreeStream, claim::unhindered, convert, inline, page_token, request_log::Call};
use crate::{
    actors::cas::client::Cas,
    budget::{Bounds, Budget, Share},
    caller::Caller,
    instance::Instance,
    memory,
};
use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _, TryStreamExt as _};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi::{Directory, GetTreeRequest, GetTreeResponse},
    tree::MAX_DIRECTORY_BYTES,
    wire::{self, Limits},
};
use prost::Message as _;
use std::{
    collections::{HashSet, VecDeque},
    pin::pin,
    time::Duration,
};
use tokio::{sync::mpsc, task::coop::consume_budget, time::timeout};

/// Directories in a page when the client does not say, and at most.
pub const PAGE_MAX_DIRECTORIES: usize = 1_000;
/// Bytes of Directories in a page; what 4 MiB leave over is for the page token and framing (GEN-25). A larger directory
/// travels alone, in a message that only clients with a raised limit take.
pub const PAGE_MAX_BYTES: usize = inline::MESSAGE_MAX_BYTES - 4 * 1024;
/// Most distinct directories in one walk.
pub const MAX_DIRECTORIES: usize = 1_000_000;
/// What a directory that was found takes while the walk lasts: its digest in the set and in the queue, both with room to grow.
const FOUND_BYTES: usize = 320;
/// Least bytes of a subdirectory on the wire: its name, and a digest of 32 characters.
const NODE_MIN_BYTES: usize = 40;
/// Memory that one directory may take once it is decoded: that of some 250,000 files. Clients take 4 MiB by default.
const DIRECTORY_MAX_MEMORY: u64 = 96 * 1024 * 1024;
/// Directories from this size on may take a millisecond to decode.
const LABORIOUS_BYTES: usize = 16 * 1024;
/// Walks that go on at the same time. Few clients ask for trees, and most trees take milliseconds.
pub const WALKS_MAX: u64 = 32;
/// What a walk may take in memory without a large place: a full page of usual directories (15 MiB) and 25,000 found ones.
pub const SMALL_WALK_BYTES: usize = 24 * 1024 * 1024;
/// Walks that may take more than that at the same time: 320 MB with the most directories, and 300 MB more while the largest
/// one is sent. One peer gets one of the two.
pub const LARGE_WALKS_MAX: u64 = 2;
/// How long a walk waits for room for a page, and for its client to take it; a full one passes at 35 kB/s.
pub const PAGE_WAIT: Duration = Duration::from_secs(120);
/// Directories that are read at once.
const READ_MAX_DIRECTORIES: usize = 256;
/// Bytes of directories that are read at once, as far as their digests say; a larger one is read alone.
const READ_MAX_BYTES: u64 = 1024 * 1024;
/// Tag and length of one directory in a page, rounded up.
const ENTRY_BYTES: usize = 8;

/// A walk that is under way.
#[derive(Debug)]
pub struct Walk {
    root: Digest,
    /// Directories of the walk up to here; those that are not stored count too.
    position: u64,
    /// Directories that an earlier call has sent.
    skip: u64,
    page_size: usize,
    /// Found, not yet read.
    queue: VecDeque<Digest>,
    found: HashSet<Digest>,
    page: Vec<Directory>,
    page_bytes: usize,
    /// What `page` takes in memory.
    page_weight: usize,
}

impl Walk {
    /// A walk as a request asks for it.
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
        Ok(Self {
            root,
            position: 0,
            skip,
            page_size,
            queue: VecDeque::from([root]),
            found: HashSet::from([root]),
            page: Vec::new(),
            page_bytes: 0,
            page_weight: 0,
        })
    }

    /// The directories to read next, in the order in which [`Walk::visit`] wants them; none at the end of the walk.
    fn next_batch(&mut self) -> Result<Vec<Digest>> {
        let mut batch = Vec::new();
        let mut bytes = 0u64;
        while let Some(digest) = self.queue.front().copied() {
            if digest.size() > MAX_DIRECTORY_BYTES {
                return Err(Error::Invalid(format!(
                    "directory {digest} is larger than the {MAX_DIRECTORY_BYTES} bytes that this server reads"
                )));
            }
            bytes += digest.size();
            if !batch.is_empty() && (bytes > READ_MAX_BYTES || batch.len() == READ_MAX_DIRECTORIES) {
                break;
            }
            batch.push(digest);
            self.queue.pop_front();
        }
        Ok(batch)
    }

    /// Takes the next directory of the walk. Gives a page when this directory does not fit into it any more; so there is
    /// always at least one directory after such a page.
    fn visit(&mut self, digest: Digest, blob: Result<Bytes>) -> Result<Option<GetTreeResponse>> {
        let blob = match blob {
            Ok(blob) => blob,
            // CAS-26: only the root must be there.
            Err(Error::NotFound(_)) if digest != self.root => {
                self.position += 1;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let directory: Directory = wire::decode(blob.as_ref(), DIRECTORY_MAX_MEMORY, "Directory")
            .map_err(|error| Error::Invalid(format!("blob {digest}: {error}")))?;
        for child in &directory.directories {
            let child = Digest::from_wire(digest.function(), child.digest.as_ref(), "DirectoryNode.digest")
                .map_err(|error| Error::Invalid(format!("directory {digest}: {error}")))?;
            if self.found.insert(child) {
                self.queue.push_back(child);
            }
            if self.found.len() > MAX_DIRECTORIES {
                return Err(Error::Precondition(format!(
                    "the tree below {} has more than {MAX_DIRECTORIES} distinct directories",
                    self.root
                )));
            }
        }
        let bytes = directory.encoded_len() + ENTRY_BYTES;
        let weight = weigh(&blob);
        let full = !self.page.is_empty()
            && (self.page.len() >= self.page_size || self.page_bytes + bytes > PAGE_MAX_BYTES);
        // Before this directory is counted: the token of a page points right behind its last directory.
        let page = full.then(|| self.take_page(true));
        if self.position >= self.skip {
            self.page_bytes += bytes;
            self.page_weight += weight;
            self.page.push(directory);
        }
        self.position += 1;
        Ok(page)
    }

    /// About what it takes in memory.
    fn weight(&self) -> usize {
        self.found.len().saturating_mul(FOUND_BYTES).saturating_add(self.page_weight)
    }

    /// The same once it has visited this directory, at most.
    fn weight_with(&self, blob: &[u8]) -> usize {
        let found = blob.len() / NODE_MIN_BYTES * FOUND_BYTES;
        self.weight().saturating_add(weigh(blob)).saturating_add(found)
    }

    /// What is left when there is nothing more to visit; empty only if the tree has shrunk since the token was made.
    fn last_page(&mut self) -> GetTreeResponse {
        self.take_page(false)
    }

    fn take_page(&mut self, more: bool) -> GetTreeResponse {
        (self.page_bytes, self.page_weight) = (0, 0);
        let next_page_token =
            if more { page_token::seal(&binding(&self.root), self.position) } else { String::new() };
        GetTreeResponse { directories: std::mem::take(&mut self.page), next_page_token }
    }
}

/// About what a directory takes in memory. One that is refused is not decoded.
fn weigh(blob: &[u8]) -> usize {
    let cost = wire::cost::<Directory>(blob, Limits::memory(DIRECTORY_MAX_MEMORY));
    let memory = cost.map_or(0, |cost| cost.memory);
    usize::try_from(memory).unwrap_or(usize::MAX).saturating_add(blob.len())
}

/// What a token is bound to: a token of another root is refused (CAS-28).
fn binding(root: &Digest) -> String {
    format!("tree of {}/{root}", root.function().name())
}

/// The pages of a walk, once there is a place for it. A stream that is dropped frees its place, or leaves the line.
///
/// A page is sent when there is room for it among the answers.
pub fn pages(cas: Cas, instance: Instance, walk: Walk, walks: &Walks, call: Call) -> TreeStream {
    let pages = run(walk, walks.clone(), call.caller(), move |digests| {
        let (cas, instance) = (cas.clone(), instance.clone());
        async move { cas.read_many(&instance, digests).await }
    });
    attended(with_room(pages.boxed(), call)).map(|page| page.map_err(Into::into)).boxed()
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

/// The places that there are for walks, for all clients together.
#[derive(Debug, Clone)]
pub struct Walks {
    places: Budget,
    large: Budget,
}

impl Default for Walks {
    fn default() -> Self {
        Self::new(WALKS_MAX, LARGE_WALKS_MAX)
    }
}

impl Walks {
    fn new(places: u64, large: u64) -> Self {
        let budget = |what, total| Budget::new(Bounds { what, total, connection: total });
        Self { places: budget("walks over trees", places), large: budget("walks over large trees", large) }
    }
}

/// What a walk holds of [`Walks`]. Only a walk that has a place waits for a large one, and one that has both waits only for its
/// client, [`PAGE_WAIT`] at a time. So all walks end.
#[derive(Debug)]
struct Held {
    walks: Walks,
    caller: Caller,
    place: Option<Share>,
    large: Option<Share>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.large.is_some() {
            memory::freed(DIRECTORY_MAX_MEMORY);
        }
    }
}

impl Held {
    /// Waits for the right to take this much memory.
    async fn grow(&mut self, weight: usize) -> Result<()> {
        if self.place.is_none() {
            self.place = Some(self.walks.places.wait_for(self.caller, 1).await?);
        }
        if weight > SMALL_WALK_BYTES && self.large.is_none() {
            self.large = Some(self.walks.large.wait_for(self.caller, 1).await?);
        }
        Ok(())
    }
}

/// Runs a walk over directories that `read` gives, in the order asked for.
fn run<F>(
    walk: Walk,
    walks: Walks,
    caller: Caller,
    read: impl Fn(Vec<Digest>) -> F + Send + 'static,
) -> impl Stream<Item = Result<GetTreeResponse>> + Send
where
    F: Future<Output = Result<Vec<Result<Bytes>>>> + Send,
{
    /// Directories that were read and not yet visited.
    type Ready = std::vec::IntoIter<(Digest, Result<Bytes>)>;
    let held = Held { walks, caller, place: None, large: None };
    let start: Option<(Walk, Ready, Held)> = Some((walk, Vec::new().into_iter(), held));
    stream::try_unfold((start, read), |(state, read)| async move {
        let Some((mut walk, mut ready, mut held)) = state else { return Ok(None) };
        loop {
            for (digest, blob) in ready.by_ref() {
                let bytes = blob.as_deref().unwrap_or_default();
                let is_laborious = bytes.len() >= LABORIOUS_BYTES;
                let weight = if is_laborious {
                    unhindered(|| walk.weight_with(bytes))
                } else {
                    walk.weight_with(bytes)
                };
                held.grow(weight).await?;
                let visited = if is_laborious {
                    unhindered(|| walk.visit(digest, blob))
                } else {
                    consume_budget().await;
                    walk.visit(digest, blob)
                };
                if let Some(page) = visited? {
                    return Ok(Some((page, (Some((walk, ready, held)), read))));
                }
            }
            let batch = walk.next_batch()?;
            if batch.is_empty() {
                return Ok(Some((walk.last_page(), (None, read))));
            }
            let bytes = batch.iter().map(|digest| digest.size()).fold(0, u64::saturating_add);
            held.grow(walk.weight().saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX))).await?;
            let blobs = read(batch.clone()).await?;
            ready = batch.into_iter().zip(blobs).collect::<Vec<_>>().into_iter();
        }
    })
}

#[cfg(test)]
mod tests;
