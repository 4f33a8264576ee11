//! Compares two runs.

use crate::{
    Report, ScenarioReport,
    report::{aligned, rounded, time},
};
use gorego_reapi::error::{Error, Result};

/// A table of the scenarios that both runs have: an earlier one as JSON, and a new one.
///
/// # Errors
/// `Invalid` when the text is not the JSON form of a [`Report`], or the runs share no scenario.
pub fn compare(before: &str, now: &Report) -> Result<String> {
    let before: Report = serde_json::from_str(before)
        .map_err(|error| Error::Invalid(format!("not the JSON output of `gorego bench --json`: {error}")))?;
    let mut rows = vec![
        [
            "scenario",
            "calls/s before",
            "now",
            "ratio",
            "p50 before",
            "now",
            "ratio",
            "p99 before",
            "now",
            "ratio",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for new in &now.scenarios {
        if let Some(old) = before.scenarios.iter().find(|old| old.name == new.name) {
            rows.push(row(old, new));
        }
    }
    if rows.len() == 1 {
        return Err(Error::Invalid("the two runs have no scenario in common".into()));
    }
    Ok(aligned(&rows))
}

fn row(old: &ScenarioReport, new: &ScenarioReport) -> Vec<String> {
    let name = match (old.callers, new.callers) {
        (before, now) if before == now => new.name.clone(),
        (before, now) => format!("{} ({before} and {now} callers)", new.name),
    };
    let mut cells = vec![name];
    let pairs = [
        (old.figures.calls_per_second, new.figures.calls_per_second, rounded as fn(f64) -> String),
        (old.figures.latency_us.p50, new.figures.latency_us.p50, time),
        (old.figures.latency_us.p99, new.figures.latency_us.p99, time),
    ];
    for (before, now, text) in pairs {
        let ratio = if before > 0.0 { format!("{:.2}", now / before) } else { "-".into() };
        cells.extend([text(before), text(now), ratio]);
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Figures, Latency};

    fn report(name: &str, calls_per_second: f64) -> Report {
        let latency_us = Latency { mean: 1.0, p50: 100.0, p90: 1.0, p99: 1.0, p999: 1.0, max: 1.0 };
        let figures = Figures {
            calls: 1,
            failed: 0,
            seconds: 1.0,
            calls_per_second,
            units_per_second: 1.0,
            megabytes_per_second: 1.0,
            latency_us,
            errors: Default::default(),
        };
        let scenario =
            ScenarioReport { name: name.into(), unit: "blobs".into(), callers: 1, figures, server: None };
        Report {
            endpoint: "grpc://a:1".into(),
            instance: String::new(),
            rate: None,
            scenarios: vec![scenario],
        }
    }

    #[test]
    fn two_runs_are_compared_by_scenario() {
        let text = compare(&report("find-missing", 200.0).json(), &report("find-missing", 300.0)).unwrap();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("find-missing") && line.contains("1.50") && line.contains("1.00"), "{text}");
        assert!(compare(&report("a", 1.0).json(), &report("b", 1.0)).is_err());
        assert!(compare("{}", &report("b", 1.0)).is_err());
    }
}
