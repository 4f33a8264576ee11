//! Tests of the guarantees of a budget: its limits, the order of waiting requests, and that nothing is lost.

use super::*;
use crate::caller::{ConnectionId, Peer};
use futures::FutureExt as _;
use proptest::prelude::*;
use std::net::Ipv4Addr;

const BOUNDS: Bounds = Bounds { what: "marbles", total: 900, connection: 500 };

pub(super) fn peer(number: u8) -> Peer {
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
fn work_that_no_connection_waits_for_counts_for_its_own_peer() {
    let budget = Budget::new(BOUNDS);
    let [one, other] = [1, 2].map(|number| Caller::without_connection(peer(number)));
    let _held = budget.take(one, 500).unwrap();
    assert_eq!(bound(budget.take(one, 1)), Bound::Connection);
    assert_eq!(budget.held_by(other), 0);
    let _other = budget.take(other, 300).unwrap();
}

/// A caller that asks for more than its share waits or is refused, and the next connection and the next peer are served
/// at once.
#[test]
fn a_connection_leaves_room_for_the_next_one_of_its_peer_and_a_peer_for_the_next_peer() {
    // The number of places, and how many of them a peer and a single connection may have.
    for (total, of_peer, of_connection) in [
        (1, 1, 1),
        (2, 1, 1),
        (3, 2, 1),
        (4, 3, 2),
        (8, 7, 6),
        (16, 14, 12),
        (64, 56, 49),
        (9_000, 8_000, 7_111),
    ] {
        let budget = Budget::new(Bounds::shared("places", total));
        let all_of = |caller| std::iter::from_fn(|| budget.take(caller, 1).ok()).collect::<Vec<_>>();
        let first = all_of(caller(1));
        assert_eq!(first.len(), of_connection, "of {total}");
        let second = all_of(caller(1));
        assert_eq!(second.is_empty(), of_peer == of_connection, "of {total}");
        let others: Vec<_> = (0..of_peer).map(|_| budget.take(caller(1), 1)).collect();
        assert_eq!(budget.held(), of_peer as u64, "of {total}: {others:?}");
        assert_eq!(budget.take(caller(2), 1).is_ok(), total > 1, "of {total}");
    }
}

/// This is also true if there are too few places to keep one free.
#[tokio::test]
async fn a_connection_that_holds_nothing_goes_before_those_of_its_peer_that_want_more() {
    for budget in [Budget::new(Bounds::shared("places", 4)), Budget::in_turns(Bounds::shared("places", 3))] {
        let [first, second, third] = [(); 3].map(|()| caller(1));
        let mut held: Vec<_> = [first, first, second].map(|caller| budget.take(caller, 1).unwrap()).into();
        let mut more: Vec<_> =
            [first, second, first, second].map(|caller| Box::pin(budget.wait_for(caller, 1))).into();
        let mut next = Box::pin(budget.wait_for(third, 1));
        assert!(more.iter_mut().chain([&mut next]).all(|wait| wait.as_mut().now_or_never().is_none()));
        drop(held.pop());
        // Both hold nothing now, and the second connection came first.
        held.extend(more[1].as_mut().now_or_never().expect("it has nothing").ok());
        drop(held.remove(0));
        let _held = next.as_mut().now_or_never().expect("before those that have something").unwrap();
        assert!([0, 2, 3].iter().all(|nth| more[*nth].as_mut().now_or_never().is_none()));
    }
}

#[tokio::test]
async fn where_work_is_short_a_peer_alone_has_everything_and_the_next_one_has_the_next_turn() {
    let budget = Budget::in_turns(Bounds { what: "marbles", total: 2, connection: 2 });
    let (greedy, modest) = (caller(1), caller(2));
    let mut held: Vec<_> = (0..2).map(|_| budget.take(greedy, 1).unwrap()).collect();
    assert_eq!(bound(budget.take(modest, 1)), Bound::Server);
    let mut more: Vec<_> = (0..2).map(|_| Box::pin(budget.wait_for(greedy, 1))).collect();
    assert!(more.iter_mut().all(|wait| wait.as_mut().now_or_never().is_none()));
    let mut turn = Box::pin(budget.wait_for(modest, 1));
    assert!(turn.as_mut().now_or_never().is_none());
    held.clear();
    assert!(turn.as_mut().now_or_never().is_some(), "not after all of the first one's requests");
    assert!(more[0].as_mut().now_or_never().is_some());
}

#[tokio::test]
async fn what_is_taken_ahead_of_need_is_not_taken_from_those_that_wait() {
    let budget = Budget::in_turns(Bounds { what: "marbles", total: 2, connection: 2 });
    let ahead = budget.take_unless_awaited(caller(1), 1).unwrap();
    let mut large = Box::pin(budget.wait_for(caller(2), 2));
    assert!(large.as_mut().now_or_never().is_none());
    assert!(budget.take_unless_awaited(caller(1), 1).is_none(), "there is one, but somebody waits");
    drop(ahead);
    assert!(large.as_mut().now_or_never().is_some());
}

#[test]
fn a_refusal_says_which_bound_was_met_and_when_to_try_again() {
    let refusal = Budget::new(BOUNDS).take(caller(1), 501).unwrap_err();
    let Error::Exhausted { message, retry_after } = Error::from(refusal) else { panic!("{refusal:?}") };
    assert!(message.contains("this connection has reached its limit of 500 marbles"), "{message}");
    assert!(retry_after.is_some());
}

proptest! {
    #[test]
    fn whatever_is_taken_and_dropped_the_bounds_hold_and_everything_comes_back(
        steps in proptest::collection::vec((0usize..6, 0u64..300, any::<bool>()), 0..200),
    ) {
        let budget = Budget::new(BOUNDS);
        // Two connections for each of three peers.
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
        prop_assert!(budget.accounts().holdings().is_empty());
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
    assert!(!budget.is_awaited() && budget.accounts().holdings().is_empty());
}
