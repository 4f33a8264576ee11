//! [`Recorder`]: records the calls of a scenario as a histogram. [`Figures`]: the numbers that are computed from it.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

/// Precision of a latency, in decimal digits.
const DIGITS: u8 = 3;
/// Maximum latency that is distinguished from longer ones.
const MAX_LATENCY: Duration = Duration::from_secs(600);
/// Number of different error messages that are kept.
const MAX_MESSAGES: usize = 8;

/// The work of one successful call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Things that the scenario counts, such as blobs or digests.
    pub(crate) units: u64,
    /// Bytes of blob content that the call read or wrote.
    pub(crate) bytes: u64,
}

/// Records the calls of one caller, or of all callers.
#[derive(Debug)]
pub(crate) struct Recorder {
    latencies: Histogram<u64>,
    work: Work,
    errors: BTreeMap<String, u64>,
    failed: u64,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        // The bounds are valid constants.
        let latencies = Histogram::new_with_bounds(1, nanos(MAX_LATENCY), DIGITS);
        let latencies = latencies.unwrap_or_else(|_| unreachable!("the bounds of the histogram are valid"));
        Self { latencies, work: Work::default(), errors: BTreeMap::new(), failed: 0 }
    }

    /// Counts a finished call: its latency and work, or its error message.
    pub(crate) fn record(&mut self, latency: Duration, outcome: Result<Work, String>) {
        match outcome {
            Ok(work) => {
                self.latencies.saturating_record(nanos(latency).max(1));
                self.work.units += work.units;
                self.work.bytes += work.bytes;
            }
            Err(message) => {
                self.failed += 1;
                self.note(message, 1);
            }
        }
    }

    fn note(&mut self, message: String, count: u64) {
        if self.errors.len() < MAX_MESSAGES || self.errors.contains_key(&message) {
            *self.errors.entry(message).or_default() += count;
        }
    }

    /// Adds the calls of another recorder.
    pub(crate) fn add(&mut self, other: Self) {
        let _ = self.latencies.add(&other.latencies);
        self.work.units += other.work.units;
        self.work.bytes += other.work.bytes;
        self.failed += other.failed;
        other.errors.into_iter().for_each(|(message, count)| self.note(message, count));
    }

    /// Number of calls, including failed ones.
    pub(crate) fn calls(&self) -> u64 {
        self.latencies.len() + self.failed
    }

    /// Whether any call succeeded.
    pub(crate) fn has_success(&self) -> bool {
        !self.latencies.is_empty()
    }

    /// The figures of calls in this period.
    pub(crate) fn figures(self, elapsed: Duration) -> Figures {
        let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let at = |quantile| micros(self.latencies.value_at_quantile(quantile));
        Figures {
            calls: self.latencies.len(),
            failed: self.failed,
            seconds: elapsed.as_secs_f64(),
            calls_per_second: self.latencies.len() as f64 / seconds,
            units_per_second: self.work.units as f64 / seconds,
            megabytes_per_second: self.work.bytes as f64 / 1e6 / seconds,
            latency_us: Latency {
                mean: self.latencies.mean() / 1e3,
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p999: at(0.999),
                max: micros(self.latencies.max()),
            },
            errors: self.errors,
        }
    }
}

/// The figures of the measured calls of one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Calls that succeeded, with the right content.
    pub calls: u64,
    /// Calls that failed, or whose content was wrong.
    pub failed: u64,
    /// Length of the measurement, in seconds.
    pub seconds: f64,
    /// Successful calls per second.
    pub calls_per_second: f64,
    /// Blobs, digests or actions per second.
    pub units_per_second: f64,
    /// Content per second, in 10^6 bytes.
    pub megabytes_per_second: f64,
    /// Latency of successful calls.
    pub latency_us: Latency,
    /// Messages of failed calls, with their number. At most eight are kept.
    pub errors: BTreeMap<String, u64>,
}

/// Latencies of the successful calls, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// The arithmetic mean of the latencies.
    pub mean: f64,
    /// The median of the latencies.
    pub p50: f64,
    /// The 90th percentile of the latencies.
    pub p90: f64,
    /// The 99th percentile of the latencies.
    pub p99: f64,
    /// The 99.9th percentile of the latencies.
    pub p999: f64,
    /// The longest of the latencies.
    pub max: f64,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_calls() {
        let mut all = Recorder::new();
        for caller in 0..2 {
            let mut own = Recorder::new();
            for at in 1..=50 {
                let latency = Duration::from_millis(caller * 50 + at);
                own.record(latency, Ok(Work { units: 10, bytes: 1_000_000 }));
            }
            own.record(Duration::from_secs(9), Err("no".into()));
            all.add(own);
        }
        let figures = all.figures(Duration::from_secs(2));
        assert_eq!((figures.calls, figures.failed, figures.errors["no"]), (100, 2, 2));
        assert_eq!((figures.calls_per_second, figures.units_per_second), (50.0, 500.0));
        assert_eq!(figures.megabytes_per_second, 50.0);
        let latency = figures.latency_us;
        for (measured, expected) in
            [(latency.p50, 50e3), (latency.p90, 90e3), (latency.p99, 99e3), (latency.max, 100e3)]
        {
            assert!((measured / expected - 1.0).abs() < 0.01, "{measured} for {expected}");
        }
    }

    #[test]
    fn a_server_that_fails_in_ever_new_ways_does_not_fill_the_memory() {
        let mut recorder = Recorder::new();
        for at in 0..1000 {
            recorder.record(Duration::ZERO, Err(format!("failure {at}")));
        }
        let figures = recorder.figures(Duration::from_secs(1));
        assert_eq!((figures.failed, figures.errors.len()), (1000, MAX_MESSAGES));
    }
}
