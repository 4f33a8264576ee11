//! [`Job`]: an action under construction.

use gorego::actors::worker::cancel::CancelToken;
use gorego_reapi::{digest::Digest, proto::reapi};
use std::time::Duration;

/// An action under construction. Most tests begin with [`sh`].
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) command: reapi::Command,
    pub(crate) root: Option<Digest>,
    pub(crate) timeout: Duration,
    pub(crate) do_not_cache: bool,
    /// Platform properties.
    pub(crate) platform: Vec<(String, String)>,
    pub(crate) cancel: CancelToken,
}

/// An action that runs a shell script.
pub(crate) fn sh(script: &str) -> Job {
    argv(&["/bin/sh", "-c", script]).env("PATH", "/usr/bin:/bin")
}

/// An action that runs a program.
pub(crate) fn argv(arguments: &[&str]) -> Job {
    Job {
        command: reapi::Command {
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        },
        root: None,
        timeout: Duration::from_secs(60),
        do_not_cache: false,
        platform: Vec::new(),
        cancel: CancelToken::new(),
    }
}

impl Job {
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command
            .environment_variables
            .push(reapi::command::EnvironmentVariable { name: name.into(), value: value.into() });
        self
    }

    pub(crate) fn outputs(mut self, paths: &[&str]) -> Self {
        self.command.output_paths = paths.iter().map(|p| (*p).to_owned()).collect();
        self
    }

    pub(crate) fn workdir(mut self, path: &str) -> Self {
        self.command.working_directory = path.into();
        self
    }

    pub(crate) fn root(mut self, root: Digest) -> Self {
        self.root = Some(root);
        self
    }

    pub(crate) fn platform(mut self, name: &str, value: &str) -> Self {
        self.platform.push((name.into(), value.into()));
        self
    }

    pub(crate) fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}
