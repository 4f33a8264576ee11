//! [`Ahead`]: counts what a client has sent over an HTTP/2 connection and no handler has taken, and decides whether
//! more may be read.
//!
//! HTTP/2 lets every client send ahead as much as its window allows ([`CONNECTION_WINDOW_BYTES`]), and a granted window
//! cannot be revoked. So the limit is enforced by not reading the socket: unread bytes stay in the kernel and with the
//! client. Invariants:
//!
//! - A connection is read while it is ahead by at most [`ALWAYS_READ_BYTES`], or by at most its share of [`AHEAD`].
//!   So all connections together exceed that budget by at most [`ALWAYS_READ_BYTES`], one read and one unfinished frame
//!   each.
//! - A connection is read if all of its requests wait for their client, because then all earlier bytes have been taken.
//!   So it is unread only while a handler has bytes that it does not take. Bytes that were read in the current turn of
//!   the connection's task count in any case, because their requests may not have begun: the library reads on until it
//!   must wait, and hands new requests over then.
//! - An unread connection waits for the first of three events: its handlers take enough, all of its requests wait for
//!   the client, or the budget has room.
//! - This wait ends. Each handler takes its bytes or ends within its own time limit, and bytes that it has not taken
//!   are forgotten with its stream. At the latest, the connection itself ends: while it is unread, no PING is answered,
//!   so the keep-alive of HTTP/2 closes it.
//!
//! The count is an upper bound. If a stream ends early, the HTTP/2 library may discard its bytes without reporting
//! them. They are forgotten when all requests wait for the client, and when the open streams cannot have sent as much
//! as is counted ([`Ahead::at_most`]).

use super::{CONNECTION_WINDOW_BYTES, ConnectionState};
use crate::{
    budget::{Bounds, Budget, Refusal, Share},
    caller::Caller,
};
use futures::{
    future::{BoxFuture, FutureExt as _},
    task::AtomicWaker,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

/// Bytes that all connections may be ahead of their handlers. A single connection may use its whole window.
pub(crate) const AHEAD: Bounds = Bounds {
    what: "bytes sent ahead",
    total: 128 * 1024 * 1024,
    // A whole window of messages of 16 KiB counts about one and a half times, because of the small frames between them.
    connection: 2 * CONNECTION_WINDOW_BYTES as u64,
};
/// Bytes that every connection may be ahead, whatever the others hold: one frame of the default size of HTTP/2.
pub(crate) const ALWAYS_READ_BYTES: u64 = 16 * 1024;
/// The smallest cost of a frame, because even a small one keeps its read buffer allocated.
const FRAME_MIN_BYTES: u64 = 8 * 1024;
/// Room is taken in steps of this size.
const STEP_BYTES: u64 = 64 * 1024;

/// The cost of a frame with this many bytes.
pub(crate) fn cost(bytes: u64) -> u64 {
    if bytes == 0 { 0 } else { bytes.max(FRAME_MIN_BYTES) }
}

/// A connection's wait for room, owned by the task that reads the socket.
pub(crate) type Wait = BoxFuture<'static, Result<Share, Refusal>>;

/// The bytes that a connection is ahead; see the top of this file.
#[derive(Debug)]
pub struct Ahead {
    budget: Budget,
    caller: Caller,
    bytes: AtomicU64,
    /// The part of `bytes` that was read in this turn.
    fresh: AtomicU64,
    /// Copy of the amount of `share`.
    room: AtomicU64,
    share: Mutex<Option<Share>>,
    /// Number of open requests.
    requests: AtomicUsize,
    /// Number of open requests that wait for the client.
    waiting: AtomicUsize,
    /// The task that reads the socket, while it waits.
    reader: AtomicWaker,
}

impl Ahead {
    pub(super) fn new(budget: Budget, caller: Caller) -> Self {
        Self {
            budget,
            caller,
            bytes: AtomicU64::new(0),
            fresh: AtomicU64::new(0),
            room: AtomicU64::new(0),
            share: Mutex::default(),
            requests: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            reader: AtomicWaker::new(),
        }
    }

    /// Adds the cost of what was read from the socket.
    pub fn received(&self, cost: u64) {
        self.fresh.fetch_add(cost, SeqCst);
        self.bytes.fetch_add(cost, SeqCst);
    }

    /// Ends a turn of the task that reads the socket. Returns whether anything was read in it.
    pub fn end_turn(&self) -> bool {
        self.fresh.swap(0, SeqCst) > 0
    }

    /// Room for a buffer of the task that reads the socket, if there is any now.
    pub(crate) fn take_buffer(&self, bytes: u64) -> Option<Share> {
        self.budget.take_unless_awaited(self.caller, bytes)
    }

    /// Subtracts the cost of what a handler has taken.
    pub fn taken(&self, cost: u64) {
        self.lower(|bytes| bytes.saturating_sub(cost));
    }

    /// The cost of the bytes that the connection is ahead.
    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(SeqCst)
    }

    /// Corrects the count to at most this value.
    pub fn at_most(&self, most: u64) {
        self.lower(|bytes| bytes.min(most));
    }

    fn lower(&self, lower: impl Fn(u64) -> u64) {
        // This cannot fail, because the closure always returns a value.
        let _ = self.bytes.fetch_update(SeqCst, SeqCst, |bytes| Some(lower(bytes)));
        let (needed, room) = (self.needed(), self.room.load(SeqCst));
        if room > 0 && needed <= room / 2 {
            self.give_back();
        }
        self.reader.wake();
    }

    /// The amount of room that the connection needs.
    fn needed(&self) -> u64 {
        match self.bytes.load(SeqCst) {
            ..=ALWAYS_READ_BYTES => 0,
            bytes => bytes.next_multiple_of(STEP_BYTES),
        }
    }

    fn give_back(&self) {
        let mut share = self.share.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = self.needed();
        if let Some(share) = share.as_mut() {
            share.shrink_to(needed);
            self.room.store(share.amount(), SeqCst);
        }
    }

    fn keep(&self, more: Share) {
        let mut share = self.share.lock().unwrap_or_else(PoisonError::into_inner);
        let amount = more.amount();
        match share.as_mut() {
            Some(share) => share.merge(more),
            None => *share = Some(more),
        }
        self.room.fetch_add(amount, SeqCst);
    }

    fn may_read(&self) -> bool {
        self.bytes.load(SeqCst) <= self.room.load(SeqCst).max(ALWAYS_READ_BYTES)
    }

    /// Forgets the bytes of earlier turns if all requests wait for the client, because they have then been taken.
    fn forget_what_is_taken(&self) {
        let fresh = self.fresh.load(SeqCst);
        if self.bytes.load(SeqCst) > fresh && self.requests.load(SeqCst) == self.waiting.load(SeqCst) {
            self.at_most(fresh);
        }
    }

    /// Ready when the socket may be read. Only the task that reads it may ask.
    pub fn poll_room(&self, wait: &mut Option<Wait>, context: &mut Context<'_>) -> Poll<()> {
        let polled = self.poll_room_in_turn(wait, context);
        if polled.is_pending() && self.end_turn() {
            // Poll again: starting the new requests may have ended the wait.
            context.waker().wake_by_ref();
        }
        polled
    }

    fn poll_room_in_turn(&self, wait: &mut Option<Wait>, context: &mut Context<'_>) -> Poll<()> {
        self.forget_what_is_taken();
        while !self.may_read() {
            // The task is registered before the last check, so that every later change wakes it.
            self.reader.register(context.waker());
            self.forget_what_is_taken();
            if self.may_read() {
                break;
            }
            let pending = wait.get_or_insert_with(|| {
                let (budget, caller) = (self.budget.clone(), self.caller);
                async move { budget.wait_for(caller, STEP_BYTES).await }.boxed()
            });
            let room = std::task::ready!(pending.poll_unpin(context));
            *wait = None;
            // A step never exceeds the limit of a connection.
            let Ok(room) = room else { return Poll::Pending };
            self.keep(room);
            if self.needed() == 0 {
                // The handlers took everything while the connection waited.
                self.give_back();
            }
        }
        *wait = None;
        Poll::Ready(())
    }
}

/// The body of an open request. Tracks whether it waits for its client or has unread bytes.
#[derive(Debug)]
pub(crate) struct OpenBody {
    connection: Arc<ConnectionState>,
    /// The task that reads the body.
    task: AtomicWaker,
    is_waiting: AtomicBool,
    /// Whether bytes arrived since the last poll.
    is_woken: AtomicBool,
    is_closed: AtomicBool,
}

impl OpenBody {
    /// Creates a body that has not received any bytes.
    pub(crate) fn new(connection: Arc<ConnectionState>) -> Arc<Self> {
        connection.ahead.requests.fetch_add(1, SeqCst);
        Arc::new(Self {
            connection,
            task: AtomicWaker::new(),
            is_waiting: AtomicBool::new(false),
            is_woken: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
        })
    }

    /// Polls the body and records whether it waits for the client.
    pub(crate) fn poll<T>(
        self: &Arc<Self>,
        context: &Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.task.register(context.waker());
        self.is_woken.store(false, SeqCst);
        let waker = Waker::from(self.clone());
        let polled = poll(&mut Context::from_waker(&waker));
        self.set_waiting(polled.is_pending());
        if self.is_woken.load(SeqCst) {
            self.set_waiting(false);
        }
        polled
    }

    /// Subtracts what the handler has taken.
    pub(crate) fn taken(&self, bytes: u64) {
        self.connection.ahead.taken(cost(bytes));
    }

    /// The body is complete, or its reader is gone.
    pub(crate) fn close(&self) {
        if !self.is_closed.swap(true, SeqCst) {
            self.set_waiting(false);
            self.connection.ahead.requests.fetch_sub(1, SeqCst);
            self.connection.ahead.reader.wake();
        }
    }

    fn set_waiting(&self, is_waiting: bool) {
        let ahead = &self.connection.ahead;
        match (self.is_waiting.swap(is_waiting, SeqCst), is_waiting) {
            (false, true) => {
                ahead.waiting.fetch_add(1, SeqCst);
                ahead.reader.wake();
            }
            (true, false) => drop(ahead.waiting.fetch_sub(1, SeqCst)),
            _ => {}
        }
    }
}

impl Wake for OpenBody {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, SeqCst);
        self.set_waiting(false);
        self.task.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::Connections;
    use futures::task::{ArcWake, waker};

    /// A task that remembers whether it was woken.
    #[derive(Default)]
    struct Task(AtomicBool);

    impl ArcWake for Task {
        fn wake_by_ref(task: &Arc<Self>) {
            task.0.store(true, SeqCst);
        }
    }

    /// A connection and the task that reads it.
    struct Reader {
        ahead: Ahead,
        wait: Option<Wait>,
        task: Arc<Task>,
    }

    impl Reader {
        /// A connection with one request, whose handler has unread bytes.
        fn of(budget: &Budget, host: u8) -> Self {
            let caller = Caller::connected(([127, 0, 0, host], 1).into());
            let ahead = Ahead::new(budget.clone(), caller);
            ahead.requests.store(1, SeqCst);
            Self { ahead, wait: None, task: Arc::default() }
        }

        fn may_read(&mut self) -> bool {
            let waker = waker(self.task.clone());
            self.ahead.poll_room(&mut self.wait, &mut Context::from_waker(&waker)).is_ready()
        }

        /// Reads frames until it must wait.
        fn read_on(&mut self) {
            while self.may_read() {
                self.ahead.received(ALWAYS_READ_BYTES);
            }
            // The reader checks again in its next turn.
            assert!(self.was_woken() && !self.may_read());
        }

        fn was_woken(&self) -> bool {
            self.task.0.swap(false, SeqCst)
        }
    }

    #[test]
    fn connections_that_nobody_reads_stop_at_the_bound_and_every_other_one_gets_its_floor() {
        let budget = Budget::new(AHEAD);
        let mut hostile: Vec<_> = (0..50).map(|_| Reader::of(&budget, 1)).collect();
        hostile.iter_mut().for_each(Reader::read_on);
        let ahead: u64 = hostile.iter().map(|reader| reader.ahead.bytes.load(SeqCst)).sum();
        assert!(ahead <= AHEAD.total + 50 * 2 * ALWAYS_READ_BYTES, "{ahead}");
        let mut other = Reader::of(&budget, 2);
        other.read_on();
        assert!(other.ahead.bytes.load(SeqCst) > 1024 * 1024, "another peer has a share");
        let mut last = Reader::of(&budget, 1);
        for _ in 0..3 {
            last.read_on();
            assert_eq!(last.ahead.bytes.load(SeqCst), 2 * ALWAYS_READ_BYTES);
            last.ahead.taken(2 * ALWAYS_READ_BYTES);
            assert!(last.was_woken(), "its own handler lets it go on");
        }
        last.read_on();
        drop(hostile);
        assert!(last.was_woken() && last.may_read(), "so does room that others give back");
        for reader in [&mut last, &mut other] {
            reader.ahead.at_most(0);
            assert!(reader.may_read());
        }
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn a_connection_whose_requests_all_wait_for_the_client_is_read_whatever_is_counted() {
        let admitted = Connections::default().admit(([127, 0, 0, 1], 1).into()).unwrap();
        let ahead = &admitted.state().ahead;
        let _others = ahead.budget.take(Caller::connected(([127, 0, 0, 2], 1).into()), AHEAD.connection);
        let task: Arc<Task> = Arc::default();
        let reader = waker(task.clone());
        let mut wait = None;
        let mut poll_room = || ahead.poll_room(&mut wait, &mut Context::from_waker(&reader)).is_ready();
        let bodies = [(); 2].map(|()| OpenBody::new(admitted.state().clone()));
        let context = Context::from_waker(Waker::noop());
        let mut of_library = None;
        let _ = bodies[0].poll(&context, |context| {
            of_library = Some(context.waker().clone());
            Poll::<()>::Pending
        });
        ahead.received(2 * AHEAD.connection);
        assert!(!poll_room(), "the other one has bytes before it");
        let _ = bodies[1].poll(&context, |_| Poll::<()>::Pending);
        assert!(task.0.swap(false, SeqCst) && poll_room());
        // Later bytes count until their handler takes them.
        ahead.received(2 * AHEAD.connection);
        of_library.unwrap().wake();
        assert!(!poll_room());
        bodies[0].close();
        assert!(task.0.swap(false, SeqCst) && poll_room());
    }

    /// Otherwise a client could send its whole window ahead of requests that have not begun.
    #[test]
    fn what_is_read_before_its_request_begins_counts() {
        let admitted = Connections::default().admit(([127, 0, 0, 1], 1).into()).unwrap();
        let ahead = &admitted.state().ahead;
        let _others = ahead.budget.take(Caller::connected(([127, 0, 0, 2], 1).into()), AHEAD.connection);
        let task: Arc<Task> = Arc::default();
        let reader = waker(task.clone());
        let mut wait = None;
        let mut poll_room = || ahead.poll_room(&mut wait, &mut Context::from_waker(&reader)).is_ready();
        ahead.received(2 * AHEAD.connection);
        assert!(!poll_room(), "nobody has taken it");
        assert!(task.0.swap(false, SeqCst), "it looks again when the request has begun");
        let body = OpenBody::new(admitted.state().clone());
        assert!(!poll_room() && !task.0.swap(false, SeqCst));
        body.close();
        assert!(task.0.swap(false, SeqCst) && poll_room());
        // The bytes of a request that never begins are forgotten after its turn.
        ahead.received(2 * AHEAD.connection);
        assert!(!poll_room());
        assert!(task.0.swap(false, SeqCst) && poll_room());
    }

    #[test]
    fn what_handlers_take_is_given_back_in_time() {
        let budget = Budget::new(AHEAD);
        let mut reader = Reader::of(&budget, 1);
        reader.ahead.received(1024 * 1024);
        assert!(reader.may_read() && budget.held() == 1024 * 1024);
        reader.ahead.taken(512 * 1024);
        assert_eq!(budget.held(), 512 * 1024);
        reader.ahead.at_most(ALWAYS_READ_BYTES);
        assert!(budget.held() == 0 && reader.may_read());
    }
}
