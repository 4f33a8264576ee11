//! [`ConnectionState`]: the state of one connection, shared by its socket, its calls and the sweep.
//!
//! All fields are atomic, because every read, write and call of the connection updates them, and the sweep reads
//! thousands of them. Times are milliseconds of the [`Clock`] of [`super::Connections`]; 0 means "not now".

use super::{
    Ahead, Clock, FIRST_REQUEST_LIMIT, HEAD_LIMIT, UNREAD_LIMIT, UNTAKEN_LIMIT, closings::ConnectionPlace,
};
use crate::{
    access::{authenticator::RepeatedCredential, certificate::ClientCertificate},
    budget::Budget,
    caller::Caller,
};
use futures::task::AtomicWaker;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

/// The reason why this server closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// No complete request arrived within [`FIRST_REQUEST_LIMIT`].
    Silent = 1,
    /// The headers of a request took longer than [`HEAD_LIMIT`].
    SlowHead,
    /// The client did not read its socket for [`UNREAD_LIMIT`] while bytes were waiting.
    Unread,
    /// The client took none of its responses for [`UNTAKEN_LIMIT`].
    Untaken,
    /// The connection was idle, and another one needed its place.
    Idle,
    /// There was no place for the connection.
    TooMany,
    /// The client cancelled too many calls compared with those that it let finish.
    Resets,
    /// The client sent too many frames without payload or effect.
    Noise,
    /// The certificate of the client has expired or is no longer accepted.
    Certificate,
}

impl Reason {
    /// All reasons, in the order of their indices.
    pub(crate) const ALL: [Self; 9] = [
        Self::Silent,
        Self::SlowHead,
        Self::Unread,
        Self::Untaken,
        Self::Idle,
        Self::TooMany,
        Self::Resets,
        Self::Noise,
        Self::Certificate,
    ];

    /// The value in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silent => "no_request",
            Self::SlowHead => "slow_head",
            Self::Unread => "socket_not_read",
            Self::Untaken => "answers_not_taken",
            Self::Idle => "idle_at_the_limit",
            Self::TooMany => "too_many_connections",
            Self::Resets => "too_many_resets",
            Self::Noise => "too_many_empty_frames",
            Self::Certificate => "client_certificate_ended",
        }
    }

    /// The index of the reason in [`Reason::ALL`].
    pub(super) fn index(self) -> usize {
        usize::from(self as u8).saturating_sub(1)
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == number)
    }
}

/// The state of one connection; see the top of this file.
#[derive(Debug)]
pub struct ConnectionState {
    /// The peer and the id of the connection.
    pub caller: Caller,
    /// The address of the client, with its port.
    pub address: SocketAddr,
    pub(super) clock: Clock,
    pub(super) answers: Budget,
    /// The bytes that the client has sent and no handler has taken.
    pub ahead: Ahead,
    /// The certificate that the client has presented, if any.
    certificate: OnceLock<Arc<ClientCertificate>>,
    /// The credential that the client sent last.
    pub(crate) credential: RepeatedCredential,
    place: Mutex<ConnectionPlace>,
    accepted_ms: u64,
    has_asked: AtomicBool,
    calls: AtomicUsize,
    idle_since_ms: AtomicU64,
    head_since_ms: AtomicU64,
    blocked_since_ms: AtomicU64,
    /// Number of pieces of responses that were made and are not yet in the kernel.
    pub(super) pieces: AtomicUsize,
    /// When the client last took a part of a response.
    pub(super) progress_ms: AtomicU64,
    closing: AtomicU8,
    waker: AtomicWaker,
}

impl ConnectionState {
    pub(super) fn new(
        caller: Caller,
        address: SocketAddr,
        clock: Clock,
        answers: Budget,
        ahead: Ahead,
        place: ConnectionPlace,
    ) -> Self {
        let now = clock.now_ms();
        Self {
            caller,
            address,
            clock,
            answers,
            ahead,
            certificate: OnceLock::new(),
            credential: RepeatedCredential::default(),
            place: Mutex::new(place),
            accepted_ms: now,
            has_asked: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            idle_since_ms: AtomicU64::new(now),
            head_since_ms: AtomicU64::new(0),
            blocked_since_ms: AtomicU64::new(0),
            pieces: AtomicUsize::new(0),
            progress_ms: AtomicU64::new(now),
            closing: AtomicU8::new(0),
            waker: AtomicWaker::new(),
        }
    }

    /// The time of the shared clock.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// The verified certificate of the client; `None` without TLS, and if it has presented none.
    pub fn certificate(&self) -> Option<&Arc<ClientCertificate>> {
        self.certificate.get()
    }

    /// Records the certificate, at the end of the handshake.
    pub(crate) fn set_certificate(&self, certificate: Arc<ClientCertificate>) {
        let _ = self.certificate.set(certificate);
    }

    /// Counts a call or request until the guard is dropped. A connection without open calls is idle.
    pub fn begin_call(self: &Arc<Self>) -> OpenCall {
        self.has_asked.store(true, Relaxed);
        self.calls.fetch_add(1, Relaxed);
        OpenCall(self.clone())
    }

    /// The time since which no call is open; `None` if one is.
    pub fn idle_since_ms(&self) -> Option<u64> {
        (self.calls.load(Relaxed) == 0).then(|| self.idle_since_ms.load(Relaxed))
    }

    /// Records whether the headers of a request are incomplete.
    pub fn note_head(&self, is_open: bool) {
        if is_open {
            let _ = self.head_since_ms.compare_exchange(0, self.now_ms(), Relaxed, Relaxed);
        } else {
            self.head_since_ms.store(0, Relaxed);
            self.has_asked.store(true, Relaxed);
        }
    }

    /// Records whether the last write waits for the client to read.
    pub fn note_blocked(&self, is_blocked: bool) {
        if is_blocked {
            let _ = self.blocked_since_ms.compare_exchange(0, self.now_ms(), Relaxed, Relaxed);
        } else if self.blocked_since_ms.load(Relaxed) != 0 {
            self.blocked_since_ms.store(0, Relaxed);
        }
    }

    /// The time limit that this connection exceeds, if any.
    pub(super) fn overdue(&self, now_ms: u64) -> Option<Reason> {
        let over = |since_ms: u64, limit: Duration| {
            since_ms != 0 && u128::from(now_ms.saturating_sub(since_ms)) >= limit.as_millis()
        };
        if !self.has_asked.load(Relaxed) && over(self.accepted_ms, FIRST_REQUEST_LIMIT) {
            return Some(Reason::Silent);
        }
        if over(self.head_since_ms.load(Relaxed), HEAD_LIMIT) {
            return Some(Reason::SlowHead);
        }
        if over(self.blocked_since_ms.load(Relaxed), UNREAD_LIMIT) {
            return Some(Reason::Unread);
        }
        let is_owed = self.pieces.load(Relaxed) > 0;
        (is_owed && over(self.progress_ms.load(Relaxed), UNTAKEN_LIMIT)).then_some(Reason::Untaken)
    }

    /// Asks the connection to close and returns its place. False if it was asked before.
    pub fn close(&self, reason: Reason) -> bool {
        let is_first = self.closing.compare_exchange(0, reason as u8, SeqCst, SeqCst).is_ok();
        if is_first {
            self.place().give_up();
            self.waker.wake();
        }
        is_first
    }

    /// Records that the connection has ended.
    pub(super) fn end(&self) {
        *self.place() = ConnectionPlace::Closed;
    }

    fn place(&self) -> MutexGuard<'_, ConnectionPlace> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready when the connection must close. Only the connection's task may call it.
    pub fn poll_closing(&self, context: &Context<'_>) -> Poll<Reason> {
        self.waker.register(context.waker());
        Reason::from_number(self.closing.load(SeqCst)).map_or(Poll::Pending, Poll::Ready)
    }
}

/// An open call. Dropping it ends the call.
#[derive(Debug)]
pub struct OpenCall(Arc<ConnectionState>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.idle_since_ms.store(self.0.now_ms(), Relaxed);
        self.0.calls.fetch_sub(1, Relaxed);
    }
}
