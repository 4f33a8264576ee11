//! Merges the sources of values: flags over environment over file over defaults. The sockets of a supervisor take
//! precedence over all of them.
//!
//! Each source is checked separately, so an error names the line, variable or flag at fault and never the merged
//! result. Unknown keys are refused everywhere, and the closest known key is suggested. All problems are reported
//! together. Whether a value of the right type is valid is checked in [`super::settings`].

use super::{
    Config, ENV_PREFIX, mismatch,
    mismatch::in_words,
    source_text::{line_of, point_at},
    suggestion::suggestion,
};
use crate::size::Size;
use gorego_reapi::error::{Error, Result};
use serde::Deserialize as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fmt, fs,
    io::ErrorKind,
    net::SocketAddr,
    path::{Path, PathBuf},
};
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue},
};

/// The configuration file of a package. It is read if no file is named and this one exists.
pub const SYSTEM_FILE: &str = "/etc/gorego/gorego.toml";
/// Maximum size of a configuration file in bytes. A larger file is not a configuration.
const MAX_FILE_BYTES: u64 = 1_000_000;
/// Variables with the prefix that are not keys. The command line reads them.
pub const OTHER_VARIABLES: &[&str] =
    &["GOREGO_CONFIG", "GOREGO_CREDENTIAL_HELPER", "GOREGO_ENDPOINT", "GOREGO_HEADERS", "GOREGO_INSTANCE"];
/// Tables whose keys are chosen by the user.
const FREE_TABLES: &[&str] = &[
    "access.roles",
    "access.users",
    "execution.platform",
    "execution.pools",
    "instances",
    "quotas.principals",
];

/// The source of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The default that is built into the program.
    Default,
    /// A line of a file, counted from 1.
    File(PathBuf, usize),
    /// An environment variable, by name.
    Env(String),
    /// A flag of the command line, as typed.
    Flag(String),
    /// A socket of the supervisor, by name.
    Socket(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Env(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Socket(name) => write!(f, "socket \"{name}\" of the supervisor"),
        }
    }
}

/// A value from the command line.
#[derive(Debug, Clone, PartialEq)]
pub struct Flag {
    /// The flag as typed, such as `--listen-addr`.
    pub flag: &'static str,
    /// The key that it sets, such as `listen_addr`.
    pub key: &'static str,
    /// Its value, with the type of the key.
    pub value: Value,
}

/// The address of a socket that the supervisor passed. The server listens on it, and ignores the configured address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketAddress {
    /// The name of the socket.
    pub name: &'static str,
    /// The key that it sets, such as `listen_addr`.
    pub key: &'static str,
    /// The address on which it listens.
    pub address: SocketAddr,
}

/// All sources of values, except for the defaults.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file to read. It must exist.
    pub file: Option<PathBuf>,
    /// The environment variables. Those without the prefix are ignored.
    pub env: Vec<(OsString, OsString)>,
    /// The flags of the command line.
    pub flags: Vec<Flag>,
    /// The sockets of the supervisor.
    pub sockets: Vec<SocketAddress>,
}

/// The merged configuration and the source of each value.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The merged values; not yet checked.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    origins: BTreeMap<String, Origin>,
    /// Keys with a value that cannot be used. They have another value here, so nothing is said about it.
    pub(super) unusable: BTreeSet<String>,
}

impl Loaded {
    /// The built-in defaults alone.
    pub fn defaults() -> Self {
        Self { config: Config::default(), file: None, origins: BTreeMap::new(), unusable: BTreeSet::new() }
    }

    /// The source of a dotted key, such as `execution.concurrency`.
    pub fn origin(&self, key: &str) -> &Origin {
        self.origins.get(key).unwrap_or(&Origin::Default)
    }
}

/// All dotted keys in the order of [`Config`], with their values in `config`.
pub fn keys(config: &Config) -> Vec<(String, Value)> {
    let mut keys = Vec::new();
    // Serialising preserves the order of the fields, which a `Table` does not. The values come from the table.
    let (text, table) = (toml::to_string(&Config::default()), Table::try_from(config));
    let (Ok(text), Ok(table)) = (text, table) else { return keys };
    let mut section = String::new();
    for line in text.lines() {
        let path = if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.to_owned();
            FREE_TABLES.contains(&name).then(|| section.clone())
        } else {
            let name = line.split(" = ").next().filter(|name| line.contains(" = ") && !name.is_empty());
            let name = name.filter(|_| !FREE_TABLES.contains(&section.as_str()));
            name.map(|name| if section.is_empty() { name.to_owned() } else { format!("{section}.{name}") })
        };
        if let Some((path, value)) =
            path.and_then(|path| get(&table, &path).map(|v| (path.clone(), v.clone())))
        {
            keys.push((path, value));
        }
    }
    keys
}

/// The environment variable that sets this key.
pub fn variable_of(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.to_uppercase().replace('.', "__"))
}

/// Merges all sources into one configuration.
///
/// # Errors
/// [`Error::Invalid`] with all problems. Each names the file and line, variable or flag. For a mistyped key the closest
/// one is suggested.
pub fn load(sources: &Sources) -> Result<Loaded> {
    finish(merge(sources)?)
}

/// Merges the text of a file with the defaults. `path` is the name of the file in errors.
///
/// # Errors
/// See [`load`].
pub fn from_text(path: &Path, text: &str) -> Result<Loaded> {
    let mut merge = Merge::new();
    merge.take_file(path, text)?;
    finish(merge.end()?)
}

pub(super) fn finish((loaded, problems): (Loaded, Vec<String>)) -> Result<Loaded> {
    if problems.is_empty() { Ok(loaded) } else { Err(Error::Invalid(problems.join("\n"))) }
}

/// Merges all values that can be used, and collects the problems of the others.
///
/// # Errors
/// If the file cannot be read or is not TOML.
pub(super) fn merge(sources: &Sources) -> Result<(Loaded, Vec<String>)> {
    let mut merge = Merge::new();
    if let Some(path) = &sources.file {
        merge.take_file(path, &read_text(path)?)?;
    }
    for (name, value) in &sources.env {
        let Some(name) = name.to_str().filter(|name| name.starts_with(ENV_PREFIX)) else { continue };
        match key_of(name, &merge.known) {
            Ok(None) => {}
            // An empty variable counts as not set: templates of containers set all that they know.
            Ok(Some(_)) if value.is_empty() => {}
            Ok(Some(key)) => match read_variable(name, &key, value, &merge.known) {
                Ok(value) => merge.take(&key, value, Origin::Env(name.to_owned())),
                Err(problem) => merge.refuse(&key, problem),
            },
            Err(problem) => merge.problems.push(problem),
        }
    }
    for Flag { flag, key, value } in &sources.flags {
        match check_alone(key, value) {
            Ok(()) => merge.take(key, value.clone(), Origin::Flag((*flag).to_owned())),
            Err(problem) => merge.refuse(key, format!("{flag}: {problem}")),
        }
    }
    for SocketAddress { name, key, address } in &sources.sockets {
        merge.take(key, Value::String(address.to_string()), Origin::Socket((*name).to_owned()));
    }
    merge.end()
}

/// A merge in progress.
struct Merge {
    known: BTreeMap<String, Value>,
    values: Table,
    loaded: Loaded,
    problems: Vec<String>,
}

impl Merge {
    fn new() -> Self {
        let known = keys(&Config::default()).into_iter().collect();
        Self { known, values: Table::new(), loaded: Loaded::defaults(), problems: Vec::new() }
    }

    /// Takes a value, which replaces an earlier one.
    fn take(&mut self, key: &str, value: Value, origin: Origin) {
        set(&mut self.values, key, value);
        self.loaded.origins.insert(key.to_owned(), origin);
    }

    /// Notes that a value of this key cannot be used.
    fn refuse(&mut self, key: &str, problem: String) {
        self.problems.push(problem);
        self.loaded.unusable.insert(key.to_owned());
    }

    fn take_file(&mut self, path: &Path, text: &str) -> Result<()> {
        let refuse =
            |error: toml::de::Error| Error::Invalid(point_at(path, text, error.span(), error.message()));
        let document = DeTable::parse(text).map_err(refuse)?;
        let values: Table = toml::from_str(text).map_err(refuse)?;
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        walk(document.get_ref(), "", &self.known, &mut found, &mut problems);
        for (key, at, spanned) in found {
            let of_key = mismatch::problems(&key, spanned);
            if !of_key.is_empty() {
                problems.extend(of_key);
                self.loaded.unusable.insert(key);
            } else if let Some(value) = get(&values, &key) {
                self.take(&key, value.clone(), Origin::File(path.to_owned(), line_of(text, at)));
            }
        }
        // In the order of the text.
        problems.sort_by_key(|(span, _)| span.as_ref().map(|span| span.start));
        let problems = problems.into_iter().map(|(span, problem)| point_at(path, text, span, &problem));
        self.problems.extend(problems);
        self.loaded.file = Some(path.to_owned());
        Ok(())
    }

    fn end(mut self) -> Result<(Loaded, Vec<String>)> {
        self.loaded.config =
            Config::deserialize(self.values).map_err(|error| Error::Invalid(error.message().to_owned()))?;
        Ok((self.loaded, self.problems))
    }
}

/// The file to read: the named one or, if no file is named, the system's file if it exists. A file that cannot be
/// looked at counts as existing, so that reading it fails. The current directory is not searched, so that a server does
/// not depend on where it is started.
pub fn file_to_read(named: Option<PathBuf>) -> Option<PathBuf> {
    named.or_else(|| Some(PathBuf::from(SYSTEM_FILE)).filter(|path| path.try_exists().unwrap_or(true)))
}

fn read_text(path: &Path) -> Result<String> {
    let shown = path.display();
    let refuse = |problem: &str| Err(Error::Invalid(format!("configuration file {shown} {problem}")));
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return refuse("does not exist"),
        Ok(metadata) if metadata.is_dir() => return refuse("is a directory"),
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => return refuse("is larger than 1 MB"),
        _ => {}
    }
    match fs::read(path) {
        Err(error) => refuse(&format!("cannot be read: {error}")),
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let line = 1 + error.as_bytes().iter().take(valid).filter(|byte| **byte == b'\n').count();
                refuse(&format!("is not UTF-8 text (line {line})"))
            }
        },
    }
}

/// Collects the keys of a document with their positions and values, and those that are unknown or no keys at all.
fn walk<'a, 'text>(
    table: &'a DeTable<'text>,
    prefix: &str,
    known: &BTreeMap<String, Value>,
    found: &mut Vec<(String, usize, &'a Spanned<DeValue<'text>>)>,
    misplaced: &mut Vec<mismatch::LocatedProblem>,
) {
    let mut entries: Vec<_> = table.iter().collect();
    // In the order of the text.
    entries.sort_by_key(|(name, _)| name.span().start);
    for (name, value) in entries {
        let key = format!("{prefix}{}", name.get_ref());
        let is_section = known.keys().any(|k| k.strip_prefix(&key).is_some_and(|rest| rest.starts_with('.')));
        if known.contains_key(&key) {
            found.push((key, name.span().start, value));
        } else if let (true, Some(section)) = (is_section, value.get_ref().as_table()) {
            walk(section, &format!("{key}."), known, found, misplaced);
        } else if is_section {
            misplaced
                .push((Some(value.span()), format!("\"{key}\" is a section; write its keys below [{key}]")));
        } else {
            let sections: BTreeSet<String> =
                known.keys().flat_map(|known| sections_of(known)).map(str::to_owned).collect();
            let hint = match value.get_ref().as_table() {
                Some(_) => suggestion(&key, sections.iter()),
                None => suggestion(&key, known.keys()),
            };
            misplaced.push((Some(name.span()), format!("unknown key \"{}\"{hint}", key.escape_debug())));
        }
    }
}

/// The sections that a key lies in, outermost first.
fn sections_of(key: &str) -> impl Iterator<Item = &str> {
    key.match_indices('.').filter_map(|(at, _)| key.get(..at))
}

/// The key that an environment variable sets; `None` if the variable is not for this server.
fn key_of(name: &str, known: &BTreeMap<String, Value>) -> std::result::Result<Option<String>, String> {
    if OTHER_VARIABLES.contains(&name) || is_service_link(name) {
        return Ok(None);
    }
    let key = known.keys().find(|key| variable_of(key) == name).cloned();
    key.map(Some).ok_or_else(|| {
        let variables: Vec<String> = known
            .keys()
            .map(|key| variable_of(key))
            .chain(OTHER_VARIABLES.iter().map(|name| (*name).to_owned()))
            .collect();
        let hint = suggestion(name, variables.iter());
        format!("unknown environment variable {}{hint}", name.escape_debug())
    })
}

/// The value that an environment variable gives to its key.
fn read_variable(
    name: &str,
    key: &str,
    value: &OsStr,
    known: &BTreeMap<String, Value>,
) -> std::result::Result<Value, String> {
    let Some(text) = value.to_str() else {
        return Err(format!("environment variable {name} is not UTF-8 text"));
    };
    let refuse =
        |problem: String| format!("environment variable {name}=\"{}\": {problem}", text.escape_debug());
    let value = match known.get(key) {
        Some(_) if is_size(key) => {
            let size = Size::from_words(text).map_err(refuse)?;
            Value::try_from(size).map_err(|error| refuse(error.to_string()))?
        }
        Some(Value::Integer(_)) => match text.trim().parse() {
            Ok(number) => Value::Integer(number),
            Err(_) => return Err(refuse("has to be a whole number".into())),
        },
        Some(Value::Boolean(_)) => match text.trim() {
            "true" => Value::Boolean(true),
            "false" => Value::Boolean(false),
            _ => return Err(refuse("has to be true or false".into())),
        },
        Some(Value::Array(_) | Value::Table(_)) => {
            let mut table: Table = toml::from_str(&format!("value = {text}"))
                .map_err(|error| refuse(format!("has to be a TOML value: {}", error.message())))?;
            match (table.len(), table.remove("value")) {
                (1, Some(value)) => value,
                _ => return Err(refuse("has to be one TOML value".into())),
            }
        }
        _ => Value::String(text.to_owned()),
    };
    check_alone(key, &value).map_err(refuse)?;
    Ok(value)
}

/// Whether a key holds a [`Size`]. A test checks the naming convention.
fn is_size(key: &str) -> bool {
    key.ends_with("_gb")
}

/// Kubernetes sets variables in every pod for each service of its namespace. For a service named "gorego" they have the
/// prefix of this server's variables, but they are not configuration.
fn is_service_link(name: &str) -> bool {
    let rest = name.strip_prefix(ENV_PREFIX).unwrap_or_default();
    rest == "PORT"
        || rest.starts_with("SERVICE_HOST")
        || rest.starts_with("SERVICE_PORT")
        || (rest.starts_with("PORT_") && (rest.contains("_TCP") || rest.contains("_UDP")))
}

/// Whether a value has the right type for its key.
fn check_alone(key: &str, value: &Value) -> std::result::Result<(), String> {
    let mut table = Table::new();
    set(&mut table, key, value.clone());
    Config::deserialize(table).map(|_| ()).map_err(|error| in_words(key, error.message()))
}

fn get<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => get(table.get(section)?.as_table()?, rest),
    }
}

fn set(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let entry = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = entry {
                set(inner, rest, value);
            }
        }
    }
}
