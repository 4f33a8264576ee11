//! [`Reply`]: how a handler answers that often, but not always, has the answer at hand.

use super::CasActor;
use actix::{
    Context, Message, ResponseFuture,
    dev::{MessageResponse, OneshotSender},
};
use std::future::Future;

/// An answer now, or one that needs IO first.
pub enum Reply<T: 'static> {
    /// At once.
    Now(T),
    /// When this future ends; nothing else waits for it.
    Later(ResponseFuture<T>),
}

impl<M: Message<Result = T>, T: 'static> MessageResponse<CasActor, M> for Reply<T> {
    fn handle(self, _: &mut Context<CasActor>, sender: Option<OneshotSender<T>>) {
        match (self, sender) {
            (Self::Now(answer), Some(sender)) => {
                let _ = sender.send(answer);
            }
            // Nobody waits for a single future: each goes its own way, and none holds the actor up.
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

impl<T: 'static> Reply<T> {
    /// This answer, once room is free.
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
