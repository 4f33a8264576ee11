//! Exec directories: created for each run, removed in the background, and swept after a crash (EXE-43).
//!
//! ```text
//! <build_root>/<slot>-<number>/        the run's own directory with its stdout and stderr
//! <build_root>/<slot>-<number>/root/   in a sandbox with namespaces: the input root, or its own layer
//! <build_root>/<slot>-<number>/work    the work directory of overlayfs
//! <build_root>/a-89abcdef/root/        without namespaces: the input root, where the command runs
//! <build_root>/t-<number>/root/        a staged tree
//! ```
//!
//! A command in a mount namespace of its own sees its input root at a fixed path. For other commands, the path is
//! derived from the action, because compilers and other tools write it into their output. The same action gets the same
//! path, unless it runs more than once at the same time (`a-89abcdef-2`). The digits are the first ones of the action's
//! hash. When a run is over, its `a-` directory is moved into the run's own directory, so that the path is free at
//! once. Two directories never have the same number at the same time. All names are short, because commands create
//! sockets below them, whose paths may have at most 108 bytes. Other users cannot enter any of these directories.
//!
//! The build root may be removed while the server runs. The next run creates it again, and runs that lost their
//! directories fail with an error that says so.

mod names;
mod removal;
pub mod staged_trees;
mod workspace;

use super::{
    dir::{self, FileIdentity},
    disk_watch::DiskWatch,
    layer,
    messages::SlotId,
    written,
};
use crate::{directory_hint::spread_subdirectories, logging::Event};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use names::{EntryOwner, TREE_PREFIX, numbered, owner};
use removal::{Job, Remover};
use rustix::{
    fs::{self as rfs, FlockOperation, Mode, RenameFlags, StatVfsMountFlags, flock},
    io::Errno,
};
use staged_trees::{StagedTrees, StagingLimits};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicU64},
    time::Duration,
};

pub use removal::remove;
pub(super) use removal::remove_while;
pub use workspace::Workspace;

const BUILD_ROOT_SWEPT: &str = "build_root_swept";
const BUILD_ROOT_NOEXEC: &str = "build_root_noexec";
const BUILD_ROOT_REMADE: &str = "build_root_remade";
const DIRECTORIES_LEFT: &str = "exec_directories_left";

/// The build root, where exec directories are created. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BuildRoot(Arc<BuildRootState>);

#[derive(Debug)]
struct BuildRootState {
    path: PathBuf,
    places: Mutex<RootDirectories>,
    next: AtomicU64,
    remover: Remover,
    disk: DiskWatch,
    limits: StagingLimits,
}

/// The directories that are or were at the path of a build root.
#[derive(Debug)]
struct RootDirectories {
    current: Arc<RootDirectory>,
    /// Earlier directories, in which actions may still run.
    former: Vec<Weak<RootDirectory>>,
}

/// The directory at the path of a build root. It is locked as long as this value lives, so that no other server sweeps
/// away the directories of running commands.
#[derive(Debug)]
pub(super) struct RootDirectory {
    handle: File,
    id: FileIdentity,
    pub(super) trees: StagedTrees,
}

impl BuildRoot {
    /// Opens the build root, which is created if necessary, and removes leftovers of a crash in the background.
    ///
    /// # Errors
    /// If the directory cannot be created or opened, or if another server uses it.
    pub fn open(path: &Path) -> Result<Self> {
        Self::with_trees(path, StagingLimits::default())
    }

    /// Like [`BuildRoot::open`], with these limits for the staged trees.
    ///
    /// # Errors
    /// As [`BuildRoot::open`].
    pub fn with_trees(path: &Path, limits: StagingLimits) -> Result<Self> {
        let doing = |error: io::Error| Error::io(&format!("open the build root {}", path.display()), &error);
        fs::create_dir_all(path).map_err(doing)?;
        // Commands get absolute paths into it.
        let path = path.canonicalize().map_err(doing)?;
        let place = Arc::new(RootDirectory::open(&path, limits)?);
        let next = AtomicU64::new(0);
        let leftovers = place.sweep(&next).map_err(doing)?;
        if !leftovers.is_empty() {
            Event::info("gorego::worker", BUILD_ROOT_SWEPT)
                .with("directories", leftovers.len())
                .log(format_args!("removing leftovers of an earlier run from the build root"));
        }
        let job = |name| Job { place: place.clone(), name, ticket: None };
        let remover = Remover::start(leftovers.into_iter().map(job).collect());
        let disk = DiskWatch::new(path.clone());
        let places = Mutex::new(RootDirectories { current: place, former: Vec::new() });
        let build_root = Self(Arc::new(BuildRootState { path, places, next, remover, disk, limits }));
        if build_root.is_noexec() {
            let path = build_root.0.path.display();
            Event::warn("gorego::worker", BUILD_ROOT_NOEXEC).with_shown("path", &path).log(format_args!(
                "the build root {path} is on a file system that is mounted noexec: actions cannot run programs that are \
                 among their inputs; set execution.build_root to another directory"
            ));
        }
        Ok(build_root)
    }

    /// Creates an empty exec directory for a run of `action`.
    ///
    /// # Errors
    /// The errors of the file system.
    pub fn create(&self, slot: SlotId, action: &Digest) -> Result<Workspace> {
        self.create_with(slot, Some(action))
    }

    /// Creates an empty exec directory for a run whose command does not see its path.
    ///
    /// # Errors
    /// The errors of the file system.
    pub fn create_unseen(&self, slot: SlotId) -> Result<Workspace> {
        self.create_with(slot, None)
    }

    fn create_with(&self, slot: SlotId, action: Option<&Digest>) -> Result<Workspace> {
        let doing = |error: io::Error| Error::io("make an exec directory", &error);
        let place = self.place()?;
        let ticket = self.0.remover.ticket();
        let name = numbered(&format!("{}-", slot.0), &self.0.next, |name| {
            Ok(rfs::mkdirat(&place.handle, name, Mode::RWXU)?)
        })
        .map_err(doing)?;
        Workspace::open(self, place, name, ticket, action).map_err(doing)
    }

    /// The path, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The disk watch of its file system.
    pub fn disk(&self) -> &DiskWatch {
        &self.0.disk
    }

    /// Whether its file system is mounted noexec, so that programs in it cannot be run.
    pub fn is_noexec(&self) -> bool {
        rfs::statvfs(&self.0.path).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::NOEXEC))
    }

    /// The size of the exec directories on disk, including those that are not removed yet. Blocks while it examines
    /// every file in them.
    pub fn bytes_of_runs(&self) -> u64 {
        let place = self.last_place();
        let entries = dir::entries(&place.handle).into_iter().flatten().map_while(io::Result::ok);
        let of_runs = entries.filter(|entry| {
            matches!(owner(dir::entry_name(entry)), Some(EntryOwner::Run | EntryOwner::Action))
        });
        let bytes = |entry| {
            let run = dir::open_dir(&place.handle, dir::entry_name(&entry)).ok();
            run.map_or(0, |run| written::bytes_below(&run))
        };
        of_runs.map(bytes).fold(0, u64::saturating_add)
    }

    /// Waits until the directories of all runs are removed, for at most `limit`. For a shutdown, when no more runs
    /// begin. Blocks.
    pub fn wait_until_empty(&self, limit: Duration) {
        let left = self.0.remover.wait(limit);
        if left > 0 {
            Event::warn("gorego::worker", DIRECTORIES_LEFT)
                .with("directories", left)
                .log(format_args!("some exec directories are not removed yet; the next start removes them"));
        }
    }

    /// Creates an empty directory for a staged tree. Returns the name to be removed in the end, and the top directory
    /// of the tree.
    pub(super) fn create_tree(&self, place: &Arc<RootDirectory>) -> io::Result<(OsString, File)> {
        let name =
            numbered(TREE_PREFIX, &self.0.next, |name| Ok(rfs::mkdirat(&place.handle, name, Mode::RWXU)?))?;
        let made = dir::open_dir(&place.handle, &name).and_then(|top| layer::make_directory(&top, "root"));
        match made {
            Ok(root) => Ok((name, root)),
            Err(error) => {
                self.remove_later(place, name);
                Err(error)
            }
        }
    }

    /// Removes a directory of `place` in the background.
    pub(super) fn remove_later(&self, place: &Arc<RootDirectory>, name: OsString) {
        self.0.remover.remove(Job { place: place.clone(), name, ticket: None });
    }

    /// Removes a directory of `place` on this thread.
    pub(super) fn remove_here(&self, place: &Arc<RootDirectory>, name: OsString) {
        self.0.remover.remove_here(Job { place: place.clone(), name, ticket: None });
    }

    /// The directory that was at the path last. It may have been removed since.
    pub(super) fn last_place(&self) -> Arc<RootDirectory> {
        self.0.places.lock().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Returns the directory that is at the path now. Creates it again if it was removed.
    pub(super) fn place(&self) -> Result<Arc<RootDirectory>> {
        let BuildRootState { path, places, next, remover, .. } = &*self.0;
        let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there =
            |place: &RootDirectory| rfs::stat(path).is_ok_and(|stat| dir::file_id(&stat) == place.id);
        if is_there(&places.current) {
            return Ok(places.current.clone());
        }
        // A former directory that is at the path again cannot be opened again, because this process still holds its
        // lock.
        places.former.retain(|place| place.strong_count() > 0);
        let back = places.former.iter().filter_map(Weak::upgrade).find(|place| is_there(place));
        if let Some(place) = back {
            places.replace(place.clone());
            return Ok(place);
        }
        let doing =
            |error: io::Error| Error::io(&format!("make the build root {} again", path.display()), &error);
        fs::create_dir_all(path).map_err(doing)?;
        let made = Arc::new(RootDirectory::open(path, self.0.limits)?);
        Event::warn("gorego::worker", BUILD_ROOT_REMADE).with_shown("path", &path.display()).log(format_args!(
            "the build root {} was removed or replaced while the server runs; using the directory that is there now",
            path.display()
        ));
        for name in made.sweep(next).map_err(doing)? {
            remover.remove(Job { place: made.clone(), name, ticket: None });
        }
        places.replace(made.clone());
        Ok(made)
    }
}

impl RootDirectories {
    fn replace(&mut self, place: Arc<RootDirectory>) {
        let former = std::mem::replace(&mut self.current, place);
        self.former.push(Arc::downgrade(&former));
    }
}

impl RootDirectory {
    /// A handle for opening entries in it.
    pub(super) fn handle(&self) -> &File {
        &self.handle
    }

    fn open(path: &Path, limits: StagingLimits) -> Result<Self> {
        let doing = |error: io::Error| Error::io(&format!("open the build root {}", path.display()), &error);
        let handle = File::open(path).map_err(doing)?;
        flock(&handle, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => Error::Precondition(format!(
                "could not open the build root {}: another gorego server runs in it; set execution.build_root to a \
                 separate directory",
                path.display()
            )),
            error => doing(error.into()),
        })?;
        spread_subdirectories(&handle);
        let id = dir::file_id(&rfs::fstat(&handle).map_err(|error| doing(error.into()))?);
        Ok(Self { handle, id, trees: StagedTrees::new(limits) })
    }

    /// Finds leftovers of earlier runs, to be removed. Names derived from an action are freed at once.
    fn sweep(&self, next: &AtomicU64) -> io::Result<Vec<OsString>> {
        let mut leftovers = Vec::new();
        for entry in dir::entries(&self.handle)? {
            let entry = entry?;
            match owner(dir::entry_name(&entry)) {
                Some(EntryOwner::Run | EntryOwner::Tree) => {
                    leftovers.push(dir::entry_name(&entry).to_owned())
                }
                Some(EntryOwner::Action) => {
                    let name = dir::entry_name(&entry);
                    let aside = |aside: &OsStr| {
                        let flags = RenameFlags::NOREPLACE;
                        Ok(rfs::renameat_with(&self.handle, name, &self.handle, aside, flags)?)
                    };
                    // A directory that cannot be moved keeps its name, and runs of that action get another name.
                    leftovers.push(numbered("0-", next, aside).unwrap_or_else(|_| name.to_owned()));
                }
                None => {}
            }
        }
        leftovers.sort_unstable();
        leftovers.dedup();
        Ok(leftovers)
    }
}
