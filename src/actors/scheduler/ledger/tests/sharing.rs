//! Tests of pools and builds: which task gets which slot, and what waiting clients are told.

use super::*;
use crate::{
    actors::scheduler::slots::PoolSpec,
    caller::Caller,
    platform::{Offer, UnknownProperties},
};
fn exact(value: &str) -> Offer {
    Offer::Exact(value.into())
}

fn pool_of(name: &str, slots: usize, offers: &[(&str, Offer)]) -> PoolSpec {
    let offers = offers.iter().map(|(name, offer)| ((*name).to_owned(), offer.clone())).collect();
    PoolSpec { name: name.into(), offers, ..pool(slots, "") }
}

/// A ledger with a small pool for any action, and a pool for actions that need a GPU.
fn two_pools(settings: SchedulerSettings) -> Fixture {
    let plain = pool_of("plain", 1, &[("cores", Offer::Minimum(4))]);
    let gpu = pool_of("gpu", 1, &[("cores", Offer::Minimum(16)), ("gpu", exact("a100"))]);
    Fixture { ledger: Ledger::new(settings, vec![plain, gpu]), now: ClockReading::now(), next_id: 1 }
}

fn asking(name: u64, platform: &[(&str, &str)]) -> (Submit, Resolution) {
    let Resolution::Run(action) = resolution(&work(name), false) else { unreachable!() };
    let platform = platform.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    (submit(&work(name)), Resolution::Run(Arc::new(Action { platform, ..(*action).clone() })))
}

impl Fixture {
    fn pool(&self, name: &str) -> PoolId {
        self.ledger.pools().iter().find(|pool| *pool.name == *name).expect("there is such a pool").id
    }

    fn submit_of(&mut self, invocation: &str, name: u64) -> Subscription {
        self.try_submit(submit_of(invocation, &work(name)), resolution(&work(name), false)).unwrap()
    }

    fn explain(
        &mut self,
        subscription: &Subscription,
    ) -> Option<crate::actors::scheduler::operation::QueueStatus> {
        self.ledger.explain(&instance(), subscription.info.id, self.now)
    }
}

#[test]
fn checks_and_runs_say_for_which_peer_they_are() {
    let mut fixture = Fixture::new(2, settings());
    for host in [1, 2] {
        let caller = Caller::without_connection(peer(host));
        let name = u64::from(host);
        let submit = Submit { caller, ..submit(&work(name)) };
        fixture.try_submit(submit, resolution(&work(name), false)).unwrap();
    }
    let checks: Vec<_> = std::iter::from_fn(|| fixture.ledger.next_check(fixture.now)).collect();
    assert_eq!(checks.iter().map(|check| check.build.peer).collect::<Vec<_>>(), [peer(1), peer(2)]);
    for check in checks {
        fixture.ledger.inputs_checked(check.task, Ok(()), fixture.now);
    }
    let runs: Vec<_> = std::iter::from_fn(|| fixture.ledger.assign(fixture.now)).collect();
    assert_eq!(runs.iter().map(|run| run.peer).collect::<Vec<_>>(), [peer(1), peer(2)]);
}

/// Checks of large inputs take long.
#[test]
fn a_build_or_peer_whose_checks_do_not_end_leaves_some_to_the_next() {
    let mut fixture = Fixture::new(1, SchedulerSettings { concurrent_checks: 18, ..settings() });
    let mut submit_from = |host, build: &str, names: std::ops::Range<u64>| {
        for name in names {
            let caller = Caller::without_connection(peer(host));
            let client = ClientInfo { tool_invocation_id: build.into(), ..ClientInfo::default() };
            let submit = Submit { caller, client, ..submit(&work(name)) };
            fixture.try_submit(submit, resolution(&work(name), false)).unwrap();
        }
        let checks = std::iter::from_fn(|| fixture.ledger.next_check(fixture.now));
        checks.map(|check| check.build.peer).collect::<Vec<_>>()
    };
    assert_eq!(submit_from(1, "first", 0..100), [peer(1); 14]);
    assert_eq!(submit_from(1, "second", 400..500), [peer(1)]);
    assert_eq!(submit_from(1, "third", 500..600), [peer(1)]);
    assert_eq!(submit_from(2, "", 100..200), [peer(2)]);
    assert_eq!(submit_from(3, "", 200..300), [peer(3)]);
    assert_eq!(submit_from(4, "", 300..400), []);
}

#[test]
fn a_build_of_thousands_cannot_starve_one_of_five() {
    let mut fixture = Fixture::new(4, SchedulerSettings { concurrent_checks: 9, ..settings() });
    let _big: Vec<_> = (0..5000).map(|name| fixture.submit_of("big", name)).collect();
    let mut running = std::collections::VecDeque::from(fixture.dispatch());
    let _more: Vec<_> = (5000..8000).map(|name| fixture.submit_of("big", name)).collect();
    let small: Vec<_> = (9000..9005).map(|name| fixture.submit_of("small", name)).collect();
    // The checks of this build do not wait behind those of the other build either.
    let checks: Vec<_> =
        (0..10).map(|_| fixture.ledger.next_check(fixture.now)).take_while(Option::is_some).collect();
    let of_small = |task: TaskId| fixture.ledger.tasks[&task].first.client.tool_invocation_id == "small";
    assert_eq!(checks.iter().flatten().filter(|check| of_small(check.task)).count(), 3);
    for check in checks.into_iter().flatten() {
        fixture.ledger.inputs_checked(check.task, Ok(()), fixture.now);
    }
    let mut turns = 0;
    while small.iter().any(|operation| stage(operation) == Stage::Queued) {
        let oldest: Assignment = running.pop_front().unwrap();
        fixture.finish(oldest.task, success());
        running.extend(fixture.dispatch());
        turns += 1;
        let own = running.iter().filter(|run| run.tool_invocation_id == "small").count();
        assert!(own <= 3, "the big one is not starved either");
    }
    assert!(turns <= 10, "{turns} turns for 5 actions beside one other build");
}

/// GEN-21. The shares themselves are tested in `quota.rs`.
#[test]
fn a_build_larger_than_the_queue_leaves_room_to_one_of_five() {
    let mut fixture = Fixture::new(4, SchedulerSettings { queue_size: 900, ..settings() });
    let mut submit =
        |build: &str, name| fixture.try_submit(submit_of(build, &work(name)), resolution(&work(name), false));
    let big: Vec<_> = (0..5000).map_while(|name| submit("big", name).ok()).collect();
    assert_eq!(big.len(), 712);
    let refusal = submit("big", 713).unwrap_err();
    assert!(
        matches!(&refusal, Error::Exhausted { retry_after: Some(_), message } if message.contains("share"))
    );
    let small: Vec<_> = (9000..9005).map(|name| submit("small", name).unwrap()).collect();
    assert!(small.iter().all(|operation| stage(operation) == Stage::Queued));
    assert_eq!(fixture.dispatch().len(), 4);
    big[100..200].iter().for_each(|operation| fixture.cancel(operation));
    let _again = fixture.submit_of("big", 713);
    let now = fixture.now;
    fixture.ledger.drain(true, now);
    assert_eq!(fixture.ledger.inspect().queued, 0);
}

/// A build that joins an action does not wait behind the backlog of another build, and is charged only for tasks that
/// run on its own turn.
#[test]
fn a_shared_task_has_a_place_for_each_of_its_builds_and_runs_for_the_first_whose_turn_comes() {
    let mut fixture = Fixture::new(1, settings());
    let _busy = fixture.submit_of("a", 0);
    let busy = fixture.dispatch_one();
    let of_a: Vec<_> = (1..10).map(|name| fixture.submit_of("a", name)).collect();
    let from = |invocation: &str, number| Submit {
        caller: Caller::without_connection(peer(number)),
        ..submit_of(invocation, &work(9))
    };
    let mut join = |invocation: &str, number| {
        fixture.try_submit(from(invocation, number), resolution(&work(9), false)).unwrap()
    };
    let (of_b, of_c) = (join("b", 1), join("a", 2));
    assert!(fixture.dispatch().is_empty());
    fixture.after(2);
    assert_eq!(fixture.explain(&of_a[8]).unwrap().position, Some(1));
    fixture.cancel(&of_c);
    fixture.after(2);
    assert_eq!(fixture.explain(&of_a[8]).unwrap().position, Some(1));
    assert_eq!(fixture.explain(&of_a[8]).unwrap().waiting, 9, "tasks are counted, not entries");
    fixture.finish(busy.task, success());
    // Neither build runs anything, and the other peer came later.
    let first = fixture.dispatch_one();
    assert_eq!(first.action.digest, digest(&work(1)));
    fixture.finish(first.task, success());
    let shared = fixture.dispatch_one();
    assert_eq!(shared.action.digest, digest(&work(9)));
    let charge = fixture.ledger.runs[&shared.task].charge;
    assert_eq!(charge.owner, fixture.ledger.owner(&of_b.info));
    assert_eq!(fixture.ledger.ready[&fixture.pool("pool-linux")].len(), 7, "it is in no queue any more");
    let nameless = [fixture.submit(work(30)), fixture.submit_of("", 40)]
        .map(|operation| fixture.ledger.owner(&operation.info));
    assert_eq!(nameless[0], nameless[1], "all of a peer that name no build share as one");
}

/// No task starves because of its priority, even if urgent tasks never end.
#[test]
fn a_task_gains_a_step_of_priority_with_each_interval() {
    let mut fixture =
        Fixture::new(1, SchedulerSettings { priority_ageing: Duration::from_secs(10), ..settings() });
    let _running = fixture.submit(work(0));
    let patient = fixture.submit_at(work(1), 3);
    let turn = |fixture: &mut Fixture, name| {
        let _urgent = fixture.submit_at(work(name), 0);
        let run = fixture.dispatch().pop();
        let running: Vec<_> = fixture.ledger.runs.keys().copied().collect();
        for task in running {
            fixture.finish(task, success());
        }
        run
    };
    for name in 100..110 {
        turn(&mut fixture, name);
        fixture.after(2);
        assert_eq!(stage(&patient), Stage::Queued, "after {} s", 2 * (name - 99));
    }
    fixture.after(10);
    for name in 200..202 {
        turn(&mut fixture, name);
    }
    assert_eq!(stage(&patient), Stage::Completed);
}

/// EXE-31.
#[test]
fn work_goes_to_the_least_special_pool_that_can_take_it() {
    let mut fixture = two_pools(settings());
    let submit = |fixture: &mut Fixture, name, platform: &[(&str, &str)]| {
        let (submit, resolution) = asking(name, platform);
        fixture.try_submit(submit, resolution).unwrap()
    };
    let first = submit(&mut fixture, 1, &[]);
    let second = submit(&mut fixture, 2, &[("cores", "2")]);
    let special = submit(&mut fixture, 3, &[("gpu", "a100")]);
    let runs = fixture.dispatch();
    let of = |run: &Assignment| (run.action.digest, run.pool);
    assert_eq!(of(&runs[0]), (digest(&work(1)), fixture.pool("plain")), "the pool that others need less");
    assert_eq!(of(&runs[1]), (digest(&work(2)), fixture.pool("gpu")), "and the other one when it is taken");
    let place = |subscription: &Subscription| subscription.snapshots.borrow().place.clone();
    assert_eq!(place(&first).unwrap().worker.as_ref(), "host/pool-/0");
    assert_eq!(place(&second).unwrap().pool.as_ref(), "gpu");
    fixture.finish(runs[0].task, success());
    assert!(fixture.dispatch().is_empty(), "a free slot of another pool is no use to it");
    assert!(fixture.explain(&special).is_some());
    fixture.finish(runs[1].task, success());
    assert_eq!(fixture.dispatch_one().pool, fixture.pool("gpu"));

    let by_pool = |pool: &str| {
        let filter = OperationFilter { pool: Some(pool.into()), ..Default::default() };
        let query = ListOperations { instance: instance(), filter, after: 0, limit: 9 };
        fixture.ledger.list(&query).map(|page| page.operations.len())
    };
    assert_eq!((by_pool("plain"), by_pool("gpu")), (Ok(1), Ok(2)), "finished ones too");
    assert!(by_pool("nope").unwrap_err().to_string().contains("plain, gpu"));
    let filter = OperationFilter { worker: Some("host/pool-/0".into()), ..Default::default() };
    let query = ListOperations { instance: instance(), filter, after: 0, limit: 9 };
    assert_eq!(fixture.ledger.list(&query).unwrap().operations.len(), 3);
}

/// EXE-31.
#[test]
fn the_nearest_pool_is_named_with_every_property_in_which_it_differs() {
    let mut fixture = two_pools(settings());
    let (request, resolution) = asking(1, &[("gpu", "a100"), ("cores", "32"), ("silo", "x")]);
    let refusal = fixture.try_submit(request, resolution).unwrap_err();
    let Error::Precondition(message) = refusal else { panic!("{refusal:?}") };
    for part in ["the nearest, \"gpu\"", "cores (asked for \"32\", offered up to 16", "[execution.pools."] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!message.contains("silo") && !message.contains("a100"), "{message}");
    // Both pools differ in one property. One of them has it, with another value.
    let (request, resolution) = asking(1, &[("gpu", "A100"), ("cores", "2")]);
    let message = fixture.try_submit(request, resolution).unwrap_err().to_string();
    let nearest = "the nearest, \"gpu\", differs in gpu (asked for \"A100\", offered \"a100\")";
    assert!(message.contains(nearest), "{message}");
    let strict = SchedulerSettings { unknown_properties: UnknownProperties::Refuse, ..settings() };
    let (request, resolution) = asking(1, &[("silo", "x")]);
    let refusal = two_pools(strict).try_submit(request, resolution).unwrap_err();
    assert!(matches!(&refusal, Error::Precondition(m) if m.contains("silo")), "{refusal:?}");
    let many = vec![("silo", "x"); crate::actors::scheduler::slots::PROPERTIES_MAX + 1];
    let (request, resolution) = asking(1, &many);
    assert!(matches!(fixture.try_submit(request, resolution), Err(Error::Invalid(_))));
}

/// A declared pool that is busy: the operation waits, and says so.
#[test]
fn a_waiting_operation_shows_its_pool_position_and_reason() {
    let mut fixture = Fixture::new(2, settings());
    let unchecked = fixture.submit_of("big", 0);
    assert!(fixture.explain(&unchecked).unwrap().reason.contains("inputs"));
    assert_eq!(fixture.explain(&unchecked).unwrap().position, None);
    let big: Vec<_> = (1..10).map(|name| fixture.submit_of("big", name)).collect();
    let small = fixture.submit_of("small", 100);
    let runs = fixture.dispatch();
    assert_eq!(fixture.explain(&unchecked), None, "it runs");
    // The positions are still those of the first request. They are computed again after a second.
    assert_eq!(fixture.explain(&big[8]).unwrap().position, None);
    fixture.after(2);
    let status = fixture.explain(&big[8]).unwrap();
    assert_eq!((status.pool.as_str(), status.position, status.waiting), ("pool-linux", Some(9), 9));
    assert_eq!((status.busy, status.slots, status.other_pools.len()), (2, 2, 0));
    assert_eq!(status.reason, "2 of 2 slots of pool \"pool-linux\" are busy");
    assert_eq!(fixture.explain(&big[0]).unwrap().position, Some(1));
    let other = Instances::new(["", "b"]).unwrap().get("b").unwrap();
    assert_eq!(fixture.ledger.explain(&other, big[3].info.id, fixture.now), None, "GEN-15");
    assert_eq!(runs[1].tool_invocation_id, "small");
    fixture.end(runs[1].task, RunEnd::Lost { pool_closed: false });
    // The failed slot is free, but its task was not assigned again yet.
    let status = fixture.explain(&small).unwrap();
    assert_eq!(status.position, None, "where it stood before its first try says nothing");
    let reason = status.reason;
    assert!(reason.ends_with("its worker failed, this is try 2 of 3"), "{reason}");
}

#[test]
fn the_reason_to_wait_does_not_name_removed_pools() {
    let mut fixture = two_pools(settings());
    let ops: Vec<_> = (1..6).map(|name| fixture.submit_of("a", name)).collect();
    let runs = fixture.dispatch();
    // The preferred pool "plain" loses its workers. Its task waits again, at its old position.
    fixture.end(runs[0].task, RunEnd::Lost { pool_closed: true });
    fixture.after(2);
    let status = fixture.explain(&ops[0]).unwrap();
    assert_eq!((status.pool.as_str(), status.other_pools.len(), status.position), ("gpu", 0, Some(1)));
    assert_eq!((status.busy, status.slots, status.waiting), (1, 1, 4));
    assert!(status.reason.starts_with("1 of 1 slots of pool \"gpu\" are busy"), "{}", status.reason);
    assert_eq!(fixture.explain(&ops[4]).unwrap().position, Some(4));
    for ended in [&ops[0], &ops[2], &ops[3]] {
        fixture.cancel(ended);
    }
    let status = fixture.explain(&ops[4]).unwrap();
    assert_eq!((status.position, status.waiting), (Some(1), 1), "never behind more than there are");
}
