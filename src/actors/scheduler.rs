//! The scheduler decides which action runs when and where, and informs the clients.
//!
//! [`SchedulerActor`] is a thin shell around the [`Ledger`], which makes all decisions. Requests and facts go into the
//! ledger with the time, and its decisions go out to the store and the pools. Each wait for the store or a pool is a
//! separate task that sends a message to the actor when it ends. So no handler waits, facts arrive in the order in
//! which they were sent, and a pending wait costs nothing. (The futures in an actix context are all polled whenever one
//! of them wakes.)
//!
//! The actor does not touch bytes, files or processes. It knows the workers as recipients of messages, the store as an
//! [`InputCheck`], and the container images as an [`ImageSupply`]. The action and its cached result are looked up
//! before the action is admitted.

pub mod inputs;
mod ledger;
mod log;
pub mod messages;
pub mod operation;
mod operation_loads;
mod queue;
mod quota;
mod register;
pub mod settings;
mod settle;
pub mod slots;
#[cfg(test)]
mod tests;
pub mod transition;

use crate::{
    actors::{
        mail::{Mail, Receive, counted},
        worker::messages::{RunAction, StageAhead, StageReached, TaskId},
    },
    logging::Event,
    node::NodeName,
};
use actix::{Actor, AsyncContext, Context, Message, MessageResult, Recipient, ResponseFuture};
use futures::future::ready;
use gorego_reapi::error::Result;
use inputs::{ImageSupply, InputCheck};
use ledger::{Ledger, RunEnd};
use messages::{
    AddPool, Admit, Cancel, Drain, DrainPool, Explain, Forget, Inspect, Inspection, ListOperations,
    ListPools, Measure, OperationPage, Record, RemovePool, Watch,
};
use operation::{OperationId, QueueStatus, Subscription};
use settings::{ClockReading, SchedulerSettings};
use slots::{PoolId, PoolSpec};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::sync::oneshot;

/// Number of messages that may wait in the mailbox before their senders have to wait. A message is handled in
/// microseconds, so this number keeps the actor busy and is too small for a second queue.
const MAILBOX: usize = 1024;

/// How often deadlines are checked. Most of them are minutes.
const TICK_INTERVAL: Duration = Duration::from_secs(1);

/// How many tasks are examined per tick to find the builds that are active. With 100,000 tasks, each is examined every
/// 100 s, which is a small part of a useful lease.
const TASKS_PER_TICK: usize = 1_000;

/// A set of workers: their properties, and a recipient that runs tasks on them. The workers of another machine would be
/// another pool.
#[derive(Clone)]
pub struct Pool {
    /// The description of the pool. The scheduler never sends it more tasks than it has slots.
    pub spec: PoolSpec,
    /// Runs a task. Each message is answered when the run has ended.
    pub runner: Recipient<RunAction>,
    /// Stages the inputs of tasks that wait for the pool; `None` if the pool cannot. Each message is answered when that
    /// has ended.
    pub stager: Option<Recipient<StageAhead>>,
}

/// The owner of all operations, tasks and slots.
pub struct SchedulerActor {
    mail: Mail,
    ledger: Ledger,
    runners: HashMap<PoolId, Recipient<RunAction>>,
    stagers: HashMap<PoolId, Recipient<StageAhead>>,
    inputs: Box<dyn InputCheck>,
    /// Pulls container images; `None` if actions cannot name any.
    images: Option<Arc<dyn ImageSupply>>,
    /// Time limit of an input check, and of an image pull.
    transfer_timeout: Duration,
    /// The name of this server.
    node: NodeName,
    drained: Vec<oneshot::Sender<()>>,
    /// The senders of [`DrainPool`] that wait for the end of all runs of a pool.
    drained_pools: Vec<(PoolId, oneshot::Sender<()>)>,
}

impl SchedulerActor {
    /// A scheduler over these pools.
    pub fn new(settings: SchedulerSettings, pools: Vec<Pool>, inputs: impl InputCheck) -> Self {
        let ledger = Ledger::new(settings, pools.iter().map(|pool| pool.spec.clone()).collect());
        // The ids ascend in the order of the list.
        let ids: BTreeSet<_> = ledger.pools().into_iter().map(|pool| pool.id).collect();
        let mut scheduler = Self {
            mail: Mail::default(),
            ledger,
            runners: HashMap::new(),
            stagers: HashMap::new(),
            inputs: Box::new(inputs),
            images: None,
            transfer_timeout: settings.transfer_timeout,
            node: settings.node,
            drained: Vec::new(),
            drained_pools: Vec::new(),
        };
        ids.into_iter().zip(pools).for_each(|(id, pool)| scheduler.connect(id, pool.runner, pool.stager));
        scheduler
    }

    fn connect(&mut self, id: PoolId, runner: Recipient<RunAction>, stager: Option<Recipient<StageAhead>>) {
        self.runners.insert(id, runner);
        if let Some(stager) = stager {
            self.stagers.insert(id, stager);
            self.ledger.stage_ahead_in(id);
        }
    }

    /// Stops a pool from taking tasks, and logs it once.
    fn drain_pool(&mut self, id: PoolId) -> Result<()> {
        if self.ledger.drain_pool(id)? {
            Event::info(log::TARGET, log::POOL_DRAINING)
                .with("pool", &*self.ledger.pool_name(id))
                .with("running", self.ledger.runs_in(id))
                .log(format_args!("a pool takes no more work"));
        }
        Ok(())
    }

    /// Makes tasks wait for the container images that they name before they get a slot, if actions can name images.
    pub fn with_images(mut self, images: Option<Arc<dyn ImageSupply>>) -> Self {
        if images.is_some() {
            self.ledger.bring_images();
        }
        self.images = images;
        self
    }

    /// The counter of the messages that the actor handles.
    pub fn mail(&self) -> Mail {
        self.mail.clone()
    }
}

counted!(SchedulerActor);

impl Actor for SchedulerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
        ctx.run_interval(TICK_INTERVAL, |actor, ctx| actor.receive(Tick, ctx));
    }
}

/// A fact: the store has checked the inputs of a task.
#[derive(Message)]
#[rtype(result = "()")]
struct InputsChecked {
    task: TaskId,
    result: Result<()>,
}

/// A fact: the pull of a task's image has ended.
#[derive(Message)]
#[rtype(result = "()")]
struct ImageBrought {
    task: TaskId,
    result: Result<()>,
}

/// A fact: a run has ended.
#[derive(Message)]
#[rtype(result = "()")]
struct RunEnded {
    task: TaskId,
    attempt: u32,
    end: RunEnd,
}

/// A fact: a pool has staged the inputs of a waiting task, or has given up.
#[derive(Message)]
#[rtype(result = "()")]
struct StagingEnded {
    pool: PoolId,
}

/// A fact: time has passed.
#[derive(Message)]
#[rtype(result = "()")]
struct Tick;

impl Receive<Tick> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, _: Tick, ctx: &mut Self::Context) {
        let builds = self.ledger.active_builds(TASKS_PER_TICK);
        if !builds.is_empty() {
            self.inputs.keep_active(builds);
        }
        for place in self.ledger.tick(ClockReading::now()) {
            Event::warn(log::TARGET, log::SLOT_STUCK)
                .with("pool", &*place.pool)
                .with("slot", place.slot.0)
                .log(format_args!("a worker does not answer; its slot is out of service until it does"));
        }
        self.settle(ctx);
    }
}

impl Receive<Admit> for SchedulerActor {
    type Answer = Result<Subscription>;

    fn receive(&mut self, Admit { submit, resolution }: Admit, ctx: &mut Self::Context) -> Self::Answer {
        let admitted =
            self.ledger.admit(submit, resolution, OperationId::random(self.node), ClockReading::now());
        self.settle(ctx);
        admitted
    }
}

impl Receive<Record> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, Record(operations): Record, _: &mut Self::Context) {
        let now = ClockReading::now();
        for operation in operations {
            self.ledger.record(operation, now);
        }
        self.log_transitions();
    }
}

impl Receive<InputsChecked> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, InputsChecked { task, result }: InputsChecked, ctx: &mut Self::Context) {
        self.ledger.inputs_checked(task, result, ClockReading::now());
        self.settle(ctx);
    }
}

impl Receive<ImageBrought> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, ImageBrought { task, result }: ImageBrought, ctx: &mut Self::Context) {
        self.ledger.image_brought(task, result, ClockReading::now());
        self.settle(ctx);
    }
}

impl Receive<StagingEnded> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, StagingEnded { pool }: StagingEnded, ctx: &mut Self::Context) {
        self.ledger.staging_ended(pool);
        self.settle(ctx);
    }
}

impl Receive<StageReached> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, fact: StageReached, _: &mut Self::Context) {
        self.ledger.stage_reached(fact);
    }
}

impl Receive<RunEnded> for SchedulerActor {
    type Answer = ();

    fn receive(&mut self, RunEnded { task, attempt, end }: RunEnded, ctx: &mut Self::Context) {
        self.ledger.finish(task, attempt, end, ClockReading::now());
        self.settle(ctx);
    }
}

impl Receive<Watch> for SchedulerActor {
    type Answer = Result<Subscription>;

    fn receive(&mut self, Watch { instance, id }: Watch, _: &mut Self::Context) -> Self::Answer {
        self.ledger.watch(&instance, id)
    }
}

impl Receive<Cancel> for SchedulerActor {
    type Answer = Result<()>;

    fn receive(&mut self, Cancel { instance, id }: Cancel, ctx: &mut Self::Context) -> Self::Answer {
        let cancelled = self.ledger.cancel(&instance, id, ClockReading::now());
        self.settle(ctx);
        cancelled
    }
}

impl Receive<Forget> for SchedulerActor {
    type Answer = Result<()>;

    fn receive(&mut self, Forget { instance, id }: Forget, _: &mut Self::Context) -> Self::Answer {
        self.ledger.forget(&instance, id)
    }
}

impl Receive<Explain> for SchedulerActor {
    type Answer = Option<Box<QueueStatus>>;

    fn receive(&mut self, Explain { instance, id }: Explain, _: &mut Self::Context) -> Self::Answer {
        self.ledger.explain(&instance, id, ClockReading::now()).map(Box::new)
    }
}

impl Receive<ListOperations> for SchedulerActor {
    type Answer = Result<OperationPage>;

    fn receive(&mut self, query: ListOperations, _: &mut Self::Context) -> Self::Answer {
        self.ledger.list(&query)
    }
}

impl Receive<Inspect> for SchedulerActor {
    type Answer = MessageResult<Inspect>;

    fn receive(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Answer {
        MessageResult(self.ledger.inspect())
    }
}

impl Receive<Measure> for SchedulerActor {
    type Answer = MessageResult<Measure>;

    fn receive(&mut self, _: Measure, _: &mut Self::Context) -> Self::Answer {
        MessageResult(self.ledger.measure(ClockReading::now()))
    }
}

impl Receive<AddPool> for SchedulerActor {
    type Answer = Result<PoolId>;

    fn receive(
        &mut self,
        AddPool { pool: Pool { spec, runner, stager }, replaces }: AddPool,
        ctx: &mut Self::Context,
    ) -> Self::Answer {
        let (name, slots) = (spec.name.clone(), spec.slots);
        let id = self.ledger.add_pool(spec, replaces)?;
        self.connect(id, runner, stager);
        Event::info(log::TARGET, log::POOL_ADDED)
            .with("pool", &*name)
            .with("slots", slots)
            .log(format_args!("a pool takes work"));
        if let Some(old) = replaces {
            // A pool that is gone takes no tasks either.
            let _ = self.drain_pool(old);
        }
        self.settle(ctx);
        Ok(id)
    }
}

impl Receive<DrainPool> for SchedulerActor {
    type Answer = ResponseFuture<Result<()>>;

    fn receive(&mut self, DrainPool { id }: DrainPool, ctx: &mut Self::Context) -> Self::Answer {
        if let Err(error) = self.drain_pool(id) {
            return Box::pin(ready(Err(error)));
        }
        let (sender, drained) = oneshot::channel();
        self.drained_pools.push((id, sender));
        self.settle(ctx);
        Box::pin(async {
            // If the actor is gone, it has no runs either.
            let _ = drained.await;
            Ok(())
        })
    }
}

impl Receive<RemovePool> for SchedulerActor {
    type Answer = Result<()>;

    fn receive(&mut self, RemovePool { id }: RemovePool, ctx: &mut Self::Context) -> Self::Answer {
        let name = self.ledger.pool_name(id);
        self.ledger.remove_pool(id, ClockReading::now())?;
        // Its workers end when the last run has reported.
        self.runners.remove(&id);
        self.stagers.remove(&id);
        Event::info(log::TARGET, log::POOL_REMOVED)
            .with("pool", &*name)
            .with("running", self.ledger.runs_in(id))
            .log(format_args!("a pool is gone"));
        self.settle(ctx);
        Ok(())
    }
}

impl Receive<ListPools> for SchedulerActor {
    type Answer = MessageResult<ListPools>;

    fn receive(&mut self, _: ListPools, _: &mut Self::Context) -> Self::Answer {
        MessageResult(self.ledger.pools())
    }
}

impl Receive<Drain> for SchedulerActor {
    type Answer = ResponseFuture<()>;

    fn receive(&mut self, Drain { cancel }: Drain, ctx: &mut Self::Context) -> Self::Answer {
        let Inspection { queued, running, .. } = self.ledger.inspect();
        Event::info(log::TARGET, log::DRAINING)
            .with("cancel", cancel)
            .with("queued", queued)
            .with("running", running)
            .log(format_args!("the scheduler takes no more work"));
        self.ledger.drain(cancel, ClockReading::now());
        let (sender, drained) = oneshot::channel();
        self.drained.push(sender);
        self.settle(ctx);
        Box::pin(async {
            // If the actor is gone, it has no tasks left either.
            let _ = drained.await;
        })
    }
}
