//! [`Accounts`]: what each caller holds of a budget, which callers wait for more, and which of them is next. Pure.
//!
//! The peer that holds least is served first, and of its connections the one that holds least. So a peer that holds
//! nothing goes before every peer that holds something. Among equals, the one that was served or arrived longest ago is
//! first. A connection has one request served at a time, its small ones first.

use super::{Bound, holdings::Holdings};
use crate::caller::{Caller, ConnectionId, Peer};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
};

/// The order of a connection's waiting requests. If there is no room for a small request, there is none for a large one
/// either. So small ones go first, and a large one never blocks them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RequestSize {
    /// A small fraction of the connection's limit.
    Small,
    /// A larger part of the connection's limit.
    Large,
}

/// A request that waits, with what is needed to answer it.
#[derive(Debug)]
pub(super) struct Waiter<T> {
    pub(super) caller: Caller,
    pub(super) amount: u64,
    pub(super) grant: T,
}

/// The position of a waiting request in its connection: small ones first, then in order of arrival.
pub(super) type Ticket = (RequestSize, u64);

/// The shares and waiting callers of a budget.
#[derive(Debug)]
pub(super) struct Accounts<T> {
    holdings: Holdings,
    waiting: Line<Peer, WaitingConnections<T>>,
    last_number: u64,
}

/// The waiting requests of one peer; never empty.
type WaitingConnections<T> = Line<ConnectionId, Requests<T>>;
/// The waiting requests of one connection; never empty.
type Requests<T> = BTreeMap<Ticket, Waiter<T>>;

impl<T> Accounts<T> {
    pub(super) fn new(holdings: Holdings) -> Self {
        Self { holdings, waiting: Line::default(), last_number: 0 }
    }

    pub(super) fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    pub(super) fn is_awaited(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a small request of this connection waits.
    pub(super) fn has_small(&self, caller: Caller) -> bool {
        let requests = self.waiting.get(caller.peer).and_then(|peer| peer.get(caller.connection));
        requests.and_then(BTreeMap::first_key_value).is_some_and(|((size, _), _)| *size == RequestSize::Small)
    }

    /// Takes an amount, even if others wait for it.
    pub(super) fn take(&mut self, caller: Caller, amount: u64) -> Result<(), Bound> {
        self.holdings.take(caller, amount)?;
        self.rank(caller);
        Ok(())
    }

    /// Returns an amount. Afterwards, [`Accounts::next`] may find a request to serve.
    pub(super) fn give_back(&mut self, caller: Caller, amount: u64) {
        self.holdings.give_back(caller, amount);
        self.rank(caller);
    }

    /// Lets a request wait. [`Accounts::next`] may serve it at once.
    pub(super) fn add(&mut self, waiter: Waiter<T>, size: RequestSize) -> Ticket {
        let (caller, number) = (waiter.caller, self.number());
        let of_peer = Rank { held: self.holdings.of_peer(caller.peer), since: number };
        let of_connection = Rank { held: self.holdings.of_connection(caller), since: number };
        let requests = self.waiting.enter(caller.peer, of_peer).enter(caller.connection, of_connection);
        requests.insert((size, number), waiter);
        (size, number)
    }

    /// Removes a request that need not be served any more. Afterwards, [`Accounts::next`] may find a request to serve.
    pub(super) fn remove(&mut self, caller: Caller, ticket: Ticket) -> Option<Waiter<T>> {
        let peer = self.waiting.get_mut(caller.peer)?;
        let requests = peer.get_mut(caller.connection)?;
        let waiter = requests.remove(&ticket);
        if requests.is_empty() {
            peer.leave(caller.connection);
        }
        if peer.is_empty() {
            self.waiting.leave(caller.peer);
        }
        waiter
    }

    /// Takes the amount of the first waiting request for which there is room, and removes it from the line. A request
    /// that is too large for what the server has left ends the search, so that smaller requests behind it cannot starve
    /// it.
    pub(super) fn next(&mut self) -> Option<Waiter<T>> {
        let mut found = None;
        for (_, connections) in self.waiting.iter() {
            match next_of_peer(connections, &mut self.holdings) {
                Ok(taken) => {
                    found = Some(taken);
                    break;
                }
                Err(Bound::Server) => break,
                Err(Bound::Peer | Bound::ConnectionShare | Bound::Connection) => {}
            }
        }
        let (caller, ticket) = found?;
        let waiter = self.remove(caller, ticket);
        let number = self.number();
        self.rank_since(caller, Some(number));
        waiter
    }

    /// A new number, larger than all before it.
    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Moves a waiting caller to its new place in the line after the amount that it holds has changed.
    fn rank(&mut self, caller: Caller) {
        self.rank_since(caller, None);
    }

    fn rank_since(&mut self, caller: Caller, since: Option<u64>) {
        let Self { holdings, waiting, .. } = self;
        if waiting.is_empty() {
            return;
        }
        waiting.rank(caller.peer, holdings.of_peer(caller.peer), since);
        if let Some(connections) = waiting.get_mut(caller.peer) {
            connections.rank(caller.connection, holdings.of_connection(caller), since);
        }
    }
}

/// Takes the amount of the first request of a peer for which there is room. The search skips the rest of a peer when
/// its share, or what is left of it, is too small for the first, because it may have thousands of connections. Only few
/// connections can be at a fixed limit of their own.
fn next_of_peer<T>(
    connections: &WaitingConnections<T>,
    holdings: &mut Holdings,
) -> Result<(Caller, Ticket), Bound> {
    for (_, requests) in connections.iter() {
        let Some((ticket, waiter)) = requests.first_key_value() else { continue };
        match holdings.take(waiter.caller, waiter.amount) {
            Ok(()) => return Ok((waiter.caller, *ticket)),
            Err(Bound::Connection) => {}
            Err(bound) => return Err(bound),
        }
    }
    Err(Bound::Connection)
}

/// The place of a peer or connection in a line: least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// The amount that it holds.
    held: u64,
    /// The number that it got when it joined the line, or at its last turn.
    since: u64,
}

/// The waiting peers or connections, in the order of their ranks.
#[derive(Debug)]
struct Line<K, V> {
    entries: HashMap<K, (Rank, V)>,
    order: BTreeSet<(Rank, K)>,
}

impl<K, V> Default for Line<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), order: BTreeSet::new() }
    }
}

impl<K: Copy + Ord + Hash, V: Default> Line<K, V> {
    fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn get(&self, key: K) -> Option<&V> {
        self.entries.get(&key).map(|(_, value)| value)
    }

    fn get_mut(&mut self, key: K) -> Option<&mut V> {
        self.entries.get_mut(&key).map(|(_, value)| value)
    }

    /// All of them, the first one first.
    fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        self.order.iter().filter_map(|(_, key)| Some((*key, self.get(*key)?)))
    }

    /// Adds an entry with this rank, unless it is in the line already.
    fn enter(&mut self, key: K, rank: Rank) -> &mut V {
        let order = &mut self.order;
        let (_, value) = self.entries.entry(key).or_insert_with(|| {
            order.insert((rank, key));
            (rank, V::default())
        });
        value
    }

    fn leave(&mut self, key: K) {
        if let Some((rank, _)) = self.entries.remove(&key) {
            self.order.remove(&(rank, key));
        }
    }

    /// Changes the rank of an entry that is in the line.
    fn rank(&mut self, key: K, held: u64, since: Option<u64>) {
        let Some((rank, _)) = self.entries.get_mut(&key) else { return };
        let changed = Rank { held, since: since.unwrap_or(rank.since) };
        if *rank != changed {
            self.order.remove(&(*rank, key));
            self.order.insert((changed, key));
            *rank = changed;
        }
    }
}
