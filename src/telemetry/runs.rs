//! [`RunMetrics`]: the runs of actions, as counted by their workers.

use super::{
    Labels,
    kinds::{KindCounters, LabelValue},
};
use prometheus_client::{
    metrics::{family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use std::{sync::Arc, time::Duration};

/// A stage of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageOfRun {
    /// It waited for a slot.
    Queue,
    /// The worker waited for disk space and an image, and read the input tree.
    Fetch,
    /// The inputs were put into place.
    Stage,
    /// The time in which the command ran.
    Run,
    /// Its outputs were stored.
    Upload,
}

impl LabelValue for StageOfRun {
    const LABEL: &'static str = "stage";
    const ALL: &'static [Self] = &[Self::Queue, Self::Fetch, Self::Stage, Self::Run, Self::Upload];

    fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Fetch => "fetch",
            Self::Stage => "stage",
            Self::Run => "run",
            Self::Upload => "upload",
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunFate {
    /// The command ended with exit code 0.
    Succeeded,
    /// The command ended with another exit code, or a signal ended it.
    Failed,
    /// The command ran longer than its timeout.
    TimedOut,
    /// The command was stopped because it exceeded a limit.
    Limited,
    /// The run was stopped because its task was cancelled.
    Cancelled,
    /// The action is at fault: inputs are missing, or it asks for something that is not possible.
    Refused,
    /// The worker is at fault. The action is usually tried again.
    Broken,
}

impl LabelValue for RunFate {
    const LABEL: &'static str = "outcome";
    const ALL: &'static [Self] = &[
        Self::Succeeded,
        Self::Failed,
        Self::TimedOut,
        Self::Limited,
        Self::Cancelled,
        Self::Refused,
        Self::Broken,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Limited => "limited",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Broken => "broken",
        }
    }
}

/// A failure around a command that is the server's fault and not the action's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxFailure {
    /// A runner process could not set up the sandbox or start the command, or it died.
    Runner,
    /// A persistent worker failed; its action ran without it.
    Tool,
    /// The disk was full while the command ran.
    DiskFull,
    /// All actions together needed more memory than there is.
    MemoryShort,
    /// The worker's own thread panicked.
    Panic,
}

impl LabelValue for SandboxFailure {
    const LABEL: &'static str = "kind";
    const ALL: &'static [Self] = &[Self::Runner, Self::Tool, Self::DiskFull, Self::MemoryShort, Self::Panic];

    fn name(self) -> &'static str {
        match self {
            Self::Runner => "runner",
            Self::Tool => "tool",
            Self::DiskFull => "disk_full",
            Self::MemoryShort => "memory_short",
            Self::Panic => "panic",
        }
    }
}

/// Upper bounds of the buckets, in seconds: from the overhead of a run to the longest actions.
const SECONDS: [f64; 16] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];

/// The runs of actions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RunMetrics(Arc<RunHandles>);

#[derive(Debug)]
struct RunHandles {
    /// The histograms of the stages, in the order of [`StageOfRun::ALL`].
    stages: Vec<Histogram>,
    fates: KindCounters<RunFate>,
    failures: KindCounters<SandboxFailure>,
}

impl RunMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        let family = Family::<Labels<1>, Histogram, _>::new_with_constructor(histogram);
        let help = "How long actions spent in each stage of their runs";
        registry.register_with_unit("action_stage", help, Unit::Seconds, family.clone());
        let stage = |stage: &StageOfRun| family.get_or_create_owned(&[(StageOfRun::LABEL, stage.name())]);
        Self(Arc::new(RunHandles {
            stages: StageOfRun::ALL.iter().map(stage).collect(),
            fates: KindCounters::register(registry, "action_runs", "Runs of actions that ended, by outcome"),
            failures: KindCounters::register(
                registry,
                "sandbox_failures",
                "Failures around commands that are the fault of this server and not of the action",
            ),
        }))
    }

    /// Records how long a stage took.
    pub fn stage(&self, stage: StageOfRun, took: Duration) {
        if let Some(histogram) = self.0.stages.get(stage as usize) {
            histogram.observe(took.as_secs_f64());
        }
    }

    /// Counts the end of a run.
    pub fn ended(&self, fate: RunFate) {
        self.0.fates.count(fate);
    }

    /// Counts a failure around a command.
    pub fn failed(&self, what: SandboxFailure) {
        self.0.failures.count(what);
    }
}

impl Default for RunMetrics {
    /// Metrics that are not part of a text.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}
