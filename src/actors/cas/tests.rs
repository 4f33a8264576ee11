//! Tests of the whole store: a real actor on a real directory.

mod abandoned;
mod checksums;
mod chunks;
pub(super) mod clock;
mod compressed;
mod damage;
mod disk;
mod durability;
mod every_file;
mod inputs;
mod leases;
mod links;
mod model;
mod odd_files;
mod packing;
mod resolve;
mod results;
mod scrub;
mod sharing;
mod store;
mod upload_room;
mod uploads;
mod volumes;

use super::{blob::BlobReader, client::*, forms::zstd_reader::Item, *};
use crate::{
    action::TimeoutPolicy,
    caller::{Caller, Owner, Peer},
    instance::{Instance, InstancePolicy},
};
use bytes::Bytes;
use gorego_reapi::{digest::DigestFunction, error::Error, proto::reapi};
use std::{
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};
use tempfile::TempDir;

const SHA256: DigestFunction = DigestFunction::Sha256;
const MB: u64 = 1 << 20;
/// How long leases last in the tests that have leases.
const TIMES: LeaseTimes = LeaseTimes { named: 10_800, unnamed: 900 };
/// A blob of this size is not hashed at every read.
const LARGE: usize = 300_000;

fn digest(bytes: &[u8]) -> Digest {
    SHA256.digest(bytes)
}

pub(super) fn settings_at(root: PathBuf, max_bytes: u64) -> StoreSettings {
    StoreSettings {
        root,
        max_bytes,
        max_blob_bytes: 100 * MB,
        partial_upload_retention: Duration::from_secs(600),
        zstd_level: 1,
        sync: Default::default(),
        scrub_bytes_per_second: 0,
        leases: LeaseTimes::default(),
        result_links_bytes: 1 << 20,
        packing: None,
        timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(600) },
    }
}

/// The instances of every store. Principals have results of their own in the last one.
fn instances() -> Instances {
    let private = InstancePolicy { private_results: true, ..InstancePolicy::default() };
    let names =
        [("", InstancePolicy::default()), ("other/one", InstancePolicy::default()), ("private", private)];
    Instances::with_policies(names.map(|(name, policy)| (name.to_owned(), policy))).unwrap()
}

/// A running store. Every test runs on one thread, so blocking calls go through [`TestStore::worker`].
struct TestStore {
    root: Rc<TempDir>,
    cas: Cas,
    main: Instance,
    other: Instance,
    max_bytes: u64,
}

impl TestStore {
    async fn new() -> Self {
        Self::with_limit(1_000 * MB).await
    }

    /// A store that is too small for segments, so that every blob and result has a file of its own.
    async fn of_files() -> Self {
        Self::with_limit(200 * MB).await
    }

    async fn with_limit(max_bytes: u64) -> Self {
        Self::at(Rc::new(TempDir::new().unwrap()), max_bytes).await
    }

    /// A store in which builds have leases.
    async fn with_leases(max_bytes: u64) -> Self {
        Self::with_leases_at(Rc::new(TempDir::new().unwrap()), max_bytes).await
    }

    async fn with_leases_at(root: Rc<TempDir>, max_bytes: u64) -> Self {
        let settings = StoreSettings { leases: TIMES, ..settings_at(root.path().join("store"), max_bytes) };
        Self::over(root, settings).await
    }

    async fn at(root: Rc<TempDir>, max_bytes: u64) -> Self {
        let settings = settings_at(root.path().join("store"), max_bytes);
        Self::over(root, settings).await
    }

    async fn over(root: Rc<TempDir>, settings: StoreSettings) -> Self {
        let instances = instances();
        let actor =
            eventually(|| async { CasActor::open(settings.clone(), &instances, Handle::current()).ok() })
                .await;
        let (main, other) = (instances.get("").unwrap(), instances.get("other/one").unwrap());
        let max_bytes = settings.max_bytes;
        Self { root, cas: actor.launch(), main, other, max_bytes }
    }

    /// Closes the store and opens it again. Closing writes only access times, so the files are the same as after a
    /// kill.
    async fn restart(self) -> Self {
        let max_bytes = self.max_bytes;
        self.restart_with_limit(max_bytes).await
    }

    async fn restart_with_limit(self, max_bytes: u64) -> Self {
        let Self { root, cas, .. } = self;
        cas.actor().send(CloseStore).await.unwrap();
        drop(cas);
        Self::at(root, max_bytes).await
    }

    async fn put(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = digest(&bytes);
        self.cas.write_many(&self.main, vec![(digest, bytes)]).await.unwrap().remove(0).unwrap();
        digest
    }

    async fn get(&self, digest: Digest) -> Result<Bytes> {
        read_all(&self.cas.open(&self.main, digest).await?).await
    }

    async fn has(&self, digest: Digest) -> bool {
        self.cas.find_missing(&self.main, &[digest]).await.unwrap().is_empty()
    }

    async fn inspect(&self) -> StoreInspection {
        self.cas.actor().send(InspectStore).await.unwrap()
    }

    /// Runs blocking calls as a worker thread would.
    async fn worker<T: Send + 'static>(&self, work: impl FnOnce(Cas, Instance) -> T + Send + 'static) -> T {
        let (cas, main) = (self.cas.clone(), self.main.clone());
        tokio::task::spawn_blocking(move || work(cas, main)).await.unwrap()
    }

    /// All files of the store, except its lock and format.
    fn files(&self) -> Vec<PathBuf> {
        fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.path().is_dir() { walk(&entry.path(), found) } else { found.push(entry.path()) }
            }
        }
        let mut found = vec![];
        walk(&self.root.path().join("store/v1"), &mut found);
        found
    }

    /// The files of one blob or action.
    fn files_of(&self, digest: Digest) -> Vec<PathBuf> {
        let mut files = self.files();
        files.retain(|path| path.to_string_lossy().contains(&digest.hash_hex()));
        files
    }

    fn file_of(&self, digest: Digest) -> PathBuf {
        let mut files = self.files_of(digest);
        assert_eq!(files.len(), 1, "{digest}: {files:?}");
        files.remove(0)
    }

    /// The position of the content of a blob or result: a file, an offset in it, and whether other entries are in
    /// the same file.
    fn place_of(&self, digest: Digest) -> (PathBuf, u64, bool) {
        let find = |kind| {
            let key = index::Key { digest, instance: self.main.id(), kind };
            self.cas.shared().view.read(None, |look| look.renew(&key)).0
        };
        let found = [index::EntryKind::Blob, index::EntryKind::Result].into_iter().find_map(find);
        let (path, offset) = self.cas.shared().volume.place(&found.unwrap().file).unwrap();
        (path, offset, offset > 0)
    }

    /// Flips a bit of the stored content of a blob or result.
    fn damage(&self, digest: Digest) {
        use std::os::unix::fs::FileExt as _;
        let (path, offset, is_record) = self.place_of(digest);
        if !is_record {
            return overwrite(&path, |bytes| *bytes.last_mut().unwrap() ^= 1);
        }
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }

    /// Destroys a blob's content, so that the store drops the blob.
    async fn lose(&self, digest: Digest) {
        match self.place_of(digest) {
            (_, _, true) => self.damage(digest),
            (path, _, false) => std::fs::remove_file(path).unwrap(),
        }
        self.cas.shared().recent.clear();
        assert!(matches!(self.get(digest).await, Err(Error::NotFound(_))));
        assert!(!self.has(digest).await);
    }
}

async fn read_all(reader: &BlobReader) -> Result<Bytes> {
    let mut bytes = vec![];
    loop {
        let piece = reader.read_at(bytes.len() as u64, 100_000).await?;
        if piece.is_empty() {
            return Ok(bytes.into());
        }
        bytes.extend_from_slice(&piece);
    }
}

/// Polls `ask` until there is an answer.
async fn eventually<T, F: Future<Output = Option<T>>>(mut ask: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "the condition was not met in time");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Replaces a stored file by a changed copy, without the store's knowledge.
fn overwrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Incompressible bytes, determined by the seed.
fn noise(length: usize, seed: u64) -> Bytes {
    let block = |n: u64| SHA256.digest(&[seed.to_le_bytes(), n.to_le_bytes()].concat()).hash().to_vec();
    (0..).flat_map(block).take(length).collect()
}
