//! Reports that a result is about to replace a different one ([`crate::nondeterminism`]).
//!
//! The look-up costs nothing for an action without a result, which is almost every write. Otherwise the earlier result
//! is in memory, or its file is read. A result is not compared if the memory for its file is not free at once, because
//! a report is not worth waiting for.

use super::PreparedResult;
use crate::{
    actors::cas::{
        checked::open_file,
        client::Cas,
        decoding::worst_case,
        index::{EntryKind, FoundEntry, Key},
        results, volume,
    },
    instance::Instance,
    nondeterminism::{Replacement, compare},
    result::SharedResult,
};
use gorego_reapi::{
    digest::Digest,
    proto::gorego::{ResultOrigin, StoredOrigin},
    tree::MAX_MESSAGE_MEMORY,
    wire::UNCOUNTED_BYTES,
};
use std::time::SystemTime;

/// The origin of the result that is stored under this key, as a message of the Admin service.
pub(crate) fn origin_message(key: Digest, stored: &StoredOrigin) -> ResultOrigin {
    let action = stored.private_action_digest.clone();
    ResultOrigin {
        is_private: action.is_some(),
        action_digest: action.or_else(|| Some(key.to_wire())),
        digest_function: key.function().wire().into(),
        stored_at: stored.stored_at,
        worker: stored.worker.clone(),
        invocation_id: stored.tool_invocation_id.clone(),
        peer: stored.peer.clone(),
        principal: stored.principal.clone(),
    }
}

impl Cas {
    /// Reports a stored result of this action that differs from the one that is about to be stored. Blocks.
    pub(crate) fn report_difference(&self, instance: &Instance, prepared: &PreparedResult) {
        let Some(reports) = self.shared().reports.get() else { return };
        let action = prepared.action;
        let key = Key { digest: action, instance: instance.id(), kind: EntryKind::Result };
        let Ok(Some(found)) = self.look_up(|index| index.renew(&key)) else { return };
        let Some(earlier) = self.stored_result(instance, action, &found) else { return };
        let Some(differences) = compare(&earlier, &prepared.result) else { return };
        // Only the file contains the origin of the result.
        let Some(stored) = self.stored_origin(instance, action, &found) else { return };
        let replacement = Replacement {
            instance: instance.name().to_owned(),
            action,
            earlier: origin_message(action, &stored),
            later: origin_message(action, &prepared.origin),
            differences,
        };
        reports.add(replacement, SystemTime::now());
    }

    fn stored_result(&self, instance: &Instance, action: Digest, found: &FoundEntry) -> Option<SharedResult> {
        if let Some(loaded) = self.shared().results.get(&(instance.id(), action))
            && loaded.generation == found.file.generation
        {
            return Some(loaded.result.clone());
        }
        let file = open_file(self, &found.file).ok()?;
        let size = file.look().ok()?.size;
        let memory = worst_case(size.min(results::MAX_FILE_BYTES), MAX_MESSAGE_MEMORY);
        let _room = match size > UNCOUNTED_BYTES as u64 {
            true => Some(self.shared().large_results.take(self.caller(), memory).ok()?),
            false => None,
        };
        let bytes = volume::read_all(&*file, results::MAX_FILE_BYTES).ok()?;
        results::decode(&bytes, instance.name(), action).ok().map(SharedResult::new)
    }

    fn stored_origin(&self, instance: &Instance, action: Digest, found: &FoundEntry) -> Option<StoredOrigin> {
        let file = open_file(self, &found.file).ok()?;
        let bytes = volume::read_all(&*file, results::MAX_FILE_BYTES).ok()?;
        results::decode_origin(&bytes, instance.name(), action).ok()
    }
}
