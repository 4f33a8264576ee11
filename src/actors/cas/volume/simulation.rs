//! A simulated power cut, for tests: synced data is kept, and everything else is kept or lost at random.
//!
//! The store runs on a real directory. [`SimulatedDisk`] observes its syncs and records what is certain: the content of each file
//! at its last sync, and the names in each directory at its last sync. [`SimulatedDisk::cut_power`] makes a directory as it may
//! be found after a power cut. Each sector of a file has either its synced or its latest content, and the length of the file is
//! between the two. Each name that has changed since its directory was synced is in either state. This is harsher than a file
//! system with a journal.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    fs::{self, File, Metadata},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::UNIX_EPOCH,
};
use tempfile::TempDir;

const SECTOR_BYTES: usize = 512;

static DISKS: Mutex<Vec<(PathBuf, Weak<SimulatedDisk>)>> = Mutex::new(Vec::new());

/// Random numbers that a seed determines (splitmix64).
#[derive(Debug, Clone)]
pub(in crate::actors::cas) struct Random(pub u64);

impl Random {
    /// A number below this one.
    pub(in crate::actors::cas) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// A file or directory: its inode number and the time of its creation, because inode numbers are used again.
type Identity = (u64, u128);

/// The disk below one directory.
#[derive(Debug)]
pub(in crate::actors::cas) struct SimulatedDisk {
    root: PathBuf,
    state: Mutex<DiskState>,
}

#[derive(Debug)]
struct DiskState {
    files: HashMap<Identity, Vec<u8>>,
    directories: HashMap<PathBuf, BTreeMap<OsString, Identity>>,
    random: Random,
    /// Syncs until the power fails.
    syncs_left: Option<u32>,
    syncs_fail: bool,
    /// The directory that is found after the power cut.
    image: Option<TempDir>,
}

impl SimulatedDisk {
    /// The disk below an empty directory.
    pub(in crate::actors::cas) fn new(root: &Path, seed: u64) -> Arc<Self> {
        let root = root.canonicalize().unwrap();
        let state = DiskState {
            files: HashMap::new(),
            directories: HashMap::from([(root.clone(), BTreeMap::new())]),
            random: Random(seed),
            syncs_left: None,
            syncs_fail: false,
            image: None,
        };
        let disk = Arc::new(Self { root: root.clone(), state: Mutex::new(state) });
        let mut disks = DISKS.lock().unwrap();
        disks.retain(|(_, disk)| disk.strong_count() > 0);
        disks.push((root, Arc::downgrade(&disk)));
        disk
    }

    /// Makes the power fail after this number of further syncs, just before the last of them.
    pub(in crate::actors::cas) fn fail_power_at(&self, syncs: u32) {
        self.state().syncs_left = Some(syncs);
    }

    /// Whether the power has failed.
    pub(in crate::actors::cas) fn is_off(&self) -> bool {
        self.state().image.is_some()
    }

    /// Makes syncs fail from now on, or work again.
    pub(in crate::actors::cas) fn fail_syncs(&self, fail: bool) {
        self.state().syncs_fail = fail;
    }

    /// The directory that is found after a power cut. Unless the power has failed already, it fails now.
    pub(in crate::actors::cas) fn cut_power(&self) -> TempDir {
        let mut state = self.state();
        if state.image.is_none() {
            state.cut(&self.root);
        }
        state.image.take().unwrap()
    }

    fn state(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap()
    }

    /// Records what is certain after a sync, unless the power or the sync fails.
    fn sync(&self, note: impl FnOnce(&mut DiskState)) -> io::Result<()> {
        let mut state = self.state();
        if state.image.is_some() {
            return Err(io::Error::other("the power is off"));
        }
        if let Some(left) = &mut state.syncs_left {
            *left -= 1;
            if *left == 0 {
                state.cut(&self.root);
                return Err(io::Error::other("the power has failed"));
            }
        }
        if state.syncs_fail {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        note(&mut state);
        Ok(())
    }
}

impl DiskState {
    fn note_directory(&mut self, path: &Path) {
        self.directories.insert(path.to_owned(), entries(path));
    }

    /// Records everything in a directory tree.
    fn note_all(&mut self, path: &Path) {
        self.note_directory(path);
        for entry in fs::read_dir(path).unwrap().flatten() {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                self.note_all(&entry.path());
            } else if metadata.is_file() {
                self.files.insert(identity(&metadata), fs::read(entry.path()).unwrap());
            }
        }
    }

    fn cut(&mut self, root: &Path) {
        let image = TempDir::new().unwrap();
        self.cut_directory(root, image.path());
        self.image = Some(image);
        self.syncs_left = None;
    }

    fn cut_directory(&mut self, from: &Path, to: &Path) {
        let certain = self.directories.get(from).cloned().unwrap_or_default();
        let now = entries(from);
        let names: BTreeSet<&OsString> = certain.keys().chain(now.keys()).collect();
        for name in names {
            let (before, after) = (certain.get(name).copied(), now.get(name).copied());
            let chosen = if before == after || self.random.below(2) == 0 { after } else { before };
            let Some(chosen) = chosen else { continue };
            let is_now = Some(chosen) == after;
            let (path, target) = (from.join(name), to.join(name));
            if is_now && path.is_dir() {
                fs::create_dir(&target).unwrap();
                self.cut_directory(&path, &target);
            } else {
                let written = if is_now { fs::read(&path).ok() } else { None };
                let content = self.cut_file(chosen, written);
                fs::write(&target, content).unwrap();
            }
        }
    }

    /// A mixture of the synced and the latest content.
    fn cut_file(&mut self, file: Identity, written: Option<Vec<u8>>) -> Vec<u8> {
        let synced = self.files.get(&file).cloned();
        let written = written.unwrap_or_else(|| synced.clone().unwrap_or_default());
        let synced = synced.unwrap_or_default();
        if synced == written {
            return written;
        }
        let (least, most) = (synced.len().min(written.len()), synced.len().max(written.len()));
        let length = match self.random.below(3) {
            0 => least,
            1 => most,
            _ => least + self.random.below((most - least) as u64 + 1) as usize,
        };
        let all_of_one = self.random.below(4);
        let mut content = vec![0; length];
        for (sector, bytes) in content.chunks_mut(SECTOR_BYTES).enumerate() {
            let from = match all_of_one {
                0 => &synced,
                1 => &written,
                _ if self.random.below(2) == 0 => &synced,
                _ => &written,
            };
            let from = from.get(sector * SECTOR_BYTES..).unwrap_or_default();
            bytes.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
        content
    }
}

fn entries(path: &Path) -> BTreeMap<OsString, Identity> {
    let listed = fs::read_dir(path).into_iter().flatten().flatten();
    listed.filter_map(|entry| Some((entry.file_name(), identity(&entry.metadata().ok()?)))).collect()
}

fn identity(metadata: &Metadata) -> Identity {
    let created = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    (metadata.ino(), created.unwrap_or_default().as_nanos())
}

fn disk_of(path: &Path) -> Option<Arc<SimulatedDisk>> {
    let disks = DISKS.lock().unwrap();
    disks.iter().find(|(root, _)| path.starts_with(root)).and_then(|(_, disk)| disk.upgrade())
}

/// Called before a file is synced.
pub(super) fn before_sync_of_file(file: &File) -> io::Result<()> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let Some(disk) = disk_of(&path) else { return Ok(()) };
    disk.sync(|state| {
        let metadata = file.metadata().unwrap();
        // The descriptor may be open for writing only.
        let content = fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        state.files.insert(identity(&metadata), content);
    })
}

/// Called before a directory is synced.
pub(super) fn before_sync_of_directory(path: &Path) -> io::Result<()> {
    let path = path.canonicalize()?;
    let Some(disk) = disk_of(&path) else { return Ok(()) };
    disk.sync(|state| state.note_directory(&path))
}

/// Called before the whole file system is synced.
pub(super) fn before_sync_of_all(path: &Path) -> io::Result<()> {
    let path = path.canonicalize()?;
    let Some(disk) = disk_of(&path) else { return Ok(()) };
    // The whole file system is synced, for any directory in it.
    disk.sync(|state| state.note_all(&disk.root))
}

/// Random operations on the volume of the product, and a power cut at a random point.
mod power_cuts {
    use super::*;
    use crate::{
        actors::cas::{
            index::{EntryKind, FileId, Index, Key, LeaseTimes},
            recovery::recover,
            volume::{Compacted, NewFile, SyncPolicy, Volume, local::Local, read_all, segments::Sizes},
        },
        instance::{InstanceId, Instances},
    };
    use bytes::Bytes;
    use gorego_reapi::digest::{Digest, DigestFunction};

    const LARGE: u64 = 70_000;
    const MOST: u64 = 1 << 40;

    /// The entries that the store has acknowledged, and the changes that it has only been asked for.
    #[derive(Default)]
    struct Model {
        /// Blobs that must exist, by name.
        blobs: BTreeMap<Digest, FileId>,
        /// For each result, the versions that may be found, and whether one must be found.
        results: BTreeMap<u64, (BTreeSet<u64>, bool)>,
        result_files: BTreeMap<u64, FileId>,
    }

    struct PowerRun {
        disk: Arc<SimulatedDisk>,
        volume: Local,
        random: Random,
        model: Model,
        sizes: Sizes,
    }

    fn blob(seed: u64, length: u64) -> Bytes {
        let block =
            |n: u64| DigestFunction::Sha256.digest(&[seed, n].map(u64::to_le_bytes).concat()).hash().to_vec();
        (0..).flat_map(block).take(length as usize).collect()
    }

    fn key_of(kind: EntryKind, digest: Digest) -> Key {
        Key { digest, instance: InstanceId(0), kind }
    }

    fn result_key(name: u64) -> Key {
        key_of(EntryKind::Result, DigestFunction::Sha256.digest(&name.to_le_bytes()))
    }

    /// The bytes of a version of a result, with a checksum like real results.
    fn result(name: u64, version: u64) -> Bytes {
        let body = [name, version].map(u64::to_le_bytes).concat();
        [DigestFunction::Sha256.digest(&body).hash(), &body].concat().into()
    }

    fn open(root: &Path, sizes: Sizes, sync: SyncPolicy) -> (Local, Index) {
        let volume = Local::with_sizes(root, &Instances::new([""]).unwrap(), sizes, sync).unwrap();
        let index = recover(&volume, MOST, LeaseTimes::default(), 0);
        (volume, index)
    }

    impl PowerRun {
        fn write(&mut self, files: &[(Key, Bytes)]) -> Option<Vec<FileId>> {
            let new: Vec<NewFile<'_>> = files
                .iter()
                .map(|(key, bytes)| NewFile { key: *key, pieces: std::slice::from_ref(bytes) })
                .collect();
            let written: Vec<_> = self.volume.write(&new).into_iter().collect::<io::Result<_>>().ok()?;
            let ids: Vec<FileId> = written.iter().map(|written| written.file).collect();
            self.volume.sync(&ids).ok().map(|()| ids)
        }

        fn delete(&self, file: FileId) -> bool {
            self.volume
                .delete(&[crate::actors::cas::index::Victim { file, bytes: self.volume.charge(0) }])
                .is_empty()
        }

        fn step(&mut self) {
            match self.random.below(100) {
                0..35 => {
                    let count = 1 + self.random.below(6);
                    let blobs: Vec<Bytes> = (0..count)
                        .map(|_| blob(self.random.below(1 << 40), self.random.below(3_000)))
                        .collect();
                    self.put_blobs(&blobs);
                }
                35..50 => {
                    let length = LARGE + self.random.below(200_000);
                    let bytes = blob(self.random.below(1 << 40), length);
                    if self.random.below(2) == 0 {
                        self.put_blobs(&[bytes]);
                    } else {
                        self.put_draft(&bytes);
                    }
                }
                50..70 => self.put_result(),
                70..85 => {
                    let victim = self.pick();
                    if let Some((digest, file)) = victim {
                        // A deleted blob may come back, because nothing relies on its absence.
                        self.model.blobs.remove(&digest);
                        self.delete(file);
                    }
                }
                85..90 => {
                    let name = self.random.below(4);
                    if let Some(file) = self.model.result_files.remove(&name) {
                        let must = self.delete(file);
                        let (versions, must_be) = self.model.results.entry(name).or_default();
                        *must_be = false;
                        if must {
                            versions.clear();
                        }
                    }
                }
                _ => self.compact(),
            }
        }

        fn pick(&mut self) -> Option<(Digest, FileId)> {
            let at = self.random.below(self.model.blobs.len().max(1) as u64) as usize;
            self.model.blobs.iter().nth(at).map(|(digest, file)| (*digest, *file))
        }

        fn put_blobs(&mut self, blobs: &[Bytes]) {
            let new: Vec<(Key, Bytes)> = blobs
                .iter()
                .map(|bytes| (key_of(EntryKind::Blob, DigestFunction::Sha256.digest(bytes)), bytes.clone()))
                .filter(|(key, _)| !self.model.blobs.contains_key(&key.digest))
                .collect();
            let files = self.write(&new).unwrap_or_default();
            self.model.blobs.extend(files.into_iter().map(|file| (file.key.digest, file)));
        }

        fn put_draft(&mut self, bytes: &Bytes) {
            let key = key_of(EntryKind::Blob, DigestFunction::Sha256.digest(bytes));
            let mut draft = self.volume.draft().unwrap();
            bytes.chunks(50_000).for_each(|piece| draft.write(piece).unwrap());
            if let Ok(written) = draft.keep(key)
                && self.volume.sync(&[written.file]).is_ok()
            {
                self.model.blobs.insert(key.digest, written.file);
            }
        }

        fn put_result(&mut self) {
            let (name, version) = (self.random.below(4), self.random.below(1 << 40));
            self.model.results.entry(name).or_default().0.insert(version);
            let Some(files) = self.write(&[(result_key(name), result(name, version))]) else { return };
            self.model.results.insert(name, (BTreeSet::from([version]), true));
            if let Some(old) = self.model.result_files.insert(name, files[0]) {
                self.delete(old);
            }
        }

        fn compact(&mut self) {
            let model = Mutex::new(&mut self.model);
            let outcome = self.volume.compact(&mut |moves| {
                let mut model = model.lock().unwrap();
                let relocate = |(from, generation): &(FileId, u64)| {
                    let model = &mut **model;
                    let mut places = model.blobs.values_mut().chain(model.result_files.values_mut());
                    let place = places.find(|file| *file == from);
                    place.map(|file| file.generation = *generation).is_some()
                };
                moves.moved.iter().map(relocate).collect()
            });
            assert!(outcome.is_ok() || self.disk.is_off(), "{outcome:?}");
            let _ = outcome.unwrap_or(Compacted::NothingToGain);
        }

        /// Opens the directory that a power cut has left. With `must`, it has to contain everything that was acknowledged.
        fn check(&self, image: &TempDir, must: bool, sync: SyncPolicy) {
            let (volume, index) = open(image.path(), self.sizes, sync);
            let content = |key: &Key| {
                let found = index.renew(key, 0)?;
                let stored = volume.open(&found.file).ok()?;
                let bytes = read_all(&*stored, MOST).ok()?;
                let digest = DigestFunction::Sha256.digest(&bytes);
                let is_right = key.kind == EntryKind::Result || digest == key.digest;
                // Readers hash small blobs and files without checksums.
                let is_hashed = !stored.is_checked_when_read() || key.digest.size() <= 65_536;
                assert!(is_right || is_hashed, "wrong bytes of {key:?} would be served");
                is_right.then_some(Bytes::from(bytes))
            };
            for digest in self.model.blobs.keys().filter(|_| must) {
                assert!(content(&key_of(EntryKind::Blob, *digest)).is_some(), "{digest} is lost");
            }
            for (&name, (versions, must_be)) in &self.model.results {
                let all: Vec<Bytes> = versions.iter().map(|version| result(name, *version)).collect();
                let found =
                    content(&result_key(name)).filter(|bytes| crate::actors::cas::results::is_whole(bytes));
                match found {
                    Some(bytes) if must => assert!(all.contains(&bytes), "result {name} is an old one"),
                    Some(_) => {}
                    None => assert!(!must || !must_be, "result {name} is lost"),
                }
            }
            // The store continues to work.
            let bytes = Bytes::from_static(b"after the power cut");
            let key = key_of(EntryKind::Blob, DigestFunction::Sha256.digest(&bytes));
            assert!(volume.write(&[NewFile { key, pieces: &[bytes] }])[0].is_ok());
        }
    }

    fn run(seed: u64, sizes: Sizes, sync: SyncPolicy) {
        let root = TempDir::new().unwrap();
        let disk = SimulatedDisk::new(root.path(), seed);
        let (volume, _) = open(root.path(), sizes, sync);
        let mut random = Random(seed);
        let steps = random.below(60);
        match sync {
            SyncPolicy::BeforeAnswer if random.below(2) == 0 => {
                disk.fail_power_at(1 + random.below(120) as u32)
            }
            _ => {}
        }
        let mut run = PowerRun { disk, volume, random, model: Model::default(), sizes };
        for _ in 0..steps {
            run.step();
            if run.disk.is_off() {
                break;
            }
        }
        let image = run.disk.cut_power();
        run.check(&image, sync == SyncPolicy::BeforeAnswer, sync);
    }

    fn small_segments() -> Sizes {
        Sizes::for_tests(4_096, 40_000)
    }

    /// Everything that was acknowledged exists after a power cut, with the right bytes.
    #[test]
    fn with_disk_durability_a_power_cut_loses_nothing_that_was_acknowledged() {
        for seed in 0..40 {
            run(seed, small_segments(), SyncPolicy::BeforeAnswer);
            run(seed, Sizes::of(0), SyncPolicy::BeforeAnswer);
        }
    }

    /// Without syncs, a power cut may lose anything, and the remaining files are right or their damage is noticed.
    #[test]
    fn with_process_durability_a_power_cut_never_leaves_wrong_bytes() {
        for seed in 0..40 {
            run(seed, small_segments(), SyncPolicy::Never);
            run(seed, Sizes::of(0), SyncPolicy::Never);
        }
    }
}
