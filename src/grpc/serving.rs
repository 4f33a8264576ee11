//! Serves connections. Requests that arrive together are answered together, by the task of their connection.
//!
//! hyper gives each request to an executor, which usually spawns a task. A spawned task wakes another thread, and its
//! answer wakes the task of the connection; for a look-up in memory, this costs more than the look-up. So this executor
//! only collects the requests of one poll of the connection ([`Collected`]). The connection's task then polls each of
//! them once. This answers most look-ups, and all small answers are sent with one write ([`Turn`]). A request that has
//! to wait is spawned as a task.
//!
//! Invariants:
//!
//! - The connection's task polls no request twice, and begins none after [`TURN_MAX`]. The rest of that turn is
//!   spawned, so that other threads can take it. At most [`SPREAD_MAX`] such requests of the whole server may be
//!   waiting at a time, because the tasks of other connections are behind them in the runtime's queue. Requests beyond
//!   that wait for the connection's next turn, and nothing more is read before it.
//! - The connection's task yields after [`TURN_MAX`].
//! - Messages that take long to decode are not decoded in a turn, because [`super::intake`] makes them wait once.
//! - A panic in a request ends only that request.
//! - Collected requests are begun even if the connection has ended, and dropped if its task has.

use super::{
    FRAME_MAX_BYTES, HEADERS_MAX_BYTES, PENDING_RESETS_MAX, PING_INTERVAL, PING_TIMEOUT, STREAM_WINDOW_BYTES,
    accept::Arrived,
    connection::Connection,
    turn::{OpenRequest, Turn},
};
use crate::{
    call::ConnectionInfo,
    connections::{CONNECTION_WINDOW_BYTES, STREAMS_MAX},
};
use bytes::Bytes;
use futures::stream::{Stream, StreamExt as _};
use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    collections::VecDeque,
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};
use tokio::{
    select,
    sync::{Semaphore, watch},
    task::coop::unconstrained,
};
use tonic::{Status, transport::server::Connected as _};
use tower::Service;

/// Time limit for the requests of one turn: about ten of the slowest look-ups. It bounds how long answers of this
/// connection are delayed.
const TURN_MAX: Duration = Duration::from_micros(500);
/// Limit on spawned requests that have not begun: enough to keep dozens of threads busy until the next turn.
const SPREAD_MAX: usize = 64;

/// Serves connections until `shutdown` completes. Then it accepts no more, sends GOAWAY, and returns when the last
/// connection is closed.
pub(super) async fn serve<S, B>(
    connections: impl Stream<Item = io::Result<Arrived>>,
    service: impl Fn(ConnectionInfo) -> S + Clone + Send + 'static,
    shutdown: impl Future<Output = ()>,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send + 'static>,
    S: Clone + Send + 'static,
    B: Body<Data = Bytes, Error = Status> + Default + Send + 'static,
{
    let closing = watch::Sender::new(false);
    let spread = Arc::new(Semaphore::new(SPREAD_MAX));
    {
        // The listener is dropped here, so that the port is free before the last connections end.
        let mut connections = pin!(connections);
        let mut shutdown = pin!(shutdown);
        loop {
            select! {
                () = &mut shutdown => break,
                connection = connections.next() => match connection {
                    Some(Ok(arrived)) => {
                        let (spread, service) = (spread.clone(), service.clone());
                        let mut closing = closing.subscribe();
                        tokio::spawn(async move {
                            let established = select! {
                                established = arrived.establish() => established,
                                _ = closing.wait_for(|closing| *closing) => None,
                            };
                            let Some(connection) = established else { return };
                            let requests = Collected::new(connection.turn(), spread);
                            let service = service(connection.connect_info());
                            serve_one(connection, requests, service, closing).await;
                        });
                    }
                    // The error was logged where connections are accepted.
                    Some(Err(_)) => {}
                    None => break,
                },
            }
        }
    }
    closing.send_replace(true);
    closing.closed().await;
}

async fn serve_one<S, B>(
    connection: Connection,
    requests: Collected,
    service: S,
    mut closing: watch::Receiver<bool>,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible, Future: Send + 'static>,
    S: Clone + Send + 'static,
    B: Body<Data = Bytes, Error = Status> + Default + Send + 'static,
{
    let turn = connection.turn();
    // All services are always ready.
    let service = service_fn(move |request: Request<Incoming>| service.clone().call(request));
    // Dropped after the connection, which may hand over requests until its end.
    let _guard = StopCollecting(requests.clone());
    let mut http = pin!(settings(requests.clone()).serve_connection(TokioIo::new(connection), service));
    let mut closing = pin!(async { drop(closing.wait_for(|closing| *closing).await) });
    let mut is_told = false;
    poll_fn(|context| {
        if !is_told && closing.as_mut().poll(context).is_ready() {
            is_told = true;
            http.as_mut().graceful_shutdown();
        }
        let start = Instant::now();
        let mut is_corked = true;
        loop {
            turn.begin(is_corked, !requests.is_waiting());
            // Errors are in the log lines of the calls, if there were any.
            let is_over = http.as_mut().poll(context).is_ready();
            let has_more = requests.begin() || turn.is_used_up();
            if is_over {
                return Poll::Ready(());
            }
            let is_late = start.elapsed() >= TURN_MAX;
            if !is_corked && (!has_more || is_late) {
                if has_more {
                    context.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            // The last poll writes the answers.
            is_corked = has_more && !is_late;
        }
    })
    .await;
}

fn settings(requests: Collected) -> http2::Builder<Collected> {
    let mut builder = http2::Builder::new(requests);
    builder
        .timer(TokioTimer::new())
        // No client of gRPC reads it.
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        // The library counts these resets as long as the connection lasts. Instead, `flood_guard` limits the rate of
        // cancelled streams, and `connection` limits the resets that wait to be written.
        .max_local_error_reset_streams(None)
        .max_frame_size(FRAME_MAX_BYTES)
        .max_header_list_size(HEADERS_MAX_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

type ServedRequest = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The requests of one turn of a connection's task.
#[derive(Clone)]
struct Collected {
    turn: Turn,
    /// Places for spawned requests that have not begun.
    spread: Arc<Semaphore>,
    /// `None` when the connection has ended. Each request holds a clone of this, so requests must not stay in here.
    requests: Arc<Mutex<Option<VecDeque<ServedRequest>>>>,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Collected {
    fn execute(&self, request: F) {
        let request = CountedRequest { request, _open: self.turn.request() };
        match self.lock().as_mut() {
            Some(requests) => requests.push_back(Box::pin(request)),
            None => drop(tokio::spawn(request)),
        }
    }
}

impl Collected {
    fn new(turn: Turn, spread: Arc<Semaphore>) -> Self {
        Self { turn, spread, requests: Arc::new(Mutex::new(Some(VecDeque::new()))) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<ServedRequest>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<ServedRequest> {
        self.lock().as_mut()?.pop_front()
    }

    /// Whether requests were left for the next turn.
    fn is_waiting(&self) -> bool {
        self.lock().as_ref().is_some_and(|requests| !requests.is_empty())
    }

    /// Begins the collected requests, within the limits of a turn. Returns whether there were any.
    fn begin(&self) -> bool {
        let (start, mut has_any) = (Instant::now(), false);
        while let Some(mut request) = self.next() {
            has_any = true;
            if start.elapsed() < TURN_MAX {
                let poll = || {
                    // A spawned task is polled again, so no wake-up is lost.
                    let mut nobody = Context::from_waker(Waker::noop());
                    pin!(unconstrained(request.as_mut())).poll(&mut nobody)
                };
                // A panic ends only this request, as in a spawned task.
                if matches!(catch_unwind(AssertUnwindSafe(poll)), Ok(Poll::Pending)) {
                    tokio::spawn(request);
                }
            } else if let Ok(place) = self.spread.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    drop(place);
                    request.await;
                });
            } else {
                if let Some(requests) = self.lock().as_mut() {
                    requests.push_front(request);
                }
                break;
            }
        }
        has_any
    }
}

pin_project_lite::pin_project! {
    /// A request that counts as open. Not an async block, which would hold the request twice.
    struct CountedRequest<F> {
        #[pin]
        request: F,
        _open: OpenRequest,
    }
}

impl<F: Future<Output = ()>> Future for CountedRequest<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.project().request.poll(context)
    }
}

/// Drops the requests that have not begun when the task of their connection ends.
struct StopCollecting(Collected);

impl Drop for StopCollecting {
    fn drop(&mut self) {
        let requests = self.0.lock().take();
        drop(requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use tokio::sync::oneshot;

    fn collected() -> Collected {
        Collected::new(Turn::default(), Arc::new(Semaphore::new(1)))
    }

    #[tokio::test]
    async fn a_request_that_does_not_wait_is_answered_in_its_turn_and_others_are_answered_later() {
        let turn = collected();
        let answered = Arc::new(AtomicUsize::new(0));
        let (release, released) = oneshot::channel::<()>();
        let count = |answered: &Arc<AtomicUsize>| {
            let answered = answered.clone();
            move || {
                answered.fetch_add(1, SeqCst);
            }
        };
        let (at_once, later) = (count(&answered), count(&answered));
        let (done, is_done) = oneshot::channel();
        turn.execute(async move { at_once() });
        turn.execute(async move {
            let _ = released.await;
            later();
            let _ = done.send(());
        });
        assert!(turn.begin() && !turn.begin());
        assert_eq!(answered.load(SeqCst), 1);
        release.send(()).unwrap();
        is_done.await.unwrap();
        assert_eq!(answered.load(SeqCst), 2);
    }

    #[tokio::test]
    async fn a_panic_in_a_turn_ends_no_other_request() {
        let turn = collected();
        let (done, is_done) = oneshot::channel();
        turn.execute(async { panic!("a fault in a request") });
        turn.execute(async move { done.send(()).unwrap() });
        assert!(turn.begin());
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn requests_that_nobody_began_end_with_their_connection_and_later_ones_become_tasks() {
        let turn = Turn::default();
        let requests = Collected::new(turn.clone(), Arc::new(Semaphore::new(1)));
        let guard = StopCollecting(requests.clone());
        // As in the HTTP/2 library, a request holds a clone of the executor that it was handed to.
        let of_request = requests.clone();
        requests.execute(async move { drop(of_request) });
        assert_eq!(turn.requests(), 1);
        drop(guard);
        assert_eq!((turn.requests(), Arc::strong_count(&requests.requests)), (0, 1));
        let (done, is_done) = oneshot::channel();
        requests.execute(async move { done.send(()).unwrap() });
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn a_long_turn_leaves_some_of_the_rest_to_others_and_the_rest_of_it_to_the_next_turn() {
        let turn = collected();
        let (done, is_done) = oneshot::channel();
        // This request uses up the time of the turn.
        turn.execute(async { std::thread::sleep(TURN_MAX) });
        let here = std::thread::current().id();
        let polls = Arc::new(AtomicUsize::new(0));
        let counted = polls.clone();
        turn.execute(async move {
            counted.fetch_add(1, SeqCst);
            let _ = done.send(std::thread::current().id() == here);
        });
        let (last, last_is_done) = oneshot::channel();
        turn.execute(async move { last.send(()).unwrap() });
        assert!(turn.begin());
        assert_eq!(polls.load(SeqCst), 0);
        assert!(turn.is_waiting(), "one is handed to another thread, and there is no place for the next");
        is_done.await.unwrap();
        assert!(turn.begin() && !turn.is_waiting());
        last_is_done.await.unwrap();
    }
}
