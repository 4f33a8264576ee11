//! [`AccessLoader`]: builds the rules from the settings and their files, and rebuilds them when these change.
//!
//! If a file cannot be used, the server does not start, and a reload changes nothing. The password file must exist
//! then. The token file need not, because `gorego token create` makes it, but its directory must. While the server
//! runs, a missing file counts as empty, so removing a file removes all credentials in it.

use super::{
    authenticator::{AccessRules, Authenticator, CredentialSources, SignedTokens},
    basic::{PasswordFile, UserSet},
    jwt::{self, JwksLocation, JwtVerifier, KeySet},
    settings::AccessSettings,
    tokens::{self, TokenRecord, TokenSet},
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

/// Target of the log lines of this module.
pub(super) const LOG: &str = "gorego::access";
/// How often the files are checked. They are read when two checks in a row find the same change. So a file that is
/// empty for a moment while it is written does not remove the credentials.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long it takes until a new token is accepted: two checks find it.
pub(crate) const NOTICE_TIME: Duration = LOOK_INTERVAL.saturating_mul(2);
/// Largest password file in bytes.
const PASSWORDS_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// The loader; see the top of this file.
#[derive(Debug)]
pub(crate) struct AccessLoader {
    authenticator: Authenticator,
    state: Mutex<LoadedAccess>,
    /// The runtime on which keys of issuers are fetched.
    runtime: Handle,
}

/// Rules that were built and are not in force yet.
#[derive(Debug)]
pub(crate) struct PreparedRules {
    rules: AccessRules,
    loaded: LoadedAccess,
}

impl PreparedRules {
    /// A description of the rules for people.
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
    /// The verifier of signed tokens; `None` without issuers. It fetches and renews its keys itself.
    signed: Option<Arc<JwtVerifier>>,
    /// The stamps of the files in force when they were read.
    stamps: CredentialStamps,
    /// The stamps of files that were read since then and cannot be used.
    refused: Option<CredentialStamps>,
    /// The stamps of the files at the last check, if they were different.
    seen: Option<CredentialStamps>,
}

impl LoadedAccess {
    fn new(settings: AccessSettings, signed: Option<Arc<JwtVerifier>>, stamps: CredentialStamps) -> Self {
        Self { settings, signed, stamps, refused: None, seen: None }
    }

    /// Whether the files with these stamps must be read.
    fn has_changed(&mut self, found: &CredentialStamps) -> bool {
        if *found == self.stamps || self.refused.as_ref() == Some(found) {
            self.seen = None;
            return false;
        }
        let is_settled = self.seen.as_ref() == Some(found);
        self.seen = (!is_settled).then(|| found.clone());
        is_settled
    }
}

/// The stamps of all files; `None` for a missing file.
type CredentialStamps = Vec<Option<CredentialStamp>>;

/// The attributes that change when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CredentialStamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Checks the files of the settings without a server. Keys of issuers are not fetched.
///
/// # Errors
/// `Invalid` that names the file that cannot be used.
pub(crate) fn check_files(settings: &AccessSettings) -> Result<()> {
    load(settings, None)?;
    jwt::check_key_files(&settings.jwt).map_err(Error::Invalid)
}

impl AccessLoader {
    /// Builds the first rules. Keys of issuers are fetched on `runtime`.
    ///
    /// # Errors
    /// `Invalid` that names the file that cannot be used.
    pub(crate) fn open(settings: AccessSettings, runtime: &Handle) -> Result<Self> {
        // The stamps are read before the files, so a change in between is noticed at the first check.
        let stamps = stamps(&settings);
        let signed = signed_tokens(&settings, None, runtime)?;
        let authenticator = Authenticator::new(load(&settings, signed.clone())?);
        let state = Mutex::new(LoadedAccess::new(settings, signed, stamps));
        Ok(Self { authenticator, state, runtime: runtime.clone() })
    }

    /// The authenticator with the rules.
    pub(crate) fn authenticator(&self) -> &Authenticator {
        &self.authenticator
    }

    /// Builds rules from other settings, but does not put them in force. `None` if neither the settings nor the files
    /// are different.
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
        Ok(Some(PreparedRules { rules, loaded: LoadedAccess::new(settings, signed, stamps) }))
    }

    /// Puts prepared rules in force. Files that have changed since then are read again, so that a token that was
    /// revoked meanwhile is not accepted. Blocks.
    pub(crate) fn apply(&self, prepared: PreparedRules) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = prepared.loaded;
        let found = stamps(&state.settings);
        if found == state.stamps {
            self.authenticator.replace(prepared.rules);
        } else {
            // The outcome is in the log.
            let _ = self.read_again(&mut state, prepared.rules.sources().clone(), found);
        }
    }

    /// Checks the files periodically until the server ends.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut ticks = interval(LOOK_INTERVAL);
        loop {
            ticks.tick().await;
            let loader = self.clone();
            // A panic was logged, and the next check starts anew.
            let _ = tokio::task::spawn_blocking(move || loader.look()).await;
        }
    }

    /// Reads the files again if one of them has changed. Also logs the refusals that were counted.
    fn look(&self) {
        self.authenticator.audit().log_counted();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamps(&state.settings);
        if state.has_changed(&found) {
            // The outcome is in the log.
            let _ = self.read_again(&mut state, self.sources(), found);
        }
    }

    /// The credential sources in force.
    fn sources(&self) -> CredentialSources {
        self.authenticator.rules().sources().clone()
    }

    /// Reads the files and puts their content in force. If a file cannot be used, the credentials of its kind stay as
    /// they are in `sources`. Revoked tokens in the other files are removed anyway.
    ///
    /// # Errors
    /// Why the file of tokens cannot be used.
    fn read_again(
        &self,
        state: &mut LoadedAccess,
        mut sources: CredentialSources,
        found: CredentialStamps,
    ) -> Result<()> {
        let settings = &state.settings;
        let tokens = load_tokens(settings).map(|tokens| sources.tokens = tokens);
        let users = load_users(settings).map(|users| sources.users = users);
        self.authenticator.replace(AccessRules::new(settings.policy.clone(), sources));
        for error in [&tokens, &users].into_iter().filter_map(|outcome| outcome.as_ref().err()) {
            Event::warn(LOG, "credentials_not_reloaded")
                .with_shown("error", error)
                .log(format_args!("the credentials stay as they were: {error}"));
        }
        if tokens.is_ok() && users.is_ok() {
            (state.stamps, state.refused) = (found, None);
            Event::info(LOG, "credentials_reloaded")
                .log(format_args!("the files with credentials were read again"));
        } else {
            state.refused = Some(found);
        }
        tokens
    }

    /// Removes static tokens from their file, and refuses them from now on. Returns the removed tokens. Blocks.
    ///
    /// # Errors
    /// `NotFound` if an id is unknown, in which case no token is revoked; `Precondition` if the server has no tokens,
    /// or cannot change their file.
    pub(crate) fn revoke(&self, ids: &[String]) -> Result<Vec<TokenRecord>> {
        let path = self.state.lock().unwrap_or_else(PoisonError::into_inner).settings.tokens.clone();
        let path = path
            .ok_or_else(|| Error::Precondition("this server has no static tokens (access.tokens)".into()))?;
        let revoked = tokens::file::update(&path, |list| list.revoke(ids))?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamps(&state.settings);
        self.read_again(&mut state, self.sources(), found)?;
        Ok(revoked)
    }
}

/// Creates the verifier of signed tokens. Keys of a previous verifier are reused where the settings are the same.
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

/// Logs the outcome of an attempt to fetch the keys of an issuer.
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
    check_places(settings)?;
    let sources = CredentialSources {
        tokens: load_tokens(settings)?,
        users: load_users(settings)?,
        certificates: settings.certificates.clone(),
        signed: signed.map(|signed| signed as Arc<dyn SignedTokens>),
    };
    Ok(AccessRules::new(settings.policy.clone(), sources))
}

/// Refuses paths that are probably mistyped. They would count as files without credentials, so that every credential
/// would be refused.
fn check_places(settings: &AccessSettings) -> Result<()> {
    let is_missing = |path: &Path| fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    if let Some(path) = settings.passwords.as_deref().filter(|path| is_missing(path)) {
        let path = path.display();
        return Err(Error::Invalid(format!(
            "password file {path} (access.passwords) does not exist; make it with `htpasswd -B -c {path} USER`, correct \
             the path, or make an empty file if no user may have access"
        )));
    }
    let directory = settings.tokens.as_deref().and_then(Path::parent);
    if let Some(directory) = directory.filter(|directory| is_missing(directory)) {
        return Err(Error::Invalid(format!(
            "{}, the directory of the token file (access.tokens), does not exist; create it, or correct the path",
            directory.display()
        )));
    }
    Ok(())
}

fn load_tokens(settings: &AccessSettings) -> Result<Arc<TokenSet>> {
    let Some(path) = &settings.tokens else { return Ok(Arc::default()) };
    Ok(Arc::new(TokenSet::new(&tokens::file::read(path)?, &settings.policy)))
}

fn load_users(settings: &AccessSettings) -> Result<Option<Arc<UserSet>>> {
    let Some(path) = &settings.passwords else { return Ok(None) };
    Ok(Some(Arc::new(UserSet::new(&read_passwords(path)?, &settings.users, &settings.policy)?)))
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

fn stamps(settings: &AccessSettings) -> CredentialStamps {
    let files = settings.tokens.iter().chain(&settings.passwords);
    files.map(|path| fs::metadata(path).ok().map(|file| stamp(&file))).collect()
}

fn stamp(file: &fs::Metadata) -> CredentialStamp {
    let changed = (file.ctime(), file.ctime_nsec());
    CredentialStamp { device: file.dev(), inode: file.ino(), size: file.size(), changed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{policy::Policy, tokens::NewToken};
    use std::{os::unix::fs::PermissionsExt as _, path::PathBuf};

    struct Bench {
        loader: AccessLoader,
        tokens: PathBuf,
        _directory: tempfile::TempDir,
    }

    fn settings(tokens: PathBuf) -> AccessSettings {
        let passwords = Some(tokens.with_file_name("passwords"));
        AccessSettings {
            policy: Policy::with_roles([], &[]),
            tokens: Some(tokens),
            passwords,
            users: Default::default(),
            certificates: Vec::new(),
            jwt: Vec::new(),
        }
    }

    impl Bench {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let tokens = directory.path().join("tokens");
            fs::write(directory.path().join("passwords"), "").unwrap();
            let loader = AccessLoader::open(settings(tokens.clone()), &Handle::current()).unwrap();
            Self { loader, tokens, _directory: directory }
        }

        /// Adds a token to the file.
        fn token(&self) -> NewToken {
            let token = NewToken::random().unwrap();
            let record = TokenRecord {
                id: token.id.clone(),
                sha256: token.sha256,
                roles: vec!["ci".into()],
                created: SystemTime::UNIX_EPOCH,
                expires: None,
                note: String::new(),
            };
            tokens::file::update(&self.tokens, |list| list.add(record)).unwrap();
            token
        }

        /// Replaces the content, as an editor does that writes into the file.
        fn write(&self, text: &str) {
            fs::write(&self.tokens, text).unwrap();
        }

        fn look(&self, times: usize) {
            (0..times).for_each(|_| self.loader.look());
        }

        fn knows(&self, token: &NewToken) -> bool {
            self.loader.authenticator().rules().knows_token(&token.text)
        }
    }

    #[tokio::test]
    async fn a_briefly_empty_token_file_revokes_no_token() {
        let bench = Bench::new();
        let token = bench.token();
        bench.look(2);
        assert!(bench.knows(&token));
        let text = fs::read_to_string(&bench.tokens).unwrap();
        bench.write("");
        bench.look(1);
        bench.write(&text);
        bench.look(2);
        assert!(bench.knows(&token), "it was being written");
        bench.write("");
        bench.look(2);
        assert!(!bench.knows(&token), "it stays empty");
    }

    #[tokio::test]
    async fn a_path_where_no_credentials_can_be_is_refused_at_the_start_and_a_removed_file_removes_its_users()
    {
        let bench = Bench::new();
        let passwords = bench.tokens.with_file_name("passwords");
        fs::remove_file(&passwords).unwrap();
        bench.look(2);
        assert_eq!(bench.loader.state.lock().unwrap().refused, None, "it counts as empty");
        let opened = |settings| AccessLoader::open(settings, &Handle::current()).map(drop);
        let error = opened(settings(bench.tokens.clone())).unwrap_err().to_string();
        assert!(error.contains("access.passwords") && error.contains("htpasswd"), "{error}");
        fs::write(&passwords, "").unwrap();
        opened(settings(bench.tokens.clone())).unwrap();
        let nowhere =
            AccessSettings { tokens: Some("/nosuch/tokens".into()), ..settings(bench.tokens.clone()) };
        let error = opened(nowhere.clone()).unwrap_err();
        assert!(error.to_string().contains("access.tokens"), "{error}");
        assert_eq!(check_files(&nowhere), Err(error), "the check says the same");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_used_changes_nothing_and_every_reload_says_so_until_it_is_repaired() {
        let bench = Bench::new();
        let token = bench.token();
        bench.look(2);
        let text = fs::read_to_string(&bench.tokens).unwrap();
        bench.write("[[token]]");
        bench.look(3);
        assert!(bench.knows(&token));
        for _ in 0..2 {
            let refused = bench.loader.prepare(settings(bench.tokens.clone()));
            assert!(refused.unwrap_err().to_string().contains("tokens"));
        }
        bench.write(&text);
        fs::set_permissions(&bench.tokens, fs::Permissions::from_mode(0o644)).unwrap();
        bench.look(3);
        assert!(bench.loader.prepare(settings(bench.tokens.clone())).is_err());
        fs::set_permissions(&bench.tokens, fs::Permissions::from_mode(0o600)).unwrap();
        bench.look(2);
        assert!(bench.loader.prepare(settings(bench.tokens.clone())).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_password_file_that_cannot_be_used_keeps_no_revoked_token_alive() {
        let bench = Bench::new();
        let [gone, kept] = [bench.token(), bench.token()];
        bench.look(2);
        fs::write(bench.tokens.with_file_name("passwords"), "malformed").unwrap();
        tokens::file::update(&bench.tokens, |list| list.revoke(std::slice::from_ref(&gone.id))).unwrap();
        bench.look(2);
        assert!(!bench.knows(&gone) && bench.knows(&kept));
        bench.loader.revoke(std::slice::from_ref(&kept.id)).unwrap();
        assert!(!bench.knows(&kept));
        assert!(bench.loader.prepare(settings(bench.tokens.clone())).is_err());
    }

    #[tokio::test]
    async fn a_token_that_is_revoked_during_a_reload_does_not_come_back() {
        let bench = Bench::new();
        let gone = bench.token();
        let prepared = bench.loader.prepare(settings(bench.tokens.clone())).unwrap().unwrap();
        bench.loader.revoke(std::slice::from_ref(&gone.id)).unwrap();
        bench.loader.apply(prepared);
        assert!(!bench.knows(&gone));
    }

    #[tokio::test]
    async fn a_token_that_is_revoked_here_is_refused_at_once_and_an_unknown_id_revokes_nothing() {
        let bench = Bench::new();
        let [gone, kept] = [bench.token(), bench.token()];
        bench.look(2);
        let refused = bench.loader.revoke(&[gone.id.clone(), "unknown".into()]);
        assert!(matches!(refused, Err(Error::NotFound(_))) && bench.knows(&gone));
        let revoked = bench.loader.revoke(std::slice::from_ref(&gone.id)).unwrap();
        assert_eq!(revoked.iter().map(|token| &token.id).collect::<Vec<_>>(), [&gone.id]);
        assert!(!bench.knows(&gone) && bench.knows(&kept));
    }
}
