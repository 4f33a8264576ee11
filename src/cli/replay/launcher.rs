//! [`ReplayLauncher`]: launches the command like a worker, or a shell instead of it, and keeps the files that the run
//! leaves.

use super::{scratch::Scratch, terminal::Terminal};
use crate::actors::worker::{
    cancel::CancelToken,
    command::Launch,
    launcher::{Launcher, Ran, RunnerLauncher},
};
use gorego_reapi::error::{Error, Result};
use std::{fs, io, path::Path, sync::Arc, time::Duration};

/// Shells to try, in order.
const SHELLS: &[&str] = &["/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh"];

/// A [`RunnerLauncher`] for one run.
pub(super) struct ReplayLauncher {
    runner: RunnerLauncher,
    scratch: Arc<Scratch>,
    shell: bool,
    /// Whether the shell ran to its end.
    pub(super) shell_ended: bool,
}

impl ReplayLauncher {
    /// `shell`: run an interactive shell instead of the command.
    pub(super) fn new(runner: RunnerLauncher, scratch: Arc<Scratch>, shell: bool) -> Self {
        Self { runner, scratch, shell, shell_ended: false }
    }

    fn run_shell(&mut self, launch: &Launch, cancel: &CancelToken) -> Result<Ran> {
        let terminal = Terminal::open()?;
        let mut environment = launch.environment.clone();
        // Editors and pagers need this variable.
        if let Ok(name) = std::env::var("TERM")
            && !environment.iter().any(|variable| variable.starts_with("TERM="))
        {
            environment.push(format!("TERM={name}"));
        }
        let launch = Launch {
            programs: SHELLS.iter().map(|shell| (*shell).to_owned()).collect(),
            arguments: vec!["bash".into()],
            environment,
            terminal: Some(terminal.path().to_owned()),
            ..launch.clone()
        };
        let ran = terminal.during(|| self.runner.run(&launch, Duration::MAX, cancel))?;
        self.shell_ended = true;
        Ok(ran)
    }

    /// Moves the input root, and links the logs, to a place where they stay after the exec directory is removed.
    fn keep(&self, launch: &Launch) -> io::Result<()> {
        fs::rename(&launch.root, self.scratch.root())?;
        link_log(&launch.stdout, &self.scratch.stdout())?;
        link_log(&launch.stderr, &self.scratch.stderr())
    }
}

/// Links a log, which is created first if the command has printed nothing. What is appended later is in both.
fn link_log(log: &Path, to: &Path) -> io::Result<()> {
    fs::OpenOptions::new().create(true).append(true).open(log)?;
    fs::hard_link(log, to)
}

impl Launcher for ReplayLauncher {
    fn warm_up(&mut self) {
        self.runner.warm_up();
    }

    fn run(&mut self, launch: &Launch, timeout: Duration, cancel: &CancelToken) -> Result<Ran> {
        let ran = if self.shell {
            self.run_shell(launch, cancel)
        } else {
            self.runner.run(launch, timeout, cancel)
        }?;
        self.keep(launch).map_err(|error| Error::io("keep what the command left", &error))?;
        Ok(ran)
    }

    fn reset(&mut self) {
        self.runner.reset();
    }
}
