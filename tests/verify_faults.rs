//! The conformance suite against servers that are wrong on purpose: each [fault](faults) has to be found by the checks of the
//! rules that it breaks, and without one they all pass. A check that would also pass on a server that does nothing, or the
//! wrong thing, is worthless; this is where that shows.
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;
#[path = "wire/support.rs"]
#[allow(dead_code)]
mod support;

use faults::{Fault, change, fault};
use futures::{StreamExt as _, stream};
use gorego::verify::{
    self, Options, Selection,
    report::{Outcome, Report},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use support::Server;

/// Faulty servers at the same time.
const AT_ONCE: usize = 16;
/// Longest time of one check against a faulty server: where a fault makes it silent, this is what it costs.
const FAULTY_LIMIT: Duration = Duration::from_secs(15);
/// An instance beside the default one, with a name of several segments.
const OTHER_INSTANCE: &str = "team/a";

/// Rules that the real server keeps and that no fault breaks, each with the reason.
const UNBROKEN: &[(&str, &str)] = &[];

/// What the suite finds behind a fault.
async fn verify(fault: &Fault, server: &str, only: &[&str], check_limit: Duration) -> Report {
    let proxy = fault.before(server).await;
    let options = Options {
        selection: Selection { only: only.iter().map(|id| (*id).to_owned()).collect(), level: None },
        other_instance: Some(OTHER_INSTANCE.into()),
        check_limit,
        jobs: 16,
        ..Options::new(proxy.endpoint.clone())
    };
    verify::run(options).await.unwrap()
}

/// The rules of the rows with such an outcome.
fn rules(report: &Report, which: impl Fn(&Outcome) -> bool) -> BTreeSet<&'static str> {
    report.rows.iter().filter(|row| which(&row.outcome)).flat_map(|row| row.rules.clone()).collect()
}

fn failed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Fail { .. })
}

/// Whether a check found something wrong, and did not merely run out of time on a busy machine.
fn found(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Fail { observed, .. } if observed != "no end")
}

/// One sentence for each thing that is wrong with the suite or with the list above.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_is_found_and_a_server_without_one_passes() {
    let instances = format!("[\"\", \"{OTHER_INSTANCE}\"]");
    let server = Server::with(&[
        ("INSTANCE_NAMES", instances.as_str()),
        ("EXECUTION__CONCURRENCY", "16"),
        ("ASSETS__ALLOWED_HOSTS", "[\"127.0.0.1\"]"),
        ("LOG__FILTER", "warn,gorego::server=info"),
    ])
    .await;
    let endpoint = server.endpoint();
    let begin = Instant::now();
    let sound = verify(&fault("no fault", &[], change::nothing()), &endpoint, &[], verify::CHECK_LIMIT).await;
    let mut problems: Vec<String> = sound
        .rows
        .iter()
        .filter(|row| failed(&row.outcome))
        .map(|row| format!("without a fault: {:?} {}: {:?}", row.rules, row.title, row.outcome))
        .collect();
    let kept = rules(&sound, |outcome| *outcome == Outcome::Pass);
    eprintln!("without a fault: {:?}, {} rules pass", begin.elapsed(), kept.len());

    let faults = faults::all();
    let runs = stream::iter(faults.iter().filter(|fault| fault.breaks.iter().any(|id| kept.contains(id))))
        .map(async |fault| (fault, verify(fault, &endpoint, fault.breaks, FAULTY_LIMIT).await))
        .buffer_unordered(AT_ONCE);
    let mut broken: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut times = Vec::new();
    let runs: Vec<_> = runs.collect().await;
    for (fault, report) in &runs {
        times.push((report.elapsed, fault.name));
        let found = rules(report, found);
        for id in fault.breaks {
            if found.contains(id) {
                broken.entry(id).or_default().push(fault.name);
            } else if kept.contains(id) {
                let seen: Vec<_> = report
                    .rows
                    .iter()
                    .filter(|row| row.rules.contains(id))
                    .map(|row| format!("{}: {:?}", row.title, row.outcome))
                    .collect();
                problems.push(format!("\"{}\" does not break {id}: {seen:?}", fault.name));
            }
        }
    }
    let excused: BTreeSet<_> = UNBROKEN.iter().map(|(id, _)| *id).collect();
    for id in kept.iter().filter(|id| !broken.contains_key(*id) && !excused.contains(*id)) {
        problems
            .push(format!("{id} passes whatever is wrong: write a fault for it, or say in UNBROKEN why not"));
    }
    for id in excused.iter().filter(|id| broken.contains_key(*id)) {
        problems.push(format!("{id} is broken by {:?} after all: take it out of UNBROKEN", broken[id]));
    }
    times.sort_unstable();
    eprintln!(
        "{} faults, {} rules broken of {} kept, in {:?}; the slowest: {:?}",
        runs.len(),
        broken.len(),
        kept.len(),
        begin.elapsed(),
        times.iter().rev().take(12).collect::<Vec<_>>()
    );
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn faults_have_names_of_their_own_and_break_rules_that_exist() {
    let mut names = BTreeSet::new();
    for fault in faults::all() {
        assert!(names.insert(fault.name), "{}", fault.name);
        assert!(!fault.breaks.is_empty(), "{} breaks nothing", fault.name);
        for id in fault.breaks {
            assert!(verify::rules::find(id).is_some(), "{}: {id} is no rule", fault.name);
        }
    }
}
