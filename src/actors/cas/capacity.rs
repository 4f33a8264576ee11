//! [`Capacity`]: how many bytes the store may take of its file system. Pure.
//!
//! This is the configured limit (`max_size_gb`), unless the file system has less: its size without a margin
//! ([`Space::store_margin`]) and without the bytes that other programs take there. Room, watermarks and leases are
//! computed from it. Otherwise leases could fill a file system that is smaller than the configured limit, and then they
//! would have to be broken.
//!
//! The bytes of others are what is in use on the file system and is not the store's. File systems free the blocks of a
//! deleted file later, some of them after half a minute, and until then these bytes seem to belong to others. So the
//! lowest number of the last [`PERIOD`] or two counts. More space counts at once.
//!
//! Reserved bytes count as the store's, although the last step of each upload is not written yet. The limit is too high
//! by as much for a while, which the margin covers.
//!
//! A measurement is ignored if not even half of the stored bytes would fit, or almost nothing. Then others fill the
//! disk, and evicting would not help; [`super::store_disk`] says what happens instead. While many bytes are being
//! deleted, which can take minutes, the limit does not become lower.

use super::index::StoreLimit;
use crate::disk::Space;
use std::time::{Duration, Instant};

/// The bytes of others count if they were there for one or two of these periods.
const PERIOD: Duration = Duration::from_secs(30);
/// A new limit is worth a log line if it differs from the last logged one by this part of the highest limit.
const LOGGED_PART: u64 = 16;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Capacity {
    configured: u64,
    limit: StoreLimit,
    /// The lowest number of bytes of others in this period and in the one before, and the start of this one. `None`
    /// before the first measurement.
    others: Option<([u64; 2], Instant)>,
    logged: u64,
}

impl Capacity {
    pub(super) fn new(configured: u64) -> Self {
        let limit = StoreLimit { bytes: configured, most: configured };
        Self { configured, limit, others: None, logged: configured }
    }

    /// The limit by the latest measurement.
    pub(super) fn limit(&self) -> StoreLimit {
        self.limit
    }

    /// Records the space of the file system while the store takes `own` bytes of it, and is deleting `deleting` others.
    /// Returns whether the limit is to be logged.
    pub(super) fn see(&mut self, space: Space, own: u64, deleting: u64, now: Instant) -> bool {
        if space.total_bytes == 0 {
            return false;
        }
        let most = space.most_for_store();
        self.limit.most = self.configured.min(most);
        let others = space.total_bytes.saturating_sub(space.free_bytes).saturating_sub(own);
        let is_first = self.others.is_none();
        let fits = self.configured.min(most.saturating_sub(self.lowest(others, now)));
        let is_useful = fits >= (own / 2).max(space.reserve().bytes);
        let is_late = fits < self.limit.bytes && deleting > space.store_margin();
        if is_useful && (is_first || !is_late) {
            self.limit.bytes = fits;
        } else if is_first {
            self.limit.bytes = self.limit.most;
        }
        let is_other = self.limit.bytes.abs_diff(self.logged) >= (self.limit.most / LOGGED_PART).max(1);
        if is_other {
            self.logged = self.limit.bytes;
        }
        is_other
    }

    /// The lowest number of bytes of others in this period and the one before.
    fn lowest(&mut self, others: u64, now: Instant) -> u64 {
        let ([this, before], since) = self.others.unwrap_or(([others; 2], now));
        let age = now.saturating_duration_since(since);
        let kept = if age < PERIOD {
            ([this.min(others), before], since)
        } else if age < 2 * PERIOD {
            ([others, this], now)
        } else {
            ([others; 2], now)
        };
        self.others = Some(kept);
        kept.0[0].min(kept.0[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    /// The size of the disk in these tests.
    const DISK: u64 = 100 * GIB;

    /// A disk on which the store takes `own` bytes and others take `others`.
    fn disk(own: u64, others: u64) -> Space {
        let free_bytes = DISK - own - others;
        Space { free_bytes, total_bytes: DISK, free_inodes: 1 << 30, total_inodes: 0 }
    }

    fn margin() -> u64 {
        disk(0, 0).store_margin()
    }

    #[test]
    fn the_limit_is_what_is_configured_or_what_others_and_a_margin_leave_of_the_disk() {
        let now = Instant::now();
        for (configured, own, others, limit) in [
            (50 * GIB, 0, 0, 50 * GIB),
            (50 * GIB, 40 * GIB, 30 * GIB, 50 * GIB),
            (50 * GIB, 0, 80 * GIB, 20 * GIB - margin()),
            (50 * GIB, 15 * GIB, 80 * GIB, 20 * GIB - margin()),
            (500 * GIB, 0, 0, DISK - margin()),
            (500 * GIB, 70 * GIB, 30 * GIB, 70 * GIB - margin()),
        ] {
            let mut capacity = Capacity::new(configured);
            let is_logged = capacity.see(disk(own, others), own, 0, now);
            assert_eq!(capacity.limit().bytes, limit, "{configured} {own} {others}");
            assert_eq!(capacity.limit().most, configured.min(DISK - margin()));
            assert_eq!(is_logged, limit < configured);
        }
        let mut unknown = Capacity::new(GIB);
        assert!(!unknown.see(Space { total_bytes: 0, free_bytes: 0, ..disk(0, 0) }, 0, 0, now));
        assert_eq!(unknown.limit(), StoreLimit { bytes: GIB, most: GIB });
    }

    /// A store at its limit must not look like one whose disk is low, because then leases would be broken.
    #[test]
    fn the_margin_is_more_than_what_relief_keeps_free() {
        for total_bytes in [8 << 20, 64 << 20, GIB, DISK, 1 << 44] {
            let free_bytes = Space { free_bytes: 0, total_bytes, ..disk(0, 0) }.store_margin();
            assert!(!Space { free_bytes, total_bytes, ..disk(0, 0) }.is_low(), "{total_bytes}");
            assert!(free_bytes <= total_bytes / 4);
        }
    }

    /// Otherwise each eviction would lower the limit, and that would evict more.
    #[test]
    fn bytes_that_a_file_system_frees_late_do_not_lower_the_limit() {
        let (mut capacity, start) = (Capacity::new(500 * GIB), Instant::now());
        let mut at = |seconds, own, others| {
            capacity.see(disk(own, others), own, 0, start + Duration::from_secs(seconds));
            capacity.limit().bytes
        };
        assert_eq!(at(0, 70 * GIB, 10 * GIB), 90 * GIB - margin());
        // 20 GiB are deleted and still take their blocks.
        for second in 1..30 {
            assert_eq!(at(second, 50 * GIB, 30 * GIB), 90 * GIB - margin(), "{second}");
        }
        assert_eq!(at(31, 50 * GIB, 10 * GIB), 90 * GIB - margin());
        // Others stay.
        assert_eq!(at(62, 50 * GIB, 30 * GIB), 90 * GIB - margin());
        assert_eq!(at(93, 50 * GIB, 30 * GIB), 70 * GIB - margin());
        assert_eq!(at(94, 50 * GIB, 5 * GIB), 95 * GIB - margin(), "more space counts at once");
        assert_eq!(at(200, 50 * GIB, 40 * GIB), 60 * GIB - margin(), "nothing was measured for long");
    }

    /// Evictions may take longer than the periods, and would otherwise lower the limit and cause more of them.
    #[test]
    fn the_limit_does_not_become_lower_while_much_is_being_deleted() {
        let (mut capacity, start) = (Capacity::new(500 * GIB), Instant::now());
        let mut at = |seconds, own, deleting, others| {
            capacity.see(disk(own, others), own, deleting, start + Duration::from_secs(seconds));
            capacity.limit().bytes
        };
        assert_eq!(at(0, 70 * GIB, 0, 10 * GIB), 90 * GIB - margin());
        for second in [10, 100, 200, 300] {
            assert_eq!(at(second, 50 * GIB, 20 * GIB, 30 * GIB), 90 * GIB - margin(), "{second}");
        }
        assert_eq!(at(310, 50 * GIB, 20 * GIB, 5 * GIB), 95 * GIB - margin(), "more space counts at once");
        at(400, 50 * GIB, 0, 30 * GIB);
        assert_eq!(at(500, 50 * GIB, 0, 30 * GIB), 70 * GIB - margin());
    }

    #[test]
    fn a_disk_that_others_have_filled_costs_no_entries() {
        let start = Instant::now();
        let mut capacity = Capacity::new(50 * GIB);
        capacity.see(disk(GIB, 99 * GIB), GIB, 0, start);
        assert_eq!(capacity.limit().bytes, GIB - margin(), "half of the store would fit");
        let mut capacity = Capacity::new(50 * GIB);
        capacity.see(disk(margin(), DISK - margin()), margin(), 0, start);
        assert_eq!(capacity.limit().bytes, 50 * GIB, "nothing would fit");
        let mut capacity = Capacity::new(50 * GIB);
        capacity.see(disk(0, DISK - margin() / 2), 0, 0, start);
        assert_eq!(capacity.limit().bytes, 50 * GIB, "an empty store");
        let mut capacity = Capacity::new(500 * GIB);
        capacity.see(disk(margin(), DISK / 2), margin(), 0, start);
        let before = capacity.limit().bytes;
        capacity.see(disk(margin(), DISK - margin()), margin(), 0, start + 3 * PERIOD);
        assert_eq!(capacity.limit().bytes, before);
    }
}
