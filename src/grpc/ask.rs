//! [`Scheduler`]: the handle of RPC handlers to the scheduler.
//!
//! It holds one recipient for each message instead of an address. So handlers depend on the messages but not on the actor, and
//! tests can use another actor.

use crate::actors::scheduler::{
    messages::{Admit, Cancel, Explain, Forget, ListOperations, OperationPage, Watch},
    operation::{QueueStatus, Subscription},
};
use actix::{Actor, Addr, Context, Handler, Message, Recipient};
use gorego_reapi::error::{Error, Result};
use std::time::Duration;

/// Time limit for an answer of the scheduler. It usually answers within microseconds; the limit ends calls on an overloaded
/// machine.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// A handle to the scheduler; cheap to clone.
#[derive(Clone)]
pub struct Scheduler {
    admit: Recipient<Admit>,
    watch: Recipient<Watch>,
    cancel: Recipient<Cancel>,
    forget: Recipient<Forget>,
    list: Recipient<ListOperations>,
    explain: Recipient<Explain>,
}

impl Scheduler {
    /// A handle to the scheduler at this address.
    pub fn new<A>(address: Addr<A>) -> Self
    where
        A: Actor<Context = Context<A>>
            + Handler<Admit>
            + Handler<Watch>
            + Handler<Cancel>
            + Handler<Forget>
            + Handler<ListOperations>
            + Handler<Explain>,
    {
        Self {
            admit: address.clone().recipient(),
            watch: address.clone().recipient(),
            cancel: address.clone().recipient(),
            forget: address.clone().recipient(),
            list: address.clone().recipient(),
            explain: address.recipient(),
        }
    }

    /// See [`Admit`].
    ///
    /// # Errors
    /// Those of the message; `Unavailable` when the scheduler has stopped.
    pub async fn admit(&self, message: Admit) -> Result<Subscription> {
        ask(&self.admit, message).await?
    }

    /// See [`Watch`].
    ///
    /// # Errors
    /// Those of the message; `Unavailable` when the scheduler has stopped.
    pub async fn watch(&self, message: Watch) -> Result<Subscription> {
        ask(&self.watch, message).await?
    }

    /// See [`Cancel`].
    ///
    /// # Errors
    /// Those of the message; `Unavailable` when the scheduler has stopped.
    pub async fn cancel(&self, message: Cancel) -> Result<()> {
        ask(&self.cancel, message).await?
    }

    /// See [`Forget`].
    ///
    /// # Errors
    /// Those of the message; `Unavailable` when the scheduler has stopped.
    pub async fn forget(&self, message: Forget) -> Result<()> {
        ask(&self.forget, message).await?
    }

    /// See [`ListOperations`].
    ///
    /// # Errors
    /// Those of the message; `Unavailable` when the scheduler has stopped.
    pub async fn list(&self, message: ListOperations) -> Result<OperationPage> {
        ask(&self.list, message).await?
    }

    /// See [`Explain`]. `None` also when the scheduler has stopped.
    pub async fn explain(&self, message: Explain) -> Option<Box<QueueStatus>> {
        ask(&self.explain, message).await.ok().flatten()
    }
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").finish_non_exhaustive()
    }
}

/// Sends one message and waits for its answer, at most [`ASK_TIMEOUT`].
async fn ask<M>(recipient: &Recipient<M>, message: M) -> Result<M::Result>
where
    M: Message + Send,
    M::Result: Send,
{
    match tokio::time::timeout(ASK_TIMEOUT, recipient.send(message)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(Error::Unavailable("the scheduler has stopped; the server is going down".into())),
        Err(_) => Err(Error::Unavailable(format!("the scheduler did not answer within {ASK_TIMEOUT:?}"))),
    }
}
