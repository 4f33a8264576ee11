//! [`StoreDisk`]: the file system of the store. It knows whether there is room for writes, and what else the server
//! keeps there.
//!
//! Other programs may fill the file system although the store is within its limit. Then the store is *read-only*:
//! stored entries are served, and uploads and results are refused with a time to try again. A file system counts as
//! full when its free space is below its reserve ([`Space::is_exhausted`]), or when a write has just failed for lack of
//! space, which a quota may also cause. The file system is checked every [`LOOK_PACE`], and more often while space is
//! low, so the store is writable again soon after there is room.
//!
//! Other data that the server keeps on the file system ([`Cas::count_beside`]) counts against the limit of the store,
//! so that one limit applies to all data. It is measured in the background, which takes at most a twentieth of the time
//! of one thread.
//!
//! If the file system is smaller than the limit, or other programs take much of it, the limit is lower ([`Capacity`]).
//! It follows each check.

use super::{
    CasActor, LOG, StoreShared,
    capacity::Capacity,
    client::Cas,
    index::{StoreLimit, Totals},
    settings::{BESIDE_PART, LOOK_PACE, LOOK_PACE_LOW, MEASURE_PACE, PAUSE_PER_MEASUREMENT, WRITES_AFTER},
};
use crate::{disk::Space, logging::Event, size::Size};
use actix::WeakAddr;
use gorego_reapi::error::{Error, Result};
use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// Whether there is room for writes. Pure.
#[derive(Debug, Default)]
struct DiskRoom {
    is_full: bool,
    /// The time of the last write that failed for lack of space.
    failed: Option<Instant>,
    seen: Option<Space>,
}

impl DiskRoom {
    /// Records a sample. Returns whether that changes the answer.
    fn see(&mut self, space: Space, now: Instant) -> bool {
        if space.is_exhausted() {
            // The sample explains why a write has failed. A later sample will show when there is room.
            self.failed = None;
        }
        let has_failed = self.failed.is_some_and(|at| now.saturating_duration_since(at) < WRITES_AFTER);
        let stays_full = self.is_full && (has_failed || !space.has_room());
        self.seen = Some(space);
        let before = std::mem::replace(&mut self.is_full, space.is_exhausted() || stays_full);
        before != self.is_full
    }

    /// Records a write that failed for lack of space. Returns whether that changes the answer.
    fn fail(&mut self, now: Instant) -> bool {
        self.failed = Some(now);
        !std::mem::replace(&mut self.is_full, true)
    }
}

/// Data that the server keeps beside the store.
struct Beside {
    owner: &'static str,
    measure: Arc<dyn Fn() -> u64 + Send + Sync>,
    bytes: u64,
    due: Instant,
}

/// See the module documentation.
pub(super) struct StoreDisk {
    /// The path of the store, for messages.
    root: String,
    max_bytes: u64,
    room: Mutex<DiskRoom>,
    capacity: Mutex<Capacity>,
    is_full: AtomicBool,
    beside: Mutex<Vec<Beside>>,
    beside_bytes: AtomicU64,
}

/// The latest state of the file system of the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct DiskSight {
    /// Whether writes are refused.
    pub is_full: bool,
    /// The latest sample of the free space, if there is one.
    pub space: Option<Space>,
    /// Bytes of other data that the server keeps there, by owner.
    pub beside: Vec<(&'static str, u64)>,
}

impl StoreDisk {
    pub(super) fn new(root: String, max_bytes: u64) -> Self {
        Self {
            root,
            max_bytes,
            room: Mutex::default(),
            capacity: Mutex::new(Capacity::new(max_bytes)),
            is_full: AtomicBool::new(false),
            beside: Mutex::default(),
            beside_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes beside the store that count against its limit. Does not block.
    pub(super) fn beside(&self) -> u64 {
        self.beside_bytes.load(Relaxed).min(self.limit().most / BESIDE_PART)
    }

    /// The limit of the store by the latest measurement. Does not block.
    pub(super) fn limit(&self) -> StoreLimit {
        self.capacity().limit()
    }

    /// Whether there is room for writes. Does not block.
    ///
    /// # Errors
    /// `DiskFull` if there is none.
    pub(super) fn check(&self) -> Result<()> {
        if !self.is_full.load(Relaxed) {
            return Ok(());
        }
        let free = self.room().seen.map_or_else(String::new, |space| format!(": {space}"));
        Err(Error::DiskFull(format!(
            "the disk of this server is full, so it stores nothing until there is room on the file system of {}{free}",
            self.root
        )))
    }

    /// Records the outcome of a write. If it failed for lack of space, the store is read-only for a while.
    pub(super) fn note<T>(&self, outcome: Result<T>) -> Result<T> {
        // A write that was refused because the store is read-only gives no new information.
        if matches!(outcome, Err(Error::DiskFull(_))) && !self.is_full.load(Relaxed) {
            let mut room = self.room();
            if room.fail(Instant::now()) {
                self.tell(&room);
            }
        }
        outcome
    }

    /// Like [`StoreDisk::note`], for an outcome of the volume.
    pub(super) fn note_io<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &outcome {
            let _ = self.note::<()>(Err(Error::io("write", error)));
        }
        outcome
    }

    fn see(&self, space: Space) {
        let mut room = self.room();
        if room.see(space, Instant::now()) {
            self.tell(&room);
        }
    }

    /// Computes the limit of the store from a sample of the file system and the totals at that time.
    pub(super) fn measure_capacity(&self, space: Space, totals: &Totals) {
        // Files that are being deleted are left out. Their blocks may be free by now, and then the bytes of others
        // would seem to be fewer.
        let own = totals.used.saturating_add(totals.reserved).saturating_add(totals.overhead);
        let mut capacity = self.capacity();
        if capacity.see(space, own, totals.deleting, Instant::now()) {
            let limit = capacity.limit().bytes;
            Event::info(LOG, "store_limit_changed")
                .with("limit_bytes", limit)
                .with("max_size_bytes", self.max_bytes)
                .with("disk_bytes", space.total_bytes)
                .with("free_bytes", space.free_bytes)
                .log(format_args!(
                    "the store may take {} now: max_size_gb is {}, and {space} on its file system",
                    Size::from_bytes(limit).rounded(),
                    Size::from_bytes(self.max_bytes).rounded()
                ));
        }
    }

    /// Applies and logs a change.
    fn tell(&self, room: &DiskRoom) {
        self.is_full.store(room.is_full, Relaxed);
        let free = room.seen.map(|space| space.free_bytes).unwrap_or_default();
        let path = &self.root;
        let (mut event, text) = if room.is_full {
            let event = Event::warn(LOG, "store_read_only");
            (event, "its file system is full: what is stored is served, and uploads and results are refused")
        } else {
            (
                Event::info(LOG, "store_writable"),
                "there is room on its file system again: uploads are accepted",
            )
        };
        event
            .with("free_bytes", free)
            .with_shown("path", path)
            .log(format_args!("the store in {path}: {text}"));
    }

    /// Measures the data beside the store whose measurement is due. Blocks. The lock is not held during a measurement,
    /// so others can read the earlier figures.
    fn measure_beside(&self) {
        let start = Instant::now();
        let due: Vec<_> = self
            .lock_beside()
            .iter()
            .enumerate()
            .filter(|(_, it)| start >= it.due)
            .map(|(place, it)| (place, Arc::clone(&it.measure)))
            .collect();
        for (place, measure) in due {
            let start = Instant::now();
            let bytes = measure();
            let due = Instant::now() + MEASURE_PACE.max(start.elapsed() * PAUSE_PER_MEASUREMENT);
            if let Some(it) = self.lock_beside().get_mut(place) {
                (it.bytes, it.due) = (bytes, due);
            }
        }
        let sum = self.lock_beside().iter().map(|it| it.bytes).fold(0, u64::saturating_add);
        self.beside_bytes.store(sum, Relaxed);
    }

    /// Entries are only added, so each keeps its place.
    fn lock_beside(&self) -> MutexGuard<'_, Vec<Beside>> {
        self.beside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn capacity(&self) -> MutexGuard<'_, Capacity> {
        self.capacity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(&self) -> MutexGuard<'_, DiskRoom> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for StoreDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreDisk").field("room", &self.room).finish_non_exhaustive()
    }
}

impl Cas {
    /// Counts other data on the file system of the store against its limit. `measure` returns the bytes that the data
    /// takes, and may block.
    pub fn count_beside(&self, owner: &'static str, measure: impl Fn() -> u64 + Send + Sync + 'static) {
        let beside = Beside { owner, measure: Arc::new(measure), bytes: 0, due: Instant::now() };
        self.shared().disk.lock_beside().push(beside);
    }

    /// The latest state of the file system of the store. Does not wait for measurements.
    pub(crate) fn disk_sight(&self) -> DiskSight {
        let disk = &self.shared().disk;
        let space = disk.room().seen;
        let beside = disk.lock_beside().iter().map(|it| (it.owner, it.bytes)).collect();
        DiskSight { is_full: disk.is_full.load(Relaxed), space, beside }
    }

    /// If the store is read-only, checks whether there is room by now.
    pub(super) async fn look_at_full_disk(&self) -> Result<()> {
        if self.is_read_only() {
            let shared = self.shared().clone();
            let looked = self.blocking(move || {
                if let Ok(space) = shared.volume.space() {
                    shared.disk.see(space);
                }
            });
            looked.await?;
        }
        Ok(())
    }

    /// Whether uploads and results are refused because the file system of the store is full.
    pub fn is_read_only(&self) -> bool {
        self.shared().disk.is_full.load(Relaxed)
    }
}

/// Checks the file system of the store for as long as the store is open, and relieves it when it has become full.
pub(super) async fn watch(shared: Weak<StoreShared>, store: WeakAddr<CasActor>) {
    let mut was_full = false;
    loop {
        let Some((shared, store)) = shared.upgrade().zip(store.upgrade()).filter(|(_, it)| it.connected())
        else {
            return;
        };
        let cas = Cas::new(store, shared);
        let here = cas.clone();
        let looked = cas.blocking(move || {
            let shared = here.shared();
            let space = shared.volume.space().ok().inspect(|space| {
                shared.disk.measure_capacity(*space, &shared.view.measure().totals);
                shared.disk.see(*space);
            });
            // This may take seconds, so a full disk is noticed before.
            shared.disk.measure_beside();
            space
        });
        let space = looked.await.ok().flatten();
        let is_full = cas.is_read_only();
        if is_full && !was_full {
            let relieving = cas.clone();
            tokio::spawn(async move { relieving.relieve_low_disk().await });
        }
        was_full = is_full;
        drop(cas);
        let is_low = space.is_some_and(|space| space.is_low());
        tokio::time::sleep(if is_low { LOOK_PACE_LOW } else { LOOK_PACE }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn space(free_bytes: u64) -> Space {
        Space { free_bytes, total_bytes: 1 << 40, free_inodes: 1 << 20, total_inodes: 1 << 21 }
    }

    #[test]
    fn a_full_disk_is_full_until_there_is_room_and_a_failed_write_counts_for_a_while() {
        let (mut room, start) = (DiskRoom::default(), Instant::now());
        let reserve = space(0).reserve().bytes;
        assert!(!room.see(space(reserve), start) && !room.is_full);
        assert!(room.see(space(reserve - 1), start) && room.is_full);
        assert!(!room.see(space(reserve), start) && room.is_full, "a little is not enough");
        assert!(room.see(space(2 * reserve), start) && !room.is_full);
        // With a quota, a write may fail although the file system has room.
        assert!(room.fail(start) && room.is_full);
        assert!(!room.see(space(1 << 39), start + WRITES_AFTER - Duration::from_millis(1)) && room.is_full);
        assert!(room.see(space(1 << 39), start + WRITES_AFTER) && !room.is_full);
        // A failed write on a full disk has no effect once the disk has room.
        assert!(room.fail(start) && !room.see(space(0), start) && room.is_full);
        assert!(room.see(space(2 * reserve), start) && !room.is_full);
    }
}
