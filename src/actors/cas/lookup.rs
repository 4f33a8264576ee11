//! The actor's answers that need nothing but the index and what is in memory.

use super::{
    CasActor,
    client::UploadStatus,
    guards::Lease,
    index::{EntryRef, Found, Key, Kind, Stamp},
    requests::*,
    results::LoadedResult,
    settings::DIGESTS_PER_MESSAGE,
    unix_seconds,
};
use crate::instance::{Instance, InstanceId};
use actix::{AsyncContext as _, Context, Handler, MessageResult};
use gorego_reapi::digest::Digest;
use std::collections::HashSet;

impl CasActor {
    /// Looks an entry up, counts it as used now, and sees to it that this is written down some time.
    pub(super) fn renew(&mut self, key: &Key) -> Option<Found> {
        self.renew_at(key, unix_seconds())
    }

    fn renew_at(&mut self, key: &Key, now: u32) -> Option<Found> {
        let found = self.index.renew(key, now)?;
        if found.touch_due {
            self.touch_later(found);
        }
        Some(found)
    }

    /// Those of these blobs that are not stored, each once; the others are renewed.
    pub(super) fn find_missing(&mut self, instance: InstanceId, digests: &[Digest]) -> Vec<Digest> {
        let now = unix_seconds();
        let mut missing = Vec::new();
        for &digest in digests {
            let key = Key { digest, instance, kind: Kind::Blob };
            // The empty blob is asked about last: it is rare, and to recognise it takes a hash.
            if self.renew_at(&key, now).is_none() && !digest.is_empty() {
                missing.push(digest);
            }
        }
        if missing.len() > 1 {
            let mut seen = HashSet::with_capacity(missing.len());
            missing.retain(|digest| seen.insert(*digest));
        }
        missing
    }

    /// A result is a hit if its every reference is stored: all of them are renewed. One that lacks something is dropped
    /// (AC-03). One that was replaced since it was looked up is still an answer: it was the result when it was asked for
    /// (AC-08). With `were_read`, a reference that nobody has read since the start makes the result a cold one: its file may be
    /// bad.
    fn confirm(
        &mut self,
        instance: &Instance,
        action: Digest,
        loaded: &LoadedResult,
        were_read: bool,
        ctx: &Context<Self>,
    ) -> ResultLookup {
        let now = unix_seconds();
        let key = Key { digest: action, instance: instance.id(), kind: Kind::Result };
        let instance = instance.blobs();
        let found = self.renew_at(&key, now).filter(|found| found.file.generation == loaded.generation);
        if !loaded.is_hit {
            return ResultLookup::Miss;
        }
        let mut all_were_read = true;
        let lost = loaded.references.iter().find(|&&digest| {
            let blob = self.renew_at(&Key { digest, instance, kind: Kind::Blob }, now);
            all_were_read &= blob.is_none_or(|blob| blob.stamp != Stamp::UNTRUSTED);
            blob.is_none()
        });
        match (lost, found) {
            (Some(lost), Some(found)) => {
                self.drop_result(found.at, &format!("blob {lost} is gone"), ctx);
                ResultLookup::Miss
            }
            (Some(_), None) => ResultLookup::Miss,
            (None, Some(found)) if were_read && !all_were_read => ResultLookup::Cold(found),
            (None, _) => ResultLookup::Hit(loaded.result.clone()),
        }
    }

    /// Drops a result that is not complete any more.
    pub(super) fn drop_result(&mut self, at: EntryRef, reason: &str, ctx: &Context<Self>) {
        if let Some(victim) = self.index.remove(at) {
            log::debug!(target: super::LOG, event = "result_dropped",
                action_digest = victim.file.key.digest.to_string();
                "dropped an action result that is not complete any more: {reason}");
            self.delete(vec![victim], ctx);
        }
    }

    /// What is known of a result without reading any file.
    pub(super) fn look_up_result(
        &mut self,
        instance: &Instance,
        action: Digest,
        ctx: &Context<Self>,
    ) -> ResultLookup {
        let key = Key { digest: action, instance: instance.id(), kind: Kind::Result };
        let Some(found) = self.renew(&key) else { return ResultLookup::Miss };
        match self.shared.results.get(&(instance.id(), action)) {
            Some(loaded) if loaded.generation == found.file.generation => {
                if loaded.references.len() > DIGESTS_PER_MESSAGE {
                    return ResultLookup::Long(found, loaded);
                }
                self.confirm(instance, action, &loaded, true, ctx)
            }
            _ => ResultLookup::Cold(found),
        }
    }
}

impl Handler<FindMissing> for CasActor {
    type Result = MessageResult<FindMissing>;

    fn handle(&mut self, message: FindMissing, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.find_missing(message.instance, &message.digests))
    }
}

impl Handler<KnownStamp> for CasActor {
    type Result = MessageResult<KnownStamp>;

    fn handle(&mut self, KnownStamp(at): KnownStamp, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.index.stamp(at))
    }
}

impl Handler<FindByHash> for CasActor {
    type Result = MessageResult<FindByHash>;

    fn handle(&mut self, FindByHash(like): FindByHash, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.index.find_by_hash(&like))
    }
}

impl Handler<Locate> for CasActor {
    type Result = MessageResult<Locate>;

    fn handle(&mut self, message: Locate, ctx: &mut Self::Context) -> Self::Result {
        let now = unix_seconds();
        let mut leased = Vec::new();
        let mut locate = |kind| -> Vec<Option<Found>> {
            let found = message.digests.iter().map(|&digest| {
                let key = Key { digest, instance: message.instance, kind };
                if !message.lease {
                    return self.renew_at(&key, now);
                }
                let found = self.index.lease(&key, now)?;
                leased.push(found.at);
                if found.touch_due {
                    self.touch_later(found);
                }
                Some(found)
            });
            found.collect()
        };
        // The forms first: so a form is always older than its blob, and is evicted before it.
        let zstd = if message.zstd { locate(Kind::Zstd) } else { Vec::new() };
        let found = locate(Kind::Blob);
        MessageResult(Located { found, zstd, lease: Lease::new(ctx.address(), leased) })
    }
}

impl Handler<QueryUpload> for CasActor {
    type Result = MessageResult<QueryUpload>;

    fn handle(&mut self, message: QueryUpload, _: &mut Self::Context) -> Self::Result {
        MessageResult(match self.renew(&message.blob) {
            Some(_) => UploadStatus { committed: message.blob.digest.size(), complete: true },
            None => UploadStatus { committed: self.uploads.committed(message.name), complete: false },
        })
    }
}

impl Handler<LookupResult> for CasActor {
    type Result = MessageResult<LookupResult>;

    fn handle(&mut self, message: LookupResult, ctx: &mut Self::Context) -> Self::Result {
        MessageResult(self.look_up_result(&message.instance, message.action, ctx))
    }
}

impl Handler<ConfirmResult> for CasActor {
    type Result = MessageResult<ConfirmResult>;

    fn handle(&mut self, message: ConfirmResult, ctx: &mut Self::Context) -> Self::Result {
        let ConfirmResult { instance, action, loaded } = message;
        MessageResult(match self.confirm(&instance, action, &loaded, false, ctx) {
            ResultLookup::Hit(result) => Some(result),
            ResultLookup::Miss | ResultLookup::Cold(_) | ResultLookup::Long(..) => None,
        })
    }
}

impl Handler<Incomplete> for CasActor {
    type Result = ();

    fn handle(&mut self, Incomplete { at, reason }: Incomplete, ctx: &mut Self::Context) {
        self.drop_result(at, &reason, ctx);
    }
}
