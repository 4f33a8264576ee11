//! [`Mail`]: how many messages an actor has handled, by kind.
//!
//! An actor implements [`Receive`] for each message, and one `impl Handler` for all of them, which counts the message and hands
//! it over ([`counted!`]). So no message is left out, whoever sent it and by whatever way. Messages are what an actor costs: its
//! thread handles one at a time, and each takes two wake-ups.

use actix::{Actor, Message};
use std::{
    any::{TypeId, type_name},
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What an actor does with one kind of message; what [`actix::Handler`] is to actors whose messages are not counted.
pub trait Receive<M: Message>: Actor {
    /// As [`actix::Handler::Result`].
    type Answer;

    /// As [`actix::Handler::handle`].
    fn receive(&mut self, message: M, ctx: &mut Self::Context) -> Self::Answer;
}

/// A count of messages; all clones are the same count. There are as many entries as kinds of messages.
#[derive(Debug, Clone, Default)]
pub struct Mail(Arc<Mutex<BTreeMap<TypeId, Count>>>);

#[derive(Debug)]
struct Count {
    name: &'static str,
    messages: u64,
}

impl Mail {
    /// Counts one message.
    pub fn count<M: 'static>(&self) {
        let mut counts = self.counts();
        let count = counts.entry(TypeId::of::<M>());
        count.or_insert_with(|| Count { name: short_name::<M>(), messages: 0 }).messages += 1;
    }

    /// How many messages there were, by the names of their types.
    pub fn by_kind(&self) -> BTreeMap<&'static str, u64> {
        self.counts().values().map(|count| (count.name, count.messages)).collect()
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<TypeId, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a type without the path to it.
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
