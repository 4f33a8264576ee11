//! `gorego config`, and the conversion of the flags of `gorego serve` to configuration.

use super::{
    ConfigCommand, EXIT_OK, EXIT_USAGE, LogFormatArg, ServeArgs, complain, environment, output::print,
};
use crate::config::{
    Flag, Loaded, LogFormat, Machine, Settings, Sources, load, load::file_to_read, show::show,
};
use gorego_reapi::error::{Error, Result};
use std::{ffi::OsString, path::Path};
use toml::Value;

/// Runs `gorego config ...` and returns its exit code.
pub(super) fn run(command: &ConfigCommand) -> u8 {
    let outcome = match command {
        ConfigCommand::Check { file } => check(file),
        ConfigCommand::Show(args) => {
            load_settings(args, environment()).map(|(loaded, settings)| show(&loaded, &settings))
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
    let loaded = load(&Sources { file: Some(file.to_owned()), ..Sources::default() })?;
    let settings = Settings::new(&loaded, &Machine::this())?;
    let warnings: String = settings.warnings.iter().map(|warning| format!("warning: {warning}\n")).collect();
    Ok(format!("{warnings}{} is fine\n", file.display()))
}

/// Loads the configuration of a server that is started with these flags and environment variables.
///
/// # Errors
/// The errors of [`load()`] and [`Settings::new`].
pub(super) fn load_settings(args: &ServeArgs, env: Vec<(OsString, OsString)>) -> Result<(Loaded, Settings)> {
    let file = file_to_read(args.config.clone());
    let loaded = load(&Sources { file, env, flags: flags(args)? })?;
    let settings = Settings::new(&loaded, &Machine::this())?;
    Ok((loaded, settings))
}

/// The log format, even if the configuration is invalid: from all sources if only the values are inconsistent, otherwise
/// from environment and flags.
pub(super) fn log_format(args: &ServeArgs, env: Vec<(OsString, OsString)>) -> LogFormat {
    let format = |file, env| {
        let flags = flags(args).ok()?;
        Some(load(&Sources { file, env, flags }).ok()?.config.log.format)
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
