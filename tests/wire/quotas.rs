//! Quotas on the wire: the limits of a principal or an address, and the errors when a limit is reached.

use crate::support::{
    Client, Run, Server, empty, eventually_async, http_client,
    key_server::KeyServer,
    sh, sha256,
    tokens::{SigningKey, key_set},
};
use gorego_reapi::proto::{
    bytestream::WriteRequest,
    reapi::{Action, BatchUpdateBlobsRequest, FindMissingBlobsRequest, batch_update_blobs_request},
    rpc,
};
use prost::Message as _;
use reqwest::{StatusCode, header::RETRY_AFTER};
use serde_json::json;
use std::time::{SystemTime, UNIX_EPOCH};
use tonic::{Code, Request, Status, metadata::AsciiMetadataValue};

/// Checks that a refusal names the quota and says when to try again.
fn assert_over_quota(status: &Status, what: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains(what) && status.message().contains("quota"), "{status:?}");
    let details = rpc::Status::decode(status.details()).unwrap();
    let retry = details.details.iter().find(|any| any.type_url.ends_with("google.rpc.RetryInfo")).unwrap();
    let delay = rpc::RetryInfo::decode(retry.value.as_slice()).unwrap().retry_delay.unwrap();
    assert!((1..=60).contains(&delay.seconds), "{delay:?}");
}

fn http_address(server: &Server) -> String {
    format!("http://{}", server.http_address())
}

/// GEN-21.
#[tokio::test]
async fn too_many_requests_of_an_address_are_refused_at_both_ports_and_may_come_later() {
    let server =
        Server::with(&[("QUOTAS__REQUESTS_PER_SECOND", "2"), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let client = server.client().await;
    let ask =
        async || client.cas.clone().find_missing_blobs(FindMissingBlobsRequest::default()).await.map(|_| ());
    let mut refused = None;
    // A slow machine may need more than the burst.
    for _ in 0..1_000 {
        if let Err(status) = ask().await {
            refused = Some(status);
            break;
        }
    }
    assert_over_quota(&refused.expect("one is refused"), "more than 2 requests a second");
    let url = format!("{}/cache/key", http_address(&server));
    let mut seen = None;
    for _ in 0..1_000 {
        let answer = http_client().get(&url).send().await.unwrap();
        if answer.status() == StatusCode::TOO_MANY_REQUESTS {
            seen = Some(answer);
            break;
        }
    }
    let answer = seen.expect("one is refused");
    let delay: u64 = answer.headers()[RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&delay));
    eventually_async("requests are served again", async || ask().await.is_ok()).await;
}

#[tokio::test]
async fn uploads_beyond_the_quota_of_an_hour_end_at_once() {
    let server =
        Server::with(&[("QUOTAS__UPLOAD_PER_HOUR_GB", "2 MB"), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let client = server.client().await;
    let digest = client.upload(vec![1; 1_500_000]).await;
    // A stream is refused while it is received.
    let blob = vec![2; 3_000_000];
    let name = format!("uploads/{}/blobs/{}", uuid::Uuid::new_v4(), client.function.digest(&blob));
    let pieces: Vec<_> = blob.chunks(300_000).collect();
    let messages = pieces.iter().scan(0, |offset, piece| {
        let write_offset = *offset;
        *offset += piece.len() as i64;
        let (data, finish_write) = (piece.to_vec().into(), *offset == 3_000_000);
        Some(WriteRequest { resource_name: name.clone(), write_offset, finish_write, data })
    });
    let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
    let refused = client.bytes.clone().write(messages).await.unwrap_err();
    assert_over_quota(&refused, "more than 2000000 bytes an hour");
    let put = http_client().put(format!("{}/cache/key", http_address(&server))).body(vec![3; 300_000]);
    let answer = put.send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(answer.headers().contains_key(RETRY_AFTER));
    // Reads of stored blobs have no limit.
    for _ in 0..3 {
        assert_eq!(client.read(digest).await.unwrap().len(), 1_500_000);
    }
}

/// Two principals at one address: each has its own account, and its own limits.
#[tokio::test]
async fn operations_count_for_the_principal_wherever_it_calls_from() {
    let key = SigningKey::ed25519("key");
    let keys = KeyServer::start(&key_set(&[&key]));
    let jwt = format!(
        r#"[{{ issuer = "https://i", audience = "a", algorithms = "EdDSA", jwks = "{}", claims = {{ owner = "us" }}, roles = [{{ role = "ci" }}] }}]"#,
        keys.url()
    );
    let server = Server::with(&[
        ("ACCESS__JWT", &*jwt),
        ("QUOTAS__OPERATIONS", "1"),
        ("QUOTAS__PRINCIPALS", r#"{ "jwt:https://i#b*" = { operations = 3, queued = 1 } }"#),
        ("EXECUTION__CONCURRENCY", "1"),
    ])
    .await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut runs = Vec::new();
    let mut start = async |subject: &str, number| {
        let claims = json!({"iss": "https://i", "aud": "a", "sub": subject, "exp": now + 600, "owner": "us"});
        let bearer = format!("Bearer {}", key.token("EdDSA", &claims));
        // Each has its own connection.
        let run = start(&server.client().await, &bearer.parse().unwrap(), number).await?;
        runs.push(run);
        Ok::<(), Status>(())
    };
    start("a", 1).await.unwrap();
    assert_over_quota(&start("a", 2).await.unwrap_err(), "1 unfinished operations");
    start("b1", 3).await.unwrap();
    assert_over_quota(&start("b1", 4).await.unwrap_err(), "1 operations that wait");
    start("b2", 5).await.unwrap();
}

/// Starts an action that runs for long.
async fn start(client: &Client, bearer: &AsciiMetadataValue, number: u32) -> Result<Run, Status> {
    fn with<T>(bearer: &AsciiMetadataValue, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", bearer.clone());
        request
    }
    let command = sh(&format!("sleep 7436; echo {number}")).encode_to_vec();
    let action = Action {
        command_digest: Some(sha256(&command).to_wire()),
        input_root_digest: Some(empty().to_wire()),
        ..Action::default()
    };
    let action = action.encode_to_vec();
    let digest = sha256(&action);
    let requests = [command, action].map(|data| batch_update_blobs_request::Request {
        digest: Some(sha256(&data).to_wire()),
        data: data.into(),
        compressor: 0,
    });
    let blobs = BatchUpdateBlobsRequest { requests: requests.into(), ..BatchUpdateBlobsRequest::default() };
    client.cas.clone().batch_update_blobs(with(bearer, blobs)).await?;
    let answer = client.execution.clone().execute(with(bearer, client.request(digest))).await?;
    let mut run = Run(answer.into_inner());
    run.next().await;
    Ok(run)
}
