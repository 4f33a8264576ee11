//! `gorego serve`: loads the configuration, installs the logger, runs the server, and prints a banner when it is ready.

use super::{
    EXIT_FAILURE, EXIT_OK, EXIT_USAGE, ServeArgs, complain,
    config::{load_settings, log_format},
    environment,
};
use crate::{
    cgroups::LimitReport,
    config::{Config, LogConfig, Settings, SocketAddress},
    logging::{self, Event, Style},
    sandbox::probe::{Protection, Report},
    server::{self, Ready},
    size::Size,
    supervisor::{InheritedSockets, Supervision},
};
use gorego_reapi::error::Error;
use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

/// Runs a server and returns the exit code of the process.
pub(super) fn run(args: &ServeArgs) -> u8 {
    // Before there are threads, because it changes the environment.
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
            .log(format_args!("the supervisor cannot be told how the server is: {problem}"));
    }
    supervisor.status("opening the store");
    let (announced, args, sockets) = (settings.clone(), args.clone(), addresses(&supervision.sockets));
    let load = move || load_settings(&args, environment(), sockets.clone());
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

/// Where the supervisor's sockets listen, as a source of the configuration.
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
    // On a terminal too: what is missing should not be overlooked.
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
        // Printed in one piece, so that no log line appears within it.
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

/// The protections that are on, as words.
fn protections(sandbox: Option<&Report>) -> String {
    match sandbox.map(Report::names) {
        Some(names) if !names.is_empty() => names.join(", "),
        _ => "none".into(),
    }
}

/// The protections that are on, and for each other one what that means, why, and what enables it.
fn describe_sandbox(text: &mut String, sandbox: Option<&Report>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  sandbox  {}", protections(sandbox));
    let Some(report) = sandbox else {
        let _ = writeln!(text, "    {}", Protection::Namespaces.consequence());
        return;
    };
    for missing in &report.missing {
        let _ = match &missing.remedy {
            None => writeln!(text, "    {}: {}", missing.headline(), missing.reason),
            Some(remedy) => writeln!(
                text,
                "    {}\n      why: {}\n      to enable it: {remedy}",
                missing.headline(),
                missing.reason
            ),
        };
    }
    if !report.missing.is_empty() {
        text.push_str("    docs/sandbox.md explains each\n");
    }
}

/// The banner: listening address, data directory, number of slots, the sandbox, and the lines for `.bazelrc`.
pub(super) fn banner(settings: &Settings, ready: &Ready) -> String {
    let Ready { address, tls, sandbox, limits } = ready;
    let (unspecified, host) = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (true, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        IpAddr::V6(ip) if ip.is_unspecified() => (true, IpAddr::V6(Ipv6Addr::LOCALHOST)),
        ip => (false, ip),
    };
    let endpoint =
        format!("{}://{}", if *tls { "grpcs" } else { "grpc" }, SocketAddr::new(host, address.port()));
    let mut text = format!("goREgo {} listens on {address}\n", env!("CARGO_PKG_VERSION"));
    let most = Size::from_bytes(settings.max_size_bytes).rounded();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  data     {} (at most {most})", settings.cache_dir.display());
    match &settings.execution {
        Some(execution) => {
            let _ = write!(text, "  slots    {} actions at a time", execution.slots);
            let declared = execution.pools.iter().filter(|pool| pool.is_declared);
            let pools: Vec<_> = declared.map(|pool| format!("{} {}", pool.name, pool.slots)).collect();
            text.push_str(&if pools.is_empty() {
                "\n".to_owned()
            } else {
                format!(" ({})\n", pools.join(", "))
            });
            describe_sandbox(&mut text, sandbox.as_ref());
            if let Some(limits) = limits {
                let total = Size::from_bytes(limits.total_memory).rounded();
                let _ = writeln!(text, "  limits   {}; {total} of memory for all actions", limits.summary());
                for missing in limits.missing() {
                    let _ = writeln!(text, "    {missing}");
                }
            }
        }
        None => text.push_str("  slots    none; this is a cache only\n"),
    }
    if let Some(file) = &settings.config_file {
        let _ = writeln!(text, "  config   {}", file.display());
    }
    text.push_str("\nFor Bazel, put this into .bazelrc");
    if unspecified {
        text.push_str(" (with this machine's name, from others)");
    }
    text.push_str(":\n");
    if settings.execution.is_some() {
        let _ = writeln!(text, "  build --remote_executor={endpoint}");
        // By default, Bazel mixes remote with local strategies and runs as many jobs as the client has CPUs.
        text.push_str("  build --spawn_strategy=remote,local --genrule_strategy=remote,local\n");
    } else {
        let _ = writeln!(text, "  build --remote_cache={endpoint}");
    }
    let instances = settings.instances.all();
    if let (false, Some(first)) =
        (instances.iter().any(|instance| instance.name().is_empty()), instances.first())
    {
        let _ = writeln!(text, "  build --remote_instance_name={}", first.name());
    }
    text.push_str("  build --incompatible_strict_action_env\n");
    if *tls {
        text.push_str(
            "  build --tls_certificate=ca.pem  # the CA of this server, unless your machine trusts it\n",
        );
    }
    if settings.execution.is_some() {
        let is_default = address.port() == 50051 && !tls;
        let mut flag = if is_default { String::new() } else { format!("--endpoint {endpoint} ") };
        if *tls {
            flag.push_str("--tls-ca ca.pem ");
        }
        let _ = writeln!(text, "\nWithout Bazel: gorego exec {flag}-- sh -c 'echo hello'");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Loaded, Machine},
        sandbox::probe::MissingProtection,
    };

    fn settings(change: impl FnOnce(&mut crate::config::Config)) -> Settings {
        let mut loaded = Loaded::defaults();
        change(&mut loaded.config);
        let machine = Machine { cpus: 3, cache_home: Some("/home/u/.cache".into()), current_dir: "/".into() };
        Settings::new(&loaded, &machine).unwrap()
    }

    fn ready(address: &str) -> Ready {
        Ready { address: address.parse().unwrap(), tls: false, sandbox: None, limits: None }
    }

    #[test]
    fn the_banner_has_lines_to_paste_that_lead_to_this_server() {
        let text = banner(&settings(|_| {}), &ready("127.0.0.1:50051"));
        for part in
            ["/home/u/.cache/gorego", "3 actions", "--remote_executor=grpc://127.0.0.1:50051", "-- sh"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        let cache = settings(|config| {
            config.execution.enabled = false;
            config.instance_names = vec!["main".into()];
        });
        let text = banner(&cache, &ready("[::]:9092"));
        for part in ["--remote_cache=grpc://[::1]:9092", "--remote_instance_name=main", "cache only"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("remote_executor"));
        let text = banner(&settings(|_| {}), &Ready { tls: true, ..ready("127.0.0.1:50051") });
        for part in [
            "=grpcs://127.0.0.1:50051",
            "--tls_certificate=ca.pem",
            "--endpoint grpcs://127.0.0.1:50051 --tls-ca",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn the_banner_tells_what_a_missing_protection_means_and_what_enables_it() {
        let missing = |protection, reason: &str, remedy: Option<&str>| MissingProtection {
            protection,
            reason: reason.into(),
            remedy: remedy.map(str::to_owned),
        };
        let report = Report {
            missing: vec![
                missing(Protection::Namespaces, "a limit is 0", Some("sysctl -w limit=1")),
                missing(Protection::Filter, "no seccomp", None),
            ],
            ..Report::default()
        };
        let with = |sandbox| banner(&settings(|_| {}), &Ready { sandbox, ..ready("127.0.0.1:50051") });
        let text = with(Some(report));
        for part in [
            "\n  sandbox  none\n    namespaces is off, so actions see this machine",
            "\n      why: a limit is 0\n      to enable it: sysctl -w limit=1\n",
            "\n    filter is off, so actions may use every system call: no seccomp\n",
            "docs/sandbox.md",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let off = with(None);
        assert!(off.contains("\n  sandbox  none\n    actions see this machine"), "{off}");
    }

    /// A new user sees both.
    #[test]
    fn the_readme_has_the_same_lines_for_bazel_as_the_banner() {
        let readme = include_str!("../../README.md");
        let lines = |text: &str| -> Vec<String> {
            let lines = text.lines().map(str::trim).filter(|line| line.starts_with("build --"));
            lines.map(str::to_owned).collect()
        };
        let banner = lines(&banner(&settings(|_| {}), &ready("127.0.0.1:50051")));
        assert_eq!(lines(readme), banner);
    }
}
