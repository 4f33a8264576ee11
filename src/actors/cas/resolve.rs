//! Looking up what an Execute needs: [`ResolveAction`] and [`CheckInputs`].
//!
//! An action that was looked up before is answered within the actor, from memory: are Action and Command still stored, is
//! there a complete result. Otherwise the files are read in a future of its own. An action that says `do_not_cache` is never
//! answered from the cache (EXE-19), so an action is always known before its result is served.
//!
//! Actions are counted before they are decoded, and large ones are decoded on a blocking thread, [`LARGE_ACTIONS_MAX`] at a
//! time.
//!
//! [`LARGE_ACTIONS_MAX`]: super::settings::LARGE_ACTIONS_MAX

use super::{
    CasActor, Reply,
    client::Cas,
    index::{Key, Kind},
    messages::{CheckInputs, Resolution, ResolveAction},
    requests::ResultLookup,
    settings::{MAX_ACTION_BYTES, MAX_ACTION_ENTRIES, SMALL_BLOB_BYTES},
};
use crate::{
    action::Action,
    digest::Digest,
    error::{Error, Result},
    instance::Instance,
    proto::reapi,
    tree::check_entries_within,
};
use actix::{Context, Handler, ResponseFuture};
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::SemaphorePermit;

/// An action that was read and checked.
#[derive(Debug)]
pub struct ParsedAction {
    action: Arc<Action>,
    command: Digest,
}

impl CasActor {
    /// The answer, if no file has to be read for it.
    fn resolve_from_memory(&mut self, message: &ResolveAction, ctx: &Context<Self>) -> Option<Resolution> {
        let instance = message.instance.blobs();
        let parsed = self.shared.actions.get(&(message.instance.id(), message.action))?;
        for digest in [message.action, parsed.command] {
            self.renew(&Key { digest, instance, kind: Kind::Blob })?;
        }
        if message.skip_cache_lookup || parsed.action.do_not_cache {
            return Some(Resolution::Run(parsed.action.clone()));
        }
        match self.look_up_result(&message.instance, message.action, ctx) {
            ResultLookup::Hit(result) => Some(Resolution::Cached(result)),
            ResultLookup::Miss => Some(Resolution::Run(parsed.action.clone())),
            ResultLookup::Cold(_) => None,
        }
    }
}

impl Handler<ResolveAction> for CasActor {
    type Result = Reply<Result<Resolution>>;

    fn handle(&mut self, message: ResolveAction, ctx: &mut Self::Context) -> Self::Result {
        if let Some(resolution) = self.resolve_from_memory(&message, ctx) {
            return Reply::Now(Ok(resolution));
        }
        let cas = self.client(ctx);
        Reply::Later(Box::pin(async move { cas.resolve(message).await }))
    }
}

impl Handler<CheckInputs> for CasActor {
    type Result = ResponseFuture<Result<()>>;

    fn handle(&mut self, message: CheckInputs, ctx: &mut Self::Context) -> Self::Result {
        let cas = self.client(ctx);
        Box::pin(async move { cas.check_inputs(&message.instance, message.root).await })
    }
}

impl Cas {
    async fn resolve(&self, message: ResolveAction) -> Result<Resolution> {
        let ResolveAction { instance, action: digest, skip_cache_lookup } = message;
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

    /// Reads an Action and its Command, and checks them. Small ones are decoded right here, on the thread of the actors;
    /// it must not be held up by large ones.
    async fn read_action(&self, instance: &Instance, digest: Digest) -> Result<ParsedAction> {
        // One turn for both messages: who held a turn and waited for a second one could wait for ever.
        let mut turn = None;
        let bytes = self.read_message(instance, digest, "Action", &mut turn).await?;
        let read = move || decode::<reapi::Action>(bytes, digest, "Action");
        let wire = if turn.is_some() { self.blocking(read).await? } else { read() }?;
        let command =
            Digest::from_wire(digest.function(), wire.command_digest.as_ref(), "Action.command_digest")?;
        let bytes = self.read_message(instance, command, "Command", &mut turn).await?;
        let (instance, timeouts) = (instance.clone(), self.shared().settings.timeouts);
        let read = move || {
            let message = decode::<reapi::Command>(bytes, command, "Command")?;
            Action::from_wire(instance, digest, &wire, &message, timeouts)
        };
        let action = if turn.is_some() { self.blocking(read).await? } else { read() }?;
        Ok(ParsedAction { action: Arc::new(action), command })
    }

    /// Reads a message that has to be there; a large one in turn.
    async fn read_message<'a>(
        &'a self,
        instance: &Instance,
        digest: Digest,
        what: &str,
        turn: &mut Option<SemaphorePermit<'a>>,
    ) -> Result<Bytes> {
        if digest.size() > MAX_ACTION_BYTES {
            let size = digest.size();
            return Err(Error::Invalid(format!(
                "the {what} {digest} is too large: {size} bytes, at most {MAX_ACTION_BYTES} are read"
            )));
        }
        if digest.size() > SMALL_BLOB_BYTES && turn.is_none() {
            *turn = Some(self.shared().large_actions.acquire().await.map_err(Error::internal)?);
        }
        let read = self.read_many(instance, vec![digest]).await?.pop();
        read.unwrap_or_else(|| Err(super::blob::not_found(digest))).map_err(|error| match error {
            Error::NotFound(_) => Error::MissingBlobs(vec![digest]),
            error => error,
        })
    }
}

/// Decodes a message, once it is known that it does not take many times its size.
fn decode<M: prost::Message + Default>(bytes: Bytes, digest: Digest, what: &str) -> Result<M> {
    // Two levels, for the properties of the platform.
    check_entries_within(&bytes, 2, MAX_ACTION_ENTRIES)
        .map_err(|error| Error::Invalid(format!("the {what} {digest} is refused: {error}")))?;
    M::decode(bytes)
        .map_err(|error| Error::Invalid(format!("blob {digest} does not parse as {what}: {error}")))
}
