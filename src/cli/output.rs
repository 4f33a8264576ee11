//! Writes to standard output and error, and detects that their readers have exited.
//!
//! If the reader of a pipe exits early (`| head -1`), SIGPIPE ends a Unix program at its next write. Rust programs
//! ignore this signal, and this one must, because a closed connection raises it too. So a failed write is detected
//! here, and the process then ends by SIGPIPE after all: shells show 141, and pipelines treat it like any other
//! program.

use super::{EXIT_FAILURE, EXIT_OK, EXIT_USAGE, complain};
use gorego_reapi::error::{Error, Result};
use std::{
    io::{self, ErrorKind, Write},
    sync::Arc,
};
use tokio::sync::watch;

/// Exit code if SIGPIPE does not end the process, as for process 1 of a container; 128 + SIGPIPE.
const EXIT_BROKEN_PIPE: i32 = 141;

/// Prints the whole text to standard output. Does not return if its reader has exited.
///
/// # Errors
/// `Invalid` when it cannot be written for another reason, such as a full disk.
pub(super) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => end_by_sigpipe(),
        Err(error) => Err(unprintable(&error)),
        Ok(()) => Ok(()),
    }
}

/// The text for standard output, and whether the command succeeded.
pub(super) type Printout = (String, bool);

/// Prints the outcome of a command. Returns its exit code.
pub(super) fn finish(outcome: Result<Printout>) -> u8 {
    match outcome.and_then(|(text, good)| print(&text).map(|()| good)) {
        Ok(true) => EXIT_OK,
        Ok(false) => EXIT_FAILURE,
        Err(error) => {
            complain(&error);
            EXIT_USAGE
        }
    }
}

/// The error of output that could not be written for a reason other than a missing reader.
pub(super) fn unprintable(error: &io::Error) -> Error {
    Error::Invalid(format!("could not write to standard output: {error}"))
}

/// Ends this process like a program that writes to a pipe without a reader.
pub(super) fn end_by_sigpipe() -> ! {
    // SAFETY: all values are plain, and sigemptyset initialises the set. The old disposition of the signal is not
    // needed any more.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut pipe = std::mem::zeroed();
        libc::sigemptyset(&mut pipe);
        libc::sigaddset(&mut pipe, libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &pipe, std::ptr::null_mut());
        libc::raise(libc::SIGPIPE);
    }
    std::process::exit(EXIT_BROKEN_PIPE)
}

/// Whether standard output and error are still writable. Clones share the state.
#[derive(Debug, Clone, Default)]
pub(super) struct Readers(Arc<watch::Sender<Option<Lost>>>);

/// Why output cannot be written any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lost {
    /// Its reader has exited.
    Reader,
    /// The write failed, for example because the disk is full.
    Output(Error),
}

impl Readers {
    /// Wraps `sink` and records a failed write to it.
    pub(super) fn of<W>(&self, sink: W) -> WatchedSink<W> {
        WatchedSink { sink, readers: self.clone() }
    }

    /// Whether a reader is known to have exited.
    pub(super) fn have_left(&self) -> bool {
        matches!(*self.0.borrow(), Some(Lost::Reader))
    }

    /// Waits until a write has failed.
    pub(super) async fn lost(&self) -> Lost {
        loop {
            // This value holds the sender, so the wait cannot fail.
            if let Ok(lost) = self.0.subscribe().wait_for(Option::is_some).await
                && let Some(lost) = lost.clone()
            {
                return lost;
            }
        }
    }
}

/// A sink that reports failed writes to [`Readers`].
#[derive(Debug)]
pub(super) struct WatchedSink<W> {
    sink: W,
    readers: Readers,
}

impl<W> WatchedSink<W> {
    fn note<T>(&self, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| {
            let lost = match error.kind() {
                // The writer retries.
                ErrorKind::Interrupted => return,
                ErrorKind::BrokenPipe => Lost::Reader,
                _ => Lost::Output(Error::Invalid(format!("could not print the command's output: {error}"))),
            };
            self.readers.0.send_if_modified(|known| {
                let is_news = known.is_none();
                known.get_or_insert(lost);
                is_news
            });
        })
    }
}

impl<W: Write> Write for WatchedSink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(bytes);
        self.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.sink.flush();
        self.note(flushed)
    }
}
