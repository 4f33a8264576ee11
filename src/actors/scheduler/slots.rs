//! Slots: which pools there are, what they offer, which of their slots are free.
//!
//! A slot is taken by [`Slots::take`] and comes back by [`Slots::release`], exactly once each. Pools are numbered in the order
//! in which they are listed, which is that of preference. Nothing here knows how a pool runs a task; a pool of this machine
//! and a peer look the same.

use crate::{
    action::Action,
    actors::{scheduler::transition::RunPlace, worker::messages::SlotId},
    platform::{self, Known, Offers, UnknownProperties},
};
use gorego_reapi::error::{Error, Result};
use std::{collections::BTreeSet, sync::Arc};

/// Properties that one action may ask for. Each is looked up in each pool; nobody has use for more than a few.
pub const PROPERTIES_MAX: usize = 1_000;

/// The pools that can take a task, as ascending indices: the preferred one first.
pub type PoolSet = Arc<[usize]>;

/// What a pool offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// For logs and messages.
    pub name: String,
    /// Where its properties are configured, for messages.
    pub section: String,
    /// What the names of its workers begin with; the slot follows.
    pub worker: String,
    /// Tasks that it runs at the same time.
    pub slots: usize,
    /// Properties of its workers.
    pub offers: Offers,
}

/// The slots of every pool.
#[derive(Debug)]
pub struct Slots {
    pools: Vec<PoolSlots>,
    known: Known,
    /// The sets that have been given out, so that tasks share them.
    sets: BTreeSet<PoolSet>,
}

#[derive(Debug)]
struct PoolSlots {
    name: Arc<str>,
    section: String,
    offers: Offers,
    places: Vec<Arc<RunPlace>>,
    /// The last one is used next. That is the slot freed last, whose caches are warm.
    free: Vec<SlotId>,
    /// Its workers are gone for good.
    closed: bool,
}

impl Slots {
    /// All slots free.
    pub fn new(pools: Vec<PoolSpec>, unknown: UnknownProperties) -> Self {
        let known = Known::new(pools.iter().map(|pool| &pool.offers), unknown);
        let pools: Vec<_> = pools.into_iter().map(PoolSlots::new).collect();
        Self { pools, known, sets: BTreeSet::new() }
    }

    /// How many pools there are.
    pub fn pools(&self) -> usize {
        self.pools.len()
    }

    /// The pools that can take an action, by preference.
    ///
    /// # Errors
    /// `Precondition` when no pool offers what it asks for, with the pool that comes nearest (EXE-31); `Unavailable` when
    /// those that do have lost their workers; `Invalid` when it asks for more than [`PROPERTIES_MAX`] properties.
    pub fn suitable(&mut self, action: &Action) -> Result<PoolSet> {
        let asked = &action.platform;
        if asked.len() > PROPERTIES_MAX {
            return Err(Error::Invalid(format!(
                "action {} asks for {} platform properties, more than {PROPERTIES_MAX}",
                action.digest,
                asked.len()
            )));
        }
        let mut suitable = Vec::new();
        let mut nearest: Option<(&PoolSlots, usize)> = None;
        for (index, pool) in self.pools.iter().enumerate() {
            match self.known.differences(&pool.offers, asked).count() {
                0 => suitable.push(index),
                count if nearest.is_none_or(|(_, least)| count < least) => nearest = Some((pool, count)),
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
            _ => {
                let suitable = self.shared(suitable);
                if self.is_served(&suitable) { Ok(suitable) } else { Err(Self::no_workers(action)) }
            }
        }
    }

    /// The error of an action whose pools have no workers.
    pub fn no_workers(action: &Action) -> Error {
        Error::Unavailable(format!(
            "action {} cannot run: the workers of every pool that suits it are gone; try again after a restart",
            action.digest
        ))
    }

    /// Whether one of these pools still has workers.
    pub fn is_served(&self, pools: &PoolSet) -> bool {
        self.of(pools).any(|pool| !pool.closed && !pool.places.is_empty())
    }

    /// Whether a pool has a free slot.
    pub fn has_free(&self, pool: usize) -> bool {
        self.pools.get(pool).is_some_and(|pool| !pool.free.is_empty())
    }

    /// Takes a free slot of a pool.
    pub fn take(&mut self, pool: usize) -> Option<Arc<RunPlace>> {
        let pool = self.pools.get_mut(pool)?;
        let slot = pool.free.pop()?;
        pool.places.get(slot.0).cloned()
    }

    /// Gives a slot back. One of a closed pool is never used again, and one that failed its task is used last: it fails at
    /// once, so it would be free first each time and take task after task.
    pub fn release(&mut self, pool: usize, slot: SlotId, failed: bool) {
        if let Some(pool) = self.pools.get_mut(pool).filter(|pool| !pool.closed) {
            pool.free.insert(if failed { 0 } else { pool.free.len() }, slot);
        }
    }

    /// Takes a whole pool out of service for good.
    pub fn close(&mut self, pool: usize) {
        if let Some(pool) = self.pools.get_mut(pool) {
            pool.closed = true;
            pool.free.clear();
        }
    }

    /// Slots of pools in service, busy or not.
    pub fn in_service(&self) -> usize {
        (0..self.pools.len()).map(|pool| self.count(pool).1).sum()
    }

    /// The slots of a pool that are busy, and how many it has; none when it is out of service.
    pub fn count(&self, pool: usize) -> (usize, usize) {
        let open = self.pools.get(pool).filter(|pool| !pool.closed);
        open.map_or((0, 0), |pool| (pool.places.len() - pool.free.len(), pool.places.len()))
    }

    /// Whether a pool is in service.
    pub fn is_open(&self, pool: usize) -> bool {
        self.pools.get(pool).is_some_and(|pool| !pool.closed)
    }

    /// The name of a pool.
    pub fn name(&self, pool: usize) -> Arc<str> {
        self.pools.get(pool).map_or_else(|| "".into(), |pool| pool.name.clone())
    }

    /// The pool of this name.
    ///
    /// # Errors
    /// `Invalid` that lists the pools there are.
    pub fn find(&self, name: &str) -> Result<usize> {
        self.pools.iter().position(|pool| *pool.name == *name).ok_or_else(|| {
            let names: Vec<_> = self.pools.iter().map(|pool| &*pool.name).collect();
            Error::Invalid(format!(
                "there is no pool \"{}\"; the pools are {}",
                name.escape_debug(),
                names.join(", ")
            ))
        })
    }

    fn of<'a>(&'a self, pools: &'a PoolSet) -> impl Iterator<Item = &'a PoolSlots> {
        pools.iter().filter_map(|&index| self.pools.get(index))
    }

    /// There are few sets in practice. In theory there are very many, which is why unused ones are let go.
    fn shared(&mut self, pools: Vec<usize>) -> PoolSet {
        if let Some(set) = self.sets.get(pools.as_slice()) {
            return set.clone();
        }
        self.sets.retain(|set| Arc::strong_count(set) > 1);
        let set = PoolSet::from(pools);
        self.sets.insert(set.clone());
        set
    }
}

impl PoolSlots {
    fn new(spec: PoolSpec) -> Self {
        let name: Arc<str> = spec.name.into();
        let place = |slot| {
            let slot = SlotId(slot);
            Arc::new(RunPlace { pool: name.clone(), slot, worker: slot.worker(&spec.worker).into() })
        };
        Self {
            places: (0..spec.slots).map(place).collect(),
            free: (0..spec.slots).rev().map(SlotId).collect(),
            name: name.clone(),
            section: spec.section,
            offers: spec.offers,
            closed: false,
        }
    }
}
