//! The pools of the simulation, and the invariants of adding and removing them.

use super::World;
use crate::{
    actors::scheduler::{
        ledger::{
            TaskStep,
            fixtures::{pool, pool_with_room},
        },
        slots::{PoolId, PoolSpec},
    },
    limits::{LimitRange, LimitSettings, Room},
    platform::{self, Offer},
};
use std::collections::BTreeMap;

/// Maximum number of pools at the same time.
const MAX_POOLS: usize = 4;

/// The kind of actions that a pool runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PoolKind {
    Linux,
    Plan9,
    Either,
}

/// The room of a pool besides its slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PoolRoom {
    /// Cores and memory that its tasks share.
    Shared,
    /// Each task has this much memory; 0 for unlimited.
    Each(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KnownState {
    Open,
    Draining,
    Closed,
}

struct KnownPool {
    spec: PoolSpec,
    state: KnownState,
}

/// The pools from the point of view of the world.
#[derive(Default)]
pub(super) struct Pools {
    pools: BTreeMap<PoolId, KnownPool>,
    /// In order of preference. Of two equal pools, the older one comes first.
    order: Vec<PoolId>,
    names: u32,
    removed: u32,
}

impl Pools {
    /// The description of a pool with a unique name.
    pub(super) fn new_spec(&mut self, slots: usize, kind: PoolKind, room: PoolRoom) -> PoolSpec {
        self.names += 1;
        let either = Offer::Set(vec!["linux".into(), "plan9".into()]);
        let offers = match kind {
            PoolKind::Linux => pool(slots, "linux").offers,
            PoolKind::Plan9 => pool(slots, "plan9").offers,
            PoolKind::Either => [("OSFamily".to_owned(), either)].into(),
        };
        let spec = match room {
            PoolRoom::Shared => pool_with_room(slots as u64, ""),
            PoolRoom::Each(default) => {
                let limits = LimitSettings { memory: LimitRange { default, max: 0 }, ..Default::default() };
                PoolSpec { limits, ..pool(slots, "") }
            }
        };
        PoolSpec { name: format!("pool {}", self.names), offers, ..spec }
    }

    pub(super) fn insert(&mut self, id: PoolId, spec: PoolSpec) {
        let before = self.pools.insert(id, KnownPool { spec, state: KnownState::Open });
        assert!(before.is_none(), "an id is used once");
        self.order.push(id);
        self.order.sort_by_key(|id| {
            let spec = &self.pools[id].spec;
            (platform::preference(&spec.name, &spec.offers), *id)
        });
    }

    /// The number of removed pools. A task loses at most one attempt with each.
    pub(super) fn removed(&self) -> u32 {
        self.removed
    }

    fn remove(&mut self, id: PoolId) {
        self.removed += 1;
        self.pools.remove(&id);
        self.order.retain(|other| *other != id);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }

    pub(super) fn contains(&self, id: PoolId) -> bool {
        self.pools.contains_key(&id)
    }

    pub(super) fn is_open(&self, id: PoolId) -> bool {
        self.pools.get(&id).is_some_and(|pool| pool.state == KnownState::Open)
    }

    pub(super) fn is_closed(&self, id: PoolId) -> bool {
        self.pools.get(&id).is_some_and(|pool| pool.state == KnownState::Closed)
    }

    pub(super) fn close(&mut self, id: PoolId) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.state = KnownState::Closed;
        }
    }

    pub(super) fn slots(&self, id: PoolId) -> usize {
        self.pools[&id].spec.slots
    }

    /// The room that the tasks of a pool share; `None` if it only has slots, or is gone.
    pub(super) fn room(&self, id: PoolId) -> Option<Room> {
        self.pools.get(&id)?.spec.room
    }

    /// The room in a pool that an action with these properties takes.
    pub(super) fn need(&self, id: PoolId, platform: &[(String, String)]) -> Room {
        self.pools.get(&id).map_or_else(Room::default, |pool| pool.spec.limits.need(platform))
    }

    /// The memory of a task in a pool; the largest number if there is no limit.
    fn memory(&self, id: PoolId, platform: &[(String, String)]) -> u64 {
        match self.pools[&id].spec.limits.of(platform).memory {
            0 => u64::MAX,
            limit => limit,
        }
    }

    pub(super) fn order(&self) -> &[PoolId] {
        &self.order
    }

    /// The pools for actions that request this `OSFamily`, in order of preference.
    pub(super) fn suiting(&self, family: Option<&str>) -> Vec<PoolId> {
        let family = family.map(str::to_lowercase);
        let suits = |id: &PoolId| {
            let Some(family) = &family else { return true };
            match &self.pools[id].spec.offers["OSFamily"] {
                Offer::Exact(offered) => offered == family,
                Offer::Set(offered) => offered.contains(family),
                _ => unreachable!("no pool of this world offers that"),
            }
        };
        self.order.iter().copied().filter(suits).collect()
    }
}

impl World {
    /// Adds, drains or removes a pool.
    pub(super) fn change_pools(&mut self) {
        let ids: Vec<_> = self.pools.pools.keys().copied().collect();
        let chosen = self.random.pick(&ids);
        match (self.random.below(4), chosen) {
            (0..2, _) | (_, None) if ids.len() < MAX_POOLS => self.add_pool(),
            (2, Some(id)) => {
                self.ledger.drain_pool(id).unwrap();
                let known = self.pools.pools.get_mut(&id).unwrap();
                if known.state == KnownState::Open {
                    known.state = KnownState::Draining;
                }
                self.seen.insert("pool drained");
            }
            (_, Some(id)) => {
                self.ledger.remove_pool(id, self.now).unwrap();
                assert!(self.ledger.remove_pool(id, self.now).is_err(), "it is gone");
                self.pools.remove(id);
                self.seen.insert("pool removed");
            }
            (_, None) => unreachable!("with no pool there is room for one"),
        }
    }

    fn add_pool(&mut self) {
        let kind = self.random.pick(&[PoolKind::Linux, PoolKind::Plan9, PoolKind::Either]).unwrap();
        let slots = 1 + self.random.below(2);
        let room = match self.random.chance(30) {
            true => PoolRoom::Shared,
            false => PoolRoom::Each(self.random.below(3) as u64 * (3 << 29)),
        };
        let spec = self.pools.new_spec(slots, kind, room);
        let id = self.ledger.add_pool(spec.clone(), None).unwrap();
        assert!(self.ledger.add_pool(spec.clone(), None).is_err(), "names are unique");
        self.pools.insert(id, spec);
        self.may_stage_in(id);
        self.seen.insert("pool added");
        if self.ledger.ready[&id].len() > 0 {
            self.seen.insert("pool added for those who wait");
        }
    }

    /// Checks that each task waits for all pools that suit it, in order, and that at least one of them may take it.
    pub(super) fn check_pools(&self) {
        let ledger = &self.ledger;
        assert_eq!(ledger.slots.order(), self.pools.order());
        assert!(ledger.ready.keys().eq(self.pools.pools.keys()), "each pool has a queue");
        for task in ledger.tasks.values() {
            let mut families = task.action.platform.iter().filter(|(name, _)| name == "OSFamily");
            let family = families.next().map(|(_, value)| value.as_str());
            let suiting = self.pools.suiting(family);
            match task.more_than {
                None => assert_eq!(*task.pools, *suiting),
                Some(memory) => {
                    assert!(
                        task.pools.iter().all(|id| suiting.contains(id)
                            && self.pools.memory(*id, &task.action.platform) > memory),
                        "a task that ran out of memory waits for those that give it more"
                    )
                }
            }
            if task.step != TaskStep::Running {
                let is_hopeless = |id: &PoolId| self.pools.is_closed(*id);
                assert!(!task.pools.iter().all(is_hopeless), "nobody waits for what will never come");
            }
        }
        let in_service = self.pools.pools.values().filter(|pool| pool.state == KnownState::Open);
        let stuck = ledger.runs.values().filter(|run| run.stuck && self.pools.is_open(run.pool)).count();
        let slots: usize = in_service.map(|pool| pool.spec.slots).sum();
        assert_eq!(ledger.inspect().slots, slots - stuck);
    }
}
