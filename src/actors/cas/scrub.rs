//! The scrub: reads everything that is stored, at a bounded rate, and drops what is damaged before a build needs it.
//!
//! Reads check the blocks that they read. The scrub checks the full digest of each blob, including blobs that are not
//! read and blobs that the kernel copies for actions. It also adds checksums to files that an older version has stored.
//! It visits the parts of the volume in a fixed order and records its progress, so it continues after a restart. A pass
//! begins a week after the start of the last one, and at once after an unclean stop.
//!
//! It has one thread of its own with the lowest priority, which never holds a lock while it reads. Its reads do not
//! count as uses. Damaged entries are dropped in the same way as after other reads ([`super::checked::report`]). When
//! the actor stops, the thread ends after at most one piece of a blob.

mod state;

use super::{
    CasActor, LOG, StoreShared,
    checked::{check_content_slowly, report},
    client::Cas,
    index::{EntryKind, FileId, FoundEntry},
    numbers::ScrubTally,
    results,
    volume::{self, PIECE_BYTES, Stored, Volume},
};
use crate::{background, logging::Event, rate::ReadingPace};
use actix::WeakAddr;
use gorego_reapi::error::{Error, Result};
use state::{PassReason, ScrubState};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Counts of the scrub since the start of the server.
#[derive(Debug, Default)]
pub(super) struct ScrubCounts {
    bytes: AtomicU64,
    damaged: AtomicU64,
    passes: AtomicU64,
}

impl ScrubCounts {
    pub(super) fn tally(&self) -> ScrubTally {
        let [bytes, damaged, passes] =
            [&self.bytes, &self.damaged, &self.passes].map(|count| count.load(Relaxed));
        ScrubTally { bytes, damaged, passes }
    }
}

/// The scrub of an open store. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Scrub {
    state: Arc<Mutex<ScrubState>>,
    /// The reason for a pass that begins at the start, if one does.
    reason: Option<PassReason>,
    /// Ends the thread when it is dropped.
    stop: Option<Sender<()>>,
}

/// The state of the thread.
struct Scrubber {
    store: WeakAddr<CasActor>,
    shared: Arc<StoreShared>,
    state: Arc<Mutex<ScrubState>>,
    stop: Receiver<()>,
    pace: ReadingPace,
    /// Whether the last state was written to disk.
    is_kept: AtomicBool,
}

/// Counts of one pass.
#[derive(Debug, Default)]
struct Pass {
    entries: u64,
    bytes: u64,
    damaged: u64,
    unreadable: u64,
}

/// The error of a pass that ends because the server stops.
#[derive(Debug)]
struct Stopping;

impl Scrub {
    /// Reads the progress of the last run, and records that this run has begun. From then on, a stop is unclean unless
    /// [`Scrub::close`] was called. `is_empty` says whether the store has no entries. Blocks.
    pub(super) fn open(volume: &dyn Volume, is_empty: bool) -> Self {
        let kept = volume.note().and_then(|note| ScrubState::decode(&note));
        let (state, reason) = ScrubState::at_start(kept, is_empty, unix_seconds());
        keep(volume, &state);
        Self { state: Arc::new(Mutex::new(state)), reason, stop: None }
    }

    /// Starts the thread, unless the rate is zero.
    pub(super) fn start(&mut self, store: WeakAddr<CasActor>, shared: &Arc<StoreShared>) {
        let rate = shared.settings.scrub_bytes_per_second;
        if rate == 0 {
            return;
        }
        let (stop, stopped) = mpsc::channel();
        let scrubber = Scrubber {
            store,
            shared: shared.clone(),
            state: self.state.clone(),
            stop: stopped,
            pace: ReadingPace::new(rate, Instant::now()),
            is_kept: AtomicBool::new(true),
        };
        let reason = self.reason;
        match thread::Builder::new().name("store-scrub".into()).spawn(move || scrubber.run(reason)) {
            Ok(_) => self.stop = Some(stop),
            Err(error) => failed(&error),
        }
    }

    /// Records that the store was closed properly. Blocks.
    pub(super) fn close(self, volume: &dyn Volume) {
        let mut state = lock(&self.state);
        state.stopped = true;
        keep(volume, &state);
    }
}

fn lock(state: &Mutex<ScrubState>) -> MutexGuard<'_, ScrubState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the state to disk. If this fails, the next pass starts from the beginning.
fn keep(volume: &dyn Volume, state: &ScrubState) {
    if let Err(error) = volume.keep_note(&state.encode()) {
        failed(&error);
    }
}

fn failed(error: &io::Error) {
    Event::warn(LOG, "scrub_failed")
        .with_shown("error", error)
        .log(format_args!("the scrub of the store could not be started, or not note how far it has come"));
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Scrubber {
    fn run(mut self, mut reason: Option<PassReason>) {
        background::lower_priority();
        loop {
            let reason = match reason.take() {
                Some(reason) => reason,
                None => {
                    let due_in = lock(&self.state).due_in(unix_seconds());
                    if self.pause(due_in).is_err() {
                        return;
                    }
                    PassReason::Due
                }
            };
            if self.pass(reason).is_err() {
                return;
            }
        }
    }

    /// Waits. Ends at once when the server stops.
    fn pause(&self, time: Duration) -> std::result::Result<(), Stopping> {
        match self.stop.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(Stopping),
        }
    }

    /// Changes the state and writes it to disk, unless the store is closed by now.
    fn change(&self, change: impl FnOnce(&mut ScrubState)) {
        let mut state = lock(&self.state);
        if !state.stopped {
            change(&mut state);
            let kept = self.shared.volume.keep_note(&state.encode());
            // A full disk refuses each note of a pass.
            if let Some(error) = kept.as_ref().err().filter(|_| self.is_kept.load(Relaxed)) {
                failed(error);
            }
            self.is_kept.store(kept.is_ok(), Relaxed);
        }
    }

    /// Visits the remaining parts of the volume.
    fn pass(&mut self, reason: PassReason) -> std::result::Result<(), Stopping> {
        let started = Instant::now();
        if reason != PassReason::Resumed {
            self.change(|state| {
                *state = ScrubState { in_pass: true, began: unix_seconds(), ..ScrubState::default() };
            });
        }
        Event::info(LOG, "scrub_started")
            .with("reason", reason.name())
            .with("bytes_per_second", self.shared.settings.scrub_bytes_per_second)
            .log(format_args!("the scrub reads all that is stored"));
        let mut pass = Pass::default();
        let parts = self.shared.volume.parts();
        let position = lock(&self.state).position.clone();
        let done = parts.iter().position(|part| *part == position).map_or(0, |at| at + 1);
        for part in parts.iter().skip(done) {
            if self.part(part, &mut pass)? {
                self.change(|state| state.position.clone_from(part));
            }
        }
        self.change(|state| (state.in_pass, state.position) = (false, String::new()));
        self.shared.scrubbed.passes.fetch_add(1, Relaxed);
        Event::info(LOG, "scrub_finished")
            .with("entries", pass.entries)
            .with("bytes", pass.bytes)
            .with("damaged", pass.damaged)
            .with("unreadable", pass.unreadable)
            .with("elapsed_ms", started.elapsed().as_millis() as u64)
            .log(format_args!("the scrub has read all that is stored"));
        Ok(())
    }

    /// Verifies the entries in one part. Returns whether there were any.
    fn part(&mut self, part: &str, pass: &mut Pass) -> std::result::Result<bool, Stopping> {
        let files = self.shared.volume.files_in(part).unwrap_or_default();
        for file in &files {
            let Some(found) = self.entry_of(file) else { continue };
            let cas = Cas::new(self.store.upgrade().ok_or(Stopping)?, self.shared.clone());
            let read_before = pass.bytes;
            let outcome = self.verify(&cas, &found, pass);
            let is_damaged = matches!(outcome, Err(Error::NotFound(_)));
            pass.entries += 1;
            pass.damaged += u64::from(is_damaged);
            pass.unreadable += u64::from(outcome.is_err() && !is_damaged);
            self.shared.scrubbed.damaged.fetch_add(is_damaged.into(), Relaxed);
            self.shared.scrubbed.bytes.fetch_add(pass.bytes - read_before, Relaxed);
            drop(cas);
            self.pause(Duration::ZERO)?;
        }
        Ok(!files.is_empty())
    }

    fn entry_of(&self, file: &FileId) -> Option<FoundEntry> {
        self.shared.view.read(None, |look| look.entry_of(file)).0
    }

    /// Verifies one entry.
    ///
    /// # Errors
    /// `NotFound` for a damaged entry, which is reported. Other errors say nothing about the entry.
    fn verify(&mut self, cas: &Cas, found: &FoundEntry, pass: &mut Pass) -> Result<()> {
        let lost = |reason: String| {
            report(cas, found, reason);
            Error::NotFound("a stored file is damaged".into())
        };
        let classify = |error: io::Error| {
            if volume::is_lost(&error) {
                lost(error.to_string())
            } else {
                Error::io("scrub the store", &error)
            }
        };
        let file = match self.shared.volume.open(&found.file) {
            // The file was evicted, replaced or moved meanwhile.
            Err(_) if self.entry_of(&found.file).is_none() => return Ok(()),
            opened => opened.map_err(classify)?,
        };
        let mut pause = |bytes: usize| -> io::Result<()> {
            pass.bytes += bytes as u64;
            let pause = self.pace.after(bytes as u64, Instant::now());
            let stopping = || io::Error::other("the server stops");
            if pause.is_zero() {
                return Ok(());
            }
            match self.stop.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => Ok(()),
                Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(stopping()),
            }
        };
        match found.file.key.kind {
            EntryKind::Blob => check_content_slowly(cas, found, &*file, &mut pause).map(drop),
            EntryKind::Result => {
                let bytes = volume::read_all(&*file, results::MAX_FILE_BYTES).map_err(classify)?;
                if !results::is_whole(&bytes) {
                    return Err(lost("its checksum is wrong".into()));
                }
                pause(bytes.len()).map_err(classify)
            }
            EntryKind::Zstd => read_through(&*file, &mut pause).map_err(classify),
        }
    }
}

/// Reads a file to its end, which checks its checksums.
fn read_through(file: &dyn Stored, pause: &mut dyn FnMut(usize) -> io::Result<()>) -> io::Result<()> {
    let (mut piece, mut at) = (vec![0; PIECE_BYTES], 0);
    loop {
        match file.read_at(&mut piece, at)? {
            0 => return Ok(()),
            read => {
                at += read as u64;
                pause(read)?;
            }
        }
    }
}
