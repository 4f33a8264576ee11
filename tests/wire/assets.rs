//! Remote Asset, with test origins on 127.0.0.1 (AST-01..11).

mod damaged;
mod directories;
mod pushed;

use crate::support::{PATIENCE, Server, eventually, sha256};
use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
    routing::get,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use gorego_client::stubs::{FetchClient, PushClient};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        asset::{FetchBlobRequest, FetchBlobResponse, FetchDirectoryRequest, PushBlobRequest, Qualifier},
        rpc,
    },
};
use prost::Message as _;
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::{Code, Request, Status};

/// An HTTP server that counts its requests.
struct Origin {
    address: String,
    hits: Arc<AtomicUsize>,
}

impl Origin {
    async fn serve(router: Router) -> Self {
        let hits = Arc::new(AtomicUsize::new(0));
        let count = hits.clone();
        let router = router.layer(axum::middleware::from_fn(move |request, next: axum::middleware::Next| {
            count.fetch_add(1, Ordering::SeqCst);
            next.run(request)
        }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, hits }
    }

    /// An origin with this content at every path.
    async fn of(content: impl Into<Vec<u8>>) -> Self {
        let content: Vec<u8> = content.into();
        Self::serve(Router::new().fallback(move || std::future::ready(content.clone()))).await
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

/// A server that may fetch from 127.0.0.1.
async fn server() -> Server {
    Server::with(&[("ASSETS__ALLOWED_HOSTS", r#"["127.0.0.1"]"#)]).await
}

fn qualifier(name: &str, value: &str) -> Qualifier {
    Qualifier { name: name.into(), value: value.into() }
}

fn wanted(uris: &[&str], qualifiers: &[(&str, &str)]) -> FetchBlobRequest {
    FetchBlobRequest {
        uris: uris.iter().map(ToString::to_string).collect(),
        qualifiers: qualifiers.iter().map(|(name, value)| qualifier(name, value)).collect(),
        ..Default::default()
    }
}

async fn fetch(server: &Server, request: FetchBlobRequest) -> Result<FetchBlobResponse, Status> {
    let mut client = FetchClient::connect(server.endpoint()).await.unwrap();
    Ok(client.fetch_blob(request).await?.into_inner())
}

/// The code inside a response.
fn code(response: &FetchBlobResponse) -> Code {
    Code::from_i32(response.status.as_ref().expect("AST-05: there is a status").code)
}

/// Fetches content, which must succeed, and reads it back immediately (AST-06).
async fn content(server: &Server, request: FetchBlobRequest) -> Vec<u8> {
    let response = fetch(server, request.clone()).await.unwrap();
    assert_eq!(code(&response), Code::Ok, "{response:?}");
    assert!(request.uris.contains(&response.uri), "AST-06: {response:?}");
    let function = DigestFunction::from_wire(response.digest_function).unwrap();
    let digest = Digest::from_wire(function, response.blob_digest.as_ref(), "blob_digest").unwrap();
    server.client().await.read(digest).await.unwrap()
}

async fn push(server: &Server, request: PushBlobRequest) -> Result<(), Status> {
    let mut client = PushClient::connect(server.endpoint()).await.unwrap();
    client.push_blob(request).await.map(drop)
}

fn sri(name: &str, hash: &[u8]) -> String {
    format!("{name}-{}", BASE64.encode(hash))
}

/// AST-01; BuildStream probes the services with empty requests (clients.md).
#[tokio::test]
async fn requests_without_uris_or_with_a_qualifier_twice_are_invalid() {
    let server = server().await;
    let twice = wanted(&["http://127.0.0.1/"], &[("checksum.sri", "x"), ("checksum.sri", "x")]);
    let unusable = wanted(&["http://127.0.0.1/"], &[("checksum.sri", "md5-AAAA")]);
    for request in [FetchBlobRequest::default(), twice, unusable] {
        assert_eq!(fetch(&server, request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let probe = push(&server, PushBlobRequest::default()).await;
    assert_eq!(probe.unwrap_err().code(), Code::InvalidArgument);
    let mut client = FetchClient::connect(server.endpoint()).await.unwrap();
    let probe = client.fetch_directory(FetchDirectoryRequest::default()).await;
    assert_eq!(probe.unwrap_err().code(), Code::InvalidArgument);
}

/// AST-02, AST-11.
#[tokio::test]
async fn qualifiers_that_are_not_supported_are_named_and_a_server_without_push_says_so() {
    let server = Server::with(&[("ASSETS__PUSH", "false")]).await;
    let request = wanted(&["http://127.0.0.1/"], &[("x.y", "1"), ("checksum.sri", &sri("sha256", &[0; 32]))]);
    let status = fetch(&server, request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = rpc::Status::decode(status.details()).unwrap();
    assert_eq!(details.details[0].type_url, "type.googleapis.com/google.rpc.BadRequest");
    let bad = rpc::BadRequest::decode(details.details[0].value.as_slice()).unwrap();
    assert_eq!(bad.field_violations.len(), 1);
    assert_eq!(bad.field_violations[0].field, "qualifiers.name");
    assert_eq!(bad.field_violations[0].description, "\"x.y\" not supported");
    assert_eq!(push(&server, PushBlobRequest::default()).await.unwrap_err().code(), Code::Unimplemented);
}

/// AST-03.
#[tokio::test]
async fn headers_of_qualifiers_reach_their_uris_and_are_not_repeated() {
    let echo = |headers: HeaderMap| async move {
        let shown = |name: &str| headers.get(name).map_or("-".into(), |v| v.to_str().unwrap().to_owned());
        format!("{} {} {}", shown("x-all"), shown("x-one"), shown("accept-encoding"))
    };
    let origin = Origin::serve(Router::new().route("/echo", get(echo))).await;
    let server = server().await;
    let uris = [&*origin.uri("/gone"), &*origin.uri("/echo")];
    let qualifiers = [
        ("http_header:X-All", "all"),
        ("http_header:X-One", "all"),
        ("http_header_url:1:X-One", "one"),
        ("http_header_url:0:X-All", "zero"),
        ("bazel.canonical_id", "id"),
    ];
    let request = wanted(&uris, &qualifiers);
    assert_eq!(content(&server, request.clone()).await, b"all one identity");
    let response = fetch(&server, request).await.unwrap();
    assert_eq!(response.qualifiers, [qualifier("bazel.canonical_id", "id")]);
    let reserved = wanted(&uris, &[("http_header:Host", "evil.test")]);
    assert_eq!(fetch(&server, reserved).await.unwrap_err().code(), Code::InvalidArgument);
}

/// AST-04.
#[tokio::test]
async fn content_without_one_of_the_checksums_is_aborted_and_not_offered() {
    let origin = Origin::of("hello").await;
    let server = server().await;
    let client = server.client().await;
    let uri = origin.uri("/");
    let wrong = sri("sha256", &[1; 32]);
    let response = fetch(&server, wanted(&[&uri], &[("checksum.sri", &wrong)])).await.unwrap();
    assert_eq!((code(&response), response.uri.as_str()), (Code::Aborted, uri.as_str()));
    assert_eq!(client.missing(&[sha256(b"hello")]).await, [sha256(b"hello")], "nothing was stored");
    for right in [
        sri("sha256", &Sha256::digest(b"hello")),
        sri("sha384", &Sha384::digest(b"hello")),
        sri("sha512", &Sha512::digest(b"hello")),
        format!("{wrong} {}", sri("sha512", &Sha512::digest(b"hello"))),
    ] {
        assert_eq!(content(&server, wanted(&[&uri], &[("checksum.sri", &right)])).await, b"hello");
    }
}

/// AST-05.
#[tokio::test]
async fn bad_news_of_an_origin_is_told_in_the_answer() {
    let hang = || async { std::future::pending::<()>().await };
    let router = Router::new()
        .route("/403", get(|| std::future::ready(StatusCode::FORBIDDEN)))
        .route("/429", get(|| std::future::ready(StatusCode::TOO_MANY_REQUESTS)))
        .route("/500", get(|| std::future::ready(StatusCode::INTERNAL_SERVER_ERROR)))
        .route(
            "/huge",
            get(|| async {
                let endless =
                    futures::stream::repeat(Ok::<_, std::fmt::Error>(bytes::Bytes::from_static(&[0; 4096])));
                let mut response = Response::new(Body::from_stream(endless));
                response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("5000000000"));
                response
            }),
        )
        .route("/hang", get(hang));
    let origin = Origin::serve(router).await;
    let server = server().await;
    for (path, expected) in [
        ("/404", Code::NotFound),
        ("/403", Code::PermissionDenied),
        ("/429", Code::ResourceExhausted),
        ("/500", Code::Aborted),
        ("/huge", Code::ResourceExhausted),
        ("/hang", Code::DeadlineExceeded),
    ] {
        let timeout = Some(prost_types::Duration { seconds: 0, nanos: 500_000_000 });
        let timeout = if path == "/hang" { timeout } else { None };
        let uri = origin.uri(path);
        let response = fetch(&server, FetchBlobRequest { timeout, ..wanted(&[&uri], &[]) }).await.unwrap();
        assert_eq!(code(&response), expected, "{path}: {response:?}");
        assert_eq!(response.uri, uri, "{path}");
        assert_eq!(response.blob_digest, None, "{path}");
    }
}

/// AST-07.
#[tokio::test]
async fn the_digest_is_of_the_function_asked_for() {
    let origin = Origin::of("hello").await;
    let server = server().await;
    let uri = origin.uri("/");
    for function in [DigestFunction::Sha256, DigestFunction::Blake3, DigestFunction::GitSha1] {
        let request = FetchBlobRequest { digest_function: function.wire().into(), ..wanted(&[&uri], &[]) };
        assert_eq!(content(&server, request.clone()).await, b"hello");
        let response = fetch(&server, request).await.unwrap();
        assert_eq!(response.blob_digest, Some(function.digest(b"hello").to_wire()));
        assert_eq!(response.digest_function, i32::from(function.wire()));
    }
    let response = fetch(&server, wanted(&[&uri], &[])).await.unwrap();
    assert_eq!(response.digest_function, i32::from(DigestFunction::Sha256.wire()));
    let unknown = FetchBlobRequest { digest_function: 99, ..wanted(&[&uri], &[]) };
    assert_eq!(fetch(&server, unknown).await.unwrap_err().code(), Code::InvalidArgument);
}

/// Content of each size and function takes a different path into the store.
#[tokio::test]
async fn large_downloads_arrive_whole() {
    let large: Vec<u8> = (0..3_000_000u32).map(|n| n.wrapping_mul(n) as u8).collect();
    let origin = Origin::of(large.clone()).await;
    let server = server().await;
    for function in [DigestFunction::Sha256, DigestFunction::GitSha1] {
        let digest_function = function.wire().into();
        let request = FetchBlobRequest { digest_function, ..wanted(&[&origin.uri("/")], &[]) };
        assert_eq!(content(&server, request.clone()).await, large);
        let response = fetch(&server, request).await.unwrap();
        assert_eq!(response.blob_digest, Some(function.digest(&large).to_wire()));
    }
    assert_eq!(origin.hits(), 2);
}

/// AST-08.
#[tokio::test]
async fn cached_content_is_served_until_a_caller_wants_it_newer() {
    let version = Arc::new(AtomicUsize::new(1));
    let current = version.clone();
    let router = Router::new().fallback(move || {
        let text = format!("version {}", current.load(Ordering::SeqCst));
        async move { text }
    });
    let origin = Origin::serve(router).await;
    let server = server().await;
    let request = wanted(&[&origin.uri("/")], &[]);
    assert_eq!(content(&server, request.clone()).await, b"version 1");
    version.store(2, Ordering::SeqCst);
    assert_eq!(content(&server, request.clone()).await, b"version 1", "it is cached");
    let future = Some((SystemTime::now() + Duration::from_secs(3600)).into());
    let newer = FetchBlobRequest { oldest_content_accepted: future, ..request.clone() };
    assert_eq!(content(&server, newer.clone()).await, b"version 2");
    version.store(3, Ordering::SeqCst);
    assert_eq!(content(&server, newer).await, b"version 3", "a time in the future means always");
    let past = Some((SystemTime::now() - Duration::from_secs(3600)).into());
    let old_enough = FetchBlobRequest { oldest_content_accepted: past, ..request };
    version.store(4, Ordering::SeqCst);
    assert_eq!(content(&server, old_enough).await, b"version 3");
}

/// AST-08: a download that began too early is not an answer, but it continues and does not replace a newer one.
#[tokio::test]
async fn who_wants_newer_content_does_not_get_that_of_a_download_under_way() {
    let (version, gate) = (Arc::new(AtomicUsize::new(1)), Arc::new(Semaphore::new(0)));
    let (current, entered) = (version.clone(), gate.clone());
    let router = Router::new().fallback(move || {
        let (version, gate) = (current.load(Ordering::SeqCst), entered.clone());
        async move {
            if version == 1 {
                gate.acquire().await.unwrap().forget();
            }
            format!("version {version}")
        }
    });
    let origin = Origin::serve(router).await;
    let server = server().await;
    let request = wanted(&[&origin.uri("/")], &[]);
    let (mut client, slow) = (FetchClient::connect(server.endpoint()).await.unwrap(), request.clone());
    let slow = tokio::spawn(async move { client.fetch_blob(slow).await.unwrap().into_inner() });
    eventually("the first download", || origin.hits() == 1).await;
    version.store(2, Ordering::SeqCst);
    let now = Some(SystemTime::now().into());
    let newer = FetchBlobRequest { oldest_content_accepted: now, ..request.clone() };
    assert_eq!(content(&server, newer).await, b"version 2");
    assert_eq!(content(&server, request.clone()).await, b"version 2");
    gate.add_permits(1);
    let slow = tokio::time::timeout(PATIENCE, slow).await.unwrap().unwrap();
    assert_eq!(slow.blob_digest, Some(sha256(b"version 1").to_wire()), "{slow:?}");
    assert_eq!(content(&server, request).await, b"version 2");
    assert_eq!(origin.hits(), 2);
}

/// AST-09.
#[tokio::test]
async fn mirrors_are_tried_in_order() {
    let origin = Origin::of("hello").await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let server = server().await;
    let (dead, alive) = (format!("http://{dead}/"), origin.uri("/"));
    let response = fetch(&server, wanted(&[&dead, &alive], &[])).await.unwrap();
    assert_eq!((code(&response), response.uri), (Code::Ok, alive.clone()));
    // Content from the second mirror is found again without contacting the first.
    assert_eq!(content(&server, wanted(&[&dead, &alive], &[])).await, b"hello");
    assert_eq!(origin.hits(), 1);
    let response = fetch(&server, wanted(&[&dead], &[])).await.unwrap();
    assert_eq!(code(&response), Code::Aborted);
}

/// AST-09: also when mirrors accept a connection and send nothing, or stop in the middle.
#[tokio::test]
async fn a_mirror_that_hangs_leaves_time_for_the_next() {
    let router = Router::new()
        .route("/silent", get(|| async { std::future::pending::<()>().await }))
        .route(
            "/stuck",
            get(|| async {
                let some = futures::stream::iter([Ok::<_, std::fmt::Error>("some")]);
                Body::from_stream(futures::StreamExt::chain(some, futures::stream::pending()))
            }),
        )
        .route("/good", get(|| std::future::ready("good")));
    let origin = Origin::serve(router).await;
    let server = server().await;
    let good = origin.uri("/good");
    let timeout = Some(prost_types::Duration { seconds: 8, nanos: 0 });
    let fetches = ["/silent", "/stuck"].map(|path| FetchBlobRequest {
        timeout,
        ..wanted(&[&origin.uri(path), &good], &[("bazel.canonical_id", path)])
    });
    for response in futures::future::join_all(fetches.map(|request| fetch(&server, request))).await {
        let response = response.unwrap();
        assert_eq!((code(&response), &response.uri), (Code::Ok, &good), "{response:?}");
    }
}

/// AST-09.
#[tokio::test]
async fn a_fetch_goes_on_when_its_caller_is_gone_and_many_callers_share_one() {
    let gate = Arc::new(Semaphore::new(0));
    let entered = gate.clone();
    let router = Router::new().fallback(move || {
        let gate = entered.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            "slow"
        }
    });
    let origin = Origin::serve(router).await;
    let server = server().await;
    let request = wanted(&[&origin.uri("/")], &[]);
    let mut client = FetchClient::connect(server.endpoint()).await.unwrap();
    let mut impatient = Request::new(request.clone());
    impatient.set_timeout(Duration::from_secs(1));
    client.fetch_blob(impatient).await.unwrap_err();
    let callers: Vec<_> = (0..20)
        .map(|_| {
            let (mut client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.fetch_blob(request).await.unwrap().into_inner() })
        })
        .collect();
    gate.add_permits(1);
    for caller in callers {
        let response = tokio::time::timeout(PATIENCE, caller).await.unwrap().unwrap();
        assert_eq!(response.blob_digest, Some(sha256(b"slow").to_wire()), "{response:?}");
    }
    assert_eq!(origin.hits(), 1);
}

/// AST-10: no origin is contacted unless the configuration allows it, and the error says how to allow it.
#[tokio::test]
async fn only_allowed_hosts_are_contacted_redirects_included() {
    let origin = Origin::of("secret").await;
    let denied = |response: &FetchBlobResponse, key: &str| {
        assert_eq!(code(response), Code::PermissionDenied, "{response:?}");
        let message = &response.status.as_ref().unwrap().message;
        assert!(message.contains(key), "{message}");
    };
    let closed = Server::start().await;
    let response = fetch(&closed, wanted(&[&origin.uri("/")], &[])).await.unwrap();
    denied(&response, "assets.allowed_hosts");
    let port = origin.address.rsplit(':').next().unwrap();
    let to = |target: String| {
        move || {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::FOUND;
            response.headers_mut().insert(header::LOCATION, target.parse().unwrap());
            std::future::ready(response)
        }
    };
    let router = Router::new()
        .route("/inside", get(to(origin.uri("/"))))
        .route("/loopback", get(to(format!("http://localhost:{port}/"))))
        .route("/metadata", get(to("http://169.254.169.254/latest".into())))
        .route("/file", get(to("file:///etc/passwd".into())))
        .route("/loop", get(to("/loop".into())));
    let redirecting = Origin::serve(router).await;
    // The name is allowed, but the address that it resolves to is not.
    let hosts = format!(r#"["{}", "localhost"]"#, redirecting.address);
    let server = Server::with(&[("ASSETS__ALLOWED_HOSTS", &hosts)]).await;
    for (uri, key) in [
        (redirecting.uri("/inside"), "assets.allowed_hosts"),
        (redirecting.uri("/loopback"), "assets.allowed_networks"),
        (redirecting.uri("/metadata"), "assets.allowed_hosts"),
        (redirecting.uri("/file"), "scheme"),
        (format!("http://localhost:{port}/"), "assets.allowed_networks"),
        ("http://169.254.169.254/".into(), "assets.allowed_hosts"),
        ("http://[::1]/".into(), "assets.allowed_hosts"),
        ("file:///etc/passwd".into(), "scheme"),
        ("no uri".into(), "URI"),
    ] {
        denied(&fetch(&server, wanted(&[&uri], &[])).await.unwrap(), key);
    }
    assert_eq!(origin.hits(), 0, "it was never asked");
    let response = fetch(&server, wanted(&[&redirecting.uri("/loop")], &[])).await.unwrap();
    assert_eq!(code(&response), Code::Aborted);
    let networks = [
        ("ASSETS__ALLOWED_HOSTS", r#"["localhost"]"#),
        ("ASSETS__ALLOWED_NETWORKS", r#"["127.0.0.0/8", "::1/128"]"#),
    ];
    let open = Server::with(&networks).await;
    assert_eq!(content(&open, wanted(&[&format!("http://localhost:{port}/")], &[])).await, b"secret");
}

#[tokio::test]
async fn each_download_leaves_a_line_without_what_may_be_secret() {
    let origin = Origin::of("hello").await;
    let server = server().await;
    let uri = origin.uri("/path?token=secret-token");
    content(&server, wanted(&[&uri], &[("http_header:Authorization", "secret-header")])).await;
    let logged =
        || server.log().iter().any(|line| line["event"] == "asset_fetched" && line["host"] == "127.0.0.1");
    eventually("the line of a download", logged).await;
    assert!(server.log().iter().all(|line| !line.to_string().contains("secret-")));
}
