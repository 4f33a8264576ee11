//! A flight: the download of one asset into the store, from the first mirror that has it.

use super::{
    AssetActor, AssetShared, LOG,
    bindings::Binding,
    download::DownloadSource,
    flights::Begun,
    layout::Layout,
    messages::Landed,
    outcome::{FailureKind, Fetched, FlightOutcome, OriginFailure, Problem},
    patience::Patience,
    request::{AssetKey, AssetKind, AssetRequest},
    unpack::{Contents, MAGIC_BYTES, memory_bytes, unpack},
};
use crate::{
    actors::cas::{blob::BlobReader, client::Cas},
    budget::{Budget, Share},
    caller::Caller,
    instance::Instance,
    logging::Event,
};
use actix::Addr;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use reqwest::Url;
use std::{
    io::{self, Read, Seek, SeekFrom},
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};
use tokio::{runtime::Handle, select, sync::watch, time::Instant};

/// Files of an archive up to this size are stored in batches. Larger ones are stored as they are read.
const SMALL_FILE_BYTES: usize = 256 * 1024;
/// Maximum bytes of such a batch.
const BATCH_BYTES: usize = 2 * 1024 * 1024;
/// Maximum files of such a batch.
const BATCH_FILES: usize = 1_000;
/// Maximum length of an error message, in bytes; there may be 64 mirrors.
const MESSAGE_MAX_BYTES: usize = 4 * 1024;
/// Bytes that are read at once from a stored archive or an unpacked file.
const PIECE_BYTES: usize = 128 * 1024;

/// Starts a flight. It ends at the latest deadline of its callers, and always reports to the actor. The age of its
/// content counts from `asked_at`, not from its last byte.
pub(super) fn launch(
    shared: Arc<AssetShared>,
    actor: Addr<AssetActor>,
    Begun { id, latest, callers, .. }: Begun,
    request: Arc<AssetRequest>,
    asked_at: SystemTime,
) {
    let runtime = shared.runtime.clone();
    runtime.spawn(async move {
        let started = Instant::now();
        let flight = AssertUnwindSafe(fly(&shared, &request, &latest, callers)).catch_unwind();
        let outcome = select! {
            outcome = flight => outcome.unwrap_or_else(|_| Err(Error::internal("a fetch panicked").into())),
            () = passed(latest.clone()) => Err(Problem::origin(FailureKind::TimedOut, "the fetch took too long")),
        };
        write_line(&request, started, &outcome);
        let bind = outcome.as_ref().ok().and_then(|fetched| bind(&request, fetched, asked_at));
        actor.do_send(Landed { flight: id, bind, outcome });
    });
}

/// Waits until the deadline has passed, which may be extended meanwhile.
async fn passed(mut latest: watch::Receiver<Instant>) {
    loop {
        let deadline = *latest.borrow_and_update();
        select! {
            () = tokio::time::sleep_until(deadline) => return,
            changed = latest.changed() => if changed.is_err() {
                return tokio::time::sleep_until(deadline).await;
            }
        }
    }
}

fn bind(request: &AssetRequest, fetched: &Fetched, obtained_at: SystemTime) -> Option<(AssetKey, Binding)> {
    let index = request.uris.iter().position(|uri| *uri == fetched.uri)?;
    let key = *request.keys().get(index)?;
    let Fetched { digest, expires_at, .. } = *fetched;
    Some((key, Binding { digest, obtained_at, expires_at, references: Arc::default() }))
}

fn write_line(request: &AssetRequest, started: Instant, outcome: &FlightOutcome) {
    let asset = request.kind.name();
    let instance = request.instance.name();
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    // Only the host is logged: paths and queries may contain secrets.
    let host = |uri: &str| {
        Url::parse(uri).ok().and_then(|url| url.host_str().map(ToOwned::to_owned)).unwrap_or_default()
    };
    match outcome {
        Ok(Fetched { uri, digest, .. }) => {
            let host = host(uri);
            Event::info(LOG, "asset_fetched")
                .with("asset", asset)
                .with("host", &host)
                .with_shown("digest", digest)
                .with("instance", instance)
                .with("elapsed_ms", elapsed_ms)
                .log(format_args!("fetched a {asset} from {host}"));
        }
        Err(problem) => {
            let (code, text, uri) = match problem {
                Problem::Origin(failure) => {
                    (failure.kind.code_name(), failure.message.clone(), failure.uri.as_str())
                }
                Problem::Unsupported(names) => ("INVALID_ARGUMENT", names.join(", "), ""),
                Problem::Server(error) => (error.code_name(), error.to_string(), ""),
            };
            Event::info(LOG, "asset_failed")
                .with("asset", asset)
                .with("host", &host(uri))
                .with("grpc_code", code)
                .with("error", &text)
                .with("instance", instance)
                .with("elapsed_ms", elapsed_ms)
                .log(format_args!("could not fetch a {asset}: {text}"));
        }
    }
}

/// Waits for permission to download, for each connection that wants this flight. The first permission that is granted
/// is used for all of them.
async fn take_off(runway: &Budget, mut callers: watch::Receiver<Vec<Caller>>) -> Result<Share> {
    let mut lines = FuturesUnordered::new();
    loop {
        let new = callers.borrow_and_update().iter().skip(lines.len()).copied().collect::<Vec<_>>();
        lines.extend(new.into_iter().map(|caller| runway.wait_for(caller, 1)));
        select! {
            Some(place) = lines.next() => return Ok(place?),
            Ok(()) = callers.changed() => {}
            else => return Err(Error::Unavailable("the server is shutting down".into())),
        }
    }
}

async fn fly(
    shared: &Arc<AssetShared>,
    request: &AssetRequest,
    latest: &watch::Receiver<Instant>,
    callers: watch::Receiver<Vec<Caller>>,
) -> FlightOutcome {
    let place = take_off(&shared.runway, callers).await?;
    // The download is charged to that caller, like an upload.
    let cas = shared.cas.on_behalf_of(place.caller());
    let asked_at = SystemTime::now();
    let integrity = request.qualifiers.integrity()?;
    let expires_at = if integrity.is_some() { None } else { asked_at.checked_add(shared.settings.max_age) };
    let mut failures: Vec<OriginFailure> = Vec::new();
    let uris = u32::try_from(request.uris.len()).unwrap_or(u32::MAX);
    for ((index, uri), mirrors) in request.uris.iter().enumerate().zip((1..=uris).rev()) {
        let headers = &request.headers(index)?;
        let patience = Patience { latest: latest.clone(), mirrors };
        let source = DownloadSource { uri, headers, integrity: integrity.as_ref(), patience };
        let fetched = async {
            let blob = shared.downloader.download(&cas, request, &source).await?;
            match request.kind {
                AssetKind::Blob => Ok(blob),
                AssetKind::Directory => unpack_blob(shared, (&cas, place.caller()), request, blob).await,
            }
        };
        match fetched.await {
            Ok(digest) => return Ok(Fetched { uri: uri.clone(), digest, expires_at }),
            Err(Problem::Origin(failure)) => failures.push(OriginFailure { uri: uri.clone(), ..failure }),
            Err(fault) => return Err(fault),
        }
    }
    Err(Problem::Origin(OriginFailure::of_all(failures)))
}

impl OriginFailure {
    /// Combines the failures of all mirrors: the kind of the last one, with all messages.
    fn of_all(mut failures: Vec<Self>) -> Self {
        let message = match failures.as_slice() {
            [one] => one.message.clone(),
            all => {
                let told =
                    all.iter().enumerate().map(|(at, failure)| format!("uris[{at}]: {}", failure.message));
                told.collect::<Vec<_>>().join("; ")
            }
        };
        let message = shorten(message);
        let last = failures.pop();
        let (kind, uri) = last.map_or((FailureKind::NotFound, String::new()), |last| (last.kind, last.uri));
        Self { kind, uri, message }
    }
}

/// Truncates a text whose length origins and clients control.
fn shorten(mut text: String) -> String {
    let mut end = MESSAGE_MAX_BYTES.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Unpacks a stored archive into stored Directories.
async fn unpack_blob(
    shared: &Arc<AssetShared>,
    (cas, caller): (&Cas, Caller),
    request: &AssetRequest,
    archive: Digest,
) -> Result<Digest, Problem> {
    let path = request.qualifiers.directory()?;
    let reader = cas.open(&request.instance, archive).await?;
    let memory = memory_bytes(&reader.read_at(0, MAGIC_BYTES).await?, archive.size());
    let memory = shared.unpacking.wait_for(caller, memory).await.map_err(Error::from)?;
    let runtime = shared.runtime.clone();
    let max_bytes = shared.settings.max_unpacked_bytes;
    // A blocking thread cannot be dropped like a future. This stops it when the flight has ended.
    let stop = Arc::<StopFlag>::default();
    let _stop_at_end = StopOnDrop(stop.clone());
    let mut store = ContentStore {
        stop: stop.clone(),
        cas: cas.clone(),
        instance: request.instance.clone(),
        function: request.function,
        runtime: runtime.clone(),
        batch: Vec::new(),
        batch_bytes: 0,
    };
    let function = request.function;
    let work = shared.runtime.spawn_blocking(move || -> Result<Digest, Problem> {
        // Held until the decoder and the layout are gone, also if the flight ends before.
        let _memory = memory;
        let layout = unpack(BlobCursor { stop, reader, runtime, at: 0 }, max_bytes, &mut store)?;
        let refuse = |problem| Problem::origin(FailureKind::NotFound, problem);
        let layout: Layout =
            if path.is_root() { layout } else { layout.below(path.as_str()).map_err(refuse)? };
        let (root, directories) = layout.directories(function);
        for (digest, bytes) in directories {
            store.add(digest, bytes)?;
        }
        store.flush()?;
        Ok(root)
    });
    work.await.map_err(|_| Error::internal("unpacking an archive panicked"))?
}

/// Tells work on a blocking thread to stop.
#[derive(Default)]
struct StopFlag(AtomicBool);

impl StopFlag {
    fn check(&self) -> Result<()> {
        let message = || Error::Cancelled("the fetch has ended".into());
        if self.0.load(Ordering::Relaxed) { Err(message()) } else { Ok(()) }
    }
}

struct StopOnDrop(Arc<StopFlag>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Stores unpacked files. For use on a blocking thread.
struct ContentStore {
    stop: Arc<StopFlag>,
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    runtime: Handle,
    batch: Vec<(Digest, Bytes)>,
    batch_bytes: usize,
}

impl ContentStore {
    fn add(&mut self, digest: Digest, bytes: Bytes) -> Result<()> {
        self.batch_bytes = self.batch_bytes.saturating_add(bytes.len());
        self.batch.push((digest, bytes));
        if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH_FILES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.stop.check()?;
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        self.runtime.block_on(self.cas.write_many(&self.instance, batch))?.into_iter().collect()
    }
}

impl Contents for ContentStore {
    fn put(&mut self, content: &mut dyn Read) -> Result<Digest, Problem> {
        let mut small = Vec::new();
        let head = content.take(SMALL_FILE_BYTES as u64 + 1).read_to_end(&mut small);
        head.map_err(|error| Problem::of_io(&error))?;
        if small.len() <= SMALL_FILE_BYTES {
            let digest = self.function.digest(&small);
            self.add(digest, small.into())?;
            return Ok(digest);
        }
        let mut blob = self.cas.new_blob(&self.instance, self.function);
        let mut piece = Bytes::from(small);
        while !piece.is_empty() {
            self.stop.check()?;
            self.runtime.block_on(blob.write(piece)).map_err(of_storing)?;
            let mut next = Vec::with_capacity(PIECE_BYTES);
            content
                .take(PIECE_BYTES as u64)
                .read_to_end(&mut next)
                .map_err(|error| Problem::of_io(&error))?;
            piece = next.into();
        }
        Ok(self.runtime.block_on(blob.finish())?)
    }
}

/// The problem of a file of an archive that could not be stored. A file that is too large is a problem of the archive.
fn of_storing(error: Error) -> Problem {
    match error {
        Error::Invalid(message) => {
            Problem::origin(FailureKind::TooMuch, format!("the archive has too large a file: {message}"))
        }
        error => error.into(),
    }
}

/// Reads a stored blob as a file. For use on a blocking thread.
struct BlobCursor {
    stop: Arc<StopFlag>,
    reader: BlobReader,
    runtime: Handle,
    at: u64,
}

impl Read for BlobCursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stop.check().map_err(|error| Problem::Server(error).into_io())?;
        let read = self.runtime.block_on(self.reader.read_at(self.at, buffer.len().min(PIECE_BYTES)));
        let bytes = read.map_err(|error| Problem::Server(error).into_io())?;
        let target = buffer.get_mut(..bytes.len()).ok_or(io::ErrorKind::InvalidData)?;
        target.copy_from_slice(&bytes);
        self.at = self.at.saturating_add(bytes.len() as u64);
        Ok(bytes.len())
    }
}

impl Seek for BlobCursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(offset) => self.reader.size().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.at.checked_add_signed(offset),
        };
        self.at = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Bounds;

    #[test]
    fn a_file_that_is_too_large_is_a_problem_of_its_archive_and_a_full_disk_is_not() {
        let Problem::Origin(failure) = of_storing(Error::invalid("the upload has 9 bytes")) else { panic!() };
        assert!(failure.kind == FailureKind::TooMuch && failure.message.contains("9 bytes"), "{failure:?}");
        let full = Error::Exhausted { message: "the disk is full".into(), retry_after: None };
        assert_eq!(of_storing(full.clone()), Problem::Server(full));
    }

    /// A connection that joins the flight of another connection does not wait behind all downloads of that connection.
    #[tokio::test]
    async fn a_flight_starts_when_the_turn_of_any_of_its_connections_comes() {
        for host in [1, 2] {
            assert_starts_for_the_next_connection(host).await;
        }
    }

    async fn assert_starts_for_the_next_connection(host: u8) {
        let [greedy, modest] = [1, host].map(|host| Caller::connected(([127, 0, 0, host], 1).into()));
        let runway = Budget::new(Bounds::shared("downloads", 8));
        let held: Vec<_> = std::iter::from_fn(|| runway.take(greedy, 1).ok()).collect();
        let (callers, lines) = watch::channel(vec![greedy]);
        let mut flight = Box::pin(take_off(&runway, lines));
        assert!(flight.as_mut().now_or_never().is_none());
        callers.send_modify(|callers| callers.push(modest));
        let place = flight.as_mut().now_or_never().expect("there is a place for the other one").unwrap();
        assert_eq!(place.caller(), modest);
        drop((held, place));
        drop(flight);
        assert_eq!(runway.held(), 0, "no queue is left");
    }
}
