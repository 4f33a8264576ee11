//! Links results to the blobs that they need: when a result is stored, and when a recovered one is first found
//! complete.
//!
//! The links of a new result are sent in [`Commit`](super::new_files::Commit), and take effect in the step that makes
//! the result visible. If one of its blobs is not stored then, the next look-up notices it.

use super::{
    CasActor, StoreShared,
    client::Cas,
    index::{EntryKind, EntryRef, FileId, Key},
    settings::{CHANGES_PER_HOLD, LOOKUPS_PER_HOLD, MAX_LINKS},
};
use crate::{
    actors::mail::Receive,
    instance::{Instance, InstanceId},
};
use actix::{Context, Message};
use gorego_reapi::{digest::Digest, error::Result};
use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// A result that is to be linked.
pub(crate) trait NeedsBlobs: Debug + Send + Sync {
    /// Every blob that the result needs, each once.
    fn needed(&self) -> &[Digest];

    /// Whether the index has these links.
    fn is_linked(&self) -> &AtomicBool;
}

/// A result that is being stored, every blob of which is known.
pub(crate) trait NewResult: Debug + Send {
    /// Its file is written, and not visible yet.
    fn written(self: Box<Self>, file: FileId, store: &StoreShared) -> NewLinks;
}

/// A result whose file is written, with every blob that it needs.
#[derive(Debug)]
pub(crate) struct NewLinks {
    /// The file of the result.
    pub result: FileId,
    /// The namespace of its blobs.
    pub blobs_in: InstanceId,
    /// The content of the result, which lists the blobs that it needs.
    pub of: Arc<dyn NeedsBlobs>,
}

/// Fact: a stored result needs these stored blobs.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LinkResult {
    pub result: EntryRef,
    pub blobs: Vec<EntryRef>,
}

impl Cas {
    /// Links a result that was just found complete to its blobs, unless it is linked already.
    pub(super) fn link(&self, instance: &Instance, result: EntryRef, of: &dyn NeedsBlobs) -> Result<()> {
        let needed = of.needed();
        if needed.len() > MAX_LINKS || of.is_linked().swap(true, Relaxed) {
            return Ok(());
        }
        let mut blobs = Vec::with_capacity(needed.len());
        for part in needed.chunks(LOOKUPS_PER_HOLD) {
            let places = self.look_up(|index| -> Option<Vec<EntryRef>> {
                part.iter().map(|digest| index.place_of_blob(instance.blobs(), *digest)).collect()
            })?;
            // If a blob was removed just now, the next look-up notices it.
            let Some(places) = places else { return Ok(()) };
            blobs.extend(places);
        }
        self.actor().do_send(LinkResult { result, blobs });
        Ok(())
    }
}

impl CasActor {
    /// Links a result that has just become visible to its blobs, if all of them are stored.
    pub(super) fn link_new(&self, NewLinks { result, blobs_in, of }: NewLinks) {
        let needed = of.needed();
        if needed.len() > MAX_LINKS {
            return;
        }
        let mut blobs = Vec::with_capacity(needed.len());
        let mut rest = needed;
        loop {
            let (part, after) = rest.split_at(rest.len().min(CHANGES_PER_HOLD));
            let key = |&digest| Key { digest, instance: blobs_in, kind: EntryKind::Blob };
            let is_linked = self.change(|index| {
                blobs.extend(part.iter().filter_map(|digest| index.place_of(&key(digest))));
                let all = after.is_empty() && blobs.len() == needed.len();
                let result = index.entry_of(&result).filter(|_| all);
                result.into_iter().for_each(|result| index.link(result, &blobs));
                result.is_some()
            });
            if after.is_empty() {
                return of.is_linked().store(is_linked, Relaxed);
            }
            rest = after;
        }
    }
}

impl Receive<LinkResult> for CasActor {
    type Answer = ();

    fn receive(&mut self, LinkResult { result, blobs }: LinkResult, _: &mut Context<Self>) {
        self.change(|index| index.link(result, &blobs));
    }
}
