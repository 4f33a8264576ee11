//! [`FetchedStore`]: the store for a replayed action. Its inputs were downloaded, and only the digests of its outputs
//! are computed.

use super::{fetch::FetchedAction, scratch::Scratch};
use crate::{
    actors::{
        cas::client::Provenance,
        worker::store::{BlobStore, Inputs, Outputs},
    },
    caller::Owner,
    instance::Instance,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
    tree::InputTree,
};
use rustix::fs::{Mode, OFlags, fchmod, openat};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// Number of bytes of an output that are read at once.
const PIECE_BYTES: usize = 256 * 1024;

/// The inputs of one action, and the Trees of its output directories.
#[derive(Debug)]
pub(super) struct FetchedStore {
    tree: Arc<InputTree>,
    blobs: PathBuf,
    trees: Mutex<HashMap<Digest, Vec<u8>>>,
}

impl FetchedStore {
    pub(super) fn new(fetched: &FetchedAction, scratch: &Scratch) -> Self {
        Self { tree: fetched.tree.clone(), blobs: scratch.blobs(), trees: Mutex::default() }
    }

    /// The messages that were stored, by digest.
    pub(super) fn into_trees(self) -> HashMap<Digest, Vec<u8>> {
        self.trees.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobStore for FetchedStore {
    fn open_inputs(&self, _: &Instance, root: Digest, _: Owner) -> Result<Box<dyn Inputs>> {
        if root != self.tree.digest() {
            return Err(Error::internal("this is not the input root that was downloaded"));
        }
        Ok(Box::new(FetchedInputs { tree: self.tree.clone(), blobs: self.blobs.clone() }))
    }

    fn begin_outputs(&self, _: &Instance, function: DigestFunction, _: Owner) -> Box<dyn Outputs + '_> {
        Box::new(NamedOutputs { store: self, function })
    }

    fn relieve_disk(&self, _: &dyn Fn() -> bool) {}
}

struct FetchedInputs {
    tree: Arc<InputTree>,
    blobs: PathBuf,
}

impl Inputs for FetchedInputs {
    fn tree(&self) -> &Arc<InputTree> {
        &self.tree
    }

    // The downloaded files are never evicted.
    fn hold_all(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold(&mut self, _: Vec<Digest>) -> Result<()> {
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        let copy = || -> io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file = File::from(openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
            if !digest.is_empty() {
                // The kernel copies the file, and shares its blocks if the file system supports that.
                io::copy(&mut File::open(self.blobs.join(digest.hash_hex()))?, &mut file)?;
            }
            Ok(fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?)
        };
        copy().map_err(|error| Error::io(&format!("make input file \"{}\"", name.escape_debug()), &error))
    }
}

/// Outputs of which only the digests are computed.
struct NamedOutputs<'a> {
    store: &'a FetchedStore,
    function: DigestFunction,
}

impl Outputs for NamedOutputs<'_> {
    fn file(&mut self, _: &File, name: &str, mut file: File) -> Result<Digest> {
        let mut hash = || -> io::Result<Digest> {
            let mut hasher = self.function.hasher(file.metadata()?.len());
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(hasher.finish()),
                    count => hasher.update(piece.get(..count).unwrap_or_default()),
                }
            }
        };
        hash().map_err(|error| Error::io(&format!("read output \"{}\"", name.escape_debug()), &error))
    }

    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        let digest = self.function.digest(&bytes);
        self.store.trees.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, bytes);
        Ok(digest)
    }

    fn hold(&mut self, _: Vec<Digest>) -> Result<()> {
        Ok(())
    }

    fn expect(&mut self, _: u64) {}

    fn publish(&mut self) -> Result<()> {
        Ok(())
    }

    fn result(&mut self, _: Digest, _: reapi::ActionResult, _: Provenance) -> Result<()> {
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
