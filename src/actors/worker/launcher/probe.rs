//! Tries out the sandbox when the server starts, in runner processes like those of the workers.

use super::{Ending, PoolSandbox, RunnerLauncher};
use crate::{
    actors::worker::{
        build_root::{BuildRoot, Workspace},
        cancel::CancelToken,
        command::Launch,
        dir,
        exec_root::ExecRoot,
        inputs::MountPoints,
        layer,
        messages::SlotId,
    },
    limits::Limits,
    sandbox::{
        identity::{self, Users},
        kind::{CellKind, CellNetwork},
        layers::{Layers, TRIAL_DIRECTORY, TRIAL_FILE, TRIAL_HIDDEN, TRIAL_OPAQUE},
        probe::{KernelFacts, NEEDS_NETWORK, NO_PASTA, Report, find},
        settings::{Pasta, SandboxMode, SandboxSettings},
    },
};
use gorego_reapi::error::Error;
use rustix::{
    fs::{self as rfs, Mode, OFlags},
    process::geteuid,
};
use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// Time limit of one attempt.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Directories with programs that are searched in addition to PATH.
const USUAL_PROGRAMS: &[&str] = &["/usr/bin", "/usr/local/bin", "/bin"];
/// A program that cannot exist. The error that it does not exist proves that all earlier steps succeeded.
const NO_PROGRAM: &str = "/proc/no/program";

impl PoolSandbox {
    /// A sandbox with the protections that work on this machine and default settings, for tests.
    pub fn usual(runner: &[OsString], build_root: &BuildRoot) -> Self {
        let settings = SandboxSettings {
            mode: SandboxMode::Auto,
            visible: Vec::new(),
            hidden: Vec::new(),
            writable: Vec::new(),
            tmp_bytes: 1 << 30,
            tmp_files: 10_000,
            shm_bytes: 1 << 28,
            processes: 1_000,
            first_user: identity::FIRST,
            own: Vec::new(),
            root: None,
            network: CellNetwork::Off,
        };
        let protections = probe(&settings, runner, build_root).on;
        let users = Users::new(settings.first_user);
        let directory = build_root.path().to_owned();
        let mut sandbox =
            Self { settings, protections, build_root: directory, users, has_layers: false, pasta: None };
        sandbox.has_layers = protections.namespaces && probe_layers(&sandbox, runner, build_root).is_ok();
        sandbox
    }
}

/// Finds out which protections work in this build root. Takes some milliseconds.
pub(crate) fn probe(settings: &SandboxSettings, runner: &[OsString], build_root: &BuildRoot) -> Report {
    find(geteuid().is_root(), &this_machine(), |protections| {
        let users = Users::new(settings.first_user);
        let sandbox = PoolSandbox {
            settings: settings.clone(),
            protections,
            build_root: build_root.path().to_owned(),
            users,
            has_layers: false,
            pasta: None,
        };
        let workspace = workspace(build_root)?;
        attempt(RunnerLauncher::new(runner.to_vec(), Some(&sandbox)), &workspace, None, CellKind::default())
    })
}

/// Checks whether input roots can be overlays in this build root and this sandbox. The error says why not.
pub(crate) fn probe_layers(
    sandbox: &PoolSandbox,
    runner: &[OsString],
    build_root: &BuildRoot,
) -> Result<(), String> {
    let in_words = |error: Error| error.to_string();
    let failed = |error: io::Error| in_words(Error::io("make an overlay to try out", &error));
    let place = build_root.place().map_err(in_words)?;
    let (name, below) = build_root.create_tree(&place).map_err(failed)?;
    let tried = lay_out_trial(&below).map_err(failed).and_then(|()| {
        let workspace = workspace(build_root)?;
        let layers = workspace.layers(&Path::new(&name).join("root")).map_err(in_words)?;
        let layers = Layers { is_trial: true, ..layers };
        // Check that the kernel understands the whiteouts and opaque directories that this server writes.
        let own = workspace.root().map_err(in_words)?;
        layer::make_whiteout(own, TRIAL_HIDDEN)
            .and_then(|()| layer::set_opaque(&layer::make_directory(own, TRIAL_OPAQUE)?))
            .map_err(failed)?;
        let launcher = RunnerLauncher::new(runner.to_vec(), Some(sandbox));
        attempt(launcher, &workspace, Some(layers), CellKind::default())?;
        // Check that this server recognises how the kernel marks an opaque directory.
        let replaced = dir::open_dir(own, TRIAL_DIRECTORY.as_ref()).map_err(failed)?;
        match layer::is_opaque(&replaced).map_err(failed)? {
            true => Ok(()),
            false => Err("the overlay does not mark a directory that was replaced".into()),
        }
    });
    build_root.remove_later(&place, name);
    tried
}

/// Finds and tries out the program that provides the networks of cells. The error says what does not work.
pub(crate) fn probe_gateway(
    sandbox: &PoolSandbox,
    runner: &[OsString],
    build_root: &BuildRoot,
) -> Result<Pasta, String> {
    if !sandbox.protections.network {
        return Err(NEEDS_NETWORK.into());
    }
    let pasta = find_pasta().ok_or(NO_PASTA)?;
    let sandbox = PoolSandbox { pasta: Some(pasta.clone()), ..sandbox.clone() };
    let kind = CellKind { network: CellNetwork::On.into(), ..CellKind::default() };
    let workspace = workspace(build_root)?;
    attempt(RunnerLauncher::new(runner.to_vec(), Some(&sandbox)), &workspace, None, kind)?;
    Ok(pasta)
}

/// Looks for pasta in PATH and in the usual directories.
fn find_pasta() -> Option<Pasta> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(USUAL_PROGRAMS.iter().map(PathBuf::from));
    let found = places
        .filter(|place| place.is_absolute())
        .map(|place| place.join("pasta"))
        .find(|file| file.is_file())?;
    Some(Pasta { path: found.into_os_string().into_vec() })
}

/// Checks whether the root file system of this sandbox can be used. The error says why not.
pub(crate) fn probe_root(
    sandbox: &PoolSandbox,
    runner: &[OsString],
    build_root: &BuildRoot,
) -> Result<(), String> {
    let workspace = workspace(build_root)?;
    let kind = sandbox.settings.kind();
    if kind.has_input_root_as_root() {
        let root = workspace.root().map_err(|error| error.to_string())?;
        MountPoints::make(ExecRoot::new(root, None)).map_err(|error| error.to_string())?;
    }
    attempt(RunnerLauncher::new(runner.to_vec(), Some(sandbox)), &workspace, None, kind)
}

/// Creates the tree that [`layers::try_out`](crate::sandbox::layers::try_out) expects.
fn lay_out_trial(root: &File) -> io::Result<()> {
    let file = |parent: &File, name: &str| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rfs::openat(parent, name, flags, Mode::empty())?;
        rfs::fchmod(&file, Mode::from_raw_mode(0o644))
    };
    file(root, TRIAL_FILE)?;
    file(root, TRIAL_HIDDEN)?;
    file(&layer::make_directory(root, TRIAL_DIRECTORY)?, TRIAL_FILE)?;
    Ok(file(&layer::make_directory(root, TRIAL_OPAQUE)?, TRIAL_FILE)?)
}

fn workspace(build_root: &BuildRoot) -> Result<Workspace, String> {
    build_root.create_unseen(SlotId(0)).map_err(|error| error.to_string())
}

/// Does all steps of running a command whose program does not exist.
fn attempt(
    mut launcher: RunnerLauncher,
    workspace: &Workspace,
    layers: Option<Layers>,
    kind: CellKind,
) -> Result<(), String> {
    let in_words = |error: Error| error.to_string();
    let launch = Launch {
        programs: vec![NO_PROGRAM.into()],
        arguments: vec![NO_PROGRAM.into()],
        environment: Vec::new(),
        root: workspace.root_path().to_owned(),
        working_directory: ".".into(),
        stdout: workspace.path().join("stdout"),
        stderr: workspace.path().join("stderr"),
        max_file_bytes: 1024,
        layers,
        kind,
        limits: Limits::default(),
        terminal: None,
    };
    match launcher.try_run(&launch, ATTEMPT, &CancelToken::new()).map_err(in_words)?.ending {
        Ending::NotStarted(libc::ENOENT | libc::ENOTDIR) => Ok(()),
        other => Err(format!("a program that does not exist ended with {other:?}")),
    }
}

/// Facts about this machine that can explain a failure.
pub(crate) fn this_machine() -> KernelFacts {
    let sysctl = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
        text.trim().parse().ok()
    };
    KernelFacts {
        max_user_namespaces: sysctl("user/max_user_namespaces"),
        max_net_namespaces: sysctl("user/max_net_namespaces"),
        unprivileged_userns_clone: sysctl("kernel/unprivileged_userns_clone"),
        apparmor_restrict_unprivileged_userns: sysctl("kernel/apparmor_restrict_unprivileged_userns"),
        has_tun: Path::new("/dev/net/tun").exists(),
        kernel: kernel(),
    }
}

/// Major and minor version of the kernel.
fn kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
