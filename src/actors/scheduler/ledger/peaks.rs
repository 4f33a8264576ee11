//! [`Peaks`]: how much memory recent actions used, by their target and mnemonic. Pure.
//!
//! Clients send the target and mnemonic of an action. They can send anything, so the recorded memory only decides
//! between pools that are free for an action anyway: if an action ran out of memory in one of them before, another one
//! is chosen. The number of entries is bounded; the entries that were not updated for the longest time are removed
//! first.

use std::collections::{BTreeMap, HashMap};

/// Maximum number of targets and mnemonics that are remembered. Each takes about 100 bytes.
const MAX_PEAKS: usize = 20_000;

/// The hash of a target and a mnemonic in an instance. Entries whose hashes collide are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PeakKey(pub(super) u64);

/// Memory by target and mnemonic.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    peaks: HashMap<PeakKey, NotedPeak>,
    /// The keys in the order of their last update. The numbers are unique.
    order: BTreeMap<u64, PeakKey>,
    notes: u64,
}

#[derive(Debug, Clone, Copy)]
struct NotedPeak {
    bytes: u64,
    noted: u64,
}

impl Peaks {
    /// Records the memory that a run used. A lower value than before reduces the peak only by half of the difference,
    /// so that one small action does not hide the memory use of others.
    pub(super) fn note(&mut self, key: PeakKey, bytes: u64) {
        self.notes += 1;
        let before = self.peaks.get(&key).copied();
        if let Some(before) = before {
            self.order.remove(&before.noted);
        }
        let old = before.map_or(0, |peak| peak.bytes);
        let bytes = if bytes >= old { bytes } else { bytes + (old - bytes) / 2 };
        self.peaks.insert(key, NotedPeak { bytes, noted: self.notes });
        self.order.insert(self.notes, key);
        if self.peaks.len() > MAX_PEAKS
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.peaks.remove(&oldest);
        }
    }

    /// The expected memory; `None` if nothing is known.
    pub(super) fn of(&self, key: PeakKey) -> Option<u64> {
        self.peaks.get(&key).map(|peak| peak.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_rises_at_once_and_falls_by_halves() {
        let mut peaks = Peaks::default();
        let noted = [100, 300, 100, 100, 1_000].map(|bytes| {
            peaks.note(PeakKey(1), bytes);
            peaks.of(PeakKey(1)).unwrap()
        });
        assert_eq!(noted, [100, 300, 200, 150, 1_000]);
        assert_eq!(peaks.of(PeakKey(2)), None);
    }

    #[test]
    fn the_oldest_note_is_forgotten_first() {
        let mut peaks = Peaks::default();
        (0..MAX_PEAKS as u64).for_each(|key| peaks.note(PeakKey(key), 1));
        peaks.note(PeakKey(0), 1);
        peaks.note(PeakKey(u64::MAX), 1);
        assert_eq!((peaks.peaks.len(), peaks.order.len()), (MAX_PEAKS, MAX_PEAKS));
        assert!(peaks.of(PeakKey(1)).is_none() && peaks.of(PeakKey(0)).is_some());
    }
}
