//! `gorego config`, and the configuration of `gorego serve` and `gorego replay` from their flags.

mod reload;

use super::{
    ConfigCommand, EXIT_OK, EXIT_USAGE, LogFormatArg, ServeArgs, complain, environment, output::print,
};
use crate::{
    access::check_files,
    config::{
        ExecutionSettings, Flag, Loaded, LogFormat, Machine, Settings, SocketAddress, Sources, TlsSettings,
        load, load::file_to_read, load_checked, show::show,
    },
    server::{check_named_paths, check_tls_files},
};
use gorego_reapi::error::{Error, Result};
use std::{
    ffi::OsString,
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
};
use toml::Value;

/// Runs `gorego config ...` and returns its exit code.
pub(super) fn run(command: &ConfigCommand) -> u8 {
    let outcome = match command {
        ConfigCommand::Reload(args) => return reload::run(args),
        ConfigCommand::Check { file } => check(file),
        ConfigCommand::Show(args) => {
            load_settings(args, environment(), Vec::new()).map(|(loaded, settings)| show(&loaded, &settings))
        }
    };
    match outcome.and_then(|text| print(&text)) {
        Ok(()) => EXIT_OK,
        Err(error) => {
            complain(&error);
            EXIT_USAGE
        }
    }
}

fn check(file: &Path) -> Result<String> {
    let sources = Sources { file: Some(file.to_owned()), ..Sources::default() };
    let (_, settings) = load_checked(&sources, &Machine::this())?;
    let of_files = check_named_files(&settings)?;
    let warnings = settings.warnings.iter().chain(&of_files);
    let warnings: String = warnings.map(|warning| format!("warning: {warning}\n")).collect();
    Ok(format!("{warnings}{} is fine\n", file.display()))
}

/// Checks the files of `[tls]`, `[access]` and `[execution]` like a start of the server. Returns the warnings of a
/// start, and a warning for each section with a file that this user may not read: usually only the user of the server
/// may read them.
fn check_named_files(settings: &Settings) -> Result<Vec<String>> {
    let of_tls = settings.tls.iter().flat_map(TlsSettings::files);
    let mut warnings = match forbidden(of_tls) {
        Some(path) => vec![not_checked("[tls]", path)],
        None => check_tls_files(settings)?,
    };
    match forbidden(settings.access.files()) {
        Some(path) => warnings.push(not_checked("[access]", path)),
        None => check_files(&settings.access)?,
    }
    if let Some(execution) = &settings.execution {
        warnings.extend(check_named_paths(execution)?);
    }
    Ok(warnings)
}

fn not_checked(section: &str, path: &Path) -> String {
    format!(
        "this user may not read {}, so the files of {section} were not checked; run this as the user of the server",
        path.display()
    )
}

/// The first of these files that this user may not read.
fn forbidden<'a>(mut files: impl Iterator<Item = &'a PathBuf>) -> Option<&'a PathBuf> {
    let is_forbidden =
        |path: &&PathBuf| File::open(path).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
    files.find(is_forbidden)
}

/// Loads the configuration of a server that is started with these flags, environment variables and sockets.
///
/// # Errors
/// The errors of [`load_checked`].
pub(super) fn load_settings(
    args: &ServeArgs,
    env: Vec<(OsString, OsString)>,
    sockets: Vec<SocketAddress>,
) -> Result<(Loaded, Settings)> {
    let file = file_to_read(args.config.clone());
    load_checked(&Sources { file, env, flags: flags(args)?, sockets }, &Machine::this())
}

/// The execution settings of `gorego replay`: the settings of a server on this machine, but with a separate build root,
/// copied inputs, and all protections of the sandbox that work, or no sandbox.
///
/// # Errors
/// As [`load_settings`].
pub(super) fn load_for_replay(
    config: Option<PathBuf>,
    directory: &Path,
    build_root: &Path,
) -> Result<ExecutionSettings> {
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(Value::String(text.to_owned())),
        None => Err(Error::Invalid(format!("{} is not UTF-8; set TMPDIR", path.display()))),
    };
    let flag = |key, value| Flag { flag: "gorego replay", key, value };
    let flags = vec![
        flag("local_cache_dir", text(directory)?),
        flag("execution.enabled", Value::Boolean(true)),
        flag("execution.build_root", text(build_root)?),
        flag("execution.staged_inputs_gb", Value::Integer(0)),
        flag("execution.sandbox.mode", Value::String("auto".to_owned())),
    ];
    let sources = Sources { file: file_to_read(config), env: environment(), flags, ..Sources::default() };
    let (_, settings) = load_checked(&sources, &Machine::this())?;
    settings.execution.ok_or_else(|| Error::internal("execution is not enabled"))
}

/// The log format, even if the configuration is invalid: from all sources if only the values are inconsistent,
/// otherwise from environment and flags.
pub(super) fn log_format(args: &ServeArgs, env: Vec<(OsString, OsString)>) -> LogFormat {
    let format = |file, env| {
        let flags = flags(args).ok()?;
        Some(load(&Sources { file, env, flags, ..Sources::default() }).ok()?.config.log.format)
    };
    format(file_to_read(args.config.clone()), env.clone())
        .or_else(|| format(None, env))
        .or_else(|| format(None, Vec::new()))
        .unwrap_or(LogFormat::Auto)
}

fn flags(args: &ServeArgs) -> Result<Vec<Flag>> {
    let number = |flag: &str, value: u64| {
        i64::try_from(value)
            .map(Value::Integer)
            .map_err(|_| Error::Invalid(format!("{flag}: {value} is too large")))
    };
    let mut flags = Vec::new();
    let mut add = |flag, key, value| flags.push(Flag { flag, key, value });
    if let Some(address) = args.listen_addr {
        add("--listen-addr", "listen_addr", Value::String(address.to_string()));
    }
    if args.allow_unauthenticated {
        add("--allow-unauthenticated", "allow_unauthenticated", Value::Boolean(true));
    }
    if let Some(dir) = &args.local_cache_dir {
        let text = dir
            .to_str()
            .filter(|text| !text.is_empty())
            .ok_or_else(|| Error::invalid("--local-cache-dir: expected a directory, in UTF-8"))?;
        add("--local-cache-dir", "local_cache_dir", Value::String(text.to_owned()));
    }
    if let Some(size) = args.max_size_gb {
        add("--max-size-gb", "max_size_gb", Value::String(size.to_string()));
    }
    if let Some(count) = args.concurrency {
        add("--concurrency", "execution.concurrency", number("--concurrency", count)?);
    }
    if let Some(format) = args.log_format {
        let name = match format {
            LogFormatArg::Auto => "auto",
            LogFormatArg::Json => "json",
            LogFormatArg::Text => "text",
        };
        add("--log-format", "log.format", Value::String(name.to_owned()));
    }
    if let Some(filter) = &args.log_filter {
        add("--log-filter", "log.filter", Value::String(filter.clone()));
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    #[test]
    fn the_files_that_a_configuration_names_are_checked_too() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let checked = |text: &str| {
            let file = directory.path().join("gorego.toml");
            fs::write(&file, text).unwrap();
            check(&file)
        };
        let tls = format!("[tls]\ncert = \"{0}\"\nkey = \"{0}\"\n", at("absent.pem"));
        fs::write(directory.path().join("broken"), "neither tokens nor keys").unwrap();
        fs::set_permissions(directory.path().join("broken"), fs::Permissions::from_mode(0o600)).unwrap();
        let tokens = |name: &str| format!("[access]\ntokens = \"{}\"\n", at(name));
        let keys = format!(
            "[[access.jwt]]\nissuer = \"https://a\"\naudience = \"b\"\nalgorithms = [\"RS256\"]\njwks = \"{}\"\n\
             claims = {{ c = \"d\" }}\nroles = [{{ role = \"ci\" }}]\n",
            at("broken")
        );
        for (text, named) in [(&*tls, "absent.pem"), (&tokens("broken"), "broken"), (&keys, "broken")] {
            let error = checked(text).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        // `gorego token create` creates this file.
        let fine = checked(&tokens("not-yet")).unwrap();
        assert!(fine.ends_with("is fine\n") && !fine.contains("warning"), "{fine}");
        for (text, key) in [
            (format!("[access]\npasswords = \"{}\"\n", at("absent")), "access.passwords"),
            (tokens("absent/tokens"), "access.tokens"),
            (format!("[execution.sandbox]\nrootfs = \"{}\"\n", at("absent")), "execution.sandbox"),
            (format!("[execution.sandbox]\nrootfs = \"{}\"\n", at("broken")), "is not a directory"),
        ] {
            let error = checked(&text).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        // These may appear while the server runs.
        let absent = format!(
            "[execution.sandbox]\nvisible = [\"{0}\"]\nwritable = [\"{0}-2\"]\n\
             [execution.images]\nregistries = [\"r.example.com\"]\ncredentials = \"{0}-3\"\nlayouts = [\"{0}-4\"]\n",
            at("absent")
        );
        let warned = checked(&absent).unwrap();
        for named in ["absent ", "absent-2 ", "absent-3 ", "absent-4 "] {
            let line = warned.lines().find(|line| line.contains(named));
            assert!(line.is_some_and(|line| line.starts_with("warning: ")), "{named}: {warned}");
        }
    }
}
