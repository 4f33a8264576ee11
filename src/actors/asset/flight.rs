//! A flight: getting one asset, from the first mirror that has it to the store.

use super::{
    AssetActor, LOG, Shared,
    bindings::Binding,
    download::Source,
    flights::Begun,
    layout::Layout,
    messages::Landed,
    outcome::{Failure, FailureKind, Fetched, Problem},
    patience::Patience,
    request::{AssetKey, AssetRequest, Kind},
    unpack::{Contents, unpack},
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

/// What those who wait for a flight are told.
pub type Outcome = Result<Fetched, Problem>;

/// Files of an archive up to this size are stored in batches; larger ones go to the store as they are read.
const SMALL_FILE_BYTES: usize = 256 * 1024;
/// Bytes of such a batch.
const BATCH_BYTES: usize = 2 * 1024 * 1024;
/// Files of such a batch.
const BATCH_FILES: usize = 1_000;
/// Longest text about what went wrong, in bytes; there may be 64 mirrors.
const MESSAGE_MAX_BYTES: usize = 4 * 1024;
/// Bytes that are read at a time from a stored archive or an unpacked file.
const PIECE_BYTES: usize = 128 * 1024;

/// Starts a flight. It ends at the latest deadline of its callers, and tells the actor in any case. Its content is as old as the question for it, which
/// was `asked_at`, and not as its last byte.
pub fn launch(
    shared: Arc<Shared>,
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
            () = passed(latest.clone()) => Err(Problem::origin(FailureKind::TimedOut, "it took longer than the fetch may take")),
        };
        write_line(&request, started, &outcome);
        let bind = outcome.as_ref().ok().and_then(|fetched| bind(&request, fetched, asked_at));
        actor.do_send(Landed { flight: id, bind, outcome });
    });
}

/// Ends when the deadline has passed, which may be put off meanwhile.
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

fn write_line(request: &AssetRequest, started: Instant, outcome: &Outcome) {
    let asset = request.kind.name();
    let instance = request.instance.name();
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    // Only the host: paths and queries may hold secrets.
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

/// Waits for a place in the air, for each connection that wants this flight. The first one whose turn comes gets it for all.
async fn take_off(runway: &Budget, mut callers: watch::Receiver<Vec<Caller>>) -> Result<Share> {
    let mut lines = FuturesUnordered::new();
    loop {
        let new = callers.borrow_and_update().iter().skip(lines.len()).copied().collect::<Vec<_>>();
        lines.extend(new.into_iter().map(|caller| runway.wait_for(caller, 1)));
        select! {
            Some(place) = lines.next() => return Ok(place?),
            Ok(()) = callers.changed() => {}
            else => return Err(Error::Unavailable("the server is going down".into())),
        }
    }
}

async fn fly(
    shared: &Arc<Shared>,
    request: &AssetRequest,
    latest: &watch::Receiver<Instant>,
    callers: watch::Receiver<Vec<Caller>>,
) -> Outcome {
    let place = take_off(&shared.runway, callers).await?;
    // What is downloaded counts as an upload of that caller.
    let cas = shared.cas.on_behalf_of(place.caller());
    let asked_at = SystemTime::now();
    let headers = request.headers()?;
    let integrity = request.qualifiers.integrity()?;
    let expires_at = if integrity.is_some() { None } else { asked_at.checked_add(shared.settings.max_age) };
    let mut failures: Vec<Failure> = Vec::new();
    let uris = u32::try_from(request.uris.len()).unwrap_or(u32::MAX);
    for ((uri, headers), mirrors) in request.uris.iter().zip(&headers).zip((1..=uris).rev()) {
        let patience = Patience { latest: latest.clone(), mirrors };
        let source = Source { uri, headers, integrity: integrity.as_ref(), patience };
        let fetched = async {
            let blob = shared.downloader.download(&cas, request, &source).await?;
            match request.kind {
                Kind::Blob => Ok(blob),
                Kind::Directory => unpack_blob(shared, &cas, request, blob).await,
            }
        };
        match fetched.await {
            Ok(digest) => return Ok(Fetched { uri: uri.clone(), digest, expires_at }),
            Err(Problem::Origin(failure)) => failures.push(Failure { uri: uri.clone(), ..failure }),
            Err(fault) => return Err(fault),
        }
    }
    Err(Problem::Origin(Failure::of_all(failures)))
}

impl Failure {
    /// One failure that stands for those of all mirrors: the last one's, with what the others said.
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

/// Cuts a text into which origins and clients have put what they like.
fn shorten(mut text: String) -> String {
    let mut end = MESSAGE_MAX_BYTES.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Turns a stored archive into stored Directories.
async fn unpack_blob(
    shared: &Arc<Shared>,
    cas: &Cas,
    request: &AssetRequest,
    archive: Digest,
) -> Result<Digest, Problem> {
    let path = request.qualifiers.directory()?;
    let reader = cas.open(&request.instance, archive).await?;
    let runtime = shared.runtime.clone();
    let max_bytes = shared.settings.max_unpacked_bytes;
    // A thread cannot be dropped as a future can; without this it would go on when the flight has ended.
    let stop = Arc::<Stop>::default();
    let _stop_at_end = StopOnDrop(stop.clone());
    let mut store = Store {
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
        let layout = unpack(Cursor { stop, reader, runtime, at: 0 }, max_bytes, &mut store)?;
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

/// Whether work on a blocking thread is to end.
#[derive(Default)]
struct Stop(AtomicBool);

impl Stop {
    fn check(&self) -> Result<()> {
        let message = || Error::Cancelled("the fetch has ended".into());
        if self.0.load(Ordering::Relaxed) { Err(message()) } else { Ok(()) }
    }
}

struct StopOnDrop(Arc<Stop>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Where unpacked files go. On a blocking thread.
struct Store {
    stop: Arc<Stop>,
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    runtime: Handle,
    batch: Vec<(Digest, Bytes)>,
    batch_bytes: usize,
}

impl Store {
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

impl Contents for Store {
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
            self.runtime.block_on(blob.write(piece))?;
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

/// A stored blob as a file to read. On a blocking thread.
struct Cursor {
    stop: Arc<Stop>,
    reader: BlobReader,
    runtime: Handle,
    at: u64,
}

impl Read for Cursor {
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

impl Seek for Cursor {
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

    /// A connection that joins a flight of another one does not wait behind all that the other one wants.
    #[tokio::test]
    async fn a_flight_takes_off_when_the_turn_of_any_connection_comes_that_wants_it() {
        for host in [1, 2] {
            a_flight_is_joined_from(host).await;
        }
    }

    async fn a_flight_is_joined_from(host: u8) {
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
        assert_eq!(runway.held(), 0, "no line is left");
    }
}
