//! A seeded simulation of the ledger: random clients, workers, pools and clocks, with checks of all invariants.
//!
//! `World` simulates everything outside of the ledger: the clients (`clients`), the store and the workers (`workers`),
//! the staging of inputs (`stagings`), and changes of the pools (`pools`). Each step of the ledger is checked against
//! it (`checks`, `turns`). At the end nothing new arrives, and every operation must end. A failure names its seed.

mod checks;
mod clients;
mod pools;
mod random;
mod stagings;
mod turns;
mod workers;

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
use random::Random;
use std::collections::HashSet;
use tokio::sync::oneshot::error::TryRecvError;
use turns::WaitingTask;

const SEEDS: u64 = 300;
const STEPS: u32 = 1000;

/// Operations on which the world still acts. Older ones are only checked at the end.
const RECENT: usize = 40;

/// Situations that the seeds together must reach. Otherwise the simulation would not test them.
const SITUATIONS: [&str; 46] = [
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
    "staged ahead",
    "staged behind the first",
    "left while its inputs were staged",
    "ran while its inputs were staged",
    "staged for a removed pool",
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
    for situation in SITUATIONS {
        assert!(seen.contains(situation), "no seed reached: {situation}");
    }
}

/// What the world knows about an operation.
struct KnownOperation {
    subscription: Option<Subscription>,
    do_not_cache: bool,
    stage: Stage,
    run_stage: Option<RunStage>,
    /// Whether it was cancelled, or was without followers for long enough to be cancelled.
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
    /// The images that are being pulled.
    images: Vec<ImageOrder>,
    /// The staging orders that have not been answered.
    stagings: Vec<StagingOrder>,
    /// The tasks for which there was such an order, with the number of their attempts at that time.
    staged: HashMap<TaskId, u32>,
    /// The runs that have not been answered, by slot.
    runs: BTreeMap<(PoolId, SlotId), Out>,
    pools: Pools,
    /// The largest number of such runs at the same time.
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
    /// The room that it takes from its pool.
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
        ids.iter().copied().zip(specs).for_each(|(id, spec)| pools.insert(id, spec));
        let mut world = Self {
            random,
            ledger,
            now: ClockReading::now(),
            known: BTreeMap::new(),
            next_id: 1,
            checks: Vec::new(),
            images: Vec::new(),
            stagings: Vec::new(),
            staged: HashMap::new(),
            runs: BTreeMap::new(),
            pools,
            most_out: 0,
            finished: HashSet::new(),
            seen: HashSet::new(),
        };
        ids.into_iter().for_each(|id| world.may_stage_in(id));
        world
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..25 => self.submit(),
            25..33 => self.send_checks(),
            33 => self.send_stagings(),
            34 => self.answer_staging(),
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

    fn advance(&mut self, by: Duration) {
        self.now = ClockReading { at: self.now.at + by, wall: self.now.wall + by };
        if !self.ledger.tick(self.now).is_empty() {
            self.seen.insert("stuck");
        }
    }

    /// Ends the simulation: nothing new arrives, workers answer and time passes, so everything must end.
    fn rest(&mut self) {
        self.ledger.drain(self.random.chance(30), self.now);
        self.check_drained();
        for _ in 0..100 {
            self.send_checks();
            self.answer_check();
            self.answer_image();
            self.assign();
            self.send_stagings();
            self.answer_staging();
            self.end_run();
            self.advance(Duration::from_secs(1));
            self.check();
        }
        // Some workers never answer, and some tasks wait for pools that take none. Operations that end with the first
        // of these two steps are forgotten with the second.
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
