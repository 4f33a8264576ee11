//! Looking up what an Execute needs: [`ResolveAction`] and [`CheckInputs`].
//!
//! An action that was looked up before is answered within the actor, from memory: are Action and Command still stored, is
//! there a complete result. Otherwise the files are read in a task of its own, on the threads that serve connections. An
//! action that says `do_not_cache` is never answered from the cache (EXE-19), so an action is always known before its result
//! is served.
//!
//! Actions are measured before they are decoded, and large ones are decoded on a blocking thread when there is room for them
//! ([`super::decoding`]).

use super::{
    CasActor, Reply,
    client::{Cas, going_down},
    decoding,
    messages::{CheckInputs, Resolution, ResolveAction},
    requests::ResultLookup,
    settings::{MAX_ACTION_BYTES, MAX_ACTION_MEMORY},
};
use crate::{action::Action, actors::mail::Receive, instance::Instance};
use actix::ResponseFuture;
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
    wire,
};
use std::sync::Arc;

/// An action that was read and checked.
#[derive(Debug)]
pub struct ParsedAction {
    action: Arc<Action>,
    command: Digest,
}

impl Cas {
    /// The answer, if no file has to be read for it.
    fn resolve_from_memory(&self, message: &ResolveAction) -> Option<Resolution> {
        let instance = message.instance.blobs();
        let parsed = self.shared().actions.get(&(message.instance.id(), message.action))?;
        for digest in [message.action, parsed.command] {
            self.look_up(|index| index.renew_blob(instance, digest)).ok()??;
        }
        if message.skip_cache_lookup || parsed.action.do_not_cache {
            return Some(Resolution::Run(parsed.action.clone()));
        }
        match self.look_up_result(&message.instance, message.action).ok()? {
            ResultLookup::Hit(result) => Some(Resolution::Cached(result)),
            ResultLookup::Miss => Some(Resolution::Run(parsed.action.clone())),
            ResultLookup::Cold(_) | ResultLookup::Long(..) => None,
        }
    }
}

impl Receive<ResolveAction> for CasActor {
    type Answer = Reply<Result<Resolution>>;

    fn receive(&mut self, message: ResolveAction, ctx: &mut Self::Context) -> Self::Answer {
        let cas = self.client(ctx).working_for(message.caller);
        if let Some(resolution) = cas.resolve_from_memory(&message) {
            return Reply::Now(Ok(resolution));
        }
        Reply::Later(Box::pin(self.elsewhere(async move { cas.resolve(message).await })))
    }
}

impl Receive<CheckInputs> for CasActor {
    type Answer = ResponseFuture<Result<()>>;

    fn receive(&mut self, message: CheckInputs, ctx: &mut Self::Context) -> Self::Answer {
        let cas = self.client(ctx).working_for(message.caller);
        Box::pin(self.elsewhere(async move { cas.check_inputs(&message.instance, message.root).await }))
    }
}

impl CasActor {
    /// Does work on the runtime's own threads: this one moves mail. It runs to its end even if nobody waits for it any more.
    fn elsewhere<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send + 'static {
        let working = self.shared.runtime.spawn(work);
        async move {
            working.await.unwrap_or_else(|error| {
                Err(if error.is_panic() {
                    Error::internal("work of the store panicked")
                } else {
                    going_down()
                })
            })
        }
    }
}

impl Cas {
    async fn resolve(&self, message: ResolveAction) -> Result<Resolution> {
        let ResolveAction { instance, action: digest, skip_cache_lookup, .. } = message;
        let parsed = self.read_action(&instance, digest).await?;
        let action = parsed.action.clone();
        let weight = size_of::<ParsedAction>() + action.weight();
        self.shared().actions.insert((instance.id(), digest), Arc::new(parsed), weight);
        if !skip_cache_lookup
            && !action.do_not_cache
            && let Some(result) = self.get_result(&instance, digest).await?
        {
            return Ok(Resolution::Cached(result));
        }
        Ok(Resolution::Run(action))
    }

    /// Reads an Action and its Command, and checks them. Small ones are decoded right here; others must
    /// not be held up by large ones.
    async fn read_action(&self, instance: &Instance, digest: Digest) -> Result<ParsedAction> {
        // Room for both messages at once, where the first one is large.
        let room = match worst_case(digest.size()) {
            0 => 0,
            of_action => of_action + worst_case(MAX_ACTION_BYTES),
        };
        let mut room = self.room_to_decode(room).await?;
        let bytes = self.read_message(instance, digest, "Action").await?;
        let read = move || decode::<reapi::Action>(bytes, digest, "Action");
        let wire = if room.is_some() { self.blocking(read).await? } else { read() }?;
        let command =
            Digest::from_wire(digest.function(), wire.command_digest.as_ref(), "Action.command_digest")?;
        if room.is_none() {
            room = self.room_to_decode(worst_case(command.size())).await?;
        }
        let bytes = self.read_message(instance, command, "Command").await?;
        let (instance, timeouts) = (instance.clone(), self.shared().settings.timeouts);
        let read = move || {
            let message = decode::<reapi::Command>(bytes, command, "Command")?;
            Action::from_wire(instance, digest, &wire, &message, timeouts)
        };
        let action = if room.is_some() { self.blocking(read).await? } else { read() }?;
        Ok(ParsedAction { action: Arc::new(action), command })
    }

    /// Reads a message that has to be there.
    async fn read_message(&self, instance: &Instance, digest: Digest, what: &str) -> Result<Bytes> {
        if digest.size() > MAX_ACTION_BYTES {
            let size = digest.size();
            return Err(Error::Invalid(format!(
                "the {what} {digest} is too large: {size} bytes, at most {MAX_ACTION_BYTES} are read"
            )));
        }
        let read = self.read_many(instance, vec![digest]).await?.pop();
        read.unwrap_or_else(|| Err(super::blob::not_found(digest))).map_err(|error| match error {
            Error::NotFound(_) => Error::MissingBlobs(vec![digest]),
            error => error,
        })
    }
}

/// What a message of this size takes at worst; no larger one is read.
fn worst_case(bytes: u64) -> u64 {
    decoding::worst_case(bytes.min(MAX_ACTION_BYTES), MAX_ACTION_MEMORY)
}

fn decode<M>(bytes: Bytes, digest: Digest, what: &str) -> Result<M>
where
    M: prost::Message + prost::Name + Default,
{
    wire::decode(bytes, MAX_ACTION_MEMORY, what)
        .map_err(|error| Error::Invalid(format!("blob {digest}: {error}")))
}
