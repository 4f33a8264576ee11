//! Writes a report as one JSON object.

use super::{Judgement, Outcome, Report, Row};
use crate::rules::Level;
use serde::Serialize;

#[derive(Serialize)]
struct Run<'a> {
    endpoint: &'a str,
    instance: &'a str,
    digest_function: &'a str,
    bytes_written: u64,
    elapsed_ms: u64,
    good: bool,
    checks: Vec<Line<'a>>,
}

#[derive(Serialize)]
struct Line<'a> {
    group: &'a str,
    rules: &'a [&'static str],
    level: Level,
    title: &'a str,
    outcome: Judgement,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    observed: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "String::is_empty")]
    breaks: String,
    elapsed_ms: u64,
}

impl Report {
    /// The report as JSON.
    pub fn json(&self, strict: bool) -> String {
        let run = Run {
            endpoint: &self.endpoint,
            instance: &self.instance,
            digest_function: &self.digest_function,
            bytes_written: self.bytes_written,
            elapsed_ms: millis(self.elapsed),
            good: self.is_good(strict),
            checks: self.rows.iter().map(|row| line(row, strict)).collect(),
        };
        serde_json::to_string_pretty(&run).unwrap_or_default()
    }
}

fn line(row: &Row, strict: bool) -> Line<'_> {
    let (mut expected, mut observed, mut needs, mut reason, mut breaks) =
        (None, None, None, None, String::new());
    match &row.outcome {
        Outcome::Pass => {}
        Outcome::Fail { expected: wanted, observed: seen } => {
            (expected, observed, breaks) = (Some(wanted.as_str()), Some(seen.as_str()), row.breaks());
        }
        Outcome::Inconclusive { needs: rule, expected: wanted, observed: seen } => {
            (expected, observed, needs) = (Some(wanted.as_str()), Some(seen.as_str()), *rule);
        }
        Outcome::Absent(why) | Outcome::Skipped(why) => reason = Some(why.as_str()),
    }
    Line {
        group: row.group(),
        rules: &row.rules,
        level: row.level,
        title: &row.title,
        outcome: row.judgement(strict),
        expected,
        observed,
        needs,
        reason,
        breaks,
        elapsed_ms: millis(row.elapsed),
    }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
