//! [`Place`]: the build root, the sandbox in which actions run there, and the tools that stay in it.

use super::LOG;
use crate::{
    actors::worker::{
        WorkerSettings,
        launcher::{
            PoolSandbox,
            probe::{probe, probe_layers},
        },
        staged_trees::StagingLimits,
        tools::{ToolLimits, Tools},
        workspace::BuildRoot,
    },
    config::{ExecutionSettings, PoolSettings},
    logging::Event,
    sandbox::{identity::Users, probe::Report, settings::SandboxMode},
};
use gorego_reapi::error::{Error, Result};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

const INPUTS_COPIED: &str = "inputs_copied";

/// Where actions run, made before anything asynchronous.
pub(super) struct Place {
    pub(super) build_root: BuildRoot,
    pub(super) sandbox: Option<(PoolSandbox, Report)>,
    /// The limit of open files for commands.
    pub(super) open_files: Option<u64>,
    /// The tools of each pool, if there are any.
    tools: BTreeMap<String, Arc<Tools>>,
}

impl Place {
    /// Opens the build root, and finds out which protections of the sandbox work in it.
    pub(super) fn open(execution: &ExecutionSettings, open_files: Option<u64>) -> Result<Self> {
        let limits = StagingLimits { max_bytes: execution.max_staged_bytes, ..StagingLimits::default() };
        let build_root = BuildRoot::with_trees(&execution.build_root, limits)?;
        let tools = tools(execution);
        let mut settings = execution.sandbox.clone();
        if settings.mode == SandboxMode::Off {
            return Ok(Self { build_root, sandbox: None, open_files, tools });
        }
        for path in settings.hide_linked() {
            Event::warn("gorego::config", "config_warning").log(format_args!(
                "a link leads actions to {}; it is hidden from them (execution.sandbox)",
                path.display()
            ));
        }
        let runner = WorkerSettings::own_runner(open_files);
        let report = probe(&settings, &runner, &build_root);
        if !report.on.namespaces && probe(&settings.without_paths(), &runner, &build_root).on.namespaces {
            return Err(Error::Precondition(format!(
                "the sandbox works, but not with what execution.sandbox.visible, hidden and writable name: {}",
                report.missing.iter().map(|missing| &*missing.reason).collect::<Vec<_>>().join(". ")
            )));
        }
        if settings.mode == SandboxMode::Required && !report.missing.is_empty() {
            let missing: Vec<_> = report.missing.iter().map(ToString::to_string).collect();
            return Err(Error::Precondition(format!(
                "execution.sandbox.mode is \"required\", and the sandbox is incomplete: {}",
                missing.join(". ")
            )));
        }
        let users = Users::new(settings.first_user);
        let mut sandbox = PoolSandbox {
            settings,
            protections: report.on,
            build_root: build_root.path().to_owned(),
            users,
            has_layers: false,
        };
        if report.on.namespaces && execution.max_staged_bytes > 0 {
            sandbox.has_layers = match probe_layers(&sandbox, &runner, &build_root) {
                Ok(()) => true,
                Err(reason) => {
                    warn_of_copies(&reason);
                    false
                }
            };
        }
        Ok(Self { build_root, sandbox: Some((sandbox, report)), open_files, tools })
    }

    /// The tools of a pool, if it has any.
    pub(super) fn tools(&self, pool: &str) -> Option<Arc<Tools>> {
        self.tools.get(pool).cloned()
    }

    /// Ends the tools, and waits until all exec directories are removed, for at most `limit`. Blocks.
    pub(super) fn empty(self, limit: Duration) {
        self.tools.values().for_each(|tools| tools.close());
        self.build_root.wait_until_empty(limit);
    }

    /// The sandbox, if anything of it works.
    pub(super) fn pool_sandbox(&self) -> Option<PoolSandbox> {
        let (sandbox, report) = self.sandbox.as_ref()?;
        (!report.is_empty()).then(|| sandbox.clone())
    }
}

fn tools(execution: &ExecutionSettings) -> BTreeMap<String, Arc<Tools>> {
    let Some(settings) = execution.persistent_workers else { return BTreeMap::new() };
    let of = |pool: &PoolSettings| {
        let limits = ToolLimits {
            max_tools: settings.max_workers.unwrap_or(pool.slots),
            max_idle: settings.idle_timeout,
            max_uses: settings.max_requests,
            max_memory: settings.max_memory_bytes,
            max_call: settings.request_timeout,
        };
        (pool.name.clone(), Arc::new(Tools::new(&pool.name, limits)))
    };
    execution.pools.iter().map(of).collect()
}

fn warn_of_copies(reason: &str) {
    Event::warn(LOG, INPUTS_COPIED).with("error", reason).log(format_args!(
        "input roots are copied for each action, because they cannot be overlays here: {reason}; put execution.build_root on \
         ext4, xfs, btrfs or tmpfs"
    ));
}
