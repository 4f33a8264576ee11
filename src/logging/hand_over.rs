//! The hand-over of finished lines to the one thread that writes them.
//!
//! Whoever logs only appends to a buffer: a reader of standard error that is slow, stuck or gone costs an actor or an RPC
//! nothing. The writer takes all that waits at once and writes it with one call, so a line that comes alone is written at
//! once and a burst costs few calls. The buffer is bounded; lines that find it full are dropped and counted, and the writer
//! says how many where they are missing.
//!
//! Invariants: lines are written in the order in which they were handed over; a line is written whole or not at all, unless
//! a write fails in the middle of it; no lock is held while something is written. This file knows nothing of levels and
//! fields.

use std::{
    io::{self, ErrorKind, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Most bytes of lines that wait for the writer: some 10,000 lines, which is every line of a few thousand actions that are
/// submitted at once. The writer may hold as many again.
pub const WAITING_MAX_BYTES: usize = 4 * 1024 * 1024;
/// How much of a buffer is kept after a burst. As much as a pipe takes in one call.
const KEPT_BYTES: usize = 64 * 1024;
/// How long the writer waits when standard error is in non-blocking mode, as programs that share it may leave it, and full.
const NOT_READY_PAUSE: Duration = Duration::from_millis(10);

/// The end where lines go in; every clone leads to the same writer.
///
/// As a [`Write`] it takes whole lines, one with each call, and never fails.
#[derive(Debug, Clone)]
pub struct HandOver(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Lines came while the writer was idle.
    arrived: Condvar,
    /// The writer is done with what it took.
    written: Condvar,
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
    /// The writer sleeps.
    idle: bool,
    /// How many wait for `written`.
    flushing: usize,
}

impl HandOver {
    /// Starts a writer to `out`. `report` makes the line that says how many lines are missing where it stands.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        out: impl Write + Send + 'static,
        report: impl Fn(&mut Vec<u8>, u64) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let writer = Writer { out, lost: 0, torn: false };
        let taken_from = shared.clone();
        thread::Builder::new().name("log-writer".into()).spawn(move || writer.run(&taken_from, report))?;
        Ok(Self(shared))
    }

    /// Waits, but no longer than `patience`, until all that was handed over before this call is written or reported as
    /// dropped. Returns whether it is.
    pub fn flush(&self, patience: Duration) -> bool {
        let mut state = self.0.lock();
        let goal = state.arrived;
        state.flushing += 1;
        let waited = self.0.written.wait_timeout_while(state, patience, |state| state.written < goal);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.flushing -= 1;
        state.written >= goal
    }
}

impl Write for HandOver {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        state.arrived += 1;
        if state.dropped > 0 || line.len() > WAITING_MAX_BYTES.saturating_sub(state.waiting.len()) {
            state.dropped += 1;
        } else {
            state.waiting.extend_from_slice(line);
        }
        let wake = std::mem::take(&mut state.idle);
        drop(state);
        // Only then: waking a thread that does not sleep is a system call for nothing.
        if wake {
            self.0.arrived.notify_one();
        }
        Ok(line.len())
    }

    /// Nothing to do and never waits; see [`HandOver::flush`] for waiting.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for lines and moves all of them into `batch`, which is empty. Returns up to which line that is, and how many
    /// are missing at its end.
    fn take(&self, batch: &mut Vec<u8>) -> (u64, u64) {
        let mut state = self.lock();
        while state.arrived == state.written {
            state.idle = true;
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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
        loop {
            let (upto, dropped) = shared.take(&mut batch);
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
mod tests {
    use super::*;
    use std::{
        io::{BufRead as _, BufReader},
        sync::mpsc,
    };

    /// How long anything here may take before it is called stuck.
    const PATIENCE: Duration = Duration::from_secs(30);

    fn report(line: &mut Vec<u8>, lines: u64) {
        let _ = writeln!(line, "dropped {lines}");
    }

    fn log(to: &mut HandOver, line: &str) {
        to.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Runs something that must not block, and says so when it does.
    fn without_blocking(what: impl FnOnce() + Send + 'static) {
        let (done, finished) = mpsc::channel();
        thread::spawn(move || {
            what();
            let _ = done.send(());
        });
        finished.recv_timeout(PATIENCE).expect("logging does not wait for a reader");
    }

    #[test]
    fn a_pipe_that_nobody_reads_blocks_no_logger_and_what_is_dropped_is_counted() {
        const LINES: u64 = 60_000;
        const FILLER: usize = 200;
        let (reader, writer) = io::pipe().unwrap();
        let to = HandOver::start(writer, report).unwrap();
        let filler = "x".repeat(FILLER);
        let mut logger = to.clone();
        without_blocking(move || (0..LINES).for_each(|n| log(&mut logger, &format!("{n} {filler}"))));
        assert!(!to.flush(Duration::from_millis(1)), "a flush does not wait for ever");
        log(&mut to.clone(), "turned away too");

        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let (mut whole, mut dropped, mut bytes) = (0, 0, 0);
        // A writer that is slow to start reports twice: its first batch made room for more.
        while whole + dropped < LINES + 1 {
            let line = lines.next().unwrap();
            if let Some(count) = line.strip_prefix("dropped ") {
                dropped += count.parse::<u64>().unwrap();
                continue;
            }
            assert_eq!(
                line.split(' ').next(),
                Some((whole + dropped).to_string().as_str()),
                "in order and whole"
            );
            whole += 1;
            bytes += line.len() + 1;
        }
        assert_eq!(whole + dropped, LINES + 1);
        assert!(bytes > WAITING_MAX_BYTES - FILLER - 10, "what has room is kept: {bytes} bytes");
        assert!(bytes <= 2 * WAITING_MAX_BYTES, "the bound holds: {bytes} bytes");
        log(&mut to.clone(), "after");
        assert_eq!(lines.next().as_deref(), Some("after"));
        assert!(to.flush(PATIENCE));
    }

    #[test]
    fn a_line_that_comes_alone_is_written_without_waiting_for_more() {
        let (reader, writer) = io::pipe().unwrap();
        let mut to = HandOver::start(writer, report).unwrap();
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        for n in 0..100 {
            log(&mut to, &n.to_string());
            assert_eq!(lines.next(), Some(n.to_string()));
        }
    }

    /// Does with each write what it is told, and tells what was written.
    struct Scripted(mpsc::Receiver<io::Result<usize>>, mpsc::Sender<String>);

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = self.0.recv().unwrap_or(Ok(usize::MAX))?.min(bytes.len());
            let _ = self.1.send(String::from_utf8_lossy(&bytes[..taken]).into_owned());
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_waits_is_written_with_one_call() {
        let (step, steps) = mpsc::channel();
        let (wrote, written) = mpsc::channel();
        let mut to = HandOver::start(Scripted(steps, wrote), report).unwrap();
        log(&mut to, "first");
        // The writer may take some of these with the first one; the rest goes together.
        (0..1000).for_each(|_| log(&mut to, "more"));
        drop(step);
        assert!(to.flush(PATIENCE));
        drop(to);
        assert!(written.try_iter().count() <= 2);
    }

    #[test]
    fn lines_lost_to_a_full_disk_are_reported_when_there_is_room_again() {
        let (step, steps) = mpsc::channel();
        let (wrote, written) = mpsc::channel();
        let mut to = HandOver::start(Scripted(steps, wrote), report).unwrap();
        let full = || Err(ErrorKind::StorageFull.into());
        for (line, script) in [
            ("whole", vec![Err(ErrorKind::Interrupted.into()), Err(ErrorKind::WouldBlock.into()), Ok(99)]),
            ("torn", vec![Ok(2), full()]),
            ("lost", vec![full(), full()]),
            ("after", vec![Ok(99), Ok(99)]),
        ] {
            script.into_iter().for_each(|result| step.send(result).unwrap());
            log(&mut to, line);
            assert!(to.flush(PATIENCE));
        }
        let written: String = written.try_iter().collect();
        assert_eq!(written, "whole\nto\ndropped 2\nafter\n");
    }
}
