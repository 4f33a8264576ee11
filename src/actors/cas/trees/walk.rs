//! [`Walk`]: yields the distinct directories below a root, breadth first, for GetTree.
//!
//! Each distinct directory is read once, so a tree that refers to one directory a million times costs no more than one
//! that does so once (CAS-24). Directories are returned exactly as stored, because clients find children by the digests
//! of the directories that they receive. The state of a walk ([`Frontier`]) does not read: it names the directories to
//! read next and is given their bytes.
//!
//! The memory of all walks together is bounded: [`WALKS_MAX`] run at a time, with [`SMALL_WALK_BYTES`] each, and a walk
//! that needs more waits for one of [`LARGE_WALKS_MAX`] places. Both are shared among peers ([`Budget`]). Waiting walks
//! cost next to nothing. Directories that the caller still holds count too. A walk that is dropped gives up its places,
//! or its place in the queue.

use crate::{
    actors::cas::client::Cas,
    budget::{Bounds, Budget, Share},
    caller::Caller,
    instance::Instance,
    memory, slow_work,
};
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi::Directory,
    tree::MAX_DIRECTORY_BYTES,
    wire::{self, Limits},
};
use std::{
    collections::{HashSet, VecDeque},
    vec,
};
use tokio::task::coop::consume_budget;

/// Maximum number of distinct directories in one walk.
pub(crate) const MAX_DIRECTORIES: usize = 1_000_000;
/// Memory of a found directory during the walk: its digest is in the set and in the queue, and both have room to grow.
const FOUND_BYTES: usize = 320;
/// Minimum size of a subdirectory on the wire: its name, and a digest of 32 characters.
const NODE_MIN_BYTES: usize = 40;
/// Bound on the memory of one decoded directory: about 250,000 files. Clients accept 4 MiB by default.
const DIRECTORY_MAX_MEMORY: u64 = 96 * 1024 * 1024;
/// Directories of at least this size may take a millisecond to decode.
const LABORIOUS_BYTES: usize = 16 * 1024;
/// Walks that run at the same time. Few clients ask for trees, and most trees take milliseconds.
pub(crate) const WALKS_MAX: u64 = 32;
/// Memory that a walk may take without a large place: a full page of directories of usual size (15 MiB) and 25,000
/// found ones.
pub(crate) const SMALL_WALK_BYTES: usize = 24 * 1024 * 1024;
/// Number of walks that may take more memory at the same time: 320 MB with the most directories, and 300 MB more while
/// the largest one is sent. One peer gets one of the two.
pub(crate) const LARGE_WALKS_MAX: u64 = 2;
/// Maximum number of directories that are read at once.
const READ_MAX_DIRECTORIES: usize = 256;
/// Maximum bytes of directories that are read at once, by the sizes in their digests. A larger one is read alone.
const READ_MAX_BYTES: u64 = 1024 * 1024;

/// Reads blobs, in the order of the digests.
type Read = Box<dyn Fn(Vec<Digest>) -> BoxFuture<'static, Result<Vec<Result<Bytes>>>> + Send + Sync>;

/// A step of a walk.
#[derive(Debug, Clone, PartialEq)]
pub struct Visited {
    /// The directory. `None` if it is not stored: only the root must be (CAS-26).
    pub directory: Option<Directory>,
    /// The approximate memory that it takes.
    pub weight: usize,
}

/// A walk in progress; see the module documentation.
pub struct Walk {
    frontier: Frontier,
    /// Directories that are read and not yet visited.
    ready: vec::IntoIter<(Digest, Result<Bytes>)>,
    held: WalkPlaces,
    read: Read,
}

impl Cas {
    /// Begins a walk below a root.
    pub fn walk_tree(&self, instance: &Instance, root: Digest) -> Walk {
        let (cas, instance) = (self.clone(), instance.clone());
        let read = move |digests| {
            let (cas, instance) = (cas.clone(), instance.clone());
            async move { cas.read_many(&instance, digests).await }.boxed()
        };
        Walk::over(root, self.shared().walks.clone(), self.caller(), read)
    }
}

impl Walk {
    /// A walk over directories that `read` returns.
    pub(crate) fn over(
        root: Digest,
        walks: Walks,
        caller: Caller,
        read: impl Fn(Vec<Digest>) -> BoxFuture<'static, Result<Vec<Result<Bytes>>>> + Send + Sync + 'static,
    ) -> Self {
        let held = WalkPlaces { walks, caller, place: None, large: None };
        Self { frontier: Frontier::new(root), ready: Vec::new().into_iter(), held, read: Box::new(read) }
    }

    /// The next directory; `None` at the end. `kept` is the approximate memory of earlier directories that the caller
    /// still holds.
    ///
    /// # Errors
    /// `NotFound` when the root is not stored; `Invalid` when a blob is not a Directory; `Precondition` when the tree
    /// is too large.
    pub async fn next(&mut self, kept: usize) -> Result<Option<Visited>> {
        loop {
            if let Some((digest, blob)) = self.ready.next() {
                return self.visit(digest, blob, kept).await.map(Some);
            }
            let batch = self.frontier.next_batch()?;
            if batch.is_empty() {
                return Ok(None);
            }
            let bytes = batch.iter().map(|digest| digest.size()).fold(0, u64::saturating_add);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            self.held.grow(kept.saturating_add(self.frontier.weight()).saturating_add(bytes)).await?;
            let blobs = (self.read)(batch.clone()).await?;
            self.ready = batch.into_iter().zip(blobs).collect::<Vec<_>>().into_iter();
        }
    }

    async fn visit(&mut self, digest: Digest, blob: Result<Bytes>, kept: usize) -> Result<Visited> {
        let bytes = blob.as_deref().unwrap_or_default();
        let is_laborious = bytes.len() >= LABORIOUS_BYTES;
        let weight = if is_laborious { slow_work::run(|| weigh(bytes)) } else { weigh(bytes) };
        let found = self.frontier.weight_with(bytes);
        self.held.grow(kept.saturating_add(found).saturating_add(weight)).await?;
        let directory = if is_laborious {
            slow_work::run(|| self.frontier.visit(digest, blob))
        } else {
            consume_budget().await;
            self.frontier.visit(digest, blob)
        };
        Ok(Visited { directory: directory?, weight })
    }
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walk").field("frontier", &self.frontier).finish_non_exhaustive()
    }
}

/// The state of a walk.
#[derive(Debug)]
struct Frontier {
    root: Digest,
    /// Directories that are found and not yet read.
    queue: VecDeque<Digest>,
    found: HashSet<Digest>,
}

impl Frontier {
    fn new(root: Digest) -> Self {
        Self { root, queue: VecDeque::from([root]), found: HashSet::from([root]) }
    }

    /// The directories to read next, in the order in which [`Frontier::visit`] expects them. The list is empty at the
    /// end of the walk.
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

    /// Visits the next directory of the walk. Returns `None` when it is not stored.
    fn visit(&mut self, digest: Digest, blob: Result<Bytes>) -> Result<Option<Directory>> {
        let blob = match blob {
            Ok(blob) => blob,
            Err(Error::NotFound(_)) if digest != self.root => return Ok(None),
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
        Ok(Some(directory))
    }

    /// The approximate memory that it takes.
    fn weight(&self) -> usize {
        self.found.len().saturating_mul(FOUND_BYTES)
    }

    /// An upper bound on the weight once this directory is visited.
    fn weight_with(&self, blob: &[u8]) -> usize {
        self.weight().saturating_add(blob.len() / NODE_MIN_BYTES * FOUND_BYTES)
    }
}

/// The approximate memory of a decoded directory. A directory that will be refused counts only its bytes, because it is
/// not decoded.
fn weigh(blob: &[u8]) -> usize {
    let cost = wire::cost::<Directory>(blob, Limits::memory(DIRECTORY_MAX_MEMORY));
    let memory = cost.map_or(0, |cost| cost.memory);
    usize::try_from(memory).unwrap_or(usize::MAX).saturating_add(blob.len())
}

/// The places for walks of all clients.
#[derive(Debug, Clone)]
pub(crate) struct Walks {
    places: Budget,
    large: Budget,
}

impl Default for Walks {
    fn default() -> Self {
        Self::new(WALKS_MAX, LARGE_WALKS_MAX)
    }
}

impl Walks {
    /// Budgets of `places` walks and `large` large walks.
    pub(crate) fn new(places: u64, large: u64) -> Self {
        let budget = |what, total| Budget::new(Bounds::shared(what, total));
        Self { places: budget("walks over trees", places), large: budget("walks over large trees", large) }
    }
}

/// The places of [`Walks`] that one walk holds. Only a walk that has a place waits for a large one, and a walk that has
/// both waits only for its caller. So all walks end if their callers continue or give up.
#[derive(Debug)]
struct WalkPlaces {
    walks: Walks,
    caller: Caller,
    place: Option<Share>,
    large: Option<Share>,
}

impl Drop for WalkPlaces {
    fn drop(&mut self) {
        if self.large.is_some() {
            memory::freed(DIRECTORY_MAX_MEMORY);
        }
    }
}

impl WalkPlaces {
    /// Waits for permission to take this much memory.
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
