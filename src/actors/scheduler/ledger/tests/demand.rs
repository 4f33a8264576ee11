//! Tests of the measurements of pools.

use super::*;

fn named(name: &str) -> PoolSpec {
    PoolSpec { name: name.into(), ..pool(1, "linux") }
}

/// The number of waiting tasks, the age of the oldest in seconds, and the desired slots of each pool.
fn numbers(fixture: &Fixture) -> Vec<(String, usize, Option<u64>, usize)> {
    let of = |pool: PoolMeasurement| {
        let oldest = pool.oldest.map(|age| age.as_secs());
        (pool.status.name.to_string(), pool.waiting, oldest, pool.desired)
    };
    fixture.ledger.measure(fixture.now).into_iter().map(of).collect()
}

#[test]
fn a_waiting_action_counts_once_where_it_would_run_first_and_moves_when_that_pool_drains() {
    let mut fixture = Fixture::with_pools(vec![named("a"), named("b")]);
    let at = |name: &str, waiting, oldest, desired| (name.to_owned(), waiting, oldest, desired);
    assert_eq!(numbers(&fixture), [at("a", 0, None, 0), at("b", 0, None, 0)]);
    let operations: Vec<_> = (0..4).map(|name| fixture.submit(work(name))).collect();
    // Tasks count even before their inputs were checked.
    assert_eq!(numbers(&fixture), [at("a", 4, Some(0), 4), at("b", 0, None, 0)]);
    let running = fixture.dispatch();
    assert_eq!(running.len(), 2);
    fixture.after(5);
    assert_eq!(numbers(&fixture), [at("a", 2, Some(5), 3), at("b", 0, None, 1)]);
    let first = fixture.ledger.pools()[0].id;
    fixture.ledger.drain_pool(first).unwrap();
    assert_eq!(numbers(&fixture), [at("a", 0, None, 1), at("b", 2, Some(5), 3)]);
    fixture.cancel(&operations[2]);
    assert_eq!(numbers(&fixture), [at("a", 0, None, 1), at("b", 1, Some(5), 2)]);
    for run in running {
        fixture.finish(run.task, success());
    }
    assert_eq!(numbers(&fixture), [at("a", 0, None, 0), at("b", 1, Some(5), 1)]);
}

#[test]
fn a_run_that_neither_ends_nor_stops_takes_a_slot_and_is_no_demand() {
    let mut fixture = Fixture::with_pools(vec![named("a")]);
    fixture.submit(work(1));
    let run = fixture.dispatch_one();
    assert_eq!(fixture.after(1_000_000).len(), 1, "its slot is out of service");
    let status = |fixture: &Fixture| fixture.ledger.pools()[0].clone();
    assert_eq!((status(&fixture).busy, status(&fixture).stuck), (1, 1));
    assert_eq!((numbers(&fixture)[0].3, fixture.ledger.inspect().slots), (0, 0));
    fixture.finish(run.task, success());
    assert_eq!((status(&fixture).busy, status(&fixture).stuck), (0, 0), "the worker has answered after all");
    assert_eq!(fixture.ledger.inspect().slots, 1);
}
