//! Look-ups for an Execute request: [`Cas::resolve_action`] and [`Cas::check_inputs_apart`].
//!
//! An action that was looked up before is answered from memory, on the calling thread: its Action and Command must
//! still be stored, and its result may be complete. Otherwise the files are read. An action with `do_not_cache` is
//! never answered from the cache (EXE-19), so the Action is always read before its result is served.
//!
//! Actions are measured before they are decoded, and large ones are decoded on a blocking thread when there is room for
//! them ([`super::decoding`]).

use super::{
    client::{Cas, going_down},
    decoding,
    results::ResultLookup,
    settings::{MAX_ACTION_BYTES, MAX_ACTION_MEMORY, RESOLVE_TIMEOUT},
};
use crate::{action::Action, instance::Instance, result::SharedResult};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
    wire,
};
use std::{sync::Arc, time::Instant};

/// The outcome of looking an action up.
#[derive(Debug, Clone, PartialEq)]
pub enum Resolution {
    /// There is a stored result. Everything it references is present and was just renewed (AC-03, AC-04).
    Cached(SharedResult),
    /// There is no usable result; this action has to run.
    Run(Arc<Action>),
    /// The action cannot run: it or its Command is not stored (`MissingBlobs`) or malformed (`Invalid`).
    Unusable(Error),
}

/// An action that was read and checked.
#[derive(Debug)]
pub(super) struct ParsedAction {
    action: Arc<Action>,
    command: Digest,
}

impl Cas {
    /// Looks up whether an action has a complete result or has to run. With `skip_cache_lookup`, the action cache is
    /// not used (EXE-17). `principal` is the principal of the request.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down or the store does not answer within [`RESOLVE_TIMEOUT`]. A faulty
    /// action is not an error of this call: see [`Resolution::Unusable`].
    pub async fn resolve_action(
        &self,
        instance: &Instance,
        action: Digest,
        skip_cache_lookup: bool,
        principal: &str,
    ) -> Result<Resolution> {
        let resolved = match self.resolve_from_memory(instance, action, skip_cache_lookup)? {
            Some(Resolution::Cached(result)) => return self.with_room(result).await.map(Resolution::Cached),
            Some(resolution) => return Ok(resolution),
            None => self.resolve(instance, action, skip_cache_lookup, principal),
        };
        match tokio::time::timeout(RESOLVE_TIMEOUT, resolved).await {
            Ok(Err(error @ (Error::MissingBlobs(_) | Error::Invalid(_)))) => Ok(Resolution::Unusable(error)),
            Ok(resolution) => resolution,
            Err(_) => {
                let problem =
                    format!("the store of this server did not answer within {RESOLVE_TIMEOUT:?}; try again");
                Err(Error::Unavailable(problem))
            }
        }
    }

    /// Answers from memory, if that is possible.
    fn resolve_from_memory(
        &self,
        instance: &Instance,
        action: Digest,
        skip_cache_lookup: bool,
    ) -> Result<Option<Resolution>> {
        let Some(parsed) = self.shared().actions.get(&(instance.id(), action)) else { return Ok(None) };
        let blobs = [action, parsed.command];
        if !self.look_up(|index| blobs.iter().all(|blob| index.has_blob(instance.blobs(), *blob)))? {
            return Ok(None);
        }
        let run = || Resolution::Run(parsed.action.clone());
        if skip_cache_lookup || parsed.action.do_not_cache {
            return Ok(Some(run()));
        }
        Ok(match self.look_up_result(instance, action)? {
            ResultLookup::Hit(result) => Some(Resolution::Cached(result)),
            // The principal may have a result of its own.
            ResultLookup::Miss if instance.private_results().is_some() => None,
            ResultLookup::Miss => Some(run()),
            ResultLookup::NoRoom(_) | ResultLookup::Cold(_) | ResultLookup::Long(..) => None,
        })
    }

    async fn resolve(
        &self,
        instance: &Instance,
        digest: Digest,
        skip_cache_lookup: bool,
        principal: &str,
    ) -> Result<Resolution> {
        let parsed = self.read_action(instance, digest).await?;
        let action = parsed.action.clone();
        let weight = size_of::<ParsedAction>() + action.weight();
        self.shared().actions.insert((instance.id(), digest), Arc::new(parsed), weight);
        if !skip_cache_lookup
            && !action.do_not_cache
            && let Some(result) = self.get_result_for(instance, digest, principal).await?
        {
            return Ok(Resolution::Cached(result));
        }
        Ok(Resolution::Run(action))
    }

    /// Runs [`Cas::check_inputs`] on the runtime's threads, so that the actors' thread walks no trees. A root that was
    /// checked lately is not checked again. The check runs to its end even if the caller does not wait for it.
    ///
    /// # Errors
    /// The errors of [`Cas::check_inputs`].
    pub fn check_inputs_apart(
        &self,
        instance: Instance,
        root: Digest,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let was_checked =
            self.shared().input_roots.was_checked(&(instance.blobs(), root), self.lessee(), Instant::now());
        let cas = self.clone();
        let check = async move { cas.check_inputs(&instance, root).await };
        let checking = (!was_checked).then(|| self.shared().runtime.spawn(check));
        async move {
            let Some(checking) = checking else { return Ok(()) };
            checking.await.unwrap_or_else(|error| {
                Err(if error.is_panic() {
                    Error::internal("work of the store panicked")
                } else {
                    going_down()
                })
            })
        }
    }

    /// Reads an Action and its Command, and checks them. Small messages are decoded on this thread, large ones on a
    /// blocking thread.
    async fn read_action(&self, instance: &Instance, digest: Digest) -> Result<ParsedAction> {
        // If the Action is large, room is taken for both messages at once.
        let room = match worst_case(digest.size()) {
            0 => 0,
            of_action => of_action + worst_case(MAX_ACTION_BYTES),
        };
        let room = self.room_to_decode(room).await?;
        let bytes = self.read_message(instance, digest, "Action").await?;
        let read = move || decode::<reapi::Action>(bytes, digest, "Action");
        let (wire, mut room) = self.in_room(room, read).await?;
        let wire = wire?;
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
        let (action, _room) = self.in_room(room, read).await?;
        Ok(ParsedAction { action: Arc::new(action?), command })
    }

    /// Reads a message, which has to be stored.
    async fn read_message(&self, instance: &Instance, digest: Digest, what: &str) -> Result<Bytes> {
        if digest.size() > MAX_ACTION_BYTES {
            let size = digest.size();
            return Err(Error::Invalid(format!(
                "the {what} {digest} is too large: {size} bytes, at most {MAX_ACTION_BYTES} are read"
            )));
        }
        let read = self.read_many(instance, vec![digest]).await?.pop();
        read.unwrap_or_else(|| Err(super::checked::not_found(digest))).map_err(|error| match error {
            Error::NotFound(_) => Error::MissingBlobs(vec![digest]),
            error => error,
        })
    }
}

/// The most memory that a message of this size can take. Messages above [`MAX_ACTION_BYTES`] are not read.
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
