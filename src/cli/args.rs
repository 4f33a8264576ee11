//! The arguments of the subcommands, and how their values are written.

use super::ConnectArgs;
use crate::{config::parse_address, size::Size};
use clap::{Args, Subcommand, ValueEnum};
use gorego_reapi::{digest::DigestFunction, path::RootPath};
use gorego_verify::rules::Level;
use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

/// `verify`: number of concurrent checks.
const DEFAULT_JOBS: NonZeroUsize = gorego_verify::DEFAULT_JOBS;

/// The server that a command speaks to.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// The server
    #[arg(long, env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// TLS and credentials of the connection to the server.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// Flags of `gorego serve`.
#[derive(Debug, Clone, Default, Args)]
pub struct ServeArgs {
    /// Configuration file [default: /etc/gorego/gorego.toml if it exists]
    #[arg(long, env = "GOREGO_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address on which gRPC is served [default: 127.0.0.1:50051]
    #[arg(long, value_name = "IP:PORT", value_parser = parse_address)]
    pub listen_addr: Option<SocketAddr>,
    /// Listen on a non-loopback address without TLS or credentials: everyone who can reach it can run commands here
    #[arg(long)]
    pub allow_unauthenticated: bool,
    /// Directory for blobs and results [default: gorego in the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub local_cache_dir: Option<PathBuf>,
    /// Limit on the size of the store on disk, in GB or with a unit: 50, 0.5, "200 MB", 64GiB [default: 50]
    #[arg(long, value_name = "SIZE", value_parser = Size::from_words)]
    pub max_size_gb: Option<Size>,
    /// Number of actions that run at the same time [default: number of CPUs]
    #[arg(long, value_name = "N")]
    pub concurrency: Option<u64>,
    /// Format of log lines [default: text on a terminal, JSON elsewhere]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormatArg>,
    /// Messages to log, by target: info, gorego=debug,h2=warn
    #[arg(long, value_name = "FILTER")]
    pub log_filter: Option<String>,
}

/// The values of `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormatArg {
    /// Text on a terminal, JSON elsewhere
    Auto,
    /// One JSON object per line
    Json,
    /// Human-readable text
    Text,
}

/// The subcommands of `gorego config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file and the files that it names, without flags and environment
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print the effective values and the source of each
    Show(ServeArgs),
    /// Have a running server read its configuration again, and say what has changed and what needs a restart
    Reload(ReloadArgs),
}

/// The flags of `gorego config reload`.
#[derive(Debug, Clone, Args)]
pub struct ReloadArgs {
    /// Only check the configuration and say what would change
    #[arg(long)]
    pub dry_run: bool,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The subcommands of `gorego token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Create a token and print it; the server keeps only its hash
    Create {
        /// A role of the token: reader, developer, ci, worker, admin, or a role of the configuration (repeatable)
        #[arg(long = "role", required = true, value_name = "NAME")]
        roles: Vec<String>,
        /// How long the token is valid: 12h, 90d, or never
        #[arg(long, default_value = "90d", value_name = "TIME", value_parser = parse_lifetime)]
        expires: Lifetime,
        /// A note for `token list`, such as the machine that has the token
        #[arg(long, default_value = "", value_name = "TEXT")]
        note: String,
        /// Where tokens are kept
        #[command(flatten)]
        file: TokenFileArgs,
    },
    /// List the tokens: public id, times, roles and note
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Where tokens are kept
        #[command(flatten)]
        file: TokenFileArgs,
    },
    /// Revoke tokens; a running server refuses them within seconds
    Revoke {
        /// The ids, as `list` shows them
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
        /// Have this server revoke them, instead of changing a file here
        #[arg(long, value_name = "URL", conflicts_with = "file")]
        endpoint: Option<String>,
        /// TLS and credentials of the connection to the server.
        #[command(flatten)]
        connect: ConnectArgs,
        /// Where tokens are kept
        #[command(flatten)]
        file: TokenFileArgs,
    },
}

/// The flags that say where tokens are kept.
#[derive(Debug, Clone, Default, Args)]
pub struct TokenFileArgs {
    /// Configuration file of the server [default: /etc/gorego/gorego.toml if it exists]
    #[arg(long, env = "GOREGO_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// File of the tokens [default: access.tokens of the configuration]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// The flags of `gorego exec`.
#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// The server
    #[arg(long, env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// TLS and credentials of the connection to the server.
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Upload this directory as the input root of the command
    #[arg(long, value_name = "DIR")]
    pub input: Option<PathBuf>,
    /// Download this file, directory or symlink afterwards; a path below --workdir, and relative to it (repeatable)
    #[arg(long, value_name = "PATH", value_parser = parse_output)]
    pub output: Vec<String>,
    /// Directory to which outputs are written
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Set an environment variable of the command; the environment otherwise contains only
    /// PATH=/usr/local/bin:/usr/bin:/bin (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub env: Vec<(String, String)>,
    /// Directory below the input root in which the command runs
    #[arg(long, default_value = "", value_name = "PATH")]
    pub workdir: String,
    /// Stop the command after this time, as in 30s or 10m [default: the server's]
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    pub timeout: Option<Duration>,
    /// Ask for a worker with this property (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub platform: Vec<(String, String)>,
    /// Run the command even if its result is cached, and do not cache the result
    #[arg(long)]
    pub no_cache: bool,
    /// Commands with a lower value run sooner
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "N")]
    pub priority: i32,
    /// The command and its arguments; no shell is involved
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// The flags of `gorego replay`.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// The action: its digest as HASH/SIZE, or the name of an operation that ran it
    #[arg(value_name = "DIGEST|OPERATION")]
    pub subject: String,
    /// The server
    #[arg(
        long,
        visible_alias = "server",
        env = "GOREGO_ENDPOINT",
        default_value = "grpc://127.0.0.1:50051",
        value_name = "URL"
    )]
    pub endpoint: String,
    /// TLS and credentials of the connection to the server.
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Digest function of the action, such as blake3 [default: the one that the length of the hash suggests, or the one
    /// of the operation]
    #[arg(long, value_name = "NAME", value_parser = parse_digest_function)]
    pub digest_function: Option<DigestFunction>,
    /// Configuration file, of which the section "execution" applies, for its sandbox and limits [default:
    /// /etc/gorego/gorego.toml if it exists]
    #[arg(long, env = "GOREGO_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Open a shell where the command would run, instead of running it
    #[arg(long)]
    pub shell: bool,
    /// Leave the directory with the input root, the outputs and the recorded outputs that differ, and say where it is
    #[arg(long)]
    pub keep: bool,
    /// Run the action without a sandbox: it can read and change everything that you can
    #[arg(long)]
    pub no_sandbox: bool,
}

/// The flags of `gorego verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// The server
    #[arg(env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// TLS and credentials of the connection to the server.
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// A second instance of the server, to check that instances do not see each other's data
    #[arg(long, value_name = "NAME")]
    pub other_instance: Option<String>,
    /// Digest function of all checks that are not about digest functions [default: SHA256 if supported]
    #[arg(long, value_name = "NAME")]
    pub digest_function: Option<String>,
    /// Run actions on workers with this property (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub platform: Vec<(String, String)>,
    /// Host name or address under which the server can reach this machine, for checks in which it fetches from here
    /// [default: 127.0.0.1]
    #[arg(long, value_name = "HOST")]
    pub asset_origin: Option<String>,
    /// Run only these rules and groups, as in GEN-01,CAS
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    pub only: Vec<String>,
    /// Run only rules of this level and above
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
    /// Treat a failed `should` rule as a failure instead of a warning
    #[arg(long)]
    pub strict: bool,
    /// List the checks and exit
    #[arg(long)]
    pub list: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Also write the report as JUnit XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Number of checks that run at the same time
    #[arg(long, default_value_t = DEFAULT_JOBS, value_name = "N")]
    pub jobs: NonZeroUsize,
    /// Time limit of one check
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = parse_timeout)]
    pub timeout: Duration,
    /// Also run checks that transfer a gigabyte
    #[arg(long)]
    pub large: bool,
}

/// Flags of `gorego bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The server, or the word `limits` to measure what this machine can do without one
    #[arg(env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL|limits")]
    pub endpoint: String,
    /// Scenarios to run, in this order [default: all]
    #[arg(value_name = "SCENARIO")]
    pub scenarios: Vec<String>,
    /// TLS and credentials of the connection to the server.
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Number of concurrent callers [default: as the scenario says]
    #[arg(long, value_name = "N")]
    pub callers: Option<NonZeroUsize>,
    /// Make this many calls per second, whether or not earlier ones have ended [default: as many as the callers can
    /// make]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub rate: Option<f64>,
    /// Measured time of each scenario and of each limit
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = parse_timeout)]
    pub duration: Duration,
    /// Warm-up time before the measured time, in which calls are made but not measured
    #[arg(long, default_value = "1s", value_name = "TIME", value_parser = parse_timeout)]
    pub warm_up: Duration,
    /// Process id of the server, to report its CPU time and memory
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Print the results as JSON
    #[arg(long)]
    pub json: bool,
    /// Compare with an earlier run that was printed with --json
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub compare: Option<PathBuf>,
    /// List the scenarios and exit
    #[arg(long)]
    pub list: bool,
    /// Also measure what this machine can do without a server, and print the share of it that each scenario reaches
    #[arg(long)]
    pub limits: bool,
    /// For `limits` and --limits: directory on the disk to measure
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub directory: PathBuf,
}

/// Outputs are written below a directory that stands for the working directory, so none can lie above it.
fn parse_output(text: &str) -> Result<String, String> {
    match RootPath::root().join(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) if !text.starts_with('/') && text.split('/').any(|segment| segment == "..") => {
            Err("is above the working directory; set --workdir to a directory above it, and let the command change its \
                 directory (sh -c 'cd sub && ...')"
                .into())
        }
        Err(error) => Err(format!("{error}; write it relative to --workdir")),
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let is_rate = |rate: &f64| (0.001..=1e6).contains(rate);
    text.parse().ok().filter(is_rate).ok_or_else(|| "expected calls per second, from 0.001 to 1000000".into())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

pub(super) fn parse_digest_function(text: &str) -> Result<DigestFunction, String> {
    let named = |function: &&DigestFunction| function.name().eq_ignore_ascii_case(text);
    DigestFunction::ALL.iter().find(named).copied().ok_or_else(|| {
        let names: Vec<_> = DigestFunction::ALL.iter().map(|function| function.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        // Servers interpret a timeout of 0 as "not set".
        Ok(timeout) if timeout.is_zero() => Err("must be more than 0".into()),
        Ok(timeout) => Ok(timeout),
        Err(error) => Err(format!("{error}; write it like 30s or 10m")),
    }
}

/// How long a token is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// For this time from its creation.
    For(Duration),
    /// Until it is revoked.
    Unlimited,
}

/// Parses the value of `--expires`: `never`, or a duration.
fn parse_lifetime(text: &str) -> std::result::Result<Lifetime, String> {
    if text == "never" {
        return Ok(Lifetime::Unlimited);
    }
    match humantime::parse_duration(text) {
        Ok(time) if time.is_zero() => Err("must be more than 0".into()),
        Ok(time) => Ok(Lifetime::For(time)),
        Err(error) => Err(format!("{error}; write it like 12h, 90d or never")),
    }
}
