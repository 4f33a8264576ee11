//! [`MemoryStore`]: a store in memory that implements what a worker needs.

use super::SHA256;
use gorego::{
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
    tree::{Directory, InputTree},
};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{Read as _, Write as _},
    sync::{Arc, Mutex},
};

/// An in-memory store. Like the real one, it moves output files instead of copying them if possible.
#[derive(Default)]
pub(crate) struct MemoryStore {
    pub(crate) blobs: Mutex<HashMap<Digest, Vec<u8>>>,
    pub(crate) results: Mutex<HashMap<Digest, reapi::ActionResult>>,
    /// The blobs that batches were asked to hold.
    pub(crate) held: Mutex<HashSet<Digest>>,
    /// A blob that the next `open_inputs` finds, but that turns out to be missing when it is written.
    pub(crate) lost_next: Mutex<Option<Digest>>,
    /// A blob that the next `open_inputs` finds, but whose writing panics.
    pub(crate) panic_next: Mutex<Option<Digest>>,
}

impl MemoryStore {
    pub(crate) fn put(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = SHA256.digest(&bytes);
        self.blobs.lock().unwrap().insert(digest, bytes);
        digest
    }

    pub(crate) fn get(&self, digest: &reapi::Digest) -> Vec<u8> {
        let digest = Digest::parse(SHA256, &digest.hash, digest.size_bytes).unwrap();
        self.blobs.lock().unwrap().get(&digest).expect("the blob is stored").clone()
    }
}

/// A shared handle, which implements the trait.
pub(crate) struct Handle(pub Arc<MemoryStore>);

struct Opened {
    tree: Arc<InputTree>,
    blobs: HashMap<Digest, Vec<u8>>,
    held: HashSet<Digest>,
    lost: Option<Digest>,
    panics: Option<Digest>,
}

impl BlobStore for Handle {
    fn open_inputs(&self, _: &Instance, root: Digest, _: Owner) -> Result<Box<dyn Inputs>> {
        let blobs = self.0.blobs.lock().unwrap().clone();
        let (mut directories, mut todo) = (HashMap::new(), vec![root]);
        while let Some(digest) = todo.pop() {
            let bytes = if digest.is_empty() { Some(&[][..]) } else { blobs.get(&digest).map(|b| &**b) };
            let bytes = bytes.ok_or_else(|| Error::MissingBlobs(vec![digest]))?;
            let directory = Directory::decode(bytes, SHA256)?;
            todo.extend(directory.directories.iter().map(|child| child.digest));
            directories.insert(digest, Arc::new(directory));
        }
        let tree = Arc::new(InputTree::new(root, directories)?);
        let [lost, panics] =
            [&self.0.lost_next, &self.0.panic_next].map(|digest| digest.lock().unwrap().take());
        Ok(Box::new(Opened { tree, blobs, held: HashSet::new(), lost, panics }))
    }

    fn begin_outputs(&self, _: &Instance, function: DigestFunction, _: Owner) -> Box<dyn Outputs + '_> {
        assert_eq!(function, DigestFunction::Sha256, "the function of all actions here");
        Box::new(Batch(self.0.clone()))
    }

    fn relieve_disk(&self, _: &dyn Fn() -> bool) {}
}

struct Batch(Arc<MemoryStore>);

impl Outputs for Batch {
    fn file(&mut self, parent: &File, name: &str, mut file: File) -> Result<Digest> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        if rustix::fs::fstat(&file).unwrap().st_nlink == 1 {
            rustix::fs::unlinkat(parent, name, AtFlags::empty()).unwrap();
        }
        Ok(self.0.put(bytes))
    }

    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        Ok(self.0.put(bytes))
    }

    fn hold(&mut self, digests: Vec<Digest>) -> Result<()> {
        let blobs = self.0.blobs.lock().unwrap();
        let missing: Vec<_> = digests.iter().filter(|digest| !blobs.contains_key(digest)).copied().collect();
        self.0.held.lock().unwrap().extend(digests);
        if missing.is_empty() { Ok(()) } else { Err(Error::MissingBlobs(missing)) }
    }

    fn expect(&mut self, _: u64) {}

    fn publish(&mut self) -> Result<()> {
        Ok(())
    }

    fn result(&mut self, action: Digest, result: reapi::ActionResult, _: Provenance) -> Result<()> {
        self.0.results.lock().unwrap().insert(action, result);
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl Inputs for Opened {
    fn tree(&self) -> &Arc<InputTree> {
        &self.tree
    }

    fn hold_all(&mut self) -> Result<()> {
        self.hold(self.tree.blobs().to_vec())
    }

    fn hold(&mut self, blobs: Vec<Digest>) -> Result<()> {
        self.held.extend(blobs);
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        if self.lost == Some(*digest) {
            return Err(Error::MissingBlobs(vec![*digest]));
        }
        assert_ne!(self.panics, Some(*digest), "the panic that the test asked for");
        assert!(digest.is_empty() || self.held.contains(digest), "{name} is not held");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(mode)).unwrap();
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).unwrap();
        File::from(fd).write_all(&self.blobs[digest]).unwrap();
        Ok(())
    }
}
