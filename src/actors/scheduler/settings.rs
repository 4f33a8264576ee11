//! [`SchedulerSettings`]: every bound that the scheduler keeps, by name.

use crate::{node::NodeName, platform::UnknownProperties};
use std::time::{Duration, Instant, SystemTime};

pub use crate::action::Priorities;

/// How long a client is asked to wait when the queue is full (GEN-21). Long enough that a crowd of waiting clients does not
/// become a load of its own, short against the run time of most actions.
pub const QUEUE_FULL_RETRY: Duration = Duration::from_secs(5);

/// The part of the settings that an operator chooses. `server.rs` fills it from the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// The name of this server, for the names of its operations.
    pub node: NodeName,
    /// Tasks that may wait for a slot.
    pub queue_size: usize,
    /// The range of effective priorities.
    pub priorities: Priorities,
    /// How long a task waits until it gains one step of priority.
    pub priority_ageing: Duration,
    /// The treatment of platform properties that no pool offers.
    pub unknown_properties: UnknownProperties,
    /// How long a task may wait for a slot.
    pub queue_timeout: Duration,
    /// Time limit for bringing in inputs, and again for storing outputs.
    pub transfer_timeout: Duration,
    /// How long finished operations are remembered.
    pub retention: Duration,
    /// How many finished operations are remembered.
    pub retained_operations: usize,
    /// How long an operation that nobody follows goes on.
    pub abandon_grace: Duration,
    /// The same if a followed task waits for its slot, or the server stops.
    pub contended_abandon_grace: Duration,
    /// How often a task is tried when its workers fail.
    pub max_attempts: u32,
}

#[cfg(test)]
impl Default for SchedulerSettings {
    fn default() -> Self {
        Self::new(SchedulerConfig {
            node: NodeName::default(),
            queue_size: 20_000,
            priorities: Priorities { min: -100, max: 100 },
            priority_ageing: Duration::from_secs(60),
            unknown_properties: UnknownProperties::Ignore,
            queue_timeout: Duration::from_secs(12 * 3600),
            transfer_timeout: Duration::from_secs(1800),
            retention: Duration::from_secs(600),
            retained_operations: 20_000,
            abandon_grace: Duration::from_secs(60),
            contended_abandon_grace: Duration::from_secs(2),
            max_attempts: 3,
        })
    }
}

/// The bounds of the scheduler. Each one is there so that nothing grows or waits for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// The name of this server, for the names of its operations.
    pub node: NodeName,
    /// Tasks that may wait for a slot, those whose inputs are still being checked included; peers and their builds share these
    /// places ([`Room`](super::room::Room)). A requeued task may exceed it: it was admitted once, and there are never more of
    /// them than slots.
    pub queue_size: usize,
    /// Memory that the actions of all tasks may take, in bytes. A task is a few KiB as a rule, but its Command may be 16 MiB,
    /// and any number of actions may name the same one. Shared like the places.
    pub queue_bytes: usize,
    /// Unfinished operations, however many share a task; peers share these places. Joining a task takes no room in the queue,
    /// so that it needs a bound of its own.
    pub unfinished_operations: usize,
    /// Input checks at the CAS at the same time. More of them would only queue there.
    pub concurrent_checks: usize,
    /// The priorities that count.
    pub priorities: Priorities,
    /// How long a task waits until it gains one step of priority.
    pub priority_ageing: Duration,
    /// What becomes of actions that ask for a property of which no pool says anything.
    pub unknown_properties: UnknownProperties,
    /// How long a task may wait, counted again after each requeue.
    pub queue_timeout: Duration,
    /// How long bringing in inputs may take, and again how long storing outputs may.
    pub transfer_timeout: Duration,
    /// What a run may take on top of its transfers and its own timeout before it is taken for lost: workspace set-up,
    /// killing a command that timed out, a busy machine. The worker keeps its own limits; this is only the last resort.
    pub run_slack: Duration,
    /// How long a run that was told to stop may go on before its slot is reported as stuck and shutdown no longer waits.
    pub stop_grace: Duration,
    /// How long finished operations are remembered (EXE-14).
    pub retention: Duration,
    /// How many finished operations are remembered; the oldest are forgotten first.
    pub retained_operations: usize,
    /// Bytes of results and requests in the finished operations that are remembered; the oldest are forgotten first. A result
    /// may be 4 MiB, and as many of those as there may be operations are no machine's memory.
    pub retained_bytes: usize,
    /// How long operations are remembered that were over at once: answered from the cache, or of an action that cannot run.
    /// Only a stream that broke before its single message needs them; who comes later asks again and gets the same answer.
    pub cached_retention: Duration,
    /// How many operations answered from the cache are remembered, and as many again whose action cannot run. Both have bounds
    /// of their own, so that a flood of them cannot push out results that took work.
    pub retained_cached: usize,
    /// The same as `retained_bytes`, for each of the two.
    pub retained_cached_bytes: usize,
    /// How long an operation that nobody follows goes on (EXE-14).
    pub abandon_grace: Duration,
    /// How long a task that nobody follows goes on when a followed one waits for its slot, or the server stops; never more
    /// than `abandon_grace`. Long enough for a client that lost its connection to come back.
    pub contended_abandon_grace: Duration,
    /// How often a task is tried when workers fail under it (EXE-62); at least 1.
    pub max_attempts: u32,
}

impl SchedulerSettings {
    /// The bounds that follow from the configured ones.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            node: config.node,
            queue_size: config.queue_size,
            queue_bytes: 1 << 30,
            unfinished_operations: config.queue_size.saturating_mul(4).max(4096),
            concurrent_checks: 64,
            priorities: config.priorities,
            priority_ageing: config.priority_ageing,
            unknown_properties: config.unknown_properties,
            queue_timeout: config.queue_timeout,
            transfer_timeout: config.transfer_timeout,
            run_slack: Duration::from_secs(60),
            stop_grace: Duration::from_secs(30),
            retention: config.retention,
            retained_operations: config.retained_operations,
            retained_bytes: 256 << 20,
            cached_retention: config.retention.min(Duration::from_secs(60)),
            retained_cached: config.retained_operations.min(2048),
            retained_cached_bytes: 64 << 20,
            abandon_grace: config.abandon_grace,
            contended_abandon_grace: config.contended_abandon_grace.min(config.abandon_grace),
            max_attempts: config.max_attempts.max(1),
        }
    }
}

/// An instant on both clocks: bounds are kept by the monotonic one, people and the wire are told the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// For measuring.
    pub at: Instant,
    /// For telling.
    pub wall: SystemTime,
}

impl Moment {
    /// Now, by the clock of the runtime, which tests may pause.
    pub fn now() -> Self {
        Self { at: tokio::time::Instant::now().into_std(), wall: SystemTime::now() }
    }

    /// Time since an earlier instant; zero when it is not earlier.
    pub fn since(self, earlier: Instant) -> Duration {
        self.at.saturating_duration_since(earlier)
    }

    /// The instant this much later. A bound too far off to be represented is one that is never reached in practice.
    pub fn after(self, delay: Duration) -> Instant {
        self.at.checked_add(delay).unwrap_or_else(|| self.at + Duration::from_secs(u32::MAX.into()))
    }
}
