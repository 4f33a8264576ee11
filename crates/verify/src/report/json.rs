//! Writes a report as one JSON object.

use super::{CheckOutcome, Judgement, Report, Row};
use crate::rules::Level;
use serde::Serialize;

#[derive(Serialize)]
struct JsonReport<'a> {
    endpoint: &'a str,
    instance: &'a str,
    caller: &'a str,
    digest_function: &'a str,
    bytes_written: u64,
    elapsed_ms: u64,
    good: bool,
    checks: Vec<JsonRow<'a>>,
}

#[derive(Serialize)]
struct JsonRow<'a> {
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
        let run = JsonReport {
            endpoint: &self.endpoint,
            instance: &self.instance,
            caller: &self.caller,
            digest_function: &self.digest_function,
            bytes_written: self.bytes_written,
            elapsed_ms: millis(self.elapsed),
            good: self.is_good(strict),
            checks: self.rows.iter().map(|row| line(row, strict)).collect(),
        };
        serde_json::to_string_pretty(&run).unwrap_or_default()
    }
}

fn line(row: &Row, strict: bool) -> JsonRow<'_> {
    let (mut expected, mut observed, mut needs, mut reason, mut breaks) =
        (None, None, None, None, String::new());
    match &row.outcome {
        CheckOutcome::Pass => {}
        CheckOutcome::Fail { expected: wanted, observed: seen } => {
            (expected, observed, breaks) = (Some(wanted.as_str()), Some(seen.as_str()), row.breaks());
        }
        CheckOutcome::Inconclusive { needs: rule, expected: wanted, observed: seen } => {
            (expected, observed, needs) = (Some(wanted.as_str()), Some(seen.as_str()), *rule);
        }
        CheckOutcome::Absent(why) | CheckOutcome::Skipped(why) => reason = Some(why.as_str()),
    }
    JsonRow {
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
