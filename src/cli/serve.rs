//! `gorego serve`: loads the configuration, installs the logger, runs the server, and prints a banner when it is ready.

use super::{
    EXIT_FAILURE, EXIT_OK, EXIT_USAGE, ServeArgs,
    banner::{banner, protections},
    complain,
    config::{load_settings, log_format},
    environment,
};
use crate::{
    cgroups::LimitReport,
    config::{Config, LogConfig, Settings, SocketAddress, check_reload},
    logging::{self, Event, Style},
    memory,
    server::{self, Ready},
    supervisor::{InheritedSockets, Supervision},
};
use gorego_reapi::error::Error;
use std::path::Path;

/// Runs a server and returns the exit code of the process.
pub(super) fn run(args: &ServeArgs) -> u8 {
    // Both must happen before threads exist; the second changes the environment.
    memory::limit_arenas();
    let (supervisor, supervision) = Supervision::take();
    let loaded = supervision.and_then(|supervision| {
        let loaded = load_settings(args, environment(), addresses(&supervision.sockets))?;
        Ok((supervision, loaded))
    });
    let (supervision, (loaded, settings)) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            supervisor.status(&error.to_string());
            refuse(args, &error);
            return EXIT_USAGE;
        }
    };
    let style = logging::init(&settings.log);
    let _flush = logging::FlushOnDrop;
    for warning in &settings.warnings {
        Event::warn("gorego::config", "config_warning").log(format_args!("{warning}"));
    }
    if let Some(problem) = supervisor.problem() {
        Event::warn("gorego::server", "supervisor_unreachable")
            .with("error", problem)
            .log(format_args!("the state of the server cannot be reported to the supervisor: {problem}"));
    }
    supervisor.status("opening the store");
    let (announced, running, sockets) =
        (settings.clone(), loaded.config.clone(), addresses(&supervision.sockets));
    // A reload reads the same file. If it is gone, the reload is refused.
    let args = ServeArgs { config: loaded.file.clone().or_else(|| args.config.clone()), ..args.clone() };
    let load = move || {
        let (loaded, settings) = load_settings(&args, environment(), sockets.clone())?;
        check_reload(&loaded.config, &running)?;
        Ok((loaded, settings))
    };
    match server::run((loaded, settings), load, supervision, move |ready| announce(style, &announced, &ready))
    {
        Ok(()) => EXIT_OK,
        Err(error) => {
            supervisor.status(&error.to_string());
            Event::error("gorego::server", "server_failed").log(format_args!("{error}"));
            EXIT_FAILURE
        }
    }
}

/// The addresses of the supervisor's sockets, as a source of the configuration.
fn addresses(sockets: &InheritedSockets) -> Vec<SocketAddress> {
    let addresses = sockets.addresses().into_iter();
    addresses.map(|(port, address)| SocketAddress { name: port.name(), key: port.key(), address }).collect()
}

/// Reports an invalid configuration: as plain text for people, or as one log event.
fn refuse(args: &ServeArgs, error: &Error) {
    let log = LogConfig { format: log_format(args, environment()), ..Config::default().log };
    match logging::init(&log) {
        Style::Text { .. } => complain(error),
        Style::Json => {
            Event::error("gorego::server", "server_failed").log(format_args!("{error}"));
            logging::flush();
        }
    }
}

/// Reports that the server is ready: as a banner for people, or as one log event.
fn announce(style: Style, settings: &Settings, ready: &Ready) {
    let Ready { address, tls, sandbox, limits } = ready;
    // This is logged on a terminal too, so that missing protections are noticed.
    for missing in sandbox.iter().flat_map(|report| &report.missing) {
        Event::warn("gorego::server", "protection_missing")
            .with("protection", missing.protection.name())
            .with("error", &*missing.reason)
            .with_some("remedy", missing.remedy.as_deref())
            .log(format_args!("the sandbox of actions is incomplete: {} is off", missing.protection.name()));
    }
    for missing in limits.iter().flat_map(LimitReport::missing) {
        Event::warn("gorego::server", "limits_incomplete")
            .with("limits", &*missing.resources)
            .with("error", &*missing.reason)
            .with_some("remedy", missing.remedy.as_deref())
            .log(format_args!("control groups do not bound everything that actions use: {missing}"));
    }
    let slots = settings.execution.as_ref().map_or(0, |execution| execution.slots);
    match style {
        // The banner is printed in one write, so that no log line appears within it.
        Style::Text { .. } => logging::print(&banner(settings, ready)),
        Style::Json => {
            let config_file = settings.config_file.as_deref().unwrap_or(Path::new(""));
            Event::info("gorego::server", "server_started")
                .with_shown("listen_addr", address)
                .with("tls", *tls)
                .with_shown("data_dir", &settings.cache_dir.display())
                .with("slots", slots)
                .with("sandbox", &*protections(sandbox.as_ref()))
                .with("limits", &*limits.as_ref().map_or_else(|| "none".into(), LimitReport::summary))
                .with("max_size_bytes", settings.max_size_bytes)
                .with_shown("config_file", &config_file.display())
                .with("version", env!("CARGO_PKG_VERSION"))
                .log(format_args!("serving on {address}"));
        }
    }
}
