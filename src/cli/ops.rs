//! `gorego ops`: the operations of a server, listed, shown, cancelled and watched.
//!
//! All subcommands use google.longrunning.Operations. So they need only permissions for operations, and they work with
//! other servers that offer this service.

mod cancel;
mod list;
pub(super) mod names;
mod show;
mod view;
mod watch;

pub(super) use view::rfc3339;

use super::{EXIT_FAILURE, EXIT_OK, ServerArgs, complain};
use clap::{Args, Subcommand, ValueEnum};
use gorego_client::{Client, Identity};
use gorego_reapi::error::{Error, Result};

/// The subcommands of `gorego ops`.
#[derive(Debug, Clone, Subcommand)]
pub enum OpsCommand {
    /// List the operations that have not ended, oldest first
    List(ListArgs),
    /// Show all that the server says about operations
    Show(ShowArgs),
    /// Cancel operations
    Cancel(CancelArgs),
    /// Follow an operation until its end
    Watch(WatchArgs),
}

/// A filter of operations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct FilterArgs {
    /// Only operations in this state
    #[arg(long, value_name = "STATE")]
    pub state: Option<StateArg>,
    /// Only operations of this run of a build tool (Bazel's invocation id)
    #[arg(long, value_name = "ID")]
    pub invocation: Option<String>,
    /// Only operations of this target
    #[arg(long, value_name = "LABEL")]
    pub target: Option<String>,
    /// Only operations that run in this pool, or wait and can run in it
    #[arg(long, value_name = "NAME")]
    pub pool: Option<String>,
    /// Only operations that this worker runs or ran
    #[arg(long, value_name = "NAME")]
    pub worker: Option<String>,
}

/// The values of `--state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// It waits for a slot
    Queued,
    /// A worker runs it
    Executing,
    /// It has ended
    Completed,
}

/// The flags of `gorego ops list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The operations to list.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Also list operations that have ended and that the server remembers
    #[arg(long)]
    pub all: bool,
    /// List at most this many
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The flags of `gorego ops show`.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Names or ids of operations, or the beginning of ids
    #[arg(required = true, value_name = "OPERATION")]
    pub operations: Vec<String>,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// The flags of `gorego ops cancel`.
#[derive(Debug, Clone, Args)]
pub struct CancelArgs {
    /// Names or ids of operations, or the beginning of ids
    #[arg(required_unless_present_any = ["state", "invocation", "target", "pool", "worker"], value_name = "OPERATION")]
    pub operations: Vec<String>,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Instead of names: all operations of this kind that have not ended.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Cancel the operations that the filter finds; without it, only show them
    #[arg(long)]
    pub yes: bool,
}

/// The flags of `gorego ops watch`.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Name or id of an operation, or the beginning of its id
    #[arg(value_name = "OPERATION")]
    pub operation: String,
    /// The server that answers the command, and the connection to it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print one JSON object for each change (docs/administration.md)
    #[arg(long)]
    pub json: bool,
}

/// Runs `gorego ops ...` and returns its exit code.
pub(super) fn run(command: &OpsCommand) -> u8 {
    let outcome = super::block_on(async {
        match command {
            OpsCommand::List(args) => list::list(args).await,
            OpsCommand::Show(args) => show::show(args).await,
            OpsCommand::Cancel(args) => cancel::cancel(args).await,
            OpsCommand::Watch(args) => watch::watch(args).await,
        }
    });
    outcome.unwrap_or_else(|error| {
        complain(&error);
        EXIT_FAILURE
    })
}

/// Connects to the server of an administrative command.
pub(super) async fn connect(server: &ServerArgs) -> Result<Client> {
    let options = server.connect.options(&server.endpoint)?;
    Client::connect(options, &server.instance, &identity()).await
}

/// The identity that the administrative commands send.
fn identity() -> Identity {
    Identity {
        tool: "gorego".into(),
        invocation_id: uuid::Uuid::new_v4().to_string(),
        mnemonic: String::new(),
        target_id: String::new(),
    }
}

impl FilterArgs {
    /// The filter in the syntax of the server. Without `all`, only operations that have not ended match.
    ///
    /// # Errors
    /// `Invalid` for a value that the syntax cannot express.
    fn text(&self, all: bool) -> Result<String> {
        let mut terms = Vec::new();
        match self.state {
            Some(StateArg::Queued) => terms.push("stage=QUEUED".to_owned()),
            Some(StateArg::Executing) => terms.push("stage=EXECUTING".to_owned()),
            Some(StateArg::Completed) => terms.push("stage=COMPLETED".to_owned()),
            None if all => {}
            None => terms.push("done=false".to_owned()),
        }
        let values = [
            ("invocation", &self.invocation),
            ("target", &self.target),
            ("pool", &self.pool),
            ("worker", &self.worker),
        ];
        for (key, value) in values {
            let Some(value) = value else { continue };
            if value.is_empty() || value.contains('"') {
                return Err(Error::Invalid(format!("--{key} must not be empty or contain quotes")));
            }
            terms.push(format!("{key}=\"{value}\""));
        }
        Ok(terms.join(" AND "))
    }
}

/// The exit code of a command that was applied to several operations.
fn code(all_done: bool) -> u8 {
    if all_done { EXIT_OK } else { EXIT_FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_written_as_the_server_reads_them() {
        let filter = FilterArgs {
            state: Some(StateArg::Queued),
            target: Some("//a:b c".into()),
            worker: Some("host/0".into()),
            ..FilterArgs::default()
        };
        let text = filter.text(false).unwrap();
        assert_eq!(text, "stage=QUEUED AND target=\"//a:b c\" AND worker=\"host/0\"");
        crate::grpc::filter::parse(&text).unwrap();
        assert_eq!(FilterArgs::default().text(false).unwrap(), "done=false");
        assert_eq!(FilterArgs::default().text(true).unwrap(), "");
        for bad in ["", "a\"b"] {
            assert!(FilterArgs { pool: Some(bad.into()), ..FilterArgs::default() }.text(false).is_err());
        }
    }
}
