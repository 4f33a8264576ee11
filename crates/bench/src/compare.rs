//! Compares two runs.

use crate::{
    Report, ScenarioReport,
    report::{aligned, percent, rounded, time},
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
    let old = |new: &ScenarioReport| before.scenarios.iter().find(|old| old.name == new.name);
    let pairs: Vec<_> = now.scenarios.iter().filter_map(|new| Some((old(new)?, new))).collect();
    if pairs.is_empty() {
        return Err(Error::Invalid("the two runs have no scenario in common".into()));
    }
    rows.extend(pairs.iter().map(|(old, new)| row(old, new)));
    let shares: Vec<_> = pairs.iter().map(|(old, new)| old.share.zip(new.share)).collect();
    if shares.iter().any(Option::is_some) {
        let header = ["share before", "now", "ratio"].map(str::to_owned);
        let cells = std::iter::once(header).chain(shares.into_iter().map(share_cells));
        rows.iter_mut().zip(cells).for_each(|(row, cells)| row.extend(cells));
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
        cells.extend([text(before), text(now), ratio(before, now)]);
    }
    cells
}

/// The shares of the limits of both runs.
fn share_cells(shares: Option<(f64, f64)>) -> [String; 3] {
    match shares {
        Some((before, now)) => [percent(before), percent(now), ratio(before, now)],
        None => ["-", "-", "-"].map(str::to_owned),
    }
}

fn ratio(before: f64, now: f64) -> String {
    if before > 0.0 { format!("{:.2}", now / before) } else { "-".into() }
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
        let scenario = ScenarioReport {
            name: name.into(),
            unit: "blobs".into(),
            callers: 1,
            figures,
            server: None,
            limit: None,
            share: None,
        };
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

    #[test]
    fn shares_are_compared_if_both_runs_have_them() {
        let with_share = |share| {
            let mut report = report("cache-hit", 200.0);
            report.scenarios[0].share = share;
            report
        };
        let text = compare(&with_share(Some(0.4)).json(), &with_share(Some(0.5))).unwrap();
        assert!(text.contains("share before") && text.contains("40.0 %  50.0 %   1.25"), "{text}");
        let text = compare(&with_share(None).json(), &with_share(Some(0.5))).unwrap();
        assert!(!text.contains("share"), "{text}");
        // Runs of earlier versions have no such fields.
        let mut early: serde_json::Value = serde_json::from_str(&report("cache-hit", 1.0).json()).unwrap();
        for field in ["limit", "share"] {
            early["scenarios"][0].as_object_mut().unwrap().remove(field).unwrap();
        }
        assert!(compare(&early.to_string(), &with_share(Some(0.5))).is_ok());
    }
}
