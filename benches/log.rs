//! What a log line costs: `cargo bench --bench log 2>/dev/null`. Prints a line a measurement; the log itself goes to standard
//! error.

use gorego::config::{LogConfig, LogFormat};
use log::{Level, Record, kv::Value as Kv};
use std::time::{Duration, Instant, UNIX_EPOCH};

fn main() {
    const LINES: u32 = 200_000;
    /// Few enough to find room while the writer does not get a turn.
    const BURST: u32 = 8_000;
    const ALONE: u32 = 2_000;
    let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/0";
    let kvs = [
        ("event", Kv::from("operation_completed")),
        ("operation", Kv::from("operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8")),
        ("action_digest", Kv::from(digest)),
        ("slot", Kv::from(1u64)),
        ("queue_ms", Kv::from(12u64)),
        ("run_ms", Kv::from(345u64)),
        ("exit_code", Kv::from(0i32)),
        ("cached", Kv::from(false)),
    ];
    let record = |n: u32, with: &mut dyn FnMut(&Record<'_>)| {
        let mut builder = Record::builder();
        builder.level(Level::Info).target("gorego::scheduler").key_values(&kvs);
        with(&builder.args(format_args!("operation {n} is over")).build());
    };
    let mut line = Vec::new();
    let start = Instant::now();
    for n in 0..LINES {
        line.clear();
        let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123 + u64::from(n));
        record(n, &mut |record| gorego::logging::write_json(&mut line, now, record));
    }
    println!(
        "formatting: {} ns a line of {} bytes",
        start.elapsed().as_nanos() / u128::from(LINES),
        line.len()
    );

    gorego::logging::init(&LogConfig { filter: "info".into(), format: LogFormat::Json });
    let cpu = || {
        let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
    };
    for (how, lines, flush) in [("in a burst", BURST, false), ("alone", ALONE, true)] {
        let mut waited = Duration::ZERO;
        let before = cpu();
        for n in 0..lines {
            let start = Instant::now();
            record(n, &mut |record| log::logger().log(record));
            waited += start.elapsed();
            if flush {
                gorego::logging::flush();
            }
        }
        gorego::logging::flush();
        let each = |time: Duration| time.as_nanos() / u128::from(lines);
        println!("{how}: {} ns for who logs, {} ns of CPU altogether", each(waited), each(cpu() - before));
    }
}
