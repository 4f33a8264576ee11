//! Tests of the ways in which work ends: lost workers, cancellation, deadlines, forgetting, shutdown.

use super::*;
use crate::{
    actors::{scheduler::operation::ServerLog, worker::messages::Account},
    log_streams::run::RunLogs,
    result::SharedResult,
};

/// EXE-62.
#[test]
fn a_lost_worker_means_another_try_in_the_old_place_and_not_for_ever() {
    let mut fixture = Fixture::new(1, SchedulerSettings { max_attempts: 3, ..settings() });
    let (operation, _behind) = (fixture.submit(work(1)), fixture.submit(work(2)));
    let first = fixture.dispatch_one();
    for attempt in 1..3 {
        assert_eq!(stage(&operation), Stage::Executing);
        let end = match attempt {
            1 => RunEnd::Lost { pool_closed: false },
            _ => RunEnd::Reported(Err(RunFailure {
                retryable: true,
                ..RunFailure::new(Error::internal("no file descriptors"))
            })),
        };
        fixture.end(first.task, end);
        assert_eq!(stage(&operation), Stage::Queued);
        assert_eq!(fixture.dispatch_one().task, first.task, "it does not go to the end of the queue");
    }
    fixture.end(first.task, RunEnd::Lost { pool_closed: false });
    assert!(matches!(error(&operation), Error::Unavailable(_)));
    assert_eq!(fixture.dispatch_one().action.digest, digest(&work(2)), "the slot serves the next one");
}

/// A slot that fails at once is free before all others. It must get neither the next task nor the same task again.
#[test]
fn a_slot_that_failed_its_task_is_used_after_all_others() {
    let mut fixture = Fixture::new(3, SchedulerSettings { max_attempts: 9, ..settings() });
    let _operation = fixture.submit(work(1));
    let mut slots = Vec::new();
    for end in 0..3 {
        let run = fixture.dispatch_one();
        slots.push(run.slot);
        let failure = || RunFailure { retryable: true, ..RunFailure::new(Error::internal("no memory")) };
        let end =
            if end == 0 { RunEnd::Lost { pool_closed: false } } else { RunEnd::Reported(Err(failure())) };
        fixture.end(run.task, end);
    }
    slots.sort();
    slots.dedup();
    assert_eq!(slots.len(), 3, "each was tried once");
    let good = fixture.dispatch_one();
    fixture.finish(good.task, success());
    fixture.submit(work(2));
    assert_eq!(fixture.dispatch_one().slot, good.slot, "one that works is still warm");
}

/// EXE-45.
#[test]
fn a_fault_of_the_command_is_no_reason_to_try_again_and_its_logs_are_kept() {
    let mut fixture = Fixture::new(1, settings());
    let operation = fixture.submit(work(1));
    let task = fixture.dispatch_one().task;
    let late = Error::DeadlineExceeded("ran for 1 s".into());
    let logs = reapi::ActionResult { stdout_raw: b"hi".to_vec().into(), ..Default::default() };
    let failure = RunFailure { partial: Some(logs.clone().into()), ..RunFailure::new(late.clone()) };
    fixture.finish(task, Err(failure));
    assert_eq!(error(&operation), late);
    assert_eq!(outcome(&operation).result.as_deref(), Some(&logs));
}

/// EXE-61, EXE-64: subscribers see only the streams of the latest attempt. The outcome has the log of every attempt
/// under a plain file name, however the operation ends.
#[test]
fn each_try_has_streams_and_an_account_of_its_own() {
    let mut fixture = Fixture::new(1, SchedulerSettings { max_attempts: 3, ..settings() });
    let operation = fixture.submit(work(1));
    let streams = || operation.snapshots.borrow().logs;
    for attempt in 1..=3u32 {
        assert_eq!(streams(), None);
        let (task, at) = (fixture.dispatch_one().task, fixture.now.wall);
        fixture.ledger.stage_reached(StageReached {
            task,
            attempt,
            stage: RunStage::Fetching,
            at,
            logs: None,
        });
        assert_eq!(streams(), None, "nothing can be printed yet");
        let logs = Some(RunLogs(uuid::Uuid::from_u128(attempt.into())));
        fixture.ledger.stage_reached(StageReached { task, attempt, stage: RunStage::Running, at, logs });
        assert_eq!((streams(), fixture.submit(work(1)).snapshots.borrow().logs), (logs, logs));
        // The second worker died without a report.
        let log = (attempt != 2).then(|| digest(&work(100 + u64::from(attempt))));
        let account = Account { message: "m".into(), log, ..Account::default() };
        let error = Error::internal("the runner is gone");
        let failure = RunFailure { retryable: true, account: Box::new(account), ..RunFailure::new(error) };
        fixture.finish(task, Err(failure));
    }
    assert_eq!(streams(), Some(RunLogs(uuid::Uuid::from_u128(3))), "the last ones stay");
    let log = |name: &str, n| ServerLog { name: name.into(), digest: digest(&work(n)) };
    assert_eq!(outcome(&operation).server_logs, [log("run-1.log", 101), log("run-3.log", 103)]);
}

/// EXE-62.
#[test]
fn a_pool_whose_workers_are_all_gone_ends_what_only_it_could_run() {
    let mut fixture = Fixture::new(2, settings());
    let operations = [1, 2, 3].map(|name| fixture.submit(work(name)));
    let tasks: Vec<_> = fixture.dispatch().into_iter().map(|assignment| assignment.task).collect();
    for task in tasks {
        fixture.end(task, RunEnd::Lost { pool_closed: true });
    }
    assert!(operations.iter().all(|operation| matches!(error(operation), Error::Unavailable(_))));
    let refusal = fixture.try_submit(submit(&work(4)), resolution(&work(4), false)).unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
    assert_eq!(fixture.ledger.inspect().slots, 0);
}

/// OPS-03.
#[test]
fn cancelling_the_last_operation_stops_the_task_and_the_slot_waits_for_the_worker() {
    let mut fixture = Fixture::new(1, settings());
    let running = fixture.submit(work(1));
    let assignment = fixture.dispatch_one();
    let queued = fixture.submit(work(2));
    fixture.cancel(&queued);
    fixture.cancel(&running);
    assert!(matches!((error(&running), error(&queued)), (Error::Cancelled(_), Error::Cancelled(_))));
    assert!(assignment.cancel.is_cancelled());
    let again = fixture.submit(work(1));
    assert_eq!(stage(&again), Stage::Queued, "a dying run is not joined");
    assert!(fixture.dispatch().is_empty(), "its slot is not free yet");
    fixture.finish(assignment.task, success());
    assert_eq!(fixture.dispatch().len(), 1);
    fixture.cancel(&running);
    let unknown = OperationId::new(Default::default(), uuid::Uuid::from_u128(999));
    assert!(matches!(fixture.ledger.cancel(&instance(), unknown, fixture.now), Err(Error::NotFound(_))));
}

/// EXE-14.
#[test]
fn a_task_without_followers_stops_after_the_grace_unless_a_follower_returns() {
    let grace = settings().abandon_grace.as_secs();
    let mut fixture = Fixture::new(2, settings());
    let followed = [1, 2].map(|name| fixture.submit(work(name)));
    let assignments = fixture.dispatch();
    let [lost, rescued] = followed.map(|operation| operation.info);
    fixture.after(1);
    fixture.after(grace - 1);
    let follower = fixture.ledger.watch(&instance(), rescued.id).unwrap();
    fixture.after(1);
    let cancelled: Vec<_> = assignments.iter().map(|assignment| assignment.cancel.is_cancelled()).collect();
    assert_eq!(cancelled, [true, false]);
    assert!(matches!(error(&fixture.ledger.watch(&instance(), lost.id).unwrap()), Error::Cancelled(_)));
    drop(follower);
    fixture.after(1);
    fixture.after(grace - 1);
    assert!(!assignments[1].cancel.is_cancelled(), "the grace starts anew with each loss");
    fixture.after(1);
    assert!(assignments[1].cancel.is_cancelled());
}

#[test]
fn a_task_that_waits_too_long_ends_with_an_error_that_is_not_taken_for_a_slow_command() {
    let mut fixture = Fixture::new(0, SchedulerSettings { concurrent_checks: 0, ..settings() });
    fixture.ledger.slots = Slots::new(vec![pool(1, "linux")], Default::default());
    let operation = fixture.submit(work(1));
    fixture.after(3599);
    assert_eq!(stage(&operation), Stage::Queued);
    fixture.after(1);
    assert!(matches!(error(&operation), Error::Exhausted { retry_after: Some(_), .. }));
}

/// EXE-62.
#[test]
fn a_run_that_never_answers_is_given_up_but_its_slot_is_not_used_meanwhile() {
    let mut fixture = Fixture::new(1, settings());
    let operation = fixture.submit(work(1));
    let assignment = fixture.dispatch_one();
    // Twice the transfer limit, the action's own timeout, and the slack.
    let limit = 2 * 1000 + 100 + settings().run_slack.as_secs();
    assert!(fixture.after(limit - 1).is_empty());
    assert_eq!(stage(&operation), Stage::Executing);
    assert_eq!(fixture.after(1).len(), 1);
    assert!(matches!(error(&operation), Error::Unavailable(_)));
    assert!(assignment.cancel.is_cancelled());
    let _next = fixture.submit(work(2));
    assert!(fixture.dispatch().is_empty());
    assert_eq!((fixture.ledger.inspect().slots, fixture.after(1).len()), (0, 0), "it is reported once");
    fixture.finish(assignment.task, success());
    assert_eq!(fixture.dispatch().len(), 1, "a worker that answers after all is welcome back");
    assert!(matches!(error(&operation), Error::Unavailable(_)), "but its answer comes too late");
}

/// EXE-12, EXE-13, EXE-14.
#[test]
fn finished_operations_are_remembered_for_a_time_and_in_a_number_that_are_bounded() {
    let mut fixture = Fixture::new(1, SchedulerSettings { retained_operations: 2, ..settings() });
    let mut done = Vec::new();
    for name in 1..=3 {
        done.push(fixture.submit(work(name)).info);
        let task = fixture.dispatch_one().task;
        fixture.finish(task, success());
        fixture.after(100);
    }
    let is_known = |fixture: &mut Fixture, index: usize| {
        let late = fixture.ledger.watch(&instance(), done[index].id);
        late.is_ok_and(|late| outcome(&late).error.is_none())
    };
    assert!(!is_known(&mut fixture, 0), "the oldest had to go");
    assert!(is_known(&mut fixture, 1) && is_known(&mut fixture, 2));
    fixture.after(399);
    assert!(is_known(&mut fixture, 1));
    fixture.after(1);
    assert!(!is_known(&mut fixture, 1) && is_known(&mut fixture, 2), "ten minutes are over for one of them");
}

/// EXE-14: results count by the memory that they take.
#[test]
fn finished_operations_are_bounded_in_bytes_too() {
    let link = reapi::OutputSymlink { path: "l".into(), ..Default::default() };
    let long = reapi::ActionResult { output_symlinks: vec![link; 100], ..Default::default() };
    let long = SharedResult::new(long);
    let (retained_bytes, retained_cached_bytes) = (long.memory() * 5 / 2, long.memory() * 3 / 2);
    let settings = SchedulerSettings { retained_bytes, retained_cached_bytes, ..settings() };
    let mut fixture = Fixture::new(1, settings);
    let hits: Vec<_> = (1..4)
        .map(|name| fixture.try_submit(submit(&work(name)), Resolution::Cached(long.clone())).unwrap())
        .collect();
    let runs: Vec<_> = (11..15)
        .map(|name| {
            let operation = fixture.submit(work(name));
            let task = fixture.dispatch_one().task;
            let result = RunResult { result: long.clone(), account: Default::default() };
            fixture.finish(task, Ok(Box::new(result)));
            operation
        })
        .collect();
    let mut known = |operations: &[Subscription]| -> Vec<bool> {
        operations.iter().map(|one| fixture.ledger.watch(&instance(), one.info.id).is_ok()).collect()
    };
    assert_eq!(known(&hits), [false, false, true]);
    assert_eq!(known(&runs), [false, false, true, true]);
    assert!(
        outcome(&runs[0]).result.is_some(),
        "a follower of an operation that was forgotten has its outcome"
    );
    fixture.ledger.forget(&instance(), runs[3].info.id).unwrap();
    fixture.ledger.forget(&instance(), runs[2].info.id).unwrap();
    assert_eq!(fixture.ledger.inspect().operations, 1);
    let mut huge = submit(&work(20));
    huge.inline.output_files = vec!["x".repeat(2 * long.memory())];
    let hit = fixture.try_submit(huge, Resolution::Cached(long)).unwrap();
    assert!(fixture.ledger.watch(&instance(), hit.info.id).is_ok(), "the latest is kept whatever it weighs");
    assert_eq!(fixture.ledger.inspect().operations, 1);
    let missing = Error::MissingBlobs(vec![digest(&work(1)); 10_000]);
    for name in 31..34 {
        fixture.try_submit(submit(&work(name)), Resolution::Unusable(missing.clone())).unwrap();
    }
    assert_eq!(fixture.ledger.inspect().operations, 2, "long errors count by their length too");
}

/// EXE-62: the removal of a pool is not a failure of the action, even if the run does not stop.
#[test]
fn runs_of_a_removed_pool_are_retried_elsewhere_and_lose_no_attempt() {
    let mut fixture = Fixture::new(1, SchedulerSettings { max_attempts: 1, ..settings() });
    let operation = fixture.submit(work(1));
    let mut runs = Vec::new();
    for stops in [true, false, true] {
        let run = fixture.dispatch_one();
        let name = format!("replacement-{}", runs.len());
        fixture.ledger.add_pool(PoolSpec { name, ..pool(1, "linux") }, None).unwrap();
        fixture.ledger.remove_pool(run.pool, fixture.now).unwrap();
        assert!(run.cancel.is_cancelled());
        if stops {
            fixture.finish(run.task, Err(RunFailure::new(Error::Cancelled("stopped".into()))));
        } else {
            assert_eq!(fixture.after(settings().stop_grace.as_secs()).len(), 0, "no slot is lost with it");
        }
        assert_eq!(stage(&operation), Stage::Queued);
        runs.push(run);
    }
    let run = fixture.dispatch_one();
    for late in &runs {
        let (at, logs) = (fixture.now.wall, None);
        let stage = RunStage::Uploading;
        fixture.ledger.stage_reached(StageReached {
            task: late.task,
            attempt: late.attempt,
            stage,
            at,
            logs,
        });
        fixture.ledger.finish(late.task, late.attempt, RunEnd::Lost { pool_closed: true }, fixture.now);
    }
    assert_eq!(operation.snapshots.borrow().run_stage.unwrap().0, RunStage::Fetching);
    fixture.end(run.task, RunEnd::Lost { pool_closed: false });
    assert!(matches!(error(&operation), Error::Unavailable(_)), "this one counts");
}

#[test]
fn deleting_forgets_finished_operations_only() {
    let mut fixture = Fixture::new(1, settings());
    let id = fixture.submit(work(1)).info.id;
    assert!(matches!(fixture.ledger.forget(&instance(), id), Err(Error::Precondition(_))));
    fixture.ledger.cancel(&instance(), id, fixture.now).unwrap();
    fixture.ledger.forget(&instance(), id).unwrap();
    assert!(matches!(fixture.ledger.forget(&instance(), id), Err(Error::NotFound(_))));
}

/// EXE-10.
#[test]
fn draining_refuses_new_work_finishes_the_rest_or_ends_it_retryably() {
    let mut fixture = Fixture::new(1, settings());
    let (running, queued) = (fixture.submit(work(1)), fixture.submit(work(2)));
    let first = fixture.dispatch_one();
    fixture.ledger.drain(false, fixture.now);
    let refusal = fixture.try_submit(submit(&work(1)), resolution(&work(1), true)).unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
    fixture.finish(first.task, success());
    assert!(outcome(&running).error.is_none());
    let second = fixture.dispatch_one();
    fixture.ledger.drain(true, fixture.now);
    assert!(matches!(error(&queued), Error::Unavailable(_)));
    assert!(second.cancel.is_cancelled());
    assert!(!fixture.ledger.is_idle(), "the command still has to be killed");
    let stop_grace = settings().stop_grace.as_secs();
    fixture.after(stop_grace);
    assert!(fixture.ledger.is_idle(), "but nobody waits for ever");
}
