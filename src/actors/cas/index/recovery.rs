//! Recovery: the index is filled with the files that are found at the start.

use super::{FileId, Index, Stamp, Victim};
use std::sync::atomic::Ordering::Relaxed;

impl Index {
    /// Adds a file that was found at start. If there are two files for one entry, the newer one stays and the other is
    /// returned. `is_newer` says whether its first argument is newer than the second.
    pub(in super::super) fn recover(
        &mut self,
        file: FileId,
        bytes: u64,
        touched: u32,
        is_newer: &dyn Fn(&FileId, &FileId) -> bool,
    ) -> Option<Victim> {
        let loser = match self.slot_of(&file.key) {
            Some(slot) if is_newer(&self.file_at(slot), &file) => {
                self.count_evicted(bytes);
                return Some(Victim { file, bytes });
            }
            Some(slot) => Some(self.remove_slot(slot)),
            None => self.drop_oldest_alike(&file.key),
        };
        self.insert(file, bytes, Stamp::UNTRUSTED, touched);
        loser
    }

    /// Sorts recovered entries by their recorded use, and leases those that were used shortly before. `now` is in seconds since 1970,
    /// and `uptime` is the clock of leases.
    pub(in super::super) fn finish_recovery(&mut self, now: u32, uptime: u32) {
        let mut order: Vec<(u32, u32)> = Vec::with_capacity(self.table.len());
        order.extend(self.table.iter().map(|slot| (self.slab.hot(slot).touched.load(Relaxed), slot)));
        order.sort_unstable();
        self.clear_order();
        for (_, slot) in &order {
            self.link_newest(*slot);
        }
        self.lease_earlier(&order, now, uptime);
    }
}
