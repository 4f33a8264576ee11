//! [`ExecutionSetup`]: the build root, the sandbox in which actions run there, and the persistent workers.

use super::LOG;
use crate::{
    actors::worker::{
        PoolLimits, WorkerSettings,
        build_root::BuildRoot,
        build_root::staged_trees::{StagingLimits, TreeScrub},
        image_store::ImageStore,
        launcher::{
            PoolSandbox,
            probe::{probe, probe_gateway, probe_layers, probe_root, this_machine},
        },
        tools::{ToolLimits, Tools},
    },
    cgroups::{Groups, LimitReport, Means},
    config::{ExecutionSettings, ImagesSettings, PoolSettings, Tags},
    images::{ImageSettings, Images, TagPolicy},
    log_streams::LogStreams,
    logging::Event,
    sandbox::{
        identity::Users,
        kind::{CellNetwork, RootFs},
        probe::Report,
        settings::{Protections, SandboxMode, SandboxSettings},
    },
    telemetry::RunMetrics,
};
use gorego_reapi::error::{Error, Result};
use std::{
    ffi::{OsStr, OsString},
    fs,
    io::ErrorKind,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::runtime::Handle;

const INPUTS_COPIED: &str = "inputs_copied";

/// How many more processes than a control group a user may have.
const SECOND_LINE: u64 = 64;

/// Number of persistent workers of a pool for each of its slots, unless it is configured. With more than one, different
/// tools do not have to displace each other.
const WORKERS_PER_SLOT: usize = 2;

/// What actions need to run. It is created before anything asynchronous starts.
pub(crate) struct ExecutionSetup {
    pub(crate) build_root: BuildRoot,
    pub(crate) sandbox: Option<(PoolSandbox, Report)>,
    pub(crate) images: Option<Images>,
    /// The limit of open files for commands.
    pub(crate) open_files: Option<u64>,
    pub(crate) groups: Groups,
    /// How the limits of actions are enforced.
    pub(crate) limits: LimitReport,
    /// The persistent workers of the pools, by the name of the pool.
    tools: Mutex<Vec<(String, Arc<Tools>)>>,
    /// The scrub of the staged inputs, if it is on.
    scrub: Mutex<Option<TreeScrub>>,
}

impl ExecutionSetup {
    /// Opens the build root, and finds out which protections of the sandbox work in it. If actions cannot have a
    /// network of their own, the pools do not offer it.
    pub(crate) fn open(
        execution: &mut ExecutionSettings,
        runtime: &Handle,
        open_files: Option<u64>,
    ) -> Result<Self> {
        for warning in check_named_paths(execution)? {
            Event::warn("gorego::config", "config_warning").log(format_args!("{warning}"));
        }
        let limits = StagingLimits { max_bytes: execution.max_staged_bytes, ..StagingLimits::default() };
        let build_root = BuildRoot::with_trees(&execution.build_root, limits)?;
        let images = match &execution.images {
            Some(settings) => {
                Some(Images::open(image_settings(settings.clone()), build_root.path(), runtime.clone())?)
            }
            None => None,
        };
        let tools = execution.pools.iter().filter_map(|pool| tools(execution, pool)).collect();
        let tools = Mutex::new(tools);
        let has_mode = |mode| execution.pools.iter().any(|pool| pool.sandbox.mode == mode);
        let is_sandboxed = has_mode(SandboxMode::Auto) || has_mode(SandboxMode::Required);
        // The build root is locked, so no other server creates groups for it.
        let (groups, limits) = Groups::open(execution.total_memory_bytes, execution.slots);
        let scrub = Mutex::default();
        let mut setup = Self { build_root, sandbox: None, images, open_files, groups, limits, tools, scrub };
        if is_sandboxed {
            let runner = WorkerSettings::own_runner(open_files);
            setup.sandbox = Some(setup.open_sandbox(execution, &runner)?);
            execution.pools.iter().try_for_each(|pool| setup.try_root_of(pool, &runner))?;
            execution.pools.iter_mut().for_each(|pool| setup.withdraw_network(pool));
            let on = setup.sandbox.as_ref().map(|(sandbox, _)| sandbox.protections);
            setup.limits.bound_processes(bound_of_processes(on.unwrap_or_default()));
        }
        if execution.limits_required {
            refuse_missing(&setup.limits)?;
        }
        Ok(setup)
    }

    /// Finds out which protections of the sandbox work in the build root. Pools can have another root file system.
    fn open_sandbox(
        &self,
        execution: &ExecutionSettings,
        runner: &[OsString],
    ) -> Result<(PoolSandbox, Report)> {
        let mut settings = execution.sandbox.clone();
        settings.root = None;
        settings.processes = user_limit(&execution.pools, &self.limits);
        for path in settings.hide_linked() {
            Event::warn("gorego::config", "config_warning").log(format_args!(
                "a link leads actions to {}; it is hidden from them (execution.sandbox)",
                path.display()
            ));
        }
        let mut report = self.probe(&settings, runner)?;
        let users = Users::new(settings.first_user);
        let mut sandbox = PoolSandbox {
            settings,
            protections: report.on,
            build_root: self.build_root.path().to_owned(),
            users,
            has_layers: false,
            pasta: None,
        };
        if execution.pools.iter().any(wants_gateway) {
            let found = probe_gateway(&sandbox, runner, &self.build_root);
            report.add_gateway(&this_machine(), found.clone().map(drop));
            sandbox.pasta = found.ok();
        }
        refuse_incomplete(execution, &report)?;
        if report.on.namespaces && execution.max_staged_bytes > 0 {
            match probe_layers(&sandbox, runner, &self.build_root) {
                Ok(()) => sandbox.has_layers = true,
                Err(reason) => warn_of_copies(&reason),
            }
        }
        Ok((sandbox, report))
    }

    /// Starts a sandbox. If that fails only with the configured paths, the error names them.
    fn probe(&self, settings: &SandboxSettings, runner: &[OsString]) -> Result<Report> {
        let report = probe(settings, runner, &self.build_root);
        if !report.on.namespaces && probe(&settings.without_paths(), runner, &self.build_root).on.namespaces {
            return Err(Error::Precondition(format!(
                "the sandbox works, but not with the paths in execution.sandbox.visible, hidden and writable: {}",
                report.missing.iter().map(|missing| &*missing.reason).collect::<Vec<_>>().join(". ")
            )));
        }
        Ok(report)
    }

    /// The settings that the workers of a pool share.
    pub(crate) fn worker(
        &self,
        execution: &ExecutionSettings,
        pool: &PoolSettings,
        log_streams: LogStreams,
        metrics: RunMetrics,
    ) -> WorkerSettings {
        WorkerSettings {
            name: worker_name(pool),
            pool: pool.name.clone(),
            build_root: self.build_root.clone(),
            transfer_timeout: execution.transfer_timeout,
            max_output_file_bytes: execution.max_output_file_bytes,
            runner: WorkerSettings::own_runner(self.open_files),
            images: self.image_store(),
            sandbox: self.pool_sandbox(pool),
            limits: self.pool_limits(pool),
            tools: self.tools(&pool.name),
            log_streams,
            metrics,
        }
    }

    /// The sandbox of a pool, if it has one and at least one protection works.
    fn pool_sandbox(&self, pool: &PoolSettings) -> Option<PoolSandbox> {
        let (sandbox, report) = self.sandbox.as_ref()?;
        if report.is_empty() || pool.sandbox.mode == SandboxMode::Off {
            return None;
        }
        let mut sandbox = sandbox.clone();
        sandbox.settings.root = pool.sandbox.root.as_ref().map(RootFs::resolved);
        sandbox.settings.network = pool.sandbox.network;
        // A reload may have raised the limit.
        let processes = user_limit([pool], &self.limits);
        sandbox.settings.processes = sandbox.settings.processes.max(processes);
        Some(sandbox)
    }

    /// Stops a pool from offering a network of its own to actions, if that was tried and does not work.
    pub(super) fn withdraw_network(&self, pool: &mut PoolSettings) {
        let is_lacking = self.sandbox.as_ref().is_some_and(|(_, report)| report.lacks_gateway());
        // A pool that requires its sandbox would be accepted without its network.
        if is_lacking && wants_gateway(pool) && pool.sandbox.mode != SandboxMode::Required {
            pool.withdraw_network();
        }
    }

    /// The persistent workers of a pool, if it has any.
    pub(super) fn tools(&self, pool: &str) -> Option<Arc<Tools>> {
        self.all_tools().iter().rfind(|(name, _)| name == pool).map(|(_, tools)| tools.clone())
    }

    /// Creates the persistent workers of a pool that is about to be started, if it has any.
    pub(super) fn add_tools(&self, execution: &ExecutionSettings, pool: &PoolSettings) -> Option<Arc<Tools>> {
        let (name, tools) = tools(execution, pool)?;
        self.all_tools().push((name, tools.clone()));
        Some(tools)
    }

    /// Ends the persistent workers of a pool that is removed or could not be started. Blocks.
    pub(super) fn close_tools(&self, of: &Option<Arc<Tools>>) {
        if let Some(of) = of {
            of.close();
            self.all_tools().retain(|(_, tools)| !Arc::ptr_eq(tools, of));
        }
    }

    fn all_tools(&self) -> MutexGuard<'_, Vec<(String, Arc<Tools>)>> {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the scrub of the staged inputs, unless the rate is zero.
    pub(super) fn scrub(&self, bytes_per_second: u64) {
        *self.scrub.lock().unwrap_or_else(PoisonError::into_inner) =
            self.build_root.scrub_trees(bytes_per_second);
    }

    /// Ends the scrub and the persistent workers, and waits until all exec directories are removed, but not longer than
    /// `until`. A persistent worker that does not end when it is told to is killed after seconds, perhaps later than
    /// `until`. Blocks.
    pub(super) fn empty(&self, until: Instant) {
        self.scrub.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tools = self.all_tools().clone();
        tools.iter().for_each(|(_, tools)| tools.close());
        self.build_root.wait_until_empty(until.saturating_duration_since(Instant::now()));
        self.groups.remove();
    }

    /// The container images, if actions can have any.
    fn image_store(&self) -> Option<Arc<dyn ImageStore>> {
        self.images.clone().map(|images| Arc::new(images) as Arc<dyn ImageStore>)
    }

    /// The limits of one action of a pool.
    fn pool_limits(&self, pool: &PoolSettings) -> PoolLimits {
        PoolLimits { settings: pool.limits, groups: Some(self.groups.clone()) }
    }

    /// Tries a sandbox with the root file system of a pool, if it has one of its own.
    pub(super) fn try_root_of(&self, pool: &PoolSettings, runner: &[OsString]) -> Result<()> {
        let Some(root) = &pool.sandbox.root else { return Ok(()) };
        check_root_directory(pool)?;
        let refuse = |reason: &str| Err(root_refused(pool, reason));
        let sandbox = self.pool_sandbox(pool).filter(|sandbox| sandbox.protections.namespaces);
        let Some(sandbox) = sandbox else {
            return refuse("it needs the namespaces of the sandbox, which are off");
        };
        if let Some(own) = sandbox.settings.own_below(root) {
            return refuse(&format!("it contains {}, which is the server's own", own.display()));
        }
        probe_root(&sandbox, runner, &self.build_root).or_else(|reason| refuse(&reason))
    }
}

/// Whether the actions of a pool can have a network of their own.
pub(super) fn wants_gateway(pool: &PoolSettings) -> bool {
    pool.sandbox.network == CellNetwork::On && pool.sandbox.mode != SandboxMode::Off
}

/// Fails if a pool requires a protection that does not work here. Only pools that want the gateway require it.
fn refuse_incomplete(execution: &ExecutionSettings, report: &Report) -> Result<()> {
    let required: Vec<_> =
        execution.pools.iter().filter(|pool| pool.sandbox.mode == SandboxMode::Required).collect();
    if required.is_empty() {
        return Ok(());
    }
    let missing = report.missing_for(required.iter().any(|pool| wants_gateway(pool)));
    let missing: Vec<_> = missing.into_iter().map(ToString::to_string).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Precondition(format!(
        "execution.sandbox.mode is \"required\", and the sandbox is incomplete: {}",
        missing.join(". ")
    )))
}

fn worker_name(pool: &PoolSettings) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if pool.is_declared { format!("{host}/{}", pool.name) } else { host }
}

/// The process limit of a cell's user. Where there are control groups, this is only a second limit. It is higher than
/// the limit of the group, because only a group reports that its limit was reached.
fn user_limit<'a>(pools: impl IntoIterator<Item = &'a PoolSettings>, limits: &LimitReport) -> u64 {
    let bounds = pools.into_iter().map(|pool| pool.limits.processes);
    let most = bounds.map(|bound| bound.default.max(bound.max)).max().unwrap_or(0);
    if limits.counts_processes() { most.saturating_add(SECOND_LINE) } else { most }
}

/// How the number of processes of an action is bounded without a control group.
fn bound_of_processes(on: Protections) -> Means {
    match (on.namespaces, on.limit_processes()) {
        (true, true) => Means::UserLimit,
        (true, false) => Means::Watchdog,
        (false, _) => Means::Nothing,
    }
}

fn refuse_missing(limits: &LimitReport) -> Result<()> {
    match limits.missing().first() {
        None => Ok(()),
        Some(missing) => Err(Error::Precondition(format!(
            "execution.limits.required is true, and the limits cannot be enforced: {missing}"
        ))),
    }
}

fn image_settings(settings: ImagesSettings) -> ImageSettings {
    ImageSettings {
        registries: settings.registries,
        tags: tag_policy(settings.tags),
        credentials: settings.credentials,
        layouts: settings.layouts,
        max_bytes: settings.max_bytes,
        timeout: settings.timeout,
    }
}

pub(super) fn tag_policy(tags: Tags) -> TagPolicy {
    match tags {
        Tags::Refuse => TagPolicy::Refuse,
        Tags::EachAction => TagPolicy::EachAction,
        Tags::Once => TagPolicy::Once,
    }
}

/// Creates the persistent workers of a pool; `None` if they are not enabled.
fn tools(execution: &ExecutionSettings, pool: &PoolSettings) -> Option<(String, Arc<Tools>)> {
    let settings = execution.persistent_workers?;
    let limits = ToolLimits {
        max_tools: settings.max_workers.unwrap_or(WORKERS_PER_SLOT * pool.slots),
        max_idle: settings.idle_timeout,
        max_uses: settings.max_requests,
        max_memory: settings.max_memory_bytes,
        max_call: settings.request_timeout,
    };
    Some((pool.name.clone(), Arc::new(Tools::new(&pool.name, limits))))
}

/// Checks the paths that the settings name, without a server. Returns the warnings of a start. A path that may not be
/// looked at counts as existing.
///
/// # Errors
/// `Precondition` if the root file system of a pool does not exist.
pub(crate) fn check_named_paths(execution: &ExecutionSettings) -> Result<Vec<String>> {
    execution.pools.iter().try_for_each(check_root_directory)?;
    let is_missing = |path: &&PathBuf| !path.try_exists().unwrap_or(true);
    let mut warnings = Vec::new();
    if execution.pools.iter().any(|pool| pool.sandbox.mode != SandboxMode::Off) {
        let shown = execution.sandbox.visible.iter().chain(&execution.sandbox.writable);
        warnings.extend(shown.filter(is_missing).map(|path| {
            format!("{} does not exist, so actions do not see it (execution.sandbox)", path.display())
        }));
    }
    if let Some(images) = &execution.images {
        // Both are read for each pull, so they may appear later.
        let named = images.credentials.iter().map(|path| ("execution.images.credentials", path));
        let named = named.chain(images.layouts.iter().map(|path| ("execution.images.layouts", path)));
        warnings.extend(named.filter(|(_, path)| is_missing(path)).map(|(key, path)| {
            format!("{} does not exist, so images that need it cannot be used ({key})", path.display())
        }));
    }
    Ok(warnings)
}

/// Fails if the root file system of a pool is no directory.
fn check_root_directory(pool: &PoolSettings) -> Result<()> {
    let Some(RootFs::Directory(path)) = &pool.sandbox.root else { return Ok(()) };
    let path = Path::new(OsStr::from_bytes(path));
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => {
            Err(root_refused(pool, &format!("{} is not a directory", path.display())))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(root_refused(pool, &format!("{} does not exist", path.display())))
        }
        _ => Ok(()),
    }
}

fn root_refused(pool: &PoolSettings, reason: &str) -> Error {
    let key = if pool.is_declared { "execution.pools" } else { "execution.sandbox" };
    Error::Precondition(format!("rootfs ({key}, pool \"{}\") cannot be used: {reason}", pool.name))
}

fn warn_of_copies(reason: &str) {
    Event::warn(LOG, INPUTS_COPIED).with("error", reason).log(format_args!(
        "input roots are copied for each action, because they cannot be overlays here: {reason}; put execution.build_root on \
         ext4, xfs, btrfs or tmpfs"
    ));
}
