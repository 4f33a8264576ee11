//! The hand-over of finished lines to the one thread that writes them.
//!
//! Logging appends to a buffer and returns: a reader of standard error that is slow, stuck or gone costs an actor or an RPC
//! nothing. The writer takes everything that waits and writes it with one call. A line that comes after a pause is written at
//! once. After each write the writer rests for a few milliseconds, and lines gather meanwhile, so a busy server pays for one
//! wake-up per batch and not per line. The rest ends early when a batch is full, when a line is urgent, and when somebody waits
//! in [`HandOver::flush`]. A process that is killed loses at most the lines of one rest.
//!
//! Invariants: lines are written in the order in which they were handed over; a line is written whole or not at all, unless
//! a write fails in the middle of it; the buffer is bounded, and lines that find it full are dropped, counted and reported where
//! they are missing; no lock is held while something is written. This file knows nothing of levels and fields.

use std::{
    io::{self, ErrorKind, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Most bytes of lines that wait for the writer: some 10,000 lines, which is every line of a few thousand actions that are
/// submitted at once. The writer may hold as many again.
pub const WAITING_MAX_BYTES: usize = 4 * 1024 * 1024;
/// So many bytes of lines are written without waiting for more: as many as a pipe takes in one call.
const BATCH_BYTES: usize = 64 * 1024;
/// How long the writer rests after it took a batch. At 200 wake-ups a second, waking costs less than writing the lines; shorter
/// than anybody notices who follows the log.
const BATCH_TIME: Duration = Duration::from_millis(5);
/// How much of a buffer is kept after a burst: room for a full batch and the lines that come while it is written.
const KEPT_BYTES: usize = 4 * BATCH_BYTES;
/// How long the writer waits when standard error is in non-blocking mode, as programs that share it may leave it, and full.
const NOT_READY_PAUSE: Duration = Duration::from_millis(10);

/// How many lines the writer takes at a time.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// A batch is full with so many bytes.
    pub bytes: usize,
    /// Lines that are not urgent wait no longer than this for a batch to fill.
    pub time: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: BATCH_BYTES, time: BATCH_TIME }
    }
}

/// The end where lines go in; every clone leads to the same writer.
#[derive(Debug, Clone)]
pub struct HandOver(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the writer.
    arrived: Condvar,
    /// The writer is done with what it took.
    written: Condvar,
    pace: Pace,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines turned away since the writer last took what waits. Once one is, so are all until then: what is missing is
    /// missing in one place.
    dropped: u64,
    /// How many lines have come, kept or not.
    arrived: u64,
    /// How many of them the writer is done with.
    written: u64,
    /// One of the lines that wait is to be written at once.
    is_urgent: bool,
    /// How many wait for `written`.
    flushing: usize,
    writer: WriterState,
}

/// What the writer does, for those who may have to wake it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum WriterState {
    /// It is awake, or was woken, and will look again before it sleeps.
    #[default]
    Awake,
    /// It sleeps until its rest is over.
    Resting,
    /// It sleeps until a line comes.
    Idle,
}

impl HandOver {
    /// Starts a writer to `out`. `report` makes the line that says how many lines are missing where it stands.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        out: impl Write + Send + 'static,
        pace: Pace,
        report: impl Fn(&mut Vec<u8>, u64) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            arrived: Condvar::new(),
            written: Condvar::new(),
            pace,
        });
        let writer = Writer { out, lost: 0, torn: false };
        let taken_from = shared.clone();
        thread::Builder::new().name("log-writer".into()).spawn(move || writer.run(&taken_from, report))?;
        Ok(Self(shared))
    }

    /// Hands over a whole line. Never waits for the writer, and never fails: a line without room is counted and dropped.
    pub fn put(&self, line: &[u8]) {
        self.take_in(line, false);
    }

    /// As [`HandOver::put`], and the writer does not let this line wait for others.
    pub fn put_urgent(&self, line: &[u8]) {
        self.take_in(line, true);
    }

    fn take_in(&self, line: &[u8], is_urgent: bool) {
        let mut state = self.0.lock();
        state.arrived += 1;
        if state.dropped > 0 || line.len() > WAITING_MAX_BYTES.saturating_sub(state.waiting.len()) {
            state.dropped += 1;
        } else {
            state.waiting.extend_from_slice(line);
        }
        state.is_urgent |= is_urgent;
        let wakes = state.wakes_writer(self.0.pace);
        drop(state);
        // Only then: waking a thread that is not to wake is a system call for nothing.
        if wakes {
            self.0.arrived.notify_one();
        }
    }

    /// Waits, but no longer than `patience`, until all that was handed over before this call is written or reported as
    /// dropped. Returns whether it is.
    pub fn flush(&self, patience: Duration) -> bool {
        let mut state = self.0.lock();
        let goal = state.arrived;
        state.flushing += 1;
        if state.written < goal && state.wakes_writer(self.0.pace) {
            drop(state);
            self.0.arrived.notify_one();
            state = self.0.lock();
        }
        let waited = self.0.written.wait_timeout_while(state, patience, |state| state.written < goal);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.flushing -= 1;
        state.written >= goal
    }
}

impl State {
    /// Whether what waits is to be written now.
    fn is_due(&self, pace: Pace) -> bool {
        self.is_urgent || self.flushing > 0 || self.dropped > 0 || self.waiting.len() >= pace.bytes
    }

    /// Whether the writer sleeps and is to be woken. Says so once.
    fn wakes_writer(&mut self, pace: Pace) -> bool {
        let wakes = match self.writer {
            WriterState::Awake => false,
            WriterState::Resting => self.is_due(pace),
            WriterState::Idle => true,
        };
        if wakes {
            self.writer = WriterState::Awake;
        }
        wakes
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until lines are to be written, which may be any time after `rested`, and moves all of them into `batch`, which is
    /// empty. Returns up to which line that is, and how many are missing at its end.
    fn take(&self, batch: &mut Vec<u8>, rested: Instant) -> (u64, u64) {
        let mut state = self.lock();
        loop {
            let has_lines = state.arrived > state.written;
            let rest = rested.saturating_duration_since(Instant::now());
            if has_lines && (rest.is_zero() || state.is_due(self.pace)) {
                break;
            }
            state = if rest.is_zero() {
                state.writer = WriterState::Idle;
                self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                state.writer = WriterState::Resting;
                self.arrived.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0
            };
        }
        state.writer = WriterState::Awake;
        state.is_urgent = false;
        std::mem::swap(&mut state.waiting, batch);
        (state.arrived, std::mem::take(&mut state.dropped))
    }

    fn done(&self, upto: u64) {
        let mut state = self.lock();
        state.written = upto;
        let notify = state.flushing > 0;
        drop(state);
        if notify {
            self.written.notify_all();
        }
    }
}

/// The end where lines come out.
struct Writer<W> {
    out: W,
    /// Lines that could not be written, and were not reported yet.
    lost: u64,
    /// What was written last is not the end of a line.
    torn: bool,
}

impl<W: Write> Writer<W> {
    fn run(mut self, shared: &Shared, report: impl Fn(&mut Vec<u8>, u64)) {
        let mut batch = Vec::new();
        let mut rested = Instant::now();
        loop {
            let (upto, dropped) = shared.take(&mut batch, rested);
            // From here and not from the end of the write, which may be slow: lines that came meanwhile have waited.
            rested = Instant::now() + shared.pace.time;
            if self.lost > 0 {
                let mut before = Vec::new();
                if self.torn {
                    before.push(b'\n');
                }
                report(&mut before, self.lost);
                if self.write(&before) == before.len() {
                    self.lost = 0;
                }
            }
            if dropped > 0 {
                report(&mut batch, dropped);
            }
            let written = self.write(&batch);
            let left = batch.get(written..).unwrap_or_default();
            self.lost += left.iter().filter(|&&byte| byte == b'\n').count() as u64;
            batch.clear();
            batch.shrink_to(KEPT_BYTES);
            shared.done(upto);
        }
    }

    /// Writes until it is done or fails for good; returns how many bytes it wrote.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
            match self.out.write(left) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(NOT_READY_PAUSE),
                // Nobody reads any more, or the disk is full. There is no place left to say so.
                Err(_) => break,
            }
        }
        if let Some(last) = bytes.get(..written).and_then(<[u8]>::last) {
            self.torn = *last != b'\n';
        }
        written
    }
}

#[cfg(test)]
mod tests;
