//! Tests: no thread waits for the writer, no line is lost without a report, and lines are delayed only for a limited
//! time.

use super::*;
use std::{
    io::{BufRead as _, BufReader},
    sync::mpsc,
};

/// After this time, a thread or a write counts as stuck.
const PATIENCE: Duration = Duration::from_secs(30);

fn report(line: &mut Vec<u8>, lines: u64) {
    let _ = writeln!(line, "dropped {lines}");
}

fn start(out: impl Write + Send + 'static) -> HandOver {
    HandOver::start(out, Pace::default(), report).unwrap()
}

fn log(to: &HandOver, line: &str) {
    to.put(format!("{line}\n").as_bytes());
}

/// Runs something that must not block, and fails if it does.
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
    let to = start(writer);
    let filler = "x".repeat(FILLER);
    let logger = to.clone();
    without_blocking(move || (0..LINES).for_each(|n| log(&logger, &format!("{n} {filler}"))));
    assert!(!to.flush(Duration::from_millis(1)), "a flush does not wait for ever");
    log(&to, "turned away too");

    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    let (mut whole, mut dropped, mut bytes) = (0, 0, 0);
    // A writer that starts late reports twice, because its first batch made room for more.
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
    assert_eq!(to.missing(), dropped, "metrics have what is reported");
    assert!(bytes > WAITING_MAX_BYTES - FILLER - 10, "what has room is kept: {bytes} bytes");
    assert!(bytes <= 2 * WAITING_MAX_BYTES, "the bound holds: {bytes} bytes");
    log(&to, "after");
    assert_eq!(lines.next().as_deref(), Some("after"));
    assert!(to.flush(PATIENCE));
}

/// A pause that ends only for a reason other than time.
const LONG: Pace = Pace { bytes: 1000, time: Duration::from_secs(3600), patience: NOT_READY_LIMIT };

/// A queue with that pause, and a channel with one text for each write.
fn resting() -> (HandOver, mpsc::Receiver<String>) {
    let (wrote, written) = mpsc::channel();
    let (_, steps) = mpsc::channel();
    let to = HandOver::start(Scripted(steps, wrote), LONG, report).unwrap();
    log(&to, "alone");
    assert_eq!(written.recv_timeout(PATIENCE).unwrap(), "alone\n", "after a pause nothing is waited for");
    (to, written)
}

#[test]
fn lines_gather_until_one_of_them_is_urgent() {
    let (to, written) = resting();
    log(&to, "one");
    log(&to, "two");
    assert!(written.try_recv().is_err());
    to.put_urgent(b"urgent\n");
    assert_eq!(written.recv_timeout(PATIENCE).unwrap(), "one\ntwo\nurgent\n");
}

#[test]
fn lines_gather_until_a_batch_is_full() {
    let (to, written) = resting();
    let line = "x".repeat(LONG.bytes / 10);
    (0..9).for_each(|_| log(&to, &line));
    assert!(written.try_recv().is_err());
    log(&to, &line);
    assert_eq!(written.recv_timeout(PATIENCE).unwrap().lines().count(), 10);
}

#[test]
fn a_flush_does_not_wait_for_the_rest_to_end() {
    let (to, written) = resting();
    log(&to, "last");
    assert!(to.flush(PATIENCE));
    assert_eq!(written.try_recv().unwrap(), "last\n");
}

#[test]
fn lines_that_are_not_urgent_are_written_when_the_rest_ends() {
    let (reader, writer) = io::pipe().unwrap();
    let to = start(writer);
    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    for n in 0..100 {
        log(&to, &n.to_string());
        // Queued while the writer pauses after this write.
        assert_eq!(lines.next(), Some(n.to_string()));
    }
}

/// Answers each write from a script, and reports what was written.
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
    let to = start(Scripted(steps, wrote));
    log(&to, "first");
    // The writer may take some of these with the first one. The others are written together.
    (0..1000).for_each(|_| log(&to, "more"));
    drop(step);
    assert!(to.flush(PATIENCE));
    drop(to);
    assert!(written.try_iter().count() <= 2);
}

#[test]
fn lines_lost_to_a_full_disk_are_reported_when_there_is_room_again() {
    let (step, steps) = mpsc::channel();
    let (wrote, written) = mpsc::channel();
    let to = start(Scripted(steps, wrote));
    let full = || Err(ErrorKind::StorageFull.into());
    for (line, script) in [
        ("whole", vec![Err(ErrorKind::Interrupted.into()), Err(ErrorKind::WouldBlock.into()), Ok(99)]),
        ("torn", vec![Ok(2), full()]),
        ("lost", vec![full(), full()]),
        ("after", vec![Ok(99), Ok(99)]),
    ] {
        script.into_iter().for_each(|result| step.send(result).unwrap());
        log(&to, line);
        assert!(to.flush(PATIENCE));
    }
    let written: String = written.try_iter().collect();
    assert_eq!(written, "whole\nto\ndropped 2\nafter\n");
}

/// Standard error may be in non-blocking mode and its reader may be stopped.
#[test]
fn a_reader_that_is_never_ready_is_given_up_and_what_it_missed_is_reported() {
    let (step, steps) = mpsc::channel();
    let (wrote, written) = mpsc::channel();
    let pace = Pace { patience: 2 * NOT_READY_PAUSE, ..Pace::default() };
    let to = HandOver::start(Scripted(steps, wrote), pace, report).unwrap();
    (0..3).for_each(|_| step.send(Err(ErrorKind::WouldBlock.into())).unwrap());
    log(&to, "lost");
    assert!(to.flush(PATIENCE));
    drop(step);
    log(&to, "after");
    assert!(to.flush(PATIENCE));
    let written: String = written.try_iter().collect();
    assert_eq!(written, "dropped 1\nafter\n");
}
