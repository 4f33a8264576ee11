//! [`Peaks`]: how much memory actions have taken lately, by their target and mnemonic. Pure.
//!
//! Clients say which target an action belongs to and what kind it is. They can say anything, so what is learned decides only
//! between pools that are free for an action anyway: an action that has run out of memory in one of them before is given to
//! another. The number of entries is bounded; those that were noted the longest time ago go first.

use std::collections::{BTreeMap, HashMap};

/// Most targets and mnemonics that are remembered. Each takes about 100 bytes.
const MAX_PEAKS: usize = 20_000;

/// A target and a mnemonic in an instance, hashed. Those whose hashes collide count as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PeakKey(pub(super) u64);

/// Memory by target and mnemonic.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    peaks: HashMap<PeakKey, NotedPeak>,
    /// The keys by when they were noted last; the number is unique.
    order: BTreeMap<u64, PeakKey>,
    notes: u64,
}

#[derive(Debug, Clone, Copy)]
struct NotedPeak {
    bytes: u64,
    noted: u64,
}

impl Peaks {
    /// Notes what a run has taken. A lower peak than before is believed by halves, so that one small action does not hide what
    /// others take.
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

    /// What is to be expected; `None` if nothing is known.
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
    fn what_was_noted_the_longest_time_ago_is_forgotten_first() {
        let mut peaks = Peaks::default();
        (0..MAX_PEAKS as u64).for_each(|key| peaks.note(PeakKey(key), 1));
        peaks.note(PeakKey(0), 1);
        peaks.note(PeakKey(u64::MAX), 1);
        assert_eq!((peaks.peaks.len(), peaks.order.len()), (MAX_PEAKS, MAX_PEAKS));
        assert!(peaks.of(PeakKey(1)).is_none() && peaks.of(PeakKey(0)).is_some());
    }
}
