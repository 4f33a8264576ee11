//! Carries out the decisions of the ledger: sends checks and image orders, runs and staging orders, and logs
//! transitions.

use super::{
    ImageBrought, InputsChecked, RunEnded, SchedulerActor, StagingEnded,
    ledger::{Assignment, Check, ImageOrder, RunEnd, StagingOrder},
    log,
    settings::ClockReading,
};
use crate::{
    actors::worker::messages::{RunAction, RunControl, RunOrder, StageAhead},
    caller::Caller,
};
use actix::{AsyncContext as _, Context, MailboxError};
use gorego_reapi::error::Error;

impl SchedulerActor {
    /// Carries out the decisions of the ledger. It is called after every change to the ledger.
    pub(super) fn settle(&mut self, ctx: &mut Context<Self>) {
        let now = ClockReading::now();
        while let Some(check) = self.ledger.next_check(now) {
            self.send_check(check, ctx);
        }
        while let Some(order) = self.ledger.next_image(now) {
            self.send_image_order(order, ctx);
        }
        while let Some(assignment) = self.ledger.assign(now) {
            self.send_run(assignment, ctx);
        }
        while let Some(order) = self.ledger.next_staging() {
            self.send_staging_order(order, ctx);
        }
        self.log_transitions();
        if self.ledger.is_idle() {
            for waiter in self.drained.drain(..) {
                // The sender of the Drain may be gone.
                let _ = waiter.send(());
            }
        }
        let ledger = &self.ledger;
        for (_, waiter) in self.drained_pools.extract_if(.., |(pool, _)| ledger.runs_in(*pool) == 0) {
            let _ = waiter.send(());
        }
    }

    pub(super) fn log_transitions(&mut self) {
        for transition in self.ledger.take_transitions() {
            log::transition(&transition);
        }
    }

    fn send_check(&self, Check { task, instance, root, build }: Check, ctx: &mut Context<Self>) {
        let checking = tokio::time::timeout(self.transfer_timeout, self.inputs.check(instance, root, build));
        let scheduler = ctx.address();
        actix::spawn(async move {
            let silent =
                |_| Err(Error::Unavailable("the store of this server does not answer; try again".into()));
            let result = checking.await.unwrap_or_else(silent);
            scheduler.do_send(InputsChecked { task, result });
        });
    }

    fn send_image_order(&self, ImageOrder { task, name, peer, left }: ImageOrder, ctx: &mut Context<Self>) {
        let Some(images) = &self.images else { return };
        let brought = images.bring(&name, Caller::without_connection(peer));
        let (scheduler, limit) = (ctx.address(), self.transfer_timeout);
        actix::spawn(async move {
            let result = tokio::select! {
                brought = tokio::time::timeout(limit, brought) => brought.unwrap_or_else(|_| {
                    Err(Error::Unavailable(format!(
                        "image {name} was not there within {limit:?} (execution.transfer_timeout of this server)"
                    )))
                }),
                _ = left => return,
            };
            scheduler.do_send(ImageBrought { task, result });
        });
    }

    fn send_run(&self, assignment: Assignment, ctx: &mut Context<Self>) {
        let Assignment {
            task,
            attempt,
            pool,
            slot,
            action,
            peer,
            queued_at,
            tool_invocation_id,
            principal,
            cancel,
        } = assignment;
        let scheduler = ctx.address();
        let Some(runner) = self.runners.get(&pool).cloned() else {
            return scheduler.do_send(RunEnded { task, attempt, end: RunEnd::Lost { pool_closed: true } });
        };
        let run = RunAction {
            order: RunOrder { task, attempt, slot, action, peer, queued_at, tool_invocation_id, principal },
            control: RunControl { cancel, progress: scheduler.clone().recipient() },
        };
        actix::spawn(async move {
            let end = match runner.send(run).await {
                Ok(report) => RunEnd::Reported(report),
                // The worker died without an answer. Workers catch panics. So if the pool still accepts messages, only
                // an answer was lost and no thread, and the slot can be used again. In the worst case, a task then
                // waits inside the pool for another thread. If slots were withdrawn instead, all of them would be lost
                // over time.
                Err(MailboxError::Closed | MailboxError::Timeout) => {
                    RunEnd::Lost { pool_closed: !runner.connected() }
                }
            };
            scheduler.do_send(RunEnded { task, attempt, end });
        });
    }

    fn send_staging_order(&self, order: StagingOrder, ctx: &mut Context<Self>) {
        let StagingOrder { task, pool, action, owner, cancel } = order;
        let stager = self.stagers.get(&pool).cloned();
        let scheduler = ctx.address();
        actix::spawn(async move {
            if let Some(stager) = stager {
                // An order that is lost with its pool is not needed any more.
                let _ = stager.send(StageAhead { task, action, owner, cancel }).await;
            }
            scheduler.do_send(StagingEnded { pool });
        });
    }
}
