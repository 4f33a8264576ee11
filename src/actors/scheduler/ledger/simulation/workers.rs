//! The store and the workers of the simulation: they answer checks and image orders, take tasks and report runs.

use super::*;

impl World {
    pub(super) fn send_checks(&mut self) {
        while let Some(check) = self.ledger.next_check(self.now) {
            self.checks.push(check.task);
        }
        assert!(self.checks.len() <= self.ledger.settings.concurrent_checks);
        while let Some(order) = self.ledger.next_image(self.now) {
            self.images.push(order);
        }
    }

    pub(super) fn answer_image(&mut self) {
        if self.images.is_empty() {
            return;
        }
        let order = self.images.swap_remove(self.random.below(self.images.len()));
        let result = match self.random.below(10) {
            0 => Err(Error::Unavailable("no registry".into())),
            1 => Err(Error::DiskFull("no room".into())),
            _ => Ok(()),
        };
        // The ledger also gets answers about images for which no task waits any more.
        let has_left = !self.ledger.tasks.contains_key(&order.task);
        let sight = match (has_left, &result) {
            (true, _) => "left before its image came",
            (false, Err(Error::Unavailable(_))) => "image failed",
            (false, _) => "image brought",
        };
        self.ledger.image_brought(order.task, result, self.now);
        self.seen.insert(sight);
    }

    pub(super) fn answer_check(&mut self) {
        if self.checks.is_empty() {
            return;
        }
        let task = self.checks.swap_remove(self.random.below(self.checks.len()));
        let missing = Error::MissingBlobs(vec![digest(&work(0))]);
        let result = if self.random.chance(10) { Err(missing) } else { Ok(()) };
        self.ledger.inputs_checked(task, result, self.now);
    }

    pub(super) fn assign(&mut self) {
        for _ in 0..=self.random.below(3) {
            let is_exact = self.random.chance(50);
            if is_exact {
                self.ledger.find_unfollowed(self.now);
            }
            let before: Vec<WaitingTask> = self.waiting();
            let out = |pool: PoolId| self.runs.keys().filter(|(of, _)| *of == pool).count();
            let free = |pool: PoolId| self.pools.is_open(pool) && out(pool) < self.pools.slots(pool);
            let wanting = |pool: PoolId| before.iter().filter(move |waiting| waiting.pools.contains(&pool));
            let fits = |pool: PoolId, waiting: &WaitingTask| {
                self.left(pool).is_none_or(|left| left.holds(&self.pools.need(pool, &waiting.platform)))
            };
            // The queue decides which of the tasks with room is next.
            let could = |pool: PoolId| free(pool) && wanting(pool).any(|waiting| fits(pool, waiting));
            let must = |pool: PoolId| could(pool) && wanting(pool).all(|waiting| fits(pool, waiting));
            let order = self.pools.order();
            let able: Vec<PoolId> = order.iter().copied().filter(|pool| could(*pool)).collect();
            let first = order.iter().copied().find(|pool| must(*pool));
            let stopping = self.stopping();
            let assignment = self.ledger.assign(self.now);
            let chosen = assignment.as_ref().map(|assignment| assignment.pool);
            let at = |pool: PoolId| order.iter().position(|other| *other == pool);
            assert!(
                chosen.is_none_or(|pool| able.contains(&pool)),
                "a pool has a slot and room for what it runs"
            );
            let is_learned = assignment.as_ref().is_some_and(|assignment| self.ran_out(assignment));
            if is_learned && first.is_some_and(|first| at(first) < chosen.and_then(at)) {
                self.seen.insert("passed a pool in which its kind ran out of memory");
            }
            assert!(
                first.is_none_or(|first| is_learned || chosen.is_some_and(|pool| at(pool) <= at(first))),
                "no slot idles while there is work for it"
            );
            let kept = able.first().is_some_and(|first| chosen.is_none_or(|pool| at(*first) < at(pool)));
            if let Some(Assignment { task, pool, .. }) = assignment {
                self.check_turn(&before, task, pool, is_exact);
            }
            if kept {
                self.seen.insert("kept room for a large one");
            }
            let Some(assignment) = assignment else { return self.check_way_made(stopping) };
            let slot = (assignment.pool, assignment.slot);
            assert!(self.pools.is_open(assignment.pool), "a pool that takes no tasks gets none");
            assert!(assignment.slot.0 < self.pools.slots(assignment.pool), "only slots that there are");
            let need = self.pools.need(assignment.pool, &assignment.action.platform);
            assert!(self.left(assignment.pool).is_none_or(|left| left.holds(&need)), "it has room");
            let Assignment { task, attempt, cancel, .. } = assignment;
            let out = Out { task, attempt, cancel, stage: None, need };
            assert!(self.runs.insert(slot, out).is_none(), "slot {slot:?} is given out twice");
            self.most_out = self.most_out.max(self.runs.len());
            let out = self.runs.keys().filter(|(of, _)| *of == slot.0).count();
            if out > 1 && self.left(slot.0).is_some_and(|left| left.cores == 0) {
                self.seen.insert("shared room");
            }
        }
    }

    /// Whether actions of the same kind have taken more memory than some pool of this task gives.
    pub(super) fn ran_out(&self, assignment: &Assignment) -> bool {
        let Some(task) = self.ledger.tasks.get(&assignment.task) else { return false };
        let key = self.ledger.peak_key(&task.first);
        let Some(peak) = key.and_then(|key| self.ledger.peaks.of(key)) else { return false };
        task.pools.iter().any(|pool| self.ledger.slots.memory(*pool, &assignment.action) < peak)
    }

    /// The free room of a pool.
    pub(super) fn left(&self, pool: PoolId) -> Option<Room> {
        let out = self.runs.iter().filter(|((of, _), _)| *of == pool);
        let room = self.pools.room(pool)?;
        Some(out.fold(room, |left, (_, out)| left.without(&out.need)))
    }

    pub(super) fn pick_run(&mut self) -> Option<(PoolId, SlotId)> {
        let slots: Vec<_> = self.runs.keys().copied().collect();
        self.random.pick(&slots)
    }

    pub(super) fn report_stage(&mut self) {
        let Some(slot) = self.pick_run() else { return };
        // Reports may be repeated or late.
        let stages = [RunStage::Fetching, RunStage::Running, RunStage::Uploading];
        let stage = self.random.pick(&stages).unwrap();
        let out = self.runs.get_mut(&slot).unwrap();
        out.stage = out.stage.max(Some(stage));
        let Out { task, attempt, .. } = *out;
        self.ledger.stage_reached(StageReached { task, attempt, stage, at: self.now.wall, logs: None });
    }

    pub(super) fn end_run(&mut self) {
        let Some(slot) = self.pick_run() else { return };
        let out = self.runs.remove(&slot).unwrap();
        let failure = |error, retryable| Err(RunFailure { retryable, ..RunFailure::new(error) });
        let end = match self.random.below(20) {
            0..12 if out.cancel.is_cancelled() => {
                RunEnd::Reported(failure(Error::Cancelled("stopped".into()), false))
            }
            0..12 => {
                let out_of_memory = self.random.chance(20);
                if out_of_memory {
                    self.seen.insert("ran out of memory");
                }
                let account = Account { out_of_memory, ..Account::default() };
                RunEnd::Reported(Ok(Box::new(RunResult { result: Default::default(), account })))
            }
            12..14 => RunEnd::Reported(failure(Error::DeadlineExceeded("too slow".into()), false)),
            14..17 => RunEnd::Reported(failure(Error::internal("bad luck"), true)),
            _ => {
                let pool_closed = self.random.chance(5) || self.pools.is_closed(slot.0);
                if pool_closed {
                    self.pools.close(slot.0);
                    self.seen.insert("pool closed");
                }
                RunEnd::Lost { pool_closed }
            }
        };
        if self.is_known(slot.0, &out) {
            self.ledger.finish(out.task, out.attempt, end, self.now);
        } else {
            let before = self.ledger.runs.len();
            self.ledger.finish(out.task, out.attempt, end, self.now);
            assert_eq!(
                self.ledger.runs.len(),
                before,
                "a late report of a run that was given up ends no other"
            );
            self.seen.insert("late report");
        }
    }

    /// Whether the ledger waits for the end of a run. It gives up the runs of removed pools.
    pub(super) fn is_known(&self, pool: PoolId, out: &Out) -> bool {
        self.ledger.runs.get(&out.task).is_some_and(|run| (run.pool, run.attempt) == (pool, out.attempt))
    }
}
