//! A budget beside a model of it that keeps plain lists and searches all of them.

use super::{
    Bound, Bounds,
    accounts::{Accounts, RequestSize, Ticket, Waiter},
    holdings::{Holdings, SHARE, Sharing},
    tests::peer,
};
use crate::caller::{Caller, ConnectionId};
use proptest::prelude::*;
use std::collections::HashMap;

#[derive(Debug, Clone)]
enum Op {
    Take { who: usize, amount: u64 },
    Wait { who: usize, amount: u64, size: RequestSize },
    GiveBack { nth: usize },
    Leave { nth: usize },
}

/// Three peers with three connections each.
const CALLERS: usize = 9;

fn op() -> impl Strategy<Value = Op> {
    let (who, amount) = (0..CALLERS, prop_oneof![3 => Just(1u64), 1 => 1u64..12]);
    let size = prop_oneof![Just(RequestSize::Small), Just(RequestSize::Large)];
    prop_oneof![
        1 => (who.clone(), amount.clone()).prop_map(|(who, amount)| Op::Take { who, amount }),
        4 => (who, amount, size).prop_map(|(who, amount, size)| Op::Wait { who, amount, size }),
        4 => any::<usize>().prop_map(|nth| Op::GiveBack { nth }),
        1 => any::<usize>().prop_map(|nth| Op::Leave { nth }),
    ]
}

fn budget() -> impl Strategy<Value = (Bounds, Sharing)> {
    let sharing = prop_oneof![(0u64..4).prop_map(|free| Sharing::Shares { free }), Just(Sharing::Turns)];
    (1u64..40, 1u64..60, sharing).prop_map(|(total, connection, sharing)| {
        (Bounds { what: "marbles", total, connection: connection.min(total) }, sharing)
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    caller: Caller,
    amount: u64,
    ticket: Ticket,
}

struct Model {
    bounds: Bounds,
    sharing: Sharing,
    held: Vec<(Caller, u64)>,
    waiting: Vec<Request>,
    /// When each peer or connection that waits came, or was served last.
    since: HashMap<(Caller, bool), u64>,
    time: u64,
}

impl Model {
    fn of(&self, whose: impl Fn(Caller) -> bool) -> u64 {
        self.held.iter().filter(|(caller, _)| whose(*caller)).map(|(_, amount)| amount).sum()
    }

    fn of_peer(&self, caller: Caller) -> u64 {
        self.of(|other| other.peer == caller.peer)
    }

    fn of_connection(&self, caller: Caller) -> u64 {
        self.of(|other| other == caller)
    }

    /// The most that a peer may hold of what the others leave to it, if it holds something.
    fn share(&self, caller: Caller) -> u64 {
        let rest = self.bounds.total - self.of(|other| other.peer != caller.peer);
        let is_allowed = |hold: &u64| match self.sharing {
            Sharing::Shares { free } => *hold <= SHARE * (rest - hold) && rest - hold >= free,
            Sharing::Turns => true,
        };
        (0..=rest).filter(is_allowed).max().unwrap_or(0)
    }

    fn check(&self, caller: Caller, amount: u64) -> Result<(), Bound> {
        let (of_peer, of_connection) = (self.of_peer(caller), self.of_connection(caller));
        let (peer_after, after) = (of_peer + amount, of_connection + amount);
        let share = self.share(caller);
        if after > self.bounds.connection {
            Err(Bound::Connection)
        } else if self.of(|_| true) + amount > self.bounds.total {
            Err(Bound::Server)
        } else if of_peer > 0 && peer_after > share {
            Err(Bound::Peer)
        } else if of_connection > 0
            && self.sharing != Sharing::Turns
            && after > SHARE * share.saturating_sub(peer_after)
        {
            Err(Bound::ConnectionShare)
        } else {
            Ok(())
        }
    }

    /// Peers and connections are keyed alike: a peer by its caller without a connection.
    fn keys(caller: Caller) -> [(Caller, bool); 2] {
        [(Caller::without_connection(caller.peer), true), (caller, false)]
    }

    fn wait(&mut self, request: Request) {
        let is_in_line = [
            self.waiting.iter().any(|other| other.caller.peer == request.caller.peer),
            self.waiting.iter().any(|other| other.caller == request.caller),
        ];
        for (key, is_in_line) in Self::keys(request.caller).into_iter().zip(is_in_line) {
            if !is_in_line {
                self.since.insert(key, self.time);
            }
        }
        self.time += 1;
        self.waiting.push(request);
    }

    /// The request to be served now.
    fn next(&mut self) -> Option<Request> {
        let mut order = self.waiting.clone();
        order.sort_by_key(|request| {
            let [peer, connection] = Self::keys(request.caller).map(|key| self.since[&key]);
            let (of_peer, of_connection) = (self.of_peer(request.caller), self.of_connection(request.caller));
            (of_peer, peer, of_connection, connection, request.ticket)
        });
        // The first of each connection.
        let mut seen = Vec::new();
        order.retain(|request| {
            !seen.contains(&request.caller) && {
                seen.push(request.caller);
                true
            }
        });
        let mut skipped = None;
        for request in order {
            if skipped == Some(request.caller.peer) {
                continue;
            }
            match self.check(request.caller, request.amount) {
                Ok(()) => return Some(request),
                Err(Bound::Server) => return None,
                Err(Bound::Peer | Bound::ConnectionShare) => skipped = Some(request.caller.peer),
                Err(Bound::Connection) => {}
            }
        }
        None
    }

    /// What must be true whenever this request is served.
    fn assert_is_fair(&self, served: Request) {
        let (of_peer, of_connection) = (self.of_peer(served.caller), self.of_connection(served.caller));
        for other in &self.waiting {
            let is_of_peer = other.caller.peer == served.caller.peer;
            assert!(of_peer == 0 || is_of_peer || self.of_peer(other.caller) > 0, "a peer has nothing");
            assert!(
                of_connection == 0 || !is_of_peer || self.of_connection(other.caller) > 0,
                "a connection has nothing"
            );
        }
    }

    fn serve(&mut self, request: Request) {
        self.waiting.retain(|other| *other != request);
        self.held.push((request.caller, request.amount));
        for key in Self::keys(request.caller) {
            self.since.insert(key, self.time);
        }
        self.time += 1;
    }
}

proptest! {
    /// Nothing is granted beyond a bound, callers that hold nothing go first, and no request waits for an amount that
    /// is free.
    #[test]
    fn a_budget_behaves_like_its_model(
        (bounds, sharing) in budget(),
        ops in proptest::collection::vec(op(), 0..120),
    ) {
        let callers: Vec<Caller> = (0..CALLERS as u8)
            .map(|n| Caller { peer: peer(n / 3), connection: ConnectionId::next() })
            .collect();
        let mut accounts = Accounts::new(Holdings::new(bounds, sharing));
        let (held, waiting, since) = (Vec::new(), Vec::new(), HashMap::new());
        let mut model = Model { bounds, sharing, held, waiting, since, time: 0 };
        for op in ops {
            match op {
                Op::Take { who, amount } => {
                    let expected = model.check(callers[who], amount);
                    prop_assert_eq!(accounts.take(callers[who], amount), expected);
                    if expected.is_ok() { model.held.push((callers[who], amount)) }
                }
                Op::Wait { who, amount, size } => {
                    let (caller, amount) = (callers[who], amount.min(bounds.connection));
                    let ticket = accounts.add(Waiter { caller, amount, grant: () }, size);
                    model.wait(Request { caller, amount, ticket });
                    prop_assert!(size == RequestSize::Large || accounts.has_small(caller));
                }
                Op::GiveBack { nth } if !model.held.is_empty() => {
                    let nth = nth % model.held.len();
                    let (caller, amount) = model.held.remove(nth);
                    accounts.give_back(caller, amount);
                }
                Op::Leave { nth } if !model.waiting.is_empty() => {
                    let nth = nth % model.waiting.len();
                    let Request { caller, ticket, .. } = model.waiting.remove(nth);
                    prop_assert!(accounts.remove(caller, ticket).is_some());
                    prop_assert!(accounts.remove(caller, ticket).is_none());
                }
                Op::GiveBack { .. } | Op::Leave { .. } => {}
            }
            loop {
                let (got, expected) = (accounts.next(), model.next());
                prop_assert_eq!(
                    got.map(|waiter| (waiter.caller, waiter.amount)),
                    expected.map(|request| (request.caller, request.amount))
                );
                let Some(served) = expected else { break };
                model.assert_is_fair(served);
                model.serve(served);
            }
            prop_assert_eq!(accounts.holdings().all(), model.of(|_| true));
            prop_assert!(model.of(|_| true) <= bounds.total);
            for caller in &callers {
                let held = model.of_connection(*caller);
                prop_assert_eq!(accounts.holdings().of_connection(*caller), held);
                prop_assert!(held <= bounds.connection);
            }
            prop_assert_eq!(accounts.is_awaited(), !model.waiting.is_empty());
        }
        for (caller, amount) in std::mem::take(&mut model.held) {
            accounts.give_back(caller, amount);
        }
        for Request { caller, ticket, .. } in model.waiting {
            accounts.remove(caller, ticket);
        }
        prop_assert!(accounts.holdings().is_empty() && !accounts.is_awaited());
    }
}
