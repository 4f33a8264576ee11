//! Removes exec directories: off the hot path where possible, and never through a link or into another mount.
//!
//! One background thread does it; when that is behind, the worker removes its directory itself. What cannot be removed (an
//! immutable file, a mount) is logged, left, and tried again by the sweep of the next start. A [`Ticket`] is held for each
//! directory of a run that is not gone yet, so that a shutdown can wait for all of them.

use super::Place;
use crate::{
    actors::worker::dir::{self, Cursor},
    logging::Event,
};
use rustix::{
    fs::{self as rfs, AtFlags, FileType, Mode, OFlags},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

/// How many directories may wait for removal; more would mean that removing is slower than running, and the disk fills.
const REMOVAL_BACKLOG: usize = 64;
/// How often one directory is read again because entries turned up while it was emptied.
const EMPTYING_ROUNDS: usize = 3;

const DIRECTORY_NOT_REMOVED: &str = "exec_directory_not_removed";

/// The way to the thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Remover {
    /// `None` when the thread could not be started; then everything is removed in line.
    queue: Option<SyncSender<Job>>,
    pending: Arc<Pending>,
}

/// A directory to be removed.
#[derive(Debug)]
pub(super) struct Job {
    /// The directory that it is in.
    pub place: Arc<Place>,
    /// Its name there.
    pub name: OsString,
    /// `None` for what an earlier run left.
    pub ticket: Option<Ticket>,
}

impl Job {
    /// Removes it here and now.
    pub fn remove(self) {
        let Self { place, name, ticket } = self;
        if let Err(error) = remove(&place.handle, &name) {
            Event::warn("gorego::worker", DIRECTORY_NOT_REMOVED)
                .with_shown("name", &name.display())
                .with_shown("error", &error)
                .log(format_args!("an exec directory could not be removed; the next start tries again"));
        }
        // Whoever waits for the ticket may open the build root again.
        drop((place, ticket));
    }
}

/// How many directories of runs are there.
#[derive(Debug, Default)]
struct Pending {
    count: Mutex<usize>,
    fewer: Condvar,
}

impl Pending {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stands for one directory that is not gone yet.
#[derive(Debug)]
pub(super) struct Ticket(Arc<Pending>);

impl Drop for Ticket {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.fewer.notify_all();
    }
}

impl Remover {
    /// Starts the thread, which first removes `leftovers`.
    pub fn start(leftovers: Vec<Job>) -> Self {
        let (sender, jobs) = sync_channel::<Job>(REMOVAL_BACKLOG);
        let spawned = thread::Builder::new()
            .name("gorego-remover".into())
            .spawn(move || leftovers.into_iter().chain(jobs).for_each(Job::remove));
        Self { queue: spawned.ok().map(|_| sender), pending: Arc::default() }
    }

    /// A directory is about to be made.
    pub fn ticket(&self) -> Ticket {
        *self.pending.count() += 1;
        Ticket(self.pending.clone())
    }

    /// Has a directory removed, in the background unless that is behind.
    pub fn remove(&self, job: Job) {
        let refused = match &self.queue {
            Some(queue) => queue
                .try_send(job)
                .err()
                .map(|(TrySendError::Full(job) | TrySendError::Disconnected(job))| job),
            None => Some(job),
        };
        if let Some(job) = refused {
            job.remove();
        }
    }

    /// Waits until every directory of a run is gone, for `limit` at most; says how many are left.
    pub fn wait(&self, limit: Duration) -> usize {
        let left = self.pending.fewer.wait_timeout_while(self.pending.count(), limit, |count| *count > 0);
        *left.unwrap_or_else(PoisonError::into_inner).0
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
