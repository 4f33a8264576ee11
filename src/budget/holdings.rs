//! [`Holdings`]: how much of a budget each caller holds, and which callers may have more. Pure.
//!
//! The same rule holds at two levels. A peer that holds something may hold up to [`SHARE`] times what is left of the
//! budget after its request. A connection that holds something may hold up to [`SHARE`] times what is then left of its
//! peer's share.

use super::{Bound, Bounds};
use crate::caller::{Caller, Peer};
use std::collections::{HashMap, hash_map::Entry};

/// A peer or connection may hold this many times the amount that it leaves to the next one.
pub(super) const SHARE: u64 = 8;

/// The rule for callers that hold something and want more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// They may have their shares, and a peer only while `free` remains.
    Shares {
        /// The amount that [`Budget::keeping_free`](super::Budget::keeping_free) was given.
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
            let (peer, connection) = (self.peers.entry(caller.peer), self.connections.entry(caller));
            let rule = Rule { bounds: self.bounds, sharing: self.sharing, all: self.all };
            rule.check(held(&peer), held(&connection), amount)?;
            self.all += amount;
            *peer.or_default() += amount;
            *connection.or_default() += amount;
        }
        Ok(())
    }

    pub(super) fn give_back(&mut self, caller: Caller, amount: u64) {
        self.all = self.all.saturating_sub(amount);
        subtract(self.peers.entry(caller.peer), amount);
        subtract(self.connections.entry(caller), amount);
    }

    /// Whether nothing is held and no entries are left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.all == 0 && self.peers.is_empty() && self.connections.is_empty()
    }
}

/// Decides who may have more, given the amount that all callers hold together.
struct Rule {
    bounds: Bounds,
    sharing: Sharing,
    all: u64,
}

impl Rule {
    /// Returns the bound that does not allow this amount to a caller whose peer and connection hold these amounts.
    fn check(&self, of_peer_before: u64, before: u64, amount: u64) -> Result<(), Bound> {
        let (of_peer, of_connection) = (of_peer_before.saturating_add(amount), before.saturating_add(amount));
        if of_connection > self.bounds.connection {
            return Err(Bound::Connection);
        }
        let left = self.bounds.total.saturating_sub(self.all).checked_sub(amount).ok_or(Bound::Server)?;
        let Sharing::Shares { free } = self.sharing else { return Ok(()) };
        // A caller that holds nothing may have all that is left.
        if of_peer_before > 0 && (left < free || of_peer > left.saturating_mul(SHARE)) {
            return Err(Bound::Peer);
        }
        // The amount that the others leave to this peer, including what it holds, and how much of that it may have.
        let for_peer = of_peer.saturating_add(left);
        let share = (for_peer - for_peer.div_ceil(SHARE + 1)).min(for_peer.saturating_sub(free));
        if before > 0 && of_connection > share.saturating_sub(of_peer).saturating_mul(SHARE) {
            return Err(Bound::ConnectionShare);
        }
        Ok(())
    }
}

fn held<K>(entry: &Entry<'_, K, u64>) -> u64 {
    match entry {
        Entry::Occupied(held) => *held.get(),
        Entry::Vacant(_) => 0,
    }
}

/// Subtracts an amount and removes an entry that becomes empty; otherwise the map would grow with every new caller.
fn subtract<K>(entry: Entry<'_, K, u64>, amount: u64) {
    if let Entry::Occupied(mut held) = entry {
        match held.get().saturating_sub(amount) {
            0 => drop(held.remove()),
            left => *held.get_mut() = left,
        }
    }
}
