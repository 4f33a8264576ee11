//! Actions and commands from requests, checked. Pure.
//!
//! An [`Action`] is valid by construction: it has arguments, its paths stay inside the input root, and this server
//! allows its timeout. Whether its inputs are stored is not checked here.

use crate::{instance::Instance, memory};
use gorego_reapi::{
    digest::Digest,
    duration,
    error::{Error, Result},
    escape::shown,
    path::RootPath,
    proto::reapi,
    tree::NodeProperties,
};
use std::{collections::HashSet, time::Duration};

/// The requested representation of output directories in the result (EXE-58).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DirectoryFormat {
    /// Store a Tree blob and report its digest.
    pub tree: bool,
    /// Store each Directory as a blob and report the digest of the root.
    pub directories: bool,
}

/// The kind of node that an output must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// Any kind; known after the run (`output_paths`).
    Any,
    /// A file or symlink (`output_files`).
    File,
    /// A directory or symlink (`output_directories`).
    Directory,
}

/// One output to collect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRequest {
    /// The path exactly as requested; it is reported unchanged (EXE-48).
    pub requested: String,
    /// The same path, relative to the input root.
    pub path: RootPath,
    /// The kind of node that the output must be.
    pub kind: OutputKind,
}

/// The process to run, and the outputs to collect after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The argument vector; never empty.
    pub arguments: Vec<String>,
    /// The complete environment, in the requested order.
    pub environment: Vec<(String, String)>,
    /// The working directory, relative to the input root.
    pub working_directory: RootPath,
    /// The outputs to collect, each requested path once.
    pub outputs: Vec<OutputRequest>,
    /// Whether to report the modification time of outputs.
    pub report_mtime: bool,
    /// Whether to report the permission bits of outputs.
    pub report_unix_mode: bool,
    /// The representation of output directories in the result.
    pub directory_format: DirectoryFormat,
}

/// A checked action and its command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// The instance of the request.
    pub instance: Instance,
    /// The digest of the Action, which is its key in the action cache.
    pub digest: Digest,
    /// The process to run.
    pub command: Command,
    /// Digest of the root Directory of the inputs.
    pub input_root: Digest,
    /// Largest run time of the command.
    pub timeout: Duration,
    /// The result is neither stored nor served, and the action is never merged with an identical one.
    pub do_not_cache: bool,
    /// Required platform properties, as (name, value).
    pub platform: Vec<(String, String)>,
}

/// The timeouts that this server allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeoutPolicy {
    /// Applies to actions without a timeout.
    pub default: Duration,
    /// The largest timeout that a request may set.
    pub max: Duration,
}

impl TimeoutPolicy {
    /// No limits, for servers that do not execute actions.
    pub const UNLIMITED: Self = Self { default: Duration::MAX, max: Duration::MAX };
}

/// A range of priorities that contains 0 (CAP-18). Lower values are more urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Priorities {
    /// The lowest value, which is the most urgent priority.
    pub min: i32,
    /// The highest value, which is the least urgent priority.
    pub max: i32,
}

impl Priorities {
    /// The priority in this range that is nearest to a requested one.
    pub fn nearest(self, priority: i32) -> i32 {
        priority.min(self.max).max(self.min)
    }
}

impl Action {
    /// Checks an Action message together with its Command.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the invalid field (EXE-27, EXE-29, EXE-32, EXE-63).
    pub fn from_wire(
        instance: Instance,
        digest: Digest,
        action: &reapi::Action,
        command: &reapi::Command,
        timeouts: TimeoutPolicy,
    ) -> Result<Self> {
        let input_root = Digest::from_wire(
            digest.function(),
            action.input_root_digest.as_ref(),
            "Action.input_root_digest",
        )?;
        // EXE-31: the platform of the Action takes precedence over that of the Command.
        #[allow(deprecated)]
        let platform = action.platform.as_ref().or(command.platform.as_ref());
        Ok(Self {
            instance,
            digest,
            command: Command::from_wire(command)?,
            input_root,
            timeout: timeout(action.timeout.as_ref(), timeouts)?,
            do_not_cache: action.do_not_cache,
            platform: platform
                .map(|p| p.properties.iter().map(|p| (p.name.clone(), p.value.clone())).collect())
                .unwrap_or_default(),
        })
    }
}

impl Action {
    /// Approximate memory in bytes. A Command may take megabytes.
    pub fn weight(&self) -> usize {
        let text = |text: &String| memory::of_text(text.len());
        let pair = |(name, value): &(String, String)| text(name) + text(value);
        let output = |output: &OutputRequest| {
            memory::of_buffer(output.requested.len()) + memory::of_buffer(output.path.as_str().len())
        };
        let command = &self.command;
        size_of::<Self>()
            + command.arguments.iter().map(text).sum::<usize>()
            + command.environment.iter().chain(&self.platform).map(pair).sum::<usize>()
            + command.outputs.capacity() * size_of::<OutputRequest>()
            + command.outputs.iter().map(output).sum::<usize>()
    }
}

impl Command {
    #[allow(deprecated)]
    fn from_wire(command: &reapi::Command) -> Result<Self> {
        match command.arguments.first() {
            None => return Err(Error::invalid("Command.arguments is empty: there is nothing to run")),
            Some(program) if program.is_empty() => {
                return Err(Error::invalid("Command.arguments[0] is empty: there is nothing to run"));
            }
            Some(_) => {}
        }
        if let Some(argument) = command.arguments.iter().find(|a| a.contains('\0')) {
            return Err(Error::Invalid(format!("Command.arguments: \"{}\" contains a NUL", shown(argument))));
        }
        let mut environment = Vec::with_capacity(command.environment_variables.len());
        for variable in &command.environment_variables {
            let (name, value) = (&variable.name, &variable.value);
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(Error::Invalid(format!(
                    "Command.environment_variables: \"{}\" is not a usable variable",
                    shown(name)
                )));
            }
            environment.push((name.clone(), value.clone()));
        }
        let working_directory = RootPath::root()
            .join(&command.working_directory)
            .map_err(|error| Error::Invalid(format!("Command.working_directory: {error}")))?;
        let format = reapi::command::OutputDirectoryFormat::try_from(command.output_directory_format)
            .map_err(|_| Error::invalid("Command.output_directory_format has an unknown value"))?;
        use reapi::command::OutputDirectoryFormat::{DirectoryOnly, TreeAndDirectory, TreeOnly};
        let properties = &command.output_node_properties;
        if let Some(name) = properties.iter().find(|n| !NodeProperties::NAMES.contains(&n.as_str())) {
            return Err(Error::Invalid(format!(
                "Command.output_node_properties: \"{}\" is not supported; supported are {}",
                shown(name),
                NodeProperties::NAMES.join(", ")
            )));
        }
        Ok(Self {
            arguments: command.arguments.clone(),
            environment,
            outputs: outputs(command, &working_directory)?,
            working_directory,
            report_mtime: properties.iter().any(|name| name == "mtime"),
            report_unix_mode: properties.iter().any(|name| name == "unix_mode"),
            directory_format: DirectoryFormat {
                tree: matches!(format, TreeOnly | TreeAndDirectory),
                directories: matches!(format, DirectoryOnly | TreeAndDirectory),
            },
        })
    }
}

/// The outputs of a command: `output_paths` or, if it is empty, the two legacy lists (EXE-47). A path in both legacy
/// lists may be of either kind (EXE-51). A path that is listed twice is collected once (EXE-49).
#[allow(deprecated)]
fn outputs(command: &reapi::Command, working_directory: &RootPath) -> Result<Vec<OutputRequest>> {
    let mut outputs: Vec<OutputRequest> = Vec::new();
    let mut seen = HashSet::new();
    let mut add = |requested: &String, kind: OutputKind, field: &str| -> Result<()> {
        // In the other fields "" is the working directory, like ".": Pants sends it in output_paths, others in
        // output_directories.
        if requested.is_empty() && field == "output_files" {
            return Err(Error::invalid(
                "Command.output_files contains an empty path, which is the working directory and not a file; \
                 name it in output_paths",
            ));
        }
        let path = working_directory
            .join(requested)
            .map_err(|error| Error::Invalid(format!("Command.{field}: {error}")))?;
        if seen.insert(requested.clone()) {
            outputs.push(OutputRequest { requested: requested.clone(), path, kind });
        }
        Ok(())
    };
    if !command.output_paths.is_empty() {
        for path in &command.output_paths {
            add(path, OutputKind::Any, "output_paths")?;
        }
        return Ok(outputs);
    }
    let files: HashSet<&String> = command.output_files.iter().collect();
    let directories: HashSet<&String> = command.output_directories.iter().collect();
    for path in &command.output_files {
        let kind = if directories.contains(path) { OutputKind::Any } else { OutputKind::File };
        add(path, kind, "output_files")?;
    }
    for path in &command.output_directories {
        let kind = if files.contains(path) { OutputKind::Any } else { OutputKind::Directory };
        add(path, kind, "output_directories")?;
    }
    Ok(outputs)
}

/// EXE-32.
fn timeout(wire: Option<&prost_types::Duration>, policy: TimeoutPolicy) -> Result<Duration> {
    let Some(wire) = wire else { return Ok(policy.default) };
    let Some(timeout) = duration::from_wire(wire) else {
        return Err(Error::invalid("Action.timeout is negative or not a valid duration"));
    };
    if timeout > policy.max {
        return Err(Error::Invalid(format!(
            "Action.timeout of {timeout:?} is above the {:?} that this server allows (execution.max_timeout)",
            policy.max
        )));
    }
    // Clients that fill in every field send 0 when they want the default. A timeout of 0 would be useless.
    Ok(if timeout.is_zero() { policy.default } else { timeout })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instances;
    use gorego_reapi::digest::DigestFunction;

    const POLICY: TimeoutPolicy =
        TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(600) };

    fn parse(action: reapi::Action, command: reapi::Command) -> Result<Action> {
        let instance = Instances::new([""]).unwrap().get("").unwrap();
        let digest = Digest::empty(DigestFunction::Sha256);
        Action::from_wire(instance, digest, &action, &command, POLICY)
    }

    fn action() -> reapi::Action {
        let digest = Some(Digest::empty(DigestFunction::Sha256).to_wire());
        reapi::Action { command_digest: digest.clone(), input_root_digest: digest, ..Default::default() }
    }

    fn command() -> reapi::Command {
        reapi::Command { arguments: vec!["true".into()], ..Default::default() }
    }

    /// EXE-47, EXE-49, EXE-51.
    #[test]
    #[allow(deprecated)]
    fn output_paths_win_over_the_legacy_lists_and_doubles_are_collected_once() {
        let files = vec!["a".into(), "b".into()];
        let legacy = reapi::Command {
            output_files: files,
            output_directories: vec!["b".into(), "c".into()],
            ..command()
        };
        let kinds = |command| -> Vec<(String, OutputKind)> {
            let outputs = parse(action(), command).unwrap().command.outputs;
            outputs.into_iter().map(|output| (output.requested, output.kind)).collect()
        };
        assert_eq!(
            kinds(legacy.clone()),
            [
                ("a".into(), OutputKind::File),
                ("b".into(), OutputKind::Any),
                ("c".into(), OutputKind::Directory)
            ]
        );
        let paths = reapi::Command { output_paths: vec!["x".into(), "x".into()], ..legacy };
        assert_eq!(kinds(paths), [("x".into(), OutputKind::Any)]);
    }

    /// EXE-32.
    #[test]
    fn timeouts_are_bounded_and_have_a_default() {
        let with = |timeout| parse(reapi::Action { timeout, ..action() }, command()).map(|a| a.timeout);
        let wire = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        assert_eq!(with(None), Ok(POLICY.default));
        assert_eq!(with(wire(0, 0)), Ok(POLICY.default));
        assert_eq!(with(wire(600, 0)), Ok(POLICY.max));
        for bad in [wire(601, 0), wire(600, 1), wire(-1, 0), wire(1, -1), wire(1, 1_000_000_000)] {
            assert!(with(bad).is_err(), "{bad:?}");
        }
    }

    /// EXE-27, EXE-29, EXE-63.
    #[test]
    #[allow(deprecated)]
    fn commands_that_cannot_be_run_are_refused_by_field() {
        let cases: [(&str, reapi::Command); 8] = [
            ("arguments", reapi::Command { arguments: vec![], ..command() }),
            ("arguments", reapi::Command { arguments: vec!["a".into(), "\0".into()], ..command() }),
            ("working_directory", reapi::Command { working_directory: "/etc".into(), ..command() }),
            ("working_directory", reapi::Command { working_directory: "../..".into(), ..command() }),
            ("output_paths", reapi::Command { output_paths: vec!["a/../../b".into()], ..command() }),
            ("output_paths", reapi::Command { output_paths: vec!["/etc/passwd".into()], ..command() }),
            ("output_files", reapi::Command { output_files: vec!["".into()], ..command() }),
            ("output_node_properties", {
                reapi::Command { output_node_properties: vec!["nonsense".into()], ..command() }
            }),
        ];
        for (field, command) in cases {
            let error = parse(action(), command).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let rootless = reapi::Action { input_root_digest: None, ..action() };
        assert!(parse(rootless, command()).unwrap_err().to_string().contains("input_root_digest"));
    }

    /// The allocator gives at least 32 bytes for each of the two buffers.
    #[test]
    fn an_action_weighs_what_many_short_texts_take() {
        let output_paths = (0..10_000).map(|n| n.to_string()).collect();
        let paths = parse(action(), reapi::Command { output_paths, ..command() }).unwrap();
        assert!(paths.weight() >= 10_000 * (size_of::<OutputRequest>() + 2 * 32));
        let arguments = vec!["a".to_owned(); 10_000];
        let arguments = parse(action(), reapi::Command { arguments, ..command() }).unwrap();
        assert!(arguments.weight() >= 10_000 * (size_of::<String>() + 32));
    }

    /// EXE-31.
    #[test]
    #[allow(deprecated)]
    fn the_platform_of_the_action_supersedes_that_of_the_command() {
        let platform = |value: &str| {
            let property = reapi::platform::Property { name: "OSFamily".into(), value: value.into() };
            Some(reapi::Platform { properties: vec![property] })
        };
        let both = reapi::Command { platform: platform("command"), ..command() };
        let parsed = parse(reapi::Action { platform: platform("action"), ..action() }, both.clone()).unwrap();
        assert_eq!(parsed.platform[0].1, "action");
        assert_eq!(parse(action(), both).unwrap().platform[0].1, "command");
    }
}
