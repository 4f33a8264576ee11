//! A simulated power cut, for tests: synced data is kept, and everything else is kept or lost at random.
//!
//! The store runs on a real directory. [`SimulatedDisk`] observes its syncs and records what is certain: the content of
//! each file at its last sync, and the names in each directory at its last sync. [`SimulatedDisk::cut_power`] makes a
//! directory as it may be found after a power cut. Each sector of a file has either its synced or its latest content,
//! and the length of the file is between the two. Each name that has changed since its directory was synced is in
//! either state. This is harsher than a file system with a journal.

mod power_cuts;

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
