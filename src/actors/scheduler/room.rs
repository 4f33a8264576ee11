//! [`Room`]: what waits and what it weighs, in all and by build, and whether one more task of a build may come in.
//!
//! It owns the bound of the queue. First come, first served would be no bound at all for the second who comes: a build of
//! 50,000 actions would take every place, and take each one that gets free, because it asks most often. So a build is admitted
//! only while what it has is less than [`SHARE`] times what is free. It need not be known how many builds there are or will be:
//! the more of them take room, the less is free, and the less each may have. One that has nothing gets the last place.
//!
//! Pure counting, O(1) each. Nothing is taken away from a build that has more than its share because others came later; it
//! gets no more until enough of its tasks have run, so that the places which get free go to the others. Builds are what clients
//! call so: one that gives each of its requests another name gets round this, and has the whole queue, no more.

use super::{
    queue::Build,
    settings::{QUEUE_FULL_RETRY, SchedulerSettings},
};
use crate::error::{Error, Result};
use std::collections::HashMap;

/// How many times as much as what is free a build may have. Alone it fills 8/9 of a large queue, so that little of the queue
/// is idle; two fill 8/17 each, and `n` of them leave one part in `8 n + 1`. A queue of up to this many places fills
/// completely.
pub const SHARE: usize = 8;

/// What tasks take up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Tasks that are not running.
    pub waiting: usize,
    /// What the actions weigh, in bytes; those that are running too.
    pub weight: usize,
}

/// See the file's head.
#[derive(Debug, PartialEq, Eq)]
pub struct Room {
    size: usize,
    bytes: usize,
    all: Load,
    /// Those that have something.
    builds: HashMap<Build, Load>,
}

impl Room {
    /// Empty, within `queue_size` and `queue_bytes`.
    pub fn new(settings: &SchedulerSettings) -> Self {
        Self {
            size: settings.queue_size,
            bytes: settings.queue_bytes,
            all: Load::default(),
            builds: HashMap::new(),
        }
    }

    /// What there is in all.
    pub fn all(&self) -> Load {
        self.all
    }

    /// What a build has.
    pub fn of(&self, build: Build) -> Load {
        self.builds.get(&build).copied().unwrap_or_default()
    }

    /// Whether one more task, of this weight, may come in for this build.
    ///
    /// # Errors
    /// `Exhausted`, which says whether there is no room or the build has its share of it (GEN-21).
    pub fn check(&self, build: Build, weight: usize) -> Result<()> {
        let (all, own) = (self.all, self.of(build));
        let places = self.size.saturating_sub(all.waiting);
        let bytes = self.bytes.saturating_sub(all.weight);
        let refusal = if places == 0 {
            format!("the queue is full: {} actions wait for a worker (execution.queue_size)", all.waiting)
        } else if weight > bytes {
            format!(
                "the queue is full: its actions would take {} bytes of memory, more than {}",
                all.weight.saturating_add(weight),
                self.bytes
            )
        } else if own.waiting >= places.saturating_mul(SHARE) {
            format!(
                "this build has its share of the queue: {} of its actions wait for a worker; the {places} places that \
                 are free, of {} (execution.queue_size), are for other builds",
                own.waiting, self.size
            )
        } else if own.weight >= bytes.saturating_mul(SHARE) {
            format!(
                "this build has its share of the queue: its actions take {} bytes of memory; the {bytes} that are \
                 free, of {}, are for other builds",
                own.weight, self.bytes
            )
        } else {
            return Ok(());
        };
        Err(Error::Exhausted {
            message: format!("{refusal}; try again in {} s", QUEUE_FULL_RETRY.as_secs()),
            retry_after: Some(QUEUE_FULL_RETRY),
        })
    }

    /// Counts for a build. What was admitted once, and waits again or counts for somebody else now, may exceed the bounds.
    pub fn add(&mut self, build: Build, load: Load) {
        self.all.add(load);
        self.builds.entry(build).or_default().add(load);
    }

    /// Counts it no more.
    pub fn remove(&mut self, build: Build, load: Load) {
        self.all.remove(load);
        let Some(own) = self.builds.get_mut(&build) else { return };
        own.remove(load);
        if *own == Load::default() {
            self.builds.remove(&build);
        }
    }
}

impl Load {
    /// One task that waits, of which the weight is already counted, or goes on to be.
    pub const TURN: Self = Self { waiting: 1, weight: 0 };

    fn add(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_add(other.waiting);
        self.weight = self.weight.saturating_add(other.weight);
    }

    fn remove(&mut self, other: Self) {
        self.waiting = self.waiting.saturating_sub(other.waiting);
        self.weight = self.weight.saturating_sub(other.weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Load = Load { waiting: 1, weight: 10 };

    fn room(queue_size: usize, queue_bytes: usize) -> Room {
        Room::new(&SchedulerSettings { queue_size, queue_bytes, ..SchedulerSettings::default() })
    }

    /// How many more tasks of a build come in.
    fn fill(room: &mut Room, build: u64) -> usize {
        let mut count = 0;
        while room.check(Build(build), ONE.weight).is_ok() {
            room.add(Build(build), ONE);
            count += 1;
        }
        count
    }

    fn refusal(room: &Room, build: u64) -> String {
        let refusal = room.check(Build(build), ONE.weight).unwrap_err();
        assert!(matches!(refusal, Error::Exhausted { retry_after: Some(QUEUE_FULL_RETRY), .. }));
        refusal.to_string()
    }

    /// GEN-21.
    #[test]
    fn a_build_alone_fills_eight_ninths_and_others_find_room() {
        let mut room = room(9_000, usize::MAX);
        assert_eq!(fill(&mut room, 1), 8_000);
        let message = refusal(&room, 1);
        assert!(message.contains("its share") && message.contains("1000 places"), "{message}");
        let others = [2, 3, 4, 5, 6].map(|build| fill(&mut room, build));
        assert_eq!(others, [889, 99, 11, 1, 0], "each finds 8/9 of what is left, whatever it brings");
        assert!(refusal(&room, 6).contains("the queue is full"));
        room.remove(Build(1), ONE);
        assert_eq!(
            [1, 6].map(|build| fill(&mut room, build)),
            [0, 1],
            "who has its share does not take it back"
        );
    }

    #[test]
    fn large_builds_that_come_together_get_the_same() {
        let mut room = room(17_000, usize::MAX);
        for _ in 0..17_000 {
            for build in [Build(1), Build(2)] {
                if room.check(build, ONE.weight).is_ok() {
                    room.add(build, ONE);
                }
            }
        }
        assert_eq!([1, 2].map(|build| room.of(Build(build)).waiting), [8_000; 2]);
        assert!(fill(&mut room, 3) >= 5);
    }

    #[test]
    fn small_queues_fill_completely() {
        for size in 0..=SHARE {
            assert_eq!(fill(&mut room(size, usize::MAX), 1), size);
        }
        assert_eq!(fill(&mut room(SHARE + 1, usize::MAX), 1), SHARE);
    }

    #[test]
    fn room_that_is_given_back_is_free_for_the_same_build_too() {
        let mut room = room(90, usize::MAX);
        fill(&mut room, 1);
        room.remove(Build(1), Load::TURN);
        assert_eq!(fill(&mut room, 1), 1, "one has begun to run");
        for _ in 0..81 {
            room.remove(Build(1), ONE);
        }
        assert_eq!((room.all(), room.of(Build(1)).waiting), (Load::default(), 0));
        assert!(room.builds.is_empty(), "builds that are over are forgotten");
    }

    /// A task that waits again exceeds the bound; nothing wraps, and nobody gets in by that.
    #[test]
    fn what_waits_again_may_exceed_the_bound() {
        let mut room = room(2, usize::MAX);
        fill(&mut room, 1);
        room.add(Build(1), Load::TURN);
        assert!(refusal(&room, 2).contains("the queue is full: 3 actions"));
    }

    #[test]
    fn bytes_are_shared_like_places() {
        let mut room = room(usize::MAX, 9_000);
        assert_eq!(fill(&mut room, 1), 800);
        assert!(refusal(&room, 1).contains("8000 bytes of memory"));
        assert!(fill(&mut room, 2) >= 5);
        fill(&mut room, 3);
        let heavy = room.check(Build(4), 8_000).unwrap_err().to_string();
        assert!(heavy.contains("the queue is full"), "{heavy}");
    }
}
