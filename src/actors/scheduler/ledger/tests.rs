//! Tests of the ledger: admission, order, sharing, and what clients see. `demand.rs`, `endings.rs`, `followers.rs`,
//! `sharing.rs`, `staging.rs` and `room.rs` have the other topics.

mod demand;
mod endings;
mod followers;
mod room;
mod sharing;
mod staging;

use super::{fixtures::*, *};
use crate::{
    action::Action,
    actors::{
        scheduler::{
            messages::{OperationFilter, PoolMeasurement},
            operation::ClientInfo,
            settings::SchedulerSettings,
            slots::SlotName,
        },
        worker::messages::{RunFailure, RunReport, RunResult, RunStage, StageReached},
    },
    instance::Instances,
};
use gorego_reapi::proto::reapi;

/// A ledger with a clock, and shorthands for the events of its environment.
struct Fixture {
    ledger: Ledger,
    now: ClockReading,
    next_id: u128,
}

impl Fixture {
    fn new(slots: usize, settings: SchedulerSettings) -> Self {
        Self { ledger: ledger_with(settings, &[(slots, "linux")]), now: ClockReading::now(), next_id: 1 }
    }

    fn with_pools(pools: Vec<PoolSpec>) -> Self {
        Self { ledger: Ledger::new(settings(), pools), now: ClockReading::now(), next_id: 1 }
    }

    fn try_submit(&mut self, submit: Submit, resolution: Resolution) -> Result<Subscription> {
        let id = OperationId::new(Default::default(), uuid::Uuid::from_u128(self.next_id));
        self.next_id += 1;
        self.ledger.admit(submit, resolution, id, self.now)
    }

    fn submit(&mut self, work: Work) -> Subscription {
        self.submit_at(work, 0)
    }

    fn submit_at(&mut self, work: Work, priority: i32) -> Subscription {
        self.try_submit(Submit { priority, ..submit(&work) }, resolution(&work, false)).unwrap()
    }

    fn hit(&mut self, work: Work) -> Subscription {
        self.try_submit(submit(&work), resolution(&work, true)).unwrap()
    }

    /// Submits an action that is not stored.
    fn ask_in_vain(&mut self, work: Work) -> Subscription {
        let missing = Error::MissingBlobs(vec![digest(&work)]);
        self.try_submit(submit(&work), Resolution::Unusable(missing)).unwrap()
    }

    /// Answers all checks and assigns all ready tasks.
    fn dispatch(&mut self) -> Vec<Assignment> {
        while let Some(check) = self.ledger.next_check(self.now) {
            self.ledger.inputs_checked(check.task, Ok(()), self.now);
        }
        std::iter::from_fn(|| self.ledger.assign(self.now)).collect()
    }

    fn dispatch_one(&mut self) -> Assignment {
        let mut assignments = self.dispatch();
        assert_eq!(assignments.len(), 1);
        assignments.pop().unwrap()
    }

    fn finish(&mut self, task: TaskId, report: RunReport) {
        self.end(task, RunEnd::Reported(report));
    }

    /// Ends the latest run of a task.
    fn end(&mut self, task: TaskId, end: RunEnd) {
        let attempt = self.ledger.runs[&task].attempt;
        self.ledger.finish(task, attempt, end, self.now);
    }

    fn cancel(&mut self, subscription: &Subscription) {
        self.ledger.cancel(&instance(), subscription.info.id, self.now).unwrap();
    }

    fn after(&mut self, seconds: u64) -> Vec<Arc<SlotName>> {
        let by = Duration::from_secs(seconds);
        self.now = ClockReading { at: self.now.at + by, wall: self.now.wall + by };
        self.ledger.tick(self.now)
    }
}

fn success() -> RunReport {
    Ok(Box::new(RunResult { result: Default::default(), account: Default::default() }))
}

fn stage(subscription: &Subscription) -> Stage {
    subscription.snapshots.borrow().stage
}

fn outcome(subscription: &Subscription) -> Arc<Outcome> {
    subscription.snapshots.borrow().outcome.clone().expect("the operation is over")
}

fn error(subscription: &Subscription) -> Error {
    outcome(subscription).error.clone().expect("the operation failed")
}

/// EXE-16.
#[test]
fn a_cache_hit_is_born_completed_and_takes_no_slot_and_no_room_in_the_queue() {
    let mut fixture = Fixture::new(1, SchedulerSettings { queue_size: 0, ..settings() });
    let hit = fixture.hit(work(1));
    assert!(outcome(&hit).cached);
    assert!(fixture.dispatch().is_empty());
    assert!(fixture.ledger.watch(&instance(), hit.info.id).is_ok());
}

/// EXE-02, EXE-09, EXE-12: its name is known like any other, but it takes no place in the queue.
#[test]
fn an_action_that_cannot_run_becomes_a_completed_operation_at_once() {
    let mut fixture =
        Fixture::new(1, SchedulerSettings { queue_size: 0, unfinished_operations: 0, ..settings() });
    let malformed = Resolution::Unusable(Error::invalid("no Action"));
    for (name, resolution) in
        [(1, Resolution::Unusable(Error::MissingBlobs(vec![digest(&work(1))]))), (2, malformed)]
    {
        let Resolution::Unusable(expected) = resolution.clone() else { unreachable!() };
        let operation = fixture.try_submit(submit(&work(name)), resolution).unwrap();
        assert_eq!((stage(&operation), error(&operation)), (Stage::Completed, expected.clone()));
        let later = fixture.ledger.watch(&instance(), operation.info.id).unwrap();
        assert_eq!(error(&later), expected);
        fixture.cancel(&operation);
        assert_eq!(error(&operation), expected, "it was over before");
    }
    let query =
        ListOperations { instance: instance(), filter: OperationFilter::default(), after: 0, limit: 9 };
    assert_eq!(fixture.ledger.list(&query).unwrap().operations.len(), 2);
    let told = fixture.ledger.take_transitions();
    let ends = told.iter().filter(|told| {
        matches!(&told.event, OperationEvent::Completed { place: None, queued_for: None, .. })
    });
    assert_eq!((told.len(), ends.count()), (2, 2));
    assert!(fixture.dispatch().is_empty() && fixture.ledger.is_idle());
    fixture.ledger.drain(false, fixture.now);
    let refusal = fixture.try_submit(submit(&work(1)), Resolution::Unusable(Error::invalid("no Action")));
    assert!(
        matches!(refusal, Err(Error::Unavailable(_))),
        "an error of the request itself stays one of the call"
    );
}

/// EXE-14.
#[test]
fn a_flood_of_operations_that_end_at_once_evicts_none_of_another_kind() {
    let mut fixture =
        Fixture::new(1, SchedulerSettings { retained_operations: 2, retained_cached: 3, ..settings() });
    let worked = fixture.submit(work(0));
    let task = fixture.dispatch_one().task;
    fixture.finish(task, success());
    let hits: Vec<_> = (1..100).map(|name| fixture.hit(work(name))).collect();
    let in_vain: Vec<_> = (1..100).map(|name| fixture.ask_in_vain(work(name))).collect();
    assert!(fixture.ledger.watch(&instance(), worked.info.id).is_ok());
    for flood in [hits, in_vain] {
        assert!(fixture.ledger.watch(&instance(), flood[98].info.id).is_ok());
        assert!(fixture.ledger.watch(&instance(), flood[96].info.id).is_ok());
        assert!(matches!(fixture.ledger.watch(&instance(), flood[95].info.id), Err(Error::NotFound(_))));
    }
    assert_eq!(fixture.ledger.inspect().operations, 7);
}

/// EXE-15, OPS-04.
#[test]
fn two_hundred_identical_submissions_are_one_run_and_two_hundred_answers() {
    let mut fixture = Fixture::new(4, settings());
    let mut all: Vec<_> = (0..100).map(|_| fixture.submit(work(1))).collect();
    let assignment = fixture.dispatch_one();
    all.extend((0..100).map(|_| fixture.submit(work(1))));
    assert!(fixture.dispatch().is_empty(), "there is nothing more to run");
    assert!(all.iter().all(|subscription| stage(subscription) == Stage::Executing));
    let (first, last) = (all.remove(0), all.pop().unwrap());
    fixture.cancel(&first);
    fixture.cancel(&last);
    assert!(matches!(error(&first), Error::Cancelled(_)));
    assert!(!assignment.cancel.is_cancelled(), "the others still wait");
    fixture.finish(assignment.task, success());
    assert!(all.iter().all(|subscription| outcome(subscription).error.is_none()));
    let shared = outcome(&all[0]);
    assert!(all.iter().all(|subscription| Arc::ptr_eq(&outcome(subscription), &shared)));
}

/// EXE-15, EXE-17, EXE-19.
#[test]
fn uncacheable_work_is_never_merged_and_skipping_the_cache_still_joins() {
    let mut fixture = Fixture::new(9, settings());
    let uncacheable = Work { do_not_cache: true, ..work(1) };
    let _two = (fixture.submit(uncacheable), fixture.submit(uncacheable));
    assert_eq!(fixture.dispatch().len(), 2);
    let _first = fixture.submit(work(2));
    let skipping = Submit { skip_cache_lookup: true, ..submit(&work(2)) };
    let _second = fixture.try_submit(skipping, resolution(&work(2), false)).unwrap();
    assert_eq!(fixture.dispatch().len(), 1);
}

#[test]
fn lower_priority_values_run_first_and_equals_in_order_of_arrival() {
    let mut fixture = Fixture::new(1, settings());
    let _busy = fixture.submit(work(0));
    let mut running = fixture.dispatch_one();
    let _waiting =
        [(1, 0), (2, 5), (3, 0), (4, -3)].map(|(name, priority)| fixture.submit_at(work(name), priority));
    let urgent = fixture.submit_at(work(2), -9);
    let mut order = Vec::new();
    for _ in 0..4 {
        fixture.finish(running.task, success());
        running = fixture.dispatch_one();
        order.push((1..=4).find(|name| digest(&work(*name)) == running.action.digest).unwrap());
        if order.len() == 1 {
            assert_eq!(stage(&urgent), Stage::Executing, "joining raised the priority of what it joined");
        }
    }
    assert_eq!(order, [2, 4, 1, 3]);
}

#[test]
fn a_task_falls_back_to_the_priority_of_those_who_still_wait_for_it() {
    let mut fixture = Fixture::new(1, settings());
    let _busy = fixture.submit(work(0));
    let running = fixture.dispatch_one();
    let _slow = fixture.submit_at(work(1), 5);
    let urgent = fixture.submit_at(work(1), -9);
    let _normal = fixture.submit_at(work(2), 0);
    assert!(fixture.dispatch().is_empty());
    fixture.cancel(&urgent);
    fixture.finish(running.task, success());
    assert_eq!(fixture.dispatch_one().action.digest, digest(&work(2)));
}

/// GEN-21, and EXE-09: refused before an operation exists.
#[test]
fn a_full_queue_refuses_new_tasks_but_not_cache_hits_or_joining_operations() {
    let mut fixture =
        Fixture::new(1, SchedulerSettings { queue_size: 2, unfinished_operations: 4, ..settings() });
    let _running = fixture.submit(work(0));
    assert_eq!(fixture.dispatch().len(), 1);
    let _queued = (fixture.submit(work(1)), fixture.submit(work(2)));
    let refusal = fixture.try_submit(submit(&work(3)), resolution(&work(3), false)).unwrap_err();
    assert!(matches!(&refusal, Error::Exhausted { retry_after: Some(_), .. }), "{refusal}");
    fixture.hit(work(3));
    let _joined = fixture.submit(work(2));
    let too_many = fixture.try_submit(submit(&work(2)), resolution(&work(2), false)).unwrap_err();
    assert!(matches!(too_many, Error::Exhausted { retry_after: Some(_), .. }), "joining is bounded too");
    assert_eq!(fixture.ledger.inspect().queued, 2);
}

/// Any number of actions may name the same Command of several megabytes.
#[test]
fn the_queue_is_bounded_in_bytes_too() {
    let uncacheable = Work { do_not_cache: true, ..work(1) };
    let Resolution::Run(mut action) = resolution(&uncacheable, false) else { unreachable!() };
    Arc::make_mut(&mut action).command.arguments.push("x".repeat(1 << 20));
    let mut fixture = Fixture::new(1, SchedulerSettings { queue_bytes: 3 << 20, ..settings() });
    let mut heavy = || fixture.try_submit(submit(&uncacheable), Resolution::Run(action.clone()));
    let held = [heavy().unwrap(), heavy().unwrap()];
    let refusal = heavy().unwrap_err();
    assert!(matches!(refusal, Error::Exhausted { retry_after: Some(_), .. }), "{refusal}");
    fixture.ledger.cancel(&instance(), held[0].info.id, fixture.now).unwrap();
    fixture.try_submit(submit(&uncacheable), Resolution::Run(action)).unwrap();
}

/// GEN-21: operations that join a task take no place in the queue, but each keeps the texts of its client. Empty names
/// take memory too.
#[test]
fn names_from_clients_in_unfinished_operations_are_bounded_in_bytes() {
    let mut fixture = Fixture::new(1, SchedulerSettings { unfinished_bytes: 100_000, ..settings() });
    let mut request = submit(&work(1));
    request.inline.output_files = vec![String::new(); 600];
    let mut join = || fixture.try_submit(request.clone(), resolution(&work(1), false));
    let held: Vec<_> = std::iter::from_fn(|| join().ok()).take(100).collect();
    assert_eq!(held.len(), 7, "600 names are 14,400 bytes");
    let refusal = join().unwrap_err();
    assert!(matches!(&refusal, Error::Exhausted { message, .. } if message.contains("bytes of unfinished")));
    fixture.ledger.cancel(&instance(), held[0].info.id, fixture.now).unwrap();
    let again = fixture.try_submit(request.clone(), resolution(&work(1), false));
    assert!(again.is_ok(), "what has ended is given back");
}

/// EXE-31.
#[test]
fn work_that_no_pool_can_take_is_refused_with_the_nearest_pool_and_the_difference() {
    let mut fixture = Fixture::new(1, settings());
    let lost = Work { platform: Some("plan9"), ..work(1) };
    let refusal = fixture.try_submit(submit(&lost), resolution(&lost, false)).unwrap_err();
    let Error::Precondition(message) = refusal else { panic!("{refusal:?}") };
    for part in ["pool-linux", "OSFamily", "plan9", "linux"] {
        assert!(message.contains(part), "{message}");
    }
    let _spelled_otherwise = fixture.submit(Work { platform: Some("Linux"), ..work(2) });
    let Resolution::Run(action) = resolution(&work(3), false) else { unreachable!() };
    let silo = Action { platform: vec![("cache-silo-key".into(), "x".into())], ..(*action).clone() };
    let _unlisted = fixture.try_submit(submit(&work(3)), Resolution::Run(Arc::new(silo))).unwrap();
}

/// EXE-22, EXE-25, EXE-26.
#[test]
fn missing_inputs_end_a_task_before_it_takes_a_slot() {
    let mut fixture = Fixture::new(1, settings());
    let operation = fixture.submit(work(1));
    assert_eq!(stage(&operation), Stage::Queued, "the answer does not wait for the check (EXE-01)");
    let check = fixture.ledger.next_check(fixture.now).unwrap();
    assert!(fixture.ledger.assign(fixture.now).is_none(), "not before its inputs are there");
    let missing = Error::MissingBlobs(vec![check.root]);
    fixture.ledger.inputs_checked(check.task, Err(missing.clone()), fixture.now);
    assert_eq!(error(&operation), missing);
    let _again = fixture.submit(work(1));
    assert_eq!(fixture.dispatch().len(), 1, "another try is another task");
}

/// EXE-04, EXE-06.
#[test]
fn snapshots_follow_the_run_and_late_news_of_it_is_ignored() {
    let mut fixture = Fixture::new(1, settings());
    let operation = fixture.submit(work(1));
    let task = fixture.dispatch_one().task;
    let at = fixture.now.wall;
    for (news, shown) in [
        (RunStage::Fetching, RunStage::Fetching),
        (RunStage::Uploading, RunStage::Uploading),
        (RunStage::Running, RunStage::Uploading),
    ] {
        fixture.ledger.stage_reached(StageReached { task, attempt: 1, stage: news, at, logs: None });
        assert_eq!(operation.snapshots.borrow().run_stage, Some((shown, at)));
    }
    let late = fixture.submit(work(1));
    assert_eq!(late.snapshots.borrow().run_stage, Some((RunStage::Uploading, at)), "who joins sees the same");
    fixture.finish(task, success());
    fixture.ledger.stage_reached(StageReached {
        task,
        attempt: 1,
        stage: RunStage::Uploading,
        at,
        logs: None,
    });
    assert_eq!(stage(&operation), Stage::Completed);
}

/// GEN-15.
#[test]
fn an_operation_is_unknown_under_another_instance() {
    let other = Instances::new(["", "b"]).unwrap().get("b").unwrap();
    let mut fixture = Fixture::new(1, settings());
    let id = fixture.submit(work(1)).info.id;
    assert!(matches!(fixture.ledger.watch(&other, id), Err(Error::NotFound(_))));
    assert!(matches!(fixture.ledger.cancel(&other, id, fixture.now), Err(Error::NotFound(_))));
    assert!(matches!(fixture.ledger.forget(&other, id), Err(Error::NotFound(_))));
    let query = ListOperations { instance: other, filter: OperationFilter::default(), after: 0, limit: 9 };
    assert!(fixture.ledger.list(&query).unwrap().operations.is_empty());
}

#[test]
fn pages_list_every_matching_operation_once_in_order_of_submission() {
    let mut fixture = Fixture::new(1, settings());
    let keep: Vec<_> = (0..7)
        .map(|name| {
            let client = ClientInfo { target_id: format!("//t:{}", name % 2), ..Default::default() };
            let submit = Submit { client, ..submit(&work(name)) };
            fixture.try_submit(submit, resolution(&work(name), false)).unwrap()
        })
        .collect();
    fixture.cancel(&keep[4]);
    let list = |filter: OperationFilter, limit| {
        let (mut ids, mut after) = (Vec::new(), 0);
        loop {
            let query = ListOperations { instance: instance(), filter: filter.clone(), after, limit };
            let page = fixture.ledger.list(&query).unwrap();
            assert!(page.operations.len() <= limit);
            ids.extend(page.operations.iter().map(|(info, _)| info.id.uuid().as_u128()));
            match page.next {
                Some(next) => after = next,
                None => return ids,
            }
        }
    };
    assert_eq!(list(OperationFilter::default(), 2), [1, 2, 3, 4, 5, 6, 7]);
    let target = OperationFilter { target: Some("//t:0".into()), ..Default::default() };
    assert_eq!(list(target.clone(), 1), [1, 3, 5, 7]);
    assert_eq!(list(OperationFilter { done: Some(true), ..target.clone() }, 1), [5]);
    assert_eq!(list(OperationFilter { stage: Some(Stage::Queued), ..target }, 9), [1, 3, 7]);
    assert!(list(OperationFilter { invocation: Some("x".into()), ..Default::default() }, 9).is_empty());
}
