//! [`Claim`]: the memory that one call may take for its request, from the moment its last byte is there until its handler is
//! done.
//!
//! What a message takes once it is decoded is known only when all of it is there, and to find that out takes time too. So before
//! a large message is handed on, [`super::intake`] waits for the most that it could take; few messages can have that much at a
//! time, and the others wait in turn. [`super::codec`] measures and decodes it, and gives back what was not needed. The rest is
//! held until the call is answered, or until the handler of a stream asks for the next message. All of this is done off the
//! threads that serve everybody ([`unhindered`]).

pub(crate) use crate::unhindered::unhindered;

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
    static CLAIM: Arc<Claim>;
}

/// See the top of this file.
#[derive(Debug, Default)]
pub struct Claim {
    share: Mutex<Option<Share>>,
    /// The next poll decodes a large message and may take long.
    is_laborious: AtomicBool,
}

impl Claim {
    /// Takes the share for the next message, in place of the one for the message before.
    pub fn hold(&self, share: Share, is_laborious: bool) {
        *self.share() = Some(share);
        self.is_laborious.store(is_laborious, Ordering::Relaxed);
    }

    /// Whether a request is being decoded here, and not the answer of another server.
    pub fn is_present() -> bool {
        CLAIM.try_with(|_| ()).is_ok()
    }

    /// Gives back all but this much of what the call holds. Handlers do so too, before they wait for what their client decides:
    /// what they keep of a request is often small.
    pub fn settle(memory: u64) {
        let _ = CLAIM.try_with(|claim| {
            if let Some(share) = claim.share().as_mut() {
                share.shrink_to(memory);
            }
        });
    }

    /// Gives everything back: the handler of a stream has taken the message.
    pub fn let_go(&self) {
        drop(self.share().take());
    }

    fn share(&self) -> std::sync::MutexGuard<'_, Option<Share>> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        memory::freed(self.share().as_ref().map_or(0, Share::amount));
    }
}

pin_project_lite::pin_project! {
    /// A call with its claim, which ends when the call is answered.
    #[derive(Debug)]
    pub struct Claimed<F> {
        #[pin]
        call: F,
        claim: Arc<Claim>,
    }
}

impl<F> Claimed<F> {
    /// A call whose messages are paid for by this claim.
    pub fn new(call: F, claim: Arc<Claim>) -> Self {
        Self { call, claim }
    }
}

impl<F: Future> Future for Claimed<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let (call, claim) = (this.call, this.claim);
        let is_laborious = claim.is_laborious.swap(false, Ordering::Relaxed);
        let poll = || CLAIM.sync_scope(claim.clone(), || call.poll(context));
        if is_laborious { unhindered(poll) } else { poll() }
    }
}
