//! Slots: which pools there are, what they offer, which of their slots are free.
//!
//! A slot is taken by [`Slots::take`] and comes back by [`Slots::release`], exactly once each. Nothing here knows how a pool
//! runs a task; a pool of this machine and a peer look the same.

use super::queue::PoolSet;
use crate::{
    action::Action,
    actors::worker::messages::SlotId,
    error::{Error, Result},
};
use std::{collections::BTreeMap, sync::Arc};

/// What a pool offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// For logs and messages.
    pub name: String,
    /// Tasks that it runs at the same time.
    pub slots: usize,
    /// Properties of its workers. What is not listed does not matter.
    pub platform: BTreeMap<String, String>,
}

/// The slots of every pool.
#[derive(Debug)]
pub struct Slots {
    pools: Vec<PoolSlots>,
}

#[derive(Debug)]
struct PoolSlots {
    name: Arc<str>,
    platform: BTreeMap<String, String>,
    total: usize,
    /// The slot freed last is used next: its caches are warm.
    free: Vec<SlotId>,
    /// Its workers are gone for good.
    closed: bool,
}

impl Slots {
    /// All slots free.
    pub fn new(pools: Vec<PoolSpec>) -> Self {
        let pools = pools.into_iter().map(|spec| PoolSlots {
            name: spec.name.into(),
            platform: spec.platform,
            total: spec.slots,
            free: (0..spec.slots).rev().map(SlotId).collect(),
            closed: false,
        });
        Self { pools: pools.collect() }
    }

    /// The pools that can take an action.
    ///
    /// # Errors
    /// `Precondition` when no pool offers what it asks for, with the pool that comes nearest (EXE-31); `Unavailable` when
    /// those that do have lost their workers.
    pub fn suitable(&self, action: &Action) -> Result<PoolSet> {
        let mut suitable = Vec::new();
        let mut nearest: Option<(&PoolSlots, Vec<Difference>)> = None;
        for (index, pool) in self.pools.iter().enumerate() {
            let differences = pool.differences(&action.platform);
            if differences.is_empty() {
                suitable.push(index);
            } else if nearest.as_ref().is_none_or(|(_, least)| differences.len() < least.len()) {
                nearest = Some((pool, differences));
            }
        }
        match nearest {
            Some((pool, differences)) if suitable.is_empty() => Err(Error::Precondition(format!(
                "no worker can run action {}: the nearest pool, \"{}\", differs in {}; change the action's platform \
                 properties or [execution.platform] of the server",
                action.digest,
                pool.name,
                differences.iter().map(Difference::to_string).collect::<Vec<_>>().join(", ")
            ))),
            _ => {
                let suitable = PoolSet::from(suitable);
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
        self.of(pools).any(|pool| !pool.closed && pool.total > 0)
    }

    /// Whether one of these pools has a free slot.
    pub fn has_free(&self, pools: &PoolSet) -> bool {
        self.of(pools).any(|pool| !pool.free.is_empty())
    }

    /// Takes a slot of the first of these pools that has one: pools are listed by preference.
    pub fn take(&mut self, pools: &PoolSet) -> Option<(usize, SlotId)> {
        pools.iter().find_map(|&index| Some((index, self.pools.get_mut(index)?.free.pop()?)))
    }

    /// Gives a slot back. One of a closed pool is never used again.
    pub fn release(&mut self, pool: usize, slot: SlotId) {
        if let Some(pool) = self.pools.get_mut(pool).filter(|pool| !pool.closed) {
            pool.free.push(slot);
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
        self.pools.iter().filter(|pool| !pool.closed).map(|pool| pool.total).sum()
    }

    /// Whether a pool is in service.
    pub fn is_open(&self, pool: usize) -> bool {
        self.pools.get(pool).is_some_and(|pool| !pool.closed)
    }

    /// The name of a pool.
    pub fn name(&self, pool: usize) -> Arc<str> {
        self.pools.get(pool).map_or_else(|| "".into(), |pool| pool.name.clone())
    }

    fn of<'a>(&'a self, pools: &'a PoolSet) -> impl Iterator<Item = &'a PoolSlots> {
        pools.iter().filter_map(|&index| self.pools.get(index))
    }
}

/// A property of which an action wants another value than a pool has.
struct Difference {
    name: String,
    wanted: String,
    offered: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, wanted, offered } = self;
        write!(f, "{name} (asked for \"{}\", offered \"{offered}\")", wanted.escape_debug())
    }
}

impl PoolSlots {
    fn differences(&self, platform: &[(String, String)]) -> Vec<Difference> {
        let differs = |(name, wanted): &(String, String)| {
            let offered = self.platform.get(name)?;
            // Clients spell this one in every way: "linux", "Linux".
            let same = match name.as_str() {
                "OSFamily" => offered.eq_ignore_ascii_case(wanted),
                _ => offered == wanted,
            };
            let difference =
                || Difference { name: name.clone(), wanted: wanted.clone(), offered: offered.clone() };
            (!same).then(difference)
        };
        platform.iter().filter_map(differs).collect()
    }
}
