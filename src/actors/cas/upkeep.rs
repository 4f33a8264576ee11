//! The actor's upkeep: room is found, files are deleted, uses are written down. All file work runs on blocking threads
//! and reports back.

use super::{
    CasActor, LOG,
    guards::Reservation,
    index::{FileId, Victim},
    requests::Deleted,
    settings,
    uploads::Partial,
};
use crate::error::Result;
use actix::{AsyncContext as _, Context};
use std::{fs, future::Future, time::Instant};

impl CasActor {
    /// Finds room, at the cost of broken uploads first and of the least recently used entries then. Without a
    /// future the room is free on disk now, otherwise when the future ends.
    pub(super) fn reserve(
        &mut self,
        bytes: u64,
        ctx: &Context<Self>,
    ) -> Result<(Reservation, Option<impl Future<Output = ()> + use<>>)> {
        // Not for a write that does not fit even so.
        let could_fit = self.index.could_fit(bytes, self.uploads.parked_bytes());
        while could_fit
            && !self.index.has_room(bytes)
            && let Some(partial) = self.uploads.pop_oldest()
        {
            self.discard(partial, ctx);
        }
        let grant = self.index.reserve(bytes)?;
        if !grant.victims.is_empty() {
            log::info!(target: LOG, event = "blobs_evicted", entries = grant.victims.len(),
                bytes = grant.victims.iter().map(|victim| victim.bytes).sum::<u64>();
                "evicted the least recently used entries to make room");
        }
        self.delete(grant.victims, ctx);
        self.trim(ctx);
        Ok((Reservation::new(ctx.address(), bytes), self.deletions(grant.after_deletions)))
    }

    /// Ends when so many bytes, since the start, are deleted; `None` when they are.
    pub(super) fn deletions(&self, goal: u64) -> Option<impl Future<Output = ()> + use<>> {
        (self.index.bytes_deleted() < goal).then(|| {
            let mut deleted = self.deleted.subscribe();
            async move {
                // Ends early only with the actor, and then the write fails by itself.
                let _ = deleted.wait_for(|bytes| *bytes >= goal).await;
            }
        })
    }

    /// Evicts ahead of need.
    pub(super) fn trim(&mut self, ctx: &Context<Self>) {
        let victims = self.index.trim(settings::TRIM_BATCH);
        if !victims.is_empty() {
            log::info!(target: LOG, event = "store_trimmed", entries = victims.len(),
                bytes = victims.iter().map(|victim| victim.bytes).sum::<u64>();
                "evicted the least recently used entries ahead of need");
        }
        self.delete(victims, ctx);
    }

    /// Deletes files that the index has let go.
    pub(super) fn delete(&self, victims: Vec<Victim>, ctx: &Context<Self>) {
        if victims.is_empty() {
            return;
        }
        let (shared, store) = (self.shared.clone(), ctx.address());
        self.shared.runtime.spawn_blocking(move || {
            let failures: Vec<_> = victims
                .iter()
                .filter_map(|victim| fs::remove_file(shared.files.path(&victim.file)).err())
                .filter(|error| error.kind() != std::io::ErrorKind::NotFound)
                .collect();
            if let Some(first) = failures.first() {
                // Their bytes stay on disk until the next start takes them in again.
                log::error!(target: LOG, event = "delete_failed", entries = failures.len(), error = first.to_string();
                    "could not delete the files of evicted entries; look at the rights in the store's directory");
            }
            store.do_send(Deleted(victims.iter().map(|victim| victim.bytes).sum()));
        });
    }

    /// Deletes what a broken upload left.
    pub(super) fn discard(&mut self, partial: Partial, ctx: &Context<Self>) {
        let Partial { sink, room } = partial;
        let (bytes, store) = (room.disarm(), ctx.address());
        self.index.forfeit(bytes);
        self.shared.runtime.spawn_blocking(move || {
            drop(sink);
            store.do_send(Deleted(bytes));
        });
    }

    pub(super) fn housekeeping(&mut self, ctx: &mut Context<Self>) {
        self.write_touches();
        let (now, settings) = (Instant::now(), &self.shared.settings);
        let (retention, limit) = (settings.partial_upload_retention, settings.max_bytes);
        while let Some(partial) = self.uploads.pop_excess(now, retention, limit) {
            self.discard(partial, ctx);
        }
        self.trim(ctx);
        let cas = self.client(ctx);
        self.shared.runtime.spawn(async move { cas.relieve_low_disk().await });
    }

    pub(super) fn touch_later(&mut self, file: FileId) {
        self.touches.push(file);
        if self.touches.len() >= settings::TOUCH_BATCH {
            self.write_touches();
        }
    }

    /// Writes uses down as access times, from which the order of use is recovered at the next start.
    pub(super) fn write_touches(&mut self) {
        use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};
        if self.touches.is_empty() {
            return;
        }
        let (touches, shared) = (std::mem::take(&mut self.touches), self.shared.clone());
        self.shared.runtime.spawn_blocking(move || {
            let at = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
            let times = Timestamps { last_access: at(UTIME_NOW), last_modification: at(UTIME_OMIT) };
            for file in touches {
                // The file may be gone by now, and a lost use only costs a place in the order.
                let _ = utimensat(CWD, shared.files.path(&file), &times, AtFlags::empty());
            }
        });
    }
}
