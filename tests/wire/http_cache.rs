//! The HTTP/1.1 cache, with gRPC clients on the same store.

use crate::support::{Server, empty, eventually, http_client, sh, sha256};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{ActionResult, OutputFile},
};
use prost::Message as _;
use reqwest::{Client, Method, Response, StatusCode, header};
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

struct Http {
    server: Server,
    base: String,
    client: Client,
}

impl Http {
    async fn start(overrides: &[(&str, &str)]) -> Self {
        let address = [("HTTP__LISTEN_ADDR", "127.0.0.1:0")];
        let server = Server::with(&[&address, overrides].concat()).await;
        let base = format!("http://{}", server.http_address());
        Self { server, base, client: http_client() }
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) -> Response {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body: Vec<u8> = body.into();
        if !body.is_empty() {
            request = request.body(body);
        }
        request.send().await.unwrap()
    }

    async fn get(&self, path: &str) -> Option<Vec<u8>> {
        let response = self.send("GET", path, &[], "").await;
        match response.status() {
            StatusCode::OK => Some(response.bytes().await.unwrap().into()),
            status => {
                assert_eq!(status, StatusCode::NOT_FOUND);
                None
            }
        }
    }

    async fn put(&self, path: &str, body: impl Into<Vec<u8>>) -> StatusCode {
        let response = self.send("PUT", path, &[], body).await;
        let is_kept = !response.headers().contains_key(header::CONNECTION);
        assert!(is_kept || response.status() != StatusCode::CREATED, "a connection that was of further use");
        response.status()
    }
}

fn cas(content: &[u8]) -> String {
    format!("/cas/{}", sha256(content).hash_hex())
}

/// Content that is larger than one piece in any protocol, and not too regular.
fn large() -> Vec<u8> {
    (0..1_500_000u32).map(|n| (n / 7).wrapping_mul(n) as u8).collect()
}

#[tokio::test]
async fn blobs_are_those_of_grpc_clients_and_have_the_hash_of_their_path() {
    let http = Http::start(&[]).await;
    let grpc = http.server.client().await;
    for content in [b"hello".to_vec(), large(), Vec::new()] {
        if !content.is_empty() {
            assert_eq!(http.get(&cas(&content)).await, None);
            assert_eq!(http.put(&cas(&content), content.clone()).await, StatusCode::CREATED);
        }
        assert_eq!(http.get(&cas(&content)).await.unwrap(), content);
        assert_eq!(grpc.read(sha256(&content)).await.unwrap(), content);
        let head = http.send("HEAD", &cas(&content), &[], "").await;
        assert_eq!(head.status(), StatusCode::OK);
        assert_eq!(head.headers()[header::CONTENT_LENGTH], content.len().to_string().as_str());
    }
    for wrong in [b"wrong".to_vec(), large()] {
        assert_eq!(http.put(&cas(b"other"), wrong.clone()).await, StatusCode::BAD_REQUEST);
        assert_eq!(http.get(&cas(b"other")).await, None);
    }
    let uploaded = grpc.upload("by gRPC").await;
    assert_eq!(http.get(&format!("/cas/{}", uploaded.hash_hex())).await.unwrap(), b"by gRPC");
    // A path selects another function by its name or by the length of the hash, as in resource names.
    let blake3 = DigestFunction::Blake3.digest(b"hello");
    let path = format!("/cas/blake3/{}", blake3.hash_hex());
    assert_eq!(http.put(&path, "hello").await, StatusCode::CREATED);
    assert_eq!(grpc.read(blake3).await.unwrap(), b"hello");
    let sha1 = DigestFunction::Sha1.digest(b"hello");
    assert_eq!(http.put(&format!("/cas/{}", sha1.hash_hex()), "hello").await, StatusCode::CREATED);
}

#[tokio::test]
async fn action_results_are_shared_with_grpc_clients_and_always_complete() {
    let http = Http::start(&[]).await;
    let grpc = http.server.client().await;
    let output = grpc.upload("output").await;
    let result = |digest: Digest| {
        let file = OutputFile { path: "out".into(), digest: Some(digest.to_wire()), ..Default::default() };
        ActionResult { output_files: vec![file], ..Default::default() }.encode_to_vec()
    };
    // The Action is stored first, as Bazel does.
    let action = grpc.action(sh("echo x"), empty()).await;
    let path = format!("/ac/{}", action.hash_hex());
    assert_eq!(http.get(&path).await, None);
    assert_eq!(http.put(&path, result(output)).await, StatusCode::CREATED);
    let cached = grpc.cached(action).await.expect("a gRPC client finds it");
    let read = ActionResult::decode(http.get(&path).await.unwrap().as_slice()).unwrap();
    assert_eq!(read, cached);
    // HTTP clients find the results of actions that ran here.
    let ran = grpc.action(sh("echo ran"), empty()).await;
    grpc.run(ran).await;
    assert!(http.get(&format!("/ac/{}", ran.hash_hex())).await.is_some());
    // HTTP clients find a result even without its Action.
    let unknown = format!("/ac/{}", sha256(b"unknown action").hash_hex());
    assert_eq!(http.put(&unknown, result(output)).await, StatusCode::CREATED);
    assert!(http.get(&unknown).await.is_some());
    // A result that refers to a missing blob is a miss.
    let incomplete = format!("/ac/{}", sha256(b"incomplete").hash_hex());
    assert_eq!(http.put(&incomplete, result(sha256(b"not stored"))).await, StatusCode::CREATED);
    assert_eq!(http.get(&incomplete).await, None);
    // An invalid result, or another kind of message, is refused.
    let escaping = OutputFile { path: "../x".into(), digest: Some(output.to_wire()), ..Default::default() };
    let escaping = ActionResult { output_files: vec![escaping], ..Default::default() }.encode_to_vec();
    for bad in [escaping, b"\xffopaque".to_vec()] {
        assert_eq!(http.put(&path, bad).await, StatusCode::BAD_REQUEST);
    }
    assert_eq!(
        http.get(&path).await.map(|bytes| bytes.len()),
        Some(read.encoded_len()),
        "the good one is still there"
    );
}

#[tokio::test]
async fn values_have_any_key_are_replaced_and_survive_a_restart() {
    let http = Http::start(&[("INSTANCE_NAMES", r#"["", "main"]"#)]).await;
    for key in ["/cache/0a1b2c", "/cache/ab/cdef-manifest", "/main/cache/0a1b2c"] {
        assert_eq!(http.get(key).await, None);
        for value in [&b"\xffopaque\0value"[..], b"another"] {
            assert_eq!(http.put(key, value).await, StatusCode::CREATED);
            assert_eq!(http.get(key).await.unwrap(), value);
        }
        let ranged = http.send("GET", key, &[("range", "bytes=1-2")], "").await;
        assert_eq!(ranged.bytes().await.unwrap(), "no");
        // A client that resumes an upload sends only the rest, which must not become the value (RFC 9110, 14.5).
        let rest = http.send("PUT", key, &[("content-range", "bytes 4-6/7")], "her").await;
        assert_eq!(rest.status(), StatusCode::BAD_REQUEST);
        assert_eq!(http.get(key).await.unwrap(), b"another");
    }
    assert_eq!(http.get("/cache/other").await, None);
    let store = http.server.kill().await;
    let server =
        Server::on(store, &[("HTTP__LISTEN_ADDR", "127.0.0.1:0"), ("INSTANCE_NAMES", r#"["", "main"]"#)])
            .await;
    let base = format!("http://{}", server.http_address());
    let http = Http { server, base, client: http.client };
    assert_eq!(http.get("/cache/0a1b2c").await.unwrap(), b"another");
}

#[tokio::test]
async fn ranges_are_served_and_those_outside_refused() {
    let http = Http::start(&[]).await;
    let content = large();
    http.put(&cas(&content), content.clone()).await;
    for (range, from, to) in [
        ("bytes=0-0", 0, 1),
        ("bytes=1000-", 1000, content.len()),
        ("bytes=-7", content.len() - 7, content.len()),
        ("bytes=5-99999999999", 5, content.len()),
    ] {
        let response =
            http.send("GET", &cas(&content), &[("range", range), ("accept-encoding", "zstd")], "").await;
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        let shown = format!("bytes {from}-{}/{}", to - 1, content.len());
        assert_eq!(response.headers()[header::CONTENT_RANGE], shown.as_str());
        assert!(!response.headers().contains_key(header::CONTENT_ENCODING));
        assert_eq!(response.bytes().await.unwrap(), content[from..to], "{range}");
    }
    let outside = http.send("GET", &cas(&content), &[("range", "bytes=9999999-")], "").await;
    assert_eq!(outside.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    let shown = format!("bytes */{}", content.len());
    assert_eq!(outside.headers()[header::CONTENT_RANGE], shown.as_str());
    // A range applies neither to HEAD, nor with a validator that this server never issued.
    let head = http.send("HEAD", &cas(&content), &[("range", "bytes=1-2")], "").await;
    assert_eq!(head.status(), StatusCode::OK);
    assert_eq!(head.headers()[header::CONTENT_LENGTH], content.len().to_string().as_str());
    let other = [("range", "bytes=1-2"), ("if-range", "\"etag\"")];
    let other = http.send("GET", &cas(&content), &other, "").await;
    assert_eq!(other.status(), StatusCode::OK);
    let several = http.send("GET", &cas(&content), &[("range", "bytes=0-1,3-4")], "").await;
    assert_eq!(several.status(), StatusCode::OK);
}

#[tokio::test]
async fn zstd_is_spoken_both_ways() {
    let http = Http::start(&[]).await;
    for content in [large(), b"small".to_vec(), vec![0; 3_000_000]] {
        // The body has two frames, as parallel compressors write them.
        let (first, second) = content.split_at(content.len() / 3);
        let frames = [first, second].map(|part| zstd::encode_all(part, 3).unwrap()).concat();
        let put = http.send("PUT", &cas(&content), &[("content-encoding", "zstd")], frames.clone()).await;
        assert_eq!(put.status(), StatusCode::CREATED);
        assert_eq!(http.get(&cas(&content)).await.unwrap(), content, "it is stored as it is");
        let get = http.send("GET", &cas(&content), &[("accept-encoding", "gzip, zstd;q=0.8")], "").await;
        let compressed =
            get.headers().get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding == "zstd");
        let body = get.bytes().await.unwrap();
        let read = if compressed { zstd::decode_all(&body[..]).unwrap() } else { body.to_vec() };
        assert_eq!((compressed, read == content), (content.len() > 1_000, true));
        let refused = http.send("GET", &cas(&content), &[("accept-encoding", "zstd;q=0")], "").await;
        assert!(!refused.headers().contains_key(header::CONTENT_ENCODING));
        for (body, encoding, status) in [
            (frames[..frames.len() - 1].to_vec(), "zstd", StatusCode::BAD_REQUEST),
            (content.clone(), "zstd", StatusCode::BAD_REQUEST),
            (frames.clone(), "br", StatusCode::UNSUPPORTED_MEDIA_TYPE),
        ] {
            let put = http.send("PUT", &cas(&content), &[("content-encoding", encoding)], body).await;
            assert_eq!(put.status(), status);
        }
        let twice = [("content-encoding", "identity"), ("content-encoding", "gzip")];
        let put = http.send("PUT", "/cache/twice", &twice, content.clone()).await;
        assert_eq!(put.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
}

#[tokio::test]
async fn what_cannot_be_done_has_the_status_that_says_so() {
    let http = Http::start(&[("CACHE__ACTION_CACHE_UPDATES", "false")]).await;
    let hash = sha256(b"x").hash_hex();
    for (method, path, status) in [
        ("GET", "/healthz".to_owned(), StatusCode::OK),
        ("HEAD", "/status".into(), StatusCode::OK),
        ("GET", "/".into(), StatusCode::OK),
        ("PUT", "/healthz".into(), StatusCode::METHOD_NOT_ALLOWED),
        ("DELETE", format!("/cas/{hash}"), StatusCode::METHOD_NOT_ALLOWED),
        ("POST", format!("/ac/{hash}"), StatusCode::METHOD_NOT_ALLOWED),
        ("GET", "/cas/zz".into(), StatusCode::BAD_REQUEST),
        ("GET", format!("/cas/{}", hash.to_uppercase()), StatusCode::BAD_REQUEST),
        ("GET", format!("/unknown/cas/{hash}"), StatusCode::BAD_REQUEST),
        ("GET", "/metric".into(), StatusCode::NOT_FOUND),
        ("PUT", format!("/ac/{hash}"), StatusCode::FORBIDDEN),
        ("PUT", "/cache/key".into(), StatusCode::FORBIDDEN),
        ("PUT", format!("/cas/{hash}"), StatusCode::CREATED),
    ] {
        let body = if method == "PUT" { "x" } else { "" };
        let response = http.send(method, &path, &[], body).await;
        assert_eq!(response.status(), status, "{method} {path}");
        assert!(response.text().await.unwrap().len() < 400);
    }
    let length = [("content-length", "99000000000")];
    let mut raw = TcpStream::connect(http.base.strip_prefix("http://").unwrap()).await.unwrap();
    let head =
        format!("PUT /cas/{hash} HTTP/1.1\r\nhost: localhost\r\n{}: {}\r\n\r\n", length[0].0, length[0].1);
    raw.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    raw.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

/// The requests of sccache's storage layer: the root and every directory exist before anything is written, at any
/// depth, with and without an instance prefix.
#[tokio::test]
async fn webdav_clients_find_every_collection_there() {
    let http = Http::start(&[("INSTANCE_NAMES", r#"["", "team/a"]"#)]).await;
    let question = r#"<?xml version="1.0"?><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>"#;
    let propfind = async |path: &str, depth: &str| {
        let response = http.send("PROPFIND", path, &[("depth", depth)], question).await;
        // The connection stays usable because the body was read.
        assert!(!response.headers().contains_key(header::CONNECTION), "{path}");
        (response.status(), response.text().await.unwrap())
    };
    for base in ["/cache", "/team/a/cache"] {
        for collection in ["", "/", "/prefix/", "/a/b/c/"] {
            let path = format!("{base}{collection}");
            for depth in ["0", "1"] {
                let (status, text) = propfind(&path, depth).await;
                assert_eq!(status, StatusCode::MULTI_STATUS, "{path}");
                assert!(text.contains("<D:collection/>"), "{path}: {text}");
            }
            let (status, text) = propfind(&path, "infinity").await;
            assert_eq!(status, StatusCode::FORBIDDEN);
            assert!(text.contains("<D:propfind-finite-depth/>"), "{text}");
        }
        let make = async |path: &str| http.send("MKCOL", &format!("{base}{path}"), &[], "").await.status();
        assert_eq!(make("/a/b/").await, StatusCode::CREATED);
        assert_eq!(make("/").await, StatusCode::METHOD_NOT_ALLOWED, "there is one");
        let key = format!("{base}/a/b/k&%3Cx%3E");
        assert_eq!(propfind(&key, "0").await.0, StatusCode::NOT_FOUND);
        assert_eq!(http.put(&key, "value").await, StatusCode::CREATED);
        let (status, found) = propfind(&key, "0").await;
        assert_eq!(status, StatusCode::MULTI_STATUS);
        assert!(found.contains("<D:getcontentlength>5<"), "{found}");
        assert!(found.contains(&format!("<D:href>{}</D:href>", key.replace('&', "&amp;"))), "{found}");
        assert_eq!(make("/a/b/k&%3Cx%3E").await, StatusCode::METHOD_NOT_ALLOWED, "a value is there");
        assert_eq!(http.get(&key).await.unwrap(), b"value");
    }
    for method in ["GET", "PUT", "DELETE"] {
        let response = http.send(method, "/cache/a/", &[], "").await;
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(response.headers()[header::ALLOW], "PROPFIND, MKCOL");
    }
    let unheard = http.send("PROPFIND", "/cache/", &[("depth", "2")], "").await;
    assert_eq!(unheard.status(), StatusCode::BAD_REQUEST);
    let large = http.send("PROPFIND", "/cache/", &[("depth", "0")], vec![b'<'; 100_000]).await;
    assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let body = http.send("MKCOL", "/cache/c/", &[], "<x/>").await;
    assert_eq!(body.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

/// Sends this on a new connection and reads the first line of the response.
async fn raw(http: &Http, request: &str) -> String {
    let mut stream = TcpStream::connect(http.base.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4_096];
    let length = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    answer.lines().next().unwrap_or_default().to_owned()
}

/// Against DNS rebinding: a web page points its own name at this machine.
#[tokio::test]
async fn a_host_that_is_not_this_server_is_not_answered() {
    let http = Http::start(&[("HTTP__ALLOWED_HOSTS", r#"["*.corp.test"]"#)]).await;
    http.put("/cache/secret", "value").await;
    for host in ["localhost", "127.0.0.1:1", "[::1]:50052", "cache.corp.test:8080"] {
        let get = http.send("GET", "/cache/secret", &[("host", host)], "").await;
        assert_eq!(get.status(), StatusCode::OK, "{host}");
    }
    for (method, path) in
        [("GET", "/cache/secret"), ("PUT", "/cache/secret"), ("GET", "/healthz"), ("GET", "/")]
    {
        let refused = http.send(method, path, &[("host", "evil.test:50052")], "").await;
        assert_eq!(refused.status(), StatusCode::MISDIRECTED_REQUEST, "{method} {path}");
        assert!(refused.text().await.unwrap().contains("http.allowed_hosts"));
    }
    assert_eq!(http.get("/cache/secret").await.unwrap(), b"value");
    let line = |http: &Http| http.server.log().into_iter().find(|line| line["http_status"] == 421);
    eventually("a line that says why", || line(&http).is_some()).await;
    assert!(line(&http).unwrap()["error"].as_str().unwrap().contains("evil.test"));
    for (request, status) in [
        ("GET /healthz HTTP/1.0\r\n\r\n", "200"),
        ("GET /healthz HTTP/1.0\r\nhost: evil.test\r\n\r\n", "421"),
        ("GET /healthz HTTP/1.1\r\n\r\n", "400"),
        ("GET /healthz HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", "400"),
        ("GET http://evil.test/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", "421"),
    ] {
        let answer = raw(&http, request).await;
        assert!(answer.contains(status), "{request:?}: {answer}");
    }
}

/// ccache sends head and body separately and uses Nagle's algorithm. If the head is acknowledged late, each request
/// takes at least 40 ms.
#[tokio::test]
async fn an_upload_whose_head_and_body_come_apart_is_not_held_up() {
    const UPLOADS: usize = 51;
    const MORE_MAX: Duration = Duration::from_millis(20);
    let http = Http::start(&[]).await;
    let address = http.base.strip_prefix("http://").unwrap().to_owned();
    let uploads = tokio::task::spawn_blocking(move || {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let mut answer = vec![0; 4_096];
        let mut median = |is_apart: bool| {
            let mut times = std::array::from_fn::<_, UPLOADS, _>(|n| {
                let start = Instant::now();
                let head = format!("PUT /cache/{n} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\n");
                let whole = format!("{head}value");
                let first = if is_apart { head.len() } else { whole.len() };
                stream.write_all(&whole.as_bytes()[..first]).unwrap();
                stream.write_all(&whole.as_bytes()[first..]).unwrap();
                let length = stream.read(&mut answer).unwrap();
                assert!(answer[..length].starts_with(b"HTTP/1.1 201"));
                start.elapsed()
            });
            times.sort_unstable();
            times[UPLOADS / 2]
        };
        (median(false), median(true))
    });
    let (whole, apart) = uploads.await.unwrap();
    assert!(apart < whole + MORE_MAX, "{apart:?}, and {whole:?} in one piece");
}

/// Probes need no credential, so anyone who can reach the port could otherwise fill the log.
#[tokio::test]
async fn thousands_of_probes_do_not_fill_the_log() {
    const PROBES: u64 = 2_000;
    let http = Http::start(&[]).await;
    for _ in 0..PROBES {
        assert!(http.get("/healthz").await.is_some());
    }
    let told = || {
        let log = http.server.log();
        let events = |name: &'static str| log.iter().filter(move |line| line["event"] == name);
        let listed = events("http_finished").count() as u64;
        (listed, events("http_not_listed").map(|line| line["requests"].as_u64().unwrap()).sum::<u64>())
    };
    eventually("the log tells of every probe", || told().0 + told().1 == PROBES).await;
    assert!(told().0 < PROBES / 2, "{:?}", told());
}

#[tokio::test]
async fn every_request_leaves_one_line_and_the_server_stops_in_good_order() {
    let mut http = Http::start(&[]).await;
    http.put(&cas(b"hello"), "hello").await;
    http.get(&cas(b"hello")).await;
    http.get("/cache/none").await;
    // This upload breaks.
    let mut raw = TcpStream::connect(http.base.strip_prefix("http://").unwrap()).await.unwrap();
    let head = format!("PUT {} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf", cas(b"x"));
    raw.write_all(head.as_bytes()).await.unwrap();
    drop(raw);
    let lines = |http: &Http| -> Vec<_> {
        http.server.log().into_iter().filter(|line| line["event"] == "http_finished").collect()
    };
    eventually("four lines", || lines(&http).len() == 4).await;
    let all = lines(&http);
    assert_eq!(all[0]["method"], "PUT");
    assert_eq!(all[0]["http_status"], 201);
    assert_eq!(all[0]["bytes_in"], 5);
    assert_eq!(all[0]["digest"], sha256(b"hello").to_string());
    assert_eq!((&all[1]["http_status"], &all[1]["bytes_out"]), (&200.into(), &5.into()));
    assert_eq!((&all[2]["http_status"], &all[2]["path"]), (&404.into(), &"/cache/none".into()));
    http.server.signal("TERM");
    assert!(http.server.exit().await.success());
    let stopped = || http.server.log().iter().any(|line| line["event"] == "server_stopped");
    eventually("the last line", stopped).await;
}
