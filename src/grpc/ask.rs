//! [`Scheduler`]: the handle of RPC handlers to the scheduler.
//!
//! It holds one recipient for each message instead of an address. So handlers depend on the messages but not on the
//! actor, and tests can use another actor.
//!
//! Operations that the action cache answers are reported to the scheduler together, because a message for each would
//! wake its thread each time. They are sent before any other message of this handle, so a later request finds them, or
//! after [`RECORD_DELAY`]. If [`RECORDED_TOGETHER`] wait and the mailbox of the scheduler is full, their requests wait.

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
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

/// Time limit for an answer of the scheduler. It usually answers within microseconds; the limit ends calls on an
/// overloaded machine.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// The most operations that are reported to the scheduler in one message.
const RECORDED_TOGETHER: usize = 128;

/// The longest time until an operation that the action cache answered is reported. People who watch a list or a log do
/// not notice it.
const RECORD_DELAY: Duration = Duration::from_millis(10);

/// A handle to the scheduler; cheap to clone.
#[derive(Clone)]
pub struct Scheduler(Arc<Recipients>);

struct Recipients {
    /// The name of this server.
    node: NodeName,
    admit: Recipient<Admit>,
    record: Recipient<Record>,
    /// The operations that the scheduler does not know yet.
    unrecorded: Mutex<Vec<FinishedOperation>>,
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
            unrecorded: Mutex::default(),
            watch: address.clone().recipient(),
            cancel: address.clone().recipient(),
            forget: address.clone().recipient(),
            list: address.clone().recipient(),
            explain: address.recipient(),
        }))
    }

    /// Creates an operation for a request that the action cache answers. The scheduler is notified soon. The call waits
    /// for it only if its mailbox is full.
    ///
    /// # Errors
    /// `Unavailable` when the scheduler has stopped.
    pub(crate) async fn record(&self, submit: Submit, result: SharedResult) -> Result<Subscription> {
        let (info, priority) = submit.into_info(OperationId::random(self.0.node));
        let operation = FinishedOperation::new(info, priority, Outcome::cached(result), SystemTime::now());
        let subscription = operation.subscribe();
        match self.0.add(operation)? {
            Added::ToOthers => {}
            Added::First => {
                let recipients = self.0.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RECORD_DELAY).await;
                    if !recipients.try_send_unrecorded() {
                        // An empty message waits until there is room.
                        let _ = ask(&recipients.record, Record(Vec::new())).await;
                        recipients.send_unrecorded();
                    }
                });
            }
            Added::MailboxFull => {
                // An empty message waits until there is room.
                ask(&self.0.record, Record(Vec::new())).await?;
                self.0.send_unrecorded();
            }
        }
        Ok(subscription)
    }

    /// See [`Admit`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn admit(&self, message: Admit) -> Result<Subscription> {
        self.0.ask(&self.0.admit, message).await?
    }

    /// See [`Watch`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn watch(&self, message: Watch) -> Result<Subscription> {
        self.0.ask(&self.0.watch, message).await?
    }

    /// See [`Cancel`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn cancel(&self, message: Cancel) -> Result<()> {
        self.0.ask(&self.0.cancel, message).await?
    }

    /// See [`Forget`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn forget(&self, message: Forget) -> Result<()> {
        self.0.ask(&self.0.forget, message).await?
    }

    /// See [`ListOperations`].
    ///
    /// # Errors
    /// The errors of the message; `Unavailable` when the scheduler has stopped.
    pub async fn list(&self, message: ListOperations) -> Result<OperationPage> {
        self.0.ask(&self.0.list, message).await?
    }

    /// See [`Explain`]. The answer is `None`, too, when the scheduler has stopped.
    pub async fn explain(&self, message: Explain) -> Option<Box<QueueStatus>> {
        self.0.ask(&self.0.explain, message).await.ok().flatten()
    }
}

/// What [`Recipients::add`] has done with an operation.
enum Added {
    /// It is the first one that waits. The caller sees to it that it is sent.
    First,
    /// It waits with others, or was sent with them.
    ToOthers,
    /// It waits, but as many wait as may, and the mailbox of the scheduler is full.
    MailboxFull,
}

impl Recipients {
    fn unrecorded(&self) -> MutexGuard<'_, Vec<FinishedOperation>> {
        self.unrecorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an operation that the scheduler does not know. If many wait, they are sent.
    ///
    /// # Errors
    /// `Unavailable` when the scheduler has stopped.
    fn add(&self, operation: FinishedOperation) -> Result<Added> {
        let mut unrecorded = self.unrecorded();
        unrecorded.push(operation);
        if unrecorded.len() < RECORDED_TOGETHER {
            return Ok(if unrecorded.len() == 1 { Added::First } else { Added::ToOthers });
        }
        match self.record.try_send(Record(mem::take(&mut unrecorded))) {
            Ok(()) => Ok(Added::ToOthers),
            Err(SendError::Full(Record(operations))) => {
                *unrecorded = operations;
                Ok(Added::MailboxFull)
            }
            Err(SendError::Closed(_)) => Err(stopped()),
        }
    }

    /// Sends the operations that the scheduler does not know, unless its mailbox is full.
    fn try_send_unrecorded(&self) -> bool {
        let mut unrecorded = self.unrecorded();
        if unrecorded.is_empty() {
            return true;
        }
        match self.record.try_send(Record(mem::take(&mut unrecorded))) {
            Err(SendError::Full(Record(operations))) => {
                *unrecorded = operations;
                false
            }
            Ok(()) | Err(SendError::Closed(_)) => true,
        }
    }

    /// Sends the operations that the scheduler does not know. The lock is held meanwhile, so no later message of
    /// another request can be sent before.
    fn send_unrecorded(&self) {
        let mut unrecorded = self.unrecorded();
        if !unrecorded.is_empty() {
            self.record.do_send(Record(mem::take(&mut unrecorded)));
        }
    }

    /// Like [`ask`]. The scheduler knows all operations when it handles the message.
    async fn ask<M>(&self, recipient: &Recipient<M>, message: M) -> Result<M::Result>
    where
        M: Message + Send,
        M::Result: Send,
    {
        self.send_unrecorded();
        ask(recipient, message).await
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
