//! A registry of container images in the test, and a host that wants its credentials.

use crate::support::images::Blobs;
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::json;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use tokio::net::TcpListener;

/// A registry.
#[derive(Clone, Default)]
pub(super) struct TestRegistry(pub(super) Arc<Mutex<Content>>);

#[derive(Default)]
pub(super) struct Content {
    pub(super) blobs: Blobs,
    pub(super) tags: HashMap<String, String>,
    /// User and password, if it asks for a token.
    pub(super) login: Option<String>,
    /// The requested paths, each with the status of the answer.
    pub(super) asked: Vec<(String, u16)>,
    pub(super) address: String,
    /// The status of all answers, if the registry is broken.
    pub(super) broken: Option<StatusCode>,
    /// Whether the registry sends no answer at all.
    pub(super) is_silent: bool,
    /// The number of requests.
    pub(super) requests: usize,
    /// The address of the host that has the blobs; empty for this one.
    pub(super) redirects_to: String,
}

impl TestRegistry {
    pub(super) async fn serve(content: Content) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registry = Self(Arc::new(Mutex::new(content)));
        registry.0.lock().unwrap().address = listener.local_addr().unwrap().to_string();
        let router = Router::new().fallback(answer).with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        registry
    }

    pub(super) fn address(&self) -> String {
        self.0.lock().unwrap().address.clone()
    }

    /// How often a path with this ending was answered with content.
    pub(super) fn served(&self, end: &str) -> usize {
        self.0
            .lock()
            .unwrap()
            .asked
            .iter()
            .filter(|(path, status)| path.ends_with(end) && *status == 200)
            .count()
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.0.lock().unwrap());
    }
}

async fn answer(State(TestRegistry(content)): State<TestRegistry>, request: Request) -> Response {
    let is_silent = {
        let mut content = content.lock().unwrap();
        content.requests += 1;
        content.is_silent
    };
    if is_silent {
        std::future::pending::<()>().await;
    }
    let mut content = content.lock().unwrap();
    let response = content.answer(&request);
    content.asked.push((request.uri().path().to_owned(), response.status().as_u16()));
    response
}

impl Content {
    fn answer(&self, request: &Request) -> Response {
        let with = |status: StatusCode, body: Vec<u8>| {
            let mut response = Response::new(Body::from(body));
            *response.status_mut() = status;
            response
        };
        if let Some(status) = self.broken {
            return with(status, Vec::new());
        }
        let authorization =
            request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
        let path = request.uri().path().to_owned();
        if path == "/token" {
            let expected = self.login.as_ref().map(|login| format!("Basic {}", BASE64.encode(login)));
            let query = request.uri().query().unwrap_or_default();
            assert!(
                query.contains("scope=repository%3Ateam%2Ftools%3Apull") && query.contains("service=test"),
                "{query}"
            );
            if authorization != expected {
                return with(StatusCode::UNAUTHORIZED, Vec::new());
            }
            return with(StatusCode::OK, json!({ "token": "t0ken" }).to_string().into_bytes());
        }
        if path.starts_with("/elsewhere/") {
            let digest = path.trim_start_matches("/elsewhere/");
            return with(StatusCode::OK, self.blobs.0[digest].clone());
        }
        if self.login.is_some() && authorization.as_deref() != Some("Bearer t0ken") {
            let mut response = with(StatusCode::UNAUTHORIZED, Vec::new());
            let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\"", self.address);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
            return response;
        }
        let found = path
            .strip_prefix("/v2/team/tools/manifests/")
            .map(|name| self.blobs.0.get(self.tags.get(name).map_or(name, String::as_str)));
        if let Some(found) = found {
            return found.map_or_else(
                || with(StatusCode::NOT_FOUND, Vec::new()),
                |bytes| with(StatusCode::OK, bytes.clone()),
            );
        }
        match path.strip_prefix("/v2/team/tools/blobs/").filter(|digest| self.blobs.0.contains_key(*digest)) {
            Some(digest) => {
                let mut response = with(StatusCode::TEMPORARY_REDIRECT, Vec::new());
                response.headers_mut().insert(
                    header::LOCATION,
                    format!("{}/elsewhere/{digest}", self.redirects_to).parse().unwrap(),
                );
                response
            }
            None => with(StatusCode::NOT_FOUND, Vec::new()),
        }
    }
}

/// A host that wants to be sent credentials; counts the requests that bring some.
pub(super) async fn greedy_host() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (challenge, got) =
        (format!("Bearer realm=\"{address}/token\",service=\"test\""), Arc::new(AtomicUsize::new(0)));
    let counted = got.clone();
    let answer = move |request: Request| {
        if request.headers().contains_key(header::AUTHORIZATION) {
            counted.fetch_add(1, Relaxed);
        }
        std::future::ready((StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge.clone())]))
    };
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (address, got)
}
