//! Signed tokens on the wire, at both ports: tokens of an issuer and of attackers, and keys that change.

use crate::support::{
    Server, eventually_async, http_client,
    key_server::KeyServer,
    tokens::{SigningKey, encode, key_set, symmetric_token},
};
use gorego_client::stubs::ContentAddressableStorageClient;
use gorego_reapi::proto::reapi::FindMissingBlobsRequest;
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::{Code, Request, Status, transport::Channel};

const ISSUER: &str = "https://token.example.com";
const AUDIENCE: &str = "https://gorego.example.com";

/// A server that accepts tokens of one issuer.
struct Guarded {
    server: Server,
    http: String,
    cas: ContentAddressableStorageClient<Channel>,
}

fn issuer(jwks: &str) -> String {
    format!(
        r#"[{{ issuer = "{ISSUER}", audience = "{AUDIENCE}", algorithms = ["RS256", "ES256", "EdDSA"], jwks = "{jwks}",
        claims = {{ repository_owner = "us" }}, leeway = "30s",
        roles = [{{ role = "reader" }}, {{ role = "ci", claims = {{ ref = "refs/heads/main" }} }}] }}]"#
    )
    .replace('\n', " ")
}

impl Guarded {
    async fn start(jwks: &str) -> Self {
        let overrides = [("ACCESS__JWT", &*issuer(jwks)), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")];
        let server = Server::with(&overrides).await;
        let http = format!("http://{}", server.http_address());
        let channel = Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        Self { server, http, cas: ContentAddressableStorageClient::new(channel) }
    }

    /// Makes a request that needs the permission to read.
    async fn grpc(&self, token: &str) -> Result<(), Status> {
        let mut request = Request::new(FindMissingBlobsRequest::default());
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        self.cas.clone().find_missing_blobs(request).await.map(|_| ())
    }

    /// Stores a value, which needs the permission to write results.
    async fn put(&self, token: &str) -> (StatusCode, String) {
        let request = http_client().put(format!("{}/cache/key", self.http)).bearer_auth(token).body("value");
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    /// The reason why both ports refuse a token. Both give the same reason, except for the age in seconds.
    async fn refusal(&self, token: &str) -> String {
        let status = self.grpc(token).await.expect_err(token);
        assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
        let (code, text) = self.put(token).await;
        let without_numbers = |text: &str| text.trim_end().replace(|c: char| c.is_ascii_digit(), "");
        assert_eq!(code, StatusCode::UNAUTHORIZED);
        assert_eq!(without_numbers(&text), without_numbers(status.message()));
        status.message().to_owned()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The claims of a good token with some of them replaced, or removed by a null.
fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": ISSUER, "aud": AUDIENCE, "sub": "repo:us/it", "exp": now() + 600, "nbf": now(), "iat": now(),
        "repository_owner": "us", "ref": "refs/heads/main",
    });
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => _ = claims.as_object_mut().unwrap().remove(name),
            value => claims[name] = value.clone(),
        }
    }
    claims
}

#[tokio::test]
async fn tokens_of_the_issuer_give_the_roles_of_their_claims() {
    let (rsa, p256) = (SigningKey::rsa("rsa"), SigningKey::p256("p256"));
    let keys = KeyServer::start(&key_set(&[&rsa, &p256]));
    let guarded = Guarded::start(&keys.url()).await;
    for token in [
        rsa.token("RS256", &claims(json!({}))),
        p256.token("ES256", &claims(json!({"aud": ["other", AUDIENCE]}))),
        p256.token("ES256", &claims(json!({"exp": now() - 10, "nbf": now() + 20}))),
        p256.token_with(&json!({"alg": "ES256"}), &claims(json!({}))),
    ] {
        guarded.grpc(&token).await.unwrap();
        assert_eq!(guarded.put(&token).await.0, StatusCode::CREATED);
    }
    let branch = rsa.token("RS256", &claims(json!({"ref": "refs/heads/other"})));
    guarded.grpc(&branch).await.unwrap();
    let (code, text) = guarded.put(&branch).await;
    assert_eq!(code, StatusCode::FORBIDDEN, "{text}");
    assert!(text.contains(".write"), "{text}");
    assert_eq!(guarded.grpc("").await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(keys.requests(), 1, "one download serves all");
}

/// Each token is refused at both ports with the same message, and no token appears in the log.
#[tokio::test]
async fn hostile_tokens_are_refused_with_the_reason() {
    let (rsa, ed) = (SigningKey::rsa("rsa"), SigningKey::ed25519("ed"));
    let keys = KeyServer::start(&key_set(&[&rsa, &ed]));
    let guarded = Guarded::start(&keys.url()).await;
    let good = claims(json!({}));
    let sign = |changes: Value| ed.token("EdDSA", &claims(changes));
    let with_header = |header: Value| ed.token_with(&header, &good);
    let (payload, twice) = (good.to_string(), good.to_string().replacen('{', r#"{"sub":"root","#, 1));
    let header = r#"{"alg":"EdDSA","kid":"ed"}"#;
    let nested = format!("{}1{}", r#"{"a":"#.repeat(40), "}".repeat(40));
    let [first, second, third] =
        <[String; 3]>::try_from(sign(json!({})).split('.').map(str::to_owned).collect::<Vec<_>>()).unwrap();
    let jwk = rsa.jwk().to_string();
    let mut tokens = vec![
        ("expired", sign(json!({"exp": now() - 60})), "expired"),
        ("not yet valid", sign(json!({"nbf": now() + 90})), "in the future"),
        ("another audience", sign(json!({"aud": "other"})), "audience"),
        ("no audience", sign(json!({"aud": null})), "no aud"),
        ("another issuer", sign(json!({"iss": "https://evil.test"})), "issuer"),
        ("others' repository", sign(json!({"repository_owner": "them"})), "repository_owner"),
        ("claims that are there twice", ed.sign_texts("EdDSA", header, &twice), "twice"),
        ("a nested payload", ed.sign_texts("EdDSA", header, &nested), "levels"),
        ("a huge payload", sign(json!({"more": "x".repeat(14_000)})), "16 KiB"),
        ("demands", with_header(json!({"alg": "EdDSA", "kid": "ed", "crit": ["x"]})), "crit"),
        ("a key that nobody has", with_header(json!({"alg": "EdDSA", "kid": "other"})), "key"),
        ("its own key", SigningKey::ed25519("ed").token("EdDSA", &good), "signature"),
        ("another algorithm", rsa.token("RS512", &good), "algorithm"),
        ("no signature", format!("{first}.{second}."), "signature"),
        ("padding", format!("{first}.{second}==.{third}"), "malformed"),
        ("padding at the end", format!("{first}.{second}.{third}="), "signature"),
        (
            "another payload",
            format!("{first}.{}.{third}", encode(payload.replace("us/it", "us/other"))),
            "signature",
        ),
        ("two parts", format!("{first}.{second}"), "parts"),
    ];
    for algorithm in ["none", "None", "HS256"] {
        let unsigned = format!("{}.{}.", encode(json!({"alg": algorithm}).to_string()), encode(&payload));
        tokens.push(("no algorithm", unsigned, "algorithm"));
    }
    for algorithm in ["HS256", "RS256"] {
        let header = json!({"alg": algorithm, "kid": "rsa"});
        let token = symmetric_token(&header, &good, jwk.as_bytes());
        tokens.push(("key confusion", token, if algorithm == "HS256" { "algorithm" } else { "signature" }));
    }
    for (what, token, reason) in &tokens {
        let refusal = guarded.refusal(token).await;
        assert!(refusal.contains(reason), "{what}: {refusal}");
    }
    guarded.grpc(&sign(json!({}))).await.unwrap();
    let log = format!("{:?}", guarded.server.log());
    for (what, token, _) in &tokens {
        let signature = token.rsplit('.').next().unwrap();
        assert!(signature.len() < 20 || !log.contains(signature), "{what} is in the log");
    }
    assert_eq!(keys.requests(), 1, "no token makes the server contact anybody");
}

#[tokio::test]
async fn keys_of_a_file_follow_the_file() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("jwks.json");
    std::fs::write(&file, key_set(&[&old])).unwrap();
    let guarded = Guarded::start(file.to_str().unwrap()).await;
    let [of_old, of_new] = [&old, &new].map(|key| key.token("EdDSA", &claims(json!({}))));
    guarded.grpc(&of_old).await.unwrap();
    assert!(guarded.refusal(&of_new).await.contains("key"));
    std::fs::write(&file, key_set(&[&new])).unwrap();
    eventually_async("the new key is known", async || guarded.grpc(&of_new).await.is_ok()).await;
    let later = old.token("EdDSA", &claims(json!({"jti": "another"})));
    assert!(guarded.refusal(&later).await.contains("key"));
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_is_no_fault_of_the_client() {
    let key = SigningKey::ed25519("key");
    let keys = KeyServer::start("");
    keys.answer_with("503 Service Unavailable", "", "");
    let guarded = Guarded::start(&keys.url()).await;
    let status = guarded.grpc(&key.token("EdDSA", &claims(json!({})))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(!status.message().contains(&keys.url()), "{status:?}");
    let failed = guarded.server.logged("jwks_failed").await;
    assert!(failed["error"].as_str().unwrap().contains("503"), "{failed}");
}
