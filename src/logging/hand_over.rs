//! The queue of finished lines for the thread that writes them.
//!
//! Logging appends to a buffer and returns, so an actor or RPC never waits for a slow, blocked or missing reader of
//! standard error. The writer takes all waiting lines and writes them with one call. A line after a pause is written
//! immediately. After each write the writer pauses for a few milliseconds while lines accumulate, so a busy server
//! needs one wake-up per batch instead of one per line. The pause ends early when a batch is full, when a line is
//! urgent, and when a thread waits in [`HandOver::flush`]. If the process is killed, at most the lines of one pause are
//! lost.
//!
//! Invariants: lines are written in the order in which they were queued; a line is written completely or not at all,
//! unless a write fails in the middle; the buffer is bounded, and lines that find it full are dropped, counted and
//! reported at the place where they are missing; no lock is held during a write. Levels and fields are unknown here.

use std::{
    io::{self, ErrorKind, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

/// Most bytes of waiting lines: some 10,000 lines, which is the log of a few thousand actions that are submitted at
/// once. The writer may hold as many again.
pub(super) const WAITING_MAX_BYTES: usize = 4 * 1024 * 1024;
/// A batch of this size is written without a pause. It is what a pipe accepts in one call.
const BATCH_BYTES: usize = 64 * 1024;
/// How long the writer pauses after it took a batch. At 200 wake-ups per second, waking costs less than writing. A
/// reader of the log does not notice the delay.
const BATCH_TIME: Duration = Duration::from_millis(5);
/// Buffer capacity that is kept after a burst: a full batch and the lines that arrive while it is written.
const KEPT_BYTES: usize = 4 * BATCH_BYTES;
/// How long the writer pauses when standard error is full and in non-blocking mode, which other programs may have set.
const NOT_READY_PAUSE: Duration = Duration::from_millis(10);
/// How long it tries again in that mode. Then the lines count as lost.
const NOT_READY_LIMIT: Duration = Duration::from_secs(60);

/// When the writer takes the waiting lines.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// A batch of this size is full.
    pub bytes: usize,
    /// Longest time that lines that are not urgent wait for a batch to fill.
    pub time: Duration,
    /// How long a write is tried again while a reader in non-blocking mode takes nothing.
    pub patience: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: BATCH_BYTES, time: BATCH_TIME, patience: NOT_READY_LIMIT }
    }
}

/// The sending end of the queue. All clones lead to the same writer.
#[derive(Debug, Clone)]
pub(super) struct HandOver(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the writer when lines have arrived.
    arrived: Condvar,
    /// Signals that the writer is done with the lines that it took.
    written: Condvar,
    pace: Pace,
    /// Number of lines that were dropped or could not be written since the start.
    missing: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Number of lines dropped since the writer last took the buffer. After the first one, all are dropped until then,
    /// so that all missing lines are missing in one place.
    dropped: u64,
    /// Number of lines received, including dropped ones.
    arrived: u64,
    /// Number of these lines that the writer is done with.
    written: u64,
    /// Whether one of the waiting lines must be written immediately.
    is_urgent: bool,
    /// Number of threads that wait for `written`.
    flushing: usize,
    writer: WriterState,
}

/// The state of the writer, for threads that may have to wake it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum WriterState {
    /// It is awake or was woken, and will check the buffer before it sleeps.
    #[default]
    Awake,
    /// It sleeps until its pause is over.
    Resting,
    /// It sleeps until a line arrives.
    Idle,
}

impl HandOver {
    /// Starts a writer to `out`. `report` formats the line that reports a number of missing lines.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(super) fn start(
        out: impl Write + Send + 'static,
        pace: Pace,
        report: impl Fn(&mut Vec<u8>, u64) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            arrived: Condvar::new(),
            written: Condvar::new(),
            pace,
            missing: AtomicU64::new(0),
        });
        let writer = BatchWriter { out, lost: 0, torn: false, patience: pace.patience };
        let taken_from = shared.clone();
        thread::Builder::new().name("log-writer".into()).spawn(move || writer.run(&taken_from, report))?;
        Ok(Self(shared))
    }

    /// The number of lines that were dropped or could not be written since the start.
    pub(super) fn missing(&self) -> u64 {
        self.0.missing.load(Relaxed)
    }

    /// Queues a whole line. Never waits and never fails: a line without room is dropped and counted.
    pub(super) fn put(&self, line: &[u8]) {
        self.take_in(line, false);
    }

    /// Like [`HandOver::put`], but the writer does not wait for further lines.
    pub(super) fn put_urgent(&self, line: &[u8]) {
        self.take_in(line, true);
    }

    fn take_in(&self, line: &[u8], is_urgent: bool) {
        let mut state = self.0.lock();
        state.arrived += 1;
        if state.dropped > 0 || line.len() > WAITING_MAX_BYTES.saturating_sub(state.waiting.len()) {
            state.dropped += 1;
            self.0.missing.fetch_add(1, Relaxed);
        } else {
            state.waiting.extend_from_slice(line);
        }
        state.is_urgent |= is_urgent;
        let wakes = state.wakes_writer(self.0.pace);
        drop(state);
        // Only if necessary: waking a thread that is awake costs a system call.
        if wakes {
            self.0.arrived.notify_one();
        }
    }

    /// Waits up to `patience` until all lines queued before this call are written or reported as dropped. Returns
    /// whether they are.
    pub(super) fn flush(&self, patience: Duration) -> bool {
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
    /// Whether the waiting lines should be written now.
    fn is_due(&self, pace: Pace) -> bool {
        self.is_urgent || self.flushing > 0 || self.dropped > 0 || self.waiting.len() >= pace.bytes
    }

    /// Whether the writer sleeps and must be woken. Returns true once.
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

    /// Waits until lines should be written, possibly after the pause that ends at `rested`, and moves all of them to
    /// the empty `batch`. Returns the number of the last line, and how many lines are missing after it.
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

/// The receiving end of the queue.
struct BatchWriter<W> {
    out: W,
    /// Number of lines that could not be written and were not reported yet.
    lost: u64,
    /// Whether the last output is an incomplete line.
    torn: bool,
    /// The value of [`Pace::patience`].
    patience: Duration,
}

impl<W: Write> BatchWriter<W> {
    fn run(mut self, shared: &Shared, report: impl Fn(&mut Vec<u8>, u64)) {
        let mut batch = Vec::new();
        let mut rested = Instant::now();
        loop {
            let (upto, dropped) = shared.take(&mut batch, rested);
            // The pause counts from here and not from the end of the write, which may be slow: lines that arrived
            // meanwhile have waited.
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
            let lost = left.iter().filter(|&&byte| byte == b'\n').count() as u64;
            self.lost += lost;
            shared.missing.fetch_add(lost, Relaxed);
            batch.clear();
            batch.shrink_to(KEPT_BYTES);
            shared.done(upto);
        }
    }

    /// Writes until it is done or fails permanently. Returns the number of written bytes.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let (mut written, mut waited) = (0, Duration::ZERO);
        while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
            match self.out.write(left) {
                Ok(0) => break,
                Ok(more) => (written, waited) = (written + more, Duration::ZERO),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && waited < self.patience => {
                    thread::sleep(NOT_READY_PAUSE);
                    waited += NOT_READY_PAUSE;
                }
                // The reader has exited, or the disk is full. There is nowhere to report it.
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
