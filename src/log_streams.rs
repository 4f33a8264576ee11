//! Log streams: bytes that can be read while they are still being written (LOG-01..05, EXE-64).
//!
//! [`LogStreams`] owns both kinds. *Run streams* are the standard output and error of a running action. They cost
//! nothing until a client reads them: a reader follows the log file that the runner writes, and once the worker has
//! stored that file, the stream is the stored blob. *Client streams* are created by CreateLogStream and written by
//! ByteStream.Write. Their bytes are in an unlinked spool file. A stream that is removed empties its file at once, so a
//! slow reader keeps no bytes on the disk; it gets an error instead of the rest.
//!
//! Invariants: a stream only grows; a reader gets each byte once and in order, and never delays the writer; everything
//! is bounded ([`StreamLimits`] and the constants below); and every stream ends by itself, by idling, or at shutdown.
//! Unfinished client streams are charged to their clients with a [`Budget`].
//!
//! The bookkeeping ([`registry`]) does no IO. Its lock is taken only in this file, and never held across IO or a wait.
//! The wire format ([`crate::grpc::log_stream`]) and the blobs of finished run streams are handled elsewhere.

pub(crate) mod follow;
pub mod name;
pub(crate) mod registry;
pub(crate) mod run;
mod spool;

use crate::{
    access::principal::Principal,
    budget::{Bounds, Budget, Share},
    caller::Caller,
    instance::Instance,
    logging::Event,
};
use bytes::Bytes;
use follow::Follower;
use gorego_reapi::error::{Error, Result};
use name::{LogName, StreamId, WriteToken};
use registry::Registry;
use run::{LogKind, RunLogs, RunState, RunStreams, Tail};
use spool::Spool;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use uuid::Uuid;

pub use registry::StreamLimits;

/// Size limit of a client stream in bytes. It is far above any log that people read.
pub const MAX_STREAM_BYTES: u64 = 256 * 1024 * 1024;
/// Number of concurrent readers. Each may hold a file open, and readers of run streams poll it ten times a second.
pub const MAX_READERS: u64 = 1024;
/// Interval between checks for expired streams.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

const GIVEN_UP: &str = "log_streams_given_up";

/// Limits and directories of the log streams.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Whether clients may create streams (LOG-01).
    pub client_streams: bool,
    /// Limits on client streams.
    pub clients: StreamLimits,
    /// Limits on run streams, which hold no bytes.
    pub runs: StreamLimits,
    /// Directory for spool files. It must exist, on a disk that they may fill.
    pub spool_directory: PathBuf,
}

/// All log streams of a server. Cheap to clone.
#[derive(Clone)]
pub struct LogStreams(Arc<LogStreamsState>);

struct LogStreamsState {
    client_streams: bool,
    /// How long an unfinished client stream is kept without a write; see [`StreamLimits::idle`].
    client_idle: Option<Duration>,
    /// One unit for each unfinished client stream.
    places: Budget,
    /// Bytes of unfinished client streams.
    bytes: Budget,
    spool_directory: PathBuf,
    books: Mutex<Registries>,
    /// One unit for each reader.
    readers: Budget,
    closing: watch::Sender<bool>,
}

struct Registries {
    clients: Registry<Arc<ClientStream>>,
    runs: Registry<Arc<RunStreams>>,
}

/// A stream that a client created.
struct ClientStream {
    parent: String,
    token: WriteToken,
    spool: Arc<Spool>,
    /// The budget shares of the stream until it is finished or removed.
    held: Mutex<Option<StreamShares>>,
}

/// The budget shares of an unfinished stream: its place and its bytes.
struct StreamShares {
    _place: Share,
    bytes: Share,
}

impl ClientStream {
    fn held(&self) -> MutexGuard<'_, Option<StreamShares>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the budget shares, because the stream is finished or removed.
    fn release(&self) {
        drop(self.held().take());
    }
}

impl std::fmt::Debug for LogStreams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogStreams").finish_non_exhaustive()
    }
}

impl LogStreams {
    /// Creates an empty set of streams. Does not access the disk.
    pub fn new(settings: LogSettings) -> Self {
        let StreamLimits { streams, bytes, idle, .. } = settings.clients;
        let bounds = |what, total| Budget::new(Bounds::shared(what, total));
        Self(Arc::new(LogStreamsState {
            client_streams: settings.client_streams,
            client_idle: idle,
            places: bounds("unfinished log streams", streams as u64),
            bytes: bounds("bytes of unfinished log streams", bytes),
            spool_directory: settings.spool_directory,
            books: Mutex::new(Registries {
                clients: Registry::new(settings.clients),
                runs: Registry::new(settings.runs),
            }),
            readers: bounds("readers of log streams", MAX_READERS),
            closing: watch::Sender::new(false),
        }))
    }

    /// Bytes of all streams of clients.
    pub fn client_bytes(&self) -> u64 {
        self.books().clients.bytes()
    }

    /// Checks whether clients may create streams (LOG-01).
    ///
    /// # Errors
    /// `Unimplemented` if they may not.
    pub fn check_creation(&self) -> Result<()> {
        if self.0.client_streams {
            return Ok(());
        }
        let message = "clients cannot create log streams here (log_streams.enabled = false)";
        Err(Error::Unimplemented(message.into()))
    }

    /// Creates a stream below `parent`, which the caller has checked. Only the client that created it knows its write
    /// name (LOG-01). It is charged to that client until it is finished.
    ///
    /// # Errors
    /// `Unimplemented` if clients may not create streams; `Exhausted` if there are too many streams, in total or of
    /// this caller.
    pub fn create(&self, parent: String, caller: Caller) -> Result<LogName> {
        self.check_creation()?;
        let held =
            StreamShares { _place: self.0.places.take(caller, 1)?, bytes: self.0.bytes.take(caller, 0)? };
        let (id, token) = (Uuid::new_v4(), WriteToken::new());
        let spool = Arc::new(Spool::new(self.0.spool_directory.join(format!("log-{id}"))));
        let held = Mutex::new(Some(held));
        let stream = ClientStream { parent: parent.clone(), token: token.clone(), spool, held };
        let displaced = self.books().clients.insert(id, Arc::new(stream), Instant::now())?;
        end_removed(displaced);
        Ok(LogName { parent, id: StreamId::Client(id), token: Some(token) })
    }

    /// The right to append to the stream with this write name.
    ///
    /// # Errors
    /// `Invalid` for a read name (LOG-02); `NotFound` for an unknown stream.
    pub fn writer(&self, name: &LogName) -> Result<Writer> {
        let Some(token) = &name.token else {
            return Err(Error::Invalid(format!(
                "log stream \"{name}\" cannot be written under this name; use the write_resource_name of \
                 CreateLogStream"
            )));
        };
        let found = match name.id {
            StreamId::Client(id) => self.books().clients.get(&id).cloned().map(|stream| (id, stream)),
            StreamId::Run(..) => None,
        };
        let found = found.filter(|(_, stream)| stream.parent == name.parent && stream.token == *token);
        let (id, stream) = found.ok_or_else(|| unknown(name))?;
        Ok(Writer { streams: self.clone(), id, stream })
    }

    /// A reader of a stream, from any offset to its end (LOG-03).
    ///
    /// # Errors
    /// `Invalid` for a write name (LOG-02); `NotFound` for an unknown stream; `Exhausted` when there are too many
    /// readers, in total or of this caller.
    pub fn follow(&self, name: &LogName, caller: Caller) -> Result<Follower> {
        if name.token.is_some() {
            return Err(Error::invalid("a write_resource_name cannot be read; omit its last segment"));
        }
        let place = self.0.readers.take(caller, 1)?;
        let closing = self.0.closing.subscribe();
        match name.id {
            StreamId::Client(id) => {
                let stream = self.books().clients.get(&id).cloned();
                let stream = stream.filter(|stream| stream.parent == name.parent);
                let spool = stream.ok_or_else(|| unknown(name))?.spool.clone();
                Ok(Follower::of_spool(spool, closing, place))
            }
            StreamId::Run(RunLogs(id), kind) => {
                let run = self.books().runs.get(&id).cloned();
                let run =
                    run.filter(|run| run.instance.name() == name.parent).ok_or_else(|| unknown(name))?;
                Ok(Follower::of_run(Tail::new(run, kind), closing, place))
            }
        }
    }

    /// Registers the streams of a run that writes to the files `stdout` and `stderr` in `directory`; `None` when there
    /// are too many streams. The only system call creates an unguessable id.
    pub fn begin_run(&self, instance: &Instance, directory: &Path) -> Option<LiveRun> {
        let id = Uuid::new_v4();
        let run = Arc::new(RunStreams::new(instance.clone(), directory.to_owned()));
        self.books().runs.insert(id, run.clone(), Instant::now()).ok()?;
        Some(LiveRun { streams: self.clone(), id, run })
    }

    /// Records that a client was told the names of the streams of a run, as those of its own operation.
    pub(crate) fn tell(&self, RunLogs(id): RunLogs, principal: &Principal) {
        let run = self.books().runs.get(&id).cloned();
        if let Some(run) = run {
            run.tell(principal);
        }
    }

    /// Whether a client was told the names of the streams of a run.
    pub(crate) fn was_told(&self, RunLogs(id): RunLogs, principal: &Principal) -> bool {
        let run = self.books().runs.get(&id).cloned();
        run.is_some_and(|run| run.was_told(principal))
    }

    /// Removes expired streams every few seconds, until [`LogStreams::close`].
    pub async fn sweep(self) {
        let mut closing = self.0.closing.subscribe();
        let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                _ = closing.wait_for(|closing| *closing) => return,
                _ = ticks.tick() => {
                    let now = Instant::now();
                    let expired = {
                        let mut books = self.books();
                        books.runs.expire(now);
                        books.clients.expire(now)
                    };
                    let unfinished = end_removed(expired);
                    if unfinished > 0 {
                        Event::info("gorego::log_streams", GIVEN_UP).with("streams", unfinished).log(format_args!(
                            "some log streams were not written to for too long and are removed"
                        ));
                    }
                }
            }
        }
    }

    /// Ends every waiting reader and writer with a status that clients retry, because the server is shutting down.
    pub fn close(&self) {
        self.0.closing.send_replace(true);
    }

    fn books(&self) -> MutexGuard<'_, Registries> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends streams that were removed from the registry, and frees their bytes. Returns the number of unfinished ones.
fn end_removed(streams: impl IntoIterator<Item = Arc<ClientStream>>) -> usize {
    let streams: Vec<_> = streams.into_iter().collect();
    for stream in &streams {
        stream.spool.remove();
        stream.release();
    }
    let unfinished = streams.iter().filter(|stream| !stream.spool.committed().finished).count();
    if !streams.is_empty() {
        tokio::task::spawn_blocking(move || streams.iter().for_each(|stream| stream.spool.free()));
    }
    unfinished
}

fn unknown(name: &LogName) -> Error {
    Error::NotFound(format!("log stream \"{name}\" is unknown or was forgotten"))
}

/// The right to append to one client stream.
pub struct Writer {
    streams: LogStreams,
    id: Uuid,
    stream: Arc<ClientStream>,
}

/// The state of a client stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Its length in bytes, which is the offset of the next write.
    pub bytes: u64,
    /// Whether the stream is complete.
    pub finished: bool,
}

impl Writer {
    /// The current length of the stream.
    pub fn committed(&self) -> Committed {
        self.stream.spool.committed()
    }

    /// How long the stream is kept without a write; `None` if its end is enforced elsewhere.
    pub fn idle_limit(&self) -> Option<Duration> {
        self.streams.0.client_idle
    }

    /// Completes when the server shuts down and the stream ends.
    pub async fn closing(&self) -> Error {
        let _ = self.streams.0.closing.subscribe().wait_for(|closing| *closing).await;
        Error::Unavailable("this server is shutting down, and its log streams end with it".into())
    }

    /// Appends bytes at `offset`, which must be the length of the stream. `finish` completes the stream. Readers see
    /// the bytes when this returns. A started write is completed even if the future is dropped.
    ///
    /// # Errors
    /// `Invalid` for any other offset; `Precondition` after the end (LOG-04); `NotFound` when the stream was removed;
    /// `OutOfRange` beyond the limit of one stream; `Exhausted` at the limit of all streams; errors of the disk.
    pub async fn append(&self, offset: u64, data: Bytes, finish: bool) -> Result<Committed> {
        let turn = self.stream.spool.turn(offset).await?;
        let size = data.len() as u64;
        let displaced = self.streams.books().clients.grow(&self.id, size, Instant::now())?;
        end_removed(displaced);
        let (streams, stream, id) = (self.streams.clone(), self.stream.clone(), self.id);
        let has_room = stream.held().as_mut().map_or(Ok(()), |held| held.bytes.grow(size));
        if let Err(refusal) = has_room {
            streams.books().clients.shrink(&id, size);
            return Err(refusal.into());
        }
        blocking(move || {
            let written = turn.append(&data, finish);
            let mut books = streams.books();
            if written.is_err() {
                books.clients.shrink(&id, size);
                if let Some(held) = &mut *stream.held() {
                    let left = held.bytes.amount().saturating_sub(size);
                    held.bytes.shrink_to(left);
                }
            } else if finish {
                books.clients.finish(&id, Instant::now());
                stream.release();
            }
            written
        })
        .await
    }
}

/// The streams of a running action, held by its worker. Dropping it ends them.
pub struct LiveRun {
    streams: LogStreams,
    id: Uuid,
    run: Arc<RunStreams>,
}

impl LiveRun {
    /// The id that their names contain.
    pub fn logs(&self) -> RunLogs {
        RunLogs(self.id)
    }

    /// Records that one of the files is complete and stored as this blob; `None` when it is empty.
    pub fn stored(&self, kind: LogKind, digest: Option<gorego_reapi::digest::Digest>) {
        self.run.end(kind, RunState::Stored(digest));
    }
}

impl Drop for LiveRun {
    fn drop(&mut self) {
        for kind in [LogKind::Stdout, LogKind::Stderr] {
            self.run.end(kind, RunState::Lost);
        }
        self.streams.books().runs.finish(&self.id, Instant::now());
    }
}

/// Runs file operations on the blocking pool. They are completed even if the future is dropped.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)?
}

#[cfg(test)]
mod tests;
