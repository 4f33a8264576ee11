//! [`Connections`]: the open connections of both ports, and the decision which of them to close.
//!
//! A connection holds a descriptor and memory for as long as its client likes. So their number is limited, which leaves
//! descriptors for files and commands, and the limit is shared among peers as in every [`Budget`]. A client at its
//! limit replaces the connection that has been idle for longest: one of its own peer or, if the server is at its limit,
//! one of the peer with the most connections. If all of them are busy, the new connection is refused.
//!
//! Each way in which a client can hold resources without making progress has a time limit.
//!
//! This module also owns the counters that cover all connections of a peer: its cancelled calls, and the log lines
//! about them.

pub(crate) mod ahead;
pub(crate) mod answers;
mod closings;
mod handshake;
mod state;

pub(crate) use crate::rate;
pub(crate) use handshake::HandshakeProblem;
pub(crate) use state::{ConnectionState, OpenCall, Reason};

use crate::{
    access::certificate::ClientCertificate,
    budget::{Bound, Bounds, Budget},
    caller::{Caller, ConnectionId, Peer},
    logging::Event,
    telemetry::ConnectionReading,
};
use ahead::Ahead;
use closings::{Closings, ConnectionPlace};
use rate::{Bucket, Rate};
use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, interval};

/// Largest number of connections, if there are enough descriptors. An idle one takes about 20 KB.
pub(crate) const CONNECTIONS_MAX: u64 = 8_192;
/// Connections may use this fraction of the process's descriptors.
pub(crate) const CONNECTIONS_PER_DESCRIPTOR: u64 = 8;
/// Largest number of concurrent calls on all connections, if there are enough descriptors. Each call may hold a file
/// open.
pub(crate) const CALLS_MAX: u64 = 65_536;
/// Memory for request headers that are larger than usual: enough for thousands of calls with a long token. Headers
/// within the limit of the HTTP/2 library can take 200 KB.
pub(crate) const HEADS: Bounds =
    Bounds { what: "bytes of large headers", total: 128 * 1024 * 1024, connection: 48 * 1024 * 1024 };
/// Calls may use this fraction of the process's descriptors.
pub(crate) const CALLS_PER_DESCRIPTOR: u64 = 2;
/// Number of concurrent streams on one connection. A build tool keeps one open for every action that waits or runs.
pub(crate) const STREAMS_MAX: u32 = 20_000;
/// Flow-control window of a connection: the bytes that it may send ahead of all its handlers, while all connections
/// together are within their limit ([`ahead`]). Collected parts of unfinished messages are counted separately. The
/// HTTP/2 library derives from it how many small frames may wait: half of it in bytes, at 256 for each. A smaller or
/// adaptive window would close connections on which 170 small requests arrive at once.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
/// Time limit for the first request on a new connection. Clients that connect in advance simply reconnect.
pub(crate) const FIRST_REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for the headers of a request, from the first frame to the last.
pub(crate) const HEAD_LIMIT: Duration = Duration::from_secs(20);
/// How long a client may leave its socket unread while bytes are waiting for it.
pub(crate) const UNREAD_LIMIT: Duration = Duration::from_secs(60);
/// How long a client may consume no answer although it reads its socket.
pub(crate) const UNTAKEN_LIMIT: Duration = Duration::from_secs(5 * 60);
/// Rate of calls that one peer may cancel in addition to those that it lets finish. A failed build cancels thousands of
/// running actions at once.
pub(crate) const PEER_RESETS: Rate = Rate { burst: 10_000, per_second: 1_000 };
/// Rate of log lines about one peer's cancelled and refused calls. Further ones are only counted.
pub(crate) const PEER_LINES: Rate = Rate { burst: 200, per_second: 20 };
/// Interval between checks of all connections.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Most log lines about counted events in one check.
const TALLY_LINES_MAX: usize = 32;

/// Milliseconds since the `Connections` were created, plus one, so that the value is never 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    fn now_ms(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// The open connections; see the top of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connections(Arc<ConnectionsState>);

#[derive(Debug)]
struct ConnectionsState {
    clock: Clock,
    places: Budget,
    closings: Closings,
    calls: Budget,
    heads: Budget,
    answers: Budget,
    ahead: Budget,
    books: Mutex<ConnectionBooks>,
    /// How many connections were closed or refused since the start, by [`Reason::index`].
    closed: [AtomicU64; Reason::ALL.len()],
}

#[derive(Debug, Default)]
struct ConnectionBooks {
    open: HashMap<ConnectionId, Arc<ConnectionState>>,
    peers: HashMap<Peer, PeerRates>,
    tally: BTreeMap<(Peer, Counted), u64>,
}

#[derive(Debug)]
struct PeerRates {
    resets: Bucket,
    lines: Bucket,
}

/// Events that are logged as a count per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Counted {
    Closed(Reason),
    Handshake(HandshakeProblem),
    Ended(End),
}

/// The end of a call or request that may be counted instead of logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// An RPC that ended with this gRPC code.
    Rpc(&'static str),
    /// A request to the HTTP cache that ended with this status; `None` when the client left before the answer.
    Http(Option<u16>),
}

impl Default for Connections {
    fn default() -> Self {
        Self::new(u64::MAX)
    }
}

impl Connections {
    /// No connections yet, for a process that may open this many descriptors.
    pub fn new(descriptors: u64) -> Self {
        let total = CONNECTIONS_MAX.min(descriptors / CONNECTIONS_PER_DESCRIPTOR).max(1);
        let places = Bounds { what: "connections", total, connection: 1 };
        let total = CALLS_MAX.min(descriptors / CALLS_PER_DESCRIPTOR).max(1);
        let calls = Bounds { what: "concurrent calls", total, connection: STREAMS_MAX.into() };
        Self(Arc::new(ConnectionsState {
            clock: Clock(Instant::now()),
            places: Budget::new(places),
            closings: Closings::default(),
            calls: Budget::new(calls),
            heads: Budget::new(HEADS),
            answers: Budget::new(answers::ANSWERS),
            ahead: Budget::new(ahead::AHEAD),
            books: Mutex::default(),
            closed: Default::default(),
        }))
    }

    /// The budget of concurrent calls.
    pub fn calls(&self) -> &Budget {
        &self.0.calls
    }

    /// The budget of memory for large request headers.
    pub fn heads(&self) -> &Budget {
        &self.0.heads
    }

    /// The numbers of the connections, for metrics.
    pub(crate) fn measure(&self) -> ConnectionReading {
        let count = |reason: Reason| self.0.closed.get(reason.index()).map_or(0, |count| count.load(Relaxed));
        ConnectionReading {
            open: self.0.places.held(),
            calls: self.0.calls.held(),
            closed: Reason::ALL.map(|reason| (reason.name(), count(reason))).to_vec(),
        }
    }

    /// Waits while many connections are being closed, but not for long. Called before a connection is admitted.
    pub(crate) async fn until_few_are_closing(&self) {
        self.0.closings.few().await;
    }

    /// Registers a new connection; `None` when it must be refused.
    pub fn admit(&self, address: SocketAddr) -> Option<Admitted> {
        let caller = Caller::connected(address);
        let share = loop {
            let bound = match self.0.places.take(caller, 1) {
                Ok(share) => break share,
                Err(refusal) => refusal.bound(),
            };
            let victim = oldest_idle(&self.books().open, (bound != Bound::Server).then_some(caller.peer));
            let Some(victim) = victim else {
                self.count(caller.peer, Counted::Closed(Reason::TooMany), 1);
                return None;
            };
            self.close(&victim, Reason::Idle);
        };
        let (clock, answers) = (self.0.clock, self.0.answers.clone());
        let ahead = Ahead::new(self.0.ahead.clone(), caller);
        let place = ConnectionPlace::Open { _share: share, closings: self.0.closings.clone() };
        let state = Arc::new(ConnectionState::new(caller, address, clock, answers, ahead, place));
        self.books().open.insert(caller.connection, state.clone());
        Some(Admitted { connections: self.clone(), state })
    }

    /// Asks a connection to close.
    pub fn close(&self, state: &ConnectionState, reason: Reason) {
        self.books().open.remove(&state.caller.connection);
        if state.close(reason) {
            self.count(state.caller.peer, Counted::Closed(reason), 1);
        }
    }

    /// Counts a connection that ended before its handshake did.
    pub(crate) fn note_handshake(&self, peer: Peer, problem: HandshakeProblem) {
        self.count(peer, Counted::Handshake(problem), 1);
    }

    /// The open connections whose clients have presented certificates.
    pub(crate) fn certified(&self) -> Vec<(Arc<ConnectionState>, Arc<ClientCertificate>)> {
        let books = self.books();
        let certified =
            books.open.values().filter_map(|state| Some((state.clone(), state.certificate()?.clone())));
        certified.collect()
    }

    /// Charges a peer for cancelled calls, after crediting its finished calls. Returns false when it cancels too many.
    pub fn take_resets(&self, peer: Peer, resets: u64, finished: u64) -> bool {
        let now = self.0.clock.now_ms();
        let mut books = self.books();
        let rates = books.rates(peer, now);
        rates.resets.earn(finished);
        rates.resets.take(resets, now)
    }

    /// Whether a cancelled or refused call gets its own log line. Otherwise it is counted.
    pub fn takes_line(&self, peer: Peer, end: End) -> bool {
        let now = self.0.clock.now_ms();
        let takes = self.books().rates(peer, now).lines.take(1, now);
        if !takes {
            self.count(peer, Counted::Ended(end), 1);
        }
        takes
    }

    /// Every second, closes connections that exceed a time limit and logs the counted events. Runs as long as the
    /// server does.
    pub async fn sweep(self) {
        let inner = Arc::downgrade(&self.0);
        drop(self);
        let mut ticks = interval(SWEEP_INTERVAL);
        loop {
            ticks.tick().await;
            let Some(connections) = Weak::upgrade(&inner).map(Self) else { return };
            connections.look();
        }
    }

    fn look(&self) {
        let now = self.0.clock.now_ms();
        let overdue: Vec<_> = {
            let books = self.books();
            let overdue = books.open.values().filter_map(|state| Some((state.clone(), state.overdue(now)?)));
            overdue.collect()
        };
        for (state, reason) in overdue {
            self.close(&state, reason);
        }
        self.books().peers.retain(|_, rates| !(rates.resets.is_full(now) && rates.lines.is_full(now)));
        self.tell_counted();
    }

    /// Logs the events that were counted since the last call. [`Self::sweep`] calls it every second, and a shutdown
    /// once more.
    pub fn tell_counted(&self) {
        let tally = std::mem::take(&mut self.books().tally);
        tell(tally);
    }

    fn count(&self, peer: Peer, what: Counted, number: u64) {
        if let Counted::Closed(reason) = what
            && let Some(count) = self.0.closed.get(reason.index())
        {
            count.fetch_add(number, Relaxed);
        }
        *self.books().tally.entry((peer, what)).or_default() += number;
    }

    fn books(&self) -> MutexGuard<'_, ConnectionBooks> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionBooks {
    fn rates(&mut self, peer: Peer, now_ms: u64) -> &mut PeerRates {
        self.peers.entry(peer).or_insert_with(|| PeerRates {
            resets: Bucket::new(PEER_RESETS, now_ms),
            lines: Bucket::new(PEER_LINES, now_ms),
        })
    }
}

/// A registered connection. Dropping it removes the connection.
#[derive(Debug)]
pub struct Admitted {
    connections: Connections,
    state: Arc<ConnectionState>,
}

impl Admitted {
    /// The state of this connection.
    pub fn state(&self) -> &Arc<ConnectionState> {
        &self.state
    }

    /// The set that contains this connection.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.books().open.remove(&self.state.caller.connection);
        self.state.end();
    }
}

/// The connection that has been idle for longest, of this peer or else of the peer with the most connections.
fn oldest_idle(
    open: &HashMap<ConnectionId, Arc<ConnectionState>>,
    peer: Option<Peer>,
) -> Option<Arc<ConnectionState>> {
    let peer = peer.or_else(|| {
        let mut counts: HashMap<Peer, usize> = HashMap::new();
        for state in open.values() {
            *counts.entry(state.caller.peer).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, count)| *count).map(|(peer, _)| peer)
    })?;
    let idle = open.values().filter(|state| state.caller.peer == peer);
    let idle = idle.filter_map(|state| Some((state.idle_since_ms()?, state.caller.connection)));
    let (_, oldest) = idle.min()?;
    open.get(&oldest).cloned()
}

/// Logs one line for each peer and event, up to a limit, and the rest as one line for each event.
fn tell(tally: BTreeMap<(Peer, Counted), u64>) {
    let mut rest: BTreeMap<Counted, u64> = BTreeMap::new();
    for (at, ((peer, what), number)) in tally.into_iter().enumerate() {
        if at < TALLY_LINES_MAX {
            tell_one(&peer.to_string(), what, number);
        } else {
            *rest.entry(what).or_default() += number;
        }
    }
    for (what, number) in rest {
        tell_one("others", what, number);
    }
}

fn tell_one(peer: &str, what: Counted, number: u64) {
    match what {
        Counted::Closed(reason) => Event::info("gorego::rpc", "connections_closed")
            .with("peer", peer)
            .with("reason", reason.name())
            .with("connections", number)
            .log(format_args!("closed {number} connections of {peer}: {}", reason.name())),
        Counted::Handshake(problem) => Event::info("gorego::tls", "handshakes_failed")
            .with("peer", peer)
            .with("reason", problem.name())
            .with("connections", number)
            .log(format_args!("refused {number} connections of {peer}: {}", problem.explanation())),
        Counted::Ended(End::Rpc(code)) => Event::info("gorego::rpc", "rpcs_not_listed")
            .with("peer", peer)
            .with("grpc_code", code)
            .with("rpcs", number)
            .log(format_args!("{number} more RPCs of {peer} ended with {code}")),
        Counted::Ended(End::Http(Some(status))) => Event::info("gorego::http", "http_not_listed")
            .with("peer", peer)
            .with("http_status", status)
            .with("requests", number)
            .log(format_args!("{number} more HTTP requests of {peer} were answered with {status}")),
        Counted::Ended(End::Http(None)) => Event::info("gorego::http", "http_not_listed")
            .with("peer", peer)
            .with("requests", number)
            .log(format_args!("{number} more HTTP requests of {peer} were cancelled before their answer")),
    }
}

#[cfg(test)]
mod tests;
