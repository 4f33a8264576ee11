//! [`Terminal`]: a pseudo-terminal for a shell in the sandbox, connected to the terminal of the user.
//!
//! The shell never gets the user's terminal itself: a process that has it could insert input that is read after its end
//! (TIOCSTI). While the shell runs, the user's terminal is in raw mode, so that Ctrl-C and similar keys go to the
//! shell.

use gorego_reapi::error::{Error, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, open},
    io::Errno,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};
use std::{
    ffi::OsStr,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    thread,
};

/// How often the size of the user's terminal is checked.
const SIZE_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
/// Number of bytes that are copied at once.
const PIECE_BYTES: usize = 4096;

/// A pseudo-terminal that no process uses yet.
pub(super) struct Terminal {
    /// The side of this process.
    ours: OwnedFd,
    /// The side of the shell. It is held so that it stays open between two processes that use it.
    theirs: OwnedFd,
    path: PathBuf,
}

/// The user's terminal in raw mode, until this is dropped.
struct Raw(Termios);

impl Terminal {
    /// Checks that the user has a terminal.
    ///
    /// # Errors
    /// `Invalid` when standard input or output is not one.
    pub(super) fn check() -> Result<()> {
        if !isatty(io::stdin()) || !isatty(io::stdout()) {
            return Err(Error::invalid("--shell needs a terminal at standard input and output"));
        }
        Ok(())
    }

    /// Creates a pseudo-terminal.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub(super) fn open() -> Result<Self> {
        let make = || -> io::Result<Self> {
            let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
            grantpt(&ours)?;
            unlockpt(&ours)?;
            let path = PathBuf::from(OsStr::from_bytes(ptsname(&ours, Vec::new())?.as_bytes()));
            let theirs = open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
            Ok(Self { ours, theirs, path })
        };
        make().map_err(|error| Error::io("make a terminal for the shell", &error))
    }

    /// The path of the shell's side.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Connects the user to the shell while `shell` runs.
    pub(super) fn during<T>(self, shell: impl FnOnce() -> T) -> T {
        let Self { ours, theirs, .. } = self;
        let raw = Raw::enter();
        let done = thread::scope(|scope| {
            let passing = scope.spawn(|| pass_on(&ours));
            let done = shell();
            // The other side reports the end when this side is no longer open anywhere.
            drop(theirs);
            let _ = passing.join();
            done
        });
        drop(raw);
        done
    }
}

/// Copies bytes in both directions until the shell's side is closed.
fn pass_on(ours: &OwnedFd) {
    let (stdin, mut stdout) = (io::stdin(), io::stdout());
    let (mut piece, mut size, mut user_is_there) = ([0; PIECE_BYTES], None, true);
    loop {
        let now = tcgetwinsize(stdin.as_fd()).ok().map(|size| (size.ws_row, size.ws_col));
        if now != size
            && let Ok(winsize) = tcgetwinsize(stdin.as_fd())
        {
            let _ = tcsetwinsize(ours, winsize);
            size = now;
        }
        let mut fds = vec![PollFd::new(ours, PollFlags::IN)];
        if user_is_there {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&SIZE_POLL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready.first() == Some(&true) {
            match rustix::io::read(ours, &mut piece) {
                Ok(count @ 1..) => {
                    let written = stdout.write_all(piece.get(..count).unwrap_or_default());
                    if written.and_then(|()| stdout.flush()).is_err() {
                        return;
                    }
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                // EIO: the other side is no longer open anywhere.
                Ok(0) | Err(_) => return,
            }
        }
        if ready.get(1) == Some(&true) {
            match rustix::io::read(stdin.as_fd(), &mut piece) {
                Ok(0) => user_is_there = false,
                Ok(count) => {
                    let _ = rustix::io::write(ours, piece.get(..count).unwrap_or_default());
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => user_is_there = false,
            }
        }
    }
}

impl Raw {
    fn enter() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
