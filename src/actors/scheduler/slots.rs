//! Slots: which pools there are, what they offer, and which of their slots are free. Pure.
//!
//! A slot is taken with [`Slots::take`] and given back with [`Slots::release`], exactly once each. Pools can be added
//! and removed: each has a [`PoolId`] that is never used again, and a state. The pools are ordered by preference
//! ([`platform::preference`]). This module does not know how a pool runs a task; a pool of another machine looks the
//! same.

mod free;

use crate::{
    action::Action,
    actors::worker::messages::SlotId,
    limits::{LimitSettings, Room},
    platform::{self, Known, Offers, UnknownProperties},
};
use free::FreeSlots;
use gorego_reapi::{
    error::{Error, Result},
    escape::shown,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// Maximum number of platform properties that one action may require. Each is looked up in each pool, and real actions
/// require a few.
pub(crate) const PROPERTIES_MAX: usize = 1_000;

/// Maximum number of pools at the same time, including draining ones. A task is in the queue of each pool that can run
/// it.
pub(crate) const POOLS_MAX: usize = 256;

/// A slot of a pool, by the names that logs and clients use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotName {
    /// The name of the pool.
    pub pool: Arc<str>,
    /// The number of the slot in the pool.
    pub slot: SlotId,
    /// The name of the worker that serves the slot.
    pub worker: Arc<str>,
}

/// Identifies a pool. No two pools of one process have the same id, even if they have the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PoolId(u32);

impl fmt::Display for PoolId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The pools that can run a task, the preferred one first.
pub(crate) type PoolSet = Arc<[PoolId]>;

/// The description of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// Its name, for logs, messages and filters. Two pools that take tasks never have the same name.
    pub name: String,
    /// The section of the configuration that has its properties, for messages.
    pub section: String,
    /// The common part of the names of its workers, to which the number of the slot is added.
    pub worker: String,
    /// The number of tasks that it runs at the same time.
    pub slots: usize,
    /// The properties of its workers.
    pub offers: Offers,
    /// What one task may use.
    pub limits: LimitSettings,
    /// The room that its tasks share besides the slots; `None` if only slots count.
    pub room: Option<Room>,
}

/// Whether a pool takes tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolState {
    /// It takes tasks while it has free slots.
    Open,
    /// It takes no more tasks, and its running tasks continue. An operator or a reload started this and will remove it.
    Draining,
    /// Its workers died, so it takes no more tasks.
    Closed,
}

/// The state of a pool, as operators see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolStatus {
    /// Its id, for messages to the scheduler.
    pub id: PoolId,
    /// The name that logs, metrics and clients use.
    pub name: Arc<str>,
    /// Whether it takes tasks.
    pub state: PoolState,
    /// The number of its slots.
    pub slots: usize,
    /// How many of them are taken.
    pub busy: usize,
    /// How many of those are out of service, because their runs neither end nor stop.
    pub stuck: usize,
}

/// The slots of all pools.
#[derive(Debug)]
pub(crate) struct Slots {
    pools: BTreeMap<PoolId, PoolSlots>,
    /// The ids of the pools in order of preference.
    order: Vec<PoolId>,
    next: PoolId,
    known: Known,
    /// The sets that tasks hold. Equal sets are shared.
    sets: BTreeSet<PoolSet>,
}

#[derive(Debug)]
struct PoolSlots {
    name: Arc<str>,
    section: String,
    offers: Offers,
    limits: LimitSettings,
    /// The free part of the room.
    left: Option<Room>,
    places: Vec<Arc<SlotName>>,
    free: FreeSlots,
    /// The number of taken slots that are out of service.
    stuck: usize,
    state: PoolState,
}

impl Slots {
    /// Creates pools with ids that ascend in the order of the list. All slots are free.
    pub(crate) fn new(pools: Vec<PoolSpec>, unknown: UnknownProperties) -> Self {
        let mut slots = Self {
            pools: BTreeMap::new(),
            order: Vec::new(),
            next: PoolId(0),
            known: Known::new(unknown),
            sets: BTreeSet::new(),
        };
        for pool in pools {
            slots.insert(pool);
        }
        slots
    }

    /// Adds a pool behind the pools of equal preference. The pool that it `replaces` is about to be drained, so the new
    /// one may have its name.
    ///
    /// # Errors
    /// `Precondition` if there are [`POOLS_MAX`] pools, or another one with this name that is not draining.
    pub(crate) fn add(&mut self, spec: PoolSpec, replaces: Option<PoolId>) -> Result<PoolId> {
        let has_name = |(id, pool): (&PoolId, &PoolSlots)| {
            pool.state != PoolState::Draining && *pool.name == *spec.name && replaces != Some(*id)
        };
        if self.pools.iter().any(has_name) {
            return Err(Error::Precondition(format!(
                "there is a pool \"{}\" already; drain it first",
                spec.name.escape_debug()
            )));
        }
        if self.pools.len() >= POOLS_MAX {
            return Err(Error::Precondition(format!("there are {POOLS_MAX} pools; remove one first")));
        }
        Ok(self.insert(spec))
    }

    fn insert(&mut self, spec: PoolSpec) -> PoolId {
        let id = self.next;
        self.next = PoolId(id.0.saturating_add(1));
        self.known.learn(&spec.offers);
        self.pools.insert(id, PoolSlots::new(spec));
        self.order.push(id);
        let pools = &self.pools;
        self.order.sort_by_cached_key(|id| {
            pools.get(id).map(|pool| platform::preference(&pool.name, &pool.offers))
        });
        id
    }

    /// Stops a pool from taking tasks. Returns whether it took tasks before.
    ///
    /// # Errors
    /// `NotFound` if there is no such pool.
    pub(crate) fn drain(&mut self, id: PoolId) -> Result<bool> {
        let pool = self.pools.get_mut(&id).ok_or_else(|| unknown(id))?;
        let took_tasks = pool.state == PoolState::Open;
        if took_tasks {
            pool.state = PoolState::Draining;
        }
        Ok(took_tasks)
    }

    /// Removes a pool. Slots that are released later are ignored. The properties that it offered stay known, so that an
    /// action which requires one of them is not run by a pool without it.
    ///
    /// # Errors
    /// `NotFound` if there is no such pool.
    pub(crate) fn remove(&mut self, id: PoolId) -> Result<()> {
        self.pools.remove(&id).ok_or_else(|| unknown(id))?;
        self.order.retain(|other| *other != id);
        Ok(())
    }

    /// The pools, in order of preference.
    pub(crate) fn order(&self) -> &[PoolId] {
        &self.order
    }

    /// All pools with their states, in order of preference.
    pub(crate) fn status(&self) -> Vec<PoolStatus> {
        let status = |id: &PoolId| {
            let pool = self.pools.get(id)?;
            Some(PoolStatus {
                id: *id,
                name: pool.name.clone(),
                state: pool.state,
                slots: pool.places.len(),
                busy: pool.places.len() - pool.free.len(),
                stuck: pool.stuck,
            })
        };
        self.order.iter().filter_map(status).collect()
    }

    /// The pools that can run a new action, in order of preference.
    ///
    /// # Errors
    /// The errors of [`Slots::matching`]; `Unavailable` if no suitable pool takes tasks.
    pub(crate) fn suitable(&mut self, action: &Action) -> Result<PoolSet> {
        let pools = self.matching(action)?;
        if self.is_served(&pools) { Ok(pools) } else { Err(Self::no_workers(action)) }
    }

    /// The pools that offer what an action requires, in order of preference, whether or not they take tasks.
    ///
    /// # Errors
    /// `Precondition` if no pool does (EXE-31), with the name of the pool that comes nearest; `Unavailable` if there
    /// are no pools; `Invalid` if the action requires more than [`PROPERTIES_MAX`] properties.
    pub(crate) fn matching(&mut self, action: &Action) -> Result<PoolSet> {
        let asked = &action.platform;
        if asked.len() > PROPERTIES_MAX {
            return Err(Error::Invalid(format!(
                "action {} asks for {} platform properties, more than {PROPERTIES_MAX}",
                action.digest,
                asked.len()
            )));
        }
        let mut suitable = Vec::new();
        let mut nearest: Option<(&PoolSlots, (usize, usize))> = None;
        for (id, pool) in self.order.iter().filter_map(|id| Some((id, self.pools.get(id)?))) {
            match self.known.distance(&pool.offers, asked) {
                (0, _) => suitable.push(*id),
                distance if nearest.is_none_or(|(_, least)| distance < least) => {
                    nearest = Some((pool, distance));
                }
                _ => {}
            }
        }
        match nearest {
            Some((pool, _)) if suitable.is_empty() => Err(Error::Precondition(format!(
                "no pool can run action {}: the nearest, \"{}\", differs in {}; change the action's platform properties or \
                 [{}] of the server",
                action.digest,
                pool.name,
                platform::list(self.known.differences(&pool.offers, asked)),
                pool.section,
            ))),
            None if suitable.is_empty() => Err(Self::no_workers(action)),
            _ => Ok(self.shared(suitable)),
        }
    }

    /// Whether a pool offers what an action requires.
    pub(crate) fn suits(&self, id: PoolId, action: &Action) -> bool {
        let pool = self.pools.get(&id);
        pool.is_some_and(|pool| self.known.differences(&pool.offers, &action.platform).next().is_none())
    }

    /// This set and one more pool.
    pub(crate) fn with(&mut self, pools: &PoolSet, id: PoolId) -> PoolSet {
        let both = |other: &PoolId| *other == id || pools.contains(other);
        let both = self.order.iter().copied().filter(both).collect();
        self.shared(both)
    }

    pub(crate) fn without(&mut self, pools: &PoolSet, id: PoolId) -> PoolSet {
        self.shared(pools.iter().copied().filter(|other| *other != id).collect())
    }

    /// The error of a task that waited for pools which are now gone.
    pub(crate) fn unserved(&mut self, action: &Action) -> Error {
        match self.matching(action) {
            Err(Error::Precondition(message)) => Error::Precondition(format!(
                "the pools of this server changed while the action waited: {message}"
            )),
            _ => Self::no_workers(action),
        }
    }

    /// The error of an action that no pool in service can run.
    pub(crate) fn no_workers(action: &Action) -> Error {
        Error::Unavailable(format!(
            "action {} cannot run: every pool that suits it is draining or has lost its workers; try again later",
            action.digest
        ))
    }

    /// Whether at least one of these pools takes tasks.
    pub(crate) fn is_served(&self, pools: &PoolSet) -> bool {
        self.of(pools).any(|pool| pool.state == PoolState::Open && !pool.places.is_empty())
    }

    /// Whether tasks may wait for these pools: at least one has not lost its workers. Tasks that wait for a draining
    /// pool may find another one before it is removed.
    pub(crate) fn may_wait(&self, pools: &PoolSet) -> bool {
        self.of(pools).any(|pool| pool.state != PoolState::Closed && !pool.places.is_empty())
    }

    /// Whether a pool has a free slot for a task.
    pub(crate) fn has_free(&self, id: PoolId) -> bool {
        self.open(id).is_some_and(|pool| !pool.free.is_empty())
    }

    /// Whether a pool has room for a task.
    pub(crate) fn has_room(&self, id: PoolId, action: &Action) -> bool {
        self.pools.get(&id).is_some_and(|pool| {
            pool.left.as_ref().is_none_or(|left| left.holds(&pool.limits.need(&action.platform)))
        })
    }

    /// The room that a task needs in a pool and the room that is left, if that is not enough.
    pub(crate) fn shortage(&self, id: PoolId, action: &Action) -> Option<(Room, Room)> {
        let pool = self.open(id)?;
        let (left, need) = (pool.left?, pool.limits.need(&action.platform));
        (!left.holds(&need)).then_some((need, left))
    }

    /// How much memory a pool gives a task; the maximum if there is no limit.
    pub(crate) fn memory(&self, id: PoolId, action: &Action) -> u64 {
        let limit = self.pools.get(&id).map_or(0, |pool| pool.limits.of(&action.platform).memory);
        if limit == 0 { u64::MAX } else { limit }
    }

    /// The pools among these that take tasks and give this task more memory than `than`.
    pub(crate) fn with_more_memory(&mut self, pools: &PoolSet, than: u64, action: &Action) -> PoolSet {
        let gives_more = |id: &PoolId| self.is_open(*id) && self.memory(*id, action) > than;
        let larger: Vec<_> = pools.iter().copied().filter(gives_more).collect();
        self.shared(larger)
    }

    /// Takes a free slot of a pool for a task, and the room that the task needs. Both are given back with
    /// [`Slots::release`].
    pub(crate) fn take(&mut self, id: PoolId, action: &Action) -> Option<(Arc<SlotName>, Room)> {
        let pool = self.pools.get_mut(&id).filter(|pool| pool.state == PoolState::Open)?;
        let slot = pool.free.take()?;
        let need = pool.left.map_or_else(Room::default, |_| pool.limits.need(&action.platform));
        pool.left = pool.left.map(|left| left.without(&need));
        Some((pool.places.get(slot.0).cloned()?, need))
    }

    /// Releases a slot. `failed` says that the slot failed to run its task.
    pub(crate) fn release(&mut self, id: PoolId, slot: SlotId, taken: &Room, failed: bool) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.free.put(slot, failed);
            pool.left = pool.left.map(|left| left.with(taken));
        }
    }

    /// Marks a taken slot as out of service until [`Slots::unstick`].
    pub(crate) fn stick(&mut self, id: PoolId) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.stuck = pool.stuck.saturating_add(1);
        }
    }

    /// Returns a slot that was out of service.
    pub(crate) fn unstick(&mut self, id: PoolId) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.stuck = pool.stuck.saturating_sub(1);
        }
    }

    /// Closes a pool, because its workers are gone.
    pub(crate) fn close(&mut self, id: PoolId) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.state = PoolState::Closed;
        }
    }

    /// The number of slots of pools that take tasks, busy or not, without those that are out of service.
    pub(crate) fn in_service(&self) -> usize {
        let open = self.order.iter().filter_map(|id| self.open(*id));
        open.map(|pool| pool.places.len().saturating_sub(pool.stuck)).sum()
    }

    /// How many slots of a pool are busy, and how many it has; both are 0 if it takes no tasks.
    pub(crate) fn count(&self, id: PoolId) -> (usize, usize) {
        self.open(id).map_or((0, 0), |pool| (pool.places.len() - pool.free.len(), pool.places.len()))
    }

    /// Whether a pool takes tasks.
    pub(crate) fn is_open(&self, id: PoolId) -> bool {
        self.open(id).is_some()
    }

    pub(crate) fn name(&self, id: PoolId) -> Arc<str> {
        self.pools.get(&id).map_or_else(|| "".into(), |pool| pool.name.clone())
    }

    /// The pools with this name: usually one, and those that it has replaced and that are still draining.
    ///
    /// # Errors
    /// `Invalid`, with a list of all pools, if there is none.
    pub(crate) fn named(&self, name: &str) -> Result<Vec<PoolId>> {
        let has_name = |(id, pool): (&PoolId, &PoolSlots)| (*pool.name == *name).then_some(*id);
        let named: Vec<_> = self.pools.iter().filter_map(has_name).collect();
        if !named.is_empty() {
            return Ok(named);
        }
        let names: Vec<_> = self.order.iter().map(|id| self.name(*id)).collect();
        Err(Error::Invalid(format!(
            "there is no pool \"{}\"; the pools are {}",
            shown(name),
            names.join(", ")
        )))
    }

    fn open(&self, id: PoolId) -> Option<&PoolSlots> {
        self.pools.get(&id).filter(|pool| pool.state == PoolState::Open)
    }

    fn of<'a>(&'a self, pools: &'a PoolSet) -> impl Iterator<Item = &'a PoolSlots> {
        pools.iter().filter_map(|id| self.pools.get(id))
    }

    /// Shares equal sets. There are few sets in practice. In theory there are very many, so those that no task holds
    /// are dropped.
    fn shared(&mut self, pools: Vec<PoolId>) -> PoolSet {
        if let Some(set) = self.sets.get(pools.as_slice()) {
            return set.clone();
        }
        self.sets.retain(|set| Arc::strong_count(set) > 1);
        let set = PoolSet::from(pools);
        self.sets.insert(set.clone());
        set
    }
}

fn unknown(id: PoolId) -> Error {
    Error::NotFound(format!("there is no pool with the id {id}"))
}

impl PoolSlots {
    fn new(spec: PoolSpec) -> Self {
        let name: Arc<str> = spec.name.into();
        let place = |slot| {
            let slot = SlotId(slot);
            Arc::new(SlotName { pool: name.clone(), slot, worker: slot.worker(&spec.worker).into() })
        };
        Self {
            places: (0..spec.slots).map(place).collect(),
            free: FreeSlots::new(spec.slots),
            name: name.clone(),
            section: spec.section,
            offers: spec.offers,
            limits: spec.limits,
            left: spec.room,
            stuck: 0,
            state: PoolState::Open,
        }
    }
}
