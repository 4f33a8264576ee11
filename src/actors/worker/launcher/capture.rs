//! [`Capture`]: moves the standard output and error of one command from two pipes into two log files.
//!
//! The command gets the write ends of the pipes, as it would from a shell, so that it can open `/dev/stderr` or
//! `/proc/self/fd/1` again in any mode. The runner moves the bytes. It owns the log files while the command runs: no
//! other process writes to them, and they only grow. Readers of live output rely on that. A log is created when its
//! first bytes arrive, so a command that prints nothing costs no files.
//!
//! Invariants: a log has the bytes of its pipe in the order in which they were written, and never more than its limit.
//! No read blocks. Memory is bounded by the two pipes and one buffer. A pipe is not read for every byte: after each
//! read the runner pauses ([`pause`]), while the writer continues.

use super::protocol::IncompleteLog;
use rustix::{
    event::{PollFd, PollFlags},
    fs::{self as rfs, CWD, Gid, Mode, OFlags, Uid},
    io::{Errno, ioctl_fionread},
    pipe::{PipeFlags, fcntl_getpipe_size, pipe_with},
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Maximum size of one read: the capacity of a pipe whose size was not changed.
pub(super) const BUFFER_BYTES: usize = 64 * 1024;
/// A pipe should be full to 1/`GOAL_PART` when it is read. With a quarter, the writer does not wait even if it is four
/// times faster than expected, or leaves half of each page of the pipe empty.
const GOAL_PART: u32 = 4;
/// Longest pause after a read. A command that prints a byte at a time wakes the runner at most 500 times a second. A
/// command that prints a lot after a pause waits this long once.
const READ_PAUSE: Duration = Duration::from_millis(2);
/// A shorter pause is skipped, because the kernel would make it longer.
const SHORTEST_PAUSE: Duration = Duration::from_micros(200);

/// The standard output and standard error of a command.
pub(super) struct Capture {
    stdout: Stream,
    stderr: Stream,
    /// The terminal that the command gets instead of both pipes. The logs are not created then.
    terminal: Option<OwnedFd>,
}

/// One output of a command.
struct Stream {
    pipe: OwnedFd,
    /// Kept open until the end, so that the runner is not woken when a command closes its output.
    writing_end: OwnedFd,
    log: Log,
    /// How many more bytes the log may hold.
    left: u64,
    /// Capacity of the pipe; determined when the first bytes are read.
    capacity: Option<u32>,
    last_read: Instant,
    /// When to read the pipe again.
    due: Instant,
}

/// The log of one output.
enum Log {
    /// The path at which it will be created.
    Missing(PathBuf),
    Open(File),
}

/// Why a log does not contain everything that was printed.
enum LogFailure {
    TooLong,
    Log(io::Error),
}

impl Capture {
    /// Creates the pipes for logs at these paths. The logs must not exist yet, and will not be longer than `limit`.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub(super) fn open(stdout: &[u8], stderr: &[u8], limit: u64) -> io::Result<Self> {
        Ok(Self {
            stdout: Stream::open(stdout, limit)?,
            stderr: Stream::open(stderr, limit)?,
            terminal: None,
        })
    }

    /// Gives the command the terminal at this path, if there is one, instead of the pipes.
    ///
    /// # Errors
    /// When the terminal cannot be opened.
    pub(super) fn or_terminal(self, path: Option<&[u8]>) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = |path| rfs::openat(CWD, OsStr::from_bytes(path), flags, Mode::empty());
        Ok(Self { terminal: path.map(open).transpose()?, ..self })
    }

    /// Changes the owner of the pipes, so that this user and group can open `/dev/stderr` again.
    ///
    /// # Errors
    /// If this process may not change the owner.
    pub(super) fn give_to(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        let Some((user, group)) = owner else { return Ok(()) };
        for stream in [&self.stdout, &self.stderr] {
            // Both ends are the same inode.
            rfs::fchown(&stream.pipe, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
        }
        Ok(())
    }

    /// The descriptors that become standard output and error of the command.
    pub(super) fn writing_ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        match &self.terminal {
            Some(terminal) => (terminal.as_fd(), terminal.as_fd()),
            None => (self.stdout.writing_end.as_fd(), self.stderr.writing_end.as_fd()),
        }
    }

    /// Adds the pipes that should be read now to `fds`. Returns the time until the next other pipe should be read.
    pub(super) fn watch<'a>(&'a self, now: Instant, fds: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        let mut soonest: Option<Duration> = None;
        for stream in [&self.stdout, &self.stderr] {
            match stream.due.checked_duration_since(now).filter(|wait| !wait.is_zero()) {
                None => fds.push(PollFd::from_borrowed_fd(stream.pipe.as_fd(), PollFlags::IN)),
                Some(wait) => soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait))),
            }
        }
        soonest
    }

    /// Moves data from the pipes that should be read now, at most one buffer from each.
    ///
    /// # Errors
    /// If a log cannot take the data. The command must be killed then.
    pub(super) fn take(&mut self, now: Instant, buffer: &mut [u8]) -> Result<(), IncompleteLog> {
        for (is_stderr, stream) in [(false, &mut self.stdout), (true, &mut self.stderr)] {
            if stream.due <= now {
                let read = stream.read(buffer).map_err(|failure| failure.of(is_stderr))?;
                if read > 0 {
                    stream.due = now + pause(read, now.duration_since(stream.last_read), stream.capacity());
                    stream.last_read = now;
                }
            }
        }
        Ok(())
    }

    /// Moves everything that was written before this call. To be called when no process of the command is left. If a
    /// write end was sent to some other process, that process can neither delay this call nor add output for long.
    ///
    /// # Errors
    /// If a log cannot take the data.
    pub(super) fn finish(mut self, buffer: &mut [u8]) -> Result<(), IncompleteLog> {
        for (is_stderr, stream) in [(false, &mut self.stdout), (true, &mut self.stderr)] {
            stream.drain(buffer).map_err(|failure| failure.of(is_stderr))?;
        }
        Ok(())
    }
}

impl Stream {
    fn open(log: &[u8], limit: u64) -> io::Result<Self> {
        let (pipe, writing_end) = output_pipe()?;
        let now = Instant::now();
        Ok(Self {
            pipe,
            writing_end,
            log: Log::Missing(OsStr::from_bytes(log).into()),
            left: limit,
            capacity: None,
            last_read: now,
            due: now,
        })
    }

    /// The capacity of the pipe. It is smaller for a user who has many pipes, and the command may change it.
    fn capacity(&mut self) -> u32 {
        *self.capacity.get_or_insert_with(|| {
            let size = fcntl_getpipe_size(&self.pipe).unwrap_or(BUFFER_BYTES);
            u32::try_from(size.min(BUFFER_BYTES)).unwrap_or(u32::MAX)
        })
    }

    /// Reads once and writes the bytes to the log. Returns the number of bytes.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LogFailure> {
        let read = match rustix::io::read(&self.pipe, &mut *buffer) {
            Ok(read) => read,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(LogFailure::Log(error.into())),
        };
        let allowed = usize::try_from(self.left).unwrap_or(usize::MAX).min(read);
        self.log.append(buffer.get(..allowed).unwrap_or_default()).map_err(LogFailure::Log)?;
        self.left -= allowed as u64;
        if allowed < read { Err(LogFailure::TooLong) } else { Ok(read) }
    }

    fn drain(&mut self, buffer: &mut [u8]) -> Result<(), LogFailure> {
        let mut left = ioctl_fionread(&self.pipe).map_err(|error| LogFailure::Log(error.into()))?;
        while left > 0 {
            match self.read(buffer)? {
                // Another process has read the rest.
                0 => break,
                read => left = left.saturating_sub(read as u64),
            }
        }
        Ok(())
    }
}

impl Log {
    /// Appends these bytes, and creates the log for the first of them.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            _ if bytes.is_empty() => Ok(()),
            Self::Open(file) => file.write_all(bytes),
            Self::Missing(path) => {
                let mut file = create_log(path)?;
                let written = file.write_all(bytes);
                *self = Self::Open(file);
                written
            }
        }
    }
}

/// Creates a log. Without a sandbox, the command may have put a file of its own there, which is replaced.
fn create_log(path: &Path) -> io::Result<File> {
    // In append mode, a command that truncates its log by name does not cause a hole in it.
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let create = || rfs::openat(CWD, path, flags, Mode::from_raw_mode(0o644));
    let created = match create() {
        Err(Errno::EXIST) => {
            rfs::unlink(path)?;
            create()
        }
        created => created,
    };
    Ok(File::from(created?))
}

/// A pipe whose read end does not block. Both ends belong to the user of this process until their owner is changed.
fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reading_end, writing_end) = pipe_with(PipeFlags::CLOEXEC)?;
    rfs::fcntl_setfl(&reading_end, OFlags::NONBLOCK)?;
    Ok((reading_end, writing_end))
}

/// How long to pause after `read` bytes that arrived within `elapsed`: until 1/[`GOAL_PART`] of the capacity is full at
/// the same rate, and never longer than [`READ_PAUSE`]. There is no pause if the pipe was so full that the writer may
/// have had to wait.
fn pause(read: usize, elapsed: Duration, capacity: u32) -> Duration {
    let read = u32::try_from(read).unwrap_or(u32::MAX).max(1);
    if read >= capacity / 2 {
        return Duration::ZERO;
    }
    let goal = capacity / GOAL_PART;
    // A value that leads to more than the longest pause is capped before the multiplication.
    let pause = elapsed.min(READ_PAUSE.saturating_mul(read)).saturating_mul(goal) / read;
    if pause < SHORTEST_PAUSE { Duration::ZERO } else { pause.min(READ_PAUSE) }
}

impl LogFailure {
    fn of(self, is_stderr: bool) -> IncompleteLog {
        match self {
            Self::TooLong => IncompleteLog { is_stderr, errno: 0 },
            Self::Log(error) => IncompleteLog { is_stderr, errno: error.raw_os_error().unwrap_or(libc::EIO) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a writer with a constant rate and an exact clock. Returns how often its pipe was read in a second, and
    /// the largest part of the pipe that was full once the rate was known.
    fn read_for_a_second(bytes_per_second: f64, capacity: u32) -> (u32, f64) {
        let (mut now, mut last_read, mut reads, mut fullest) = (1.0, 0.0, 0, 0.0);
        while now < 2.0 {
            let there = ((now - last_read) * bytes_per_second).clamp(1.0, f64::from(capacity));
            if now > 1.1 {
                fullest = f64::max(fullest, there / f64::from(capacity));
            }
            let pause = pause(there as usize, Duration::from_secs_f64(now - last_read), capacity);
            last_read = now;
            reads += 1;
            // A read and its poll take some microseconds. Then the next byte is awaited.
            now += (pause.as_secs_f64() + 5e-6).max(1.0 / bytes_per_second);
        }
        (reads, fullest)
    }

    #[test]
    fn a_log_replaces_what_a_command_has_put_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let (log, elsewhere) = (directory.path().join("stdout"), directory.path().join("elsewhere"));
        std::fs::write(&elsewhere, "kept").unwrap();
        let put: [fn(&Path, &Path) -> io::Result<()>; 2] =
            [|log, _| std::fs::write(log, "forged"), |log, target| std::os::unix::fs::symlink(target, log)];
        for put in put {
            put(&log, &elsewhere).unwrap();
            create_log(&log).unwrap().write_all(b"printed").unwrap();
            assert_eq!(std::fs::read_to_string(&log).unwrap(), "printed");
            std::fs::remove_file(&log).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), "kept");
    }

    #[test]
    fn a_pipe_is_read_rarely_and_its_writer_never_waits_for_long() {
        const FULL: u32 = BUFFER_BYTES as u32;
        for bytes_per_second in [10.0, 1e3, 1e5, 1e6, 3e6, 1e7, 3e7, 1e8, 1e9, 5e9] {
            let (reads, fullest) = read_for_a_second(bytes_per_second, FULL);
            let per_read = bytes_per_second / f64::from(reads);
            assert!(reads <= 500 || per_read > 400.0, "{reads} reads at {bytes_per_second} bytes/s");
            assert!(fullest < 0.8, "{fullest} of the pipe at {bytes_per_second} bytes/s");
        }
        // The capacity of a pipe for a user who has very many pipes.
        for bytes_per_second in [1e3, 1e6, 1e7, 1e8, 1e9] {
            let (_, fullest) = read_for_a_second(bytes_per_second, 2 * 4096);
            assert!(fullest < 0.8, "{fullest} of a small pipe at {bytes_per_second} bytes/s");
        }
    }

    #[test]
    fn the_pause_does_not_overflow() {
        for capacity in [0, 1, 4096, u32::MAX] {
            for read in [0, 1, BUFFER_BYTES / 2 - 1, BUFFER_BYTES, usize::MAX] {
                for elapsed in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
                    assert!(pause(read, elapsed, capacity) <= READ_PAUSE);
                }
            }
        }
        let (first_word, full) = (5, BUFFER_BYTES);
        assert_eq!(pause(first_word, Duration::from_secs(5), BUFFER_BYTES as u32), READ_PAUSE);
        assert_eq!(pause(full, Duration::from_secs(5), BUFFER_BYTES as u32), Duration::ZERO);
    }
}
