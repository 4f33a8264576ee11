//! Tests of work without followers, and of the work that it makes way for.

use super::*;

/// How many seconds work without followers continues if other work waits.
fn contended() -> u64 {
    settings().contended_abandon_grace.as_secs()
}

fn is_stopped(runs: &[Assignment]) -> Vec<bool> {
    runs.iter().map(|run| run.cancel.is_cancelled()).collect()
}

/// EXE-14. Two interrupted actions on two slots, and one tiny action of the next build.
#[test]
fn the_run_that_was_left_first_makes_way_for_one_that_waits_and_the_other_goes_on() {
    let mut desk = Desk::new(2, settings());
    let (first, second) = (desk.submit(work(1)), desk.submit(work(2)));
    let runs = desk.dispatch();
    let second_info = second.info.clone();
    drop(second);
    desk.after(1);
    let first_info = first.info.clone();
    drop(first);
    desk.after(1);
    desk.after(contended());
    assert_eq!(is_stopped(&runs), [false, false], "nobody else wants their slots");
    let next = desk.submit(work(3));
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true]);
    let gone = desk.ledger.watch(&instance(), second_info.id).unwrap();
    assert!(matches!(error(&gone), Error::Unavailable(_)), "its client is told to execute it again");
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true], "no more of them than tasks wait");
    desk.finish(runs[1].task, success());
    assert_eq!(desk.dispatch_one().action.digest, digest(&work(3)));
    let back = desk.ledger.watch(&instance(), first_info.id).unwrap();
    let _third = desk.submit(work(4));
    desk.after(contended() + 1);
    assert!(desk.dispatch().is_empty());
    assert_eq!(
        (stage(&back), is_stopped(&runs)[0]),
        (Stage::Executing, false),
        "a client that is back keeps its slot"
    );
    drop(next);
}

/// EXE-14: work is not lost because a connection breaks.
#[test]
fn a_client_that_comes_back_within_the_short_grace_finds_its_work_although_others_wait() {
    let mut desk = Desk::new(1, settings());
    let followed = desk.submit(work(1));
    let runs = desk.dispatch();
    let info = followed.info.clone();
    drop(followed);
    let _waiting = desk.submit(work(2));
    desk.after(1);
    desk.after(contended() - 1);
    assert!(desk.dispatch().is_empty());
    let back = desk.ledger.watch(&instance(), info.id).unwrap();
    desk.after(60);
    assert!(desk.dispatch().is_empty());
    assert_eq!((stage(&back), is_stopped(&runs)), (Stage::Executing, vec![false]));
    drop(back);
    desk.after(1);
    desk.after(contended());
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [true], "the grace starts anew with each loss");
}

#[test]
fn a_waiting_task_that_nobody_follows_is_behind_all_others_and_makes_nobody_go() {
    let mut desk = Desk::new(1, settings());
    let running = desk.submit(work(1));
    let run = desk.dispatch_one();
    let left = desk.submit(work(2)).info;
    let _followed = desk.submit_at(work(3), 7);
    assert!(desk.dispatch().is_empty());
    desk.finish(run.task, success());
    // The ledger has not checked the followers since.
    let run = desk.dispatch_one();
    assert_eq!(run.action.digest, digest(&work(3)));
    desk.finish(run.task, success());
    let run = desk.dispatch_one();
    assert_eq!(run.action.digest, digest(&work(2)), "a free slot is of no use to anybody else");
    // It started long after it lost its followers, and makes way as soon as other work waits.
    desk.after(contended());
    let another = desk.submit(work(4)).info;
    desk.after(contended());
    assert!(desk.dispatch().is_empty());
    assert!(!run.cancel.is_cancelled(), "what nobody follows does not count as waiting");
    let _back = desk.ledger.watch(&instance(), another.id).unwrap();
    assert!(desk.dispatch().is_empty());
    assert!(run.cancel.is_cancelled());
    assert!(matches!(error(&desk.ledger.watch(&instance(), left.id).unwrap()), Error::Unavailable(_)));
    drop(running);
}

#[test]
fn runs_of_other_pools_do_not_make_way() {
    let mut desk = Desk {
        ledger: ledger_with(settings(), &[(1, "linux"), (1, "plan9")]),
        now: ClockReading::now(),
        next_id: 1,
    };
    let of = |name, family| Work { platform: Some(family), ..work(name) };
    desk.submit(of(1, "linux"));
    desk.submit(of(2, "plan9"));
    let runs = desk.dispatch();
    let _waiting = desk.submit(of(3, "plan9"));
    desk.after(1);
    desk.after(contended());
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false, true]);
}

/// A followed operation keeps a task alive that other clients have left.
#[test]
fn a_task_is_followed_as_long_as_one_of_its_operations_is() {
    let mut desk = Desk::new(1, settings());
    drop(desk.submit(work(1)));
    let follower = desk.submit(work(1));
    let runs = desk.dispatch();
    let _waiting = desk.submit(work(2));
    desk.after(1);
    desk.after(contended());
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false]);
    desk.cancel(&follower);
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [false], "it has been left only now");
    desk.after(contended());
    assert!(desk.dispatch().is_empty());
    assert_eq!(is_stopped(&runs), [true]);
}

/// EXE-10.
#[test]
fn a_server_that_stops_ends_what_nobody_follows_and_finishes_the_rest() {
    let mut desk = Desk::new(3, settings());
    let followed = desk.submit(work(1));
    let _left = desk.submit(work(2)).info;
    let runs = desk.dispatch();
    desk.after(1);
    desk.after(contended());
    let just_left = desk.submit(work(3)).info;
    let last = desk.dispatch_one();
    desk.ledger.drain(false, desk.now);
    assert_eq!((is_stopped(&runs), last.cancel.is_cancelled()), (vec![false, true], false));
    desk.after(contended());
    assert!(last.cancel.is_cancelled(), "its client had time to come back");
    assert!(matches!(error(&desk.ledger.watch(&instance(), just_left.id).unwrap()), Error::Unavailable(_)));
    assert_eq!(stage(&followed), Stage::Executing);
}
