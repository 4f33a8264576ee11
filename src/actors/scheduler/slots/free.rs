//! [`FreeSlots`]: the free slots of one pool, and which of them is used next.
//!
//! The slot that has been free for longest is next: its runner had the most time to prepare a sandbox. A slot that
//! failed its last task comes after all others, because a broken slot fails at once and would otherwise be free first
//! each time.

use crate::actors::worker::messages::SlotId;
use std::collections::VecDeque;

/// The free slots of a pool.
#[derive(Debug)]
pub(super) struct FreeSlots {
    /// Slots that completed their last task, or had none. The first one is next.
    sound: VecDeque<SlotId>,
    /// Slots that failed their last task.
    suspect: VecDeque<SlotId>,
}

impl FreeSlots {
    /// All slots of a pool of this size.
    pub(super) fn new(slots: usize) -> Self {
        Self { sound: (0..slots).map(SlotId).collect(), suspect: VecDeque::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.sound.len() + self.suspect.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn take(&mut self) -> Option<SlotId> {
        self.sound.pop_front().or_else(|| self.suspect.pop_front())
    }

    pub(super) fn put(&mut self, slot: SlotId, failed: bool) {
        let slots = if failed { &mut self.suspect } else { &mut self.sound };
        slots.push_back(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slot_that_was_free_for_longest_is_next() {
        let mut free = FreeSlots::new(2);
        let first = free.take().unwrap();
        free.put(first, false);
        let second = free.take().unwrap();
        assert_ne!(second, first);
        free.put(second, false);
        assert_eq!(free.take(), Some(first));
    }

    #[test]
    fn a_slot_that_failed_is_used_only_when_no_other_is_free() {
        let mut free = FreeSlots::new(2);
        let broken = free.take().unwrap();
        free.put(broken, true);
        for _ in 0..3 {
            let slot = free.take().unwrap();
            assert_ne!(slot, broken);
            free.put(slot, false);
        }
        assert!(free.take().is_some());
        assert_eq!(free.take(), Some(broken));
        free.put(broken, false);
        assert_eq!(free.take(), Some(broken));
        assert!(free.is_empty());
    }
}
