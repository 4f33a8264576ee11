//! The scrub of the staged trees: reads their files at a bounded rate and compares them with their digests.
//!
//! Actions read staged files through the kernel, which checks nothing. A tree in which a file is missing or has another
//! content is not used again, and runs that use it at that time fail as this server's fault. So a damaged disk misleads
//! actions for about a day at most.
//!
//! The scrub has one thread of its own with the lowest priority. It changes no file. Its leases keep a tree from being
//! removed while it is read, and do not count as uses. While the disk is low, nothing is read.

use super::{NODE_BYTES, TreeLease, index::TreeId};
use crate::{
    actors::worker::{
        build_root::{BuildRoot, RootDirectory},
        dir::{self, Cursor},
    },
    background,
    logging::Event,
    rate::ReadingPace,
};
use gorego_reapi::tree::{self, Directory, InputTree};
use rustix::{
    fs::{FileType, Mode, fstat, readlinkat},
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::{
        PoisonError,
        atomic::Ordering,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

/// Time between two checks of a tree, and from its construction to the first.
pub(super) const EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// Time from a check that could not be finished to the next.
const RETRY_AFTER: Duration = Duration::from_secs(60 * 60);
/// Time between two searches for trees that are due.
const ROUND: Duration = Duration::from_secs(60);
/// Maximum number of trees that are checked in one round.
const MOST_PER_ROUND: usize = 64;
/// Number of bytes that are read at once.
const PIECE_BYTES: usize = 256 * 1024;

/// The scrub of the trees of one build root. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct TreeScrub {
    _stop: Sender<()>,
}

/// The state of the thread.
pub(super) struct TreeScrubber {
    build_root: BuildRoot,
    pace: ReadingPace,
    stop: Receiver<()>,
    piece: Vec<u8>,
}

/// Why the check of a tree ends early.
#[derive(Debug)]
enum Interruption {
    /// The server stops in the middle of the check.
    Stopping,
    /// The tree may have to be removed, because the disk is low.
    LowDisk,
    /// An error that says nothing about the tree, such as one about the number of open files.
    Undecided(String),
    /// The node at this path, relative to the build root, is not as the Directories of the tree describe it.
    Damaged(PathBuf, String),
}

impl BuildRoot {
    /// Starts the scrub of the staged trees. `None` if the rate is zero or the thread could not be started.
    pub(crate) fn scrub_trees(&self, bytes_per_second: u64) -> Option<TreeScrub> {
        if bytes_per_second == 0 {
            return None;
        }
        let (stop, stopped) = mpsc::channel();
        let mut scrubber = TreeScrubber::new(self.clone(), bytes_per_second, stopped);
        match thread::Builder::new().name("tree-scrub".into()).spawn(move || scrubber.run()) {
            Ok(_) => Some(TreeScrub { _stop: stop }),
            Err(error) => {
                Event::warn("gorego::worker", "scrub_failed")
                    .with_shown("error", &error)
                    .log(format_args!("the scrub of the staged inputs could not be started"));
                None
            }
        }
    }
}

impl TreeScrubber {
    pub(super) fn new(build_root: BuildRoot, bytes_per_second: u64, stop: Receiver<()>) -> Self {
        let pace = ReadingPace::new(bytes_per_second, Instant::now());
        Self { build_root, pace, stop, piece: vec![0; PIECE_BYTES] }
    }

    fn run(&mut self) {
        background::lower_priority();
        while self.pause(ROUND).is_ok() {
            self.round(Instant::now());
        }
    }

    /// Waits. Ends at once when the server stops.
    fn pause(&self, time: Duration) -> Result<(), Interruption> {
        match self.stop.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(Interruption::Stopping),
        }
    }

    /// Checks the trees that are due, the most overdue first. Returns how many checks were finished.
    pub(super) fn round(&mut self, now: Instant) -> usize {
        let place = self.build_root.last_place();
        let mut finished = 0;
        for id in due(&place, now) {
            let Some(tree) = place.trees.lock().lease_aside(id) else { continue };
            let lease = TreeLease { build_root: self.build_root.clone(), place: place.clone(), id, tree };
            let next = match self.check(&lease) {
                Ok(()) => now + EVERY,
                Err(Interruption::Undecided(error)) => {
                    postponed(&lease, &error);
                    now + RETRY_AFTER
                }
                Err(Interruption::Stopping) => return finished,
                Err(Interruption::LowDisk) => break,
                Err(Interruption::Damaged(path, reason)) => {
                    report(&lease, &path, &reason);
                    now + EVERY
                }
            };
            *lease.tree.scrub_at.lock().unwrap_or_else(PoisonError::into_inner) = next;
            finished += 1;
        }
        finished
    }

    /// Pauses as long as reading this many bytes may take.
    fn charge(&mut self, bytes: u64) -> Result<(), Interruption> {
        let pause = self.pace.after(bytes, Instant::now());
        self.pause(pause)
    }

    fn check(&mut self, lease: &TreeLease) -> Result<(), Interruption> {
        let (tree, mut path) = (&lease.tree.tree, lease.path());
        let mut cursor = dir::open_beneath(lease.place.handle(), &path)
            .and_then(|top| Cursor::at(&top))
            .map_err(|error| Interruption::of(&path, &error))?;
        self.check_below(tree, tree.root(), &mut cursor, &mut path)
    }

    /// Checks the directory of the cursor, which is at `path`, and everything below it.
    fn check_below(
        &mut self,
        tree: &InputTree,
        directory: &Directory,
        cursor: &mut Cursor,
        path: &mut PathBuf,
    ) -> Result<(), Interruption> {
        if self.build_root.disk().look().is_some_and(|space| space.is_low()) {
            return Err(Interruption::LowDisk);
        }
        let here = cursor.here().map_err(|error| Interruption::of(path, &error))?;
        let names = dir::names(here).map_err(|error| Interruption::of(path, &error))?;
        if names.len() > directory.entries() {
            return Err(Interruption::Damaged(path.clone(), "there are other files in the directory".into()));
        }
        for file in &directory.files {
            self.check_file(here, file, path)?;
        }
        for link in &directory.symlinks {
            let path = path.join(&link.name);
            self.charge(NODE_BYTES)?;
            let target = readlinkat(here, &*link.name, Vec::new());
            let target = target.map_err(|error| Interruption::of(&path, &error.into()))?;
            if target.as_bytes() != link.target.as_bytes() {
                return Err(Interruption::Damaged(path, "the symbolic link has another target".into()));
            }
        }
        for child in &directory.directories {
            path.push(&child.name);
            match cursor.down_unchanged(OsStr::new(&child.name)) {
                Ok(()) => {
                    self.check_below(tree, tree.directory(&child.digest), cursor, path)?;
                    cursor.up().map_err(|error| Interruption::of(path, &error))?;
                }
                // The input root takes the permission to enter it away from this process, too.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(Interruption::of(path, &error)),
            }
            path.pop();
        }
        Ok(())
    }

    /// Compares a file in `parent`, whose path is `directory`, with the file that should be there.
    fn check_file(&mut self, parent: &File, file: &tree::File, directory: &Path) -> Result<(), Interruption> {
        let (path, digest) = (directory.join(&file.name), &file.digest);
        self.charge(NODE_BYTES)?;
        let unreadable = |error: io::Error| Interruption::of(&path, &error);
        let mut open = match dir::open_unchanged(parent, OsStr::new(&file.name)) {
            // The input root takes the permission to read it away from this process, too.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
            opened => opened.map_err(unreadable)?,
        };
        let stat = fstat(&open).map_err(|error| unreadable(error.into()))?;
        if dir::file_type(&stat) != FileType::RegularFile {
            return Err(Interruption::Damaged(path, "it is not a regular file".into()));
        }
        let is_executable = Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR);
        if file.properties.unix_mode.is_none() && is_executable != file.executable {
            return Err(Interruption::Damaged(path, "its executable bit has changed".into()));
        }
        let mut hasher = digest.hasher();
        loop {
            let read = match open.read(&mut self.piece) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(unreadable)?,
            };
            hasher.update(self.piece.get(..read).unwrap_or_default());
            self.charge(read as u64)?;
        }
        let found = hasher.finish();
        if found != *digest {
            return Err(Interruption::Damaged(path, format!("its content has the digest {found}")));
        }
        Ok(())
    }
}

impl Interruption {
    /// The interruption by an error of the file system at this path.
    fn of(path: &Path, error: &io::Error) -> Self {
        let is_damage = dir::is_absence(error)
            || matches!(Errno::from_io_error(error), Some(Errno::IO | Errno::STALE | Errno::INVAL));
        if is_damage {
            Self::Damaged(path.to_owned(), error.to_string())
        } else {
            Self::Undecided(format!("{}: {error}", path.display()))
        }
    }
}

/// The trees that are due, the most overdue first.
fn due(place: &RootDirectory, now: Instant) -> Vec<TreeId> {
    let trees: Vec<_> =
        place.trees.lock().latest(usize::MAX).map(|(id, _, tree)| (id, tree.clone())).collect();
    let times =
        trees.iter().map(|(id, tree)| (*tree.scrub_at.lock().unwrap_or_else(PoisonError::into_inner), *id));
    let mut due: Vec<_> = times.filter(|(at, _)| *at <= now).collect();
    due.sort_by_key(|(at, _)| *at);
    due.into_iter().map(|(_, id)| id).take(MOST_PER_ROUND).collect()
}

fn postponed(lease: &TreeLease, error: &str) {
    Event::warn("gorego::worker", "scrub_failed").with("error", error).log(format_args!(
        "the scrub of staged inputs could not read {} and tries again later: {error}",
        lease.build_root.path().join(lease.path()).display()
    ));
}

/// Stops the use of a damaged tree. It is removed with its last lease.
fn report(lease: &TreeLease, path: &Path, reason: &str) {
    lease.tree.is_damaged.store(true, Ordering::SeqCst);
    let _ = lease.place.trees.lock().discard(lease.id);
    let path = lease.build_root.path().join(path);
    Event::error("gorego::worker", "staged_tree_damaged")
        .with_shown("path", &path.display())
        .with("error", reason)
        .log(format_args!(
            "a staged input is damaged, so its tree is not used again: {}: {reason}",
            path.display()
        ));
}
