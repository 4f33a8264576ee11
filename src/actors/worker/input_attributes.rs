//! The permission bits and times that inputs have on disk.

use gorego_reapi::tree::{self, NodeProperties};
use rustix::fs::{self as rfs, AtFlags, Stat, Timespec, Timestamps, UTIME_OMIT};
use std::{
    fs::File,
    io,
    time::{Duration, UNIX_EPOCH},
};

/// Permission bits of directories and executable files.
pub(super) const EXECUTABLE: u32 = 0o755;
/// Permission bits of files that are not executable.
const PLAIN: u32 = 0o644;

/// The mtime of every input, and of every directory that [`super::inputs`] creates, unless its node properties name
/// another: 2000-01-01T00:00:00Z. With equal times no file looks newer than its source (make, ninja). The time is after
/// 1980 in every time zone, as zip requires, and its seconds fit into 32 bits, as Python byte code requires.
pub(super) const INPUT_TIME: Timespec = Timespec { tv_sec: 946_684_800, tv_nsec: 0 };

/// The permission bits for a file.
pub(super) fn mode_of(file: &tree::File) -> u32 {
    file.properties.unix_mode.unwrap_or(if file.executable { EXECUTABLE } else { PLAIN })
}

/// The modification time for a node.
pub(super) fn mtime_of(properties: &NodeProperties) -> Timespec {
    let Some(mtime) = properties.mtime else { return INPUT_TIME };
    // The seconds of a SystemTime are an i64, so neither conversion fails.
    let seconds = |since: Duration| i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    match mtime.duration_since(UNIX_EPOCH) {
        Ok(since) => Timespec { tv_sec: seconds(since), tv_nsec: since.subsec_nanos().into() },
        // Nanoseconds always count forward in time.
        Err(before) => match (seconds(before.duration()), before.duration().subsec_nanos()) {
            (seconds, 0) => Timespec { tv_sec: -seconds, tv_nsec: 0 },
            (seconds, nanos) => Timespec { tv_sec: -seconds - 1, tv_nsec: i64::from(1_000_000_000 - nanos) },
        },
    }
}

/// Sets the mtime of `name` itself, even if it is a link. "." means `parent`.
///
/// # Errors
/// The errors of utimensat(2).
pub(super) fn set_mtime_at(parent: &File, name: impl rustix::path::Arg, mtime: Timespec) -> io::Result<()> {
    let times =
        Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime };
    Ok(rfs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The modification time in a stat.
#[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
pub(super) fn mtime_in(stat: &Stat) -> Timespec {
    Timespec { tv_sec: stat.st_mtime as i64, tv_nsec: stat.st_mtime_nsec as i64 }
}
