//! Compression at rest: blobs that were not used for a while are kept compressed instead of in plain files.
//!
//! One thread of low priority does it, one blob at a time and within a share of one core ([`PackPace`]). It rests while
//! requests wait to compress or to hash, and ends with the actor. The index names the candidates (`Index::cold_from`),
//! the volume knows the format ([`packed`](crate::actors::cas::volume::packed)), and the actor gives the entry its new
//! file ([`Repack`]).
//!
//! Invariants:
//! - The digest is computed from the decoded new frames, so a packed file with its final name has the right content. A
//!   blob whose plain file turns out to be wrong is dropped, as after a read.
//! - A blob has one of its two files, or for a moment both. The plain file is deleted after the entry has the packed
//!   one. A start that finds both keeps the newer one, which is the packed one.
//! - A blob that is held keeps its plain file, so readers can read it to its end.
//! - Compressing a blob does not count as a use of it: its place in the order of use, the recorded time of its last use
//!   and its leases stay.
//! - Nothing is evicted to make room for a packed file.
//!
//! A blob of more than a few frames is sampled first. A blob that does not get smaller is marked in its entry and
//! ignored until the next start.

mod pace;

use crate::{
    actors::{
        cas::{
            CasActor, LOG, StoreShared,
            checked::{damaged, failed, open},
            client::{Cas, going_down},
            guards::{Reservation, UploadRoom},
            index::{ColdBlobs, EntryKind, FileId, FoundEntry, Key, Victim},
            settings::{LOAD_PAUSE, PACK_LEVEL, PackingSettings},
            unix_seconds,
            volume::{self, Stored, WrittenFile, packed::Packing},
        },
        mail::Receive,
    },
    background,
    logging::Event,
};
use actix::{Addr, Message, MessageResult, WeakAddr};
use gorego_reapi::{
    compression::{CHUNK_BYTES, Encoder, FrameDecoder},
    digest::Hasher,
    error::{Error, Result},
};
use pace::PackPace;
use rustix::time::{ClockId, clock_gettime};
use std::{
    io,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Number of frames of a larger blob that are compressed first, to see whether it gets smaller.
const SAMPLES: u64 = 4;
/// Blobs of up to this many frames are not sampled.
const SAMPLED_FROM_FRAMES: u64 = 8;

/// Fact: the blob in a file was compressed into another file. The answer says whether the new file took the place of
/// the old one.
#[derive(Message)]
#[rtype(result = "bool")]
pub(super) struct Repack {
    pub from: FileId,
    pub to: WrittenFile,
    /// Room for the new file.
    pub room: Reservation,
}

/// The thread that compresses cold blobs. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Packer {
    _stop: mpsc::Sender<()>,
}

impl Packer {
    /// Starts the thread, if blobs are to be compressed.
    pub(crate) fn start(store: &Addr<CasActor>, shared: &Arc<StoreShared>) -> Option<Self> {
        let settings = shared.settings.packing?;
        let (stop, stopped) = mpsc::channel();
        let worker = PackWorker {
            store: store.downgrade(),
            shared: shared.clone(),
            pace: PackPace::new(settings.cpu_percent),
            since: ThreadClock::now(),
            settings,
            stopped,
        };
        let spawned = thread::Builder::new().name("store-packer".into()).spawn(move || worker.run());
        if let Err(error) = spawned {
            Event::warn(LOG, "compression_failed").with_shown("error", &error).log(format_args!(
                "could not start to compress blobs that are not used; they stay as they are"
            ));
            return None;
        }
        Some(Self { _stop: stop })
    }
}

/// The state of the thread.
struct PackWorker {
    store: WeakAddr<CasActor>,
    shared: Arc<StoreShared>,
    settings: PackingSettings,
    pace: PackPace,
    /// The time at which the current piece of work began.
    since: ThreadClock,
    /// Closed when the thread has to end.
    stopped: mpsc::Receiver<()>,
}

#[derive(Debug, Clone, Copy)]
struct ThreadClock {
    cpu: Duration,
    at: Instant,
}

impl ThreadClock {
    fn now() -> Self {
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        let (seconds, nanos) = (u64::try_from(cpu.tv_sec), u32::try_from(cpu.tv_nsec));
        Self { cpu: Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0)), at: Instant::now() }
    }
}

/// The outcome for one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packed {
    /// The blob is now compressed and takes this many bytes.
    Yes(u64),
    /// The blob does not get smaller.
    Incompressible,
    /// The blob is in use or gone, or there is no room for both of its files.
    NotNow,
}

/// One pass over the index.
struct PackPass {
    settings: PackingSettings,
    /// The slot of the index to continue from; `None` at the end.
    next: Option<u32>,
    tally: PackTally,
    /// `None` until there is something to compress.
    codec: Option<PackCodec>,
}

impl PackPass {
    fn new(settings: PackingSettings) -> Self {
        Self { settings, next: Some(0), tally: PackTally::default(), codec: None }
    }

    /// Compresses the cold blobs in the next part of the index.
    fn go_on(&mut self, cas: &Cas, pause: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let Self { settings, next, tally, codec } = self;
        let Some(start) = *next else { return Ok(()) };
        let used_until = unix_seconds().saturating_sub(settings.after_secs);
        let cold = ColdBlobs { used_until, min_bytes: settings.min_bytes };
        let (candidates, rest) = cas.look_up(|look| look.cold_from(cold, start))?;
        for found in &candidates {
            let ready = match codec.take() {
                Some(ready) => ready,
                None => PackCodec::new()?,
            };
            tally.add(found, pack(cas, found, *settings, codec.insert(ready), pause))?;
        }
        *next = rest;
        Ok(())
    }
}

/// Compresses all blobs that are cold now. `pause` is called after each frame. Blocks.
#[cfg(test)]
pub(in crate::actors::cas) fn pack_now(
    cas: &Cas,
    settings: PackingSettings,
    mut pause: impl FnMut() -> Result<()>,
) -> Result<PackTally> {
    let mut pass = PackPass::new(settings);
    while pass.next.is_some() {
        pass.go_on(cas, &mut pause)?;
    }
    Ok(pass.tally)
}

/// The totals of one pass over the index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::actors::cas) struct PackTally {
    pub blobs: u64,
    /// The bytes of these blobs before compression.
    pub content_bytes: u64,
    /// The bytes that they take now.
    pub bytes: u64,
    pub incompressible: u64,
}

/// The encoder and the decoder that checks its output. They take a few MiB, so they are kept only during a pass.
struct PackCodec {
    encoder: Encoder,
    decoder: FrameDecoder,
    frame: Vec<u8>,
    chunk: Vec<u8>,
}

impl PackCodec {
    fn new() -> Result<Self> {
        let (encoder, decoder) = (Encoder::new(PACK_LEVEL)?, FrameDecoder::new()?);
        Ok(Self { encoder, decoder, frame: Vec::new(), chunk: Vec::new() })
    }

    /// Compresses one chunk of a blob to [`PackCodec::frame`] and returns the bytes of the chunk.
    fn compress(&mut self, cas: &Cas, found: &FoundEntry, file: &dyn Stored, at: u64) -> Result<usize> {
        let size = found.file.key.digest.size();
        let length = (size - at).min(CHUNK_BYTES as u64) as usize;
        self.chunk.resize(length, 0);
        volume::read_exact(file, &mut self.chunk, at).map_err(|error| failed(cas, found, &error))?;
        self.frame.clear();
        self.encoder.frames(&self.chunk, &mut self.frame)?;
        Ok(length)
    }

    /// Decodes the frame and adds its content to a digest.
    fn hash(&mut self, hasher: &mut Hasher, length: usize) -> Result<()> {
        hasher.update(&self.decoder.decode(&self.frame, length)?);
        Ok(())
    }
}

impl PackWorker {
    fn run(mut self) {
        background::lower_priority();
        loop {
            match self.pass() {
                Ok(tally) => tally.log(),
                // The store is closing.
                Err(Error::Unavailable(_)) => return,
                Err(error) => Event::warn(LOG, "compression_failed")
                    .with_shown("error", &error)
                    .log(format_args!("could not compress blobs that are not used; it is tried again")),
            }
            if !self.rest(self.settings.between_passes()) {
                return;
            }
        }
    }

    /// Compresses all cold blobs.
    fn pass(&mut self) -> Result<PackTally> {
        let mut pass = PackPass::new(self.settings);
        while pass.next.is_some() {
            // No handle is kept between the parts, so that this thread does not keep the store open.
            let store = self.store.upgrade().ok_or_else(going_down)?;
            pass.go_on(&Cas::new(store, self.shared.clone()), &mut || self.keep_pace())?;
            self.keep_pace()?;
        }
        Ok(pass.tally)
    }

    /// Rests for as long as the bound on CPU time and the requests of clients demand.
    ///
    /// # Errors
    /// `Unavailable` when the thread has to end.
    fn keep_pace(&mut self) -> Result<()> {
        let now = ThreadClock::now();
        let (cpu, took) = (now.cpu.saturating_sub(self.since.cpu), now.at - self.since.at);
        let mut pause = self.pace.rest_after(cpu, took);
        loop {
            if !self.rest(pause) {
                return Err(going_down());
            }
            if !self.shared.encoding.is_awaited() && !self.shared.cold_reads.is_awaited() {
                break;
            }
            pause = LOAD_PAUSE;
        }
        self.since = ThreadClock::now();
        Ok(())
    }

    /// Waits. Returns false if the thread has to end.
    fn rest(&self, pause: Duration) -> bool {
        self.stopped.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout)
    }
}

impl PackTally {
    /// Adds the outcome for one blob. A damaged blob was reported already and is not an error here.
    fn add(&mut self, found: &FoundEntry, packed: Result<Packed>) -> Result<()> {
        match packed {
            Ok(Packed::Yes(bytes)) => {
                self.blobs += 1;
                self.content_bytes = self.content_bytes.saturating_add(found.file.key.digest.size());
                self.bytes = self.bytes.saturating_add(bytes);
            }
            Ok(Packed::Incompressible) => self.incompressible += 1,
            Ok(Packed::NotNow) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn log(self) {
        if self.blobs > 0 {
            Event::info(LOG, "blobs_compressed")
                .with("entries", self.blobs)
                .with("content_bytes", self.content_bytes)
                .with("bytes", self.bytes)
                .with("incompressible", self.incompressible)
                .log(format_args!("compressed {} blobs that nobody has used lately", self.blobs));
        }
    }
}

/// Compresses one blob and gives it the packed file in place of its plain one. `pause` is called after each frame.
/// Blocks.
///
/// # Errors
/// `NotFound` when its file is damaged or gone, which is reported. The errors of `pause`.
fn pack(
    cas: &Cas,
    found: &FoundEntry,
    settings: PackingSettings,
    codec: &mut PackCodec,
    pause: &mut dyn FnMut() -> Result<()>,
) -> Result<Packed> {
    let (shared, key) = (cas.shared(), found.file.key);
    let most = settings.most_bytes(shared.volume.charge(key.digest.size()));
    let start = cas.look_up(|look| look.last_use(found.at).filter(|_| look.has_room(most)))?;
    let Some(used) = start else { return Ok(Packed::NotNow) };
    let file = open(cas, found)?;
    let size = file.look().map_err(|error| failed(cas, found, &error))?.size;
    if size != key.digest.size() {
        return Err(damaged(cas, found, format!("it has {size} bytes")));
    }
    let incompressible = || {
        cas.look_up(|look| look.mark_incompressible(found.at))?;
        Ok(Packed::Incompressible)
    };
    if !sample(cas, found, &*file, codec, settings, pause)? {
        return incompressible();
    }
    let write_failed =
        |error: io::Error| Error::io(&format!("write the compressed file of blob {}", key.digest), &error);
    let mut packing = Packing::new(shared.volume.packed_draft(used).map_err(write_failed)?, key);
    let mut room = UploadRoom::none(cas.actor().clone());
    let (mut hasher, mut at) = (key.digest.hasher(), 0);
    while at < size {
        let length = codec.compress(cas, found, &*file, at)?;
        let bytes = shared.volume.charge(packing.length_with(codec.frame.len()));
        if bytes > most {
            return incompressible();
        }
        room.grow_here(&shared.runtime, bytes, most)?;
        packing.push(length, &codec.frame).map_err(write_failed)?;
        codec.hash(&mut hasher, length)?;
        at += length as u64;
        pause()?;
        if cas.look_up(|look| look.last_use(found.at))?.is_none() {
            return Ok(Packed::NotNow);
        }
    }
    let actual = hasher.finish();
    if actual != key.digest {
        return Err(damaged(cas, found, format!("its content has the digest {actual}")));
    }
    let written = packing.finish().map_err(write_failed)?;
    // The plain file is deleted next.
    if let Err(error) = shared.volume.sync(&[written.file]) {
        shared.volume.delete(&[Victim { file: written.file, bytes: written.bytes }]);
        return Err(write_failed(error));
    }
    let repack = Repack { from: found.file, to: written, room: room.into_reservation() };
    let is_replaced = shared.runtime.block_on(cas.ask(repack))?;
    Ok(if is_replaced { Packed::Yes(written.bytes) } else { Packed::NotNow })
}

/// Whether some frames of a blob get small enough.
fn sample(
    cas: &Cas,
    found: &FoundEntry,
    file: &dyn Stored,
    codec: &mut PackCodec,
    settings: PackingSettings,
    pause: &mut dyn FnMut() -> Result<()>,
) -> Result<bool> {
    let (mut plain, mut packed) = (0, 0);
    for at in samples(found.file.key.digest.size()) {
        plain += codec.compress(cas, found, file, at)? as u64;
        packed += codec.frame.len() as u64;
        pause()?;
    }
    Ok(packed <= settings.most_bytes(plain))
}

/// The offsets of the frames to try first, evenly spread over the blob.
fn samples(size: u64) -> impl Iterator<Item = u64> {
    let frames = size.div_ceil(CHUNK_BYTES as u64);
    let count = if frames > SAMPLED_FROM_FRAMES { SAMPLES } else { 0 };
    (0..count).map(move |number| number * (frames - 1) / (SAMPLES - 1) * CHUNK_BYTES as u64)
}

impl Receive<Repack> for CasActor {
    type Answer = MessageResult<Repack>;

    fn receive(&mut self, Repack { from, to, room }: Repack, ctx: &mut Self::Context) -> Self::Answer {
        let reserved = room.disarm();
        let (outcome, form) = self.change(|index| {
            index.unreserve(reserved);
            let outcome = index.repack(&from, to.file.generation, to.bytes, to.stamp);
            // The frames of the packed file serve as the form.
            let form = Key { kind: EntryKind::Zstd, ..from.key };
            let form =
                outcome.is_ok().then(|| index.place_of(&form)).flatten().and_then(|at| index.remove(at));
            (outcome, form)
        });
        let (Ok(superseded) | Err(superseded)) = outcome;
        self.delete([superseded].into_iter().chain(form).collect(), ctx);
        MessageResult(outcome.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_the_whole_blob() {
        let chunk = CHUNK_BYTES as u64;
        assert_eq!(samples(8 * chunk).count(), 0);
        assert_eq!(samples(10 * chunk).collect::<Vec<_>>(), [0, 3 * chunk, 6 * chunk, 9 * chunk]);
        assert_eq!(samples(9 * chunk + 1).last(), Some(9 * chunk), "the last frame may be short");
        assert_eq!(samples(u64::MAX / 8).count(), 4);
    }
}
