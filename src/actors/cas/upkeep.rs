//! The actor's upkeep: it reserves room, deletes files and records uses. All file work runs on blocking threads and
//! reports back.

use super::{
    CasActor, LOG, StoreShared,
    deletions::{self, Deleted},
    guards::{Reservation, ReserveRoom, Unreserve},
    index::{EntryRef, FileId, HoldBudget, Stamp, Totals, Victim},
    reply::StoreReply,
    settings,
    uploads::Partial,
    uptime_seconds,
    volume::Moved,
};
use crate::{actors::mail::Receive, logging::Event};
use actix::{Addr, AsyncContext as _, Context, Message};
use gorego_reapi::error::{DISK_FULL_RETRY, Error, Result};
use std::{future::Future, time::Instant};
use tokio::{sync::oneshot, task::JoinHandle};

/// Fact: the server itself moved the change times of these files. Their content did not change.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Touched(pub Vec<Touch>);

/// A change of one file's stamp.
pub struct Touch {
    pub at: EntryRef,
    pub before: Stamp,
    pub after: Stamp,
}

impl CasActor {
    /// Reserves `bytes`. Broken uploads are discarded for it first, then the least recently used entries are evicted.
    /// Fails if the total of `of` bytes cannot fit, or if entries would have to be evicted while the bytes of earlier
    /// evictions cannot be reclaimed. If a future is returned, the room is free on disk when it ends,
    /// otherwise now. A write that has already reserved much (`held`) leaves some of the free disk space to others.
    pub(super) fn reserve(
        &mut self,
        bytes: u64,
        of: u64,
        held: u64,
        ctx: &Context<Self>,
    ) -> Result<(Reservation, Option<impl Future<Output = ()> + use<>>)> {
        self.shared.disk.check()?;
        // Nothing is evicted for a write that would not fit even then.
        let parked = self.uploads.parked_bytes();
        self.ease_leases(of.max(bytes), None);
        self.change(|index| index.check_fit(of.max(bytes), parked))?;
        while !self.change(|index| index.has_room(bytes))
            && let Some(partial) = self.uploads.pop_for_room()
        {
            self.discard(partial, ctx);
        }
        if self.shared.reclaims_in_vain() {
            let overhead = self.shared.note_overhead();
            if !self.change(|index| index.has_room(bytes)) {
                self.compact(ctx);
                return Err(not_reclaimed(bytes, overhead));
            }
        }
        let mut victims = in_parts(|budget| self.change(|index| index.evict_for(bytes, budget)));
        let is_large = held.saturating_add(bytes) > settings::SMALL_WRITE_BYTES;
        let grant = self.change(|index| index.reserve_beside(bytes, is_large));
        victims.extend(grant.iter().flat_map(|grant| &grant.victims));
        self.evict(victims, ctx);
        let grant = grant?;
        self.trim(ctx);
        Ok((Reservation::new(ctx.address(), bytes), self.deletions(grant.after_deletions)))
    }

    /// Deletes entries that were evicted to make room.
    pub(super) fn evict(&self, victims: Vec<Victim>, ctx: &Context<Self>) {
        if !victims.is_empty() {
            Event::info(LOG, "blobs_evicted")
                .with("entries", victims.len())
                .with("bytes", victims.iter().map(|victim| victim.bytes).sum::<u64>())
                .log(format_args!("evicted the least recently used entries to make room"));
        }
        self.delete(victims, ctx);
    }

    /// A future that ends once `goal` bytes have been deleted since the start; `None` if they already are.
    pub(super) fn deletions(&self, goal: u64) -> Option<impl Future<Output = ()> + use<>> {
        let deleted = self.change(|index| index.bytes_deleted());
        (deleted < goal).then(|| {
            let mut deleted = self.deleted.subscribe();
            async move {
                // It ends early only if the actor stops, and then the write fails anyway.
                let _ = deleted.wait_for(|bytes| *bytes >= goal).await;
            }
        })
    }

    /// Evicts ahead of need.
    pub(super) fn trim(&mut self, ctx: &Context<Self>) {
        let overhead = self.shared.note_overhead();
        if self.shared.reclaims_in_vain() {
            return;
        }
        let Totals { pinned, limit, .. } = self.change(|index| index.totals());
        if pinned.saturating_add(overhead) > limit {
            // Files that were deleted shortly before a power cut may be back. Without this, leases would keep all of
            // them.
            self.ease_leases(0, None);
        }
        let mut left = settings::TRIM_BATCH;
        let victims = in_parts(|budget| {
            if left == 0 {
                return Vec::new();
            }
            let part = self.change(|index| index.trim(budget));
            left = left.saturating_sub(part.len());
            part
        });
        if !victims.is_empty() {
            Event::info(LOG, "store_trimmed")
                .with("entries", victims.len())
                .with("bytes", victims.iter().map(|victim| victim.bytes).sum::<u64>())
                .log(format_args!("evicted the least recently used entries ahead of need"));
        }
        self.delete(victims, ctx);
    }

    /// Deletes evicted or replaced files.
    pub(super) fn delete(&self, victims: Vec<Victim>, ctx: &Context<Self>) {
        if !victims.is_empty() {
            drop(self.delete_and_tell(victims, ctx));
        }
    }

    /// Deletes files. The returned receiver gets the files that could not be deleted, once the others are.
    pub(super) fn delete_and_tell(
        &self,
        victims: Vec<Victim>,
        ctx: &Context<Self>,
    ) -> oneshot::Receiver<Vec<FileId>> {
        let mut victims = victims;
        victims.extend(self.change(|index| index.take_followed()));
        deletions::delete(&self.shared, ctx.address(), victims)
    }

    /// Deletes the bytes of a broken upload.
    pub(super) fn discard(&mut self, partial: Partial, ctx: &Context<Self>) {
        let Partial { sink, room } = partial;
        let (bytes, store) = (room.into_reservation().disarm(), ctx.address());
        self.change(|index| index.forfeit(bytes));
        self.shared.runtime.spawn_blocking(move || {
            drop(sink);
            store.do_send(Deleted(bytes));
        });
    }

    /// Deletes the broken uploads that exceed a bound.
    pub(super) fn discard_excess(&mut self, ctx: &Context<Self>) {
        let (now, settings) = (Instant::now(), &self.shared.settings);
        let (retention, limit) = (settings.partial_upload_retention, self.shared.disk.limit().bytes);
        while let Some(partial) = self.uploads.pop_excess(now, retention, limit) {
            self.discard(partial, ctx);
        }
    }

    pub(super) fn housekeeping(&mut self, ctx: &mut Context<Self>) {
        self.write_touches(ctx.address());
        self.discard_excess(ctx);
        self.change(|index| index.expire_leases(uptime_seconds()));
        self.ease_leases(0, None);
        self.trim(ctx);
        self.compact(ctx);
        let (cas, shared) = (self.client(ctx), self.shared.clone());
        self.shared.runtime.spawn_blocking(move || shared.volume.delete_again());
        self.shared.runtime.spawn(async move { cas.relieve_low_disk().await });
    }

    /// Records uses on disk, from which the next start recovers the order of use. Returns the job that does it, if
    /// there is anything to record.
    pub(super) fn write_touches(&self, actor: Addr<Self>) -> Option<JoinHandle<()>> {
        let (touches, shared) = (self.shared.view.take_touches(), self.shared.clone());
        if touches.is_empty() {
            return None;
        }
        Some(self.shared.runtime.spawn_blocking(move || {
            let files: Vec<FileId> = touches.iter().map(|found| found.file).collect();
            shared.volume.touch(&files, &mut |moved| {
                let of_entry = |Moved { at, before, after }| {
                    touches.get(at).map(|found| Touch { at: found.at, before, after })
                };
                actor.do_send(Touched(moved.into_iter().filter_map(of_entry).collect()));
            });
        }))
    }
}

impl StoreShared {
    /// Tells the index its limit, and how many bytes the store takes beyond those of its entries. Returns this number.
    fn note_overhead(&self) -> u64 {
        let overhead = self.volume.overhead().saturating_add(self.disk.beside());
        let limit = self.disk.limit();
        self.view.change(|index| {
            index.set_overhead(overhead);
            index.set_limit(limit);
        });
        overhead
    }

    /// Checks, once the deletions for a reservation of `bytes` are over, that they have freed its room. They have not
    /// if the bytes of the deleted blobs could not be reclaimed.
    ///
    /// # Errors
    /// `Exhausted` if the store would take more than its limit.
    fn check_reclaimed(&self, bytes: u64) -> Result<()> {
        if !self.reclaims_in_vain() {
            return Ok(());
        }
        let overhead = self.note_overhead();
        if self.view.change(|index| index.exceeds_room()) {
            Err(not_reclaimed(bytes, overhead))
        } else {
            Ok(())
        }
    }
}

impl Receive<ReserveRoom> for CasActor {
    type Answer = StoreReply<Result<Reservation>>;

    fn receive(&mut self, request: ReserveRoom, ctx: &mut Self::Context) -> Self::Answer {
        let ReserveRoom { bytes, of, held, blob } = request;
        if let Some(blob) = blob.filter(|blob| self.renew(blob).is_some()) {
            let problem = format!("blob {} was stored by another upload meanwhile", blob.digest);
            return StoreReply::Now(Err(Error::Unavailable(problem)));
        }
        match self.reserve(bytes, of, held, ctx) {
            Ok((room, None)) => StoreReply::Now(Ok(room)),
            Ok((room, Some(free))) => {
                let shared = self.shared.clone();
                StoreReply::Later(Box::pin(async move {
                    free.await;
                    shared.check_reclaimed(bytes).map(|()| room)
                }))
            }
            Err(error) => StoreReply::Now(Err(error)),
        }
    }
}

impl Receive<Unreserve> for CasActor {
    type Answer = ();

    fn receive(&mut self, Unreserve(bytes): Unreserve, _: &mut Self::Context) {
        self.change(|index| index.unreserve(bytes));
    }
}

impl Receive<Deleted> for CasActor {
    type Answer = ();

    fn receive(&mut self, Deleted(bytes): Deleted, ctx: &mut Self::Context) {
        let deleted = self.change(|index| {
            index.deleted(bytes);
            index.bytes_deleted()
        });
        self.deleted.send_replace(deleted);
        self.trim(ctx);
        self.compact(ctx);
    }
}

impl Receive<Touched> for CasActor {
    type Answer = ();

    fn receive(&mut self, Touched(touches): Touched, _: &mut Self::Context) {
        self.change(|index| {
            for Touch { at, before, after } in touches {
                index.follow(at, before, after);
            }
        });
    }
}

/// The error for a write that has no room until deleted blobs are reclaimed.
fn not_reclaimed(wanted: u64, overhead: u64) -> Error {
    Error::Exhausted {
        message: format!(
            "no room for {wanted} bytes: {overhead} bytes of the store are taken by deleted blobs that could not be \
             reclaimed, and by files beside the blobs; the server goes on trying; if the log has compaction_failed, it \
             says why"
        ),
        retry_after: Some(DISK_FULL_RETRY),
    }
}

/// Evicts in parts, each under one hold of the lock that look-ups share, until a part does not use up its budget.
pub(super) fn in_parts(mut part: impl FnMut(&mut HoldBudget) -> Vec<Victim>) -> Vec<Victim> {
    let mut victims = Vec::new();
    loop {
        let mut budget = HoldBudget::new(settings::CHANGES_PER_HOLD);
        victims.extend(part(&mut budget));
        if !budget.is_used_up() {
            return victims;
        }
    }
}
