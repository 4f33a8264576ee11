//! [`Budget`]: a limit that all callers share, such as the number of bytes of unread answers.
//!
//! A budget has three limits: one for the whole server, one for each connection, and a dynamic share for each [`Peer`]. A
//! peer may hold up to [`SHARE`] times as much as is free. So a single peer gets 8/9 of everything, two peers get 8/17
//! each, and so on; the number of peers need not be known. A peer that holds nothing may take all that is free. Where one
//! request may take a large part of the budget, the budget also keeps an amount free from peers that already hold something
//! ([`Budget::keeping_free`]).
//!
//! Where everything is held for a short time only, nothing is kept free: a single peer may hold all of it, and the next
//! peer is served as soon as something is returned ([`Budget::in_turns`]).
//!
//! Holders have a [`Share`], which returns itself when it is dropped. [`Budget::take`] fails at the limit;
//! [`Budget::wait_for`] waits. Waiting peers are served round-robin, and so are the connections of each peer, one request
//! at a time. A connection or peer at its own limit does not block the others. Within a connection, small requests go
//! before large ones ([`Budget::wait_for_small`]). A request that is dropped while it waits leaves no trace. The accounting
//! is done by the plain struct `Holdings`, which has no clock and no tasks.

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

/// A peer may hold this many times as much as is free.
pub(crate) const SHARE: u64 = 8;
/// The retry delay in errors.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The rule for a peer that wants more than it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// It may hold [`SHARE`] times what is then left, and only while `free` remains.
    Shares {
        /// See [`Budget::keeping_free`].
        free: u64,
    },
    /// It may take everything.
    Turns,
}

/// The limits of a [`Budget`], in any unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The counted resource, for messages: "bytes of unread answers".
    pub what: &'static str,
    /// Limit for all callers together.
    pub total: u64,
    /// Limit for one connection.
    pub connection: u64,
}

/// The limit that refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The limit of the whole server.
    Server,
    /// The share of the caller's peer.
    Peer,
    /// The limit of the caller's connection.
    Connection,
}

/// The order of a connection's waiting requests. If there is no room for a small request, there is none for a large one
/// either. So small ones go first, and a large one never blocks them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum RequestSize {
    /// A small fraction of the connection's limit.
    Small,
    /// Everything else.
    Large,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    what: &'static str,
    bound: Bound,
    limit: u64,
}

impl Refusal {
    /// The limit that refused the request.
    pub fn bound(&self) -> Bound {
        self.bound
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, limit, .. } = self;
        match self.bound {
            Bound::Server => write!(formatter, "the server has reached its limit of {limit} {what}"),
            Bound::Peer => {
                write!(formatter, "your address has reached its share of the server's {limit} {what}")
            }
            Bound::Connection => write!(formatter, "this connection has reached its limit of {limit} {what}"),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Exhausted {
            message: format!("{refusal}; try again when earlier requests are finished"),
            retry_after: Some(RETRY_AFTER),
        }
    }
}

/// A limit that all callers share; see the top of this file. Cheap to clone; clones share the limit.
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
    /// Creates an unused budget.
    pub fn new(bounds: Bounds) -> Self {
        Self::keeping_free(bounds, 0)
    }

    /// Creates a budget in which a peer that holds something may take more only while `free` remains for the others. `free`
    /// should be the most that one request takes.
    pub fn keeping_free(bounds: Bounds, free: u64) -> Self {
        Self::shared_out(bounds, Sharing::Shares { free })
    }

    /// Creates a budget for short work, of which a single peer may hold everything. Waiting peers are served round-robin.
    pub fn in_turns(bounds: Bounds) -> Self {
        Self::shared_out(bounds, Sharing::Turns)
    }

    fn shared_out(bounds: Bounds, sharing: Sharing) -> Self {
        let state = State { holdings: Holdings::new(bounds, sharing), waiting: Waiting::default() };
        Self(Arc::new(Inner { bounds, state: Mutex::new(state) }))
    }

    #[cfg(test)]
    pub(crate) fn bounds(&self) -> Bounds {
        self.0.bounds
    }

    /// The amount that all callers hold together.
    pub fn held(&self) -> u64 {
        self.state().holdings.all
    }

    /// The amount that a connection holds.
    pub fn held_by(&self, caller: Caller) -> u64 {
        self.state().holdings.connections.get(&caller).copied().unwrap_or(0)
    }

    /// Whether any request waits.
    #[cfg(test)]
    pub fn is_awaited(&self) -> bool {
        !self.state().waiting.peers.is_empty()
    }

    /// Takes an amount, or fails if it is not available now.
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn take(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.state().holdings.take(caller, amount).map_err(|bound| self.refusal(bound))?;
        Ok(Share { budget: self.clone(), caller, amount })
    }

    /// Takes a small amount if it is available now and no other small request of the same connection waits.
    pub fn take_small(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut state = self.state();
        let is_first = !state.waiting.has_small(caller);
        let taken = is_first && state.holdings.take(caller, amount).is_ok();
        drop(state);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Takes an amount if it is available now and no request waits.
    pub fn take_unless_awaited(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut state = self.state();
        let taken = state.waiting.peers.is_empty() && state.holdings.take(caller, amount).is_ok();
        drop(state);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Waits until an amount is available and takes it. The caller bounds the wait by dropping the future.
    ///
    /// # Errors
    /// When the amount exceeds the limit of a connection.
    pub async fn wait_for(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.wait(caller, amount, RequestSize::Large).await
    }

    /// Like [`Budget::wait_for`], but goes before all waiting large requests of the same connection. Only for amounts that
    /// are a small fraction of the connection's limit, because large requests wait as long as small ones use all of it.
    ///
    /// # Errors
    /// As [`Budget::wait_for`].
    pub async fn wait_for_small(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.wait(caller, amount, RequestSize::Small).await
    }

    async fn wait(&self, caller: Caller, amount: u64, size: RequestSize) -> Result<Share, Refusal> {
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
        // The sender stays in the queue until it has sent, so the error cannot occur.
        granted.await.map_err(|_| self.refusal(Bound::Server))
    }

    fn refusal(&self, bound: Bound) -> Refusal {
        let Bounds { what, total, connection } = self.0.bounds;
        let limit = if bound == Bound::Connection { connection } else { total };
        Refusal { what, bound, limit }
    }

    /// Applies a change and grants the waiting requests for which it makes room.
    fn settle<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut granted = Vec::new();
        let changed = {
            let mut state = self.state();
            let changed = change(&mut state);
            let State { holdings, waiting } = &mut *state;
            granted.extend(std::iter::from_fn(|| waiting.next(holdings)));
            changed
        };
        // Done without the lock: if a request was dropped just now, its share is dropped here and takes the lock again.
        for Waiter { caller, amount, grant } in granted {
            drop(grant.send(Share { budget: self.clone(), caller, amount }));
        }
        changed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a budget. Dropping it returns the amount.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    caller: Caller,
    amount: u64,
}

impl Share {
    /// The amount that this share holds.
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// The holder of this share.
    pub fn caller(&self) -> Caller {
        self.caller
    }

    /// Takes an additional amount.
    ///
    /// # Errors
    /// The limit that was reached. The share stays as it was.
    pub fn grow(&mut self, more: u64) -> Result<(), Refusal> {
        let taken = self.budget.take(self.caller, more)?;
        self.merge(taken);
        Ok(())
    }

    /// Returns everything above this amount.
    pub fn shrink_to(&mut self, amount: u64) {
        drop(self.split(self.amount.saturating_sub(amount)));
    }

    /// Moves this amount, or everything if there is less, to a new share.
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

/// The amounts that are held.
#[derive(Debug)]
struct Holdings {
    bounds: Bounds,
    sharing: Sharing,
    all: u64,
    /// Peers that hold something.
    peers: HashMap<Peer, u64>,
    /// Keyed by caller, because work without a connection belongs to its peer.
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

/// Subtracts an amount and removes empty entries; otherwise the map would grow with every new caller.
fn subtract<K: Eq + std::hash::Hash>(held: &mut HashMap<K, u64>, key: K, amount: u64) {
    if let Some(left) = held.get_mut(&key) {
        *left = left.saturating_sub(amount);
        if *left == 0 {
            held.remove(&key);
        }
    }
}

#[derive(Debug)]
struct Waiter {
    caller: Caller,
    amount: u64,
    grant: oneshot::Sender<Share>,
}

/// The position of a waiting request in its connection: small ones first, then in order of arrival.
type Ticket = (RequestSize, u64);

/// The waiting requests, by peer and connection.
#[derive(Debug, Default)]
struct Waiting {
    peers: BTreeMap<Peer, Queues>,
    next_number: u64,
    /// The peer that was served last.
    last: Peer,
}

/// The waiting requests of one peer; never empty.
#[derive(Debug, Default)]
struct Queues {
    connections: BTreeMap<ConnectionId, BTreeMap<Ticket, Waiter>>,
    /// The connection that was served last.
    last: ConnectionId,
}

impl Waiting {
    fn add(&mut self, waiter: Waiter, size: RequestSize) -> Ticket {
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
        queue.and_then(BTreeMap::first_key_value).is_some_and(|((size, _), _)| *size == RequestSize::Small)
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

    /// Removes the first request, in round-robin order, for which there is room, and takes its amount. A request that is
    /// too large for what the server has left ends the search, so that smaller requests behind it cannot starve it.
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
    /// Takes the amount of the first request for which there is room. The search skips the rest of a peer that is at its
    /// limit, because it may have thousands of connections. Only few connections can be at their own limit.
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

/// All entries in round-robin order, starting after the one that was served last.
fn turns<K: Ord + Copy, V>(all: &BTreeMap<K, V>, last: K) -> impl Iterator<Item = (&K, &V)> {
    all.range((Excluded(last), Unbounded)).chain(all.range(..=last))
}

/// A place in the queue of waiting requests. Dropping it leaves the queue.
struct Place<'a> {
    budget: &'a Budget,
    caller: Caller,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // A smaller request behind it may now be granted.
        self.budget.settle(|state| drop(state.waiting.remove(self.caller, self.ticket)));
    }
}

#[cfg(test)]
mod tests;
