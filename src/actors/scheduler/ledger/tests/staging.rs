//! Which waiting tasks have their inputs staged.

use super::{super::staging::MAX_STAGED_AHEAD, *};

/// A ledger with one pool of these slots, in which staging works.
fn staging(slots: usize) -> (Fixture, PoolId) {
    let mut fixture = Fixture::new(slots, settings());
    let pool = fixture.ledger.pools()[0].id;
    fixture.ledger.stage_ahead_in(pool);
    (fixture, pool)
}

impl Fixture {
    /// Submits these actions, and assigns what gets a slot.
    fn submit_each(&mut self, names: std::ops::Range<u64>) -> Vec<Subscription> {
        let submitted = names.map(|name| self.submit(work(name))).collect();
        self.dispatch();
        submitted
    }

    /// The name of the action whose inputs are staged next, and the order.
    fn staged(&mut self) -> Option<(u64, StagingOrder)> {
        let order = self.ledger.next_staging()?;
        let name = (1..100).find(|name| digest(&work(*name)) == order.action.digest)?;
        Some((name, order))
    }

    /// The names of all actions whose inputs are staged, one after the other.
    fn all_staged(&mut self, pool: PoolId) -> Vec<u64> {
        std::iter::from_fn(|| {
            let (name, _) = self.staged()?;
            self.ledger.staging_ended(pool);
            Some(name)
        })
        .collect()
    }
}

#[test]
fn the_tasks_near_the_front_are_staged_one_after_the_other_and_none_that_has_a_slot() {
    let (mut fixture, pool) = staging(2);
    let _free = fixture.submit_each(1..3);
    assert!(fixture.staged().is_none(), "both have slots");
    let _waiting = fixture.submit_each(3..8);
    assert_eq!(fixture.staged().unwrap().0, 3);
    assert!(fixture.staged().is_none(), "the pool is still busy with it");
    fixture.ledger.staging_ended(pool);
    assert_eq!(fixture.all_staged(pool), [4], "the others will wait longer");
    fixture.finish(TaskId(1), success());
    fixture.dispatch();
    assert_eq!(fixture.all_staged(pool), [5]);
}

#[test]
fn a_pool_with_many_slots_stages_for_a_bounded_number_of_tasks() {
    let (mut fixture, pool) = staging(20);
    let _operations = fixture.submit_each(1..60);
    let staged = fixture.all_staged(pool);
    assert_eq!((staged[0], staged.len()), (21, MAX_STAGED_AHEAD));
}

#[test]
fn an_order_is_stopped_when_its_task_gets_a_slot_and_cancelled_when_it_ends() {
    let (mut fixture, pool) = staging(1);
    let operations = fixture.submit_each(1..4);
    let (name, order) = fixture.staged().unwrap();
    assert_eq!((name, order.cancel.is_stopped()), (2, false));
    fixture.finish(TaskId(1), success());
    fixture.dispatch_one();
    assert!(order.cancel.is_stopped() && !order.cancel.is_cancelled());
    fixture.ledger.staging_ended(pool);
    let (name, waiting) = fixture.staged().unwrap();
    assert_eq!(name, 3);
    fixture.cancel(&operations[2]);
    assert!(waiting.cancel.is_cancelled());
    fixture.finish(TaskId(2), success());
    assert!(order.cancel.is_cancelled(), "the run that it was for is over");
}

#[test]
fn a_task_that_is_tried_again_is_not_staged_again() {
    let (mut fixture, pool) = staging(1);
    let _operations = fixture.submit_each(1..3);
    assert_eq!(fixture.all_staged(pool), [2]);
    fixture.finish(TaskId(1), success());
    fixture.dispatch_one();
    let lost = RunFailure { retryable: true, ..RunFailure::new(Error::internal("bad luck")) };
    fixture.finish(TaskId(2), Err(lost));
    assert_eq!((fixture.ledger.inspect().queued, fixture.all_staged(pool)), (1, vec![]));
}

#[test]
fn a_draining_pool_and_one_without_overlays_stage_nothing() {
    let (mut fixture, pool) = staging(1);
    let _operations = fixture.submit_each(1..3);
    fixture.ledger.drain_pool(pool).unwrap();
    assert!(fixture.staged().is_none());
    let other = PoolSpec { name: "plain".into(), ..super::pool(1, "linux") };
    let plain = fixture.ledger.add_pool(other, None).unwrap();
    let _more = fixture.submit_each(3..5);
    assert!(fixture.staged().is_none());
    fixture.ledger.stage_ahead_in(plain);
    assert!(fixture.staged().is_some());
}

#[test]
fn a_task_that_nobody_follows_is_not_staged() {
    let (mut fixture, pool) = staging(1);
    let mut operations = fixture.submit_each(1..3);
    let info = operations.pop().unwrap().info.clone();
    fixture.after(1);
    assert!(fixture.staged().is_none());
    let _back = fixture.ledger.watch(&instance(), info.id).unwrap();
    assert_eq!(fixture.all_staged(pool), [2]);
}
