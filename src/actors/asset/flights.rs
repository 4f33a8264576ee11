//! [`Flights`]: the downloads under way, and who may join which. Pure: times are arguments.
//!
//! Invariants: a flight ends at the latest deadline of those who joined it, and never later than the end that it was given at
//! its start. Nobody joins one that began before the oldest content that they accept (AST-08); such a caller gets a flight of
//! its own, which those who come after it join. How many there are is bounded, and so are the bytes of their requests.

use super::{flight::Outcome, request::AssetKey};
use gorego_reapi::error::{Error, Result};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};

/// Flights under way or waiting for their turn; more are refused.
const MAX_FLIGHTS: usize = 10_000;
/// Bytes of the requests of all these flights. Most are a kilobyte, but one may have megabytes of qualifiers, and outlives the
/// call that made it.
const MAX_FLIGHT_BYTES: usize = 64 * 1024 * 1024;
/// How long a client should wait before it tries a full house again.
const FULL_RETRY: Duration = Duration::from_secs(5);

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
}

#[derive(Debug)]
struct Flight {
    plan: Plan,
    latest: watch::Sender<Instant>,
    outcome: watch::Sender<Option<Outcome>>,
}

/// The downloads under way; see the top of this file.
#[derive(Debug, Default)]
pub struct Flights {
    /// Those of one asset beside each other, the newest last.
    flights: BTreeMap<FlightId, Flight>,
    begun: u64,
    /// Bytes of the requests of all flights.
    bytes: usize,
}

impl Flights {
    /// A place in the newest flight that brings this, if there is one and its content is new enough. It goes on until
    /// `deadline` then, as far as its end allows.
    pub fn join(
        &self,
        key: AssetKey,
        oldest: Option<SystemTime>,
        deadline: Instant,
    ) -> Option<watch::Receiver<Option<Outcome>>> {
        let all = FlightId { key, number: 0 }..=FlightId { key, number: u64::MAX };
        let (_, Flight { plan, latest, outcome }) = self.flights.range(all).next_back()?;
        if oldest.is_some_and(|oldest| plan.asked_at < oldest) {
            return None;
        }
        let deadline = deadline.min(plan.end);
        latest.send_if_modified(|latest| {
            let later = deadline > *latest;
            *latest = deadline.max(*latest);
            later
        });
        Some(outcome.subscribe())
    }

    /// Begins a flight.
    ///
    /// # Errors
    /// `Exhausted` when there are too many.
    pub fn begin(&mut self, key: AssetKey, plan: Plan) -> Result<Begun> {
        let bytes = self.bytes.saturating_add(plan.size);
        if self.flights.len() >= MAX_FLIGHTS || bytes > MAX_FLIGHT_BYTES {
            return Err(Error::Exhausted {
                message: format!("{} fetches are under way or waiting; try again", self.flights.len()),
                retry_after: Some(FULL_RETRY),
            });
        }
        self.begun += 1;
        let id = FlightId { key, number: self.begun };
        let (outcome, landing) = watch::channel(None);
        let (latest, until) = watch::channel(plan.deadline.min(plan.end));
        self.bytes = bytes;
        self.flights.insert(id, Flight { plan, latest, outcome });
        Ok(Begun { id, outcome: landing, latest: until })
    }

    /// A flight has ended; tells all who joined it.
    pub fn end(&mut self, id: FlightId, outcome: Outcome) {
        if let Some(flight) = self.flights.remove(&id) {
            self.bytes = self.bytes.saturating_sub(flight.plan.size);
            flight.outcome.send_replace(Some(outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::asset::outcome::{FailureKind, Problem};

    const KEY: AssetKey = AssetKey([1; 32]);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn plan(asked_at: u64, size: usize) -> Plan {
        let now = Instant::now();
        let (deadline, end) = (now + Duration::from_secs(1), now + Duration::from_secs(600));
        Plan { asked_at: at(asked_at), deadline, end, size }
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
            flights.join(KEY, None, wanted).unwrap();
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
        assert!(flights.join(KEY, Some(at(101)), deadline).is_none());
        assert!(flights.join(KEY, Some(at(100)), deadline).is_some());
        assert!(flights.join(AssetKey([2; 32]), None, deadline).is_none());
        let second = flights.begin(KEY, plan(101, 0)).unwrap();
        let joined = flights.join(KEY, Some(at(101)), deadline).unwrap();
        let failed = |text: &str| Err(Problem::origin(FailureKind::NotFound, text));
        flights.end(first.id, failed("first"));
        assert!(joined.borrow().is_none(), "it is the newer one that was joined");
        flights.end(second.id, failed("second"));
        assert_eq!(*first.outcome.borrow(), Some(failed("first")));
        assert_eq!(*joined.borrow(), Some(failed("second")));
        assert!(flights.join(KEY, None, deadline).is_none());
    }

    #[test]
    fn requests_in_flight_are_bounded_in_number_and_bytes_and_give_back_what_they_took() {
        let mut flights = Flights::default();
        let large = flights.begin(KEY, plan(100, MAX_FLIGHT_BYTES)).unwrap();
        assert!(matches!(flights.begin(KEY, plan(100, 1)), Err(Error::Exhausted { .. })));
        flights.end(large.id, Err(Problem::origin(FailureKind::TimedOut, "")));
        for _ in 0..MAX_FLIGHTS {
            flights.begin(KEY, plan(100, 1)).unwrap();
        }
        assert!(matches!(flights.begin(KEY, plan(100, 1)), Err(Error::Exhausted { .. })));
    }
}
