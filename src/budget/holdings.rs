//! [`Holdings`]: who holds how much of a budget, and who may have more. Pure.
//!
//! The same rule holds at two levels. A peer that holds something may hold up to [`SHARE`] times what is left of the budget
//! after its request. A connection that holds something may hold up to [`SHARE`] times what is then left of its peer's share.

use super::{Bound, Bounds};
use crate::caller::{Caller, Peer};
use std::collections::HashMap;

/// A peer or connection may hold this many times as much as it leaves to the next one.
pub(super) const SHARE: u64 = 8;

/// The rule for those that want more than they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// They may have their shares, and a peer only while `free` remains.
    Shares {
        /// See [`Budget::keeping_free`](super::Budget::keeping_free).
        free: u64,
    },
    /// They may have everything.
    Turns,
}

/// The amounts that are held.
#[derive(Debug)]
pub(super) struct Holdings {
    bounds: Bounds,
    sharing: Sharing,
    all: u64,
    /// Peers that hold something.
    peers: HashMap<Peer, u64>,
    /// Keyed by caller, because work without a connection belongs to its peer.
    connections: HashMap<Caller, u64>,
}

impl Holdings {
    pub(super) fn new(bounds: Bounds, sharing: Sharing) -> Self {
        Self { bounds, sharing, all: 0, peers: HashMap::new(), connections: HashMap::new() }
    }

    /// The amount that all callers hold together.
    pub(super) fn all(&self) -> u64 {
        self.all
    }

    pub(super) fn of_peer(&self, peer: Peer) -> u64 {
        self.peers.get(&peer).copied().unwrap_or(0)
    }

    pub(super) fn of_connection(&self, caller: Caller) -> u64 {
        self.connections.get(&caller).copied().unwrap_or(0)
    }

    /// Takes an amount, or names the bound that does not allow it.
    pub(super) fn take(&mut self, caller: Caller, amount: u64) -> Result<(), Bound> {
        if amount > 0 {
            self.check(caller, amount)?;
            self.all += amount;
            *self.peers.entry(caller.peer).or_default() += amount;
            *self.connections.entry(caller).or_default() += amount;
        }
        Ok(())
    }

    fn check(&self, caller: Caller, amount: u64) -> Result<(), Bound> {
        let (before_peer, before) = (self.of_peer(caller.peer), self.of_connection(caller));
        let (of_peer, of_connection) = (before_peer.saturating_add(amount), before.saturating_add(amount));
        if of_connection > self.bounds.connection {
            return Err(Bound::Connection);
        }
        let left = self.bounds.total.saturating_sub(self.all).checked_sub(amount).ok_or(Bound::Server)?;
        let Sharing::Shares { free } = self.sharing else { return Ok(()) };
        // A caller that holds nothing may have all that is left.
        if before_peer > 0 && (left < free || of_peer > left.saturating_mul(SHARE)) {
            return Err(Bound::Peer);
        }
        // What the others leave to this peer, whether it has it or not, and how much of that it may have.
        let for_peer = of_peer.saturating_add(left);
        let share = (for_peer - for_peer.div_ceil(SHARE + 1)).min(for_peer.saturating_sub(free));
        if before > 0 && of_connection > share.saturating_sub(of_peer).saturating_mul(SHARE) {
            return Err(Bound::ConnectionShare);
        }
        Ok(())
    }

    pub(super) fn give_back(&mut self, caller: Caller, amount: u64) {
        self.all = self.all.saturating_sub(amount);
        subtract(&mut self.peers, caller.peer, amount);
        subtract(&mut self.connections, caller, amount);
    }

    /// Whether nothing is held and no entries are left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all == 0 && self.peers.is_empty() && self.connections.is_empty()
    }
}

/// Subtracts an amount and removes empty entries; otherwise the map would grow with every new caller.
fn subtract<K: Eq + std::hash::Hash>(held: &mut HashMap<K, u64>, key: K, amount: u64) {
    if let Some(left) = held.get_mut(&key) {
        *left = left.saturating_sub(amount);
        if *left == 0 {
            held.remove(&key);
        }
    }
}
