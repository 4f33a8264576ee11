//! [`Flights`]: the downloads under way, and who may join which. Pure: times are arguments.
//!
//! Invariants: a flight ends at the latest deadline of those who joined it, and never later than the end that it was given at
//! its start. Nobody joins one that began before the oldest content that they accept (AST-08); such a caller gets a flight of
//! its own, which those who come after it join. How many there are is bounded, and so are the bytes of their requests; peers
//! share both, and a flight counts for the one that began it. A flight that waits for its turn does so for every peer that has
//! joined it, so that nobody waits behind the other downloads of whoever was first.

use super::{
    flight::Outcome,
    request::{AssetKey, MAX_QUALIFIER_BYTES, MAX_QUALIFIERS, MAX_URI_BYTES, MAX_URIS},
};
use crate::{
    budget::{Bounds, Budget, Share},
    caller::Caller,
};
use gorego_reapi::error::Result;
use std::{collections::BTreeMap, time::SystemTime};
use tokio::{sync::watch, time::Instant};

/// Flights under way or waiting for their turn; more are refused.
const FLIGHTS: Bounds = Bounds::shared("fetches that are under way or waiting", 10_000);
/// Bytes of the requests of all these flights. Most are a kilobyte, but one may have megabytes of qualifiers, and outlives the
/// call that made it.
const FLIGHT_BYTES: Bounds = Bounds::shared("bytes of such requests", 64 * 1024 * 1024);
/// What one request may take: its URIs and its qualifiers.
const LARGEST_REQUEST: u64 = (MAX_URIS * MAX_URI_BYTES + MAX_QUALIFIERS * 2 * MAX_QUALIFIER_BYTES) as u64;
/// Connections for which one flight waits. Each has its turn, and so many of them are hardly ever all held up.
const MAX_LINES: usize = 64;
/// Connections of one peer among them, so that a peer does not take the lines of the others.
const MAX_LINES_OF_PEER: usize = 4;

/// One flight: what it brings, and a number that grows with every flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlightId {
    key: AssetKey,
    number: u64,
}

/// What is known of a flight at its start.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// When it begins: what it brings is as old as that.
    pub asked_at: SystemTime,
    /// How long its first caller wants it to go on.
    pub deadline: Instant,
    /// When it has to end, whoever else joins it.
    pub end: Instant,
    /// Bytes of its request.
    pub size: usize,
    /// Who begins it.
    pub caller: Caller,
}

/// A flight that has just begun, for who flies it.
#[derive(Debug)]
pub struct Begun {
    /// Which one.
    pub id: FlightId,
    /// For its first caller.
    pub outcome: watch::Receiver<Option<Outcome>>,
    /// When it has to end; callers who join may put that off.
    pub latest: watch::Receiver<Instant>,
    /// The connections that want it, as far as it waits for their turns.
    pub callers: watch::Receiver<Vec<Caller>>,
}

#[derive(Debug)]
struct Flight {
    plan: Plan,
    latest: watch::Sender<Instant>,
    callers: watch::Sender<Vec<Caller>>,
    /// A place, and the bytes of its request.
    _held: [Share; 2],
    outcome: watch::Sender<Option<Outcome>>,
}

/// The downloads under way; see the top of this file.
#[derive(Debug)]
pub struct Flights {
    /// Those of one asset beside each other, the newest last.
    flights: BTreeMap<FlightId, Flight>,
    begun: u64,
    places: Budget,
    bytes: Budget,
}

impl Default for Flights {
    fn default() -> Self {
        Self {
            flights: BTreeMap::new(),
            begun: 0,
            places: Budget::new(FLIGHTS),
            bytes: Budget::keeping_free(FLIGHT_BYTES, LARGEST_REQUEST),
        }
    }
}

impl Flights {
    /// A place in the newest flight that brings this, if there is one and its content is new enough. It goes on until
    /// `deadline` then, as far as its end allows.
    pub fn join(
        &self,
        key: AssetKey,
        oldest: Option<SystemTime>,
        deadline: Instant,
        caller: Caller,
    ) -> Option<watch::Receiver<Option<Outcome>>> {
        let all = FlightId { key, number: 0 }..=FlightId { key, number: u64::MAX };
        let (_, Flight { plan, latest, outcome, callers, .. }) = self.flights.range(all).next_back()?;
        if oldest.is_some_and(|oldest| plan.asked_at < oldest) {
            return None;
        }
        let deadline = deadline.min(plan.end);
        latest.send_if_modified(|latest| {
            let later = deadline > *latest;
            *latest = deadline.max(*latest);
            later
        });
        // Once it is in the air it waits for nobody's turn.
        if !callers.is_closed() {
            callers.send_if_modified(|callers| {
                let of_peer = callers.iter().filter(|other| other.peer == caller.peer).count();
                let is_new =
                    !callers.contains(&caller) && of_peer < MAX_LINES_OF_PEER && callers.len() < MAX_LINES;
                callers.extend(is_new.then_some(caller));
                is_new
            });
        }
        Some(outcome.subscribe())
    }

    /// Begins a flight.
    ///
    /// # Errors
    /// `Exhausted` when there are too many, or too many of this caller.
    pub fn begin(&mut self, key: AssetKey, plan: Plan) -> Result<Begun> {
        let held = [self.places.take(plan.caller, 1)?, self.bytes.take(plan.caller, plan.size as u64)?];
        self.begun += 1;
        let id = FlightId { key, number: self.begun };
        let (outcome, landing) = watch::channel(None);
        let (latest, until) = watch::channel(plan.deadline.min(plan.end));
        let (callers, lines) = watch::channel(vec![plan.caller]);
        self.flights.insert(id, Flight { plan, latest, callers, _held: held, outcome });
        Ok(Begun { id, outcome: landing, latest: until, callers: lines })
    }

    /// A flight has ended; tells all who joined it.
    pub fn end(&mut self, id: FlightId, outcome: Outcome) {
        if let Some(flight) = self.flights.remove(&id) {
            flight.outcome.send_replace(Some(outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::asset::outcome::{FailureKind, Problem};
    use gorego_reapi::error::Error;
    use std::time::Duration;

    const KEY: AssetKey = AssetKey([1; 32]);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn plan(asked_at: u64, size: usize) -> Plan {
        let now = Instant::now();
        let (deadline, end) = (now + Duration::from_secs(1), now + Duration::from_secs(600));
        Plan { asked_at: at(asked_at), deadline, end, size, caller: Caller::default() }
    }

    fn from(host: u8) -> Caller {
        Caller::connected(([127, 0, 0, host], 1).into())
    }

    #[test]
    fn callers_put_the_end_of_a_flight_off_but_never_beyond_the_longest_time_of_a_fetch() {
        let mut flights = Flights::default();
        let plan = plan(100, 0);
        let latest = flights.begin(KEY, plan).unwrap().latest;
        assert_eq!(*latest.borrow(), plan.deadline);
        let minute = Duration::from_secs(60);
        let mut expected = plan.deadline;
        for minutes in [5, 3, 9, 11, 60, 1_000] {
            let wanted = plan.deadline + minute * minutes;
            flights.join(KEY, None, wanted, from(1)).unwrap();
            expected = expected.max(wanted.min(plan.end));
            assert_eq!(*latest.borrow(), expected, "{minutes} minutes");
        }
        assert_eq!(expected, plan.end);
        let mut hurried = Plan { deadline: plan.end + minute, ..plan };
        hurried.end = plan.deadline;
        let latest = flights.begin(AssetKey([2; 32]), hurried).unwrap().latest;
        assert_eq!(*latest.borrow(), hurried.end);
    }

    /// AST-08.
    #[test]
    fn nobody_joins_a_flight_that_began_before_the_oldest_content_accepted() {
        let mut flights = Flights::default();
        let (first, deadline) = (flights.begin(KEY, plan(100, 0)).unwrap(), Instant::now());
        assert!(flights.join(KEY, Some(at(101)), deadline, from(1)).is_none());
        assert!(flights.join(KEY, Some(at(100)), deadline, from(1)).is_some());
        assert!(flights.join(AssetKey([2; 32]), None, deadline, from(1)).is_none());
        let second = flights.begin(KEY, plan(101, 0)).unwrap();
        let joined = flights.join(KEY, Some(at(101)), deadline, from(1)).unwrap();
        let failed = |text: &str| Err(Problem::origin(FailureKind::NotFound, text));
        flights.end(first.id, failed("first"));
        assert!(joined.borrow().is_none(), "it is the newer one that was joined");
        flights.end(second.id, failed("second"));
        assert_eq!(*first.outcome.borrow(), Some(failed("first")));
        assert_eq!(*joined.borrow(), Some(failed("second")));
        assert!(flights.join(KEY, None, deadline, from(1)).is_none());
    }

    #[test]
    fn a_connection_or_peer_that_fetches_all_that_it_may_leaves_flights_and_bytes_to_the_next() {
        let mut flights = Flights::default();
        let fill = |flights: &mut Flights, size| {
            let all =
                std::iter::from_fn(|| flights.begin(KEY, Plan { caller: from(1), ..plan(100, size) }).ok());
            all.map(|begun| begun.id).collect::<Vec<_>>()
        };
        for size in [1, 100_000, LARGEST_REQUEST as usize] {
            let all = fill(&mut flights, size);
            assert!(all.len() > 5, "{}", all.len());
            let refusal = flights.begin(KEY, Plan { caller: from(1), ..plan(100, size) });
            assert!(matches!(refusal, Err(Error::Exhausted { .. })));
            let other = Plan { caller: from(2), ..plan(100, LARGEST_REQUEST as usize) };
            let other =
                flights.begin(KEY, other).expect("there is room for the largest request of another peer");
            for id in all.into_iter().chain([other.id]) {
                flights.end(id, Err(Problem::origin(FailureKind::TimedOut, "")));
            }
            assert_eq!((flights.places.held(), flights.bytes.held()), (0, 0));
        }
    }

    #[test]
    fn a_flight_waits_for_a_few_connections_of_each_peer_that_wants_it() {
        let mut flights = Flights::default();
        let begun = flights.begin(KEY, Plan { caller: from(1), ..plan(100, 1) }).unwrap();
        let (second, third) = (from(2), from(3));
        for caller in [second, second, from(1), from(1), from(1), from(1), third] {
            flights.join(KEY, None, Instant::now(), caller).unwrap();
        }
        let peers: Vec<_> = begun.callers.borrow().iter().map(|caller| caller.peer).collect();
        assert_eq!(peers, [1, 2, 1, 1, 1, 3].map(|host| from(host).peer));
        for host in 4..=255 {
            flights.join(KEY, None, Instant::now(), from(host)).unwrap();
        }
        assert_eq!(begun.callers.borrow().len(), MAX_LINES);
    }
}
