//! `[execution.sandbox]`: the settings of the sandbox, and their checks.

use super::{Machine, checker::Checker};
use crate::{
    sandbox::{
        identity,
        kind::{CellNetwork, InputsAsRoot, RootFs},
        settings::{SandboxMode, SandboxSettings},
        view,
    },
    size::Size,
};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};

/// Maximum number of files and directories that can be configured. Each takes about a kilobyte of memory.
const MAX_TMP_FILES: u64 = 1_000_000_000;
/// Maximum number of processes and threads that can be configured. This is the kernel's own limit.
const MAX_PROCESSES: u64 = 4_194_304;
/// The allowed first users of slots: they must not be root, and there must be room above them.
const USERS: std::ops::RangeInclusive<u32> = 1..=4_000_000_000;

/// The `[execution.sandbox]` section: what actions see and may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxConfig {
    /// Whether actions run in a sandbox.
    pub mode: Mode,
    /// The root file system of actions: "" for the files of the host, "inputs" for the files of the input root alone,
    /// or the path of a directory.
    pub rootfs: String,
    /// The network of an action that requests one.
    pub network: NetworkGrant,
    /// Paths of the host that actions can read, in addition to the built-in ones.
    pub visible: Vec<PathBuf>,
    /// Paths of the host that are hidden although a directory above them is visible.
    pub hidden: Vec<PathBuf>,
    /// Paths of the host that actions can read and write.
    pub writable: Vec<PathBuf>,
    /// Size of the private /tmp of an action, in memory.
    pub tmp_size_gb: Size,
    /// Size of the private /dev/shm of an action, in memory.
    pub shm_size_gb: Size,
    /// Maximum number of files and directories in the private /tmp, and in the private /dev/shm.
    pub tmp_files: u64,
    /// Maximum number of processes and threads of one action at a time.
    pub processes: u64,
    /// The first user id, and group id, of the range from which a root server gives each slot its own.
    pub first_user: u32,
}

/// Whether actions run in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// With the protections that this machine allows.
    Auto,
    /// With all protections, or the server does not start.
    Required,
    /// There is no sandbox.
    Off,
}

/// The network of an action that requests one (`network=on`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkGrant {
    /// None. The pool does not run such actions.
    Off,
    /// A network of its own, which reaches other machines but not the host.
    On,
    /// The whole network of the host.
    Host,
}

/// The keys of `[execution.sandbox]` that a pool can override.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolSandboxConfig {
    /// Overrides `execution.sandbox.mode` for this pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Overrides `execution.sandbox.rootfs` for this pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<String>,
    /// Overrides `execution.sandbox.network` for this pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkGrant>,
}

/// The value of [`SandboxConfig::rootfs`] that means the input root.
const INPUTS: &str = "inputs";

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            rootfs: String::new(),
            network: NetworkGrant::Off,
            visible: Vec::new(),
            hidden: Vec::new(),
            writable: Vec::new(),
            tmp_size_gb: Size::from_gb(2),
            shm_size_gb: Size::from_gb(1),
            tmp_files: 200_000,
            processes: 4096,
            first_user: identity::FIRST,
        }
    }
}

/// Checks the section. The server's own paths, such as the store, are hidden where they would be visible.
pub(super) fn sandbox(
    check: &mut Checker<'_>,
    warnings: &mut Vec<String>,
    own: &[&Path],
    machine: &Machine,
) -> SandboxSettings {
    let config = &check.loaded.config.execution.sandbox;
    check_paths(check, config);
    check.require(
        "execution.sandbox.processes",
        (1..=MAX_PROCESSES).contains(&config.processes),
        &format!("must be between 1 and {MAX_PROCESSES}"),
    );
    check.require(
        "execution.sandbox.tmp_files",
        (1..=MAX_TMP_FILES).contains(&config.tmp_files),
        &format!("must be between 1 and {MAX_TMP_FILES}"),
    );
    check.require(
        "execution.sandbox.first_user",
        USERS.contains(&config.first_user),
        &format!("must be between {} and {}; 0 is root", USERS.start(), USERS.end()),
    );
    // Without a usable value, the path of a default is not the server's own.
    let own_paths = match check.are_usable(&["local_cache_dir", "execution.build_root"]) {
        true => own.iter().map(|own| machine.current_dir.join(own)).collect(),
        false => Vec::new(),
    };
    let mut settings = SandboxSettings {
        mode: config.mode.into(),
        visible: config.visible.clone(),
        hidden: config.hidden.clone(),
        writable: config.writable.clone(),
        tmp_bytes: check.size("execution.sandbox.tmp_size_gb", config.tmp_size_gb),
        tmp_files: config.tmp_files,
        shm_bytes: check.size("execution.sandbox.shm_size_gb", config.shm_size_gb),
        processes: config.processes,
        first_user: config.first_user,
        own: own_paths,
        root: None,
        network: config.network.into(),
    };
    match root_fs(&config.rootfs, settings.mode, &settings.own) {
        Ok(root) => settings.root = root,
        Err(problem) => check.require("execution.sandbox.rootfs", false, &problem),
    }
    let pools = &check.loaded.config.execution.pools;
    let mut modes = pools.values().filter_map(|pool| pool.sandbox.mode);
    if settings.mode != SandboxMode::Off || modes.any(|mode| mode != Mode::Off) {
        hide_own(&mut settings, warnings, own, machine);
    }
    settings
}

/// Checks each path of the lists, and compares the lists with each other.
fn check_paths(check: &mut Checker<'_>, config: &SandboxConfig) {
    let lists = [
        ("execution.sandbox.visible", &config.visible),
        ("execution.sandbox.hidden", &config.hidden),
        ("execution.sandbox.writable", &config.writable),
    ];
    for (key, paths) in lists {
        for path in paths {
            if let Some(problem) = view::problem(path) {
                let path = path.display();
                check.require(key, false, &format!("\"{path}\" {problem}"));
            }
        }
    }
    for hidden in &config.hidden {
        let inside = config.visible.iter().chain(&config.writable).find(|shown| shown.starts_with(hidden));
        if let Some(inside) = inside {
            let problem =
                format!("\"{}\" contains \"{}\", which is shown", hidden.display(), inside.display());
            check.require("execution.sandbox.hidden", false, &problem);
        }
    }
}

impl From<Mode> for SandboxMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Required => Self::Required,
            Mode::Off => Self::Off,
        }
    }
}

impl From<NetworkGrant> for CellNetwork {
    fn from(grant: NetworkGrant) -> Self {
        match grant {
            NetworkGrant::Off => Self::Off,
            NetworkGrant::On => Self::On,
            NetworkGrant::Host => Self::Host,
        }
    }
}

impl PoolSandboxConfig {
    /// The sandbox of a pool with these keys. `common` is the sandbox of all pools.
    pub(super) fn apply(&self, common: &SandboxSettings) -> Result<SandboxSettings, String> {
        let mode = self.mode.map_or(common.mode, SandboxMode::from);
        let root = match &self.rootfs {
            Some(rootfs) => {
                root_fs(rootfs, mode, &common.own).map_err(|problem| format!("rootfs {problem}"))?
            }
            None if mode == SandboxMode::Off => None,
            None => common.root.clone(),
        };
        let network = self.network.map_or(common.network, CellNetwork::from);
        Ok(SandboxSettings { mode, root, network, ..common.clone() })
    }
}

fn root_fs(rootfs: &str, mode: SandboxMode, own: &[PathBuf]) -> Result<Option<RootFs>, String> {
    let root = match rootfs {
        "" => return Ok(None),
        INPUTS => RootFs::InputRoot(InputsAsRoot {}),
        path => {
            let path = Path::new(path);
            let is_plain =
                path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !path.is_absolute() || !is_plain || path == Path::new("/") {
                return Err(format!(
                    "must be \"\", \"{INPUTS}\" or the absolute path of a directory, without \"..\""
                ));
            }
            if let Some(own) = own.iter().find(|own| own.starts_with(path)) {
                return Err(format!("contains {}, which is the server's own", own.display()));
            }
            RootFs::directory(path)
        }
    };
    match mode {
        SandboxMode::Off => Err("needs the sandbox, and its mode is \"off\"".into()),
        SandboxMode::Auto | SandboxMode::Required => Ok(Some(root)),
    }
}

fn hide_own(settings: &mut SandboxSettings, warnings: &mut Vec<String>, own: &[&Path], machine: &Machine) {
    for path in own {
        let path = machine.current_dir.join(path);
        if !settings.shows(&path) {
            continue;
        }
        warnings.push(format!(
            "{} lies in a directory that actions can see; it is hidden from them (execution.sandbox)",
            path.display()
        ));
        if settings.writable.iter().any(|writable| path.starts_with(writable)) {
            warnings.push(format!(
                "{} lies in a directory that actions can change (execution.sandbox.writable)",
                path.display()
            ));
        }
        settings.hidden.push(path);
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        config::{Config, Loaded, Machine, Settings},
        sandbox::settings::SandboxSettings,
    };
    use gorego_reapi::error::Result;
    use std::path::Path;

    fn checked(change: impl FnOnce(&mut Config)) -> Result<(SandboxSettings, Vec<String>)> {
        let mut loaded = Loaded::defaults();
        change(&mut loaded.config);
        let machine = Machine { cpus: 1, cache_home: Some("/var/cache".into()), current_dir: "/".into() };
        let settings = Settings::new(&loaded, &machine)?;
        Ok((settings.execution.map(|execution| execution.sandbox).unwrap(), settings.warnings))
    }

    #[test]
    fn a_store_in_a_visible_directory_is_hidden_with_a_warning() {
        let (settings, warnings) = checked(|_| {}).unwrap();
        assert!(settings.hidden.is_empty() && warnings.is_empty());
        let (settings, warnings) = checked(|config| config.local_cache_dir = "/opt/gorego".into()).unwrap();
        assert_eq!(settings.hidden, [std::path::Path::new("/opt/gorego")]);
        assert!(warnings[0].contains("/opt/gorego") && warnings.len() == 1, "{warnings:?}");
        let (_, warnings) =
            checked(|config| config.execution.sandbox.writable = vec!["/var".into()]).unwrap();
        assert!(warnings.iter().any(|warning| warning.contains("can change")), "{warnings:?}");
    }

    #[test]
    fn keys_and_credentials_in_a_visible_directory_are_hidden_too() {
        let (settings, warnings) = checked(|config| {
            config.execution.sandbox.visible = vec!["/srv".into()];
            config.tls.cert = "/srv/cert".into();
            config.tls.key = "/srv/key".into();
            config.access.tokens = "/srv/tokens".into();
            config.access.passwords = "/srv/passwords".into();
            config.execution.images.credentials = "/srv/credentials".into();
        })
        .unwrap();
        let own = ["cert", "key", "tokens", "passwords", "credentials"];
        for path in own.map(|name| Path::new("/srv").join(name)) {
            assert!(settings.hidden.contains(&path) && settings.own.contains(&path), "{}", path.display());
        }
        assert_eq!(warnings.len(), own.len(), "{warnings:?}");
    }

    /// The running sandboxes hide only the paths that they had at the start.
    #[test]
    fn a_new_path_of_the_server_is_noticed_where_actions_would_see_it_and_is_no_other_difference() {
        let with_key = |key: &str| {
            let key = key.to_owned();
            checked(move |config| {
                config.tls.cert = "/etc/gorego/cert".into();
                config.tls.key = key.into();
            })
        };
        let (start, _) = with_key("/etc/gorego/key").unwrap();
        let (visible, _) = with_key("/opt/certs/key").unwrap();
        let (invisible, _) = with_key("/etc/gorego/key-2").unwrap();
        assert!(start.exposes(Path::new("/opt/certs/key")));
        assert!(
            !start.exposes(Path::new("/etc/gorego/key-2")) && !visible.exposes(Path::new("/opt/certs/key"))
        );
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/usr/bin/env", &link).unwrap();
        assert!(start.exposes(&link), "actions see its target");
        assert!(start.is_same_for_actions(&visible) && start.is_same_for_actions(&invisible));
        let (hidden, _) = checked(|config| config.execution.sandbox.hidden = vec!["/opt/x".into()]).unwrap();
        assert!(!start.is_same_for_actions(&hidden));
    }

    #[test]
    fn invalid_paths_and_users_are_refused_with_their_key() {
        for (key, change) in [
            ("visible", (|config| config.execution.sandbox.visible = vec!["/".into()]) as fn(&mut Config)),
            ("hidden", |config| config.execution.sandbox.hidden = vec!["etc".into()]),
            ("hidden", |config| {
                config.execution.sandbox.visible = vec!["/srv/a".into()];
                config.execution.sandbox.hidden = vec!["/srv".into()];
            }),
            ("writable", |config| config.execution.sandbox.writable = vec!["/proc/x".into()]),
            ("processes", |config| config.execution.sandbox.processes = 0),
            ("tmp_files", |config| config.execution.sandbox.tmp_files = 0),
            ("first_user", |config| config.execution.sandbox.first_user = 0),
        ] {
            let error = checked(change).unwrap_err().to_string();
            assert!(error.contains(&format!("execution.sandbox.{key}")), "{error}");
        }
    }
}
