//! The command line: arguments, subcommands and exit codes.
//!
//! `gorego` without a subcommand is `gorego serve`. All arguments are parsed here; each subcommand has its own file.
//! Messages for the user go to standard error, requested output goes to standard output.

mod bench;
mod completions;
mod config;
mod connect;
mod exec;
mod live;
mod ops;
mod output;
mod progress;
mod replay;
mod serve;
mod store;
mod table;
mod token;
mod verify;

pub use connect::ConnectArgs;

use crate::{actors::worker, size::Size};
use clap::{
    Args, Parser, Subcommand, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
};
use clap_complete::Shell;
use gorego_reapi::{digest::DigestFunction, error::Error};
use gorego_verify::rules::Level;
use std::{
    ffi::OsString,
    io::{self, Write as _},
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};
pub use token::Lifetime;

/// The subcommand succeeded.
pub const EXIT_OK: u8 = 0;
/// A server failed, or could not start for a reason outside its configuration.
pub const EXIT_FAILURE: u8 = 1;
/// The command line or configuration is invalid, and nothing was done. clap uses the same code.
pub const EXIT_USAGE: u8 = 2;
/// `exec`: the command was stopped by its timeout. Same code as timeout(1).
pub const EXIT_TIMEOUT: u8 = 124;
/// `exec`: the command could not be run, or its outputs could not be downloaded. Same code as env(1) and docker.
pub const EXIT_INFRASTRUCTURE: u8 = 125;
/// `exec`: stopped by a signal. The number of the signal is added: 130 for Ctrl-C.
pub const EXIT_SIGNALLED: u8 = 128;

/// `verify`: number of concurrent checks.
const DEFAULT_JOBS: NonZeroUsize = gorego_verify::DEFAULT_JOBS;

const EXIT_CODES: &str = "Exit codes:
  serve        0 stopped by a signal, 1 failed, 2 invalid command line or configuration
  exec         the exit code of the command; 2 invalid command line, 124 the command timed out, 125 the command could
               not be run or its outputs could not be downloaded, 129 hung up, 130 interrupted, 143 terminated (the
               operation is cancelled)
  replay       0 same as recorded, or the shell ended; 1 different; 2 it could not be replayed or there is nothing to
               compare with; 129 hung up, 130 interrupted, 143 terminated
  verify       0 no mandatory rule failed, 1 a mandatory rule failed, 2 the server could not be verified
  bench        0 every call succeeded, 1 some failed, 2 nothing was measured
  config       0 valid, 2 invalid; config reload: 0 done, 1 refused by the server, which changed nothing
  token        0 done, 2 nothing was changed
  ops, store   0 done, 1 not done or not all of it, 2 invalid command line; ops watch: 0 the action succeeded, 1 it did
               not, 129 hung up, 130 interrupted, 143 terminated
  completions  0 printed, 1 could not be written
If the reader of their output exits early, as `| head` does, all subcommands except serve end by SIGPIPE (141 in a
shell); exec cancels its operation first.

Every configuration key can be set by an environment variable: GOREGO_LISTEN_ADDR, GOREGO_EXECUTION__CONCURRENCY;
`gorego config show` lists the keys. Flags override the environment, which overrides the file, which overrides the
defaults.

Client commands read GOREGO_ENDPOINT, GOREGO_INSTANCE, GOREGO_CREDENTIAL_HELPER, and headers from GOREGO_HEADERS, one
NAME=VALUE in each line.";

/// Bazel remote execution in one binary.
#[derive(Debug, Parser)]
#[command(name = "gorego", version, about, after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// The subcommand; `serve` if there is none.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The flags of `serve`, if there is no subcommand.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// The subcommands of `gorego`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve remote execution and the cache (the default)
    Serve(ServeArgs),
    /// Run a command on a server, as if it ran here
    Exec(ExecArgs),
    /// Run an action of a server again on this machine, and compare the outcome with the recorded one
    Replay(ReplayArgs),
    /// Check a server of this API, any server, against the rules that clients rely on
    Verify(VerifyArgs),
    /// Measure a server of this API, any server, or the limits of this machine
    Bench(BenchArgs),
    /// List, show, cancel and watch the operations of a server
    #[command(subcommand)]
    Ops(ops::OpsCommand),
    /// Look at the store of a server
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make, list and revoke the tokens of clients, on the server's machine
    #[command(subcommand)]
    Token(TokenCommand),
    /// Print a script that completes this command line in a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// The server that a command speaks to.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// The server
    #[arg(long, env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// TLS and credentials
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
    #[arg(long, value_name = "HOST:PORT")]
    pub listen_addr: Option<SocketAddr>,
    /// Listen on a non-loopback address although everyone who can reach it can run commands here
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
    /// Check a configuration file, without flags and environment
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
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The subcommands of `gorego token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it; the server keeps only its hash
    Create {
        /// A role of the token: reader, developer, ci, worker, admin, or one of the configuration (repeatable)
        #[arg(long = "role", required = true, value_name = "NAME")]
        roles: Vec<String>,
        /// How long it is valid, as in 12h or 90d, or never
        #[arg(long, default_value = "90d", value_name = "TIME", value_parser = token::parse_lifetime)]
        expires: Lifetime,
        /// What to remember it by, such as the machine that has it
        #[arg(long, default_value = "", value_name = "TEXT")]
        note: String,
        /// Where tokens are kept
        #[command(flatten)]
        file: TokenFileArgs,
    },
    /// List the tokens by their public ids
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
    /// TLS and credentials
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Upload this directory as the input root of the command
    #[arg(long, value_name = "DIR")]
    pub input: Option<PathBuf>,
    /// Download this file, directory or symlink afterwards; relative to --workdir (repeatable)
    #[arg(long, value_name = "PATH")]
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
    /// TLS and credentials
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Digest function of the action, such as blake3 [default: the one that the length of the hash suggests, or that of the
    /// operation]
    #[arg(long, value_name = "NAME", value_parser = parse_digest_function)]
    pub digest_function: Option<DigestFunction>,
    /// Configuration file, of which the section "execution" applies, for its sandbox and limits [default: /etc/gorego/gorego.toml if it
    /// exists]
    #[arg(long, env = "GOREGO_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Open a shell where the command would run, instead of running it
    #[arg(long)]
    pub shell: bool,
    /// Leave the directory with the input root, the outputs and the recorded outputs that differ, and say where it is
    #[arg(long)]
    pub keep: bool,
    /// Run the action without a sandbox, with all that you can read and change within its reach
    #[arg(long)]
    pub no_sandbox: bool,
}

/// The flags of `gorego verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// The server
    #[arg(env = "GOREGO_ENDPOINT", default_value = "grpc://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    /// TLS and credentials
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
    /// TLS and credentials
    #[command(flatten)]
    pub connect: ConnectArgs,
    /// Instance name
    #[arg(long, env = "GOREGO_INSTANCE", default_value = "", value_name = "NAME")]
    pub instance: String,
    /// Number of concurrent callers [default: that of the scenario]
    #[arg(long, value_name = "N")]
    pub callers: Option<NonZeroUsize>,
    /// Make this many calls per second, whether or not earlier ones have ended [default: as many as the callers can make]
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub rate: Option<f64>,
    /// Measured time of each scenario
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = parse_timeout)]
    pub duration: Duration,
    /// Time before that in which calls are made but not measured
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
    /// For `limits`: directory on the disk to measure
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub directory: PathBuf,
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

fn parse_digest_function(text: &str) -> Result<DigestFunction, String> {
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

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // The processes that start commands for workers come first: they must stay small and single-threaded. Users have no such
    // subcommand.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == worker::RUNNER_SUBCOMMAND) {
        return runner();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(explain(&hinted(error))),
    };
    let code = match cli.command {
        None => serve::run(&cli.serve),
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Exec(args)) => exec::run(args),
        Some(Command::Replay(args)) => replay::run(args),
        Some(Command::Verify(args)) => verify::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Ops(command)) => ops::run(&command),
        Some(Command::Store(command)) => store::run(&command),
        Some(Command::Config(command)) => config::run(&command),
        Some(Command::Token(command)) => token::run(&command),
        Some(Command::Completions { shell }) => completions::run(shell),
    };
    ExitCode::from(code)
}

/// Adds a hint to the error about `serve` flags that precede a subcommand.
fn hinted(mut error: clap::Error) -> clap::Error {
    if let (ErrorKind::ArgumentConflict, Some(ContextValue::String(command))) =
        (error.kind(), error.get(ContextKind::InvalidSubcommand))
    {
        let hint = match command.as_str() {
            "config" => "write flags behind the subcommand: gorego config show --config FILE".to_owned(),
            command => format!("write flags behind the subcommand; see gorego {command} --help"),
        };
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    }
    error
}

/// Prints the error or the requested help, and returns the exit code.
fn explain(error: &clap::Error) -> u8 {
    let code = u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE);
    match error.print() {
        Ok(()) => code,
        Err(failed) if failed.kind() == io::ErrorKind::BrokenPipe => output::end_by_sigpipe(),
        Err(failed) => {
            complain(&output::unprintable(&failed));
            code.max(EXIT_FAILURE)
        }
    }
}

fn runner() -> ExitCode {
    ExitCode::from(u8::try_from(worker::runner_main()).unwrap_or(EXIT_FAILURE))
}

/// Runs a client command that only waits for a server.
fn block_on<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::io("start the async runtime", &error))?.block_on(work)
}

/// Prints a remark to standard error. A failure to write it is ignored.
fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "gorego: {text}");
}

/// Prints an error to standard error. A failure to write it is ignored.
fn complain(error: &Error) {
    let _ = writeln!(io::stderr(), "gorego: {error}");
}

/// The environment variables of this process.
fn environment() -> Vec<(OsString, OsString)> {
    std::env::vars_os().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn exec(args: &[&str]) -> Result<ExecArgs, clap::Error> {
        let cli = Cli::try_parse_from(["gorego", "exec"].iter().chain(args))?;
        match cli.command {
            Some(Command::Exec(args)) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_and_serve_mean_the_same() {
        let bare = Cli::try_parse_from(["gorego", "--max-size-gb", "3"]).unwrap();
        assert!(bare.command.is_none() && bare.serve.max_size_gb == Some(Size::from_gb(3)));
        let named = Cli::try_parse_from(["gorego", "serve", "--max-size-gb", "3"]).unwrap();
        assert!(
            matches!(named.command, Some(Command::Serve(args)) if args.max_size_gb == Some(Size::from_gb(3)))
        );
        assert!(Cli::try_parse_from(["gorego", "--listen-addr", "nonsense"]).is_err());
    }

    #[test]
    fn flags_before_a_subcommand_are_refused_with_the_place_where_they_belong() {
        for (args, hint) in [
            (&["gorego", "--config", "f", "config", "show"][..], "gorego config show --config FILE"),
            (&["gorego", "--log-filter", "info", "exec", "true"], "gorego exec --help"),
        ] {
            let error = hinted(Cli::try_parse_from(args).unwrap_err()).to_string();
            assert!(error.contains(hint), "{error}");
        }
        assert!(Cli::try_parse_from(["gorego", "config", "show", "--config", "f"]).is_ok());
    }

    #[test]
    fn the_command_of_exec_keeps_its_own_flags() {
        let args = exec(&["--env", "A=b=c", "--output", "x", "--", "sh", "-c", "echo --env"]).unwrap();
        assert_eq!(args.command, ["sh", "-c", "echo --env"]);
        assert_eq!(args.env, [("A".into(), "b=c".into())]);
        assert_eq!(exec(&["ls", "-l", "--env"]).unwrap().command, ["ls", "-l", "--env"]);
        assert_eq!(exec(&["--timeout", "1m 30s", "true"]).unwrap().timeout, Some(Duration::from_secs(90)));
        assert_eq!(exec(&["--priority", "-5", "true"]).unwrap().priority, -5);
        for wrong in [
            &[][..],
            &["--env", "A", "true"],
            &["--env", "=b", "true"],
            &["--timeout", "0s", "true"],
            &["--"],
        ] {
            assert!(exec(wrong).is_err(), "{wrong:?}");
        }
    }
}
