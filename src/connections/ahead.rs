//! [`Ahead`]: what a client has sent over an HTTP/2 connection and no handler has taken yet, and whether more may be read.
//!
//! HTTP/2 lets the client of each connection send as much ahead as its window allows
//! ([`CONNECTION_WINDOW_BYTES`](crate::grpc::CONNECTION_WINDOW_BYTES)), and a window that was granted cannot be taken back. So this
//! bound is kept by not reading the socket: what was not read stays in the kernel and with the client. The invariants:
//!
//! - A connection is read while it is ahead by at most [`ALWAYS_READ_BYTES`], or by at most the room that it holds of [`AHEAD`].
//!   All connections together are therefore ahead by no more than that budget, and by [`ALWAYS_READ_BYTES`] and one read each.
//! - A connection that is not read waits for two things at once, and goes on with the first: its own handlers take enough of what was
//!   read, or the budget has room. It never waits for bytes that are still in its own socket unless one of its handlers does.
//! - That wait ends. What was read belongs to calls, and each handler takes it or ends within a time limit of its own; a call
//!   that ends gives back what it had not taken. At the latest the connection itself ends: while it is not read, no PING is
//!   answered, so the keep-alive of HTTP/2 closes it.
//!
//! The count errs on the high side. A stream that ends early may have sent bytes that the HTTP/2 library throws away without
//! telling; they are forgotten when the connection's open streams cannot have sent as much as is counted
//! ([`Ahead::at_most`]).

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
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

/// Bytes that all connections may be ahead of their handlers. One connection may use its whole window.
pub const AHEAD: Bounds = Bounds {
    what: "bytes that were sent ahead",
    total: 128 * 1024 * 1024,
    connection: crate::grpc::CONNECTION_WINDOW_BYTES as u64,
};
/// Bytes that every connection may be ahead, whatever the others hold: a frame of the usual size.
pub const ALWAYS_READ_BYTES: u64 = 16 * 1024;
/// What a frame counts at least: a small one keeps the buffer that it was read into.
const FRAME_MIN_BYTES: u64 = 8 * 1024;
/// Room is taken in such steps.
const STEP_BYTES: u64 = 64 * 1024;

/// What a frame of this many bytes counts.
pub fn cost(bytes: u64) -> u64 {
    if bytes == 0 { 0 } else { bytes.max(FRAME_MIN_BYTES) }
}

/// A connection's wait for room, owned by the task that reads its socket.
pub type Wait = BoxFuture<'static, Result<Share, Refusal>>;

/// See the top of this file.
#[derive(Debug)]
pub struct Ahead {
    budget: Budget,
    caller: Caller,
    bytes: AtomicU64,
    /// The amount of `share`.
    room: AtomicU64,
    share: Mutex<Option<Share>>,
    /// The task that reads the socket, while it waits.
    reader: AtomicWaker,
}

impl Ahead {
    pub(super) fn new(budget: Budget, caller: Caller) -> Self {
        Self {
            budget,
            caller,
            bytes: AtomicU64::new(0),
            room: AtomicU64::new(0),
            share: Mutex::default(),
            reader: AtomicWaker::new(),
        }
    }

    /// Counts what was read from the socket.
    pub fn received(&self, cost: u64) {
        self.bytes.fetch_add(cost, SeqCst);
    }

    /// Counts what a handler has taken or will not take.
    pub fn taken(&self, cost: u64) {
        self.lower(|bytes| bytes.saturating_sub(cost));
    }

    /// Corrects the count: it cannot be more than this.
    pub fn at_most(&self, most: u64) {
        self.lower(|bytes| bytes.min(most));
    }

    fn lower(&self, lower: impl Fn(u64) -> u64) {
        // It always succeeds, because there is always a new value.
        let _ = self.bytes.fetch_update(SeqCst, SeqCst, |bytes| Some(lower(bytes)));
        let (needed, room) = (self.needed(), self.room.load(SeqCst));
        if room > 0 && needed <= room / 2 {
            self.give_back();
        }
        self.reader.wake();
    }

    /// The room that the connection should hold.
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

    /// Ready when the socket may be read. Only the task that reads it may ask.
    pub fn poll_room(&self, wait: &mut Option<Wait>, context: &mut Context<'_>) -> Poll<()> {
        if !self.may_read() {
            self.reader.register(context.waker());
        }
        while !self.may_read() {
            let pending = wait.get_or_insert_with(|| {
                let (budget, caller) = (self.budget.clone(), self.caller);
                async move { budget.wait_for(caller, STEP_BYTES).await }.boxed()
            });
            let room = std::task::ready!(pending.poll_unpin(context));
            *wait = None;
            // A step is never more than a connection may hold.
            let Ok(room) = room else { return Poll::Pending };
            self.keep(room);
            if self.needed() == 0 {
                // Its handlers took what it had read while it waited.
                self.give_back();
            }
        }
        *wait = None;
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::task::{ArcWake, waker};
    use std::sync::{Arc, atomic::AtomicBool};

    /// A task that remembers that it was woken.
    #[derive(Default)]
    struct Task(AtomicBool);

    impl ArcWake for Task {
        fn wake_by_ref(task: &Arc<Self>) {
            task.0.store(true, SeqCst);
        }
    }

    /// A connection with the task that reads it.
    struct Reader {
        ahead: Ahead,
        wait: Option<Wait>,
        task: Arc<Task>,
    }

    impl Reader {
        fn of(budget: &Budget, host: u8) -> Self {
            let caller = Caller::connected(([127, 0, 0, host], 1).into());
            Self { ahead: Ahead::new(budget.clone(), caller), wait: None, task: Arc::default() }
        }

        fn may_read(&mut self) -> bool {
            let waker = waker(self.task.clone());
            self.ahead.poll_room(&mut self.wait, &mut Context::from_waker(&waker)).is_ready()
        }

        /// Reads frames until it has to wait.
        fn read_on(&mut self) {
            while self.may_read() {
                self.ahead.received(ALWAYS_READ_BYTES);
            }
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
        last.ahead.at_most(0);
        other.ahead.at_most(0);
        assert_eq!(budget.held(), 0);
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
