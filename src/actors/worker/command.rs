//! The command of an action on this machine: which files to try as its program, its environment in the kernel's format,
//! and the exit code of a program that cannot be started. Pure.

use super::build_root::Workspace;
use crate::{
    action::Command,
    limits::Limits,
    sandbox::{kind::CellKind, layers::Layers},
};
use gorego_reapi::escape::shown;
use rustix::io::Errno;
use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// A process that was ended by a signal has this exit code plus the number of the signal (EXE-46).
pub(super) const SIGNAL_BASE: i32 = 128;
/// The search path for programs without a slash if the Command's environment has no PATH. It is the default of
/// execvp(3) without the current directory.
pub(crate) const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// The longest path that the kernel accepts. Longer ones cannot exist.
const MAX_PATH_BYTES: usize = 4096;
/// Maximum number of directories in which a program is looked for; no real PATH has as many. Program and PATH may have
/// megabytes each, so without this bound the list of candidate files could take terabytes of memory.
const MAX_PROGRAMS: usize = 1024;
/// Exit code for a program that does not exist (EXE-42), as in shells.
pub(crate) const EXIT_NOT_FOUND: i32 = 127;
/// Exit code for a program that exists but cannot be started, as in shells.
pub(crate) const EXIT_NOT_EXECUTABLE: i32 = 126;

/// Explains why no program of an input root can be run, and what to do about it.
pub(crate) const NOEXEC: &str = "the build root is on a file system that is mounted noexec; set execution.build_root to another \
                          directory";

/// Everything that the runner needs to start a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Files to try as the program, in order; relative ones are relative to the working directory.
    pub programs: Vec<String>,
    /// The arguments, unchanged (EXE-40).
    pub arguments: Vec<String>,
    /// The whole environment as `NAME=value` (EXE-41).
    pub environment: Vec<String>,
    /// Absolute path of the input root.
    pub root: PathBuf,
    /// The working directory, relative to the input root.
    pub working_directory: PathBuf,
    /// Absolute path of the log of stdout. The file must not exist. It is created when the command prints something.
    pub stdout: PathBuf,
    /// Absolute path of the log of stderr, for which the same holds.
    pub stderr: PathBuf,
    /// Maximum size in bytes of a file that the command may write, and of each log.
    pub max_file_bytes: u64,
    /// The layers that are mounted as the input root; `None` if the input root is the directory at `root`.
    pub layers: Option<Layers>,
    /// The kind of cell that the command needs. Without cells only the default is possible.
    pub kind: CellKind,
    /// What the command may use.
    pub limits: Limits,
    /// Absolute path of a terminal that the command gets instead of `/dev/null` and the logs.
    pub terminal: Option<PathBuf>,
}

impl Launch {
    /// The launch of `command` in `workspace`.
    pub fn new(
        command: &Command,
        workspace: &Workspace,
        layers: Option<Layers>,
        max_file_bytes: u64,
    ) -> Self {
        let path = workspace.path();
        Self {
            programs: programs(command),
            arguments: command.arguments.clone(),
            environment: command.environment.iter().map(|(name, value)| format!("{name}={value}")).collect(),
            root: workspace.root_path().to_owned(),
            working_directory: command.working_directory.as_path().to_owned(),
            stdout: path.join("stdout"),
            stderr: path.join("stderr"),
            max_file_bytes,
            layers,
            kind: CellKind::default(),
            limits: Limits::default(),
            terminal: None,
        }
    }

    /// The directory on disk that receives what the command writes to its input root.
    pub(super) fn written(&self) -> &Path {
        self.layers.as_ref().map_or(&self.root, |layers| Path::new(OsStr::from_bytes(&layers.own)))
    }
}

/// EXE-40: a program with a slash is used as it is; any other is looked up in the Command's own PATH.
fn programs(command: &Command) -> Vec<String> {
    let program = command.arguments.first().map_or("", String::as_str);
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    // If a variable is given twice, getenv(3) finds the first.
    let path = command.environment.iter().find(|(name, _)| name == "PATH");
    path.map_or(DEFAULT_PATH, |(_, path)| path)
        .split(':')
        .filter(|dir| dir.len().saturating_add(program.len()) < MAX_PATH_BYTES)
        .take(MAX_PROGRAMS)
        // An empty element means the working directory (POSIX).
        .map(|dir| if dir.is_empty() { format!("./{program}") } else { format!("{dir}/{program}") })
        .collect()
}

/// The exit code and a line for stderr when no program of a launch could be started (EXE-42). `is_noexec` says that
/// programs in the build root cannot be run.
pub(crate) fn not_started(command: &Command, errno: i32, is_noexec: bool) -> (i32, String) {
    let program = command.arguments.first().map_or("", String::as_str);
    let errno = Errno::from_raw_os_error(errno);
    let code = match errno {
        Errno::NOENT | Errno::NOTDIR => EXIT_NOT_FOUND,
        _ => EXIT_NOT_EXECUTABLE,
    };
    let hint = match errno {
        Errno::NOENT if program.contains('/') => {
            "it is neither an input nor on this server where actions can see it, or the interpreter it names is not"
                .to_owned()
        }
        Errno::NOENT => {
            let path = command.environment.iter().find(|(name, _)| name == "PATH");
            match path {
                Some((_, path)) => format!("looked in PATH={}", shown(path)),
                None => format!("the command sets no PATH; looked in {DEFAULT_PATH}"),
            }
        }
        Errno::ACCESS if is_noexec && programs(command).iter().any(|program| !program.starts_with('/')) => {
            NOEXEC.to_owned()
        }
        Errno::ACCESS => "it is not executable, or is a directory".to_owned(),
        Errno::NOEXEC => "it is not a program for this machine and has no #! line".to_owned(),
        Errno::IO => "the file is truncated, or the disk failed".to_owned(),
        Errno::TOOBIG => "arguments and environment are too long".to_owned(),
        _ => "see execve(2)".to_owned(),
    };
    (code, format!("gorego: cannot run \"{}\": {}: {hint}\n", shown(program), std::io::Error::from(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::DirectoryFormat;
    use gorego_reapi::path::RootPath;

    fn command(program: &str, path: Option<&str>) -> Command {
        Command {
            arguments: vec![program.into()],
            environment: path.map(|path| ("PATH".to_owned(), path.to_owned())).into_iter().collect(),
            working_directory: RootPath::root(),
            outputs: vec![],
            report_mtime: false,
            report_unix_mode: false,
            directory_format: DirectoryFormat::default(),
        }
    }

    #[test]
    fn the_candidates_for_long_programs_and_paths_are_bounded() {
        let long = "x".repeat(1 << 15);
        for path in [":".repeat(1 << 15), format!("{long}:/bin")] {
            for program in ["sh", &long] {
                let bytes: usize = programs(&command(program, Some(&path))).iter().map(String::len).sum();
                assert!(bytes <= MAX_PROGRAMS * MAX_PATH_BYTES, "{bytes}");
            }
        }
        assert_eq!(programs(&command("sh", Some(&format!("{long}:/bin")))), ["/bin/sh"]);
    }

    /// EXE-42.
    #[test]
    fn a_noexec_build_root_is_reported_where_it_matters() {
        let denied = Errno::ACCESS.raw_os_error();
        let says = |program: &str, is_noexec| not_started(&command(program, None), denied, is_noexec).1;
        assert!(says("bin/tool", true).contains("noexec"));
        assert!(!says("bin/tool", false).contains("noexec"));
        assert!(!says("/etc/passwd", true).contains("noexec"), "the program is elsewhere");
    }

    /// EXE-40.
    #[test]
    fn a_program_is_looked_up_in_the_path_of_the_command_only_if_it_has_no_slash() {
        assert_eq!(programs(&command("bin/tool", Some("/x"))), ["bin/tool"]);
        assert_eq!(programs(&command("/bin/sh", None)), ["/bin/sh"]);
        assert_eq!(programs(&command("sh", Some("/x::rel/y"))), ["/x/sh", "./sh", "rel/y/sh"]);
        assert_eq!(programs(&command("sh", Some(""))), ["./sh"]);
        assert_eq!(programs(&command("sh", None)), ["/bin/sh", "/usr/bin/sh"]);
    }
}
