//! [`Scheduler`]: the handle of RPC handlers to the scheduler.
//!
//! It holds one recipient for each message instead of an address. So handlers depend on the messages but not on the
//! actor, and tests can use another actor.

use crate::{
    actors::scheduler::{
        messages::{Admit, Cancel, Explain, Forget, ListOperations, OperationPage, Record, Submit, Watch},
        operation::{FinishedOperation, OperationId, Outcome, QueueStatus, Subscription},
    },
    node::NodeName,
    result::SharedResult,
};
use actix::{Actor, Addr, Context, Handler, Message, Recipient, prelude::SendError};
use gorego_reapi::error::{Error, Result};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// Time limit for an answer of the scheduler. It usually answers within microseconds; the limit ends calls on an
/// overloaded machine.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// A handle to the scheduler; cheap to clone.
#[derive(Clone)]
pub struct Scheduler(Arc<Recipients>);

struct Recipients {
    /// The name of this server.
    node: NodeName,
    admit: Recipient<Admit>,
    record: Recipient<Record>,
    watch: Recipient<Watch>,
    cancel: Recipient<Cancel>,
    forget: Recipient<Forget>,
    list: Recipient<ListOperations>,
    explain: Recipient<Explain>,
}

impl Scheduler {
    /// A handle to the scheduler at this address, for the server with this name.
    pub fn new<A>(address: Addr<A>, node: NodeName) -> Self
    where
        A: Actor<Context = Context<A>>
            + Handler<Admit>
            + Handler<Record>
            + Handler<Watch>
            + Handler<Cancel>
            + Handler<Forget>
            + Handler<ListOperations>
            + Handler<Explain>,
    {
        Self(Arc::new(Recipients {
            node,
            admit: address.clone().recipient(),
            record: address.clone().recipient(),
            watch: address.clone().recipient(),
            cancel: address.clone().recipient(),
            forget: address.clone().recipient(),
            list: address.clone().recipient(),
            explain: address.recipient(),
        }))
    }

    /// Creates an operation for a request that the action cache answers. The scheduler is notified. The call waits for
    /// it only if its mailbox is full.
    ///
    /// # Errors
    /// `Unavailable` when the scheduler has stopped.
    pub(crate) async fn record(&self, submit: Submit, result: SharedResult) -> Result<Subscription> {
        let (info, priority) = submit.into_info(OperationId::random(self.0.node));
        let operation = FinishedOperation::new(info, priority, Outcome::cached(result), SystemTime::now());
        let subscription = operation.subscribe();
        match self.0.record.try_send(Record(operation)) {
            Ok(()) => {}
            Err(SendError::Full(record)) => ask(&self.0.record, record).await?,
            Err(SendError::Closed(_)) => return Err(stopped()),
        }
        Ok(subscription)
    }

    /// See [`Admit`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn admit(&self, message: Admit) -> Result<Subscription> {
        ask(&self.0.admit, message).await?
    }

    /// See [`Watch`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn watch(&self, message: Watch) -> Result<Subscription> {
        ask(&self.0.watch, message).await?
    }

    /// See [`Cancel`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn cancel(&self, message: Cancel) -> Result<()> {
        ask(&self.0.cancel, message).await?
    }

    /// See [`Forget`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn forget(&self, message: Forget) -> Result<()> {
        ask(&self.0.forget, message).await?
    }

    /// See [`ListOperations`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn list(&self, message: ListOperations) -> Result<OperationPage> {
        ask(&self.0.list, message).await?
    }

    /// See [`Explain`]. The answer is `None`, too, when the scheduler has stopped.
    pub async fn explain(&self, message: Explain) -> Option<Box<QueueStatus>> {
        ask(&self.0.explain, message).await.ok().flatten()
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
        Ok(Err(_)) => Err(stopped()),
        Err(_) => Err(Error::Unavailable(format!("the scheduler did not answer within {ASK_TIMEOUT:?}"))),
    }
}

fn stopped() -> Error {
    Error::Unavailable("the scheduler has stopped; the server is going down".into())
}
