//! [`Flights`]: the running downloads, and which callers may join which. Pure. Times are arguments.
//!
//! Invariants: a flight ends at the latest deadline of its callers, and never later than the end that was fixed at its
//! start. A caller does not join a flight that began before the oldest content that it accepts (AST-08). It gets a new
//! flight, which later callers join. The number of flights and the bytes of their requests are bounded. Peers share
//! both bounds, and a flight counts for the peer that began it. A flight that waits for its turn waits in the queue of
//! every peer that has joined it, so that no peer waits behind the other downloads of the first peer.

use super::{
    outcome::FlightOutcome,
    request::{AssetKey, MAX_QUALIFIER_BYTES, MAX_QUALIFIERS, MAX_URI_BYTES, MAX_URIS},
};
use crate::{
    budget::{Bounds, Budget, Share},
    caller::Caller,
};
use gorego_reapi::error::Result;
use std::{collections::BTreeMap, time::SystemTime};
use tokio::{sync::watch, time::Instant};

/// Bound on the flights that are running or waiting for their turn. More are refused.
const FLIGHTS: Bounds = Bounds::shared("fetches that are running or waiting", 10_000);
/// Bound on the bytes of the requests of all flights. Most requests take a kilobyte, but a request may have megabytes
/// of qualifiers, and it outlives its call.
const FLIGHT_BYTES: Bounds = Bounds::shared("bytes of such requests", 64 * 1024 * 1024);
/// The largest request: its URIs and its qualifiers.
const LARGEST_REQUEST: u64 = (MAX_URIS * MAX_URI_BYTES + MAX_QUALIFIERS * 2 * MAX_QUALIFIER_BYTES) as u64;
/// Maximum number of connections for whose turn one flight waits. This many are hardly ever all blocked.
const MAX_QUEUES: usize = 64;
/// Maximum number of connections of one peer among them, so that one peer does not take the places of the others.
const MAX_QUEUES_OF_PEER: usize = 4;

/// Identifies a flight by its asset and an increasing number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlightId {
    key: AssetKey,
    number: u64,
}

/// The parameters of a flight at its start.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlightPlan {
    /// When it begins. The age of its content counts from here.
    pub asked_at: SystemTime,
    /// The deadline of its first caller.
    pub deadline: Instant,
    /// When it has to end, even if others join it.
    pub end: Instant,
    /// The size of its request in bytes.
    pub size: usize,
    /// The caller that begins it.
    pub caller: Caller,
}

/// A new flight, for the task that runs it.
#[derive(Debug)]
pub(super) struct Begun {
    /// The identity of the flight.
    pub id: FlightId,
    /// Its outcome, for the first caller.
    pub outcome: watch::Receiver<Option<FlightOutcome>>,
    /// When it has to end. Callers that join may extend this.
    pub latest: watch::Receiver<Instant>,
    /// The connections for whose turns the flight waits.
    pub callers: watch::Receiver<Vec<Caller>>,
}

#[derive(Debug)]
struct Flight {
    plan: FlightPlan,
    latest: watch::Sender<Instant>,
    callers: watch::Sender<Vec<Caller>>,
    /// Its shares of the bounds on flights and on bytes.
    _held: [Share; 2],
    outcome: watch::Sender<Option<FlightOutcome>>,
}

/// The downloads under way; see the module documentation.
#[derive(Debug)]
pub(super) struct Flights {
    /// The flights, in the order of assets, and for one asset the newest last.
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
    /// Joins the newest flight for an asset, if there is one and its content will be new enough. The flight is extended
    /// to `deadline`, but not beyond its end.
    pub(super) fn join(
        &self,
        key: AssetKey,
        oldest: Option<SystemTime>,
        deadline: Instant,
        caller: Caller,
    ) -> Option<watch::Receiver<Option<FlightOutcome>>> {
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
        // A flight that is already downloading waits in no queue.
        if !callers.is_closed() {
            callers.send_if_modified(|callers| {
                let of_peer = callers.iter().filter(|other| other.peer == caller.peer).count();
                let is_new =
                    !callers.contains(&caller) && of_peer < MAX_QUEUES_OF_PEER && callers.len() < MAX_QUEUES;
                callers.extend(is_new.then_some(caller));
                is_new
            });
        }
        Some(outcome.subscribe())
    }

    /// Begins a flight.
    ///
    /// # Errors
    /// `Exhausted` when there are too many flights, or too many of this caller.
    pub(super) fn begin(&mut self, key: AssetKey, plan: FlightPlan) -> Result<Begun> {
        let held = [self.places.take(plan.caller, 1)?, self.bytes.take(plan.caller, plan.size as u64)?];
        self.begun += 1;
        let id = FlightId { key, number: self.begun };
        let (outcome, landing) = watch::channel(None);
        let (latest, until) = watch::channel(plan.deadline.min(plan.end));
        let (callers, lines) = watch::channel(vec![plan.caller]);
        self.flights.insert(id, Flight { plan, latest, callers, _held: held, outcome });
        Ok(Begun { id, outcome: landing, latest: until, callers: lines })
    }

    /// Ends a flight and tells its callers the outcome.
    pub(super) fn end(&mut self, id: FlightId, outcome: FlightOutcome) {
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

    fn plan(asked_at: u64, size: usize) -> FlightPlan {
        let now = Instant::now();
        let (deadline, end) = (now + Duration::from_secs(1), now + Duration::from_secs(600));
        FlightPlan { asked_at: at(asked_at), deadline, end, size, caller: Caller::default() }
    }

    fn from(host: u8) -> Caller {
        Caller::connected(([127, 0, 0, host], 1).into())
    }

    #[test]
    fn callers_extend_a_flight_but_never_beyond_the_longest_duration() {
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
        let mut hurried = FlightPlan { deadline: plan.end + minute, ..plan };
        hurried.end = plan.deadline;
        let latest = flights.begin(AssetKey([2; 32]), hurried).unwrap().latest;
        assert_eq!(*latest.borrow(), hurried.end);
    }

    /// AST-08.
    #[test]
    fn a_caller_does_not_join_a_flight_that_began_before_the_oldest_content_accepted() {
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
    fn a_peer_that_fetches_all_it_may_leaves_flights_and_bytes_for_another() {
        let mut flights = Flights::default();
        let fill = |flights: &mut Flights, size| {
            let all = std::iter::from_fn(|| {
                flights.begin(KEY, FlightPlan { caller: from(1), ..plan(100, size) }).ok()
            });
            all.map(|begun| begun.id).collect::<Vec<_>>()
        };
        for size in [1, 100_000, LARGEST_REQUEST as usize] {
            let all = fill(&mut flights, size);
            assert!(all.len() > 5, "{}", all.len());
            let refusal = flights.begin(KEY, FlightPlan { caller: from(1), ..plan(100, size) });
            assert!(matches!(refusal, Err(Error::Exhausted { .. })));
            let other = FlightPlan { caller: from(2), ..plan(100, LARGEST_REQUEST as usize) };
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
        let begun = flights.begin(KEY, FlightPlan { caller: from(1), ..plan(100, 1) }).unwrap();
        let (second, third) = (from(2), from(3));
        for caller in [second, second, from(1), from(1), from(1), from(1), third] {
            flights.join(KEY, None, Instant::now(), caller).unwrap();
        }
        let peers: Vec<_> = begun.callers.borrow().iter().map(|caller| caller.peer).collect();
        assert_eq!(peers, [1, 2, 1, 1, 1, 3].map(|host| from(host).peer));
        for host in 4..=255 {
            flights.join(KEY, None, Instant::now(), from(host)).unwrap();
        }
        assert_eq!(begun.callers.borrow().len(), MAX_QUEUES);
    }
}
