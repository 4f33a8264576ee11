//! The conformance suite with servers that are wrong on purpose. Each [fault](faults) must be found by the checks of
//! the rules that it breaks, and without a fault all checks pass. A check that would also pass with a server that does
//! nothing, or the wrong thing, is worthless; this test detects such checks.
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;
mod support;

use faults::{Fault, change, fault};
use futures::{StreamExt as _, stream};
use gorego_reapi::proto::reapi::FindMissingBlobsRequest;
use gorego_verify::{
    self as verify, Options, Selection,
    report::{CheckOutcome, Judgement, Report},
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use support::Server;
use tonic::Status;

/// Number of concurrent faulty servers.
const AT_ONCE: usize = 16;
/// Time limit of a check of a faulty server. A fault that makes the server silent costs this much time.
const FAULTY_LIMIT: Duration = Duration::from_secs(30);
/// The time limit if no check may run out of time, however busy the machine is.
const PATIENT_LIMIT: Duration = Duration::from_secs(60);
/// A second instance, whose name has several segments.
const OTHER_INSTANCE: &str = "team/a";

/// Rules that the real server follows and that no fault breaks, each with the reason.
const UNBROKEN: &[(&str, &str)] = &[];

/// The findings of the suite for one fault.
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
fn rules(report: &Report, which: impl Fn(&CheckOutcome) -> bool) -> BTreeSet<&'static str> {
    report.rows.iter().filter(|row| which(&row.outcome)).flat_map(|row| row.rules.clone()).collect()
}

fn failed(outcome: &CheckOutcome) -> bool {
    matches!(outcome, CheckOutcome::Fail { .. })
}

/// One sentence for each defect of the suite or of the list above.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_is_found_and_a_server_without_one_passes() {
    let server = server().await;
    let endpoint = server.endpoint();
    let begin = Instant::now();
    let sound = verify(&fault("no fault", &[], change::nothing()), &endpoint, &[], PATIENT_LIMIT).await;
    let mut problems: Vec<String> = sound
        .rows
        .iter()
        .filter(|row| failed(&row.outcome) || matches!(row.outcome, CheckOutcome::Inconclusive { .. }))
        .map(|row| format!("without a fault: {:?} {}: {:?}", row.rules, row.title, row.outcome))
        .collect();
    let kept = rules(&sound, |outcome| *outcome == CheckOutcome::Pass);
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
        let found = rules(report, failed);
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

/// The real server behind the proxies, with slots and instances that suit the suite.
async fn server() -> Server {
    let instances = format!("[\"\", \"{OTHER_INSTANCE}\"]");
    Server::with(&[
        ("INSTANCE_NAMES", instances.as_str()),
        ("EXECUTION__CONCURRENCY", "16"),
        // The suite leaves work behind and checks it later, while its other checks wait for slots.
        ("EXECUTION__CONTENDED_ABANDON_GRACE", "1m"),
        ("ASSETS__ALLOWED_HOSTS", "[\"127.0.0.1\"]"),
        // It has credentials, and knows none. Without one, everything is allowed.
        ("ACCESS__TOKENS", "/nonexistent-tokens"),
        ("ACCESS__ANONYMOUS", "[\"admin\"]"),
        ("LOG__FILTER", "warn,gorego::server=info"),
    ])
    .await
}

/// The rows with this judgement, as text.
fn judged(report: &Report, judgement: Judgement) -> Vec<String> {
    let rows = report.rows.iter().filter(|row| row.judgement(false) == judgement);
    rows.map(|row| format!("{:?} {}: {:?}", row.rules, row.title, row.outcome)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_may_do_is_no_fault() {
    let server = server().await;
    for lawful in faults::lawful::all() {
        let report = verify(&lawful, &server.endpoint(), lawful.breaks, PATIENT_LIMIT).await;
        let passed = judged(&report, Judgement::Pass);
        assert_eq!(passed.len(), report.rows.len(), "{}: {:#?}", lawful.name, report.rows);
    }
}

/// The response ends its connection, because a client accepts at most 8 KiB of headers.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_ends_its_connection_leaves_the_others_alone() {
    let server = server().await;
    let lost = fault("missing blobs come in the trailers", &[], faults::inline_as_status(usize::MAX));
    let report =
        verify(&lost, &server.endpoint(), &["GEN", "CAS-01", "CAS-17", "BS-07"], PATIENT_LIMIT).await;
    assert_eq!(rules(&report, failed), BTreeSet::from(["EXE-25", "GEN-19"]), "{:#?}", report.rows);
    assert_eq!(judged(&report, Judgement::Inconclusive), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_fault_is_one_failure_and_what_needs_the_rule_is_skipped() {
    let server = server().await;
    let bare =
        fault("no message has metadata", &[], change::operation(|operation| operation.metadata = None));
    let report = verify(&bare, &server.endpoint(), &["EXE", "GEN-18", "OPS"], PATIENT_LIMIT).await;
    let others: Vec<_> =
        judged(&report, Judgement::Fail).into_iter().filter(|row| !row.contains("EXE-03")).collect();
    assert_eq!(others, Vec::<String>::new());
    assert_eq!(rules(&report, failed), BTreeSet::from(["EXE-03"]), "{:#?}", judged(&report, Judgement::Warn));
    assert_eq!(judged(&report, Judgement::Inconclusive), Vec::<String>::new());
    let needs = |outcome: &CheckOutcome| matches!(outcome, CheckOutcome::Skipped(why) if why.starts_with("needs EXE-03: "));
    let skipped = rules(&report, needs);
    for id in ["EXE-04", "EXE-05", "EXE-06", "GEN-18", "OPS-03"] {
        assert!(skipped.contains(id), "{id} is not among {skipped:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_control_is_a_kind_of_its_own_in_every_report() {
    let server = server().await;
    let broken = fault("nothing can be read", &[], {
        change::instead("Read", |_, _| async { Err(Status::internal("the disk is on fire")) })
    });
    // Read itself is not checked, so no other check explains the failure.
    let report = verify(&broken, &server.endpoint(), &["BS-04"], PATIENT_LIMIT).await;
    assert_eq!(judged(&report, Judgement::Inconclusive).len(), 2, "{:#?}", report.rows);
    assert!(!report.is_good(false) && rules(&report, failed).is_empty());
    let table = report.table(false);
    for part in ["unclear must", "needs     BS-07", "observed  INTERNAL: the disk is on fire", "2 unclear"] {
        assert!(table.contains(part), "{part} is not in {table}");
    }
    let json: serde_json::Value = serde_json::from_str(&report.json(false)).unwrap();
    assert_eq!((&json["good"], &json["checks"][0]["outcome"]), (&false.into(), &"inconclusive".into()));
    assert_eq!(json["checks"][0]["needs"], "BS-07");
    let xml = report.junit(false).unwrap();
    assert!(xml.contains("errors=\"2\"") && xml.contains("failures=\"0\""), "{xml}");
    // Besides the check of Read only this one fails, and the others depend on it.
    let report = verify(&broken, &server.endpoint(), &["BS-04", "BS-07"], PATIENT_LIMIT).await;
    assert!(rules(&report, failed).contains("BS-07") && !rules(&report, failed).contains("BS-04"));
    assert_eq!(judged(&report, Judgement::Inconclusive), Vec::<String>::new());
}

/// Whether the expectation of a check starts with the name of this case.
fn named(outcome: &CheckOutcome, case: &str) -> bool {
    match outcome {
        CheckOutcome::Fail { expected, .. } | CheckOutcome::Inconclusive { expected, .. } => {
            expected.starts_with(case)
        }
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_of_several_cases_says_which_one_failed() {
    let server = server().await;
    let all = faults::all();
    for (name, case) in [
        ("commands run in the root", "a working directory of the input tree: "),
        ("an absent output is an error", "a command that exits with 0 and makes one of three outputs: "),
        ("no result is said to be cached", "a result that was uploaded: "),
        ("the size is no part of the key", "size 101 instead of 100: "),
    ] {
        let fault = all.iter().find(|fault| fault.name == name).unwrap();
        let report = verify(fault, &server.endpoint(), fault.breaks, PATIENT_LIMIT).await;
        let found = report.rows.iter().any(|row| failed(&row.outcome) && named(&row.outcome, case));
        assert!(found, "{name}: {:#?}", report.rows);
    }
}

/// Whether a request contains the digest of 100 bytes with the size of GEN-04's second case.
fn asks_for_99_bytes(asked: &FindMissingBlobsRequest) -> bool {
    asked.blob_digests.iter().any(|digest| digest.size_bytes == 99)
}

/// A fault that is visible only in the second case of a check, and one that makes the server silent there.
#[tokio::test(flavor = "multi_thread")]
async fn the_case_is_named_in_the_report_also_when_the_check_runs_out_of_time() {
    /// Time limit of a check that gets no answer: enough for its earlier steps.
    const LIMIT: Duration = Duration::from_secs(10);
    let server = server().await;
    let case = "size 99 instead of 100: ";
    let wrong = fault("one size is present", &["GEN-04"], {
        change::request::<FindMissingBlobsRequest>("FindMissingBlobs", |asked| {
            if asks_for_99_bytes(asked) {
                asked.blob_digests.clear();
            }
        })
    });
    let report = verify(&wrong, &server.endpoint(), wrong.breaks, PATIENT_LIMIT).await;
    let failed: Vec<_> = report.rows.iter().filter(|row| failed(&row.outcome)).collect();
    assert!(matches!(&failed[..], [row] if named(&row.outcome, case)), "{:#?}", report.rows);
    assert!(report.table(false).contains(case), "{}", report.table(false));

    let silent = fault("no answer about one size", &["GEN-04"], {
        change::instead("FindMissingBlobs", |mut call, upstream| async move {
            let message = call.messages.next().await.unwrap()?;
            if FindMissingBlobsRequest::decode(message.clone()).is_ok_and(|asked| asks_for_99_bytes(&asked)) {
                std::future::pending::<()>().await;
            }
            call.messages = stream::iter([Ok(message)]).boxed();
            upstream.forward(call).await
        })
    });
    let report = verify(&silent, &server.endpoint(), silent.breaks, LIMIT).await;
    let unclear = report.rows.iter().find(|row| matches!(row.outcome, CheckOutcome::Inconclusive { .. }));
    assert!(unclear.is_some_and(|row| named(&row.outcome, case)), "{:#?}", report.rows);
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
