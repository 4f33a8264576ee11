//! [`SchedulerSettings`]: every bound of the scheduler.

use crate::{node::NodeName, platform::UnknownProperties};
use std::time::{Duration, Instant, SystemTime};

pub use crate::action::Priorities;

/// How long a client is asked to wait when the queue is full (GEN-21). Retries of many clients at this interval are a
/// small load, and most actions run longer.
pub(crate) const QUEUE_FULL_RETRY: Duration = Duration::from_secs(5);

/// The part of the settings that an operator chooses. `server/fill.rs` fills it from the configuration.
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
    /// Time limit for fetching inputs, and again for storing outputs.
    pub transfer_timeout: Duration,
    /// How long finished operations are remembered.
    pub retention: Duration,
    /// How many finished operations are remembered.
    pub retained_operations: usize,
    /// How long an operation without followers continues.
    pub abandon_grace: Duration,
    /// Like `abandon_grace`, for a slot that a task with followers waits for, or while the server stops.
    pub contended_abandon_grace: Duration,
    /// How often a task is attempted if its workers fail.
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

/// All bounds of the scheduler. They ensure that nothing grows or waits without limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// The name of this server, for the names of its operations.
    pub node: NodeName,
    /// Tasks that may wait for a slot, including those whose inputs are being checked. Peers and their builds share
    /// this number ([`QueueQuota`](super::quota::QueueQuota)). Requeued tasks may exceed it, because they were admitted
    /// before; there are never more of them than slots.
    pub queue_size: usize,
    /// Memory that the actions of all tasks may take, in bytes. Most tasks take a few KiB, so a full queue takes a part
    /// of it. But a Command may take 16 MiB, and each action has its own copy of it. The memory is shared like
    /// `queue_size`.
    pub queue_bytes: usize,
    /// Number of unfinished operations. Peers share this number. It is separate from `queue_size`, because operations
    /// that join a task take no place in the queue.
    pub unfinished_operations: usize,
    /// Memory that the texts of these operations may take, in bytes: the names of files to inline, and the metadata of
    /// the client. Usually these are a few hundred bytes, but they may be 20 KiB. The memory is shared like
    /// `unfinished_operations`.
    pub unfinished_bytes: usize,
    /// Number of concurrent input checks in the store. More checks would only queue there.
    pub concurrent_checks: usize,
    /// The range of effective priorities.
    pub priorities: Priorities,
    /// How long a task waits until it gains one step of priority.
    pub priority_ageing: Duration,
    /// The treatment of platform properties that no pool offers.
    pub unknown_properties: UnknownProperties,
    /// How long a task may wait for a slot. The time starts again when the task is requeued.
    pub queue_timeout: Duration,
    /// Time limit for fetching inputs, and again for storing outputs.
    pub transfer_timeout: Duration,
    /// Time that a run may take, beyond its transfers and the timeout of the action, before it counts as lost. It
    /// covers the set-up of the exec directory, the end of a command that timed out, and a busy machine. The worker
    /// enforces the limits itself; this deadline is the last resort.
    pub run_slack: Duration,
    /// How long a run that was told to stop may continue. After that its slot is reported as stuck, and a shutdown does
    /// not wait for it.
    pub stop_grace: Duration,
    /// How long finished operations are remembered (EXE-14).
    pub retention: Duration,
    /// How many finished operations are remembered. The oldest are forgotten first.
    pub retained_operations: usize,
    /// Memory of the results and requests of the remembered finished operations, in bytes. The oldest are forgotten
    /// first. One result may take a hundred megabytes, so a bound on the number alone is not enough.
    pub retained_bytes: usize,
    /// How long an operation is remembered if it ended when it was admitted, because the result was cached or the
    /// action cannot run. It matters only if the stream broke before its single message. Any later request gets the
    /// same answer again.
    pub cached_retention: Duration,
    /// How many operations with cached results are remembered. The same number applies separately to those whose action
    /// cannot run, so that a flood of either kind cannot displace results of runs.
    pub retained_cached: usize,
    /// Like `retained_bytes`, for each of these two kinds.
    pub retained_cached_bytes: usize,
    /// How long an operation without followers continues (EXE-14).
    pub abandon_grace: Duration,
    /// How long a task without followers continues if a followed task waits for its slot, or the server stops; at most
    /// `abandon_grace`. It is long enough for a client that lost its connection to reconnect.
    pub contended_abandon_grace: Duration,
    /// How often a task is attempted if its workers fail (EXE-62); at least 1.
    pub max_attempts: u32,
}

impl SchedulerSettings {
    /// Derives all bounds from the configured ones.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            node: config.node,
            queue_size: config.queue_size,
            queue_bytes: 256 << 20,
            unfinished_operations: config.queue_size.saturating_mul(4).max(4096),
            unfinished_bytes: 64 << 20,
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

/// The time on both clocks. Bounds use the monotonic clock; the wall clock is for people and clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClockReading {
    /// The time on the monotonic clock.
    pub at: Instant,
    /// The time on the wall clock.
    pub wall: SystemTime,
}

impl ClockReading {
    /// The current time, by the clock of the runtime, which tests may pause.
    pub(crate) fn now() -> Self {
        Self { at: tokio::time::Instant::now().into_std(), wall: SystemTime::now() }
    }

    /// The time since an earlier instant; zero if it is not earlier.
    pub(crate) fn since(self, earlier: Instant) -> Duration {
        self.at.saturating_duration_since(earlier)
    }

    /// The instant after this delay. A delay that cannot be represented is replaced by 136 years, which is never
    /// reached.
    pub(crate) fn after(self, delay: Duration) -> Instant {
        self.at.checked_add(delay).unwrap_or_else(|| self.at + Duration::from_secs(u32::MAX.into()))
    }
}
