//! Exec directories: one a run, made fresh, removed off the hot path, swept after a crash (EXE-43).
//!
//! `<build_root>/<slot>-<number>/` holds `root/` (the input root, where the command runs), `stdout` and `stderr`. The number
//! is never used twice at the same time. The names are short because commands make sockets below them, whose paths may have
//! 108 bytes. The directory itself is closed to other users.
//!
//! Removal goes to one background thread; when that is behind, the worker removes its directory itself. What cannot be
//! removed (an immutable file, a mount) is logged, left, and tried again by the sweep of the next start.

use super::{
    dir::{self, Cursor},
    messages::SlotId,
};
use crate::{
    error::{Error, Result},
    spread::spread_subdirectories,
};
use rustix::{
    fs::{self as rfs, AtFlags, FileType, FlockOperation, Mode, OFlags, flock},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread,
};

/// How many directories may wait for removal; more would mean that removing is slower than running, and the disk fills.
const REMOVAL_BACKLOG: usize = 64;
/// How many names are tried for a new directory; others can only be taken by what a crashed run left.
const NAME_ATTEMPTS: usize = 10_000;
/// How often one directory is read again because entries turned up while it was emptied.
const EMPTYING_ROUNDS: usize = 3;

const DIRECTORY_NOT_REMOVED: &str = "exec_directory_not_removed";
const BUILD_ROOT_SWEPT: &str = "build_root_swept";

/// The build root: where exec directories are made. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BuildRoot(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    handle: File,
    next: AtomicU64,
    /// `None` when the thread could not be started; then everything is removed in line.
    remover: Option<SyncSender<OsString>>,
}

impl BuildRoot {
    /// Opens the build root, which is made if need be, and has what a crashed run left removed in the background. It is locked
    /// for as long as this lives, or else the sweep would take another server's directories away under its commands.
    ///
    /// # Errors
    /// When the directory cannot be made or opened, or when another server has it.
    pub fn open(path: &Path) -> Result<Self> {
        let doing = |error: io::Error| Error::io(&format!("open the build root {}", path.display()), &error);
        fs::create_dir_all(path).map_err(doing)?;
        // Commands get absolute paths into it.
        let path = path.canonicalize().map_err(doing)?;
        let handle = File::open(&path).map_err(doing)?;
        flock(&handle, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => Error::Precondition(format!(
                "could not open the build root {}: another gorego server runs in it; set execution.build_root to a \
                 directory of its own",
                path.display()
            )),
            error => doing(error.into()),
        })?;
        spread_subdirectories(&handle);
        let leftovers = leftovers(&handle).map_err(doing)?;
        if !leftovers.is_empty() {
            log::info!(target: "gorego::worker", event = BUILD_ROOT_SWEPT, directories = leftovers.len();
                "removing what an earlier run left in the build root");
        }
        let remover = start_remover(handle.try_clone().map_err(doing)?, leftovers);
        Ok(Self(Arc::new(Inner { path, handle, next: AtomicU64::new(0), remover })))
    }

    /// Makes an empty exec directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&self, slot: SlotId) -> Result<Workspace> {
        let doing = |error: io::Error| Error::io("make an exec directory", &error);
        let name = self.fresh_name(slot).map_err(doing)?;
        let path = self.0.path.join(&name);
        let mut workspace = Workspace { build_root: self.clone(), name, path, opened: None };
        // From here on a failure drops the workspace, which removes what there is.
        workspace.opened = Some(workspace.lay_out().map_err(doing)?);
        Ok(workspace)
    }

    fn fresh_name(&self, slot: SlotId) -> io::Result<OsString> {
        for _ in 0..NAME_ATTEMPTS {
            let number = self.0.next.fetch_add(1, Ordering::Relaxed);
            let name = OsString::from(format!("{}-{number}", slot.0));
            match rfs::mkdirat(&self.0.handle, &*name, Mode::RWXU) {
                Ok(()) => return Ok(name),
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::EXIST.into())
    }
}

/// An exec directory; removed when dropped.
#[derive(Debug)]
pub struct Workspace {
    build_root: BuildRoot,
    name: OsString,
    path: PathBuf,
    opened: Option<Opened>,
}

#[derive(Debug)]
struct Opened {
    top: File,
    root: File,
}

impl Workspace {
    fn lay_out(&self) -> io::Result<Opened> {
        let top = dir::open_dir(&self.build_root.0.handle, &self.name)?;
        rfs::mkdirat(&top, "root", Mode::from_raw_mode(0o755))?;
        let root = dir::open_dir(&top, OsStr::new("root"))?;
        rfs::fchmod(&root, Mode::from_raw_mode(0o755))?;
        Ok(Opened { top, root })
    }

    /// The exec directory itself, which holds the logs.
    ///
    /// # Errors
    /// None in practice; a workspace in hand is laid out.
    pub fn top(&self) -> Result<&File> {
        self.opened.as_ref().map(|opened| &opened.top).ok_or_else(not_laid_out)
    }

    /// The input root.
    ///
    /// # Errors
    /// As [`Workspace::top`].
    pub fn root(&self) -> Result<&File> {
        self.opened.as_ref().map(|opened| &opened.root).ok_or_else(not_laid_out)
    }

    /// Absolute path of the exec directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn not_laid_out() -> Error {
    Error::internal("the exec directory is not open")
}

impl Drop for Workspace {
    fn drop(&mut self) {
        self.opened = None;
        let inner = &self.build_root.0;
        let name = std::mem::take(&mut self.name);
        let refused = match &inner.remover {
            Some(remover) => remover.try_send(name.clone()).is_err(),
            None => true,
        };
        if refused {
            remove_logged(&inner.handle, &name);
        }
    }
}

/// Entries of the build root that carry our names; nothing else there is ours to remove.
fn leftovers(build_root: &File) -> io::Result<Vec<OsString>> {
    let ours = |name: &OsStr| {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        name.to_str().and_then(|name| name.split_once('-')).is_some_and(|(a, b)| digits(a) && digits(b))
    };
    let mut names = Vec::new();
    for entry in dir::entries(build_root)? {
        let entry = entry?;
        if ours(dir::entry_name(&entry)) {
            names.push(dir::entry_name(&entry).to_owned());
        }
    }
    Ok(names)
}

/// The thread ends when the build root is dropped.
fn start_remover(handle: File, leftovers: Vec<OsString>) -> Option<SyncSender<OsString>> {
    let (sender, names) = sync_channel::<OsString>(REMOVAL_BACKLOG);
    thread::Builder::new()
        .name("gorego-remover".into())
        .spawn(move || {
            for name in leftovers.into_iter().chain(names) {
                remove_logged(&handle, &name);
            }
        })
        .ok()
        .map(|_| sender)
}

fn remove_logged(parent: &File, name: &OsStr) {
    if let Err(error) = remove(parent, name) {
        log::warn!(target: "gorego::worker", event = DIRECTORY_NOT_REMOVED, name = name.to_string_lossy().as_ref(),
            error = error.to_string(); "an exec directory could not be removed; the next start tries again");
    }
}

/// Removes a directory and all below it, however deep, without following a link or crossing into another mount. Goes on after
/// a failure and reports the first.
///
/// # Errors
/// When anything is left.
pub fn remove(parent: &File, name: &OsStr) -> io::Result<()> {
    // A cursor starts inside its tree and grants itself access on each step down; so the parent is its top.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut cursor = Cursor::new(rfs::openat(parent, ".", flags, Mode::empty())?.into())?;
    let mut failure = None;
    // Names still to be entered, for each level; the last of a level is the one being emptied.
    let mut levels: Vec<Vec<OsString>> = vec![vec![name.to_owned()]];
    let mut entering = true;
    let mut rounds = 0;
    while let Some(level) = levels.last_mut() {
        let Some(child) = level.last() else {
            levels.pop();
            if !levels.is_empty() {
                cursor.up()?;
            }
            entering = false;
            continue;
        };
        if entering {
            if let Err(error) = cursor.down(child) {
                failure.get_or_insert(error);
                level.pop();
                continue;
            }
            let (below, trouble) = empty(cursor.here()?).unwrap_or_else(|error| (Vec::new(), Some(error)));
            failure = failure.or(trouble);
            levels.push(below);
            continue;
        }
        // Back from below: what was emptied can go.
        match rfs::unlinkat(cursor.here()?, &**child, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY) if failure.is_none() && rounds < EMPTYING_ROUNDS => rounds += 1,
            removed => {
                if let Err(error) = removed {
                    failure.get_or_insert(error.into());
                }
                rounds = 0;
                level.pop();
            }
        }
        entering = true;
    }
    failure.map_or(Ok(()), Err)
}

/// Removes everything in a directory but its subdirectories; gives those, and the first failure.
fn empty(here: &File) -> io::Result<(Vec<OsString>, Option<io::Error>)> {
    let (mut below, mut failure) = (Vec::new(), None);
    for entry in dir::entries(here)? {
        let entry = entry?;
        let name = dir::entry_name(&entry);
        let kind = match entry.file_type() {
            FileType::Unknown => dir::file_type(&dir::stat_at(here, name)?),
            known => known,
        };
        if kind == FileType::Directory {
            below.push(name.to_owned());
        } else if let Err(error) = rfs::unlinkat(here, OsStr::from_bytes(name.as_bytes()), AtFlags::empty()) {
            failure.get_or_insert(error.into());
        }
    }
    Ok((below, failure))
}
