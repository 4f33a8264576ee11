//! Tests of the actor with fake pools and a fake store, for errors that only the shell can have.
//!
//! No test sleeps: fakes pass on their messages through channels, and the tests decide when answers arrive.
#![expect(
    clippy::disallowed_methods,
    reason = "the test bounds how many messages its unbounded channels hold"
)]

use super::{
    ledger::fixtures::{Work, instance, resolution, settings, submit, work},
    messages::*,
    operation::{Outcome, Stage, Subscription},
    *,
};
use crate::{
    actors::worker::messages::{RunFailure, RunReport, RunResult, RunStage},
    caller::Owner,
    instance::Instance,
};
use actix::{ActorContext, ActorFutureExt, Addr, Handler, SyncArbiter, SyncContext, WrapFuture, fut};
use futures::future::{self, FutureExt};
use gorego_reapi::{digest::Digest, error::Error};
use std::{collections::HashSet, sync::Arc, time::SystemTime};
use tokio::sync::mpsc;

/// A store that has all inputs, unless it is gone.
struct FakeStore {
    is_gone: bool,
}

impl InputCheck for FakeStore {
    fn check(&self, _: Instance, _: Digest, _: Owner) -> future::BoxFuture<'static, Result<()>> {
        let gone = || Err(Error::Unavailable("the store is going down".into()));
        future::ready(if self.is_gone { gone() } else { Ok(()) }).boxed()
    }

    fn keep_active(&self, _: HashSet<Owner>) {}
}

/// A request for this work. The store has no result for it.
fn ask(work: &Work) -> Admit {
    Admit { submit: submit(work), resolution: resolution(work, false) }
}

/// A pool that passes each run to the test and ends it with the test's answer. A dropped sender means that the pool has
/// ended.
struct FakePool(mpsc::UnboundedSender<AssignedRun>);

struct AssignedRun {
    run: RunAction,
    answer: oneshot::Sender<RunReport>,
}

impl Actor for FakePool {
    type Context = Context<Self>;
}

impl Handler<RunAction> for FakePool {
    type Result = actix::ResponseActFuture<Self, RunReport>;

    fn handle(&mut self, run: RunAction, _: &mut Self::Context) -> Self::Result {
        let (answer, answered) = oneshot::channel();
        self.0.send(AssignedRun { run, answer }).unwrap();
        let or_die = |answer, _: &mut Self, ctx: &mut Self::Context| match answer {
            Ok(report) => fut::wrap_future(future::ready(report).left_future()),
            Err(oneshot::error::RecvError { .. }) => {
                ctx.terminate();
                fut::wrap_future(future::pending().right_future())
            }
        };
        Box::pin(answered.into_actor(self).then(or_die))
    }
}

/// Workers that die with every action, and their threads with them.
struct DyingWorkers;

impl Actor for DyingWorkers {
    type Context = SyncContext<Self>;
}

impl Handler<RunAction> for DyingWorkers {
    type Result = actix::MessageResult<RunAction>;

    fn handle(&mut self, _: RunAction, _: &mut Self::Context) -> Self::Result {
        // Unlike `panic!`, this prints nothing.
        std::panic::resume_unwind(Box::new("doomed"))
    }
}

fn pool(slots: usize, runner: Recipient<RunAction>) -> Pool {
    Pool { spec: ledger::fixtures::pool(slots, "linux"), runner, stager: None }
}

fn scheduler(settings: SchedulerSettings, pool: Pool) -> Addr<SchedulerActor> {
    SchedulerActor::new(settings, vec![pool], FakeStore { is_gone: false }).start()
}

/// A scheduler whose runs are answered by the test.
fn attended(slots: usize) -> (Addr<SchedulerActor>, mpsc::UnboundedReceiver<AssignedRun>) {
    let (sender, assigned) = mpsc::unbounded_channel();
    let runner = FakePool(sender).start().recipient();
    (scheduler(settings(), pool(slots, runner)), assigned)
}

async fn outcome(mut subscription: Subscription) -> Arc<Outcome> {
    let end = subscription.snapshots.wait_for(|snapshot| snapshot.stage == Stage::Completed).await;
    end.expect("the stream reaches its end").outcome.clone().expect("an ended operation has an outcome")
}

async fn reaches(subscription: &mut Subscription, stage: Stage) {
    subscription.snapshots.wait_for(|snapshot| snapshot.stage == stage).await.expect("it gets there");
}

fn success() -> RunReport {
    Ok(Box::new(RunResult { result: Default::default(), account: Default::default() }))
}

/// EXE-01, EXE-04: from Submit to the end, including the reports of the worker.
#[actix::test]
async fn a_submission_is_answered_at_once_and_followed_to_its_end() {
    let (scheduler, mut assigned) = attended(1);
    let subscription = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let AssignedRun { run, answer } = assigned.recv().await.unwrap();
    let mut follower = subscription.clone();
    reaches(&mut follower, Stage::Executing).await;
    run.control.progress.do_send(StageReached {
        task: run.order.task,
        attempt: run.order.attempt,
        stage: RunStage::Running,
        at: SystemTime::now(),
        logs: None,
    });
    let running =
        |run_stage: Option<(RunStage, SystemTime)>| run_stage.is_some_and(|s| s.0 == RunStage::Running);
    follower.snapshots.wait_for(|snapshot| running(snapshot.run_stage)).await.unwrap();
    answer.send(success()).ok().unwrap();
    assert!(outcome(subscription).await.error.is_none());
}

/// EXE-02: other servers can tell from the name which server owns the operation.
#[actix::test]
async fn the_name_of_an_operation_carries_the_name_of_its_server() {
    let (sender, _handed) = mpsc::unbounded_channel();
    let settings = SchedulerSettings { node: "build-3".parse().unwrap(), ..settings() };
    let scheduler = scheduler(settings, pool(1, FakePool(sender).start().recipient()));
    let subscription = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let name = subscription.info.name();
    assert!(name.starts_with("operations/build-3."), "{name}");
    let id: OperationId = name.strip_prefix("operations/").unwrap().parse().unwrap();
    assert!(scheduler.send(Watch { instance: instance(), id }).await.unwrap().is_ok());
    let (_, uuid) = name.rsplit_once('.').unwrap();
    let elsewhere: OperationId = format!("build-4.{uuid}").parse().unwrap();
    let answer = scheduler.send(Watch { instance: instance(), id: elsewhere }).await.unwrap();
    assert!(matches!(answer, Err(Error::NotFound(_))), "an operation of another server");
}

/// EXE-16.
#[actix::test]
async fn a_hit_is_answered_without_any_worker() {
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let runner = FakePool(sender).start().recipient();
    let scheduler = scheduler(settings(), pool(1, runner));
    let hit = Admit { submit: submit(&work(1)), resolution: resolution(&work(1), true) };
    let subscription = scheduler.send(hit).await.unwrap().unwrap();
    assert!(outcome(subscription).await.cached);
    assert!(assigned.try_recv().is_err());
}

/// EXE-15, OPS-04.
#[actix::test]
async fn two_hundred_submissions_at_once_are_one_run() {
    let (scheduler, mut assigned) = attended(8);
    let submissions = (0..200).map(|_| scheduler.send(ask(&work(1))));
    let subscriptions = future::join_all(submissions).await;
    let mut subscriptions: Vec<_> = subscriptions.into_iter().map(|s| s.unwrap().unwrap()).collect();
    let only = assigned.recv().await.unwrap();
    let leaver = subscriptions.pop().unwrap();
    scheduler.send(Cancel { instance: instance(), id: leaver.info.id }).await.unwrap().unwrap();
    assert!(matches!(outcome(leaver).await.error, Some(Error::Cancelled(_))));
    assert!(!only.run.control.cancel.is_cancelled());
    only.answer.send(success()).ok().unwrap();
    for subscription in subscriptions {
        assert!(outcome(subscription).await.error.is_none());
    }
    assert!(assigned.try_recv().is_err());
}

/// EXE-14, without a grace period: the actor acts on the tick of its clock.
#[actix::test]
async fn a_client_that_vanishes_leaves_nothing_behind() {
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let runner = FakePool(sender).start().recipient();
    let settings = SchedulerSettings { abandon_grace: Duration::ZERO, ..settings() };
    let scheduler = scheduler(settings, pool(1, runner));
    drop(scheduler.send(ask(&work(1))).await.unwrap().unwrap());
    let assigned = assigned.recv().await.unwrap();
    scheduler.send(Tick).await.unwrap();
    assert!(assigned.run.control.cancel.is_cancelled());
    assert_eq!(scheduler.send(Inspect).await.unwrap().running, 1, "the slot waits for its worker");
    assigned.answer.send(success()).ok().unwrap();
    scheduler.send(Drain { cancel: false }).await.unwrap();
    assert_eq!(scheduler.send(Inspect).await.unwrap().running, 0);
}

/// EXE-62.
#[actix::test]
async fn workers_that_die_of_an_action_do_not_take_the_scheduler_along() {
    let runner = SyncArbiter::start(2, || DyingWorkers).recipient();
    let scheduler = scheduler(settings(), pool(2, runner));
    for name in [1, 2] {
        let error = match scheduler.send(ask(&work(name))).await.unwrap() {
            Ok(subscription) => outcome(subscription).await.error.clone().expect("it cannot have worked"),
            // All workers may be gone by now.
            Err(error) => error,
        };
        assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    }
    scheduler.send(Drain { cancel: false }).await.unwrap();
}

/// EXE-62.
#[actix::test]
async fn a_pool_that_closes_ends_its_work_and_refuses_more() {
    let (scheduler, mut assigned) = attended(1);
    let running = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let queued = scheduler.send(ask(&work(2))).await.unwrap().unwrap();
    drop(assigned.recv().await.unwrap().answer);
    assert!(matches!(outcome(running).await.error, Some(Error::Unavailable(_))));
    assert!(matches!(outcome(queued).await.error, Some(Error::Unavailable(_))));
    let refusal = scheduler.send(ask(&work(3))).await.unwrap().unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
}

/// The pools of a server can be replaced while clients use it.
#[actix::test]
async fn a_pool_that_drains_finishes_its_runs_and_a_new_one_takes_what_waits() {
    let (scheduler, mut assigned) = attended(1);
    let running = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let queued = scheduler.send(ask(&work(2))).await.unwrap().unwrap();
    let run = assigned.recv().await.unwrap();
    let [old] = &*scheduler.send(ListPools).await.unwrap() else { panic!("there is one pool") };
    let id = old.id;
    let mut drained = Box::pin(scheduler.send(DrainPool { id }));
    assert!(futures::poll!(&mut drained).is_pending());
    let refusal = scheduler.send(ask(&work(3))).await.unwrap().unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)), "{refusal:?}");

    let (sender, mut assigned) = mpsc::unbounded_channel();
    let replacement = || pool(1, FakePool(sender.clone()).start().recipient());
    let new = scheduler.send(AddPool { pool: replacement(), replaces: None }).await.unwrap().unwrap();
    assert!(
        scheduler.send(AddPool { pool: replacement(), replaces: None }).await.unwrap().is_err(),
        "the name is taken"
    );
    assigned.recv().await.unwrap().answer.send(success()).ok().unwrap();
    assert!(outcome(queued).await.error.is_none());
    assert!(futures::poll!(&mut drained).is_pending(), "its run goes on");
    run.answer.send(success()).ok().unwrap();
    assert_eq!(drained.await.unwrap(), Ok(()));
    assert!(outcome(running).await.error.is_none());
    assert_eq!(scheduler.send(RemovePool { id }).await.unwrap(), Ok(()));
    assert!(matches!(scheduler.send(RemovePool { id }).await.unwrap(), Err(Error::NotFound(_))));
    assert!(matches!(scheduler.send(DrainPool { id }).await.unwrap(), Err(Error::NotFound(_))));
    let left: Vec<_> = scheduler.send(ListPools).await.unwrap().iter().map(|pool| pool.id).collect();
    assert_eq!(left, [new]);
}

/// EXE-62: a reload leaves no time in which an action finds no pool.
#[actix::test]
async fn a_pool_takes_the_place_of_another_in_one_message_or_not_at_all() {
    let (scheduler, mut assigned) = attended(1);
    let for_linux = |name| ask(&Work { platform: Some("linux"), ..work(name) });
    let running = scheduler.send(for_linux(1)).await.unwrap().unwrap();
    let queued = scheduler.send(for_linux(2)).await.unwrap().unwrap();
    let run = assigned.recv().await.unwrap();
    let id = scheduler.send(ListPools).await.unwrap()[0].id;
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let replacement = || pool(1, FakePool(sender.clone()).start().recipient());
    let others = (1..slots::POOLS_MAX).map(|number| {
        let spec = slots::PoolSpec { name: format!("other-{number}"), ..ledger::fixtures::pool(1, "plan9") };
        AddPool { pool: Pool { spec, ..replacement() }, replaces: None }
    });
    let others = future::try_join_all(others.map(|other| scheduler.send(other))).await.unwrap();
    let refused = scheduler.send(AddPool { pool: replacement(), replaces: Some(id) }).await.unwrap();
    assert!(matches!(refused, Err(Error::Precondition(_))), "there are too many: {refused:?}");
    let state_of = async |id| {
        let all = scheduler.send(ListPools).await.unwrap();
        all.iter().find(|pool| pool.id == id).map(|pool| pool.state)
    };
    assert_eq!(state_of(id).await, Some(slots::PoolState::Open), "the old one goes on");
    scheduler.send(RemovePool { id: *others[0].as_ref().unwrap() }).await.unwrap().unwrap();

    let new = scheduler.send(AddPool { pool: replacement(), replaces: Some(id) }).await.unwrap().unwrap();
    assert_eq!(state_of(id).await, Some(slots::PoolState::Draining));
    assert_eq!(state_of(new).await, Some(slots::PoolState::Open));
    assigned.recv().await.unwrap().answer.send(success()).ok().unwrap();
    assert!(outcome(queued).await.error.is_none());
    run.answer.send(success()).ok().unwrap();
    assert!(outcome(running).await.error.is_none());
    assert_eq!(scheduler.send(DrainPool { id }).await.unwrap(), Ok(()));
}

/// EXE-62.
#[actix::test]
async fn a_removed_pool_stops_its_runs_and_another_takes_them() {
    let (scheduler, mut assigned) = attended(1);
    let subscription = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let run = assigned.recv().await.unwrap();
    let id = scheduler.send(ListPools).await.unwrap()[0].id;
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let spec = slots::PoolSpec { name: "other".into(), ..ledger::fixtures::pool(1, "linux") };
    let pool = Pool { spec, runner: FakePool(sender).start().recipient(), stager: None };
    scheduler.send(AddPool { pool, replaces: None }).await.unwrap().unwrap();
    scheduler.send(RemovePool { id }).await.unwrap().unwrap();
    assert!(run.run.control.cancel.is_cancelled());
    run.answer.send(Err(RunFailure::new(Error::Cancelled("stopped".into())))).ok().unwrap();
    assigned.recv().await.unwrap().answer.send(success()).ok().unwrap();
    assert!(outcome(subscription).await.error.is_none());
}

/// GEN-21.
#[actix::test]
async fn never_more_runs_than_slots_nor_more_waiting_than_the_queue_holds() {
    let works: Vec<_> = (0..9).map(work).collect();
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let runner = FakePool(sender).start().recipient();
    let settings = SchedulerSettings { queue_size: 4, ..settings() };
    let scheduler = scheduler(settings, pool(2, runner));
    let (mut runs, mut subscriptions, mut refused) = (Vec::new(), Vec::new(), 0);
    for (submitted, work) in works.iter().enumerate() {
        match scheduler.send(ask(work)).await.unwrap() {
            Ok(subscription) => subscriptions.push(subscription),
            Err(Error::Exhausted { retry_after: Some(_), .. }) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
        if submitted < 2 {
            runs.push(assigned.recv().await.unwrap());
        }
    }
    assert_eq!((subscriptions.len(), refused), (6, 3));
    let counts = scheduler.send(Inspect).await.unwrap();
    assert_eq!((counts.running, counts.queued, counts.slots), (2, 4, 2));
    assert!(assigned.try_recv().is_err());
    while let Some(AssignedRun { answer, .. }) = runs.pop() {
        answer.send(success()).ok().unwrap();
        if runs.len() < 2 && scheduler.send(Inspect).await.unwrap().queued > 0 {
            runs.push(assigned.recv().await.unwrap());
        }
    }
    for AssignedRun { answer, .. } in std::iter::from_fn(|| assigned.try_recv().ok()) {
        answer.send(success()).ok().unwrap();
    }
    scheduler.send(Drain { cancel: false }).await.unwrap();
    for subscription in subscriptions {
        assert!(outcome(subscription).await.error.is_none());
    }
}

/// EXE-10.
#[actix::test]
async fn a_drain_is_answered_when_the_last_run_is_over() {
    let (scheduler, mut assigned) = attended(1);
    let running = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    let queued = scheduler.send(ask(&work(2))).await.unwrap().unwrap();
    let run = assigned.recv().await.unwrap();
    let mut patient = Box::pin(scheduler.send(Drain { cancel: false }));
    assert!(futures::poll!(&mut patient).is_pending());
    let refusal = scheduler.send(ask(&work(1))).await.unwrap().unwrap_err();
    assert!(matches!(refusal, Error::Unavailable(_)));
    let mut hasty = Box::pin(scheduler.send(Drain { cancel: true }));
    assert!(futures::poll!(&mut hasty).is_pending());
    for ended in [running, queued] {
        tokio::select! {
            ended = outcome(ended) => assert!(matches!(ended.error, Some(Error::Unavailable(_)))),
            _ = &mut hasty => panic!("a command is still running"),
        }
    }
    assert!(run.run.control.cancel.is_cancelled());
    run.answer.send(success()).ok().unwrap();
    patient.await.unwrap();
    hasty.await.unwrap();
}

/// A scheduler does not hang if its store dies.
#[actix::test]
async fn work_whose_inputs_cannot_be_checked_ends_retryably() {
    let (sender, mut assigned) = mpsc::unbounded_channel();
    let runner = FakePool(sender).start().recipient();
    let store = FakeStore { is_gone: true };
    let scheduler = SchedulerActor::new(settings(), vec![pool(1, runner)], store).start();
    let subscription = scheduler.send(ask(&work(1))).await.unwrap().unwrap();
    assert!(matches!(outcome(subscription).await.error, Some(Error::Unavailable(_))));
    assert!(assigned.try_recv().is_err());
}
