//! The cost of a log line: `cargo bench --bench log`. Prints a line for each way of logging.
//!
//! Each line reports a finished RPC. Each way runs in its own process, whose standard error is a file. Afterwards
//! this file is searched for reports of dropped lines. The benchmark measures the CPU time of the logging threads and
//! the writer thread, not wall-clock time, so that a busy machine has little influence.

use gorego::{
    config::{LogConfig, LogFormat},
    logging::{self, Event},
};
use rustix::time::{ClockId, clock_gettime};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

/// Set in the logging processes; names one of the [`WAYS`].
const CHILD: &str = "GOREGO_BENCH_LOG";
const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/142";

/// A way of logging.
struct Way {
    name: &'static str,
    threads: u32,
    /// Number of lines of each thread.
    lines: u32,
    pace: Pace,
}

enum Pace {
    /// Lines without pauses.
    FlatOut,
    /// Single lines with this time between them, as at the end of RPCs.
    Every(Duration),
    /// This many lines in each millisecond.
    PerMillisecond(u32),
    /// Each line is written before the next one is made.
    Flushed,
}

const WAYS: [Way; 6] = [
    Way {
        name: "one thread, a line every 100 us",
        threads: 1,
        lines: 10_000,
        pace: Pace::Every(Duration::from_micros(100)),
    },
    Way { name: "one thread, 25,000 lines/s", threads: 1, lines: 50_000, pace: Pace::PerMillisecond(25) },
    Way { name: "two threads, 50,000 lines/s", threads: 2, lines: 50_000, pace: Pace::PerMillisecond(25) },
    Way { name: "one thread, flat out", threads: 1, lines: 200_000, pace: Pace::FlatOut },
    Way { name: "two threads, flat out", threads: 2, lines: 100_000, pace: Pace::FlatOut },
    Way { name: "each line flushed", threads: 1, lines: 2_000, pace: Pace::Flushed },
];

fn main() {
    match std::env::var(CHILD) {
        Ok(name) => WAYS.iter().filter(|way| way.name == name).for_each(measure),
        Err(_) => WAYS.iter().for_each(run),
    }
}

/// Measures in a separate process and checks its output.
fn run(way: &Way) {
    let log = tempfile::NamedTempFile::new().expect("a file for the log");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    let child = child.env(CHILD, way.name).stderr(log.reopen().expect("the log again"));
    let output = child.output().expect("a process that logs");
    let lines = BufReader::new(log.reopen().expect("the log again")).lines().map_while(Result::ok);
    let (mut written, mut dropped) = (0_u32, 0_u64);
    for line in lines {
        if line.contains("log_lines_dropped") {
            let line: serde_json::Value = serde_json::from_str(&line).expect("a line of JSON");
            dropped += line["lines"].as_u64().unwrap_or_default();
        } else {
            written += 1;
        }
    }
    let bytes = log.as_file().metadata().map_or(0, |file| file.len()) / u64::from(written.max(1));
    println!(
        "{}: {}, {written} lines of {bytes} bytes written, {dropped} dropped",
        way.name,
        String::from_utf8_lossy(&output.stdout).trim()
    );
}

/// Logs, and prints the cost.
fn measure(way: &Way) {
    logging::init(&LogConfig { filter: "info".into(), format: LogFormat::Json });
    log(0);
    logging::flush();
    let writer = writer();
    let before = writer.spent();
    let start = Barrier::new(way.threads as usize);
    let logged: Duration = thread::scope(|scope| {
        let logging = || {
            start.wait();
            log_lines(way)
        };
        let threads: Vec<_> = (0..way.threads).map(|_| scope.spawn(logging)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread that logs")).sum()
    });
    logging::flush();
    let after = writer.spent();
    let lines = f64::from(way.threads * way.lines);
    let written = after.cpu - before.cpu;
    let each = |time: Duration| time.as_secs_f64() * 1e6 / lines;
    println!(
        "{:.2} us of CPU a line ({:.2} to log it, {:.2} to write it), {:.4} wake-ups of the writer a line",
        each(logged + written),
        each(logged),
        each(written),
        (after.sleeps - before.sleeps) as f64 / lines
    );
}

/// Logs like one thread of a way. Returns its CPU time.
fn log_lines(way: &Way) -> Duration {
    let burst = match way.pace {
        Pace::FlatOut => way.lines,
        Pace::PerMillisecond(lines) => lines,
        Pace::Every(_) | Pace::Flushed => 1,
    };
    let mut spent = Duration::ZERO;
    let mut due = Instant::now();
    for first in (0..way.lines).step_by(burst as usize) {
        let before = thread_cpu();
        (first..first + burst).for_each(log);
        if matches!(way.pace, Pace::Flushed) {
            logging::flush();
        }
        spent += thread_cpu() - before;
        match way.pace {
            Pace::PerMillisecond(_) => {
                due += Duration::from_millis(1);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            // Busy waiting, because sleeping takes longer than this.
            Pace::Every(apart) => {
                due += apart;
                while Instant::now() < due {
                    std::hint::spin_loop();
                }
            }
            Pace::FlatOut | Pace::Flushed => {}
        }
    }
    spent
}

/// The line of a GetActionResult.
fn log(n: u32) {
    let peer = SocketAddr::from(([127, 0, 0, 1], 40_000));
    let (method, code) = ("ActionCache/GetActionResult", "NOT_FOUND");
    Event::info("gorego::rpc", "rpc_finished")
        .with("method", method)
        .with("grpc_code", code)
        .with("duration_us", 100 + n)
        .with("bytes_in", 121_u64)
        .with("bytes_out", 0_u64)
        .with("cached", false)
        .with_shown("peer", &peer)
        .with("instance", "")
        .with_shown("action_digest", &DIGEST)
        .with("error", "there is no result of this action in the action cache")
        .log(format_args!("{method} {code}"));
}

fn thread_cpu() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
}

/// The writer thread, by its directory in `/proc`.
struct Writer(PathBuf);

/// The work of the writer thread so far.
struct Spent {
    cpu: Duration,
    /// How often it went to sleep, and therefore was woken.
    sleeps: u64,
}

fn writer() -> Writer {
    let threads = fs::read_dir("/proc/self/task").expect("the threads of this process");
    let mut threads = threads.map_while(Result::ok).map(|thread| thread.path());
    let is_writer =
        |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "log-writer");
    Writer(threads.find(is_writer).expect("a thread that writes the log"))
}

impl Writer {
    fn spent(&self) -> Spent {
        let number = |text: Option<&str>| text.and_then(|text| text.trim().parse().ok()).expect("a number");
        let schedule = fs::read_to_string(self.0.join("schedstat")).expect("its time");
        let status = fs::read_to_string(self.0.join("status")).expect("its status");
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Spent { cpu: Duration::from_nanos(number(schedule.split(' ').next())), sleeps: number(sleeps) }
    }
}
