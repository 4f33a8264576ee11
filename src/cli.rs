//! The command line: arguments, subcommands and exit codes.
//!
//! `gorego` without a subcommand is `gorego serve`. All arguments are parsed here; each subcommand has its own file.
//! Messages for the user go to standard error, requested output goes to standard output.

mod args;
mod banner;
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

pub use args::{
    BenchArgs, ConfigCommand, ExecArgs, Lifetime, LogFormatArg, ReloadArgs, ReplayArgs, ServeArgs,
    ServerArgs, TokenCommand, TokenFileArgs, VerifyArgs,
};
pub use connect::ConnectArgs;

use crate::actors::worker;
use clap::{
    Arg, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};
use clap_complete::Shell;
use gorego_reapi::error::Error;
use std::{
    ffi::OsString,
    io::{self, Write as _},
    process::ExitCode,
};

/// The exit code of a subcommand that succeeded.
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
defaults. An empty variable counts as not set.

Client commands read GOREGO_ENDPOINT, GOREGO_INSTANCE, GOREGO_CREDENTIAL_HELPER, and headers from GOREGO_HEADERS, one
NAME=VALUE in each line.";

/// Bazel remote execution in one binary.
#[derive(Debug, Parser)]
#[command(name = "gorego", version, about, after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// The subcommand; `serve` if there is none.
    #[command(subcommand)]
    pub command: Option<CliCommand>,
    /// The flags of `serve`, if there is no subcommand.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// The subcommands of `gorego`.
#[derive(Debug, Subcommand)]
pub enum CliCommand {
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
    /// Show what the store of a server holds, and remove results from its action cache
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Check and show a configuration, and have a running server reload it
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Create, list and revoke tokens of clients, on the server's machine
    #[command(subcommand)]
    Token(TokenCommand),
    /// Print the completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // This comes first, because the processes that start commands for workers must stay small and single-threaded. The
    // subcommand is not for users.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == worker::RUNNER_SUBCOMMAND) {
        return runner();
    }
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(explain(&hinted(error))),
    };
    let code = match cli.command {
        None => serve::run(&cli.serve),
        Some(CliCommand::Serve(args)) => serve::run(&args),
        Some(CliCommand::Exec(args)) => exec::run(args),
        Some(CliCommand::Replay(args)) => replay::run(args),
        Some(CliCommand::Verify(args)) => verify::run(&args),
        Some(CliCommand::Bench(args)) => bench::run(&args),
        Some(CliCommand::Ops(command)) => ops::run(&command),
        Some(CliCommand::Store(command)) => store::run(&command),
        Some(CliCommand::Config(command)) => config::run(&command),
        Some(CliCommand::Token(command)) => token::run(&command),
        Some(CliCommand::Completions { shell }) => completions::run(shell),
    };
    ExitCode::from(code)
}

/// Parses the command line.
fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut definition = without_empty_variables(Cli::command());
    let mut matches = definition.try_get_matches_from_mut(arguments)?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut definition))
}

/// The definition without the environment variables that are empty, because these count as not set. Templates of
/// containers set variables that have no value to the empty text.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(without_empty_variables)
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

/// Prints a note to standard error. A failure to write it is ignored.
fn print_note(text: &str) {
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
    use crate::size::Size;
    use std::time::Duration;

    fn exec(args: &[&str]) -> Result<ExecArgs, clap::Error> {
        let cli = Cli::try_parse_from(["gorego", "exec"].iter().chain(args))?;
        match cli.command {
            Some(CliCommand::Exec(args)) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_lists_only_the_flags_of_the_connection_below_their_heading() {
        fn leaves(command: &clap::Command) -> Vec<&clap::Command> {
            let nested: Vec<_> = command.get_subcommands().flat_map(leaves).collect();
            if nested.is_empty() { vec![command] } else { nested }
        }
        let cli = Cli::command();
        let connection = ["tls-ca", "tls-cert", "tls-key", "header", "credential-helper"];
        let mut clients = 0;
        for command in leaves(&cli) {
            let below = command.get_arguments().filter(|flag| flag.get_help_heading() == Some("Connection"));
            let below: Vec<_> = below.filter_map(clap::Arg::get_long).collect();
            assert!(below.is_empty() || below == connection, "{}: {below:?}", command.get_name());
            clients += usize::from(!below.is_empty());
        }
        assert!(clients >= 12, "{clients}");
    }

    #[test]
    fn the_manual_page_names_every_subcommand() {
        let page = include_str!("../packaging/gorego.1");
        for command in Cli::command().get_subcommands() {
            let name = format!("RB ( {} ", command.get_name());
            let is_named = page.contains(&name) || page.contains(&format!("RB [ {} ]", command.get_name()));
            assert!(is_named, "{name}");
        }
    }

    #[test]
    fn no_subcommand_means_serve() {
        let bare = Cli::try_parse_from(["gorego", "--max-size-gb", "3"]).unwrap();
        assert!(bare.command.is_none() && bare.serve.max_size_gb == Some(Size::from_gb(3)));
        let named = Cli::try_parse_from(["gorego", "serve", "--max-size-gb", "3"]).unwrap();
        assert!(
            matches!(named.command, Some(CliCommand::Serve(args)) if args.max_size_gb == Some(Size::from_gb(3)))
        );
    }

    #[test]
    fn an_address_that_is_none_is_refused_with_the_text_of_the_configuration() {
        for wrong in ["localhost:52103", "52103", "127.0.0.1:99999"] {
            let error = Cli::try_parse_from(["gorego", "--listen-addr", wrong]).unwrap_err().to_string();
            assert!(error.contains("expected an IP address and a port"), "{error}");
            assert!(error.contains("<IP:PORT>"), "{error}");
        }
        assert!(Cli::try_parse_from(["gorego", "--listen-addr", "[::1]:80"]).is_ok());
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
    fn outputs_that_could_not_be_downloaded_are_refused_before_anything_runs() {
        for (output, hint) in
            [("../o2", "--workdir"), ("a/../../b", "--workdir"), ("/tmp/o", "relative"), ("a\0", "NUL")]
        {
            let error = exec(&["--workdir", "sub", "--output", output, "true"]).unwrap_err();
            assert!(error.to_string().contains(hint), "{error}");
            assert_eq!(error.exit_code(), i32::from(EXIT_USAGE));
        }
        assert_eq!(exec(&["--output", "a/../b", "true"]).unwrap().output, ["a/../b"]);
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
