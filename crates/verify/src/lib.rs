//! `gorego verify`: a conformance suite for any server of the Remote Execution API.
//!
//! It speaks the wire and nothing else: what it knows of a server is what the server says and does. The rules are those of
//! `docs/rules.md` ([`rules`]); each group of them has a file in [`groups`], each check there is one small async function
//! ([`check`]) that is given a [`Session`] and says what it expected and what it saw.
//!
//! A run is safe beside other people's builds: every blob, action and result carries the salt of the run, so nothing is
//! shared with anybody; only operations that the run itself started are cancelled; the bytes written are counted and
//! reported. Checks are independent of each other and of what a server has stored before. Each has a connection of its own,
//! since a server may end one over what a check sends, and a client over what it gets (GEN-19). Each has a time limit, and so
//! has the whole run.
//!
//! Not here: faults that need an operator's hands (a full disk, a lost worker, a corrupt file). Such rules are listed as
//! skipped, with the reason.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod actions;
pub mod blob;
pub mod check;
pub mod compression;
pub mod connection;
pub mod groups;
pub mod job;
pub mod origin;
pub mod patience;
pub mod raw;
pub mod report;
pub mod rules;
pub mod session;
pub mod store;

use check::{Check, Step as _, Stop, Verdict};
use futures::{StreamExt as _, stream};
use gorego_reapi::error::Result;
use report::{Report, Row};
use rules::Level;
use session::Session;
use std::{
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Longest time of one check where the command line says nothing: an order of magnitude more than the slowest check needs of
/// a server on the same machine.
pub const CHECK_LIMIT: Duration = Duration::from_secs(30);
/// What `--large` allows a check above its limit.
const LARGE_FACTOR: u32 = 10;
/// Longest time of a run; checks that have not started by then are skipped.
pub const RUN_LIMIT: Duration = Duration::from_secs(15 * 60);
/// Checks at the same time where the command line says nothing: enough to fill the waits, few enough that a server with a
/// handful of slots answers each in time.
pub const DEFAULT_JOBS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// What to verify, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the server is: `grpc://host:port`.
    pub endpoint: String,
    /// The instance that is used.
    pub instance: String,
    /// A second instance of the same server, for the checks that one does not see the other's data.
    pub other_instance: Option<String>,
    /// The digest function of every check that is not about digest functions, by its name in the API; SHA256 or else the
    /// first one that the server lists.
    pub digest_function: Option<String>,
    /// Platform properties of every action, for servers that need them.
    pub platform: Vec<(String, String)>,
    /// The name under which the server finds this machine, for the checks that let it fetch from here; the loopback address
    /// where nothing is said.
    pub asset_origin: Option<String>,
    /// Longest time of one check.
    pub check_limit: Duration,
    /// Checks at the same time.
    pub jobs: usize,
    /// Which rules; see [`Selection`].
    pub selection: Selection,
    /// Run the checks too that move a gigabyte or take a minute.
    pub large: bool,
}

impl Options {
    /// Everything at its default, against this server.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            instance: String::new(),
            other_instance: None,
            digest_function: None,
            platform: Vec::new(),
            asset_origin: None,
            check_limit: CHECK_LIMIT,
            jobs: DEFAULT_JOBS.get(),
            selection: Selection::default(),
            large: false,
        }
    }

    /// The longest time of a check of this run.
    pub fn check_limit(&self) -> Duration {
        self.check_limit.saturating_mul(if self.large { LARGE_FACTOR } else { 1 })
    }
}

/// Which checks to run: those that serve one of the rules named and have at least this level.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Rule ids and group names (`GEN-01`, `CAS`), upper case; empty means all.
    pub only: Vec<String>,
    /// The lowest level; `None` means all.
    pub level: Option<Level>,
}

impl Selection {
    /// Whether something serving these rules is selected.
    pub fn includes(&self, rules: &[&str]) -> bool {
        let named = |id: &str| {
            let group = id.split('-').next().unwrap_or(id);
            self.only.is_empty() || self.only.iter().any(|name| name == id || name == group)
        };
        let high = |id: &str| rules::find(id).is_some_and(|rule| Some(rule.level) >= self.level);
        rules.iter().any(|id| named(id) && high(id))
    }
}

/// Runs the selected checks against a server.
///
/// # Errors
/// When there is nothing to verify: the endpoint is malformed, nobody answers there, or GetCapabilities fails.
pub async fn run(options: Options) -> Result<Report> {
    let begin = Instant::now();
    let session = Session::connect(options).await?;
    let options = session.options();
    let selected = groups::ALL
        .iter()
        .flat_map(|group| group.checks())
        .filter(|check| options.selection.includes(check.rules));
    let run = |(at, check)| {
        let row = run_check(check, session.clone(), begin + RUN_LIMIT);
        async move { (at, row.await) }
    };
    let side_by_side = stream::iter(selected.enumerate().map(run)).buffer_unordered(options.jobs.max(1));
    let mut done: Vec<(usize, Row)> = side_by_side.collect().await;
    done.sort_by_key(|(at, _)| *at);
    let mut rows: Vec<Row> = done.into_iter().map(|(_, row)| row).collect();
    for group in groups::ALL {
        for (rule, reason) in group.beyond() {
            if options.selection.includes(&[rule.id]) {
                rows.push(Row::beyond(rule, reason));
            }
        }
    }
    session.cancel_what_is_left().await;
    let mut report = Report {
        endpoint: options.endpoint.clone(),
        instance: options.instance.clone(),
        digest_function: session.function().wire().as_str_name().to_owned(),
        bytes_written: session.bytes_written(),
        elapsed: begin.elapsed(),
        rows,
    };
    report.settle();
    Ok(report)
}

/// Runs one check on a task of its own, so that neither its work nor a panic touches the others.
async fn run_check(check: &'static Check, session: Session, end: Instant) -> Row {
    let begin = Instant::now();
    let limit = session.options().check_limit();
    if begin >= end {
        let stop = Stop::Skipped(format!("the run has taken {} s already", RUN_LIMIT.as_secs()));
        return Row::of(check, Err(stop), Duration::ZERO);
    }
    let session = session.for_check();
    let cases = session.clone();
    let work = async move {
        let own = session.reconnect().await.control()?;
        (check.run)(own).await
    };
    let task = tokio::spawn(tokio::time::timeout(limit, work));
    let verdict = match task.await {
        Ok(Ok(verdict)) => verdict,
        // A busy machine and a server that hangs look the same from here. What has to come in time is timed by its check.
        Ok(Err(_)) => named(&cases, check::fail(format!("an end within {limit:?}"), "no end")).control(),
        Err(error) => named(&cases, check::fail("a verdict", format!("the check itself is broken: {error}"))),
    };
    Row::of(check, verdict, begin.elapsed())
}

/// A failure of a check that did not come to its own verdict, with the cases that it was in.
fn named(session: &Session, stop: Stop) -> Verdict {
    let cases = session.open_cases();
    if cases.is_empty() { Err(stop) } else { Err(stop).case(cases.join(": ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The number of rules in each group.
    #[test]
    fn every_rule_is_listed_once() {
        let counts: Vec<(&str, usize)> =
            rules::ALL.iter().map(|(name, rules)| (*name, rules.len())).collect();
        assert_eq!(
            counts,
            [
                ("GEN", 30),
                ("CAP", 19),
                ("CAS", 38),
                ("BS", 33),
                ("AC", 15),
                ("EXE", 64),
                ("OPS", 5),
                ("AST", 11),
                ("LOG", 5)
            ]
        );
        let ids: BTreeSet<&str> =
            rules::ALL.iter().flat_map(|(_, rules)| rules.iter().map(|r| r.id)).collect();
        assert_eq!(ids.len(), 220);
        for (name, rules) in rules::ALL {
            for (at, rule) in rules.iter().enumerate() {
                assert_eq!(rule.id, format!("{name}-{:02}", at + 1));
            }
        }
    }

    #[test]
    fn checks_serve_rules_that_exist_and_names_are_unique() {
        let mut names = BTreeSet::new();
        for check in groups::ALL.iter().flat_map(|group| group.checks()) {
            assert!(!check.rules.is_empty() && names.insert(check.name), "{}", check.name);
            for id in check.rules {
                assert!(rules::find(id).is_some(), "{} serves {id}, which is no rule", check.name);
            }
        }
    }

    #[test]
    fn every_rule_has_a_check_or_a_reason_why_not() {
        let served: BTreeSet<&str> = groups::ALL
            .iter()
            .flat_map(|group| group.checks())
            .flat_map(|check| check.rules)
            .copied()
            .collect();
        for group in groups::ALL.iter().filter(|group| group.checks().next().is_some()) {
            let beyond: BTreeSet<&str> = group.beyond().map(|(rule, _)| rule.id).collect();
            for rule in group.rules {
                assert!(
                    served.contains(rule.id) != beyond.contains(rule.id),
                    "{} needs a check, or a reason why it has none, and not both",
                    rule.id
                );
            }
        }
    }

    #[test]
    fn rules_are_selected_by_id_group_and_level() {
        let select = |only: &[&str], level| Selection {
            only: only.iter().map(|name| (*name).to_owned()).collect(),
            level,
        };
        assert!(Selection::default().includes(&["EXE-30"]));
        assert!(select(&["GEN", "CAS-01"], None).includes(&["BS-01", "CAS-01"]));
        assert!(!select(&["GEN", "CAS-01"], None).includes(&["CAS-02"]));
        assert!(!select(&[], Some(Level::Must)).includes(&["GEN-07"]));
        // The level counts for the rule that was named, not for another one of the same check.
        assert!(!select(&["GEN-07"], Some(Level::Must)).includes(&["GEN-07", "GEN-06"]));
    }
}
