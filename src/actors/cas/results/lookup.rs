//! Look-ups of action results: what is answered from the index and from memory alone.

use super::LoadedResult;
use crate::{
    actors::cas::{
        CasActor, LOG,
        client::Cas,
        index::{EntryRef, Found, Key, Kind, Stamp},
        settings::{LOOKUPS_PER_HOLD, LOOKUPS_PER_TURN},
    },
    actors::mail::Receive,
    instance::Instance,
    logging::Event,
};
use actix::Message;
use gorego_reapi::{digest::Digest, error::Result, proto::reapi};
use std::sync::Arc;

/// What is known of a result.
pub enum ResultLookup {
    /// Complete; everything it references was just renewed.
    Hit(Arc<reapi::ActionResult>),
    /// None, or not complete.
    Miss,
    /// There is one; its file, or blobs of it that nobody has read since the start, have to be read to know more.
    Cold(Found),
    /// It is in memory, and refers to more blobs than are looked up in one turn.
    Long(Found, Arc<LoadedResult>),
}

/// Fact: a stored result references what is not stored any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Incomplete {
    pub at: EntryRef,
    pub reason: String,
}

impl Cas {
    /// The whole digest of an action that has a result, of which only the hash is known. That of the newest result, should
    /// several be stored under one hash.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn action_by_hash(&self, instance: &Instance, like: Digest) -> Result<Option<Digest>> {
        let key = Key { digest: like, instance: instance.id(), kind: Kind::Result };
        self.look_up(|index| index.find_by_hash(&key))
    }

    /// What is known of a result without reading any file.
    pub(crate) fn look_up_result(&self, instance: &Instance, action: Digest) -> Result<ResultLookup> {
        let key = Key { digest: action, instance: instance.id(), kind: Kind::Result };
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

    /// [`Cas::look_up_result`] of a result that was just read.
    pub(crate) fn confirm_loaded(
        &self,
        instance: &Instance,
        found: Found,
        loaded: &LoadedResult,
    ) -> Result<Option<Arc<reapi::ActionResult>>> {
        Ok(match self.confirm(instance, found, loaded, false)? {
            ResultLookup::Hit(result) => Some(result),
            ResultLookup::Miss | ResultLookup::Cold(_) | ResultLookup::Long(..) => None,
        })
    }

    /// A result is a hit if its every reference is stored: all of them are renewed. One that lacks something is dropped
    /// (AC-03). One that was replaced since it was looked up is still an answer: it was the result when it was asked for
    /// (AC-08). With `were_read`, a reference that nobody has read since the start makes the result a cold one: its file may be
    /// bad.
    fn confirm(
        &self,
        instance: &Instance,
        found: Found,
        loaded: &LoadedResult,
        were_read: bool,
    ) -> Result<ResultLookup> {
        if !loaded.is_hit {
            return Ok(ResultLookup::Miss);
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
                // If it was replaced since, there is nothing to drop.
                self.drop_result(found.at, format!("blob {lost} is gone"));
                return Ok(ResultLookup::Miss);
            }
        }
        if were_read && !all_were_read {
            return Ok(ResultLookup::Cold(found));
        }
        Ok(ResultLookup::Hit(loaded.result.clone()))
    }

    /// Drops a result that is not complete any more.
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
                .log(format_args!("dropped an action result that is not complete any more: {reason}"));
            self.delete(vec![victim], ctx);
        }
    }
}
