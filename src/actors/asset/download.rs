//! One download: from a URI to a blob, through redirects, within the rules of [`Origins`](super::origins::Origins).
//!
//! The bytes are stored as they arrive. The target of a redirect is checked like the first URI. Headers from qualifiers
//! are sent only to the origin that they are meant for. No proxy is used, because it would connect to addresses that
//! this server has not checked.

use super::{
    AssetSettings,
    integrity::Integrity,
    outcome::{FailureKind, Problem},
    patience::Patience,
    request::AssetRequest,
};
use crate::{actors::cas::client::Cas, http_error::causes};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use reqwest::{
    Client, Response, StatusCode, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{ACCEPT, ACCEPT_ENCODING, HeaderMap, HeaderValue, LOCATION, USER_AGENT},
    redirect::Policy,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::sync::OnceCell;

/// Timeout for connecting. It is short, because the next mirror may do better.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// State shared by all downloads.
#[derive(Debug)]
pub(super) struct Downloader {
    /// Created when it is first needed, so that a server that fetches nothing also starts on a machine without CA
    /// certificates.
    client: OnceCell<Client>,
    settings: Arc<AssetSettings>,
}

/// The source of a download and its conditions.
#[derive(Debug)]
pub(super) struct DownloadSource<'a> {
    /// The URI to download from.
    pub uri: &'a str,
    /// Headers from qualifiers to send to it (AST-03).
    pub headers: &'a HeaderMap,
    /// The checksums that the content has to meet (AST-04).
    pub integrity: Option<&'a Integrity>,
    /// Bounds how long it may be silent (AST-09).
    pub patience: Patience,
}

/// Resolves names to addresses that may be contacted. The client connects to exactly these addresses, so nothing can
/// change in between.
#[derive(Debug)]
struct CheckingResolver(Arc<AssetSettings>);

impl Resolve for CheckingResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let settings = self.0.clone();
        Box::pin(async move {
            let mut refused = None;
            let mut allowed: Vec<SocketAddr> = Vec::new();
            // Port 0 means the port of the URL.
            for address in tokio::net::lookup_host((name.as_str(), 0)).await? {
                match settings.origins.check_address(address.ip()) {
                    Ok(()) => allowed.push(address),
                    Err(problem) => refused = Some(problem),
                }
            }
            match refused {
                Some(problem) if allowed.is_empty() => {
                    let message = format!("host \"{}\": {problem}", name.as_str());
                    Err(Problem::origin(FailureKind::Denied, message).into_io().into())
                }
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

impl Downloader {
    /// A downloader with these settings.
    pub(super) fn new(settings: Arc<AssetSettings>) -> Self {
        Self { client: OnceCell::new(), settings }
    }

    /// The HTTP client. Creating it reads the CA certificates of this machine, which blocks.
    async fn client(&self) -> Result<&Client> {
        let set_up = || async {
            let settings = self.settings.clone();
            let work = tokio::task::spawn_blocking(move || {
                // An error means that the process already has a provider.
                let _ = rustls::crypto::ring::default_provider().install_default();
                Client::builder()
                    .no_proxy()
                    .redirect(Policy::none())
                    .referer(false)
                    .dns_resolver(Arc::new(CheckingResolver(settings)))
                    .connect_timeout(CONNECT_TIMEOUT)
                    .build()
            });
            work.await.map_err(Error::internal)?.map_err(|error| {
                let causes = causes(&error);
                Error::Internal(format!(
                    "this server cannot set up downloads: {causes}; check that CA certificates are installed"
                ))
            })
        };
        self.client.get_or_try_init(set_up).await
    }

    /// Downloads and stores the content of a source, after checking its checksum if there is one (AST-04).
    ///
    /// # Errors
    /// The failure of the origin, or a fault of this server.
    pub(super) async fn download(
        &self,
        cas: &Cas,
        request: &AssetRequest,
        DownloadSource { uri, headers, integrity, patience }: &DownloadSource<'_>,
    ) -> Result<Digest, Problem> {
        let mut response = patience.wait(self.get(uri, headers, integrity.is_some())).await?;
        let max = self.settings.max_download_bytes;
        let too_much = || {
            let key = "assets.max_download_gb of this server";
            Problem::origin(FailureKind::TooMuch, format!("it has more than {max} bytes ({key})"))
        };
        let announced = response.content_length();
        if announced.is_some_and(|length| length > max) {
            return Err(too_much());
        }
        let mut blob = cas.new_blob(&request.instance, request.function);
        if let Some(length) = announced {
            blob.announce(length);
        }
        let mut witness = integrity.map(Integrity::witness).unwrap_or_default();
        loop {
            let next = async { response.chunk().await.map_err(|error| of_request(&error)) };
            let Some(bytes) = patience.wait(next).await? else { break };
            if blob.size().saturating_add(bytes.len() as u64) > max {
                return Err(too_much());
            }
            witness.update(&bytes);
            blob.write(bytes).await?;
        }
        if integrity.is_some_and(|integrity| !integrity.is_met_by(witness)) {
            let message = format!("its {} bytes do not have the checksum of checksum.sri", blob.size());
            return Err(Problem::origin(FailureKind::Unusable, message));
        }
        Ok(blob.finish().await?)
    }

    /// Sends the request and follows redirects.
    async fn get(&self, uri: &str, headers: &HeaderMap, checked: bool) -> Result<Response, Problem> {
        let invalid = |problem: &dyn std::fmt::Display| {
            Problem::origin(FailureKind::Denied, format!("it is not a URI that can be fetched: {problem}"))
        };
        let mut url = Url::parse(uri).map_err(|error| invalid(&error))?;
        let origin = url.origin();
        for _ in 0..=self.settings.max_redirects {
            self.settings
                .origins
                .check_url(&url)
                .map_err(|problem| Problem::origin(FailureKind::Denied, problem))?;
            // Headers that are meant for one origin are not sent to another.
            let mut sent = if url.origin() == origin { headers.clone() } else { HeaderMap::new() };
            for (name, value) in
                [(USER_AGENT, concat!("gorego/", env!("CARGO_PKG_VERSION"))), (ACCEPT, "*/*")]
            {
                sent.entry(name).or_insert(HeaderValue::from_static(value));
            }
            sent.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            let asked = self.client().await?.get(url.clone()).headers(sent).send().await;
            let response = asked.map_err(|error| of_request(&error))?;
            if !is_redirect(response.status()) {
                return check_status(response);
            }
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
            let target = target.ok_or_else(|| invalid(&"a redirect has no valid Location"))?;
            let next = url.join(target).map_err(|error| invalid(&error))?;
            if url.scheme() == "https" && next.scheme() == "http" && !checked {
                let problem = "a redirect leads from https to http, which needs a checksum.sri";
                return Err(Problem::origin(FailureKind::Denied, problem));
            }
            url = next;
        }
        let message = format!(
            "there are more than {} redirects (assets.max_redirects of this server)",
            self.settings.max_redirects
        );
        Err(Problem::origin(FailureKind::Unusable, message))
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn check_status(response: Response) -> Result<Response, Problem> {
    let kind = match response.status().as_u16() {
        200 => return Ok(response),
        404 | 410 => FailureKind::NotFound,
        401 | 403 | 407 | 451 => FailureKind::Denied,
        408 | 504 => FailureKind::TimedOut,
        429 => FailureKind::TooMuch,
        _ => FailureKind::Unusable,
    };
    Err(Problem::origin(kind, format!("the origin answers {}", response.status())))
}

/// Converts the error of a failed request.
fn of_request(error: &reqwest::Error) -> Problem {
    if let Some(problem) = refused_by_resolver(error) {
        return problem;
    }
    let kind = if error.is_timeout() { FailureKind::TimedOut } else { FailureKind::Unusable };
    // The message omits the URL, which may contain a password and is reported separately.
    Problem::origin(kind, format!("the request to the origin failed: {}", causes(error)))
}

fn refused_by_resolver(error: &reqwest::Error) -> Option<Problem> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && let problem @ Problem::Origin(_) = Problem::of_io(error)
            && matches!(&problem, Problem::Origin(failure) if failure.kind == FailureKind::Denied)
        {
            return Some(problem);
        }
        next = error.source();
    }
    None
}
