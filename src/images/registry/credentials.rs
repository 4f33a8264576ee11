//! [`Credentials`]: user and password for a registry, from a `config.json` as Docker writes it.
//!
//! Only credentials in the file itself are used. No helper program is started (`credHelpers`, `credsStore`).

use crate::regular_file;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use gorego_reapi::error::{Error, Result};
use reqwest::header::HeaderValue;
use serde::Deserialize;
use std::{collections::HashMap, fmt, path::Path};

/// Maximum size of the credentials file.
const MAX_BYTES: u64 = 1024 * 1024;

/// The user and password for one registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    user: String,
    password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: HashMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl Credentials {
    /// The credentials for a registry; `None` if the file has none.
    ///
    /// # Errors
    /// `Precondition` if the file cannot be read.
    pub(super) fn read(file: &Path, registry: &str) -> Result<Option<Self>> {
        let refuse = |problem: &dyn fmt::Display| {
            let file = file.display();
            Error::Precondition(format!(
                "the file {file} (execution.images.credentials) cannot be used: {problem}"
            ))
        };
        let bytes = regular_file::read(file, MAX_BYTES).map_err(|error| refuse(&error))?;
        // The error's text could quote a password.
        let config = serde_json::from_slice(&bytes).map_err(|error| {
            refuse(&format_args!("it is not JSON of the right form (line {})", error.line()))
        })?;
        Ok(find(&config, registry))
    }

    /// The `authorization` header with the credentials.
    pub(super) fn header(&self) -> HeaderValue {
        let encoded = BASE64.encode(format!("{}:{}", self.user, self.password));
        let mut value = HeaderValue::from_str(&format!("Basic {encoded}"))
            .unwrap_or_else(|_| HeaderValue::from_static(""));
        value.set_sensitive(true);
        value
    }
}

fn find(config: &ConfigFile, registry: &str) -> Option<Credentials> {
    // Docker writes hosts, and earlier versions wrote URLs.
    let host = |key: &str| {
        let rest = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key);
        rest.split('/').next().unwrap_or_default().to_ascii_lowercase()
    };
    let entry = config.auths.get(registry);
    let entry = entry
        .or_else(|| config.auths.iter().find(|(key, _)| host(key) == registry).map(|(_, entry)| entry))?;
    if let Some(encoded) = entry.auth.as_deref().filter(|encoded| !encoded.is_empty()) {
        let decoded = String::from_utf8(BASE64.decode(encoded).ok()?).ok()?;
        let (user, password) = decoded.split_once(':')?;
        return Some(Credentials { user: user.into(), password: password.trim_end_matches('\0').into() });
    }
    Some(Credentials { user: entry.username.clone()?, password: entry.password.clone()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn credentials_are_found_by_host_in_each_form_that_docker_writes() {
        let config = json!({
            "auths": {
                "plain.example.com": { "auth": BASE64.encode("me:pass:word") },
                "https://url.example.com:5000/v1/": { "username": "you", "password": "p" },
                "empty.example.com": {},
            },
            "credsStore": "something",
        });
        let config: ConfigFile = serde_json::from_value(config).unwrap();
        let found = |host| find(&config, host).map(|found| (found.user, found.password));
        assert_eq!(found("plain.example.com"), Some(("me".into(), "pass:word".into())));
        assert_eq!(found("url.example.com:5000"), Some(("you".into(), "p".into())));
        assert_eq!((found("empty.example.com"), found("example.com")), (None, None));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_and_nothing_of_it_is_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        let problem = || Credentials::read(&file, "x").unwrap_err().to_string();
        assert!(problem().contains("config.json"));
        std::fs::write(&file, r#"{ "auths": { "x": "secret" } }"#).unwrap();
        assert!(problem().contains("line 1") && !problem().contains("secret"), "{}", problem());
    }
}
