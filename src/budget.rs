//! [`Budget`]: a limit that all callers share, such as the number of bytes of unread answers.
//!
//! A budget has limits for the whole server, for each [`Peer`](crate::caller::Peer) and for each connection. The limit
//! of the server is fixed. A peer has a dynamic share: it may hold up to eight times as much as is free. So a single
//! peer gets 8/9 of everything, two peers get 8/17 each, and so on; the number of peers need not be known. Connections
//! share what their peer may have by the same rule, so a single connection gets 8/9 of 8/9. A connection may have a
//! lower fixed limit as well ([`Bounds::connection`]). A peer that holds nothing may take all that is free, and a
//! connection that holds nothing all that its peer may have. Where one request may take a large part of the budget, the
//! budget also keeps an amount free from peers that already hold something ([`Budget::keeping_free`]).
//!
//! Where everything is held for a short time only, nothing is kept free: a single connection may hold the whole budget,
//! and the next one is served as soon as something is returned ([`Budget::in_turns`]).
//!
//! Holders have a [`Share`], which returns itself when it is dropped. [`Budget::take`] fails at the limit;
//! [`Budget::wait_for`] waits. Among the waiting peers, the one that holds least is served first, and among its
//! connections, the one that holds least. Equals take turns, one request at a time. So a connection that holds nothing
//! never waits for one that holds something and wants more. A connection or peer at its own limit does not block the
//! others. Within a connection, small requests go before large ones ([`Budget::wait_for_small`]). A request that is
//! dropped while it waits leaves no trace.
//!
//! The accounting is done by the plain structs in `holdings` and `accounts`, which have no clock and no tasks.

use crate::caller::Caller;
use accounts::{Accounts, RequestSize, Ticket, Waiter};
use gorego_reapi::error::Error;
use holdings::{Holdings, Sharing};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::oneshot;

mod accounts;
mod holdings;

/// The retry delay in errors.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The limits of a [`Budget`], in any unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The counted resource, for messages: "bytes of unread answers".
    pub what: &'static str,
    /// Limit for all callers together.
    pub total: u64,
    /// Fixed limit for one connection. Equal to `total` if only the share limits a connection.
    pub connection: u64,
}

impl Bounds {
    /// Bounds without a fixed limit for a connection.
    pub const fn shared(what: &'static str, total: u64) -> Self {
        Self { what, total, connection: total }
    }
}

/// The limit that refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The limit of the whole server.
    Server,
    /// The share of the caller's peer.
    Peer,
    /// The share of the caller's connection in what its peer may have.
    ConnectionShare,
    /// The fixed limit of the caller's connection.
    Connection,
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
            Bound::ConnectionShare => {
                write!(formatter, "this connection has reached its share of the server's {limit} {what}")
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
pub struct Budget(Arc<BudgetState>);

#[derive(Debug)]
struct BudgetState {
    bounds: Bounds,
    accounts: Mutex<Accounts<oneshot::Sender<Share>>>,
}

impl Budget {
    /// Creates an unused budget.
    pub fn new(bounds: Bounds) -> Self {
        Self::keeping_free(bounds, 0)
    }

    /// Creates a budget in which a peer that holds something may take more only while `free` remains for the others.
    /// `free` should be the most that one request takes.
    pub fn keeping_free(bounds: Bounds, free: u64) -> Self {
        Self::shared_out(bounds, Sharing::Shares { free })
    }

    /// Creates a budget for short work. A single connection may hold all of it while no other request waits.
    pub fn in_turns(bounds: Bounds) -> Self {
        Self::shared_out(bounds, Sharing::Turns)
    }

    fn shared_out(bounds: Bounds, sharing: Sharing) -> Self {
        let accounts = Mutex::new(Accounts::new(Holdings::new(bounds, sharing)));
        Self(Arc::new(BudgetState { bounds, accounts }))
    }

    #[cfg(test)]
    pub(crate) fn bounds(&self) -> Bounds {
        self.0.bounds
    }

    /// The amount that all callers hold together.
    pub fn held(&self) -> u64 {
        self.accounts().holdings().all()
    }

    /// The amount that a connection holds.
    pub fn held_by(&self, caller: Caller) -> u64 {
        self.accounts().holdings().of_connection(caller)
    }

    /// Whether any request waits.
    pub fn is_awaited(&self) -> bool {
        self.accounts().is_awaited()
    }

    /// Takes an amount, or fails if it is not available now.
    ///
    /// # Errors
    /// The limit that was reached.
    pub fn take(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.accounts().take(caller, amount).map_err(|bound| self.refusal(bound))?;
        Ok(Share { budget: self.clone(), caller, amount })
    }

    /// Takes a small amount if it is available now and no other small request of the same connection waits.
    pub fn take_small(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut accounts = self.accounts();
        let taken = !accounts.has_small(caller) && accounts.take(caller, amount).is_ok();
        drop(accounts);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Takes an amount if it is available now and no request waits.
    pub fn take_unless_awaited(&self, caller: Caller, amount: u64) -> Option<Share> {
        let mut accounts = self.accounts();
        let taken = !accounts.is_awaited() && accounts.take(caller, amount).is_ok();
        drop(accounts);
        taken.then(|| Share { budget: self.clone(), caller, amount })
    }

    /// Waits until an amount is available and takes it. The caller bounds the wait by dropping the future.
    ///
    /// # Errors
    /// The limit of a connection, if the amount exceeds it.
    pub async fn wait_for(&self, caller: Caller, amount: u64) -> Result<Share, Refusal> {
        self.wait(caller, amount, RequestSize::Large).await
    }

    /// Like [`Budget::wait_for`], but goes before all waiting large requests of the same connection. Only for amounts
    /// that are a small fraction of the connection's limit, because large requests wait as long as small ones use all
    /// of it.
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
        if let Some(share) = self.take_unless_awaited(caller, amount) {
            return Ok(share);
        }
        let (grant, granted) = oneshot::channel();
        let ticket = self.settle(|accounts| accounts.add(Waiter { caller, amount, grant }, size));
        let _place = QueuePlace { budget: self, caller, ticket };
        // The sender stays in the queue until it has sent, so the error cannot occur.
        granted.await.map_err(|_| self.refusal(Bound::Server))
    }

    fn refusal(&self, bound: Bound) -> Refusal {
        let Bounds { what, total, connection } = self.0.bounds;
        let limit = if bound == Bound::Connection { connection } else { total };
        Refusal { what, bound, limit }
    }

    /// Applies a change and grants the waiting requests for which it makes room.
    fn settle<T>(&self, change: impl FnOnce(&mut Accounts<oneshot::Sender<Share>>) -> T) -> T {
        let mut accounts = self.accounts();
        let changed = change(&mut accounts);
        let granted: Vec<_> = std::iter::from_fn(|| accounts.next()).collect();
        drop(accounts);
        // Done without the lock: if a request was dropped just now, its share is dropped here and takes the lock again.
        for Waiter { caller, amount, grant } in granted {
            drop(grant.send(Share { budget: self.clone(), caller, amount }));
        }
        changed
    }

    fn accounts(&self) -> MutexGuard<'_, Accounts<oneshot::Sender<Share>>> {
        self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner)
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
            self.budget.settle(|accounts| accounts.give_back(self.caller, self.amount));
        }
    }
}

/// A place in the queue of waiting requests. Dropping it leaves the queue.
struct QueuePlace<'a> {
    budget: &'a Budget,
    caller: Caller,
    ticket: Ticket,
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        // A smaller request behind it may now be granted.
        self.budget.settle(|accounts| drop(accounts.remove(self.caller, self.ticket)));
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
