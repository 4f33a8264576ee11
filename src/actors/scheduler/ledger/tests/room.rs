//! Tests of pools that count cores and memory instead of slots.

use super::*;
use crate::{actors::worker::messages::Account, limits::LimitRange};

fn asking(name: u64, cores: u64) -> Work {
    Work { cores, ..work(name) }
}

/// A pool of one slot whose tasks get this much memory.
fn pool_of(name: &str, memory: u64) -> PoolSpec {
    let mut spec = PoolSpec { name: name.into(), ..pool(1, "linux") };
    spec.limits.memory = LimitRange { default: memory, max: 0 };
    spec
}

fn out_of_memory() -> RunReport {
    let account = Account { out_of_memory: true, ..Account::default() };
    Ok(Box::new(RunResult { result: Default::default(), account }))
}

#[test]
fn a_pool_runs_as_many_tasks_as_have_room_in_it() {
    let mut fixture = Fixture::with_pools(vec![pool_with_room(4, "linux")]);
    let operations: Vec<_> =
        [(1, 2), (2, 0), (3, 0), (4, 0)].map(|(name, cores)| fixture.submit(asking(name, cores))).into();
    let running = fixture.dispatch();
    assert_eq!(running.len(), 3, "two cores for the first, one for each of the others");
    let status = fixture.ledger.explain(&instance(), operations[3].info.id, fixture.now).unwrap();
    assert!(
        status.reason.contains("it needs 1 core") && status.reason.contains("0 cores"),
        "{}",
        status.reason
    );
    fixture.finish(running[0].task, success());
    assert_eq!(fixture.dispatch().len(), 1);
}

#[test]
fn a_large_task_is_not_overtaken_by_small_ones_forever() {
    let mut fixture = Fixture::with_pools(vec![pool_with_room(4, "linux")]);
    (1..=4).for_each(|name| drop(fixture.submit(asking(name, 1))));
    let mut running: Vec<TaskId> = fixture.dispatch().iter().map(|run| run.task).collect();
    assert_eq!(running.len(), 4);
    let large = fixture.submit(asking(5, 4));
    // As soon as one small task ends, another one arrives.
    for name in 6.. {
        fixture.finish(running.remove(0), success());
        drop(fixture.submit(asking(name, 1)));
        running.extend(fixture.dispatch().iter().map(|run| run.task));
        if stage(&large) == Stage::Executing {
            break;
        }
        assert!(name < 10, "it waits for those that ran before it, and no others");
    }
    assert_eq!(running.len(), 1, "it has the pool for itself");
}

#[test]
fn room_is_returned_however_a_run_ends() {
    let mut fixture = Fixture::with_pools(vec![pool_with_room(2, "linux")]);
    let failure = || Err(RunFailure { retryable: true, ..RunFailure::new(Error::internal("bad luck")) });
    let _operation = fixture.submit(asking(1, 2));
    for _ in 1..settings().max_attempts {
        let run = fixture.dispatch_one();
        fixture.finish(run.task, failure());
    }
    let run = fixture.dispatch_one();
    fixture.end(run.task, RunEnd::Lost { pool_closed: false });
    let _next = fixture.submit(asking(2, 2));
    fixture.dispatch_one();
}

#[test]
fn a_task_that_ran_out_of_memory_is_tried_again_where_it_gets_more() {
    let gb = 1 << 30;
    let mut fixture = Fixture::with_pools(vec![pool_of("a", gb), pool_of("b", 4 * gb), pool_of("c", 2 * gb)]);
    let operation = fixture.submit(work(1));
    let mut pools = Vec::new();
    while stage(&operation) != Stage::Completed {
        let run = fixture.dispatch_one();
        pools.push(fixture.ledger.pool_name(run.pool).to_string());
        fixture.finish(run.task, out_of_memory());
    }
    assert_eq!(pools, ["a", "b"], "where there is no more, the first answer is the last");
    assert!(outcome(&operation).error.is_none() && outcome(&operation).result.is_some());
}

#[test]
fn a_task_whose_larger_pool_goes_away_runs_where_it_ran_before_and_a_smaller_one_is_not_offered_to_it() {
    let gb = 1 << 30;
    let mut fixture = Fixture::with_pools(vec![pool_of("a", 2 * gb), pool_of("b", 4 * gb)]);
    let operation = fixture.submit(work(1));
    let run = fixture.dispatch_one();
    assert_eq!(&*fixture.ledger.pool_name(run.pool), "a");
    fixture.finish(run.task, out_of_memory());
    fixture.ledger.add_pool(pool_of("c", gb), None).unwrap();
    let run = fixture.dispatch_one();
    assert_eq!(&*fixture.ledger.pool_name(run.pool), "b");
    fixture.ledger.remove_pool(run.pool, fixture.now).unwrap();
    fixture.finish(run.task, Err(RunFailure::new(Error::Cancelled("stopped".into()))));
    let run = fixture.dispatch_one();
    assert_eq!(&*fixture.ledger.pool_name(run.pool), "a", "there is no pool with more any more");
    fixture.finish(run.task, out_of_memory());
    assert!(outcome(&operation).error.is_none(), "{:?}", outcome(&operation));
}

#[test]
fn an_action_of_a_kind_that_ran_out_of_memory_goes_where_it_gets_more_if_both_are_free() {
    let gb = 1 << 30;
    let mut fixture = Fixture::with_pools(vec![pool_of("a", gb), pool_of("b", 4 * gb)]);
    let of = |name, target: &str| {
        let mut submit = submit(&work(name));
        submit.client.target_id = target.into();
        submit
    };
    let ran_in = |fixture: &mut Fixture, submit: Submit, name| {
        let _operation = fixture.try_submit(submit, resolution(&work(name), false)).unwrap();
        let run = fixture.dispatch_one();
        let pool = fixture.ledger.pool_name(run.pool).to_string();
        (run, pool)
    };
    let (run, pool) = ran_in(&mut fixture, of(1, "//large"), 1);
    assert_eq!(pool, "a");
    fixture.finish(run.task, out_of_memory());
    let run = fixture.dispatch_one();
    fixture.finish(run.task, success());
    let (large, pool) = ran_in(&mut fixture, of(2, "//large"), 2);
    assert_eq!(pool, "b");
    let (small, pool) = ran_in(&mut fixture, of(3, "//small"), 3);
    assert_eq!(pool, "a");
    fixture.finish(small.task, success());
    // The task does not wait for that pool while it is busy.
    let (_, pool) = ran_in(&mut fixture, of(4, "//large"), 4);
    assert_eq!(pool, "a");
    fixture.finish(large.task, success());
}
