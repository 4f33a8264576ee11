//! The banner that `gorego serve` prints on a terminal when it is ready.

use crate::{
    config::{ExecutionSettings, Settings},
    sandbox::probe::{Protection, Report},
    server::Ready,
    size::Size,
};
use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// The banner: listening address, data directory, number of slots, the sandbox, and the lines for `.bazelrc`.
pub(super) fn banner(settings: &Settings, ready: &Ready) -> String {
    let mut text = format!("goREgo {} listens on {}\n", env!("CARGO_PKG_VERSION"), ready.address);
    let most = Size::from_bytes(settings.max_size_bytes).rounded();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  data     {} (at most {most})", settings.cache_dir.display());
    match &settings.execution {
        Some(execution) => describe_execution(&mut text, execution, ready),
        None => text.push_str("  slots    none; this is a cache only\n"),
    }
    if let Some(file) = &settings.config_file {
        let _ = writeln!(text, "  config   {}", file.display());
    }
    let endpoint = Endpoint::of(ready);
    describe_bazel(&mut text, settings, &endpoint);
    if settings.execution.is_some() {
        let _ = writeln!(text, "\nWithout Bazel: gorego exec {}-- sh -c 'echo hello'", endpoint.flags());
    }
    text
}

/// The slots, and the limits and the sandbox of the actions in them.
fn describe_execution(text: &mut String, execution: &ExecutionSettings, ready: &Ready) {
    let declared = execution.pools.iter().filter(|pool| pool.is_declared);
    let pools: Vec<_> = declared.map(|pool| format!("{} {}", pool.name, pool.slots)).collect();
    let pools = if pools.is_empty() { String::new() } else { format!(" ({})", pools.join(", ")) };
    let _ = writeln!(text, "  slots    {} actions at a time{pools}", execution.slots);
    describe_sandbox(text, ready.sandbox.as_ref());
    let Some(limits) = &ready.limits else { return };
    let total = Size::from_bytes(limits.total_memory).rounded();
    let _ = writeln!(text, "  limits   {}; {total} of memory for all actions", limits.summary());
    for missing in limits.missing() {
        let _ = writeln!(text, "    {missing}");
    }
}

/// The enabled protections as text.
pub(super) fn protections(sandbox: Option<&Report>) -> String {
    match sandbox.map(Report::names) {
        Some(names) if !names.is_empty() => names.join(", "),
        _ => "none".into(),
    }
}

/// The enabled protections and, for each missing one, the consequence, the reason and the remedy.
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

/// The address at which a client on this machine reaches the server.
struct Endpoint {
    url: String,
    has_tls: bool,
    /// Whether the server listens on all addresses, so that other machines need this machine's name.
    is_everywhere: bool,
    /// Whether it is the default of the client commands.
    is_default: bool,
}

impl Endpoint {
    fn of(Ready { address, tls, .. }: &Ready) -> Self {
        let (is_everywhere, host) = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => (true, IpAddr::V4(Ipv4Addr::LOCALHOST)),
            IpAddr::V6(ip) if ip.is_unspecified() => (true, IpAddr::V6(Ipv6Addr::LOCALHOST)),
            ip => (false, ip),
        };
        let scheme = if *tls { "grpcs" } else { "grpc" };
        Self {
            url: format!("{scheme}://{}", SocketAddr::new(host, address.port())),
            has_tls: *tls,
            is_everywhere,
            is_default: address.port() == 50051 && !tls,
        }
    }

    /// The flags of a client command.
    fn flags(&self) -> String {
        let endpoint = if self.is_default { String::new() } else { format!("--endpoint {} ", self.url) };
        endpoint + if self.has_tls { "--tls-ca ca.pem " } else { "" }
    }
}

/// The lines for `.bazelrc`.
fn describe_bazel(text: &mut String, settings: &Settings, endpoint: &Endpoint) {
    text.push_str("\nFor Bazel, put this into .bazelrc");
    if endpoint.is_everywhere {
        text.push_str(" (with this machine's name, from others)");
    }
    text.push_str(":\n");
    if settings.execution.is_some() {
        let _ = writeln!(text, "  build --remote_executor={}", endpoint.url);
        // By default, Bazel mixes remote with local strategies and runs as many jobs as the client has CPUs.
        text.push_str("  build --spawn_strategy=remote,local --genrule_strategy=remote,local\n");
    } else {
        let _ = writeln!(text, "  build --remote_cache={}", endpoint.url);
    }
    let instances = settings.instances.all();
    if let (false, Some(first)) =
        (instances.iter().any(|instance| instance.name().is_empty()), instances.first())
    {
        let _ = writeln!(text, "  build --remote_instance_name={}", first.name());
    }
    text.push_str("  build --incompatible_strict_action_env\n");
    if endpoint.has_tls {
        text.push_str(
            "  build --tls_certificate=ca.pem  # the CA of this server, unless your machine trusts it\n",
        );
    }
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

    /// A new user sees both texts.
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
