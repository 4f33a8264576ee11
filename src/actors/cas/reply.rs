//! [`StoreReply`]: an answer that is often, but not always, ready at once.

use super::CasActor;
use actix::{
    Context, Message, ResponseFuture,
    dev::{MessageResponse, OneshotSender},
};
use std::future::Future;

/// An answer that is ready, or one that needs IO first.
pub enum StoreReply<T: 'static> {
    /// An answer that is ready.
    Now(T),
    /// The future of the answer. It does not hold up the actor.
    Later(ResponseFuture<T>),
}

impl<M: Message<Result = T>, T: 'static> MessageResponse<CasActor, M> for StoreReply<T> {
    fn handle(self, _: &mut Context<CasActor>, sender: Option<OneshotSender<T>>) {
        match (self, sender) {
            (Self::Now(answer), Some(sender)) => {
                let _ = sender.send(answer);
            }
            // Each future is spawned, so none holds up the actor.
            (Self::Later(future), sender) => {
                actix::spawn(async move {
                    let answer = future.await;
                    if let Some(sender) = sender {
                        let _ = sender.send(answer);
                    }
                });
            }
            (Self::Now(_), None) => {}
        }
    }
}

impl<T: 'static> StoreReply<T> {
    /// Answers once the future `free` completes, or at once without one.
    pub fn when(free: Option<impl Future<Output = ()> + 'static>, answer: T) -> Self {
        match free {
            None => Self::Now(answer),
            Some(free) => Self::Later(Box::pin(async move {
                free.await;
                answer
            })),
        }
    }
}
