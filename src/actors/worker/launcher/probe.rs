//! Tries the sandbox at the start of the server, in runner processes like those of the workers.

use super::{Ending, PoolSandbox, RunnerLauncher};
use crate::{
    actors::worker::{cancel::CancelToken, command::Launch, messages::SlotId, workspace::BuildRoot},
    sandbox::{
        identity::Users,
        probe::{KernelFacts, Report, find},
        settings::SandboxSettings,
    },
};
use gorego_reapi::digest::{Digest, DigestFunction};
use rustix::process::geteuid;
use std::{ffi::OsString, fs, time::Duration};

/// Time limit of one attempt.
const ATTEMPT: Duration = Duration::from_secs(10);
/// A program that cannot exist. To be told so, it must have been possible to try.
const NO_PROGRAM: &str = "/proc/no/program";

/// Finds out which protections work in this build root. Takes some milliseconds.
pub(crate) fn probe(settings: &SandboxSettings, runner: &[OsString], build_root: &BuildRoot) -> Report {
    find(geteuid().is_root(), &this_machine(), |protections| {
        let users = Users::new(settings.first_user);
        let sandbox = PoolSandbox {
            settings: settings.clone(),
            protections,
            build_root: build_root.path().to_owned(),
            users,
        };
        attempt(RunnerLauncher::new(runner.to_vec(), Some(&sandbox)), build_root)
    })
}

/// Takes every step that a command needs, up to the point where its program turns out not to exist.
fn attempt(mut launcher: RunnerLauncher, build_root: &BuildRoot) -> Result<(), String> {
    let in_words = |error: gorego_reapi::error::Error| error.to_string();
    let workspace = build_root.create(SlotId(0), &Digest::empty(DigestFunction::Sha256)).map_err(in_words)?;
    let launch = Launch {
        programs: vec![NO_PROGRAM.into()],
        arguments: vec![NO_PROGRAM.into()],
        environment: Vec::new(),
        root: workspace.root_path().to_owned(),
        working_directory: ".".into(),
        stdout: workspace.path().join("stdout"),
        stderr: workspace.path().join("stderr"),
        max_file_bytes: 1024,
    };
    match launcher.try_run(&launch, ATTEMPT, &CancelToken::new()).map_err(in_words)?.ending {
        Ending::NotStarted(libc::ENOENT | libc::ENOTDIR) => Ok(()),
        other => Err(format!("a program that does not exist ended with {other:?}")),
    }
}

fn this_machine() -> KernelFacts {
    let sysctl = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
        text.trim().parse().ok()
    };
    KernelFacts {
        max_user_namespaces: sysctl("user/max_user_namespaces"),
        max_net_namespaces: sysctl("user/max_net_namespaces"),
        unprivileged_userns_clone: sysctl("kernel/unprivileged_userns_clone"),
        apparmor_restrict_unprivileged_userns: sysctl("kernel/apparmor_restrict_unprivileged_userns"),
        kernel: kernel(),
    }
}

/// Major and minor version.
fn kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
