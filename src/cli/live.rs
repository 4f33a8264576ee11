//! Prints the output of a command while it runs. Each byte is printed once and in order, whether it comes from a log
//! stream or from the result.
//!
//! The log streams of the first attempt are followed to their end, and then the rest of the result is printed. If a
//! server has no log streams, or they break, only the result is printed. If the printed bytes are not the beginning of
//! the result, because a worker failed and the action was run again, the whole result is printed after a notice.

use super::{output::Readers, progress::ProgressLine};
use bytes::Bytes;
use gorego_client::{Client, LogNames, blocking};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

/// Number of pieces that may wait between the network and a slow reader.
const PIECES_IN_FLIGHT: usize = 4;
/// How long a stream may continue after its action has finished, before the result is used instead.
const END_GRACE: Duration = Duration::from_secs(5);

/// The outputs of one command, and the part of them that was printed.
#[derive(Debug)]
pub(super) struct Live {
    readers: Readers,
    stdout: Option<OutputFollower>,
    stderr: Option<OutputFollower>,
}

#[derive(Debug)]
struct OutputFollower {
    printing: JoinHandle<PrintedDigest>,
    stop: watch::Sender<bool>,
}

/// The digest of the printed bytes of one output.
#[derive(Debug, Clone, Copy)]
struct PrintedDigest(Digest);

impl Live {
    /// Creates the outputs before anything is printed. `readers` is notified when printing fails.
    pub(super) fn new(readers: Readers) -> Self {
        Self { readers, stdout: None, stderr: None }
    }

    /// Starts to print the streams. Only the first call has an effect for each output.
    pub(super) fn follow(&mut self, client: &Client, names: &LogNames, line: &ProgressLine) {
        let readers = self.readers.clone();
        start(&mut self.stdout, client, &names.stdout, move || readers.of(io::stdout()), line);
        let readers = self.readers.clone();
        start(&mut self.stderr, client, &names.stderr, move || readers.of(io::stderr()), line);
    }

    /// Prints the rest of both outputs when the result is available.
    ///
    /// # Errors
    /// When an output cannot be read or printed.
    pub(super) async fn finish(self, client: &Client, result: Option<&reapi::ActionResult>) -> Result<()> {
        let (stdout, stderr) = (end(self.stdout).await, end(self.stderr).await);
        let Some(result) = result else { return Ok(()) };
        let rest = |name, raw: &Bytes, digest: &Option<reapi::Digest>| {
            Ok::<_, Error>(ResultOutput {
                name,
                raw: raw.clone(),
                digest: log_digest(DigestFunction::Sha256, raw, digest.as_ref())?,
            })
        };
        let printed = rest("stdout", &result.stdout_raw, &result.stdout_digest)?;
        printed.print(client, stdout, || self.readers.of(io::stdout())).await?;
        let printed = rest("stderr", &result.stderr_raw, &result.stderr_digest)?;
        printed.print(client, stderr, || self.readers.of(io::stderr())).await
    }
}

fn start<W: Write>(
    place: &mut Option<OutputFollower>,
    client: &Client,
    name: &str,
    sink: impl FnOnce() -> W + Send + 'static,
    line: &ProgressLine,
) {
    if place.is_some() || name.is_empty() {
        return;
    }
    let (stop, mut stopped) = watch::channel(false);
    let (client, name, line) = (client.clone(), name.to_owned(), line.clone());
    let printing = tokio::spawn(async move {
        let (sender, mut pieces) = mpsc::channel::<Bytes>(PIECES_IN_FLIGHT);
        let writer = tokio::task::spawn_blocking(move || {
            let (mut sink, mut hasher) = (sink(), DigestFunction::Sha256.hasher(0));
            while let Some(piece) = pieces.blocking_recv() {
                line.clear();
                if write_all(&mut sink, &piece).is_err() {
                    // The readers have recorded the error, and `exec` ends.
                    break;
                }
                hasher.update(&piece);
            }
            PrintedDigest(hasher.finish())
        });
        // A failure of the stream is ignored, because the result contains its bytes.
        tokio::select! {
            _ = client.follow_log(&name, &sender) => {}
            _ = stopped.wait_for(|stop| *stop) => {}
        }
        drop(sender);
        writer.await.unwrap_or(PrintedDigest(Digest::empty(DigestFunction::Sha256)))
    });
    *place = Some(OutputFollower { printing, stop });
}

/// Waits for the end of a stream after its action has finished.
async fn end(follower: Option<OutputFollower>) -> PrintedDigest {
    let nothing = PrintedDigest(Digest::empty(DigestFunction::Sha256));
    let Some(OutputFollower { mut printing, stop }) = follower else { return nothing };
    let shown = match timeout(END_GRACE, &mut printing).await {
        Ok(shown) => shown,
        Err(_) => {
            stop.send_replace(true);
            printing.await
        }
    };
    shown.unwrap_or(nothing)
}

struct ResultOutput {
    name: &'static str,
    raw: Bytes,
    digest: Digest,
}

/// The digest of an output in a result, which may be inline, a blob, or empty.
///
/// # Errors
/// `Invalid` for a malformed digest.
pub(super) fn log_digest(
    function: DigestFunction,
    raw: &[u8],
    digest: Option<&reapi::Digest>,
) -> Result<Digest> {
    match digest {
        _ if !raw.is_empty() => Ok(function.digest(raw)),
        Some(digest) if !digest.hash.is_empty() && digest.size_bytes != 0 => {
            Digest::from_wire(function, Some(digest), "log digest")
        }
        _ => Ok(Digest::empty(function)),
    }
}

impl ResultOutput {
    /// Prints the part that was not printed yet.
    async fn print<W: Write + Send + 'static>(
        self,
        client: &Client,
        PrintedDigest(shown): PrintedDigest,
        sink: impl Fn() -> W,
    ) -> Result<()> {
        if self.digest == shown {
            return Ok(());
        }
        if self.digest.size() >= shown.size() {
            match self.write(client, SkipPrinted::after(shown, sink())).await {
                Err(Error::Precondition(_)) => {}
                done => return done,
            }
        }
        let name = self.name;
        let notice = if self.digest.is_empty() {
            format!(
                "gorego: the action was run again with different output; the {name} of that run is empty\n"
            )
        } else {
            format!(
                "gorego: the action was run again with different output; this is the complete {name} of that run:\n"
            )
        };
        let _ = io::stderr().write_all(notice.as_bytes());
        self.write(client, SkipPrinted::after(Digest::empty(DigestFunction::Sha256), sink())).await
    }

    async fn write<W: Write + Send + 'static>(
        &self,
        client: &Client,
        mut sink: SkipPrinted<W>,
    ) -> Result<()> {
        if !self.raw.is_empty() {
            let raw = self.raw.clone();
            return blocking(move || {
                let written = write_all(&mut sink, &raw);
                sink.check().and(written)
            })
            .await;
        }
        let differs = sink.differs.clone();
        match client.read_into(self.digest, sink, &Arc::default()).await {
            Ok(mut sink) => blocking(move || write_all(&mut sink, b"")).await,
            Err(_) if differs.load(Ordering::Relaxed) => Err(another_run()),
            Err(error) => Err(error),
        }
    }
}

fn another_run() -> Error {
    Error::Precondition("the printed output is not the beginning of the result".into())
}

/// A sink that compares the first bytes with the printed ones and skips them. If they differ, it refuses all writes.
struct SkipPrinted<W> {
    shown: Digest,
    skipped: Option<gorego_reapi::digest::Hasher>,
    /// Set when the bytes were different.
    differs: Arc<AtomicBool>,
    sink: W,
}

impl<W> SkipPrinted<W> {
    fn after(shown: Digest, sink: W) -> Self {
        let skipped = (!shown.is_empty()).then(|| DigestFunction::Sha256.hasher(0));
        Self { shown, skipped, differs: Arc::default(), sink }
    }

    fn check(&self) -> Result<()> {
        if self.differs.load(Ordering::Relaxed) { Err(another_run()) } else { Ok(()) }
    }
}

impl<W: Write> Write for SkipPrinted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(hasher) = &mut self.skipped else { return self.sink.write(bytes) };
        let left = usize::try_from(self.shown.size() - hasher.size()).unwrap_or(usize::MAX);
        let skipped = bytes.get(..left).unwrap_or(bytes);
        hasher.update(skipped);
        if hasher.size() == self.shown.size()
            && let Some(hasher) = self.skipped.take()
            && hasher.finish() != self.shown
        {
            self.differs.store(true, Ordering::Relaxed);
            return Err(io::Error::other("different from the printed output"));
        }
        Ok(skipped.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn write_all(sink: &mut impl Write, bytes: &[u8]) -> Result<()> {
    let written = sink.write_all(bytes).and_then(|()| sink.flush());
    written.map_err(|error| Error::Invalid(format!("could not print the command's output: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_may_be_inline_or_a_blob() {
        const SHA256: DigestFunction = DigestFunction::Sha256;
        let blob = SHA256.digest(b"x").to_wire();
        assert_eq!(log_digest(SHA256, b"x", None), log_digest(SHA256, b"", Some(&blob)));
        let nothing = reapi::Digest::default();
        assert_eq!(log_digest(SHA256, b"", Some(&nothing)), Ok(Digest::empty(SHA256)));
    }
}
