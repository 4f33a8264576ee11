//! [`Budget`]: a bound that all callers share, such as the bytes of answers that nobody has read yet.
//!
//! A budget has three bounds: one for the whole server, one for a connection, and a share for each [`Peer`]. A peer may hold
//! up to [`SHARE`] times as much as is free. So one peer alone gets 8/9 of everything, two get 8/17 each, and what is left for
//! the next one shrinks with each peer; nobody has to know how many there are. A peer that holds nothing may take all of it.
//! Where one request may take much of the budget, that is not enough, so such a budget keeps an amount free from every peer
//! that holds something already ([`Budget::keeping_free`]).
//!
//! Where everything that is held comes back within moments, nothing is kept for others: a peer alone has it all, and the next
//! one has its turn as soon as something comes back ([`Budget::in_turns`]).
//!
//! What is held is a [`Share`], which gives itself back when it is dropped. [`Budget::take`] refuses at the bound,
//! [`Budget::wait_for`] waits for room. Waiting peers are served in turn, and so are the connections of each, one request at a
//! time. A connection or peer that has reached its own bound does not hold up the others. Within a connection, small requests
//! go before large ones ([`Budget::wait_for_small`]). A request that is dropped while it waits leaves nothing behind. The
//! counting is the plain struct `Holdings`, which knows no clock and no task.

use crate::caller::{Caller, ConnectionId, Peer};
use gorego_reapi::error::Error;
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    ops::Bound::{Excluded, Unbounded},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::oneshot;

/// How many times as much as is free a peer may hold.
pub const SHARE: u64 = 8;
/// When a caller that was refused should ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a peer that holds something may take besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// [`SHARE`] times what is left then, and only while `free` is left.
    Shares {
        /// See [`Budget::keeping_free`].
        free: u64,
    },
    /// All that there is.
    Turns,
}

/// The bounds of a [`Budget`]; units are the user's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// What is counted, for messages: "bytes of unread answers".
    pub what: &'static str,
    /// For all callers together.
    pub total: u64,
    /// For one connection.
    pub connection: u64,
}

/// Which bound a request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// That of the whole server.
    Server,
    /// The share of the caller's peer.
    Peer,
    /// That of the caller's connection.
    Connection,
}

/// How a request that waits is ordered among those of its connection. Where a small one has no room, a large one has none
/// either, so the small ones go first and a large one does not hold them up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Size {
    /// A small part of what a connection may hold.
    Small,
    /// Any other.
    Large,
}

/// Why a request got nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    what: &'static str,
    bound: Bound,
    limit: u64,
}

impl Refusal {
    /// The bound that was met.
    pub fn bound(&self) -> Bound {
        self.bound
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, limit, .. } = self;
        match self.bound {
            Bound::Server => write!(formatter, "the server is at its bound of {limit} {what}"),
            Bound::Peer => write!(formatter, "your address has its share of the server's {limit} {what}"),
            Bound::Connection => write!(formatter, "this connection is at its bound of {limit} {what}"),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Exhausted {
            message: format!("{refusal}; try again when earlier requests are done"),
            retry_after: Some(RETRY_AFTER),
        }
    }
}

/// See the top of this file. Cheap to clone; clones are the same budget.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bounds: Bounds,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    holdings: Holdings,
    waiting: Waiting,
}

impl Budget {
    /// A budget of which nothing is held.
    pub fn new(bounds: Bounds) -> Self {
        Self::keeping_free(bounds, 0)
    }

    /// A budget of which a peer that holds something may take more only while this much is left for the others: the most that
    /// one request takes.
    pub fn keeping_free(bounds: Bounds, free: u64) -> Self {
        Self::shared_out(bounds, Sharing::Shares { free })
    }

    /// A budget for short work, of which a peer alone may hold everything. Those who wait are served in turn.
    pub fn in_turns(bounds: Bounds) -> Self {
        Self::shared_out(bounds, Sharing::Turns)
    }

    fn shared_out(bounds: Bounds, sharing: Sharing) -> Self {
        let state = State { holdings: Holdings::new(bounds, sharing), waiting: Waiting::default() };
        Self(Arc::new(Inner { bounds, state: Mutex::new(state) }))
    }

    /// The bounds.
    pub fn bounds(&self) -> Bounds {
        self.0.bounds
    }

    /// What is held by all callers together.
    pub fn held(&self) -> u64 {
        self.state().holdings.all
    }

    /// What a connection holds.
    pub fn held_by(&self, caller: Caller) -> u64 {
        self.state().holdings.connections.get(&caller).copied().unwrap_or(0)
    }

    /// Whether anybody waits.
    #[cfg(test)]
    pub fn is_awaited(&self) -> bool {
        !self.state().waiting.peers.is_empty()
    }

    /// Takes this much at once.
    ///
    /// # Errors
    /// The bound that is in the way.
    pub fn take(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.state().holdings.take(caller, amount).map_err(|bound| self.refusal(bound))?;
        Ok(Share { budget: self.clone(), caller, amount })
    }

    /// Takes this small amount at once, unless other small requests of the same connection wait.
    pub fn take_small(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut state = self.state();
        let is_first = !state.waiting.has_small(caller);
        let taken = is_first && state.holdings.take(caller, amount).is_ok();
        drop(state);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Takes this much at once, unless there is no room or anybody waits.
    pub fn take_unless_awaited(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut state = self.state();
        let taken = state.waiting.peers.is_empty() && state.holdings.take(caller, amount).is_ok();
        drop(state);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Takes this much as soon as there is room. The caller bounds the wait, by dropping the future.
    ///
    /// # Errors
    /// When a connection can never have this much.
    pub async fn wait_for(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.wait(caller, amount, Size::Large).await
    }

    /// As [`Budget::wait_for`], but before all requests of the same connection that wait there. Only for amounts that are a
    /// small part of what a connection may hold: large ones wait for as long as small ones take all room.
    ///
    /// # Errors
    /// As there.
    pub async fn wait_for_small(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.wait(caller, amount, Size::Small).await
    }

    async fn wait(&self, caller: Caller, amount: u64, size: Size) -> Result<Share, Refusal> {
        let bounds = self.0.bounds;
        if amount > bounds.connection.min(bounds.total) {
            return Err(self.refusal(Bound::Connection));
        }
        {
            let mut state = self.state();
            let State { holdings, waiting } = &mut *state;
            if waiting.peers.is_empty() && holdings.take(caller, amount).is_ok() {
                return Ok(Share { budget: self.clone(), caller, amount });
            }
        }
        let (grant, granted) = oneshot::channel();
        let ticket = self.settle(|State { waiting, .. }| waiting.add(Waiter { caller, amount, grant }, size));
        let _place = Place { budget: self, caller, ticket };
        // The sender stays in the queue until it has sent, so the error cannot happen.
        granted.await.map_err(|_| self.refusal(Bound::Server))
    }

    fn refusal(&self, bound: Bound) -> Refusal {
        let Bounds { what, total, connection } = self.0.bounds;
        let limit = if bound == Bound::Connection { connection } else { total };
        Refusal { what, bound, limit }
    }

    /// Makes a change and lets in those for whom it makes room.
    fn settle<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut granted = Vec::new();
        let changed = {
            let mut state = self.state();
            let changed = change(&mut state);
            let State { holdings, waiting } = &mut *state;
            granted.extend(std::iter::from_fn(|| waiting.next(holdings)));
            changed
        };
        // Without the lock: a request that was dropped in this moment drops its share, which comes back here.
        for Waiter { caller, amount, grant } in granted {
            drop(grant.send(Share { budget: self.clone(), caller, amount }));
        }
        changed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a budget, held until it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    caller: Caller,
    amount: u64,
}

impl Share {
    /// How much it is.
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// Who holds it.
    pub fn caller(&self) -> Caller {
        self.caller
    }

    /// Takes this much more.
    ///
    /// # Errors
    /// The bound that is in the way; the share is as before.
    pub fn grow(&mut self, more: u64) -> Result<(), Refusal> {
        let taken = self.budget.take(self.caller, more)?;
        self.merge(taken);
        Ok(())
    }

    /// Gives all but this much back.
    pub fn shrink_to(&mut self, amount: u64) {
        drop(self.split(self.amount.saturating_sub(amount)));
    }

    /// Moves this much of it, or all that there is, into a share of its own.
    #[must_use = "a share that is dropped is given back"]
    pub fn split(&mut self, amount: u64) -> Self {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        Self { budget: self.budget.clone(), caller: self.caller, amount }
    }

    /// Adds another share of the same caller and budget to this one.
    pub fn merge(&mut self, mut other: Self) {
        debug_assert!(self.caller == other.caller && Arc::ptr_eq(&self.budget.0, &other.budget.0));
        self.amount += std::mem::take(&mut other.amount);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.budget.settle(|state| state.holdings.give_back(self.caller, self.amount));
        }
    }
}

/// Who holds how much.
#[derive(Debug)]
struct Holdings {
    bounds: Bounds,
    sharing: Sharing,
    all: u64,
    /// Those that hold something.
    peers: HashMap<Peer, u64>,
    /// By caller, because the work of one peer that no connection waits for is not that of another.
    connections: HashMap<Caller, u64>,
}

impl Holdings {
    fn new(bounds: Bounds, sharing: Sharing) -> Self {
        Self { bounds, sharing, all: 0, peers: HashMap::new(), connections: HashMap::new() }
    }

    fn take(&mut self, caller: Caller, amount: u64) -> Result<(), Bound> {
        if amount == 0 {
            return Ok(());
        }
        let of_connection = self.connections.get(&caller).copied().unwrap_or(0);
        if of_connection.saturating_add(amount) > self.bounds.connection {
            return Err(Bound::Connection);
        }
        let of_peer = self.peers.get(&caller.peer).copied().unwrap_or(0);
        let left = self.bounds.total.saturating_sub(self.all).checked_sub(amount).ok_or(Bound::Server)?;
        let is_within_share = match self.sharing {
            Sharing::Shares { free } => {
                left >= free && of_peer.saturating_add(amount) <= left.saturating_mul(SHARE)
            }
            Sharing::Turns => true,
        };
        if of_peer > 0 && !is_within_share {
            return Err(Bound::Peer);
        }
        self.all += amount;
        *self.peers.entry(caller.peer).or_default() += amount;
        *self.connections.entry(caller).or_default() += amount;
        Ok(())
    }

    fn give_back(&mut self, caller: Caller, amount: u64) {
        self.all = self.all.saturating_sub(amount);
        subtract(&mut self.peers, caller.peer, amount);
        subtract(&mut self.connections, caller, amount);
    }
}

/// Entries of nothing are not kept: there would be one for each caller that ever was.
fn subtract<K: Eq + std::hash::Hash>(held: &mut HashMap<K, u64>, key: K, amount: u64) {
    if let Some(left) = held.get_mut(&key) {
        *left = left.saturating_sub(amount);
        if *left == 0 {
            held.remove(&key);
        }
    }
}

/// A request that waits for room.
#[derive(Debug)]
struct Waiter {
    caller: Caller,
    amount: u64,
    grant: oneshot::Sender<Share>,
}

/// Where a request waits in its connection: small ones first, then in the order in which they came.
type Ticket = (Size, u64);

/// The requests that wait, by peer and connection.
#[derive(Debug, Default)]
struct Waiting {
    peers: BTreeMap<Peer, Queues>,
    next_number: u64,
    /// The peer that was served last.
    last: Peer,
}

/// The requests of one peer that wait; never empty.
#[derive(Debug, Default)]
struct Queues {
    connections: BTreeMap<ConnectionId, BTreeMap<Ticket, Waiter>>,
    /// The connection that was served last.
    last: ConnectionId,
}

impl Waiting {
    fn add(&mut self, waiter: Waiter, size: Size) -> Ticket {
        let ticket = (size, self.next_number);
        self.next_number += 1;
        let Caller { peer, connection } = waiter.caller;
        let queues = self.peers.entry(peer).or_default();
        queues.connections.entry(connection).or_default().insert(ticket, waiter);
        ticket
    }

    fn has_small(&self, caller: Caller) -> bool {
        let queue =
            self.peers.get(&caller.peer).and_then(|queues| queues.connections.get(&caller.connection));
        queue.and_then(BTreeMap::first_key_value).is_some_and(|((size, _), _)| *size == Size::Small)
    }

    fn remove(&mut self, caller: Caller, ticket: Ticket) -> Option<Waiter> {
        let queues = self.peers.get_mut(&caller.peer)?;
        let queue = queues.connections.get_mut(&caller.connection)?;
        let waiter = queue.remove(&ticket);
        if queue.is_empty() {
            queues.connections.remove(&caller.connection);
        }
        if queues.connections.is_empty() {
            self.peers.remove(&caller.peer);
        }
        waiter
    }

    /// Takes out the first request, in the order of turns, for which there is room, and takes it for it. The first one that is
    /// too large for what the server has left ends the search, so that smaller ones behind it cannot keep it waiting for ever.
    fn next(&mut self, holdings: &mut Holdings) -> Option<Waiter> {
        let mut found = None;
        for (_, queues) in turns(&self.peers, self.last) {
            match queues.next(holdings) {
                Ok(taken) => {
                    found = Some(taken);
                    break;
                }
                Err(Bound::Server) => break,
                Err(Bound::Peer | Bound::Connection) => {}
            }
        }
        let (caller, ticket) = found?;
        self.last = caller.peer;
        if let Some(queues) = self.peers.get_mut(&caller.peer) {
            queues.last = caller.connection;
        }
        self.remove(caller, ticket)
    }
}

impl Queues {
    /// Takes room for the first request for which there is some. A peer at its bound is not searched further: it may have
    /// thousands of connections. Few of them can be at their own bound.
    fn next(&self, holdings: &mut Holdings) -> Result<(Caller, Ticket), Bound> {
        for (_, queue) in turns(&self.connections, self.last) {
            let Some((ticket, waiter)) = queue.first_key_value() else { continue };
            match holdings.take(waiter.caller, waiter.amount) {
                Ok(()) => return Ok((waiter.caller, *ticket)),
                Err(Bound::Connection) => {}
                Err(bound) => return Err(bound),
            }
        }
        Err(Bound::Connection)
    }
}

/// All entries, beginning behind the one that was served last.
fn turns<K: Ord + Copy, V>(all: &BTreeMap<K, V>, last: K) -> impl Iterator<Item = (&K, &V)> {
    all.range((Excluded(last), Unbounded)).chain(all.range(..=last))
}

/// A place among those that wait, left when this is dropped.
struct Place<'a> {
    budget: &'a Budget,
    caller: Caller,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // The request behind it may need less.
        self.budget.settle(|state| drop(state.waiting.remove(self.caller, self.ticket)));
    }
}

#[cfg(test)]
mod tests;
