//! What a run has found: rows, their judgement, and the table for people. The forms for machines are below.

pub mod json;
pub mod junit;

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

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As the rule asks.
    Pass,
    /// Otherwise.
    Fail {
        /// What the rule asks for.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// A step that leads to the rule's own matter did not succeed, so nothing can be said about the rule.
    Inconclusive {
        /// The rule that asks for this step, if it is one with a check of its own.
        needs: Option<&'static str>,
        /// What the step needed.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// The server does not claim the feature.
    Absent(String),
    /// It could not be tested here.
    Skipped(String),
}

impl From<Verdict> for Outcome {
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

/// How an outcome counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Judgement {
    /// It passed.
    Pass,
    /// A `must` failed; or a `should`, of a strict run.
    Fail,
    /// Something that a check builds on did not work, and no other check says why.
    Inconclusive,
    /// A `should` or a `may` failed.
    Warn,
    /// The server does not have it.
    Absent,
    /// Not tested.
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

/// One check, or one rule that no check can serve.
#[derive(Debug, Clone)]
pub struct Row {
    /// The rules; the first one says to which group it belongs.
    pub rules: Vec<&'static str>,
    /// The highest level among them.
    pub level: Level,
    /// A sentence about the server.
    pub title: String,
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took.
    pub elapsed: Duration,
}

impl Row {
    /// What came of a check. A step that the check's own rule asks for is its own matter.
    pub fn of(check: &Check, verdict: Verdict, elapsed: Duration) -> Self {
        let rules = check.rules.to_vec();
        let own = matches!(&verdict, Err(Stop::Unmet { needs: Some(rule), .. }) if rules.contains(rule));
        let outcome = Outcome::from(if own { verdict.own() } else { verdict });
        Self { rules, level: check.level(), title: check.title(), outcome, elapsed }
    }

    /// A rule that no check can serve.
    pub fn beyond(rule: &'static Rule, reason: &str) -> Self {
        Self {
            rules: vec![rule.id],
            level: rule.level,
            title: rule.title.to_owned(),
            outcome: Outcome::Skipped(reason.to_owned()),
            elapsed: Duration::ZERO,
        }
    }

    /// The name of its group.
    pub fn group(&self) -> &'static str {
        self.rules.first().and_then(|id| id.split('-').next()).unwrap_or_default()
    }

    /// How it counts; `strict` makes a failed `should` a failure.
    pub fn judgement(&self, strict: bool) -> Judgement {
        let least = if strict { Level::Should } else { Level::Must };
        match &self.outcome {
            Outcome::Pass => Judgement::Pass,
            Outcome::Fail { .. } if self.level >= least => Judgement::Fail,
            Outcome::Fail { .. } => Judgement::Warn,
            Outcome::Inconclusive { .. } => Judgement::Inconclusive,
            Outcome::Absent(_) => Judgement::Absent,
            Outcome::Skipped(_) => Judgement::Skipped,
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

/// A whole run.
#[derive(Debug)]
pub struct Report {
    /// The server.
    pub endpoint: String,
    /// The instance that was used.
    pub instance: String,
    /// The digest function that was used.
    pub digest_function: String,
    /// How many bytes were sent to be stored.
    pub bytes_written: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// What was found.
    pub rows: Vec<Row>,
}

impl Report {
    /// The rows of a group, by their first rule.
    pub fn group(&self, name: &str) -> Vec<&Row> {
        let mut rows: Vec<&Row> = self.rows.iter().filter(|row| row.group() == name).collect();
        rows.sort_by_key(|row| row.rules.first().copied());
        rows
    }

    /// How many rows of each kind there are.
    pub fn counts(&self, strict: bool) -> BTreeMap<Judgement, usize> {
        let mut counts = BTreeMap::new();
        for row in &self.rows {
            *counts.entry(row.judgement(strict)).or_default() += 1;
        }
        counts
    }

    /// Whether nothing failed, and nothing that could be checked was left undecided.
    pub fn is_good(&self, strict: bool) -> bool {
        let counts = self.counts(strict);
        !counts.contains_key(&Judgement::Fail) && !counts.contains_key(&Judgement::Inconclusive)
    }

    /// Makes one fault one failure: what could not be decided because of a rule that failed itself is skipped.
    pub fn settle(&mut self) {
        let failed = |row: &&Row| matches!(row.outcome, Outcome::Fail { .. });
        let failed: BTreeSet<&str> =
            self.rows.iter().filter(failed).flat_map(|row| row.rules.clone()).collect();
        for row in &mut self.rows {
            if let Outcome::Inconclusive { needs: Some(rule), expected, observed } = &row.outcome
                && failed.contains(rule)
            {
                row.outcome =
                    Outcome::Skipped(format!("needs {rule}: expected {expected}; observed {observed}"));
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
            "{}: {} in {:.1} s; {:.1} MB written",
            self.endpoint,
            counts.join(", "),
            self.elapsed.as_secs_f64(),
            self.bytes_written as f64 / 1e6
        );
        text
    }
}

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
        Outcome::Pass => {}
        Outcome::Fail { expected, observed } => {
            detail("expected", expected);
            detail("observed", observed);
            detail("breaks", &row.breaks());
        }
        Outcome::Inconclusive { needs, expected, observed } => {
            detail("because", "a step before the rule itself failed");
            detail("needs", needs.unwrap_or_default());
            detail("expected", expected);
            detail("observed", observed);
        }
        Outcome::Absent(why) | Outcome::Skipped(why) => detail("because", why),
    }
}
