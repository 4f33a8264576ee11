//! A seeded simulation of the ledger: random clients, workers, pools and clocks against everything that must always hold.
//!
//! `World` simulates everything outside of the ledger: the clients, the pools, the runs and the answers of the store. Each step is
//! checked against it (`checks`). At the end nothing new arrives, and every operation must end. A failure names its seed.

mod checks;
mod pools;
mod turns;

use super::{
    fixtures::{Work, digest, instance, peer, resolution, settings, submit, submit_of, work},
    *,
};
use crate::actors::{
    scheduler::messages::OperationFilter,
    worker::{
        cancel::CancelToken,
        messages::{Account, RunFailure, RunResult, RunStage, SlotId, StageReached},
    },
};
use crate::{
    caller::{Caller, Peer, PrincipalId},
    limits::Room,
    quotas::OperationLimits,
};
use pools::{PoolKind, PoolRoom, Pools};
use std::collections::HashSet;
use tokio::sync::oneshot::error::TryRecvError;
use turns::WaitingTask;

const SEEDS: u64 = 300;
const STEPS: u32 = 1000;

/// Operations that the world still plays with; older ones are only checked at the end.
const RECENT: usize = 40;

/// Situations that the seeds together must reach. Otherwise the simulation would prove nothing.
const SIGHTS: [&str; 41] = [
    "joined",
    "explained",
    "in a later pool",
    "out of turn",
    "due",
    "shared",
    "cached",
    "unusable",
    "requeued",
    "refused: full",
    "refused: share",
    "refused: platform",
    "refused: no workers",
    "missing inputs",
    "waited too long",
    "given up",
    "stuck",
    "pool closed",
    "pool added",
    "pool added for those who wait",
    "pool drained",
    "pool removed",
    "ended with its pool",
    "moved from its pool",
    "moved from a run that did not stop",
    "late report",
    "made way",
    "unfollowed run",
    "overtaken",
    "peers",
    "peer due",
    "shared room",
    "kept room for a large one",
    "image brought",
    "image failed",
    "left before its image came",
    "ran out of memory",
    "moved to more memory",
    "passed a pool in which its kind ran out of memory",
    "refused: operations of a quota",
    "refused: queue of a quota",
];

#[test]
fn nothing_is_lost_doubled_or_stuck_whatever_happens() {
    let mut seen = HashSet::new();
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..STEPS {
                world.step();
                world.check();
            }
            world.rest();
        }));
        assert!(done.is_ok(), "seed {seed} fails");
        seen.extend(world.seen);
    }
    for sight in SIGHTS {
        assert!(seen.contains(sight), "no seed reached: {sight}");
    }
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        from.get(self.below(from.len())).copied()
    }
}

/// What the world knows of an operation.
struct KnownOperation {
    subscription: Option<Subscription>,
    do_not_cache: bool,
    stage: Stage,
    run_stage: Option<RunStage>,
    /// It was cancelled, or left alone long enough to be.
    may_be_cancelled: bool,
    completed: u32,
    cached: bool,
}

struct World {
    random: Random,
    ledger: Ledger,
    now: ClockReading,
    known: BTreeMap<OperationId, KnownOperation>,
    next_id: u128,
    checks: Vec<TaskId>,
    /// The images that are being brought.
    images: Vec<ImageOrder>,
    /// What is out, by slot.
    runs: BTreeMap<(PoolId, SlotId), Out>,
    pools: Pools,
    /// The most runs that were out at the same time.
    most_out: usize,
    /// Finished operations that the world has not deleted.
    finished: HashSet<OperationId>,
    seen: HashSet<&'static str>,
}

struct Out {
    task: TaskId,
    attempt: u32,
    cancel: CancelToken,
    stage: Option<RunStage>,
    /// What it takes of the room of its pool.
    need: Room,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let settings = SchedulerSettings {
            queue_size: 1 + random.below(12),
            unfinished_operations: 24,
            concurrent_checks: 1 + random.below(4),
            retained_operations: random.below(6),
            retained_cached: random.below(3),
            max_attempts: 1 + random.below(3) as u32,
            priority_ageing: Duration::from_secs(1 + random.below(60) as u64),
            contended_abandon_grace: Duration::from_secs(random.below(10) as u64),
            ..settings()
        };
        let mut pools = Pools::default();
        let has_room = random.chance(50);
        let last = if has_room { PoolRoom::Shared } else { PoolRoom::Each(3 << 30) };
        let specs = [
            (2, PoolKind::Linux, PoolRoom::Each(1 << 30)),
            (1, PoolKind::Plan9, PoolRoom::Each(0)),
            (4, PoolKind::Either, last),
        ];
        let specs = specs.map(|(slots, kind, room)| pools.new_spec(slots, kind, room));
        let mut ledger = Ledger::new(settings, specs.to_vec());
        if random.chance(70) {
            ledger.bring_images();
        }
        // Ids ascend in the order of the list.
        let ids: BTreeSet<PoolId> = ledger.pools().iter().map(|pool| pool.id).collect();
        ids.into_iter().zip(specs).for_each(|(id, spec)| pools.insert(id, spec));
        Self {
            random,
            ledger,
            now: ClockReading::now(),
            known: BTreeMap::new(),
            next_id: 1,
            checks: Vec::new(),
            images: Vec::new(),
            runs: BTreeMap::new(),
            pools,
            most_out: 0,
            finished: HashSet::new(),
            seen: HashSet::new(),
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..25 => self.submit(),
            25..35 => self.send_checks(),
            35..41 => self.answer_check(),
            41..45 => self.answer_image(),
            45..60 => self.assign(),
            60..68 => self.report_stage(),
            68..80 => self.end_run(),
            80..84 => self.cancel(),
            84..89 => self.lose_client(),
            89..91 => self.watch(),
            91 => self.explain(),
            92..94 => self.forget(),
            94 => self.advance(Duration::from_secs(60)),
            96 if self.random.chance(30) => self.change_pools(),
            95 if self.random.chance(10) => self.advance(Duration::from_secs(4000)),
            _ => self.advance(Duration::from_secs(2)),
        }
    }

    fn submit(&mut self) {
        let id = OperationId::new(Default::default(), uuid::Uuid::from_u128(self.next_id));
        self.next_id += 1;
        // The digest says everything about an action, its platform and whether it may be cached included.
        let (name, do_not_cache) = (self.random.below(8), self.random.chance(15));
        let platform =
            [None, None, None, None, Some("linux"), Some("Linux"), Some("plan9"), Some("amiga")][name];
        let name = name as u64 + if do_not_cache { 100 } else { 0 };
        let cores = [0, 1, 4, 2, 0, 3, 2, 0][(name % 100) as usize];
        let image = name % 3 == 1;
        let work = Work { name, do_not_cache, platform, cores, image };
        let cached = !work.do_not_cache && self.random.chance(10);
        let unusable = !cached && self.random.chance(10);
        let invocation = ["", "a", "b"][self.random.below(3)];
        let priority = self.random.below(5) as i32 - 2;
        let peer = match self.random.below(4) {
            3 => Peer::Principal(PrincipalId::of("token:ci")),
            number => peer(number as u8),
        };
        let caller = Caller::without_connection(peer);
        let mut limit =
            |chance, least: usize| self.random.chance(chance).then(|| least + self.random.below(6));
        let limits = OperationLimits { operations: limit(10, 2), queued: limit(10, 0) };
        let mut submit = Submit { priority, caller, limits, ..submit_of(invocation, &work) };
        submit.client.target_id = ["", "//a", "//b", "//c"][self.random.below(4)].into();
        let waiting = self.ledger.quota.all().waiting;
        let info = OperationInfo {
            id,
            instance: submit.instance.clone(),
            action: submit.action,
            inline: submit.inline.clone(),
            client: submit.client.clone(),
            principal: submit.principal.clone(),
            peer,
        };
        let owner = self.ledger.owner(&info);
        // What follows from the shares is tested where they are counted.
        let has_room = self.ledger.quota.check(owner, 0).is_ok()
            && self.ledger.register.check_place(&info, OperationLimits::default()).is_ok();
        let (unfinished, queued) = self.count_of(peer);
        let is_within = |limit: Option<usize>, count| limit.is_none_or(|limit| count < limit);
        let has_quota = is_within(limits.operations, unfinished) && is_within(limits.queued, queued);
        let resolution = match unusable {
            true => Resolution::Unusable(Error::invalid("no Action")),
            false => resolution(&work, cached),
        };
        let admitted = self.ledger.admit(submit, resolution, id, self.now);
        match admitted {
            Ok(subscription) => {
                assert!(cached || unusable || work.platform != Some("amiga"), "nobody can run this");
                assert!(cached || unusable || has_quota);
                let snapshot = subscription.snapshots.borrow().clone();
                assert_eq!(snapshot.stage == Stage::Completed, cached || unusable);
                let known = KnownOperation {
                    subscription: Some(subscription),
                    do_not_cache: work.do_not_cache,
                    stage: snapshot.stage,
                    run_stage: snapshot.run_stage.map(|(stage, _)| stage),
                    may_be_cancelled: false,
                    completed: 0,
                    cached,
                };
                self.known.insert(id, known);
            }
            Err(Error::Exhausted { .. }) => {
                let free = self.ledger.settings.queue_size.saturating_sub(waiting);
                assert!(!has_room);
                self.seen.insert(if free == 0 { "refused: full" } else { "refused: share" });
            }
            Err(Error::OverQuota { .. }) => {
                assert!(!has_quota);
                let is_queue = is_within(limits.operations, unfinished);
                self.seen.insert(match is_queue {
                    true => "refused: queue of a quota",
                    false => "refused: operations of a quota",
                });
            }
            Err(Error::Precondition(message)) => {
                assert!(!self.pools.is_empty() && self.pools.suiting(work.platform).is_empty());
                assert!(
                    message.contains("the nearest") && message.contains(work.platform.unwrap()),
                    "{message}"
                );
                self.seen.insert("refused: platform");
            }
            Err(Error::Unavailable(_)) => {
                assert!(!self.pools.suiting(work.platform).iter().any(|pool| self.pools.is_open(*pool)));
                self.seen.insert("refused: no workers");
            }
            Err(other) => panic!("unexpected {other:?}"),
        }
    }

    /// The operations of a peer that are not over, and those of them that wait, as the clients know.
    fn count_of(&self, peer: Peer) -> (usize, usize) {
        let of_peer = |id: &&OperationId| {
            let number = self.ledger.register.find(&instance(), **id).ok();
            number
                .and_then(|number| self.ledger.register.get(number))
                .is_some_and(|operation| operation.info.peer == peer)
        };
        let stages: Vec<_> = self.known.keys().filter(of_peer).map(|id| self.known[id].stage).collect();
        let unfinished = stages.iter().filter(|stage| **stage != Stage::Completed).count();
        (unfinished, stages.iter().filter(|stage| **stage == Stage::Queued).count())
    }

    fn send_checks(&mut self) {
        while let Some(check) = self.ledger.next_check(self.now) {
            self.checks.push(check.task);
        }
        assert!(self.checks.len() <= self.ledger.settings.concurrent_checks);
        while let Some(order) = self.ledger.next_image(self.now) {
            self.images.push(order);
        }
    }

    fn answer_image(&mut self) {
        if self.images.is_empty() {
            return;
        }
        let order = self.images.swap_remove(self.random.below(self.images.len()));
        let result = match self.random.below(10) {
            0 => Err(Error::Unavailable("no registry".into())),
            1 => Err(Error::DiskFull("no room".into())),
            _ => Ok(()),
        };
        // The ledger is also told of images for which no task waits any more.
        let has_left = !self.ledger.tasks.contains_key(&order.task);
        let sight = match (has_left, &result) {
            (true, _) => "left before its image came",
            (false, Err(Error::Unavailable(_))) => "image failed",
            (false, _) => "image brought",
        };
        self.ledger.image_brought(order.task, result, self.now);
        self.seen.insert(sight);
    }

    fn answer_check(&mut self) {
        if self.checks.is_empty() {
            return;
        }
        let task = self.checks.swap_remove(self.random.below(self.checks.len()));
        let missing = Error::MissingBlobs(vec![digest(&work(0))]);
        let result = if self.random.chance(10) { Err(missing) } else { Ok(()) };
        self.ledger.inputs_checked(task, result, self.now);
    }

    fn assign(&mut self) {
        for _ in 0..=self.random.below(3) {
            let is_exact = self.random.chance(50);
            if is_exact {
                self.ledger.notice_losses(self.now);
            }
            let before: Vec<WaitingTask> = self.waiting();
            let out = |pool: PoolId| self.runs.keys().filter(|(of, _)| *of == pool).count();
            let free = |pool: PoolId| self.pools.is_open(pool) && out(pool) < self.pools.slots(pool);
            let wanting = |pool: PoolId| before.iter().filter(move |waiting| waiting.pools.contains(&pool));
            let fits = |pool: PoolId, waiting: &WaitingTask| {
                self.left(pool).is_none_or(|left| left.holds(&self.pools.need(pool, &waiting.platform)))
            };
            // Which of those that have room is next is the queue's decision.
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
    fn ran_out(&self, assignment: &Assignment) -> bool {
        let Some(task) = self.ledger.tasks.get(&assignment.task) else { return false };
        let key = self.ledger.peak_key(&task.first);
        let Some(peak) = key.and_then(|key| self.ledger.peaks.of(key)) else { return false };
        task.pools.iter().any(|pool| self.ledger.slots.memory(*pool, &assignment.action) < peak)
    }

    /// What is left of the room of a pool.
    fn left(&self, pool: PoolId) -> Option<Room> {
        let out = self.runs.iter().filter(|((of, _), _)| *of == pool);
        let room = self.pools.room(pool)?;
        Some(out.fold(room, |left, (_, out)| left.without(&out.need)))
    }

    fn explain(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        let status = self.ledger.explain(&instance(), id, self.now);
        let stage = self.known[&id].stage;
        assert_eq!(
            status.is_some(),
            stage == Stage::Queued,
            "there is a reason for each operation that waits, and for no other"
        );
        let Some(status) = status else { return };
        assert!(!status.reason.is_empty() && !status.pool.is_empty());
        assert!(status.busy <= status.slots && status.position != Some(0));
        self.seen.insert("explained");
    }

    fn pick_run(&mut self) -> Option<(PoolId, SlotId)> {
        let slots: Vec<_> = self.runs.keys().copied().collect();
        self.random.pick(&slots)
    }

    fn report_stage(&mut self) {
        let Some(slot) = self.pick_run() else { return };
        // Reports may be repeated or late.
        let stages = [RunStage::Fetching, RunStage::Running, RunStage::Uploading];
        let stage = self.random.pick(&stages).unwrap();
        let out = self.runs.get_mut(&slot).unwrap();
        out.stage = out.stage.max(Some(stage));
        let Out { task, attempt, .. } = *out;
        self.ledger.stage_reached(StageReached { task, attempt, stage, at: self.now.wall, logs: None });
    }

    fn end_run(&mut self) {
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

    /// Whether the ledger waits for the end of a run. It gives up those of removed pools.
    fn is_known(&self, pool: PoolId, out: &Out) -> bool {
        self.ledger.runs.get(&out.task).is_some_and(|run| (run.pool, run.attempt) == (pool, out.attempt))
    }

    fn pick_operation(&mut self) -> Option<OperationId> {
        let ids: Vec<_> = self.known.keys().rev().take(RECENT).copied().collect();
        self.random.pick(&ids)
    }

    fn cancel(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        let result = self.ledger.cancel(&instance(), id, self.now);
        let known = self.known.get_mut(&id).unwrap();
        known.may_be_cancelled = true;
        assert!(result.is_ok() || known.stage == Stage::Completed, "only finished operations are forgotten");
    }

    fn lose_client(&mut self) {
        if let Some(id) = self.pick_operation() {
            let known = self.known.get_mut(&id).unwrap();
            known.subscription = None;
            known.may_be_cancelled = true;
        }
    }

    fn watch(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        if let Ok(subscription) = self.ledger.watch(&instance(), id) {
            self.known.get_mut(&id).unwrap().subscription = Some(subscription);
        }
    }

    fn forget(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        match self.ledger.forget(&instance(), id) {
            Ok(()) => assert!(self.finished.remove(&id), "forgot what was not finished"),
            Err(Error::Precondition(_)) => assert_ne!(self.known[&id].stage, Stage::Completed),
            Err(Error::NotFound(_)) => {}
            Err(other) => panic!("unexpected {other:?}"),
        }
    }

    fn advance(&mut self, by: Duration) {
        self.now = ClockReading { at: self.now.at + by, wall: self.now.wall + by };
        if !self.ledger.tick(self.now).is_empty() {
            self.seen.insert("stuck");
        }
    }

    /// Nothing new comes, workers answer, clocks go on: everything ends.
    fn rest(&mut self) {
        self.ledger.drain(self.random.chance(30), self.now);
        self.check_drained();
        for _ in 0..100 {
            self.send_checks();
            self.answer_check();
            self.answer_image();
            self.assign();
            self.end_run();
            self.advance(Duration::from_secs(1));
            self.check();
        }
        // Some workers are never heard of again, and some tasks wait for pools that take none. What ends with the first of these
        // two steps is forgotten with the second.
        for _ in 0..2 {
            self.advance(Duration::from_secs(100_000));
            self.check();
        }
        assert!(self.ledger.is_idle());
        assert!(self.known.values().all(|known| known.completed == 1), "every operation ends, once");
        for known in self.known.values() {
            let Some(subscription) = &known.subscription else { continue };
            assert!(subscription.snapshots.borrow().outcome.is_some(), "every subscriber sees the end");
        }
        assert_eq!(self.ledger.register.len(), 0, "nothing is remembered for ever");
        let query =
            ListOperations { instance: instance(), filter: OperationFilter::default(), after: 0, limit: 10 };
        assert!(self.ledger.list(&query).unwrap().operations.is_empty());
    }

    fn check_drained(&mut self) {
        let work = work(1);
        let id = OperationId::new(Default::default(), uuid::Uuid::from_u128(0));
        let refused = self.ledger.admit(submit(&work), resolution(&work, true), id, self.now);
        assert!(matches!(refused, Err(Error::Unavailable(_))));
    }
}
