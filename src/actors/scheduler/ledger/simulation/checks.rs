//! The invariants that are checked after every step of the simulation.

use super::*;

impl World {
    pub(super) fn check(&mut self) {
        self.check_transitions();
        self.check_subscribers();
        self.check_runs();
        self.check_tasks();
        self.check_images();
        self.check_stagings();
        self.check_pools();
        self.check_queues();
        self.check_demand();
        self.check_followers();
        self.check_bounds();
    }

    /// Each transition is one that its operation can make.
    fn check_transitions(&mut self) {
        for Transition { info, event, .. } in self.ledger.take_transitions() {
            let known = self.known.get(&info.id).expect("a transition of an operation that was refused");
            assert_eq!(known.completed, 0, "nothing happens after the end");
            match event {
                OperationEvent::Queued { joined } => self.note_queued(info.id, joined),
                OperationEvent::Executing { attempt, .. } => self.note_executing(info.id, attempt),
                OperationEvent::Requeued { reason, .. } => self.note_requeued(info.id, &reason.to_string()),
                OperationEvent::Completed { outcome, .. } => self.note_completed(info.id, &outcome),
            }
        }
    }

    fn note_queued(&mut self, id: OperationId, joined: bool) {
        let known = &self.known[&id];
        assert!(!(joined && known.do_not_cache), "uncacheable work is never merged (EXE-15)");
        assert!(known.stage == Stage::Queued);
        if joined {
            if self.ledger.tasks.values().any(|task| task.waiters.len() > 1) {
                self.seen.insert("shared");
            }
            self.seen.insert("joined");
        }
    }

    fn note_executing(&mut self, id: OperationId, attempt: u32) {
        assert!(attempt >= 1 && attempt <= self.ledger.settings.max_attempts + self.pools.removed());
        self.set_stage(id, Stage::Executing);
    }

    fn note_requeued(&mut self, id: OperationId, reason: &str) {
        for (part, sight) in [
            ("was removed", "moved from its pool"),
            ("ran out of memory", "moved to more memory"),
            ("did not stop", "moved from a run that did not stop"),
        ] {
            if reason.contains(part) {
                self.seen.insert(sight);
            }
        }
        assert_eq!(self.known[&id].stage, Stage::Executing, "only running work is requeued");
        self.seen.insert("requeued");
        self.set_stage(id, Stage::Queued);
    }

    fn note_completed(&mut self, id: OperationId, outcome: &Outcome) {
        self.set_stage(id, Stage::Completed);
        let known = self.known.get_mut(&id).unwrap();
        known.completed += 1;
        assert_eq!(outcome.cached, known.cached);
        assert!(outcome.result.is_some() || outcome.error.is_some());
        assert!(
            known.may_be_cancelled || !matches!(outcome.error, Some(Error::Cancelled(_))),
            "cancelled by somebody else (OPS-04)"
        );
        self.finished.insert(id);
        if let Some(Error::Unavailable(message)) = &outcome.error
            && message.contains("no client followed")
        {
            assert!(known.subscription.is_none(), "only what nobody follows makes way");
            self.seen.insert("made way");
        }
        self.seen.extend(match &outcome.error {
            None => outcome.cached.then_some("cached"),
            Some(Error::Invalid(_)) => Some("unusable"),
            Some(Error::MissingBlobs(_)) => Some("missing inputs"),
            Some(Error::Exhausted { .. }) => Some("waited too long"),
            Some(Error::Unavailable(_)) => Some("given up"),
            Some(Error::Precondition(_)) => Some("ended with its pool"),
            Some(_) => None,
        });
    }

    fn set_stage(&mut self, id: OperationId, stage: Stage) {
        let known = self.known.get_mut(&id).unwrap();
        known.stage = stage;
        if stage != Stage::Completed {
            known.run_stage = None;
        }
    }

    fn check_subscribers(&mut self) {
        for known in self.known.values_mut().rev().take(RECENT) {
            let Some(subscription) = &known.subscription else { continue };
            let snapshot = subscription.snapshots.borrow();
            assert_eq!(snapshot.stage, known.stage, "a subscriber sees each transition");
            assert_eq!(snapshot.outcome.is_some(), snapshot.stage == Stage::Completed);
            let run_stage = snapshot.run_stage.map(|(stage, _)| stage);
            assert!(snapshot.stage == Stage::Completed || run_stage >= known.run_stage, "a step back");
            known.run_stage = run_stage;
        }
    }

    fn check_runs(&self) {
        let ledger = &self.ledger;
        let known = self.runs.iter().filter(|((pool, _), out)| self.is_known(*pool, out));
        assert_eq!(ledger.runs.len(), known.count(), "every run is out");
        let mut kept = self.runs.iter().filter(|((pool, _), _)| self.pools.contains(*pool));
        assert!(kept.all(|((pool, _), out)| self.is_known(*pool, out)), "every run of a pool is known");
        for (&(pool, _), out) in &self.runs {
            let wanted =
                ledger.tasks.contains_key(&out.task) && self.pools.contains(pool) && self.is_known(pool, out);
            assert_ne!(
                wanted,
                out.cancel.is_cancelled(),
                "a run is stopped exactly when nobody waits for it or its pool is gone"
            );
        }
    }

    fn check_tasks(&self) {
        let ledger = &self.ledger;
        let settings = &ledger.settings;
        let waiting = ledger.tasks.values().filter(|task| task.step != TaskStep::Running).count();
        let mut quota = QueueQuota::new(settings);
        for task in ledger.tasks.values() {
            quota.add(task.owner, task.load());
            assert!(
                task.waiters.contains_key(&task.owner) && task.waiters.values().all(|own| !own.is_empty())
            );
        }
        assert_eq!(quota, ledger.quota, "what there is counts, once, for the right owner");
        assert_eq!(quota.all().waiting, waiting);
        assert!(waiting <= settings.queue_size + self.most_out);
    }

    fn check_images(&mut self) {
        let ledger = &self.ledger;
        for order in &mut self.images {
            let waits = |task: &Task| task.step == TaskStep::AwaitingImage;
            assert_eq!(
                order.left.try_recv().is_err_and(|left| left == TryRecvError::Empty),
                ledger.tasks.get(&order.task).is_some_and(waits),
                "an order is closed when its task does not wait any more"
            );
        }
    }

    fn check_bounds(&self) {
        let ledger = &self.ledger;
        let settings = &ledger.settings;
        let unfinished: usize = ledger.tasks.values().map(|task| task.numbers().count()).sum();
        assert_eq!(ledger.register.unfinished(), unfinished, "each operation waits for one task");
        assert!(unfinished <= settings.unfinished_operations);
        assert!(ledger.tasks.values().all(|task| !task.waiters.is_empty()));
        assert!(ledger.joinable.values().all(|id| ledger.tasks.contains_key(id)));
        let bound = settings.retained_operations + 2 * settings.retained_cached;
        assert!(ledger.register.len() <= unfinished + bound, "what is remembered is bounded");
    }
}
