//! Look-ups of action results that are answered from the index and from memory.

use super::LoadedResult;
use crate::{
    actors::cas::{
        CasActor, LOG,
        client::Cas,
        index::{EntryKind, EntryRef, FoundEntry, Key, Stamp},
        settings::{LOOKUPS_PER_HOLD, LOOKUPS_PER_TURN},
    },
    actors::mail::Receive,
    instance::Instance,
    logging::Event,
    result::SharedResult,
};
use actix::Message;
use gorego_reapi::{digest::Digest, error::Result};
use std::sync::Arc;

/// A file takes at most this many bytes on disk in addition to its length.
const BLOCK_BYTES: u64 = 64 * 1024;

/// The outcome of a look-up without reading files.
pub(crate) enum ResultLookup {
    /// The result is complete. Everything that it references was just renewed.
    Hit(SharedResult),
    /// There is no complete result.
    Miss,
    /// There is a result, but its file, or blobs that were not read since the start, have to be read first.
    Cold(FoundEntry),
    /// The result is complete, but leases leave no room for its blobs, of which this many bytes are not leased.
    NoRoom(u64),
    /// The result is in memory, but refers to more blobs than are looked up in one turn.
    Long(FoundEntry, Arc<LoadedResult>),
}

/// Fact: a stored result references a blob that is no longer stored.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Incomplete {
    pub at: EntryRef,
    pub reason: String,
}

impl Cas {
    /// The full digest of an action that has a result and of which only the hash is known. If several results are
    /// stored under the hash, the digest of the newest one.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub fn action_by_hash(&self, instance: &Instance, like: Digest) -> Result<Option<Digest>> {
        let key = Key { digest: like, instance: instance.id(), kind: EntryKind::Result };
        self.look_up(|index| index.find_by_hash(&key))
    }

    /// Looks a result up without reading any file.
    pub(crate) fn look_up_result(&self, instance: &Instance, action: Digest) -> Result<ResultLookup> {
        let key = Key { digest: action, instance: instance.id(), kind: EntryKind::Result };
        let Some(found) = self.look_up(|index| index.renew(&key))? else { return Ok(ResultLookup::Miss) };
        match self.shared().results.get(&(instance.id(), action)) {
            Some(loaded) if loaded.generation == found.file.generation => {
                if loaded.references.len() > LOOKUPS_PER_TURN {
                    return Ok(ResultLookup::Long(found, loaded));
                }
                self.confirm(instance, found, &loaded, true)
            }
            _ => Ok(ResultLookup::Cold(found)),
        }
    }

    /// Like [`Cas::look_up_result`], for a result that was just read.
    pub(crate) fn confirm_loaded(
        &self,
        instance: &Instance,
        found: FoundEntry,
        loaded: &LoadedResult,
    ) -> Result<Option<SharedResult>> {
        Ok(match self.confirm(instance, found, loaded, false)? {
            ResultLookup::Hit(result) => Some(result),
            ResultLookup::Miss | ResultLookup::NoRoom(_) | ResultLookup::Cold(_) | ResultLookup::Long(..) => {
                None
            }
        })
    }

    /// Checks and renews all references of a result. If one is missing, the result is dropped (AC-03). A result that
    /// was replaced since the look-up is still a valid answer: it was current at the time of the request (AC-08). With
    /// `were_read`, a reference that was not read since the start makes the result a cold one, because its file may be
    /// damaged.
    fn confirm(
        &self,
        instance: &Instance,
        found: FoundEntry,
        loaded: &LoadedResult,
        were_read: bool,
    ) -> Result<ResultLookup> {
        if !loaded.is_hit {
            return Ok(ResultLookup::Miss);
        }
        if self.may_lack_leases(loaded)? {
            let mut wanted = 0;
            for part in loaded.references.chunks(LOOKUPS_PER_HOLD) {
                wanted += self.unleased_bytes(instance, part)?;
            }
            if self.lacks_leases(wanted)? {
                return Ok(ResultLookup::NoRoom(wanted));
            }
        }
        let mut all_were_read = true;
        for part in loaded.references.chunks(LOOKUPS_PER_HOLD) {
            let lost = self.look_up(|index| {
                part.iter().copied().find(|&digest| {
                    let blob = index.renew_blob(instance.blobs(), digest);
                    all_were_read &= blob.is_none_or(|blob| blob.stamp != Stamp::UNTRUSTED);
                    blob.is_none()
                })
            })?;
            if let Some(lost) = lost {
                // If the result was replaced meanwhile, this drops nothing.
                self.drop_result(found.at, format!("blob {lost} is gone"));
                return Ok(ResultLookup::Miss);
            }
        }
        if were_read && !all_were_read {
            return Ok(ResultLookup::Cold(found));
        }
        self.link(instance, found.at, loaded)?;
        Ok(ResultLookup::Hit(loaded.result.clone()))
    }

    /// Whether there may be no room to lease the blobs of a result. Cheap, and almost always false.
    pub(crate) fn may_lack_leases(&self, loaded: &LoadedResult) -> Result<bool> {
        let blocks = (loaded.references.len() as u64).saturating_mul(BLOCK_BYTES);
        self.lacks_leases(loaded.bytes.saturating_add(blocks))
    }

    /// Whether there is no room to lease this many bytes. Entries that are leased already can always be leased again.
    pub(crate) fn lacks_leases(&self, bytes: u64) -> Result<bool> {
        Ok(bytes > 0 && self.look_up(|index| index.lacks_leases(bytes))?)
    }

    /// The bytes of these blobs that are not leased.
    pub(crate) fn unleased_bytes(&self, instance: &Instance, blobs: &[Digest]) -> Result<u64> {
        self.look_up(|index| index.unleased_bytes(instance.blobs(), blobs))
    }

    /// Drops a result that is no longer complete.
    pub(crate) fn drop_result(&self, at: EntryRef, reason: String) {
        self.shared().view.condemn(at);
        self.actor().do_send(Incomplete { at, reason });
    }
}

impl Receive<Incomplete> for CasActor {
    type Answer = ();

    fn receive(&mut self, Incomplete { at, reason }: Incomplete, ctx: &mut Self::Context) {
        let removed = self.change(|index| index.remove(at));
        if let Some(victim) = removed {
            Event::debug(LOG, "result_dropped")
                .with_shown("action_digest", &victim.file.key.digest)
                .log(format_args!("dropped an action result that is no longer complete: {reason}"));
            self.delete(vec![victim], ctx);
        }
    }
}
