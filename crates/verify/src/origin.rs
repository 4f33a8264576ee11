//! An HTTP server from which the server under test is asked to fetch.
//!
//! It serves the pages of a check and counts the visits. It listens on its own port until it is dropped. A later origin
//! may get the same port, and the server remembers what it has fetched, so the URLs of each origin have a name of its
//! own in their path.

use super::check::{Stop, Verdict, skipped};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{Response, StatusCode, header::LOCATION},
};
use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use uuid::Uuid;

/// The default name of this machine.
pub(crate) const LOCAL_HOST: &str = "127.0.0.1";

/// The response for a path.
#[derive(Debug, Clone)]
pub(crate) enum Page {
    Content(Bytes),
    /// These bytes after a delay.
    Slow(Bytes, Duration),
    /// The value of this request header; empty if it is missing.
    Echo(&'static str),
    Status(StatusCode),
    /// A redirect to this URL.
    Redirect(String),
}

/// An HTTP server for one check; see the top of this file.
#[derive(Debug)]
pub(crate) struct Origin {
    authority: String,
    /// The first part of all paths.
    name: Uuid,
    site: Arc<Mutex<Site>>,
    serving: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Site {
    pages: HashMap<String, Page>,
    visits: HashMap<String, usize>,
}

impl Origin {
    /// Listens on the loopback address, or on all addresses if this machine has a configured name.
    ///
    /// # Errors
    /// Skipped when no port is available.
    pub(crate) async fn start(host: &str) -> Verdict<Self> {
        let ip = if host == LOCAL_HOST { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        let no_port = |error| Stop::Skipped(format!("no port to serve an origin from: {error}"));
        let listener = TcpListener::bind((ip, 0)).await.map_err(no_port)?;
        let authority = format!("{host}:{}", listener.local_addr().map_err(no_port)?.port());
        let site = Arc::<Mutex<Site>>::default();
        let router = Router::new().fallback(answer).with_state(site.clone());
        let serving = tokio::spawn(async move {
            // It ends with the task. The server under test notices a broken connection.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { authority, name: Uuid::new_v4(), site, serving })
    }

    /// Serves this page at a path and returns its URL.
    pub(crate) fn page(&self, path: &str, page: Page) -> String {
        let path = self.full(path);
        let url = format!("http://{}{path}", self.authority);
        self.site().pages.insert(path, page);
        url
    }

    /// How often a path was requested.
    pub(crate) fn visits(&self, path: &str) -> usize {
        self.site().visits.get(&self.full(path)).copied().unwrap_or_default()
    }

    /// The reason to stop a check whose server never contacted the origin.
    pub(crate) fn unreachable(&self, why: &str) -> Stop {
        skipped(format!(
            "the server does not fetch from {}: {why}; allow it there, or say with --asset-origin under which name it finds \
             this machine",
            self.authority
        ))
    }

    fn full(&self, path: &str) -> String {
        format!("/{}/{path}", self.name)
    }

    fn site(&self) -> std::sync::MutexGuard<'_, Site> {
        self.site.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn answer(State(site): State<Arc<Mutex<Site>>>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let page = {
        let mut site = site.lock().unwrap_or_else(PoisonError::into_inner);
        *site.visits.entry(path.clone()).or_default() += 1;
        site.pages.get(&path).cloned()
    };
    let mut response = Response::new(Body::empty());
    match page {
        None => *response.status_mut() = StatusCode::NOT_FOUND,
        Some(Page::Status(status)) => *response.status_mut() = status,
        Some(Page::Content(bytes)) => *response.body_mut() = bytes.into(),
        Some(Page::Slow(bytes, wait)) => {
            tokio::time::sleep(wait).await;
            *response.body_mut() = bytes.into();
        }
        Some(Page::Echo(header)) => {
            let value = request.headers().get(header).map(|value| value.as_bytes().to_vec());
            *response.body_mut() = value.unwrap_or_default().into();
        }
        Some(Page::Redirect(target)) => {
            *response.status_mut() = StatusCode::FOUND;
            if let Ok(target) = target.parse() {
                response.headers_mut().insert(LOCATION, target);
            }
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server could otherwise answer for the first from what it has fetched from the second.
    #[tokio::test]
    async fn two_origins_have_no_url_in_common_even_on_the_same_port() {
        let page = || Page::Status(StatusCode::OK);
        let mut urls = Vec::new();
        for _ in 0..2 {
            let origin = Origin::start(LOCAL_HOST).await.unwrap_or_else(|_| panic!("no port"));
            let url = origin.page("file", page());
            assert!(url.ends_with("/file"));
            urls.push(url.replace(&origin.authority, "host"));
        }
        assert_ne!(urls[0], urls[1]);
    }
}
