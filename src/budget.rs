//! [`Budget`]: a bound that all callers share, such as the bytes of answers that nobody has read yet.
//!
//! A budget has three bounds: one for the whole server, one for a connection, and a share for each [`Peer`]. A peer may hold
//! up to [`SHARE`] times as much as is free. So one peer alone gets 8/9 of everything, two get 8/17 each, and what is left for
//! the next one shrinks with each peer; nobody has to know how many there are. A peer that holds nothing may take all of it.
//! Where one request may take much of the budget, that is not enough, so such a budget keeps an amount free from every peer
//! that holds something already ([`Budget::keeping_free`]).
//!
//! What is held is a [`Share`], which gives itself back when it is dropped. [`Budget::take`] refuses at the bound,
//! [`Budget::wait_for`] waits for room. Waiting peers are served in turn, and so are the connections of each, one request at a
//! time. A connection or peer that has reached its own bound does not hold up the others. Within a connection, small requests
//! go before large ones ([`Budget::wait_for_small`]). A request that is dropped while it waits leaves nothing behind. The
//! counting is the plain struct `Holdings`, which knows no clock and no task.

use crate::{
    caller::{Caller, ConnectionId, Peer},
    error::Error,
};
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
        let state = State { holdings: Holdings::new(bounds, free), waiting: Waiting::default() };
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
    pub fn held_by(&self, connection: ConnectionId) -> u64 {
        self.state().holdings.connections.get(&connection).copied().unwrap_or(0)
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
    /// See [`Budget::keeping_free`].
    free: u64,
    all: u64,
    /// Those that hold something.
    peers: HashMap<Peer, u64>,
    connections: HashMap<ConnectionId, u64>,
}

impl Holdings {
    fn new(bounds: Bounds, free: u64) -> Self {
        Self { bounds, free, all: 0, peers: HashMap::new(), connections: HashMap::new() }
    }

    fn take(&mut self, caller: Caller, amount: u64) -> Result<(), Bound> {
        if amount == 0 {
            return Ok(());
        }
        let of_connection = self.connections.get(&caller.connection).copied().unwrap_or(0);
        if of_connection.saturating_add(amount) > self.bounds.connection {
            return Err(Bound::Connection);
        }
        let of_peer = self.peers.get(&caller.peer).copied().unwrap_or(0);
        let left = self.bounds.total.saturating_sub(self.all).checked_sub(amount).ok_or(Bound::Server)?;
        let is_beyond_share = of_peer.saturating_add(amount) > left.saturating_mul(SHARE);
        if of_peer > 0 && (left < self.free || is_beyond_share) {
            return Err(Bound::Peer);
        }
        self.all += amount;
        *self.peers.entry(caller.peer).or_default() += amount;
        *self.connections.entry(caller.connection).or_default() += amount;
        Ok(())
    }

    fn give_back(&mut self, caller: Caller, amount: u64) {
        self.all = self.all.saturating_sub(amount);
        subtract(&mut self.peers, caller.peer, amount);
        subtract(&mut self.connections, caller.connection, amount);
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
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    const BOUNDS: Bounds = Bounds { what: "marbles", total: 900, connection: 500 };

    fn peer(number: u8) -> Peer {
        Peer::V4(Ipv4Addr::new(127, 0, 0, number))
    }

    /// A new connection of this peer.
    fn caller(number: u8) -> Caller {
        Caller { peer: peer(number), connection: ConnectionId::next() }
    }

    fn bound(result: Result<Share, Refusal>) -> Bound {
        result.unwrap_err().bound()
    }

    #[test]
    fn a_connection_has_its_bound_and_one_peer_alone_gets_eight_ninths() {
        let budget = Budget::new(BOUNDS);
        let mut first = budget.take(caller(1), 500).unwrap();
        assert_eq!(first.grow(1).unwrap_err().bound(), Bound::Connection);
        let _second = budget.take(caller(1), 300).unwrap();
        assert_eq!(bound(budget.take(caller(1), 1)), Bound::Peer);
        let _other = budget.take(caller(2), 80).unwrap();
        assert_eq!(bound(budget.take(caller(3), 21)), Bound::Server);
        let _last = budget.take(caller(3), 20).unwrap();
        first.shrink_to(100);
        assert_eq!(budget.held(), 500);
    }

    #[test]
    fn what_one_peer_holds_leaves_room_for_the_largest_request_of_the_next() {
        let budget = Budget::keeping_free(BOUNDS, 400);
        let _first = budget.take(caller(1), 300).unwrap();
        let _second = budget.take(caller(1), 200).unwrap();
        assert_eq!(bound(budget.take(caller(1), 1)), Bound::Peer);
        let _other = budget.take(caller(2), 400).unwrap();
    }

    #[test]
    fn a_refusal_says_which_bound_was_met_and_when_to_try_again() {
        let refusal = Budget::new(BOUNDS).take(caller(1), 501).unwrap_err();
        let Error::Exhausted { message, retry_after } = Error::from(refusal) else { panic!("{refusal:?}") };
        assert!(message.contains("this connection is at its bound of 500 marbles"), "{message}");
        assert!(retry_after.is_some());
    }

    proptest! {
        #[test]
        fn whatever_is_taken_and_dropped_the_bounds_hold_and_everything_comes_back(
            steps in proptest::collection::vec((0usize..6, 0u64..300, any::<bool>()), 0..200),
        ) {
            let budget = Budget::new(BOUNDS);
            // Two connections each of three peers.
            let callers: Vec<Caller> = (0..6).map(|n| caller(n / 2)).collect();
            let mut shares: Vec<Vec<Share>> = callers.iter().map(|_| Vec::new()).collect();
            for (which, amount, is_drop) in steps {
                if is_drop {
                    shares[which].pop();
                } else {
                    shares[which].extend(budget.take(callers[which], amount));
                }
                let held: Vec<u64> = shares.iter().map(|all| all.iter().map(Share::amount).sum()).collect();
                prop_assert_eq!(budget.held(), held.iter().sum::<u64>());
                prop_assert!(budget.held() <= BOUNDS.total && held.iter().all(|held| *held <= BOUNDS.connection));
            }
            drop(shares);
            let state = budget.state();
            prop_assert!(state.holdings.all == 0);
            prop_assert!(state.holdings.peers.is_empty() && state.holdings.connections.is_empty());
        }
    }

    #[tokio::test]
    async fn those_that_wait_are_served_in_turn_and_one_at_its_own_bound_holds_up_nobody() {
        let budget = Budget::new(Bounds { what: "marbles", total: 1000, connection: 100 });
        let (greedy, modest) = (caller(1), caller(2));
        let held = budget.wait_for(greedy, 100).await.unwrap();
        let mut waits: Vec<_> = (0..2).map(|_| Box::pin(budget.wait_for(greedy, 100))).collect();
        for wait in &mut waits {
            assert!(wait.now_or_never().is_none());
        }
        drop(budget.wait_for(modest, 100).now_or_never().unwrap().unwrap());
        drop(held);
        let share = waits[0].as_mut().now_or_never().unwrap().unwrap();
        assert!(waits[1].as_mut().now_or_never().is_none());
        drop(share);
        assert!(waits[1].as_mut().now_or_never().unwrap().is_ok());
        assert!(budget.wait_for(modest, 101).await.is_err(), "what can never be had is not waited for");
    }

    #[tokio::test]
    async fn a_large_request_is_not_overtaken_for_ever_by_small_ones() {
        let budget = Budget::new(Bounds { what: "marbles", total: 100, connection: 100 });
        let first = budget.wait_for(caller(1), 60).await.unwrap();
        let mut large = Box::pin(budget.wait_for(caller(2), 80));
        assert!(large.as_mut().now_or_never().is_none());
        let mut small = Box::pin(budget.wait_for(caller(3), 10));
        assert!(small.as_mut().now_or_never().is_none(), "the large one was first");
        drop(first);
        assert!(large.as_mut().now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn a_large_request_does_not_hold_up_the_small_ones_of_its_connection() {
        let budget = Budget::new(BOUNDS);
        let caller = caller(1);
        let unread = budget.take(caller, 450).unwrap();
        let mut large = Box::pin(budget.wait_for(caller, 100));
        assert!(large.as_mut().now_or_never().is_none());
        let first = budget.take_small(caller, 50).expect("there is room for a small one");
        let mut small = Box::pin(budget.wait_for_small(caller, 50));
        assert!(small.as_mut().now_or_never().is_none());
        assert!(budget.take_small(caller, 50).is_none(), "small ones are served in their order");
        drop(first);
        let second = small.as_mut().now_or_never().expect("before the large one").unwrap();
        drop((unread, second));
        assert!(large.as_mut().now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn waiting_peers_are_served_in_turn_however_many_connections_they_have() {
        let budget = Budget::new(Bounds { what: "marbles", total: 100, connection: 100 });
        let mut held = vec![budget.take(caller(9), 100).unwrap()];
        let mut waits: Vec<_> = [1, 1, 1, 1, 2, 2]
            .map(|number| {
                let caller = caller(number);
                let budget = budget.clone();
                (number, Box::pin(async move { budget.wait_for(caller, 100).await.unwrap() }))
            })
            .into_iter()
            .collect();
        assert!(waits.iter_mut().all(|(_, wait)| wait.as_mut().now_or_never().is_none()));
        let mut order = Vec::new();
        while !waits.is_empty() {
            held.clear();
            let served = waits
                .iter_mut()
                .enumerate()
                .find_map(|(at, (number, wait))| Some((at, *number, wait.as_mut().now_or_never()?)));
            let (at, number, share) = served.expect("somebody is served");
            held.push(share);
            order.push(number);
            drop(waits.remove(at));
        }
        assert_eq!(order, [1, 2, 1, 2, 1, 1]);
    }

    #[tokio::test]
    async fn a_peer_at_its_share_does_not_hold_up_another() {
        let budget = Budget::new(BOUNDS);
        let _held: Vec<_> = [400, 400].map(|amount| budget.take(caller(1), amount).unwrap()).into();
        let mut waits: Vec<_> = (0..3).map(|_| Box::pin(budget.wait_for(caller(1), 50))).collect();
        assert!(waits.iter_mut().all(|wait| wait.as_mut().now_or_never().is_none()));
        assert!(budget.wait_for(caller(2), 50).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_leaves_nothing_behind() {
        let budget = Budget::new(BOUNDS);
        let held = budget.wait_for(caller(1), 500).await.unwrap();
        let (mut given_up, mut behind) =
            (Box::pin(budget.wait_for(caller(2), 500)), Box::pin(budget.wait_for(caller(3), 50)));
        assert!(given_up.as_mut().now_or_never().is_none());
        assert!(behind.as_mut().now_or_never().is_none());
        drop(given_up);
        assert!(behind.as_mut().now_or_never().unwrap().is_ok(), "its place went to the next");
        drop((held, behind));
        let state = budget.state();
        assert!(state.waiting.peers.is_empty() && state.holdings.all == 0);
    }
}
