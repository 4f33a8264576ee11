//! [`ImageFlights`]: work whose result several callers need. Callers that need the same result at the same time share
//! one flight.
//!
//! A flight runs on a separate thread and continues after its callers have left, because the next caller may need the
//! result. A [`Budget`] bounds the number of flights and shares them among peers: each caller waits for a place as its
//! peer, and the first one that gets a place starts the flight for all. A failure is returned to later callers for
//! [`FAILURE_CACHE_TIME`]. A success is forgotten when all waiting callers have it; before that, the work must store it
//! where later callers look first.

use crate::{
    budget::{Budget, Share},
    caller::Caller,
};
use gorego_reapi::error::{Error, Result};
use std::{
    collections::HashMap,
    hash::Hash,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// How long a failure is returned to later callers.
pub(super) const FAILURE_CACHE_TIME: Duration = Duration::from_secs(5);

/// The running flights by key. Cheap to clone.
#[derive(Debug)]
pub(super) struct ImageFlights<K, T>(Arc<FlightTable<K, T>>);

#[derive(Debug)]
struct FlightTable<K, T> {
    /// The name of the threads.
    thread: &'static str,
    places: Budget,
    flights: Mutex<HashMap<K, Arc<ImageFlight<T>>>>,
    /// Notified when a flight begins or ends.
    changed: Notify,
}

/// The end of a flight, once it has ended. The result is shared by the waiting callers and is dropped with the last of
/// them.
#[derive(Debug)]
struct ImageFlight<T>(OnceLock<(Instant, Result<T>)>);

impl<K, T> Clone for ImageFlights<K, T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, T> ImageFlights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Creates an empty collection. The budget bounds the number of concurrent flights.
    pub(super) fn new(thread: &'static str, places: Budget) -> Self {
        Self(Arc::new(FlightTable { thread, places, flights: Mutex::default(), changed: Notify::new() }))
    }

    /// Returns the first available result. `known` looks for the outcome of earlier work. Next comes a running or
    /// recently failed flight with the same key. Otherwise a new flight runs `work`. If a caller drops the future, the
    /// flight continues.
    ///
    /// # Errors
    /// The errors of the work; an error of the system if no thread can be started.
    pub(super) async fn join(
        &self,
        key: &K,
        caller: Caller,
        known: impl Fn() -> Option<T>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut place = pin!(self.0.places.wait_for(caller, 1));
        loop {
            // From here on, no change is missed.
            let changed = self.0.changed.notified();
            if let Some(known) = known() {
                return Ok(known);
            }
            if let Some(flight) = self.0.under_way(key) {
                return self.0.outcome_of(flight).await;
            }
            tokio::select! {
                share = &mut place => return self.0.outcome_of(self.start(key, share?, work)?).await,
                () = changed => {}
            }
        }
    }

    /// Starts a flight, unless another caller has just started it.
    fn start(
        &self,
        key: &K,
        share: Share,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<Arc<ImageFlight<T>>> {
        let mut flights = self.0.flights();
        if let Some(flight) = flights.get(key) {
            return Ok(flight.clone());
        }
        let flight = Arc::new(ImageFlight(OnceLock::new()));
        let (board, own, key_of_own) = (self.0.clone(), flight.clone(), key.clone());
        let run = move || {
            let outcome = catch_unwind(AssertUnwindSafe(work))
                .unwrap_or_else(|_| Err(Error::Internal(format!("the thread {} panicked", board.thread))));
            board.complete(&key_of_own, own, outcome);
            drop(share);
            board.changed.notify_waiters();
        };
        let spawned = thread::Builder::new().name(self.0.thread.into()).spawn(run);
        spawned.map_err(|error| Error::io(&format!("start the thread {}", self.0.thread), &error))?;
        flights.insert(key.clone(), flight.clone());
        drop(flights);
        self.0.changed.notify_waiters();
        Ok(flight)
    }
}

impl<K: Eq + Hash, T: Clone> FlightTable<K, T> {
    fn flights(&self) -> MutexGuard<'_, HashMap<K, Arc<ImageFlight<T>>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flight for a key, which is running or has failed recently.
    fn under_way(&self, key: &K) -> Option<Arc<ImageFlight<T>>> {
        let mut flights = self.flights();
        flights.retain(|_, flight| flight.0.get().is_none_or(|(at, _)| at.elapsed() < FAILURE_CACHE_TIME));
        flights.get(key).cloned()
    }

    /// Records the end of a flight. The waiting callers see it after the thread has dropped its reference to the
    /// result.
    fn complete(&self, key: &K, flight: Arc<ImageFlight<T>>, outcome: Result<T>) {
        let mut flights = self.flights();
        if outcome.is_ok() {
            flights.remove(key);
        }
        let _ = flight.0.set((Instant::now(), outcome));
        drop(flight);
    }

    /// Waits for the end of a flight.
    async fn outcome_of(&self, flight: Arc<ImageFlight<T>>) -> Result<T> {
        loop {
            let changed = self.changed.notified();
            let ended = {
                let _board = self.flights();
                flight.0.get().map(|(_, outcome)| outcome.clone())
            };
            match ended {
                Some(outcome) => return outcome,
                None => changed.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{budget::Bounds, caller::Peer};
    use std::sync::{
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    };
    use tokio::{task::yield_now, time::timeout};

    const SOON: Duration = Duration::from_secs(30);

    fn flights(places: u64) -> ImageFlights<u8, usize> {
        ImageFlights::new("test", Budget::new(Bounds::shared("places", places)))
    }

    fn nothing() -> Option<usize> {
        None
    }

    fn caller(number: u8) -> Caller {
        Caller::without_connection(Peer::V4([127, 0, 0, number].into()))
    }

    /// Work that counts its runs and ends when the sender is dropped.
    fn work(count: &Arc<AtomicUsize>) -> (mpsc::Sender<()>, impl FnOnce() -> Result<usize> + Send + 'static) {
        let (release, held) = mpsc::channel::<()>();
        let count = count.clone();
        (release, move || {
            let number = count.fetch_add(1, SeqCst);
            let _ = held.recv();
            Ok(number)
        })
    }

    #[tokio::test]
    async fn callers_with_one_key_share_a_flight_that_continues_when_the_first_caller_leaves() {
        let (flights, count) = (flights(4), Arc::new(AtomicUsize::new(0)));
        let (release, first_work) = work(&count);
        let first = tokio::spawn({
            let flights = flights.clone();
            async move { flights.join(&1, caller(1), nothing, first_work).await }
        });
        while count.load(SeqCst) == 0 {
            yield_now().await;
        }
        let others: Vec<_> = (0..8)
            .map(|number| {
                let (flights, work) = (flights.clone(), work(&count).1);
                tokio::spawn(async move { flights.join(&1, caller(number), nothing, work).await })
            })
            .collect();
        first.abort();
        yield_now().await;
        drop(release);
        for other in others {
            assert_eq!(
                timeout(SOON, other).await.unwrap().unwrap().unwrap(),
                0,
                "the first flight is theirs"
            );
        }
        assert_eq!(count.load(SeqCst), 1);
        let (release, work) = work(&count);
        drop(release);
        assert_eq!(flights.join(&1, caller(1), nothing, work).await.unwrap(), 1, "a success is not kept");
    }

    #[tokio::test]
    async fn a_failure_is_the_answer_for_a_moment_and_a_panic_is_a_failure() {
        let flights = flights(4);
        let failing = || Err(Error::Precondition("no such image".into()));
        let again = || -> Result<usize> { panic!("asked again") };
        for _ in 0..2 {
            let failed = flights.join(&1, caller(1), nothing, failing).await;
            assert!(matches!(failed, Err(Error::Precondition(_))), "{failed:?}");
        }
        assert!(matches!(flights.join(&1, caller(2), nothing, again).await, Err(Error::Precondition(_))));
        assert!(matches!(flights.join(&2, caller(2), nothing, again).await, Err(Error::Internal(_))));
    }

    #[tokio::test]
    async fn one_peer_does_not_take_all_places_and_the_first_pull_of_an_image_serves_all() {
        let (flights, count) = (flights(2), Arc::new(AtomicUsize::new(0)));
        let brought = Arc::new(AtomicUsize::new(0));
        let known = |brought: &Arc<AtomicUsize>| {
            let brought = brought.clone();
            move || Some(brought.load(SeqCst)).filter(|number| *number > 0)
        };
        let mut held = Vec::new();
        for key in 1..=3 {
            let (release, work) = work(&count);
            let (flights, known) = (flights.clone(), known(&brought));
            held.push((
                release,
                tokio::spawn(async move { flights.join(&key, caller(1), known, work).await }),
            ));
            while count.load(SeqCst) == 0 {
                yield_now().await;
            }
        }
        let bring = brought.clone();
        let work = move || {
            bring.store(7, SeqCst);
            Ok(7)
        };
        let other = flights.join(&3, caller(2), known(&brought), work);
        assert_eq!(timeout(SOON, other).await.expect("a place is left for it").unwrap(), 7);
        assert_eq!(count.load(SeqCst), 1, "the peer with many has one place of two");
        // The other peer's waiting callers no longer need a place.
        for (_, waiting) in held.drain(1..) {
            assert_eq!(timeout(SOON, waiting).await.unwrap().unwrap().unwrap(), 7);
        }
    }
}
