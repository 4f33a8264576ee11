//! The steps of a task until it runs: the check of its inputs, the order of its image, the assignment of a slot, and
//! the stages of the run. `conclusion` handles its end.

use super::{Ledger, Outcome, Snapshot, TaskRun, TaskStep};
use crate::{
    action::Action,
    actors::{
        scheduler::{
            operation::Stage,
            quota::{Load, SHARE},
            settings::{ClockReading, SchedulerSettings},
            slots::PoolId,
            transition::{OperationEvent, Transition},
        },
        worker::{
            cancel::CancelToken,
            messages::{RunReport, RunStage, SlotId, StageReached, TaskId},
        },
    },
    caller::{Build, Owner, Peer},
    instance::Instance,
    platform::wanted_image,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::oneshot;

/// A decision: check whether the inputs of a task are stored.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) task: TaskId,
    pub(crate) instance: Instance,
    /// The digest of the input root.
    pub(crate) root: Digest,
    /// The peer whose turn it was, and the build of the first operation. The inputs are leased to it.
    pub(crate) build: Owner,
}

/// A decision: pull the container image that a task names.
#[derive(Debug)]
pub(crate) struct ImageOrder {
    pub(crate) task: TaskId,
    pub(crate) name: String,
    /// The peer for which the task counts.
    pub(crate) peer: Peer,
    /// Closed when the task no longer waits for the image.
    pub(crate) left: oneshot::Receiver<Infallible>,
}

/// A decision: run a task on a slot.
#[derive(Debug)]
pub(crate) struct Assignment {
    pub(crate) task: TaskId,
    /// The number of the attempt, from 1.
    pub(crate) attempt: u32,
    pub(crate) pool: PoolId,
    pub(crate) slot: SlotId,
    pub(crate) action: Arc<Action>,
    /// The peer whose turn it was.
    pub(crate) peer: Peer,
    /// The time of the submission.
    pub(crate) queued_at: SystemTime,
    /// The tool invocation of the first operation.
    pub(crate) tool_invocation_id: String,
    /// The name of the principal of the first operation.
    pub(crate) principal: String,
    /// Tells the run to stop.
    pub(crate) cancel: CancelToken,
}

/// A fact: how a run ended.
#[derive(Debug)]
pub(crate) enum RunEnd {
    /// The worker has reported the end.
    Reported(RunReport),
    /// The worker died without a report.
    Lost {
        /// Whether all workers of the pool are gone.
        pool_closed: bool,
    },
}

impl Ledger {
    /// The next task whose inputs must be checked, in the order of a queue. `None` if enough checks are running, or if
    /// the next peer or build has its share of them. Each check must be answered by [`Ledger::inputs_checked`] in any
    /// case.
    pub(crate) fn next_check(&mut self, now: ClockReading) -> Option<Check> {
        let left = self.settings.concurrent_checks.checked_sub(self.checks.len() + 1)?;
        let (of_peer, of_build) = self.unchecked.running_of_next(now.at);
        // The number of further checks that its peer may have after this one.
        let left_to_peer = left.saturating_mul(SHARE).saturating_sub(of_peer + 1) / (SHARE + 1);
        if of_peer > 0 && of_peer >= left.saturating_mul(SHARE)
            || of_build > 0 && of_build >= left_to_peer.saturating_mul(SHARE)
        {
            return None;
        }
        let (id, charge) = self.unchecked.pop(now.at)?;
        self.checks.insert(id, charge);
        let task = self.tasks.get_mut(&id)?;
        for entry in task.entries(id) {
            self.unchecked.remove(&entry);
        }
        task.step = TaskStep::Checking;
        Some(Check {
            task: id,
            instance: task.action.instance.clone(),
            root: task.action.input_root,
            build: Owner { peer: charge.owner.peer, build: Build::of(&task.first.client.tool_invocation_id) },
        })
    }

    /// The store has checked the inputs of a task. An error ends the task before it takes a slot.
    pub(crate) fn inputs_checked(&mut self, id: TaskId, result: Result<()>, now: ClockReading) {
        if let Some(charge) = self.checks.remove(&id) {
            self.unchecked.ended(charge);
        }
        let Some(task) = self.tasks.get_mut(&id).filter(|task| task.step == TaskStep::Checking) else {
            return;
        };
        match result {
            Ok(()) if self.brings_images && !matches!(wanted_image(&task.action.platform), Ok(None)) => {
                task.step = TaskStep::AwaitingImage;
                self.image_orders.push_back(id);
            }
            Ok(()) => self.make_ready(id),
            Err(error) => self.end_task(id, Outcome::failed(error), now),
        }
    }

    /// The next task whose image must be pulled. Each order should be answered by [`Ledger::image_brought`], unless the
    /// task has left. Only the size of the queue bounds the number of orders: a task with an order only waits, and
    /// pulls are shared.
    pub(crate) fn next_image(&mut self, now: ClockReading) -> Option<ImageOrder> {
        while let Some(id) = self.image_orders.pop_front() {
            let Some(task) = self.tasks.get_mut(&id) else { continue };
            match wanted_image(&task.action.platform) {
                Ok(Some(name)) => {
                    let (order, left) = oneshot::channel();
                    task.image_order = Some(order);
                    return Some(ImageOrder { task: id, name: name.to_owned(), peer: task.owner.peer, left });
                }
                Ok(None) => self.make_ready(id),
                Err(problem) => self.end_task(id, Outcome::failed(Error::Invalid(problem)), now),
            }
        }
        None
    }

    /// The pull of a task's image has ended, so the task may get a slot. An error ends the task before it gets one. If
    /// the disk has no room for the image, the task gets its slot anyway, because the worker frees disk space for the
    /// run.
    pub(crate) fn image_brought(&mut self, id: TaskId, result: Result<()>, now: ClockReading) {
        let Some(task) = self.tasks.get_mut(&id).filter(|task| task.step == TaskStep::AwaitingImage) else {
            return;
        };
        task.image_order = None;
        match result {
            Ok(()) | Err(Error::DiskFull(_)) => self.make_ready(id),
            Err(error) => self.end_task(id, Outcome::failed(error), now),
        }
    }

    fn make_ready(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.step = TaskStep::Ready;
        self.enter_queues(id);
    }

    /// The next task to run, with its slot. `None` if there is no free slot for a ready task; then runs without
    /// followers are stopped for waiting tasks with followers. Pools choose in order of preference, so a task goes to
    /// the most preferred pool that is free. Each assignment must be answered by [`Ledger::finish`] in any case.
    pub(crate) fn assign(&mut self, now: ClockReading) -> Option<Assignment> {
        let Some((pool, id, charge)) = self.next_ready(now) else {
            self.free_slots_for_followed(now);
            return None;
        };
        let task = self.tasks.get_mut(&id)?;
        let (place, room) = self.slots.take(pool, &task.action)?;
        task.step = TaskStep::Running;
        if let Some(staging) = &task.staging {
            staging.stop();
        }
        self.unfollowed.note(id, task);
        // If the task is queued again, it has another position.
        task.position = None;
        task.attempts = task.attempts.saturating_add(1);
        self.quota.remove(task.owner, Load::TURN);
        let run = TaskRun {
            attempt: task.attempts,
            pool,
            place: place.clone(),
            room,
            charge,
            cancel: CancelToken::new(),
            started: now.at,
            deadline: now.after(longest_run(&self.settings, task.action.timeout)),
            // A worker does not report its first stage.
            reached: Some((RunStage::Fetching, now.wall)),
            logs: None,
            stuck: false,
            evicted: false,
        };
        let assignment = Assignment {
            task: id,
            attempt: task.attempts,
            pool,
            slot: place.slot,
            action: task.action.clone(),
            peer: charge.owner.peer,
            queued_at: task.queued_at,
            tool_invocation_id: task.first.client.tool_invocation_id.clone(),
            principal: task.first.principal.name().to_owned(),
            cancel: run.cancel.clone(),
        };
        self.show_executing(id, &run, now);
        self.runs.insert(id, run);
        self.count_demand(id);
        Some(assignment)
    }

    /// Updates the operations of a task with the place where it runs.
    fn show_executing(&mut self, id: TaskId, run: &TaskRun, now: ClockReading) {
        let Some(task) = self.tasks.get(&id) else { return };
        for number in task.numbers() {
            let executing = |snapshot: &mut Snapshot| {
                snapshot.stage = Stage::Executing;
                snapshot.place = Some(run.place.clone());
                snapshot.run_stage = run.reached;
            };
            let Some(operation) = self.register.update(number, executing) else { continue };
            let event = OperationEvent::Executing {
                place: run.place.clone(),
                queued_for: now.since(operation.queued),
                attempt: task.attempts,
            };
            let (info, priority) = (operation.info.clone(), operation.priority);
            self.transitions.push(Transition { info, priority, event });
        }
    }

    /// A worker has entered a stage of a run. Late or repeated reports are ignored.
    pub(crate) fn stage_reached(&mut self, fact: StageReached) {
        let run = self.runs.get_mut(&fact.task).filter(|run| run.attempt == fact.attempt);
        let Some(run) = run else { return };
        if run.reached.is_some_and(|(stage, _)| stage >= fact.stage) {
            return;
        }
        run.reached = Some((fact.stage, fact.at));
        run.logs = fact.logs.or(run.logs);
        let logs = run.logs;
        let Some(task) = self.tasks.get(&fact.task) else { return };
        for number in task.numbers() {
            self.register.update(number, |snapshot| {
                snapshot.run_stage = Some((fact.stage, fact.at));
                snapshot.logs = logs;
            });
        }
    }
}

/// How long a run may take, including all transfers and the time that its worker has to report.
fn longest_run(settings: &SchedulerSettings, timeout: Duration) -> Duration {
    [timeout, settings.transfer_timeout, settings.transfer_timeout, settings.run_slack]
        .into_iter()
        .fold(Duration::ZERO, Duration::saturating_add)
}
