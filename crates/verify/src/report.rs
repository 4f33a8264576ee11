//! The results of a run: rows, their judgement, and the table for people. The submodules write machine-readable
//! formats.

mod json;
mod junit;

use super::{
    check::{Check, Step as _, Stop, Verdict},
    groups,
    rules::{self, Level, Rule},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    time::Duration,
};

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckOutcome {
    /// The server follows the rule.
    Pass,
    /// The server violates the rule.
    Fail {
        /// What the rule requires.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// A preparatory step failed, so nothing can be said about the rule.
    Inconclusive {
        /// The rule that requires this step, if it has its own check.
        needs: Option<&'static str>,
        /// What the step expected.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// The server does not claim the feature; the text says why.
    Absent(String),
    /// It could not be tested here; the text says why.
    Skipped(String),
}

impl CheckOutcome {
    /// The denial because of which a preparatory step failed.
    fn denial(&self) -> Option<&str> {
        match self {
            Self::Inconclusive { observed, .. } if observed.starts_with("PERMISSION_DENIED") => {
                Some(observed)
            }
            _ => None,
        }
    }
}

impl From<Verdict> for CheckOutcome {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Ok(()) => Self::Pass,
            Err(Stop::Fail { expected, observed }) => Self::Fail { expected, observed },
            Err(Stop::Unmet { needs, expected, observed }) => {
                Self::Inconclusive { needs, expected, observed }
            }
            Err(Stop::Absent(why)) => Self::Absent(why),
            Err(Stop::Skipped(why)) => Self::Skipped(why),
        }
    }
}

/// The weight of an outcome, which depends on the level of the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// The server follows the rule, as far as the check can see.
    Pass,
    /// A `must` failed, or a `should` in a strict run.
    Fail,
    /// A preparatory step failed, and no other check explains it.
    Inconclusive,
    /// A `should` or a `may` failed.
    Warn,
    /// The server lacks an optional feature.
    Absent,
    /// The check was not performed.
    Skipped,
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Inconclusive => "unclear",
            Self::Warn => "warn",
            Self::Absent => "absent",
            Self::Skipped => "skipped",
        })
    }
}

/// One check, or one rule that no check can cover.
#[derive(Debug, Clone)]
pub struct Row {
    /// The ids of its rules. The first one decides the group.
    pub rules: Vec<&'static str>,
    /// The highest level among the rules.
    pub level: Level,
    /// A sentence about the server.
    pub title: String,
    /// The result of the check.
    pub outcome: CheckOutcome,
    /// The duration of the check.
    pub elapsed: Duration,
}

impl Row {
    /// The row of a check. A preparatory step that the check's own rule requires counts as its failure.
    pub fn of(check: &Check, verdict: Verdict, elapsed: Duration) -> Self {
        let rules = check.rules.to_vec();
        let own = matches!(&verdict, Err(Stop::Unmet { needs: Some(rule), .. }) if rules.contains(rule));
        let outcome = CheckOutcome::from(if own { verdict.own() } else { verdict });
        Self { rules, level: check.level(), title: check.title(), outcome, elapsed }
    }

    /// The row of a rule that no check can cover.
    pub fn beyond(rule: &'static Rule, reason: &str) -> Self {
        Self {
            rules: vec![rule.id],
            level: rule.level,
            title: rule.title.to_owned(),
            outcome: CheckOutcome::Skipped(reason.to_owned()),
            elapsed: Duration::ZERO,
        }
    }

    /// The name of the group.
    pub fn group(&self) -> &'static str {
        self.rules.first().and_then(|id| id.split('-').next()).unwrap_or_default()
    }

    /// The judgement; `strict` makes a failed `should` a failure.
    pub fn judgement(&self, strict: bool) -> Judgement {
        let least = if strict { Level::Should } else { Level::Must };
        match &self.outcome {
            CheckOutcome::Pass => Judgement::Pass,
            CheckOutcome::Fail { .. } if self.level >= least => Judgement::Fail,
            CheckOutcome::Fail { .. } => Judgement::Warn,
            CheckOutcome::Inconclusive { .. } => Judgement::Inconclusive,
            CheckOutcome::Absent(_) => Judgement::Absent,
            CheckOutcome::Skipped(_) => Judgement::Skipped,
        }
    }

    /// The clients that are known to break.
    pub fn breaks(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for rule in self.rules.iter().filter_map(|id| rules::find(id)) {
            for name in rule.breaks.split(", ").filter(|name| !name.is_empty()) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names.join(", ")
    }
}

/// The results of a whole run.
#[derive(Debug)]
pub struct Report {
    /// The endpoint of the server.
    pub endpoint: String,
    /// The instance name in requests.
    pub instance: String,
    /// What the caller may do, as far as the server has said so.
    pub caller: String,
    /// API name of the digest function of the blobs.
    pub digest_function: String,
    /// Number of bytes that were sent to be stored.
    pub bytes_written: u64,
    /// The duration of the run.
    pub elapsed: Duration,
    /// One row for each check, and for each rule without one.
    pub rows: Vec<Row>,
}

impl Report {
    /// The rows whose first rule is in this group.
    pub fn group(&self, name: &str) -> Vec<&Row> {
        let mut rows: Vec<&Row> = self.rows.iter().filter(|row| row.group() == name).collect();
        rows.sort_by_key(|row| row.rules.first().copied());
        rows
    }

    /// The number of rows with each judgement.
    pub fn counts(&self, strict: bool) -> BTreeMap<Judgement, usize> {
        let mut counts = BTreeMap::new();
        for row in &self.rows {
            *counts.entry(row.judgement(strict)).or_default() += 1;
        }
        counts
    }

    /// Whether a check was performed, none failed and none is inconclusive.
    pub fn is_good(&self, strict: bool) -> bool {
        let counts = self.counts(strict);
        let bad = [Judgement::Fail, Judgement::Inconclusive];
        self.has_verified() && !bad.iter().any(|judgement| counts.contains_key(judgement))
    }

    /// Whether at least one check was performed.
    fn has_verified(&self) -> bool {
        self.rows.iter().any(|row| !matches!(row.outcome, CheckOutcome::Skipped(_)))
    }

    /// Reduces one fault to one failure: what is inconclusive because of a rule that itself failed becomes skipped. So
    /// does a check for whose preparation this caller lacks a permission.
    pub fn settle(&mut self) {
        for row in &mut self.rows {
            if let Some(why) = row.outcome.denial() {
                row.outcome = CheckOutcome::Skipped(format!("this caller lacks a permission: {why}"));
            }
        }
        let failed = |row: &&Row| matches!(row.outcome, CheckOutcome::Fail { .. });
        let failed: BTreeSet<&str> =
            self.rows.iter().filter(failed).flat_map(|row| row.rules.clone()).collect();
        for row in &mut self.rows {
            if let CheckOutcome::Inconclusive { needs: Some(rule), expected, observed } = &row.outcome
                && failed.contains(rule)
            {
                row.outcome =
                    CheckOutcome::Skipped(format!("needs {rule}: expected {expected}; observed {observed}"));
            }
        }
    }

    /// The table for people.
    pub fn table(&self, strict: bool) -> String {
        let mut text = String::new();
        for group in groups::ALL {
            let rows = self.group(group.name);
            if !rows.is_empty() {
                let _ = writeln!(text, "{}  {}", group.name, group.title);
                for row in rows {
                    write_row(&mut text, row, strict);
                }
                text.push('\n');
            }
        }
        let counts = self.counts(strict);
        let counts: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let _ = writeln!(
            text,
            "{} ({}): {} in {:.1} s; {:.1} MB written",
            self.endpoint,
            self.caller,
            counts.join(", "),
            self.elapsed.as_secs_f64(),
            self.bytes_written as f64 / 1e6
        );
        if !self.has_verified() {
            let _ = writeln!(text, "{NOTHING_VERIFIED}");
        }
        text
    }
}

/// What a report says if no check was performed.
const NOTHING_VERIFIED: &str = "no check was performed, so nothing is known about this server";

fn write_row(text: &mut String, row: &Row, strict: bool) {
    let (judgement, level) = (row.judgement(strict), row.level);
    let rules = row.rules.join(" ");
    let _ = writeln!(text, "  {judgement:<8}{level:<7} {rules:<15} {}", row.title);
    let mut detail = |name: &str, what: &str| {
        if !what.is_empty() {
            let _ = writeln!(text, "{:34}{name:<9} {}", "", gorego_reapi::escape::escaped(what));
        }
    };
    match &row.outcome {
        CheckOutcome::Pass => {}
        CheckOutcome::Fail { expected, observed } => {
            detail("expected", expected);
            detail("observed", observed);
            detail("breaks", &row.breaks());
        }
        CheckOutcome::Inconclusive { needs, expected, observed } => {
            detail("because", "a preparatory step failed");
            detail("needs", needs.unwrap_or_default());
            detail("expected", expected);
            detail("observed", observed);
        }
        CheckOutcome::Absent(why) | CheckOutcome::Skipped(why) => detail("because", why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_good_only_if_a_check_was_performed() {
        let rule = rules::find("CAS-01").unwrap();
        let mut report = Report {
            endpoint: String::new(),
            instance: String::new(),
            caller: String::new(),
            digest_function: String::new(),
            bytes_written: 0,
            elapsed: Duration::ZERO,
            rows: vec![Row::beyond(rule, "this caller lacks a permission")],
        };
        assert!(!report.is_good(false) && report.table(false).contains(NOTHING_VERIFIED));
        let xml = report.junit(false).unwrap();
        assert!(xml.contains("errors=\"1\"") && xml.contains(NOTHING_VERIFIED), "{xml}");
        report.rows.push(Row { outcome: CheckOutcome::Pass, ..Row::beyond(rule, "") });
        assert!(report.is_good(false) && !report.table(false).contains(NOTHING_VERIFIED));
        let xml = report.junit(false).unwrap();
        assert!(xml.contains("errors=\"0\"") && !xml.contains(NOTHING_VERIFIED), "{xml}");
        let (expected, observed) = (String::new(), String::new());
        let outcome = CheckOutcome::Inconclusive { needs: None, expected, observed };
        report.rows.push(Row { outcome, ..Row::beyond(rule, "") });
        assert!(!report.is_good(false));
    }
}
