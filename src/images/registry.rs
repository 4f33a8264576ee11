//! [`Repository`]: a repository of a registry as a source of images, over the OCI distribution API.
//!
//! Only `GET` is used: documents by tag or digest, blobs by digest, and a token if the registry asks for one. Redirects
//! to any host are followed, because registries store their blobs elsewhere. Credentials are sent only to the registry
//! and to the token server that it names. Nothing is fetched without TLS unless the configuration allows it for the
//! registry. No proxy is used.
//!
//! A registry must not use this server to access hosts that the registry cannot reach itself. So the addresses that it
//! refers to must be public, or be in a network of the same kind as the registry: a registry on the internet cannot
//! refer to hosts of a private network, and a registry in a private network cannot refer to the loopback interface or a
//! cloud's metadata service. Addresses are checked when they are connected to ([`addresses`]). An address counts as the
//! registry's own once the registry has answered from it, which requires its certificate. Its name alone proves
//! nothing, because the owner of a name can give it any address. Without TLS, the answer is the only proof.
//!
//! Every answer has limits: a time limit (the rest of the pull's time, and [`READ_TIMEOUT`] for each piece) and a size
//! limit (the limit of [`read_bounded`] for a document, the size in the manifest for a blob, and [`MAX_TOKEN_BYTES`]
//! for a token). The client crate for this API, oci-client 0.18, reads documents, tokens and error pages of any size
//! into memory. Therefore the three requests are implemented here.

mod addresses;
pub(super) mod credentials;

use super::{
    digest::ImageDigest,
    manifest::ACCEPTED,
    pull::PullTime,
    reference::ImageVersion,
    source::{ImageSource, read_bounded},
};
use crate::{host::ImageRegistry, http_error::causes};
use addresses::{AllowedAddressResolver, AllowedAddresses, NoAllowedAddress, refusal};
use credentials::Credentials;
use gorego_reapi::error::{Error, Result};
use http_auth::{ChallengeRef, parse_challenges};
use reqwest::{
    Client, Response, Url,
    header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, LOCATION, USER_AGENT, WWW_AUTHENTICATE},
    redirect::Policy,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashMap,
    fmt::Display,
    io::{self, Read},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{runtime::Handle, time::timeout};

/// Time limit of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum time between two pieces of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of redirects of a request.
const MAX_REDIRECTS: usize = 5;
/// Maximum size of an answer with a token.
const MAX_TOKEN_BYTES: usize = 1024 * 1024;

/// The clients of all registries.
#[derive(Debug)]
pub(super) struct RegistryClients {
    runtime: Handle,
    credentials: Option<PathBuf>,
    /// The clients by the host of the registry; there are as many as registries are configured. Each is created when it
    /// is first needed, so that a server without registries also starts on a machine without CA certificates.
    clients: Mutex<HashMap<String, RegistryClient>>,
}

#[derive(Debug, Clone)]
struct RegistryClient {
    http: Client,
    allowed_addresses: Arc<AllowedAddresses>,
}

impl RegistryClients {
    /// Creates an empty set of clients. Requests run on `runtime`. `credentials` is a Docker `config.json`, which is
    /// read for each pull.
    pub(super) fn new(runtime: Handle, credentials: Option<PathBuf>) -> Self {
        Self { runtime, credentials, clients: Mutex::default() }
    }

    fn client(&self, registry: &ImageRegistry) -> Result<RegistryClient> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&registry.host) {
            return Ok(client.clone());
        }
        // An error means that the process already has a provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let allowed_addresses = Arc::new(AllowedAddresses::new(registry));
        let http = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .referer(false)
            .dns_resolver(AllowedAddressResolver(allowed_addresses.clone()))
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|error| {
                Error::Internal(format!(
                    "this server cannot set up pulls from registries: {}; check that CA certificates are installed",
                    causes(&error)
                ))
            })?;
        let client = RegistryClient { http, allowed_addresses };
        clients.insert(registry.host.clone(), client.clone());
        Ok(client)
    }
}

/// The repository of one pull.
pub(super) struct Repository<'a> {
    shared: &'a RegistryClients,
    client: RegistryClient,
    registry: &'a ImageRegistry,
    name: &'a str,
    time: PullTime,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<HeaderValue>>,
}

impl<'a> Repository<'a> {
    /// Prepares a pull without sending a request.
    ///
    /// # Errors
    /// `Precondition` if the credentials file cannot be used.
    pub(super) fn new(
        shared: &'a RegistryClients,
        registry: &'a ImageRegistry,
        name: &'a str,
        time: PullTime,
    ) -> Result<Self> {
        let credentials = match &shared.credentials {
            Some(file) => Credentials::read(file, &registry.host)?,
            None => None,
        };
        let client = shared.client(registry)?;
        Ok(Self { shared, client, registry, name, time, credentials, authorization: Mutex::default() })
    }

    /// Waits for a step of a request on this thread.
    fn wait<T>(&self, step: impl Future<Output = std::result::Result<T, reqwest::Error>>) -> Result<T> {
        let limit = self.time.left()?.min(READ_TIMEOUT);
        match self.shared.runtime.block_on(async { timeout(limit, step).await }) {
            Ok(done) => done.map_err(|error| match refusal(&error) {
                Some(NoAllowedAddress(problem)) => self.refused(problem),
                None => self.unreachable(&causes(&error)),
            }),
            Err(_) => match self.time.left() {
                Ok(_) => Err(self.unreachable(&format_args!("it was silent for {limit:?}"))),
                Err(over) => Err(over),
            },
        }
    }

    fn unreachable(&self, problem: &dyn Display) -> Error {
        Error::Unavailable(format!("the registry {} cannot be reached: {problem}", self.registry.host))
    }

    /// Requests something from the repository. If the registry requires authentication, sends the request once more
    /// with credentials.
    fn get(&self, path: &str, accept: &'static str) -> Result<Response> {
        let ImageRegistry { host, .. } = self.registry;
        let text = format!("{}://{host}/v2/{}/{path}", self.registry.scheme(), self.name);
        let url = Url::parse(&text).map_err(|error| Error::Invalid(format!("\"{text}\": {error}")))?;
        let known = || self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut response = self.follow(&url, accept, known())?;
        // The challenge of a host that the registry redirects to is ignored, because that host could choose who
        // receives the credentials.
        if response.status().as_u16() == 401
            && response.url().origin() == url.origin()
            && let Some(value) = self.authorize(&response)?
        {
            *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value.clone());
            response = self.follow(&url, accept, Some(value))?;
        }
        self.check_status(response, path)
    }

    /// Sends a request and follows redirects.
    fn follow(
        &self,
        start: &Url,
        accept: &'static str,
        authorization: Option<HeaderValue>,
    ) -> Result<Response> {
        let mut url = start.clone();
        for _ in 0..=MAX_REDIRECTS {
            self.client.allowed_addresses.check_url(&url).map_err(|problem| self.refused(&problem))?;
            let mut request = self
                .client
                .http
                .get(url.clone())
                .header(USER_AGENT, concat!("gorego/", env!("CARGO_PKG_VERSION")))
                .header(ACCEPT, accept)
                .header(ACCEPT_ENCODING, "identity");
            if url.origin() == start.origin()
                && let Some(value) = &authorization
            {
                request = request.header(AUTHORIZATION, value);
            }
            let response = self.wait(request.send())?;
            if let (Some(host), Some(address)) = (url.host_str(), response.remote_addr()) {
                self.client.allowed_addresses.record_answer(host, address.ip());
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
            let next = target.and_then(|target| url.join(target).ok());
            let next = next.ok_or_else(|| self.refused(&"it redirects to no address"))?;
            self.check_scheme(&next)?;
            url = next;
        }
        Err(self.refused(&format_args!("it redirects more than {MAX_REDIRECTS} times")))
    }

    fn check_scheme(&self, url: &Url) -> Result<()> {
        match url.scheme() {
            "https" => Ok(()),
            "http" if self.registry.is_plain => Ok(()),
            other => Err(self.refused(&format_args!("it leads to an address with {other}:"))),
        }
    }

    fn refused(&self, problem: &dyn Display) -> Error {
        Error::Precondition(format!("the registry {}: {problem}", self.registry.host))
    }

    fn check_status(&self, response: Response, path: &str) -> Result<Response> {
        let status = response.status();
        match status.as_u16() {
            200 => Ok(response),
            404 | 410 => Err(self.refused(&format_args!("it has no {}/{path}", self.name))),
            401 | 403 | 407 => {
                let problem = match self.credentials {
                    Some(_) => "it refuses the credentials of execution.images.credentials",
                    None => "it asks for credentials, and execution.images.credentials has none for it",
                };
                Err(self.refused(&format_args!("{problem} ({status})")))
            }
            408 | 429 | 500..=599 => Err(self.unreachable(&format_args!("it answers {status}"))),
            _ => Err(self.refused(&format_args!("it answers {status}"))),
        }
    }

    /// The `authorization` header for a registry that has answered 401. `None` if there are no credentials.
    fn authorize(&self, response: &Response) -> Result<Option<HeaderValue>> {
        let asked =
            response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let asked: Vec<String> = asked.map(ToOwned::to_owned).collect();
        let challenges: Vec<_> =
            asked.iter().filter_map(|text| parse_challenges(text).ok()).flatten().collect();
        let is = |scheme: &'static str| {
            move |challenge: &&ChallengeRef<'_>| challenge.scheme.eq_ignore_ascii_case(scheme)
        };
        if let Some(bearer) = challenges.iter().find(is("Bearer")) {
            return self.token(bearer).map(Some);
        }
        let has_basic = challenges.iter().any(|challenge| is("Basic")(&challenge));
        Ok(self.credentials.as_ref().filter(|_| has_basic).map(Credentials::header))
    }

    /// Fetches a token for pulling from the repository.
    fn token(&self, challenge: &ChallengeRef<'_>) -> Result<HeaderValue> {
        let parameter = |wanted: &str| {
            let mut all = challenge.params.iter();
            all.find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.to_unescaped())
        };
        let invalid = || self.refused(&"it does not say where tokens are");
        let mut url = Url::parse(&parameter("realm").ok_or_else(invalid)?).map_err(|_| invalid())?;
        self.check_scheme(&url)?;
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = parameter("service") {
                query.append_pair("service", &service);
            }
            query.append_pair("scope", &format!("repository:{}:pull", self.name));
        }
        let credentials = self.credentials.as_ref().map(Credentials::header);
        let mut response = self.check_status(self.follow(&url, "application/json", credentials)?, "token")?;
        let mut bytes = Vec::new();
        while let Some(piece) = self.wait(response.chunk())? {
            if bytes.len() + piece.len() > MAX_TOKEN_BYTES {
                return Err(self.refused(&"its token is too large"));
            }
            bytes.extend_from_slice(&piece);
        }
        let token: Option<Token> = serde_json::from_slice(&bytes).ok();
        let value = token.and_then(|token| token.token.or(token.access_token));
        let value = value.and_then(|value| HeaderValue::from_str(&format!("Bearer {value}")).ok());
        let mut value = value.ok_or_else(|| self.refused(&"it gives no usable token"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl ImageSource for Repository<'_> {
    /// The digest is computed from the document and not taken from a header of the answer.
    fn resolve(&self, version: &ImageVersion) -> Result<ImageDigest> {
        let tag = match version {
            ImageVersion::Digest(digest) => return Ok(digest.clone()),
            ImageVersion::Tag(tag) => tag,
            ImageVersion::Only => return Err(Error::invalid("an image of a registry has a digest or a tag")),
        };
        let response = self.get(&format!("manifests/{tag}"), ACCEPTED)?;
        let bytes = read_bounded(&mut Body { repository: self, response, piece: Vec::new().into() })?;
        format!("sha256:{}", const_hex::encode(Sha256::digest(&bytes))).parse().map_err(Error::Internal)
    }

    fn document<'a>(&'a self, digest: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
        let response = self.get(&format!("manifests/{digest}"), ACCEPTED)?;
        Ok(Box::new(Body { repository: self, response, piece: Vec::new().into() }))
    }

    fn blob<'a>(&'a self, blob: &ImageDigest) -> Result<Box<dyn Read + 'a>> {
        let response = self.get(&format!("blobs/{blob}"), "*/*")?;
        Ok(Box::new(Body { repository: self, response, piece: Vec::new().into() }))
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// The body of an answer, read on a thread that may block.
struct Body<'a> {
    repository: &'a Repository<'a>,
    response: Response,
    piece: bytes::Bytes,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.repository.wait(self.response.chunk()).map_err(io::Error::other)? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let piece = self.piece.split_to(self.piece.len().min(buffer.len()));
        buffer[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        net::TcpListener,
        thread,
    };
    use tokio::runtime::Runtime;

    fn registry(host: &str, is_plain: bool) -> ImageRegistry {
        ImageRegistry { host: host.into(), is_plain }
    }

    #[test]
    fn a_registry_that_is_named_and_internal_may_refer_to_hosts_of_its_own_network() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let redirect = format!(
            "HTTP/1.1 307 Elsewhere\r\nlocation: http://{address}/elsewhere\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        let content = "HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\nx".to_owned();
        let server = thread::spawn(move || {
            for answer in [redirect, content] {
                let (mut stream, _) = listener.accept().unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines();
                assert!(lines.map_while(io::Result::ok).any(|line| line.is_empty()));
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let runtime = Runtime::new().unwrap();
        let clients = RegistryClients::new(runtime.handle().clone(), None);
        let registry = registry(&format!("localhost:{}", address.port()), true);
        let time = PullTime::starting(Duration::from_secs(60));
        let repository = Repository::new(&clients, &registry, "team/tools", time).unwrap();
        repository.resolve(&ImageVersion::Tag("v1".into())).unwrap();
        server.join().unwrap();
    }
}
