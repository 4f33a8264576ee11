//! [`Mail`]: counts the messages that an actor has handled, by kind.
//!
//! An actor implements [`Receive`] for each message. [`counted!`] implements `Handler` for all of them: it counts the
//! message and passes it on. So every message is counted, however it was sent. Messages determine the cost of an actor:
//! its thread handles one at a time, and each takes two wake-ups.

use actix::{Actor, Message};
use std::{
    any::{TypeId, type_name},
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Handles one kind of message. It replaces [`actix::Handler`] for actors whose messages are counted.
pub trait Receive<M: Message>: Actor {
    /// The counterpart of [`actix::Handler::Result`].
    type Answer;

    /// The counterpart of [`actix::Handler::handle`].
    fn receive(&mut self, message: M, ctx: &mut Self::Context) -> Self::Answer;
}

/// A count of messages, with one entry per kind. Clones share the count.
#[derive(Debug, Clone, Default)]
pub struct Mail(Arc<Mutex<BTreeMap<TypeId, Count>>>);

#[derive(Debug)]
struct Count {
    name: &'static str,
    messages: u64,
}

impl Mail {
    /// Counts one message of type `M`.
    pub fn count<M: 'static>(&self) {
        let mut counts = self.counts();
        let count = counts.entry(TypeId::of::<M>());
        count.or_insert_with(|| Count { name: short_name::<M>(), messages: 0 }).messages += 1;
    }

    /// The number of messages, by the names of their types.
    pub fn by_kind(&self) -> BTreeMap<&'static str, u64> {
        self.counts().values().map(|count| (count.name, count.messages)).collect()
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<TypeId, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a type without its path.
fn short_name<T>() -> &'static str {
    type_name::<T>().rsplit("::").next().unwrap_or_default()
}

/// Implements [`actix::Handler`] for an actor and every message that it receives. The actor has a field `mail`.
macro_rules! counted {
    ($actor:ty) => {
        impl<M> actix::Handler<M> for $actor
        where
            M: actix::Message + 'static,
            $actor: $crate::actors::mail::Receive<M>,
            <$actor as $crate::actors::mail::Receive<M>>::Answer: actix::dev::MessageResponse<$actor, M>,
        {
            type Result = <$actor as $crate::actors::mail::Receive<M>>::Answer;

            fn handle(&mut self, message: M, ctx: &mut Self::Context) -> Self::Result {
                self.mail.count::<M>();
                $crate::actors::mail::Receive::receive(self, message, ctx)
            }
        }
    };
}
pub(crate) use counted;

#[cfg(test)]
mod tests {
    use super::*;

    struct Ping;
    struct Pong;

    #[test]
    fn messages_are_counted_by_kind_and_clones_share_the_count() {
        let mail = Mail::default();
        mail.clone().count::<Ping>();
        mail.count::<Ping>();
        mail.count::<Pong>();
        assert_eq!(mail.by_kind(), BTreeMap::from([("Ping", 2), ("Pong", 1)]));
    }
}
