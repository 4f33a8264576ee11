//! Looking up what an Execute needs: [`ResolveAction`] and [`CheckInputs`].
//!
//! An action that was looked up before is answered within the actor, from memory: are Action and Command still stored, is
//! there a complete result. Otherwise the files are read in a future of its own. An action that says `do_not_cache` is never
//! answered from the cache (EXE-19), so an action is always known before its result is served.

use super::{
    CasActor, Reply,
    client::Cas,
    index::{Key, Kind},
    messages::{CheckInputs, Resolution, ResolveAction},
    requests::ResultLookup,
    settings::MAX_ACTION_BYTES,
};
use crate::{
    action::Action,
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use actix::{Context, Handler, ResponseFuture};
use bytes::Bytes;
use prost::Message as _;
use std::sync::Arc;

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
        let bytes = self.read_message(&instance, digest, "Action").await?;
        let wire = reapi::Action::decode(bytes)
            .map_err(|error| Error::Invalid(format!("blob {digest} does not parse as an Action: {error}")))?;
        let command_digest =
            Digest::from_wire(digest.function(), wire.command_digest.as_ref(), "Action.command_digest")?;
        let bytes = self.read_message(&instance, command_digest, "Command").await?;
        let command = reapi::Command::decode(bytes).map_err(|error| {
            Error::Invalid(format!("blob {command_digest} does not parse as a Command: {error}"))
        })?;
        let timeouts = self.shared().settings.timeouts;
        let action = Arc::new(Action::from_wire(instance.clone(), digest, &wire, &command, timeouts)?);
        let parsed = ParsedAction { action: action.clone(), command: command_digest };
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

    /// Reads a message that has to be there.
    async fn read_message(
        &self,
        instance: &crate::instance::Instance,
        digest: Digest,
        what: &str,
    ) -> Result<Bytes> {
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
