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
    let mut desk = Desk::new(1, SchedulerSettings { max_attempts: 3, ..settings() });
    let (operation, _behind) = (desk.submit(work(1)), desk.submit(work(2)));
    let first = desk.dispatch_one();
    for attempt in 1..3 {
        assert_eq!(stage(&operation), Stage::Executing);
        let end = match attempt {
            1 => RunEnd::Lost { pool_closed: false },
            _ => RunEnd::Reported(Err(RunFailure {
                retryable: true,
                ..RunFailure::new(Error::internal("no file descriptors"))
            })),
        };
        desk.end(first.task, end);
        assert_eq!(stage(&operation), Stage::Queued);
        assert_eq!(desk.dispatch_one().task, first.task, "it does not go to the end of the queue");
    }
    desk.end(first.task, RunEnd::Lost { pool_closed: false });
    assert!(matches!(error(&operation), Error::Unavailable(_)));
    assert_eq!(desk.dispatch_one().action.digest, digest(&work(2)), "the slot serves the next one");
}

/// A slot that fails at once is free before all others. It must get neither the next task nor the same task again.
#[test]
fn a_slot_that_failed_its_task_is_used_after_all_others() {
    let mut desk = Desk::new(3, SchedulerSettings { max_attempts: 9, ..settings() });
    let _operation = desk.submit(work(1));
    let mut slots = Vec::new();
    for end in 0..3 {
        let run = desk.dispatch_one();
        slots.push(run.slot);
        let failure = || RunFailure { retryable: true, ..RunFailure::new(Error::internal("no memory")) };
        let end =
            if end == 0 { RunEnd::Lost { pool_closed: false } } else { RunEnd::Reported(Err(failure())) };
        desk.end(run.task, end);
    }
    slots.sort();
    slots.dedup();
    assert_eq!(slots.len(), 3, "each was tried once");
    let good = desk.dispatch_one();
    desk.finish(good.task, success());
    desk.submit(work(2));
    assert_eq!(desk.dispatch_one().slot, good.slot, "one that works is still warm");
}

/// EXE-45.
#[test]
fn a_fault_of_the_command_is_no_reason_to_try_again_and_its_logs_are_kept() {
    let mut desk = Desk::new(1, settings());
    let operation = desk.submit(work(1));
    let task = desk.dispatch_one().task;
    let late = Error::DeadlineExceeded("ran for 1 s".into());
    let logs = reapi::ActionResult { stdout_raw: b"hi".to_vec().into(), ..Default::default() };
    let failure = RunFailure { partial: Some(logs.clone().into()), ..RunFailure::new(late.clone()) };
    desk.finish(task, Err(failure));
    assert_eq!(error(&operation), late);
    assert_eq!(outcome(&operation).result.as_deref(), Some(&logs));
}

/// EXE-61, EXE-64: subscribers see only the streams of the latest attempt. The outcome has the log of every attempt
/// under a plain file name, however the operation ends.
#[test]
fn each_try_has_streams_and_an_account_of_its_own() {
    let mut desk = Desk::new(1, SchedulerSettings { max_attempts: 3, ..settings() });
    let operation = desk.submit(work(1));
    let streams = || operation.snapshots.borrow().logs;
    for attempt in 1..=3u32 {
        assert_eq!(streams(), None);
        let (task, at) = (desk.dispatch_one().task, desk.now.wall);
        desk.ledger.stage_reached(StageReached { task, attempt, stage: RunStage::Fetching, at, logs: None });
        assert_eq!(streams(), None, "nothing can be printed yet");
        let logs = Some(RunLogs(uuid::Uuid::from_u128(attempt.into())));
        desk.ledger.stage_reached(StageReached { task, attempt, stage: RunStage::Running, at, logs });
        assert_eq!((streams(), desk.submit(work(1)).snapshots.borrow().logs), (logs, logs));
        // The second worker died without a report.
        let log = (attempt != 2).then(|| digest(&work(100 + u64::from(attempt))));
        let account = Account { message: "m".into(), log, ..Account::default() };
        let error = Error::internal("the runner is gone");
        let failure = RunFailure { retryable: true, account: Box::new(account), ..RunFailure::new(error) };
        desk.finish(task, Err(failure));
    }
    assert_eq!(streams(), Some(RunLogs(uuid::Uuid::from_u128(3))), "the last ones stay");
    let log = |name: &str, n| ServerLog { name: name.into(), digest: digest(&work(n)) };
    assert_eq!(outcome(&operation).server_logs, [log("run-1.log", 101), log("run-3.log", 103)]);
}

/// EXE-62.
#[test]
fn a_pool_whose_workers_are_all_gone_ends_what_only_it_could_run() {
    let mut desk = Desk::new(2, settings());
    let operations = [1, 2, 3].map(|name| desk.submit(work(name)));
    let tasks: Vec<_> = desk.dispatch().into_iter().map(|assignment| assignment.task).collect();
    for task in tasks {
        desk.end(task, RunEnd::Lost { pool_closed: true });
    }
    assert!(operations.iter().all(|operation| matches!(error(operation), Error::Unavailable(_))));
    let refusal = desk.try_submit(submit(&work(4)), resolution(&work(4), false)).unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
    assert_eq!(desk.ledger.inspect().slots, 0);
}

/// OPS-03.
#[test]
fn cancelling_the_last_operation_stops_the_task_and_the_slot_waits_for_the_worker() {
    let mut desk = Desk::new(1, settings());
    let running = desk.submit(work(1));
    let assignment = desk.dispatch_one();
    let queued = desk.submit(work(2));
    desk.cancel(&queued);
    desk.cancel(&running);
    assert!(matches!((error(&running), error(&queued)), (Error::Cancelled(_), Error::Cancelled(_))));
    assert!(assignment.cancel.is_cancelled());
    let again = desk.submit(work(1));
    assert_eq!(stage(&again), Stage::Queued, "a dying run is not joined");
    assert!(desk.dispatch().is_empty(), "its slot is not free yet");
    desk.finish(assignment.task, success());
    assert_eq!(desk.dispatch().len(), 1);
    desk.cancel(&running);
    let unknown = OperationId::new(Default::default(), uuid::Uuid::from_u128(999));
    assert!(matches!(desk.ledger.cancel(&instance(), unknown, desk.now), Err(Error::NotFound(_))));
}

/// EXE-14.
#[test]
fn work_that_nobody_follows_stops_after_the_grace_unless_somebody_comes_back() {
    let grace = settings().abandon_grace.as_secs();
    let mut desk = Desk::new(2, settings());
    let followed = [1, 2].map(|name| desk.submit(work(name)));
    let assignments = desk.dispatch();
    let [lost, rescued] = followed.map(|operation| operation.info);
    desk.after(1);
    desk.after(grace - 1);
    let follower = desk.ledger.watch(&instance(), rescued.id).unwrap();
    desk.after(1);
    let cancelled: Vec<_> = assignments.iter().map(|assignment| assignment.cancel.is_cancelled()).collect();
    assert_eq!(cancelled, [true, false]);
    assert!(matches!(error(&desk.ledger.watch(&instance(), lost.id).unwrap()), Error::Cancelled(_)));
    drop(follower);
    desk.after(1);
    desk.after(grace - 1);
    assert!(!assignments[1].cancel.is_cancelled(), "the grace starts anew with each loss");
    desk.after(1);
    assert!(assignments[1].cancel.is_cancelled());
}

#[test]
fn a_task_that_waits_too_long_ends_with_an_error_that_is_not_taken_for_a_slow_command() {
    let mut desk = Desk::new(0, SchedulerSettings { concurrent_checks: 0, ..settings() });
    desk.ledger.slots = Slots::new(vec![pool(1, "linux")], Default::default());
    let operation = desk.submit(work(1));
    desk.after(3599);
    assert_eq!(stage(&operation), Stage::Queued);
    desk.after(1);
    assert!(matches!(error(&operation), Error::Exhausted { retry_after: Some(_), .. }));
}

/// EXE-62.
#[test]
fn a_run_that_never_answers_is_given_up_but_its_slot_is_not_used_meanwhile() {
    let mut desk = Desk::new(1, settings());
    let operation = desk.submit(work(1));
    let assignment = desk.dispatch_one();
    // Twice the transfer limit, the action's own timeout, and the slack.
    let limit = 2 * 1000 + 100 + settings().run_slack.as_secs();
    assert!(desk.after(limit - 1).is_empty());
    assert_eq!(stage(&operation), Stage::Executing);
    assert_eq!(desk.after(1).len(), 1);
    assert!(matches!(error(&operation), Error::Unavailable(_)));
    assert!(assignment.cancel.is_cancelled());
    let _next = desk.submit(work(2));
    assert!(desk.dispatch().is_empty());
    assert_eq!((desk.ledger.inspect().slots, desk.after(1).len()), (0, 0), "it is reported once");
    desk.finish(assignment.task, success());
    assert_eq!(desk.dispatch().len(), 1, "a worker that answers after all is welcome back");
    assert!(matches!(error(&operation), Error::Unavailable(_)), "but its answer comes too late");
}

/// EXE-12, EXE-13, EXE-14.
#[test]
fn finished_operations_are_remembered_for_a_time_and_in_a_number_that_are_bounded() {
    let mut desk = Desk::new(1, SchedulerSettings { retained_operations: 2, ..settings() });
    let mut done = Vec::new();
    for name in 1..=3 {
        done.push(desk.submit(work(name)).info);
        let task = desk.dispatch_one().task;
        desk.finish(task, success());
        desk.after(100);
    }
    let is_known = |desk: &mut Desk, index: usize| {
        let late = desk.ledger.watch(&instance(), done[index].id);
        late.is_ok_and(|late| outcome(&late).error.is_none())
    };
    assert!(!is_known(&mut desk, 0), "the oldest had to go");
    assert!(is_known(&mut desk, 1) && is_known(&mut desk, 2));
    desk.after(399);
    assert!(is_known(&mut desk, 1));
    desk.after(1);
    assert!(!is_known(&mut desk, 1) && is_known(&mut desk, 2), "ten minutes are over for one of them");
}

/// EXE-14: results count by the memory that they take.
#[test]
fn finished_operations_are_bounded_in_bytes_too() {
    let link = reapi::OutputSymlink { path: "l".into(), ..Default::default() };
    let long = reapi::ActionResult { output_symlinks: vec![link; 100], ..Default::default() };
    let long = SharedResult::new(long);
    let (retained_bytes, retained_cached_bytes) = (long.memory() * 5 / 2, long.memory() * 3 / 2);
    let settings = SchedulerSettings { retained_bytes, retained_cached_bytes, ..settings() };
    let mut desk = Desk::new(1, settings);
    let hits: Vec<_> = (1..4)
        .map(|name| desk.try_submit(submit(&work(name)), Resolution::Cached(long.clone())).unwrap())
        .collect();
    let runs: Vec<_> = (11..15)
        .map(|name| {
            let operation = desk.submit(work(name));
            let task = desk.dispatch_one().task;
            let result = RunResult { result: long.clone(), account: Default::default() };
            desk.finish(task, Ok(Box::new(result)));
            operation
        })
        .collect();
    let mut known = |operations: &[Subscription]| -> Vec<bool> {
        operations.iter().map(|one| desk.ledger.watch(&instance(), one.info.id).is_ok()).collect()
    };
    assert_eq!(known(&hits), [false, false, true]);
    assert_eq!(known(&runs), [false, false, true, true]);
    assert!(
        outcome(&runs[0]).result.is_some(),
        "a follower of an operation that was forgotten has its outcome"
    );
    desk.ledger.forget(&instance(), runs[3].info.id).unwrap();
    desk.ledger.forget(&instance(), runs[2].info.id).unwrap();
    assert_eq!(desk.ledger.inspect().operations, 1);
    let mut huge = submit(&work(20));
    huge.inline.output_files = vec!["x".repeat(2 * long.memory())];
    let hit = desk.try_submit(huge, Resolution::Cached(long)).unwrap();
    assert!(desk.ledger.watch(&instance(), hit.info.id).is_ok(), "the latest is kept whatever it weighs");
    assert_eq!(desk.ledger.inspect().operations, 1);
    let missing = Error::MissingBlobs(vec![digest(&work(1)); 10_000]);
    for name in 31..34 {
        desk.try_submit(submit(&work(name)), Resolution::Unusable(missing.clone())).unwrap();
    }
    assert_eq!(desk.ledger.inspect().operations, 2, "long errors count by their length too");
}

/// EXE-62: the removal of a pool is not a failure of the action, even if the run does not stop.
#[test]
fn what_ran_in_a_removed_pool_is_tried_elsewhere_and_loses_no_attempt() {
    let mut desk = Desk::new(1, SchedulerSettings { max_attempts: 1, ..settings() });
    let operation = desk.submit(work(1));
    let mut runs = Vec::new();
    for stops in [true, false, true] {
        let run = desk.dispatch_one();
        let name = format!("replacement-{}", runs.len());
        desk.ledger.add_pool(PoolSpec { name, ..pool(1, "linux") }).unwrap();
        desk.ledger.remove_pool(run.pool, desk.now).unwrap();
        assert!(run.cancel.is_cancelled());
        if stops {
            desk.finish(run.task, Err(RunFailure::new(Error::Cancelled("stopped".into()))));
        } else {
            assert_eq!(desk.after(settings().stop_grace.as_secs()).len(), 0, "no slot is lost with it");
        }
        assert_eq!(stage(&operation), Stage::Queued);
        runs.push(run);
    }
    let run = desk.dispatch_one();
    for late in &runs {
        let (at, logs) = (desk.now.wall, None);
        let stage = RunStage::Uploading;
        desk.ledger.stage_reached(StageReached { task: late.task, attempt: late.attempt, stage, at, logs });
        desk.ledger.finish(late.task, late.attempt, RunEnd::Lost { pool_closed: true }, desk.now);
    }
    assert_eq!(operation.snapshots.borrow().run_stage.unwrap().0, RunStage::Fetching);
    desk.end(run.task, RunEnd::Lost { pool_closed: false });
    assert!(matches!(error(&operation), Error::Unavailable(_)), "this one counts");
}

#[test]
fn deleting_forgets_finished_operations_only() {
    let mut desk = Desk::new(1, settings());
    let id = desk.submit(work(1)).info.id;
    assert!(matches!(desk.ledger.forget(&instance(), id), Err(Error::Precondition(_))));
    desk.ledger.cancel(&instance(), id, desk.now).unwrap();
    desk.ledger.forget(&instance(), id).unwrap();
    assert!(matches!(desk.ledger.forget(&instance(), id), Err(Error::NotFound(_))));
}

/// EXE-10.
#[test]
fn draining_refuses_new_work_finishes_the_rest_or_ends_it_retryably() {
    let mut desk = Desk::new(1, settings());
    let (running, queued) = (desk.submit(work(1)), desk.submit(work(2)));
    let first = desk.dispatch_one();
    desk.ledger.drain(false, desk.now);
    let refusal = desk.try_submit(submit(&work(1)), resolution(&work(1), true)).unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
    desk.finish(first.task, success());
    assert!(outcome(&running).error.is_none());
    let second = desk.dispatch_one();
    desk.ledger.drain(true, desk.now);
    assert!(matches!(error(&queued), Error::Unavailable(_)));
    assert!(second.cancel.is_cancelled());
    assert!(!desk.ledger.is_idle(), "the command still has to be killed");
    let stop_grace = settings().stop_grace.as_secs();
    desk.after(stop_grace);
    assert!(desk.ledger.is_idle(), "but nobody waits for ever");
}
