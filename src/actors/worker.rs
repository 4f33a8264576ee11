//! Workers: each actor of a SyncArbiter pool runs one action at a time, on its own thread.
//!
//! A worker owns only the exec directory and the processes of the action that it runs. Its thread may block. It never
//! queues: the scheduler sends a [`RunAction`] only to a free slot. The reply is the complete outcome of the run. A
//! panic is caught and becomes a reply too, because a panicking handler would end the thread for good and shrink the
//! pool by one.

pub(crate) mod alone;
pub mod build_root;
pub mod cancel;
mod checkpoint;
pub(crate) mod clock;
pub(crate) mod command;
mod delta;
pub(crate) mod dir;
mod disk_watch;
mod exec_root;
pub mod image_store;
mod input_attributes;
mod inputs;
pub mod launcher;
mod layer;
pub mod messages;
mod outputs;
mod run;
mod run_log;
pub mod staging;
pub mod store;
pub mod tools;
#[cfg(test)]
mod tree_model;
mod written;

use crate::{
    action::Action,
    actors::mail::{Mail, Receive, counted},
    cgroups::Groups,
    limits::LimitSettings,
    log_streams::LogStreams,
    logging::Event,
    platform,
    sandbox::kind::CellKind,
    telemetry::{RunFate, RunMetrics, SandboxFailure},
};
use actix::{Actor, MessageResult, SyncContext};
use build_root::BuildRoot;
use gorego_reapi::{
    error::{Error, Result},
    tree::InputTree,
};
use image_store::ImageStore;
use launcher::{Launcher, PoolSandbox, RunnerLauncher};
use messages::{RunAction, RunFailure};
use run::ActionRun;
use std::{
    ffi::OsString,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};
use store::BlobStore;
use tools::Tools;

pub use launcher::runner::runner_main;

const WORKER_PANICKED: &str = "worker_panicked";

/// The hidden subcommand that makes this binary a runner; see [`runner_main`].
pub const RUNNER_SUBCOMMAND: &str = "runner";

/// The settings that all workers of a pool share.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// Name of this host, followed by the name of the pool if there are several. Together with the slot it forms
    /// `ExecutedActionMetadata.worker`.
    pub name: String,
    /// Name of the pool, for logs.
    pub pool: String,
    /// The build root, where exec directories are created.
    pub build_root: BuildRoot,
    /// Time limit for fetching the inputs, and separately for storing the outputs.
    pub transfer_timeout: Duration,
    /// Maximum size in bytes of a file that a command may write, and of the log of its output.
    pub max_output_file_bytes: u64,
    /// Program and arguments of a runner process.
    pub runner: Vec<OsString>,
    /// Source of container images as root file systems; `None` if actions cannot name any.
    pub images: Option<Arc<dyn ImageStore>>,
    /// The sandbox in which commands run; `None` if they run without one.
    pub sandbox: Option<PoolSandbox>,
    /// What one action may use.
    pub limits: PoolLimits,
    /// The tools that may do the work of commands; `None` if each command runs in a process of its own.
    pub tools: Option<Arc<Tools>>,
    /// The log streams in which the output of running commands can be followed.
    pub log_streams: LogStreams,
    /// The metrics of runs.
    pub metrics: RunMetrics,
}

/// The limits of one action of a pool, and the control groups that enforce them. By default there are no limits and no
/// groups.
#[derive(Debug, Clone, Default)]
pub struct PoolLimits {
    pub(crate) settings: LimitSettings,
    pub(crate) groups: Option<Groups>,
}

impl WorkerSettings {
    /// Whether input roots can be overlays.
    pub(crate) fn has_layers(&self) -> bool {
        self.sandbox.as_ref().is_some_and(PoolSandbox::has_layers)
    }

    /// Whether this input root can be an overlay. The first change to a staged file copies it up, and the kernel counts
    /// that as a write of the command.
    fn can_stage(&self, tree: &InputTree) -> bool {
        self.has_layers() && tree.largest_file() <= self.max_output_file_bytes
    }

    fn kind(&self, action: &Action) -> Result<CellKind> {
        match &self.sandbox {
            Some(sandbox) => sandbox.kind(&action.platform),
            None if platform::wants_input_root_as_root(&action.platform) => Err(Error::Precondition(
                "the action asks for its input root as its root file system (rootfs), which requires the sandbox; it is off"
                    .into(),
            )),
            None => Ok(CellKind::default()),
        }
    }

    /// A launcher for one slot.
    pub(crate) fn launcher(&self) -> RunnerLauncher {
        let launcher = RunnerLauncher::new(self.runner.clone(), self.sandbox.as_ref());
        match &self.limits.groups {
            Some(groups) => launcher.grouped(groups),
            None => launcher,
        }
    }

    /// The runner command of a server: the binary of this process, even if the file on disk was replaced. Commands get
    /// `open_files` as their soft limit on open files, if the server has changed its own.
    pub fn own_runner(open_files: Option<u64>) -> Vec<OsString> {
        let mut command = vec!["/proc/self/exe".into(), RUNNER_SUBCOMMAND.into()];
        command.extend(open_files.map(|limit| limit.to_string().into()));
        command
    }
}

/// Runs one action at a time.
pub struct WorkerActor {
    mail: Mail,
    settings: Arc<WorkerSettings>,
    store: Arc<dyn BlobStore>,
    launcher: Box<dyn Launcher>,
}

impl WorkerActor {
    /// A worker that reads inputs from `store` and writes outputs to it.
    pub fn new(settings: Arc<WorkerSettings>, store: Arc<dyn BlobStore>) -> Self {
        let launcher = Box::new(settings.launcher());
        Self { mail: Mail::default(), settings, store, launcher }
    }

    /// Counts the messages of this worker in `mail`.
    pub fn counted_in(self, mail: Mail) -> Self {
        Self { mail, ..self }
    }
}

counted!(WorkerActor);

impl Actor for WorkerActor {
    type Context = SyncContext<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.launcher.warm_up();
    }
}

impl Receive<RunAction> for WorkerActor {
    type Answer = MessageResult<RunAction>;

    fn receive(&mut self, run: RunAction, _: &mut Self::Context) -> Self::Answer {
        let execute = AssertUnwindSafe(|| {
            ActionRun::new(&self.settings, &*self.store, &mut *self.launcher, &run).execute()
        });
        let order = &run.order;
        MessageResult(catch_unwind(execute).unwrap_or_else(|panic| {
            let what = panic_message(&*panic);
            Event::error("gorego::worker", WORKER_PANICKED)
                .with("task", order.task.0)
                .with("pool", &*self.settings.pool)
                .with("slot", order.slot.0)
                .with_shown("action_digest", &order.action.digest)
                .with("error", what)
                .log(format_args!(
                    "a worker panicked; the action is reported as failed and the worker continues"
                ));
            self.launcher.reset();
            self.settings.metrics.failed(SandboxFailure::Panic);
            self.settings.metrics.ended(RunFate::Broken);
            let error = Error::Internal(format!("the worker panicked: {what}"));
            Err(RunFailure { retryable: true, ..RunFailure::new(error) })
        }))
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
