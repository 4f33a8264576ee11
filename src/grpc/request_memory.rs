//! [`RequestMemory`]: the memory that a call holds for its request, from the arrival of its last byte until its handler
//! is done.
//!
//! The memory of a decoded message is known only when the whole message has arrived, and computing it takes time. So
//! before [`super::intake`] hands on a large message, it reserves the most that the message could take. Few messages
//! can hold that much at a time; others wait in turn. [`super::codec`] measures and decodes the message and gives back
//! what is not needed. The rest is held until the call is answered, or until the handler of a stream requests the next
//! message. This work does not block the threads that serve other requests ([`slow_work`]).

pub(crate) use crate::slow_work;

use crate::{budget::Share, memory};
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

tokio::task_local! {
    static CURRENT: Arc<RequestMemory>;
}

/// The memory that a call holds for its request.
#[derive(Debug, Default)]
pub(crate) struct RequestMemory {
    share: Mutex<Option<Share>>,
    /// Whether the next poll decodes a large message, which may take long.
    is_laborious: AtomicBool,
    /// Whether the handler takes messages in parts as they arrive, so that unfinished messages are not kept.
    passes_on: AtomicBool,
}

impl RequestMemory {
    /// The memory of the call whose handler is running.
    pub(crate) fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// Sets whether the handler takes messages in parts as they arrive.
    pub(crate) fn pass_on(&self, passes_on: bool) {
        self.passes_on.store(passes_on, Ordering::Relaxed);
    }

    /// Whether the handler takes messages in parts as they arrive.
    pub(crate) fn passes_on(&self) -> bool {
        self.passes_on.load(Ordering::Relaxed)
    }

    /// Replaces the share of the previous message with the share of the next one.
    pub(crate) fn hold(&self, share: Share, is_laborious: bool) {
        *self.share() = Some(share);
        self.is_laborious.store(is_laborious, Ordering::Relaxed);
    }

    /// Whether this task decodes a request, not a response from another server.
    pub(crate) fn is_present() -> bool {
        CURRENT.try_with(|_| ()).is_ok()
    }

    /// Gives back everything above `memory` bytes. Handlers also use it before they wait for their client, because they
    /// often keep only a small part of a request.
    pub(crate) fn settle(memory: u64) {
        let _ = CURRENT.try_with(|held| {
            if let Some(share) = held.share().as_mut() {
                share.shrink_to(memory);
            }
        });
    }

    /// Gives everything back, after the handler of a stream has taken the message.
    pub(crate) fn let_go(&self) {
        drop(self.share().take());
    }

    fn share(&self) -> std::sync::MutexGuard<'_, Option<Share>> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RequestMemory {
    fn drop(&mut self) {
        memory::freed(self.share().as_ref().map_or(0, Share::amount));
    }
}

pin_project_lite::pin_project! {
    /// The future of a call with its memory, which ends when the call is answered.
    #[derive(Debug)]
    pub struct HoldsMemory<F> {
        #[pin]
        call: F,
        held: Arc<RequestMemory>,
    }
}

impl<F> HoldsMemory<F> {
    /// Runs a call that holds this memory.
    pub(crate) fn new(call: F, held: Arc<RequestMemory>) -> Self {
        Self { call, held }
    }
}

impl<F: Future> Future for HoldsMemory<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let (call, held) = (this.call, this.held);
        let is_laborious = held.is_laborious.swap(false, Ordering::Relaxed);
        let poll = || CURRENT.sync_scope(held.clone(), || call.poll(context));
        if is_laborious { slow_work::run(poll) } else { poll() }
    }
}
