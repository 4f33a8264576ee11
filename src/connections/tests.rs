//! Tests for the admission and closing of connections.

use super::*;

fn address(host: u8, port: u16) -> SocketAddr {
    ([127, 0, 0, host], port).into()
}

/// Room for nine connections. A single peer may have eight.
fn nine() -> Connections {
    Connections::new(9 * CONNECTIONS_PER_DESCRIPTOR)
}

fn is_closing(admitted: &Admitted) -> bool {
    let waker = futures::task::noop_waker();
    admitted.state().poll_closing(&std::task::Context::from_waker(&waker)).is_ready()
}

#[tokio::test(start_paused = true)]
async fn one_peer_gets_nearly_all_places_and_then_that_of_its_own_oldest_idle_connection() {
    let connections = nine();
    let mut open = Vec::new();
    for port in 0..8 {
        open.push(connections.admit(address(1, port)).unwrap());
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    let busy = open[0].state().begin_call();
    let next = connections.admit(address(1, 9)).expect("the place of an idle one");
    assert_eq!(open.iter().map(is_closing).collect::<Vec<_>>(), [0, 1, 0, 0, 0, 0, 0, 0].map(|n| n == 1));
    let other = connections.admit(address(2, 1)).expect("another peer finds a place");
    assert!(!is_closing(&next) && !is_closing(&other));
    drop(busy);
}

#[tokio::test(start_paused = true)]
async fn where_all_are_busy_a_new_one_is_refused_until_one_has_gone() {
    let connections = nine();
    let mut open: Vec<_> = (0..8).map(|port| connections.admit(address(1, port)).unwrap()).collect();
    let calls: Vec<_> = open.iter().map(|admitted| admitted.state().begin_call()).collect();
    assert!(connections.admit(address(1, 9)).is_none());
    let measured = connections.measure();
    assert_eq!(measured.open, 8);
    let closed: Vec<_> = measured.closed.into_iter().filter(|(_, count)| *count > 0).collect();
    assert_eq!(closed, [("too_many_connections", 1)], "metrics have the refusal");
    drop(open.pop());
    assert!(connections.admit(address(1, 9)).is_some());
    drop(calls);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_keeps_others_waiting_is_closed_at_its_limit() {
    async fn closes_after(limit: Duration, prepare: impl Fn(&ConnectionState)) {
        let connections = Connections::default();
        let admitted = connections.admit(address(1, 1)).unwrap();
        prepare(admitted.state());
        tokio::time::advance(limit - Duration::from_millis(1)).await;
        connections.look();
        assert!(!is_closing(&admitted));
        tokio::time::advance(Duration::from_millis(2)).await;
        connections.look();
        assert!(is_closing(&admitted));
    }
    closes_after(FIRST_REQUEST_LIMIT, |_| {}).await;
    closes_after(HEAD_LIMIT, |state| state.note_head(true)).await;
    closes_after(UNREAD_LIMIT, |state| {
        state.note_head(false);
        state.note_blocked(true);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_that_has_asked_is_kept_and_so_is_one_that_reads() {
    let connections = Connections::default();
    let admitted = connections.admit(address(1, 1)).unwrap();
    drop(admitted.state().begin_call());
    admitted.state().note_blocked(true);
    admitted.state().note_blocked(false);
    tokio::time::advance(Duration::from_secs(100_000)).await;
    connections.look();
    assert!(!is_closing(&admitted));
}

#[tokio::test(start_paused = true)]
async fn answers_that_are_never_taken_close_their_connection_and_give_everything_back() {
    let connections = Connections::default();
    let admitted = connections.admit(address(1, 1)).unwrap();
    let state = admitted.state();
    drop(state.begin_call());
    let mut answers: Vec<_> = Vec::new();
    for _ in 0..2 {
        let room = state.reserve(answers::ANSWERS.connection / 2).await.unwrap();
        answers.push(state.charge(vec![0; 3].into(), room));
    }
    // The wait continues while the client takes some of them.
    let waits = state.reserve(answers::ANSWERS.connection / 2);
    let mut waits = std::pin::pin!(waits);
    assert!(tokio::time::timeout(answers::ROOM_WAIT / 2, waits.as_mut()).await.is_err());
    assert!(tokio::time::timeout(answers::ROOM_WAIT, waits.as_mut()).await.unwrap().is_err());
    tokio::time::advance(UNTAKEN_LIMIT).await;
    connections.look();
    assert!(is_closing(&admitted));
    drop(answers);
    assert_eq!(connections.0.answers.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_peer_gets_lines_and_resets_up_to_its_rates_over_all_its_connections() {
    const CANCELLED: End = End::Rpc("CANCELLED");
    let connections = Connections::default();
    let [one, other] = [1, 2].map(|host| Peer::from(address(host, 1)));
    assert!(connections.take_resets(one, PEER_RESETS.burst, 0) && !connections.take_resets(one, 1, 0));
    assert!(connections.take_resets(one, 1, 1) && connections.take_resets(other, 1, 0));
    let lines = (0..PEER_LINES.burst + 50).filter(|_| connections.takes_line(one, CANCELLED)).count();
    assert_eq!(lines as u64, PEER_LINES.burst);
    assert_eq!(connections.books().tally.get(&(one, Counted::Ended(CANCELLED))), Some(&50));
    tokio::time::advance(Duration::from_secs(60)).await;
    connections.look();
    let books = connections.books();
    assert!(books.tally.is_empty() && books.peers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn accepting_waits_while_many_connections_are_being_closed_but_not_for_long() {
    let connections = Connections::default();
    let port = |number: usize| u16::try_from(number).unwrap();
    let mut closing: Vec<_> =
        (0..closings::CLOSINGS_MAX).map(|n| connections.admit(address(1, port(n))).unwrap()).collect();
    connections.until_few_are_closing().await;
    for admitted in &closing {
        connections.close(admitted.state(), Reason::Idle);
        // Another reason does not count it twice.
        connections.close(admitted.state(), Reason::Noise);
    }
    let mut waits = Box::pin(connections.until_few_are_closing());
    assert!(futures::poll!(&mut waits).is_pending());
    drop(closing.pop());
    waits.await;
    let (last, start) = (connections.admit(address(1, 1)).unwrap(), Instant::now());
    connections.close(last.state(), Reason::Idle);
    connections.until_few_are_closing().await;
    assert_eq!(start.elapsed(), closings::CLOSINGS_WAIT, "accepting waits only for a while");
    drop((closing, last));
    assert_eq!(connections.0.closings.number(), 0);
}
