//! `gorego verify`: a conformance suite for any server of the Remote Execution API.
//!
//! It speaks only the wire protocol and knows nothing else about the server. `docs/rules.md` has the rules in full
//! ([`rules`]). Each group of rules has a file in [`groups`]. Each check is a small async function that gets a session
//! and reports what it expected and what it observed.
//!
//! A run is safe on a server that others use: every blob, action and result contains the salt of the run, so nothing is
//! shared with other clients; only operations of the run itself are cancelled; the written bytes are counted and
//! reported. Checks do not depend on each other or on what the server has stored. Each has its own connection: a server
//! may close a connection because of a request, and a client because of a response (GEN-19). Each check and the whole
//! run have a time limit.
//!
//! Faults that need an operator (a full disk, a lost worker, a corrupt file) are not covered. Such rules are reported
//! as skipped, with the reason.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod actions;
mod blob;
mod check;
mod compression;
mod connection;
pub mod groups;
mod job;
mod origin;
mod patience;
mod raw;
pub mod report;
pub mod rules;
mod session;
mod store;

use check::{Check, Step as _, Stop, Verdict};
use futures::{StreamExt as _, stream};
use gorego_client::ConnectOptions;
use gorego_reapi::error::Result;
use report::{Report, Row};
use rules::Level;
use session::Session;
use std::{
    num::NonZeroUsize,
    time::{Duration, Instant},
};

/// Default time limit of one check: an order of magnitude more than the slowest check needs with a server on the same
/// machine.
pub const CHECK_LIMIT: Duration = Duration::from_secs(30);
/// Factor by which `--large` raises the time limit of a check.
const LARGE_FACTOR: u32 = 10;
/// Time limit of a run. Checks that have not started by then are inconclusive.
pub const RUN_LIMIT: Duration = Duration::from_secs(15 * 60);
/// Default number of concurrent checks: enough to overlap waiting times, few enough that a server with a handful of
/// slots answers each in time.
pub const DEFAULT_JOBS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// The server to verify, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The server, and how to connect to it.
    pub server: ConnectOptions,
    /// The instance name in requests.
    pub instance: String,
    /// A second instance of the same server, for the checks that instances are isolated.
    pub other_instance: Option<String>,
    /// API name of the digest function for all checks that are not about digest functions. The default is SHA256, or
    /// else the first one that the server lists.
    pub digest_function: Option<String>,
    /// Platform properties of every action, for servers that require them.
    pub platform: Vec<(String, String)>,
    /// Host name under which the server can reach this machine, for checks in which it fetches from here. The default
    /// is the loopback address.
    pub asset_origin: Option<String>,
    /// Time limit of one check.
    pub check_limit: Duration,
    /// Number of concurrent checks.
    pub jobs: usize,
    /// The rules to check; see [`Selection`].
    pub selection: Selection,
    /// Also run the checks that transfer a gigabyte or take a minute.
    pub large: bool,
}

impl Options {
    /// The defaults for this server.
    pub fn new(server: impl Into<ConnectOptions>) -> Self {
        Self {
            server: server.into(),
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

    /// The effective time limit of a check.
    pub fn check_limit(&self) -> Duration {
        self.check_limit.saturating_mul(if self.large { LARGE_FACTOR } else { 1 })
    }
}

/// The checks to run: those that cover a named rule of at least this level.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Rule ids and group names (`GEN-01`, `CAS`) in upper case; empty means all.
    pub only: Vec<String>,
    /// The lowest level; `None` means all.
    pub level: Option<Level>,
}

impl Selection {
    /// Whether a check of these rules is selected.
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
/// When there is nothing to verify: the endpoint is malformed, no server answers, or GetCapabilities fails.
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
        endpoint: options.server.endpoint.clone(),
        instance: options.instance.clone(),
        caller: session.caller(),
        digest_function: session.function().wire().as_str_name().to_owned(),
        bytes_written: session.bytes_written(),
        elapsed: begin.elapsed(),
        rows,
    };
    report.settle();
    Ok(report)
}

/// Runs one check in its own task, so that neither its work nor a panic affects the others.
async fn run_check(check: &'static Check, session: Session, end: Instant) -> Row {
    let begin = Instant::now();
    let limit = session.options().check_limit();
    if begin >= end {
        let observed = format!("the run has taken {} s already", RUN_LIMIT.as_secs());
        let verdict = Err(check::fail("time for this check", observed)).control();
        return Row::of(check, verdict, Duration::ZERO);
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
        // A busy machine and a hanging server look the same from here. Checks measure the times that matter.
        Ok(Err(_)) => named(&cases, check::fail(format!("an end within {limit:?}"), "no end")).control(),
        Err(error) => named(&cases, check::fail("a verdict", format!("the check itself is broken: {error}"))),
    };
    Row::of(check, verdict, begin.elapsed())
}

/// The failure of a check that did not reach its own verdict, with the cases in which it was.
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
        // The level applies to the named rule, and not to other rules of the same check.
        assert!(!select(&["GEN-07"], Some(Level::Must)).includes(&["GEN-07", "GEN-06"]));
    }
}
