//! [`AccessLoader`]: makes the rules from the settings and the files that they name, and again when these change.
//!
//! A file that cannot be used changes nothing at a reload, and is a reason not to start. A file that does not exist is empty, so
//! that removing it takes all credentials in it away.

use super::{
    authenticator::{AccessRules, Authenticator, CredentialSources, SignedTokens},
    basic::{PasswordFile, UserSet},
    jwt::{self, JwksLocation, JwtVerifier, KeySet},
    settings::AccessSettings,
    tokens::{self, TokenSet},
};
use crate::logging::Event;
use gorego_reapi::error::{Error, Result};
use std::{
    fs,
    io::{ErrorKind, Read as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{runtime::Handle, time::interval};

/// Target of the log lines of this room.
pub(super) const LOG: &str = "gorego::access";
/// How often the files are looked at. A token that is revoked is refused after this time.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Largest password file in bytes.
const PASSWORDS_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// See the top of this file.
#[derive(Debug)]
pub(crate) struct AccessLoader {
    authenticator: Authenticator,
    state: Mutex<LoadedAccess>,
    /// Where keys of issuers are fetched.
    runtime: Handle,
}

/// Rules that were made and are not in force yet.
#[derive(Debug)]
pub(crate) struct PreparedRules {
    rules: AccessRules,
    loaded: LoadedAccess,
}

impl PreparedRules {
    /// What the rules have, for people.
    pub(crate) fn description(&self) -> String {
        let settings = &self.loaded.settings;
        let sources = [
            ("tokens", settings.tokens.is_some()),
            ("passwords", settings.passwords.is_some()),
            ("certificates", !settings.certificates.is_empty()),
            ("signed tokens", !settings.jwt.is_empty()),
        ];
        let known: Vec<_> = sources.iter().filter(|(_, is_there)| *is_there).map(|(name, _)| *name).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        format!("{} roles; credentials: {known}", settings.policy.roles().count())
    }
}

#[derive(Debug)]
struct LoadedAccess {
    settings: AccessSettings,
    /// The issuers of signed tokens; `None` for a server without them. They look after their keys themselves.
    signed: Option<Arc<JwtVerifier>>,
    /// What the files were like when they were read last.
    stamps: Vec<Option<CredentialStamp>>,
}

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CredentialStamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Checks the files that the settings name, without a server. Keys of issuers are not fetched.
///
/// # Errors
/// `Invalid` that names the file that cannot be used.
pub(crate) fn check_files(settings: &AccessSettings) -> Result<()> {
    load(settings, None)?;
    jwt::check_key_files(&settings.jwt).map_err(Error::Invalid)
}

impl AccessLoader {
    /// Makes the first rules. Keys of issuers are fetched on `runtime`.
    ///
    /// # Errors
    /// `Invalid` that names the file that cannot be used.
    pub(crate) fn open(settings: AccessSettings, runtime: &Handle) -> Result<Self> {
        // Before the files are read: a change in between is noticed at the first look.
        let stamps = stamps(&settings);
        let signed = signed_tokens(&settings, None, runtime)?;
        let authenticator = Authenticator::new(load(&settings, signed.clone())?);
        let state = Mutex::new(LoadedAccess { settings, signed, stamps });
        Ok(Self { authenticator, state, runtime: runtime.clone() })
    }

    /// The authenticator with the rules.
    pub(crate) fn authenticator(&self) -> &Authenticator {
        &self.authenticator
    }

    /// Makes rules from other settings, and changes nothing yet. `None` if neither these nor the files are different.
    ///
    /// # Errors
    /// `Invalid` that names the file that cannot be used.
    pub(crate) fn prepare(&self, settings: AccessSettings) -> Result<Option<PreparedRules>> {
        let stamps = stamps(&settings);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if settings == state.settings && stamps == state.stamps {
            return Ok(None);
        }
        let signed = signed_tokens(&settings, state.signed.as_deref(), &self.runtime)?;
        let rules = load(&settings, signed.clone())?;
        Ok(Some(PreparedRules { rules, loaded: LoadedAccess { settings, signed, stamps } }))
    }

    /// Puts prepared rules in force.
    pub(crate) fn apply(&self, prepared: PreparedRules) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = prepared.loaded;
        self.authenticator.replace(prepared.rules);
    }

    /// Looks at the files until the server ends.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut ticks = interval(LOOK_INTERVAL);
        loop {
            ticks.tick().await;
            let loader = self.clone();
            // A panic was logged, and the next look is a new one.
            let _ = tokio::task::spawn_blocking(move || loader.look()).await;
        }
    }

    /// Reads the files again if one of them has changed. Logs the refusals that were counted too.
    fn look(&self) {
        self.authenticator.audit().tell_counted();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&state.settings);
        if stamps == state.stamps {
            return;
        }
        state.stamps = stamps;
        match load(&state.settings, state.signed.clone()) {
            Ok(rules) => {
                self.authenticator.replace(rules);
                Event::info(LOG, "credentials_reloaded")
                    .log(format_args!("the files with credentials were read again"));
            }
            Err(error) => {
                Event::warn(LOG, "credentials_not_reloaded")
                    .with_shown("error", &error)
                    .log(format_args!("the credentials stay as they were: {error}"));
            }
        }
    }
}

/// The issuers of signed tokens. Keys of a previous verifier are kept where their settings are the same.
fn signed_tokens(
    settings: &AccessSettings,
    previous: Option<&JwtVerifier>,
    runtime: &Handle,
) -> Result<Option<Arc<JwtVerifier>>> {
    if settings.jwt.is_empty() {
        return Ok(None);
    }
    let verifier = JwtVerifier::start(&settings.jwt, previous, SystemTime::now(), runtime, log_keys);
    verifier.map(|verifier| Some(Arc::new(verifier))).map_err(Error::Invalid)
}

/// Logs what an attempt to fetch the keys of an issuer has led to.
fn log_keys(location: &JwksLocation, fetched: std::result::Result<&KeySet, &str>) {
    match fetched {
        Ok(keys) => Event::info(LOG, "jwks_loaded")
            .with_shown("jwks", location)
            .with("keys", keys.count())
            .with("left_out", keys.left_out().len())
            .log(format_args!("{} keys of signed tokens from {location}", keys.count())),
        Err(error) => Event::warn(LOG, "jwks_failed")
            .with_shown("jwks", location)
            .with("error", error)
            .log(format_args!("the keys of signed tokens from {location} cannot be used: {error}")),
    }
}

fn load(settings: &AccessSettings, signed: Option<Arc<JwtVerifier>>) -> Result<AccessRules> {
    let policy = settings.policy.clone();
    let tokens = match &settings.tokens {
        Some(path) => TokenSet::new(&tokens::file::read(path)?, &policy),
        None => TokenSet::default(),
    };
    let users = match &settings.passwords {
        Some(path) => Some(Arc::new(UserSet::new(&read_passwords(path)?, &settings.users, &policy)?)),
        None => None,
    };
    Ok(AccessRules::new(
        policy,
        CredentialSources {
            tokens: Arc::new(tokens),
            users,
            certificates: settings.certificates.clone(),
            signed: signed.map(|signed| signed as Arc<dyn SignedTokens>),
        },
    ))
}

fn read_passwords(path: &Path) -> Result<PasswordFile> {
    let refuse = |problem: String| Error::Invalid(format!("password file {}: {problem}", path.display()));
    let unreadable = |error| refuse(format!("cannot be read: {error}"));
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(PasswordFile::default()),
        Err(error) => return Err(unreadable(error)),
    };
    let mode = file.metadata().map_err(unreadable)?.mode();
    if mode & 0o022 != 0 {
        let mode = mode & 0o777;
        return Err(refuse(format!(
            "its mode is {mode:o}, so that others can change it; run chmod go-w on it"
        )));
    }
    let mut text = String::new();
    file.take(PASSWORDS_MAX_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > PASSWORDS_MAX_BYTES {
        return Err(refuse("is larger than 16 MiB".into()));
    }
    PasswordFile::parse(&text).map_err(|error| refuse(error.to_string()))
}

fn stamps(settings: &AccessSettings) -> Vec<Option<CredentialStamp>> {
    let files = settings.tokens.iter().chain(&settings.passwords);
    files.map(|path| fs::metadata(path).ok().map(|file| stamp(&file))).collect()
}

fn stamp(file: &fs::Metadata) -> CredentialStamp {
    let changed = (file.ctime(), file.ctime_nsec());
    CredentialStamp { device: file.dev(), inode: file.ino(), size: file.size(), changed }
}
