//! [`Capture`]: the standard output and error of one command, on their way from two pipes into two log files.
//!
//! The command gets the writing ends of the pipes, as it would from a shell, so that it can open `/dev/stderr` or
//! `/proc/self/fd/1` again in any mode. The runner moves the bytes on. It owns the log files while the command runs: it alone
//! writes to them, and they only grow, which is what live readers rely on.
//!
//! Invariants: a log holds the bytes of its pipe in the order in which they were written, and never more than its limit; no
//! read blocks; memory is bounded by the two pipes and one buffer. A pipe is not read for every byte: after each read it is
//! left alone for a while ([`pause`]), and meanwhile the writer goes on undisturbed.

use super::protocol::Unkept;
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
    time::{Duration, Instant},
};

/// The most that is read at once: what a full pipe holds, unless it was made larger or smaller.
pub const BUFFER_BYTES: usize = 64 * 1024;
/// Which part of a pipe should be full when it is read. A quarter: the writer does not wait even when it is four times faster
/// than expected, or leaves half of each page of the pipe empty.
const GOAL_PART: u32 = 4;
/// Longest time that a pipe is left alone after a read. A command that prints a byte at a time wakes the runner 500 times a
/// second at most; a command that prints a lot after a silence waits this long once.
const READ_PAUSE: Duration = Duration::from_millis(2);
/// A pause below this is none: the kernel would make it longer.
const SHORTEST_PAUSE: Duration = Duration::from_micros(200);

/// Both outputs of a command.
pub struct Capture {
    stdout: Stream,
    stderr: Stream,
    /// What the command gets instead of both pipes. The logs then stay empty.
    terminal: Option<OwnedFd>,
}

/// One output.
struct Stream {
    pipe: OwnedFd,
    /// Held until the end, so that a command that closes its output does not wake the runner.
    writing_end: OwnedFd,
    log: File,
    /// How many more bytes the log may take.
    left: u64,
    /// How much the pipe can hold; known from its first bytes on.
    capacity: Option<u32>,
    last_read: Instant,
    /// When the pipe is worth reading again.
    due: Instant,
}

/// Why a log does not have all that was printed.
enum LogFailure {
    TooLong,
    Log(io::Error),
}

impl Capture {
    /// Makes the log files, which must not exist, and the pipes that lead to them. No log will be longer than `limit`.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn open(stdout: &[u8], stderr: &[u8], limit: u64) -> io::Result<Self> {
        Ok(Self {
            stdout: Stream::open(stdout, limit)?,
            stderr: Stream::open(stderr, limit)?,
            terminal: None,
        })
    }

    /// Lets the command have the terminal at this path, if any, instead of the pipes.
    ///
    /// # Errors
    /// When the terminal cannot be opened.
    pub fn or_terminal(self, path: Option<&[u8]>) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = |path| rfs::openat(CWD, OsStr::from_bytes(path), flags, Mode::empty());
        Ok(Self { terminal: path.map(open).transpose()?, ..self })
    }

    /// Gives the pipes to another user and group, who can then open `/dev/stderr` again.
    ///
    /// # Errors
    /// When this process may not do that.
    pub fn give_to(&self, owner: Option<(u32, u32)>) -> io::Result<()> {
        let Some((user, group)) = owner else { return Ok(()) };
        for stream in [&self.stdout, &self.stderr] {
            // Both ends are the same inode.
            rfs::fchown(&stream.pipe, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
        }
        Ok(())
    }

    /// What becomes descriptors 1 and 2 of the command.
    pub fn writing_ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        match &self.terminal {
            Some(terminal) => (terminal.as_fd(), terminal.as_fd()),
            None => (self.stdout.writing_end.as_fd(), self.stderr.writing_end.as_fd()),
        }
    }

    /// Adds the pipes that are worth reading now to `fds`; says how long it takes until another is.
    pub fn watch<'a>(&'a self, now: Instant, fds: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        let mut soonest: Option<Duration> = None;
        for stream in [&self.stdout, &self.stderr] {
            match stream.due.checked_duration_since(now).filter(|wait| !wait.is_zero()) {
                None => fds.push(PollFd::from_borrowed_fd(stream.pipe.as_fd(), PollFlags::IN)),
                Some(wait) => soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait))),
            }
        }
        soonest
    }

    /// Moves what there is in pipes that are worth reading, at most one buffer of each.
    ///
    /// # Errors
    /// When a log cannot take it; the command must be ended then.
    pub fn take(&mut self, now: Instant, buffer: &mut [u8]) -> Result<(), Unkept> {
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

    /// Moves all that was written before this call, once no process of the command is left. A writing end that was sent to
    /// another process neither delays this nor adds to it for long.
    ///
    /// # Errors
    /// When a log cannot take it.
    pub fn finish(mut self, buffer: &mut [u8]) -> Result<(), Unkept> {
        for (is_stderr, stream) in [(false, &mut self.stdout), (true, &mut self.stderr)] {
            stream.drain(buffer).map_err(|failure| failure.of(is_stderr))?;
        }
        Ok(())
    }
}

impl Stream {
    fn open(log: &[u8], limit: u64) -> io::Result<Self> {
        // Appending, so that a command that truncates its log by name gets no hole in it.
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::APPEND
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let log = rfs::openat(CWD, OsStr::from_bytes(log), flags, Mode::from_raw_mode(0o644))?;
        let (pipe, writing_end) = output_pipe()?;
        let now = Instant::now();
        Ok(Self {
            pipe,
            writing_end,
            log: File::from(log),
            left: limit,
            capacity: None,
            last_read: now,
            due: now,
        })
    }

    /// Pipes are smaller for a user who has many, and the command may change this one's size.
    fn capacity(&mut self) -> u32 {
        *self.capacity.get_or_insert_with(|| {
            let size = fcntl_getpipe_size(&self.pipe).unwrap_or(BUFFER_BYTES);
            u32::try_from(size.min(BUFFER_BYTES)).unwrap_or(u32::MAX)
        })
    }

    /// One read, and the write that follows from it; says how many bytes there were.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LogFailure> {
        let read = match rustix::io::read(&self.pipe, &mut *buffer) {
            Ok(read) => read,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(LogFailure::Log(error.into())),
        };
        let allowed = usize::try_from(self.left).unwrap_or(usize::MAX).min(read);
        self.log.write_all(buffer.get(..allowed).unwrap_or_default()).map_err(LogFailure::Log)?;
        self.left -= allowed as u64;
        if allowed < read { Err(LogFailure::TooLong) } else { Ok(read) }
    }

    fn drain(&mut self, buffer: &mut [u8]) -> Result<(), LogFailure> {
        let mut left = ioctl_fionread(&self.pipe).map_err(|error| LogFailure::Log(error.into()))?;
        while left > 0 {
            match self.read(buffer)? {
                // Somebody else has read it.
                0 => break,
                read => left = left.saturating_sub(read as u64),
            }
        }
        Ok(())
    }
}

/// A pipe whose reading end does not block. Both ends belong to the user who runs this, until they are given away.
fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reading_end, writing_end) = pipe_with(PipeFlags::CLOEXEC)?;
    rfs::fcntl_setfl(&reading_end, OFlags::NONBLOCK)?;
    Ok((reading_end, writing_end))
}

/// How long a pipe is left alone of which `read` bytes were read that came within `elapsed`: until [`GOAL_PART`] of its
/// capacity is full if it goes on like that, and never longer than [`READ_PAUSE`]. Not at all where the writer may have had
/// to wait.
fn pause(read: usize, elapsed: Duration, capacity: u32) -> Duration {
    let read = u32::try_from(read).unwrap_or(u32::MAX).max(1);
    if read >= capacity / 2 {
        return Duration::ZERO;
    }
    let goal = capacity / GOAL_PART;
    // What comes to more than the longest pause anyway is cut off before it is multiplied.
    let pause = elapsed.min(READ_PAUSE.saturating_mul(read)).saturating_mul(goal) / read;
    if pause < SHORTEST_PAUSE { Duration::ZERO } else { pause.min(READ_PAUSE) }
}

impl LogFailure {
    fn of(self, is_stderr: bool) -> Unkept {
        match self {
            Self::TooLong => Unkept { is_stderr, errno: 0 },
            Self::Log(error) => Unkept { is_stderr, errno: error.raw_os_error().unwrap_or(libc::EIO) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer of a steady rate, on a clock without noise. Says how often its pipe was read in a second, and which part of it
    /// was full at most once the rate was known.
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
            // A read and its poll take some microseconds; then the next byte is waited for.
            now += (pause.as_secs_f64() + 5e-6).max(1.0 / bytes_per_second);
        }
        (reads, fullest)
    }

    #[test]
    fn a_pipe_is_read_seldom_and_its_writer_never_waits_for_long() {
        const FULL: u32 = BUFFER_BYTES as u32;
        for bytes_per_second in [10.0, 1e3, 1e5, 1e6, 3e6, 1e7, 3e7, 1e8, 1e9, 5e9] {
            let (reads, fullest) = read_for_a_second(bytes_per_second, FULL);
            let per_read = bytes_per_second / f64::from(reads);
            assert!(reads <= 500 || per_read > 400.0, "{reads} reads at {bytes_per_second} bytes/s");
            assert!(fullest < 0.8, "{fullest} of the pipe at {bytes_per_second} bytes/s");
        }
        // What a user gets who has very many pipes.
        for bytes_per_second in [1e3, 1e6, 1e7, 1e8, 1e9] {
            let (_, fullest) = read_for_a_second(bytes_per_second, 2 * 4096);
            assert!(fullest < 0.8, "{fullest} of a small pipe at {bytes_per_second} bytes/s");
        }
    }

    #[test]
    fn what_a_pause_is_made_of_does_not_overflow() {
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
