//! Tests of the measurements of pools.

use super::*;

fn named(name: &str) -> PoolSpec {
    PoolSpec { name: name.into(), ..pool(1, "linux") }
}

/// The number of waiting tasks, the age of the oldest in seconds, and the desired slots of each pool.
fn numbers(desk: &Desk) -> Vec<(String, usize, Option<u64>, usize)> {
    let of = |pool: PoolMeasurement| {
        let oldest = pool.oldest.map(|age| age.as_secs());
        (pool.status.name.to_string(), pool.waiting, oldest, pool.desired)
    };
    desk.ledger.measure(desk.now).into_iter().map(of).collect()
}

#[test]
fn a_waiting_action_counts_once_where_it_would_run_first_and_moves_when_that_pool_drains() {
    let mut desk = Desk::with_pools(vec![named("a"), named("b")]);
    let at = |name: &str, waiting, oldest, desired| (name.to_owned(), waiting, oldest, desired);
    assert_eq!(numbers(&desk), [at("a", 0, None, 0), at("b", 0, None, 0)]);
    let operations: Vec<_> = (0..4).map(|name| desk.submit(work(name))).collect();
    // Tasks count even before their inputs were checked.
    assert_eq!(numbers(&desk), [at("a", 4, Some(0), 4), at("b", 0, None, 0)]);
    let running = desk.dispatch();
    assert_eq!(running.len(), 2);
    desk.after(5);
    assert_eq!(numbers(&desk), [at("a", 2, Some(5), 3), at("b", 0, None, 1)]);
    let first = desk.ledger.pools()[0].id;
    desk.ledger.drain_pool(first).unwrap();
    assert_eq!(numbers(&desk), [at("a", 0, None, 1), at("b", 2, Some(5), 3)]);
    desk.cancel(&operations[2]);
    assert_eq!(numbers(&desk), [at("a", 0, None, 1), at("b", 1, Some(5), 2)]);
    for run in running {
        desk.finish(run.task, success());
    }
    assert_eq!(numbers(&desk), [at("a", 0, None, 0), at("b", 1, Some(5), 1)]);
}

#[test]
fn a_run_that_neither_ends_nor_stops_takes_a_slot_and_is_no_demand() {
    let mut desk = Desk::with_pools(vec![named("a")]);
    desk.submit(work(1));
    let run = desk.dispatch_one();
    assert_eq!(desk.after(1_000_000).len(), 1, "its slot is out of service");
    let status = |desk: &Desk| desk.ledger.pools()[0].clone();
    assert_eq!((status(&desk).busy, status(&desk).stuck), (1, 1));
    assert_eq!((numbers(&desk)[0].3, desk.ledger.inspect().slots), (0, 0));
    desk.finish(run.task, success());
    assert_eq!((status(&desk).busy, status(&desk).stuck), (0, 0), "the worker has answered after all");
    assert_eq!(desk.ledger.inspect().slots, 1);
}
