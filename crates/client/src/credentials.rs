//! [`Credentials`]: the headers that authenticate a client. [`AuthorizedChannel`] sends them with every request.
//!
//! A credential helper is a program that implements Bazel's protocol: it is run as `HELPER get`, reads `{"uri":
//! "https://..."}` and prints `{"headers": {"authorization": ["Bearer ..."]}, "expires": "2026-01-02T03:04:05Z"}`. Its
//! headers are used until they expire. It is run once at a time, however many requests wait for it, and its time and
//! output are bounded. Header values never appear in messages.

use crate::header::checked_header;
use futures::{
    FutureExt as _,
    future::{BoxFuture, Either, MapErr, TryFutureExt as _},
};
use gorego_reapi::error::{Error, Result};
use http::HeaderMap;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt, mem,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};
use tonic::{Status, body::Body, transport::Channel};
use tower_service::Service;

/// Time limit of a credential helper, as in Bazel.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest output of a credential helper.
const HELPER_MAX_BYTES: u64 = 64 * 1024;
/// How long headers without an expiry are used, as in Bazel.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(30 * 60);
/// Minimum time for which headers are used, so that a wrong clock does not start a helper for every request.
const LEAST_LIFETIME: Duration = Duration::from_secs(10);
/// Maximum number of bytes of a helper's error message that are shown.
const SHOWN_MAX: usize = 300;

/// The headers of every request; see the top of this file. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    headers: Arc<HeaderMap>,
    helper: Option<Arc<CredentialHelper>>,
}

impl Credentials {
    pub(crate) fn new(headers: HeaderMap, helper: Option<CredentialHelper>) -> Self {
        Self { headers: Arc::new(headers), helper: helper.map(Arc::new) }
    }

    /// Runs the credential helper, if there is one and its headers are not cached.
    ///
    /// # Errors
    /// `Denied` if it fails.
    pub async fn prepare(&self) -> Result<()> {
        match &self.helper {
            Some(helper) => helper.headers().await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// Adds the headers to a request. Configured headers take precedence over headers of the helper.
    fn add(&self, to: &mut HeaderMap, of_helper: Option<&HeaderMap>) {
        let of_helper = of_helper.into_iter().flatten();
        for (name, value) in of_helper.filter(|(name, _)| !self.headers.contains_key(*name)) {
            to.append(name, value.clone());
        }
        for (name, value) in self.headers.iter() {
            to.append(name, value.clone());
        }
    }
}

/// A program that provides headers for a server.
pub(crate) struct CredentialHelper {
    program: PathBuf,
    uri: String,
    known: Mutex<Option<KnownHeaders>>,
    /// Held while the program runs.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct KnownHeaders {
    headers: Arc<HeaderMap>,
    until: Instant,
}

impl fmt::Debug for CredentialHelper {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("CredentialHelper").field("program", &self.program).finish_non_exhaustive()
    }
}

/// The output of a helper.
#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(default)]
    headers: BTreeMap<String, Vec<String>>,
    expires: Option<String>,
}

impl CredentialHelper {
    pub(crate) fn new(program: PathBuf, uri: String) -> Self {
        Self { program, uri, known: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    /// The cached headers, if they are still valid.
    fn known(&self) -> Option<Arc<HeaderMap>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().filter(|known| Instant::now() < known.until).map(|known| known.headers.clone())
    }

    /// The headers: cached ones, or else new ones from the program.
    async fn headers(&self) -> Result<Arc<HeaderMap>> {
        let _one_at_a_time = self.asking.lock().await;
        if let Some(known) = self.known() {
            return Ok(known);
        }
        let answer = tokio::time::timeout(HELPER_TIMEOUT, self.run()).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("gave no answer within {HELPER_TIMEOUT:?}")));
        let known = answer.and_then(|answer| read_answer(&answer, SystemTime::now()));
        let (headers, lifetime) = known.map_err(|problem| {
            Error::Denied(format!("the credential helper {} {problem}", self.program.display()))
        })?;
        let known = KnownHeaders { headers: Arc::new(headers), until: Instant::now() + lifetime };
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known.clone());
        Ok(known.headers)
    }

    /// Runs the program and returns what it printed.
    async fn run(&self) -> std::result::Result<Vec<u8>, String> {
        let mut child = Command::new(&self.program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot be started: {error}"))?;
        let request = serde_json::json!({ "uri": self.uri }).to_string();
        let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let ask = async move {
            // A helper need not read its input.
            if let Some(mut input) = input {
                let _ = input.write_all(request.as_bytes()).await;
            }
        };
        let ((), output, errors, status) =
            tokio::join!(ask, read_some(output), read_some(errors), child.wait());
        if output.len() as u64 > HELPER_MAX_BYTES {
            return Err(format!("printed more than {HELPER_MAX_BYTES} bytes"));
        }
        let status = status.map_err(|error| format!("failed: {error}"))?;
        if !status.success() {
            let said = String::from_utf8_lossy(&errors);
            let said: String = said.trim().chars().take(SHOWN_MAX).collect();
            let said = if said.is_empty() { "it printed no error" } else { &said };
            return Err(format!("failed ({status}): {}", said.escape_debug()));
        }
        Ok(output)
    }
}

/// Reads at most one byte more than the limit. The rest is not read, so that a program that keeps writing is ended by
/// SIGPIPE.
async fn read_some(from: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        let _ = from.take(HELPER_MAX_BYTES + 1).read_to_end(&mut bytes).await;
    }
    bytes
}

/// The headers in the output of a helper, and how long they may be used.
fn read_answer(answer: &[u8], now: SystemTime) -> std::result::Result<(HeaderMap, Duration), String> {
    // The parser's error could contain a part of a secret.
    let answer: HelperAnswer = serde_json::from_slice(answer)
        .map_err(|_| "did not print {\"headers\": {NAME: [VALUE, ...]}}".to_owned())?;
    let mut headers = HeaderMap::new();
    for (name, values) in &answer.headers {
        for value in values {
            let (name, value) =
                checked_header(name, value).map_err(|error| format!("printed a bad header: {error}"))?;
            headers.append(name, value);
        }
    }
    let lifetime = match answer.expires {
        None => DEFAULT_LIFETIME,
        Some(text) => {
            let expires = rfc3339(&text).ok_or("printed an expiry that is not a time as in RFC 3339")?;
            expires.duration_since(now).unwrap_or_default().max(LEAST_LIFETIME)
        }
    };
    Ok((headers, lifetime))
}

/// A time as in RFC 3339, with `Z` or an offset.
fn rfc3339(text: &str) -> Option<SystemTime> {
    let at = text.len().checked_sub("+00:00".len())?;
    let Some((local, offset)) =
        text.split_at_checked(at).filter(|(_, offset)| offset.starts_with(['+', '-']))
    else {
        return humantime::parse_rfc3339(&text.to_ascii_uppercase()).ok();
    };
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let offset_time =
        Duration::from_secs(hours.parse::<u64>().ok()? * 3600 + minutes.parse::<u64>().ok()? * 60);
    let local = humantime::parse_rfc3339(&format!("{}Z", local.to_ascii_uppercase())).ok()?;
    if offset.starts_with('+') { local.checked_sub(offset_time) } else { local.checked_add(offset_time) }
}

/// A connection whose requests carry credentials.
#[derive(Debug, Clone)]
pub struct AuthorizedChannel {
    channel: Channel,
    credentials: Credentials,
}

impl AuthorizedChannel {
    /// Adds credentials to a connection.
    pub fn new(channel: Channel, credentials: Credentials) -> Self {
        Self { channel, credentials }
    }
}

/// The error of a request that was not sent, or not answered.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The future of a response of the connection below.
type Sending = <Channel as Service<http::Request<Body>>>::Future;

impl Service<http::Request<Body>> for AuthorizedChannel {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = Either<
        MapErr<Sending, fn(tonic::transport::Error) -> BoxError>,
        BoxFuture<'static, Result<http::Response<Body>, BoxError>>,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.channel.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let known = self.credentials.helper.as_ref().map(|helper| helper.known());
        if let Some(None) = known {
            // The clone that is ready must make the call.
            let next = self.channel.clone();
            let mut channel = mem::replace(&mut self.channel, next);
            let credentials = self.credentials.clone();
            let call = async move {
                let headers =
                    match &credentials.helper {
                        Some(helper) => Some(helper.headers().await.map_err(|error| {
                            Box::new(Status::unauthenticated(error.to_string())) as BoxError
                        })?),
                        None => None,
                    };
                credentials.add(request.headers_mut(), headers.as_deref());
                channel.call(request).await.map_err(Into::into)
            };
            return Either::Right(call.boxed());
        }
        self.credentials.add(request.headers_mut(), known.flatten().as_deref());
        Either::Left(self.channel.call(request).map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A helper with this script, in a directory where it may leave files.
    fn helper(script: &str) -> (tempfile::TempDir, CredentialHelper) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("helper");
        // Another process writes the file: this process may be forking, and a program cannot be started while it is
        // open for writing.
        let script = format!("#!/bin/sh\ncd {}\n{script}\n", directory.path().display());
        let mut write = std::process::Command::new("sh");
        write.args(["-c", r#"printf %s "$1" >"$0" && chmod 755 "$0""#]).arg(&program).arg(script);
        assert!(write.status().unwrap().success());
        let helper = CredentialHelper::new(program, "https://build:443/".into());
        (directory, helper)
    }

    #[tokio::test]
    async fn a_helper_is_asked_once_for_all_requests_until_its_headers_expire() {
        let (directory, helper) = helper(
            r#"[ "$1" = get ] && cat >request && echo x >>runs
            echo '{"headers": {"Authorization": ["Bearer secret"], "x-a": ["1", "2"]}, "other": 1}'"#,
        );
        let all = futures::future::join_all((0..10).map(|_| helper.headers())).await;
        for headers in all {
            let headers = headers.unwrap();
            assert_eq!(headers.get("authorization").unwrap(), "Bearer secret");
            assert_eq!(headers.get_all("x-a").iter().count(), 2);
        }
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("runs"), "x\n");
        assert_eq!(read("request"), r#"{"uri":"https://build:443/"}"#);
        assert!(!format!("{helper:?}").contains("secret"));
        helper.known.lock().unwrap().as_mut().unwrap().until = Instant::now();
        helper.headers().await.unwrap();
        assert_eq!(read("runs"), "x\nx\n");
    }

    #[tokio::test]
    async fn a_helper_that_fails_is_named_without_what_it_printed() {
        for (script, hint) in [
            ("echo no such user >&2; exit 3", "exit status: 3): no such user"),
            ("echo 's3cret'", "did not print"),
            (r#"echo '{"headers": {"authorization": "s3cret"}}'"#, "did not print"),
            (r#"echo '{"headers": {"grpc-timeout": ["s3cret"]}}'"#, "protocol"),
            (r#"echo '{"expires": "s3cret"}'"#, "RFC 3339"),
            ("yes s3cret", "more than 65536 bytes"),
        ] {
            let error = helper(script).1.headers().await.unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Denied(_)) && text.contains(hint), "{script}: {text}");
            assert!(!text.contains("s3cret"), "{text}");
        }
        let absent = CredentialHelper::new("/no/such/helper".into(), "x".into());
        assert!(
            absent.headers().await.unwrap_err().to_string().contains("/no/such/helper cannot be started")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_helper_that_hangs_is_ended() {
        let (_directory, helper) = helper("sleep 1000");
        assert!(helper.headers().await.unwrap_err().to_string().contains("within 10s"));
    }

    #[test]
    fn expiries_are_read_with_their_offset() {
        let now = humantime::parse_rfc3339("2026-01-02T03:00:00Z").unwrap();
        let lifetime = |expires: &str| {
            let answer = format!(r#"{{"headers": {{}}, "expires": "{expires}"}}"#);
            read_answer(answer.as_bytes(), now).map(|(_, lifetime)| lifetime.as_secs())
        };
        assert_eq!(lifetime("2026-01-02T03:01:00Z"), Ok(60));
        assert_eq!(lifetime("2026-01-02t04:01:00.5+01:00"), Ok(60));
        assert_eq!(lifetime("2026-01-01T21:31:00-05:30"), Ok(60));
        assert_eq!(lifetime("2020-01-01T00:00:00Z"), Ok(LEAST_LIFETIME.as_secs()));
        for wrong in ["", "tomorrow", "2026-01-02", "2026-01-02T03:00:00+99:xx", "é+00:00"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
        assert_eq!(read_answer(b"{}", now).unwrap().1, DEFAULT_LIFETIME);
    }
}
