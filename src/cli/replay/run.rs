//! [`ReplayPlace`]: the sandbox of this machine, and one run in it.

use super::{fetch::FetchedAction, launcher::ReplayLauncher, scratch::Scratch, store::FetchedStore};
use crate::{
    actors::worker::{
        WorkerSettings,
        alone::run_alone,
        cancel::CancelToken,
        messages::{RunOrder, SlotId, TaskId},
    },
    caller::Peer,
    cli::config::load_for_replay,
    config::{ExecutionSettings, PoolSettings},
    log_streams::{LogSettings, LogStreams, StreamLimits},
    platform::{Known, preference},
    sandbox::{
        probe::{MissingProtection, Protection, Report},
        settings::SandboxMode,
    },
    server::execution_setup::ExecutionSetup,
    telemetry::RunMetrics,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::runtime::Handle;

/// Added to the first user of the slots, so that the users differ from the users of a root server on this machine.
const USER_OFFSET: u32 = 10_000;

/// The parts that run an action on this machine.
pub(super) struct ReplayPlace {
    execution: ExecutionSettings,
    setup: ExecutionSetup,
}

/// The result of a run.
pub(super) enum Replayed {
    /// The outcome of the command.
    Command(Box<LocalRun>),
    /// The shell of `--shell` ended.
    ShellEnded,
}

/// The outcome of a local run.
pub(super) struct LocalRun {
    /// The result, or the reason why the command did not end by itself.
    pub outcome: Result<reapi::ActionResult>,
    /// The Trees of output directories.
    pub trees: HashMap<Digest, Vec<u8>>,
}

impl ReplayPlace {
    /// Finds out which protections of the sandbox work on this machine. Blocks.
    ///
    /// # Errors
    /// `Invalid` if the configuration is invalid; `Precondition` if there is no sandbox, unless `no_sandbox` is set.
    pub(super) fn open(
        config: Option<PathBuf>,
        scratch: &Scratch,
        runtime: &Handle,
        no_sandbox: bool,
    ) -> Result<Self> {
        let mut execution = load_for_replay(config, scratch.path(), &scratch.build())?;
        // They are required of the server, not of this machine.
        execution.limits_required = false;
        let sandbox = &mut execution.sandbox;
        sandbox.first_user = sandbox.first_user.saturating_add(USER_OFFSET);
        for pool in &mut execution.pools {
            pool.sandbox.mode = if no_sandbox { SandboxMode::Off } else { SandboxMode::Auto };
        }
        let mut setup = ExecutionSetup::open(&mut execution, runtime, None)?;
        for missing in setup.sandbox.iter_mut().flat_map(|(_, report)| &mut report.missing) {
            if missing.protection == Protection::Identity {
                missing.remedy = Some("set TMPDIR to a directory on ext4, xfs, btrfs or tmpfs".into());
            }
        }
        if setup.build_root.is_noexec() {
            return Err(Error::Precondition(format!(
                "programs in {} cannot be run, because its file system is mounted noexec; set TMPDIR to another directory",
                scratch.path().display()
            )));
        }
        let stage = Self { execution, setup };
        if !no_sandbox && !stage.report().is_some_and(|report| report.on.namespaces) {
            let why: Vec<_> = stage.missing().iter().map(ToString::to_string).collect();
            return Err(Error::Precondition(format!(
                "an action is not run outside of a sandbox, where it could read and change everything that you can: {}. \
                 --no-sandbox runs it nevertheless",
                why.join(". ")
            )));
        }
        Ok(stage)
    }

    /// The time limit of a command without a timeout.
    pub(super) fn default_timeout(&self) -> Duration {
        self.execution.timeouts.default
    }

    fn report(&self) -> Option<&Report> {
        self.setup.sandbox.as_ref().map(|(_, report)| report)
    }

    /// The names of the protections that are on.
    pub(super) fn protections(&self) -> Vec<&'static str> {
        self.report().map(Report::names).unwrap_or_default()
    }

    /// The protections that the sandbox lacks on this machine.
    pub(super) fn missing(&self) -> &[MissingProtection] {
        self.report().map_or(&[], |report| &report.missing)
    }

    /// Whether actions can have container images.
    pub(super) fn has_images(&self) -> bool {
        self.setup.images.is_some()
    }

    /// How the limits of the action are enforced.
    pub(super) fn limits(&self) -> String {
        self.setup.limits.summary()
    }

    /// The pool of the configuration that would run an action with these properties; the first pool if there is none.
    fn pool(&self, asked: &[(String, String)]) -> Result<&PoolSettings> {
        let pools = &self.execution.pools;
        let mut known = Known::new(self.execution.unknown_properties);
        pools.iter().for_each(|pool| known.learn(&pool.offers));
        let suits = |pool: &&PoolSettings| known.differences(&pool.offers, asked).next().is_none();
        let suiting = pools.iter().filter(suits).min_by_key(|pool| preference(&pool.name, &pool.offers));
        suiting.or(pools.first()).ok_or_else(|| Error::internal("the configuration has no pool"))
    }

    /// Stages the action and runs its command, or a shell. Blocks.
    ///
    /// # Errors
    /// If it could not be run; `Cancelled`.
    pub(super) fn run(
        self,
        fetched: &FetchedAction,
        scratch: &Arc<Scratch>,
        shell: bool,
        cancel: CancelToken,
    ) -> Result<Replayed> {
        let pool = self.pool(&fetched.action.platform)?;
        let settings =
            self.setup.worker(&self.execution, pool, no_log_streams(scratch), RunMetrics::default());
        // A persistent worker would outlive the action.
        let settings = WorkerSettings { tools: None, ..settings };
        let mut launcher = ReplayLauncher::new(settings.launcher(), scratch.clone(), shell);
        let store = FetchedStore::new(fetched, scratch);
        let order = RunOrder {
            task: TaskId(0),
            attempt: 1,
            slot: SlotId(0),
            action: Arc::new(fetched.action.clone()),
            peer: Peer::default(),
            queued_at: SystemTime::now(),
            tool_invocation_id: String::new(),
            principal: String::new(),
        };
        let report = run_alone(&settings, &store, &mut launcher, order, cancel);
        if launcher.shell_ended {
            return Ok(Replayed::ShellEnded);
        }
        let outcome = match report {
            Ok(done) => Ok(done.result.into_inner()),
            // These failures are facts about the command, not failures of this machine.
            Err(failure) if failure.partial.is_some() && is_the_commands(&failure.error) => {
                Err(failure.error)
            }
            Err(failure) => return Err(failure.error),
        };
        Ok(Replayed::Command(Box::new(LocalRun { outcome, trees: store.into_trees() })))
    }
}

/// Whether the command caused the failure of a run: it ran for too long, used too much, or left outputs that cannot be
/// stored.
fn is_the_commands(error: &Error) -> bool {
    !matches!(
        error,
        Error::Internal(_)
            | Error::Unavailable(_)
            | Error::Cancelled(_)
            | Error::DiskFull(_)
            | Error::DataLoss(_)
    )
}

/// Log streams without readers.
fn no_log_streams(scratch: &Scratch) -> LogStreams {
    let none = StreamLimits { streams: 0, bytes: 0, stream_bytes: 0, idle: None, kept: Duration::ZERO };
    LogStreams::new(LogSettings {
        client_streams: false,
        clients: none,
        runs: none,
        spool_directory: scratch.path().to_owned(),
    })
}
