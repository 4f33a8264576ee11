//! `gorego token`: creates, lists and revokes static tokens in the file of `access.tokens`. A server can be asked to
//! revoke them too.

use super::{
    ConnectArgs, EXIT_OK, EXIT_USAGE, Lifetime, ServeArgs, ServerArgs, TokenCommand, TokenFileArgs, block_on,
    complain, config::load_settings, environment, ops::connect, output::print,
};
use crate::access::{
    NOTICE_TIME,
    policy::Policy,
    tokens::{
        NOTE_MAX_BYTES, NewToken, TokenRecord,
        file::{read, update},
    },
};
use gorego_reapi::{
    error::{Error, Result},
    escape::escaped,
    proto::gorego::RevokedToken,
};
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
    time::{Duration, SystemTime},
};

/// Runs `gorego token ...` and returns its exit code.
pub(super) fn run(command: &TokenCommand) -> u8 {
    let outcome = match command {
        TokenCommand::Create { roles, expires, note, file } => create(roles, *expires, note, file),
        TokenCommand::List { json, file } => list(*json, file),
        TokenCommand::Revoke { ids, endpoint: Some(endpoint), connect, .. } => {
            revoke_at(ids, endpoint, connect)
        }
        TokenCommand::Revoke { endpoint: None, connect, .. } if connect.has_flags() => Err(Error::invalid(
            "flags for a connection need --endpoint URL, the server that is to revoke the tokens",
        )),
        TokenCommand::Revoke { ids, endpoint: None, file, .. } => revoke(ids, file),
    };
    match outcome.and_then(|text| print(&text)) {
        Ok(()) => EXIT_OK,
        Err(error) => {
            complain(&error);
            EXIT_USAGE
        }
    }
}

fn create(roles: &[String], expires: Lifetime, note: &str, file: &TokenFileArgs) -> Result<String> {
    let (path, policy) = place(file)?;
    policy.roles_named(roles)?;
    if note.len() > NOTE_MAX_BYTES || note.chars().any(char::is_control) {
        return Err(Error::Invalid(format!("--note: at most {NOTE_MAX_BYTES} bytes of printable text")));
    }
    let NewToken { text, id, sha256 } = NewToken::random()?;
    let created = whole_seconds(SystemTime::now());
    let expires = match expires {
        Lifetime::Unlimited => None,
        Lifetime::For(time) => Some(expiry(created, time)?),
    };
    let record = TokenRecord { id, sha256, roles: roles.to_vec(), created, expires, note: note.to_owned() };
    let told = format!("token {} with {} {}", record.id, named_roles(roles), validity(&record, created));
    update(&path, |list| list.add(record))?;
    // Only the token goes to standard output, so that it can be piped into a secret store.
    let _ = writeln!(
        io::stderr(),
        "gorego: {told}. It is shown only now; {} keeps its hash. Send it as `authorization: Bearer TOKEN`. A running \
         server accepts it within {} s.",
        path.display(),
        NOTICE_TIME.as_secs()
    );
    Ok(format!("{text}\n"))
}

fn list(json: bool, file: &TokenFileArgs) -> Result<String> {
    let (path, _) = place(file)?;
    let (list, now) = (read(&path)?, SystemTime::now());
    if json {
        let tokens: Vec<_> = list.tokens.iter().map(|token| ShownToken::new(token, now)).collect();
        return Ok(serde_json::to_string_pretty(&tokens).map_err(Error::internal)? + "\n");
    }
    if list.tokens.is_empty() {
        return Ok(format!("{} has no tokens\n", path.display()));
    }
    let mut text = format!("{:<16}  {:<20}  {:<20}  {:<24}  NOTE\n", "ID", "CREATED", "EXPIRES", "ROLES");
    for token in &list.tokens {
        let shown = ShownToken::new(token, now);
        let mut expires = shown.expires.unwrap_or_else(|| "never".into());
        if shown.expired {
            expires = "expired".into();
        }
        let roles = token.roles.join(",");
        let _ = writeln!(
            text,
            "{:<16}  {:<20}  {expires:<20}  {roles:<24}  {}",
            shown.id, shown.created, shown.note
        );
    }
    Ok(text)
}

fn revoke(ids: &[String], file: &TokenFileArgs) -> Result<String> {
    let (path, _) = place(file)?;
    let gone = update(&path, |list| list.revoke(ids))?;
    Ok(gone.iter().map(|token| revoked(&token.id, &token.roles) + "\n").collect())
}

/// Asks a server to revoke tokens.
fn revoke_at(ids: &[String], endpoint: &str, options: &ConnectArgs) -> Result<String> {
    let server =
        ServerArgs { endpoint: endpoint.to_owned(), instance: String::new(), connect: options.clone() };
    let answer = block_on(async { connect(&server).await?.revoke_tokens(ids.to_vec()).await })?;
    let line = |token: &RevokedToken| escaped(&revoked(&token.id, &token.roles)) + "\n";
    Ok(answer.tokens.iter().map(line).collect())
}

fn revoked(id: &str, roles: &[String]) -> String {
    format!("revoked {id} ({})", named_roles(roles))
}

/// The file of the tokens, and the policy with the roles.
fn place(file: &TokenFileArgs) -> Result<(PathBuf, Policy)> {
    let args = ServeArgs { config: file.config.clone(), ..ServeArgs::default() };
    let (_, settings) = load_settings(&args, environment(), Vec::new())?;
    let path = file.file.clone().or(settings.access.tokens).ok_or_else(|| {
        Error::invalid(
            "the server has no file for tokens: set tokens in the section [access] of its configuration, for example to \
             /var/lib/gorego/tokens, or name the file with --file (docs/securing.md)",
        )
    })?;
    Ok((path, settings.access.policy))
}

fn expiry(created: SystemTime, time: Duration) -> Result<SystemTime> {
    /// The latest time that all common programs can parse.
    const YEAR_9000: Duration = Duration::from_secs(221_845_392_000);
    let expires = created.checked_add(time).filter(|expires| *expires < SystemTime::UNIX_EPOCH + YEAR_9000);
    expires.ok_or_else(|| Error::invalid("--expires: too long; use never"))
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn named_roles(roles: &[String]) -> String {
    format!("{} {}", if roles.len() == 1 { "role" } else { "roles" }, roles.join(", "))
}

fn validity(token: &TokenRecord, now: SystemTime) -> String {
    match ShownToken::new(token, now).expires {
        Some(expires) => format!("is valid until {expires}"),
        None => "is valid until it is revoked".into(),
    }
}

/// A token in the output of `list`.
#[derive(Debug, Serialize)]
struct ShownToken<'a> {
    id: &'a str,
    roles: &'a [String],
    created: String,
    expires: Option<String>,
    expired: bool,
    note: &'a str,
}

impl<'a> ShownToken<'a> {
    fn new(token: &'a TokenRecord, now: SystemTime) -> Self {
        let shown = |time: SystemTime| humantime::format_rfc3339_seconds(time).to_string();
        Self {
            id: &token.id,
            roles: &token.roles,
            created: shown(token.created),
            expires: token.expires.map(shown),
            expired: token.expires.is_some_and(|expires| expires <= now),
            note: &token.note,
        }
    }
}
