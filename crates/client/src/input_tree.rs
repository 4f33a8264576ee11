//! Reads messages from the store, and the Directories of a whole input root.

use super::{Client, Progress};
use crate::codec::ANSWER_MAX_MEMORY;
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::{Directory, InputTree, MAX_DIRECTORY_BYTES, MAX_TREE_DEPTH, MAX_TREE_NODES},
    wire,
};
use prost::{Message, Name};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

impl Client {
    /// Reads a message that is stored as a blob. `what` names it in errors, as in "Action".
    ///
    /// # Errors
    /// `MissingBlobs` if the server does not have it; `Invalid` if the blob is not such a message; other errors of the
    /// server.
    pub async fn read_message<M: Message + Name + Default>(&self, digest: Digest, what: &str) -> Result<M> {
        let bytes = match self.read_bytes(digest, MAX_DIRECTORY_BYTES, &Arc::default()).await {
            Err(Error::NotFound(_)) => return Err(Error::MissingBlobs(vec![digest])),
            read => read?,
        };
        wire::decode(&*bytes, ANSWER_MAX_MEMORY, what)
            .map_err(|error| Error::Invalid(format!("blob {digest} is not a usable {what}: {error}")))
    }

    /// Reads all Directories below a root, level by level.
    ///
    /// # Errors
    /// `MissingBlobs` with all Directories that are known to be missing; `Invalid` if one is malformed, or if the tree
    /// is too large or too deep; other errors of the server.
    pub async fn input_tree(&self, root: Digest) -> Result<InputTree> {
        let mut directories = HashMap::new();
        let mut seen = HashSet::from([root]);
        let (mut level, mut missing, mut nodes) = (vec![root], Vec::new(), 0u64);
        for _ in 0..=MAX_TREE_DEPTH {
            let absent: HashSet<_> = self.find_missing(level.iter().copied()).await?.into_iter().collect();
            missing.extend(level.iter().filter(|digest| absent.contains(*digest)));
            level.retain(|digest| !absent.contains(digest));
            let mut next = Vec::new();
            for (digest, bytes) in self.read_all(level).await? {
                let directory = Directory::decode(&bytes, digest.function())
                    .map_err(|error| Error::Invalid(format!("directory {digest}: {error}")))?;
                nodes = nodes.saturating_add(directory.entries() as u64);
                if nodes > MAX_TREE_NODES {
                    return Err(Error::Invalid(format!(
                        "directory {root} has more than {MAX_TREE_NODES} nodes below it"
                    )));
                }
                let children = directory.directories.iter().map(|child| child.digest);
                next.extend(children.filter(|child| seen.insert(*child)));
                directories.insert(digest, Arc::new(directory));
            }
            level = next;
            if level.is_empty() {
                break;
            }
        }
        if !missing.is_empty() {
            return Err(Error::MissingBlobs(missing));
        }
        InputTree::new(root, directories)
    }

    async fn read_all(&self, digests: Vec<Digest>) -> Result<HashMap<Digest, Bytes>> {
        let mut blobs = HashMap::with_capacity(digests.len());
        // The empty blob is never fetched (GEN-06).
        let (empty, digests): (Vec<_>, Vec<_>) = digests.into_iter().partition(Digest::is_empty);
        blobs.extend(empty.into_iter().map(|digest| (digest, Bytes::new())));
        for batch in self.batches(digests) {
            match batch[..] {
                [large] if !self.fits_batch(&large) => {
                    let progress = Arc::<Progress>::default();
                    let bytes = self.read_bytes(large, MAX_DIRECTORY_BYTES, &progress).await?;
                    blobs.insert(large, bytes.into());
                }
                _ => {
                    let read = self.read_batch(&batch).await?;
                    if let Some(absent) = batch.iter().find(|digest| !read.contains_key(*digest)) {
                        return Err(Error::NotFound(format!("the server did not send blob {absent}")));
                    }
                    blobs.extend(read);
                }
            }
        }
        Ok(blobs)
    }
}
