//! Tests of work without followers, and of the work that it makes way for.

use super::*;
use crate::caller::{Build, Owner};

/// How many seconds work without followers continues if other work waits.
fn contended() -> u64 {
    settings().contended_abandon_grace.as_secs()
}

fn is_stopped(runs: &[Assignment]) -> Vec<bool> {
    runs.iter().map(|run| run.cancel.is_cancelled()).collect()
}

/// EXE-14. Two interrupted actions on two slots, and one tiny action of the next build.
#[test]
fn the_run_that_lost_its_followers_first_ends_for_a_waiting_task_and_the_other_continues() {
    let mut fixture = Fixture::new(2, settings());
    let (first, second) = (fixture.submit(work(1)), fixture.submit(work(2)));
    let runs = fixture.dispatch();
    let second_info = second.info.clone();
    drop(second);
    fixture.after(1);
    let first_info = first.info.clone();
    drop(first);
    fixture.after(1);
    fixture.after(contended());
    assert_eq!(is_stopped(&runs), [false, false], "nobody else wants their slots");
    let next = fixture.submit(work(3));
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true]);
    let gone = fixture.ledger.watch(&instance(), second_info.id).unwrap();
    assert!(matches!(error(&gone), Error::Unavailable(_)), "its client is told to execute it again");
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true], "no more of them than tasks wait");
    fixture.finish(runs[1].task, success());
    assert_eq!(fixture.dispatch_one().action.digest, digest(&work(3)));
    let back = fixture.ledger.watch(&instance(), first_info.id).unwrap();
    let _third = fixture.submit(work(4));
    fixture.after(contended() + 1);
    assert!(fixture.dispatch().is_empty());
    assert_eq!(
        (stage(&back), is_stopped(&runs)[0]),
        (Stage::Executing, false),
        "a client that is back keeps its slot"
    );
    drop(next);
}

/// The store must keep what a build was promised while it waits for an action.
#[test]
fn builds_that_follow_a_task_are_active_and_a_bounded_number_of_tasks_is_examined_at_a_time() {
    let mut fixture = Fixture::new(1, settings());
    let build = |name: &str| Owner { build: Build::of(name), peer: Default::default() };
    let submit = |fixture: &mut Fixture, name: &str, number| {
        fixture.try_submit(submit_of(name, &work(number)), resolution(&work(number), false)).unwrap()
    };
    let running = submit(&mut fixture, "a", 1);
    let run = fixture.dispatch_one();
    let (_joined, waiting) = (submit(&mut fixture, "b", 1), submit(&mut fixture, "c", 2));
    let examine = |fixture: &mut Fixture| -> Vec<BTreeSet<Owner>> {
        (0..3).map(|_| fixture.ledger.active_builds(1).into_iter().collect()).collect()
    };
    let both = [build("a"), build("b")].into_iter().collect::<BTreeSet<_>>();
    assert_eq!(examine(&mut fixture), [both.clone(), [build("c")].into(), [].into()]);
    drop(waiting);
    fixture.after(1);
    assert_eq!(examine(&mut fixture), [both, [].into(), [].into()], "nobody waits for it");
    fixture.finish(run.task, success());
    assert!(examine(&mut fixture).iter().all(BTreeSet::is_empty));
    drop(running);
}

/// EXE-14: work is not lost because a connection breaks.
#[test]
fn a_client_that_comes_back_within_the_short_grace_finds_its_work_although_others_wait() {
    let mut fixture = Fixture::new(1, settings());
    let followed = fixture.submit(work(1));
    let runs = fixture.dispatch();
    let info = followed.info.clone();
    drop(followed);
    let _waiting = fixture.submit(work(2));
    fixture.after(1);
    fixture.after(contended() - 1);
    assert!(fixture.dispatch().is_empty());
    let back = fixture.ledger.watch(&instance(), info.id).unwrap();
    fixture.after(60);
    assert!(fixture.dispatch().is_empty());
    assert_eq!((stage(&back), is_stopped(&runs)), (Stage::Executing, vec![false]));
    drop(back);
    fixture.after(1);
    fixture.after(contended());
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [true], "the grace starts anew with each loss");
}

#[test]
fn a_waiting_task_without_followers_is_last_and_ends_no_run() {
    let mut fixture = Fixture::new(1, settings());
    let running = fixture.submit(work(1));
    let run = fixture.dispatch_one();
    let left = fixture.submit(work(2)).info;
    let _followed = fixture.submit_at(work(3), 7);
    assert!(fixture.dispatch().is_empty());
    fixture.finish(run.task, success());
    // The ledger has not checked the followers since.
    let run = fixture.dispatch_one();
    assert_eq!(run.action.digest, digest(&work(3)));
    fixture.finish(run.task, success());
    let run = fixture.dispatch_one();
    assert_eq!(run.action.digest, digest(&work(2)), "a free slot is of no use to anybody else");
    // It started long after it lost its followers, and makes way as soon as other work waits.
    fixture.after(contended());
    let another = fixture.submit(work(4)).info;
    fixture.after(contended());
    assert!(fixture.dispatch().is_empty());
    assert!(!run.cancel.is_cancelled(), "what nobody follows does not count as waiting");
    let _back = fixture.ledger.watch(&instance(), another.id).unwrap();
    assert!(fixture.dispatch().is_empty());
    assert!(run.cancel.is_cancelled());
    assert!(matches!(error(&fixture.ledger.watch(&instance(), left.id).unwrap()), Error::Unavailable(_)));
    drop(running);
}

#[test]
fn runs_of_other_pools_do_not_end_for_waiting_tasks() {
    let mut fixture = Fixture {
        ledger: ledger_with(settings(), &[(1, "linux"), (1, "plan9")]),
        now: ClockReading::now(),
        next_id: 1,
    };
    let of = |name, family| Work { platform: Some(family), ..work(name) };
    fixture.submit(of(1, "linux"));
    fixture.submit(of(2, "plan9"));
    let runs = fixture.dispatch();
    let _waiting = fixture.submit(of(3, "plan9"));
    fixture.after(1);
    fixture.after(contended());
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true]);
}

/// A followed operation keeps a task alive that other clients have left.
#[test]
fn a_task_is_followed_as_long_as_one_of_its_operations_is() {
    let mut fixture = Fixture::new(1, settings());
    drop(fixture.submit(work(1)));
    let follower = fixture.submit(work(1));
    let runs = fixture.dispatch();
    let _waiting = fixture.submit(work(2));
    fixture.after(1);
    fixture.after(contended());
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false]);
    fixture.cancel(&follower);
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false], "it has been left only now");
    fixture.after(contended());
    assert!(fixture.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [true]);
}

/// EXE-10.
#[test]
fn a_stopping_server_ends_tasks_without_followers_and_finishes_the_others() {
    let mut fixture = Fixture::new(3, settings());
    let followed = fixture.submit(work(1));
    let _left = fixture.submit(work(2)).info;
    let runs = fixture.dispatch();
    fixture.after(1);
    fixture.after(contended());
    let just_left = fixture.submit(work(3)).info;
    let last = fixture.dispatch_one();
    fixture.ledger.drain(false, fixture.now);
    assert_eq!((is_stopped(&runs), last.cancel.is_cancelled()), (vec![false, true], false));
    fixture.after(contended());
    assert!(last.cancel.is_cancelled(), "its client had time to come back");
    assert!(matches!(
        error(&fixture.ledger.watch(&instance(), just_left.id).unwrap()),
        Error::Unavailable(_)
    ));
    assert_eq!(stage(&followed), Stage::Executing);
}
