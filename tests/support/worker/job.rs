//! [`Job`]: an action under construction.

use gorego::actors::worker::cancel::CancelToken;
use gorego_reapi::{digest::Digest, proto::reapi};
use std::time::Duration;

/// An action under construction. Most tests begin with [`sh`].
#[derive(Clone)]
pub struct Job {
    pub command: reapi::Command,
    pub root: Option<Digest>,
    pub timeout: Duration,
    pub do_not_cache: bool,
    /// Platform properties.
    pub platform: Vec<(String, String)>,
    pub cancel: CancelToken,
}

/// An action that runs a shell script.
pub fn sh(script: &str) -> Job {
    argv(&["/bin/sh", "-c", script]).env("PATH", "/usr/bin:/bin")
}

/// An action that runs a program.
pub fn argv(arguments: &[&str]) -> Job {
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
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command
            .environment_variables
            .push(reapi::command::EnvironmentVariable { name: name.into(), value: value.into() });
        self
    }

    pub fn outputs(mut self, paths: &[&str]) -> Self {
        self.command.output_paths = paths.iter().map(|p| (*p).to_owned()).collect();
        self
    }

    pub fn workdir(mut self, path: &str) -> Self {
        self.command.working_directory = path.into();
        self
    }

    pub fn root(mut self, root: Digest) -> Self {
        self.root = Some(root);
        self
    }

    pub fn platform(mut self, name: &str, value: &str) -> Self {
        self.platform.push((name.into(), value.into()));
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}
