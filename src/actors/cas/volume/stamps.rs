//! Takes [`Stamp`]s, which show whether a file has changed.
//!
//! A stamp is a file's inode number and its change time. Every write, and every change of the modification time, sets
//! the change time to the present, and no user can set it otherwise. A stamp is not conclusive in two cases. In both,
//! the file counts as unverified and is hashed before it is served:
//!
//! - On kernels before 6.13, and on file systems without fine-grained timestamps, a second change within one tick of
//!   the clock leaves the change time as it is. [`has_fine_change_times`] detects this. Where change times are coarse,
//!   a stamp counts only once it is older than [`COARSE_TICK`]. One gap remains there: a reader that opens a file
//!   within that time of its last change does not see a change by another process within the same tick.
//! - The store's own renames and touches set the change time as well. They are made under a read lease (fcntl(2)),
//!   which is granted only if no process has the file open for writing, and which keeps others from opening it for
//!   writing: [`change_unobserved`].

use crate::{actors::cas::index::Stamp, disk::is_full};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
    time::{Duration, SystemTime},
};

/// Longer than one clock tick of any kernel (10 ms at 100 Hz).
pub(crate) const COARSE_TICK: Duration = Duration::from_millis(20);
/// The fcntl(2) command of this name, which the libc crate lacks. It is the same on every architecture.
const F_SETSIG: libc::c_int = 10;
/// Pairs of changes that are compared to tell fine timestamps from coarse ones.
const PROBES: usize = 8;

/// The stamp in a file's metadata.
pub(crate) fn stamp_of(metadata: &Metadata) -> Stamp {
    let changed = metadata.ctime().saturating_mul(1_000_000_000).saturating_add(metadata.ctime_nsec());
    Stamp::new(metadata.ino(), changed)
}

/// The stamp if no later change can leave it as it is, otherwise [`Stamp::UNTRUSTED`].
pub(crate) fn settled(stamp: Stamp, has_fine_times: bool, now: SystemTime) -> Stamp {
    let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let age = nanos as i128 - i128::from(stamp.changed());
    if has_fine_times || age > COARSE_TICK.as_nanos() as i128 { stamp } else { Stamp::UNTRUSTED }
}

/// Whether two successive changes of a file in this directory always differ in their change times. Creates a file and
/// removes it. A full disk has no room for the file, so its change times count as coarse.
///
/// # Errors
/// The errors of the file system.
pub(crate) fn has_fine_change_times(directory: &Path) -> io::Result<bool> {
    match changes_are_told_apart(directory) {
        Err(error) if is_full(&error) => Ok(false),
        told_apart => told_apart,
    }
}

fn changes_are_told_apart(directory: &Path) -> io::Result<bool> {
    let path = directory.join("probe");
    let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    for _ in 0..PROBES {
        file.write_all(b"x")?;
        let before = stamp_of(&file.metadata()?);
        file.write_all(b"x")?;
        if stamp_of(&file.metadata()?) == before {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether others may write a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writers {
    /// No process has it open for writing, and none can open it for writing until the lease ends: with [`end_lease`],
    /// or when the file is closed.
    ShutOut,
    /// A process has the file open for writing.
    Present,
    /// The file system has no leases.
    Unknown,
}

/// Takes a read lease on a file that is open for reading only. Fails if a process has the file open for writing.
pub(crate) fn lease(file: &File) -> Writers {
    // A process that opens the file for writing waits for the end of the lease, and this process gets a signal. It is
    // set to SIGURG, which is ignored by default; the default SIGIO would end the process. SAFETY: these commands take
    // integers, and the descriptor is open.
    let taken = unsafe {
        libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) == 0
    };
    match io::Error::last_os_error().raw_os_error() {
        _ if taken => Writers::ShutOut,
        Some(libc::EAGAIN) => Writers::Present,
        _ => Writers::Unknown,
    }
}

/// Ends a lease, if there is one.
pub(crate) fn end_lease(file: &File) {
    // SAFETY: as in `lease`.
    let _ = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Whether no process has this file open for writing. A writer could change it through a mapping without moving the
/// change time. `file` must be open for reading only.
pub(crate) fn nobody_writes(file: &File) -> bool {
    let writers = lease(file);
    end_lease(file);
    writers != Writers::Present
}

/// Runs `change`, which sets the change time of a file, and returns the new stamp. Returns `None` if the stamp was not
/// `expected` before, or if the file may have been written meanwhile. `file` must be open for reading only.
///
/// # Errors
/// The errors of `change`.
pub(crate) fn change_unobserved(
    file: &File,
    expected: Stamp,
    change: impl FnOnce() -> io::Result<()>,
) -> io::Result<Option<Stamp>> {
    let writers = lease(file);
    let was_expected = file.metadata().is_ok_and(|metadata| stamp_of(&metadata) == expected);
    let changed = change();
    let stamp = file.metadata().ok().map(|metadata| stamp_of(&metadata));
    end_lease(file);
    changed?;
    Ok(stamp.filter(|_| was_expected && writers != Writers::Present))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_of_the_same_tick_counts_only_where_change_times_are_fine() {
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let stamp = Stamp::new(7, 1_000_000_000_000);
        assert_eq!(settled(stamp, true, changed), stamp);
        assert_eq!(settled(stamp, false, changed), Stamp::UNTRUSTED);
        assert_eq!(settled(stamp, false, changed - COARSE_TICK), Stamp::UNTRUSTED, "the clock was set back");
        assert_eq!(settled(stamp, false, changed + 2 * COARSE_TICK), stamp);
    }

    #[test]
    fn an_own_change_is_followed_unless_somebody_may_have_written_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let now = || stamp_of(&file.metadata().unwrap());
        let rename = || std::fs::rename(&path, directory.path().join("renamed"));
        let before = now();
        let after = change_unobserved(&file, before, rename).unwrap();
        assert_eq!(after, Some(now()));
        assert_eq!(
            change_unobserved(&file, Stamp::new(1, 1), || Ok(())).unwrap(),
            None,
            "it was another one"
        );
        if lease(&file) == Writers::Unknown {
            return;
        }
        end_lease(&file);
        let writer = OpenOptions::new().write(true).open(directory.path().join("renamed")).unwrap();
        assert_eq!(change_unobserved(&file, now(), || Ok(())).unwrap(), None, "a writer is there");
        drop(writer);
        assert!(change_unobserved(&file, now(), || Ok(())).unwrap().is_some());
    }
}
