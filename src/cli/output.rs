//! Standard output and error as the readers of this process see them, and what happens when they leave.
//!
//! A reader that leaves early (`| head -1`) ends a Unix program by SIGPIPE at its next write. Rust programs ignore that
//! signal, and this one has to, since a closed connection raises it too. So a write that fails for want of a reader is noticed
//! here, and the process then ends by SIGPIPE all the same: shells show 141, and pipelines treat it like any other program.

use gorego_reapi::error::{Error, Result};
use std::{
    io::{self, ErrorKind, Write},
    sync::Arc,
};
use tokio::sync::watch;

/// Exit code where SIGPIPE does not end the process, as in process 1 of a container; 128 + SIGPIPE.
const EXIT_BROKEN_PIPE: i32 = 141;

/// Prints what was asked for to standard output, all of it. Does not return when nobody reads it.
///
/// # Errors
/// `Invalid` when it cannot be written for another reason, such as a full disk.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => end_by_sigpipe(),
        Err(error) => Err(unprintable(&error)),
        Ok(()) => Ok(()),
    }
}

/// The error of output that could not be written although somebody may read it.
pub fn unprintable(error: &io::Error) -> Error {
    Error::Invalid(format!("could not write to standard output: {error}"))
}

/// Ends this process as a write to a pipe without a reader ends any other.
pub fn end_by_sigpipe() -> ! {
    // SAFETY: plain values and a set that sigemptyset initialises; this process needs the signal's old disposition no more.
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

/// Whether our standard output and error can still be written. Clones share what they know.
#[derive(Debug, Clone, Default)]
pub struct Readers(Arc<watch::Sender<Option<Lost>>>);

/// Why output cannot be written any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lost {
    /// Nobody reads it.
    Reader,
    /// It cannot be written, such as to a full disk.
    Output(Error),
}

impl Readers {
    /// Notes when a write to `sink` fails.
    pub fn of<W>(&self, sink: W) -> Watched<W> {
        Watched { sink, readers: self.clone() }
    }

    /// Whether one of them is known to have left.
    pub fn have_left(&self) -> bool {
        matches!(*self.0.borrow(), Some(Lost::Reader))
    }

    /// Waits until a write has failed.
    pub async fn lost(&self) -> Lost {
        loop {
            // The sender is ours, so the wait cannot fail.
            if let Ok(lost) = self.0.subscribe().wait_for(Option::is_some).await
                && let Some(lost) = lost.clone()
            {
                return lost;
            }
        }
    }
}

/// A sink that tells [`Readers`] when it cannot be written.
#[derive(Debug)]
pub struct Watched<W> {
    sink: W,
    readers: Readers,
}

impl<W> Watched<W> {
    fn note<T>(&self, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| {
            let lost = match error.kind() {
                // Writers try again.
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

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(bytes);
        self.note(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.sink.flush();
        self.note(flushed)
    }
}
