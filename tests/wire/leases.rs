//! Leases over the wire: the blobs that a build was promised stay (AC-03, AC-04, CAS-03; GEN-21).

use crate::access::{Guarded, with};
use crate::support::{Client, Run, Server, directory, empty, file, sh_with, sha256, shared_dir};
use gorego_reapi::{
    digest::Digest,
    proto::{
        reapi::{
            BatchUpdateBlobsRequest, FindMissingBlobsRequest, GetActionResultRequest, RequestMetadata,
            batch_update_blobs_request,
        },
        rpc,
    },
};
use prost::Message as _;
use std::{
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime},
};
use tonic::{Code, Request, metadata::MetadataValue};

/// A store of this size fills within a second.
const SMALL: (&str, &str) = ("MAX_SIZE_GB", "8 MB");

/// Adds the metadata of a build to a request.
fn of<T>(build: &str, message: T) -> Request<T> {
    let metadata = RequestMetadata { tool_invocation_id: build.into(), ..Default::default() };
    let mut request = Request::new(message);
    let value = MetadataValue::from_bytes(&metadata.encode_to_vec());
    request.metadata_mut().insert_bin("build.bazel.remote.execution.v2.requestmetadata-bin", value);
    request
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let block = |n: u64| sha256(&[seed.to_le_bytes(), n.to_le_bytes()].concat()).hash().to_vec();
    (0..).flat_map(block).take(bytes).collect()
}

/// Uploads a blob and returns its digest and its status.
async fn upload(client: &Client, build: &str, data: Vec<u8>) -> (Digest, rpc::Status) {
    upload_in(client, data, |message| of(build, message)).await
}

/// Uploads a blob in a request that `request` makes.
async fn upload_in(
    client: &Client,
    data: Vec<u8>,
    request: impl Fn(BatchUpdateBlobsRequest) -> Request<BatchUpdateBlobsRequest>,
) -> (Digest, rpc::Status) {
    let digest = sha256(&data);
    let blob = batch_update_blobs_request::Request {
        digest: Some(digest.to_wire()),
        data: data.into(),
        ..Default::default()
    };
    let message = BatchUpdateBlobsRequest { requests: vec![blob], ..Default::default() };
    let reply = client.cas.clone().batch_update_blobs(request(message)).await.unwrap().into_inner();
    (digest, reply.responses.into_iter().next().unwrap().status.unwrap())
}

async fn missing(client: &Client, build: &str, digests: &[Digest]) -> usize {
    let blob_digests = digests.iter().map(|digest| digest.to_wire()).collect();
    let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
    let reply = client.cas.clone().find_missing_blobs(of(build, request)).await.unwrap();
    reply.into_inner().missing_blob_digests.len()
}

async fn result_for(client: &Client, build: &str, action: Digest) -> Result<(), Code> {
    let request = GetActionResultRequest { action_digest: Some(action.to_wire()), ..Default::default() };
    let reply = client.action_cache.clone().get_action_result(of(build, request)).await;
    reply.map(drop).map_err(|status| status.code())
}

/// Uploads five times the store.
async fn churn(client: &Client, build: &str) -> Vec<Digest> {
    let mut uploaded = Vec::new();
    for seed in 0..80 {
        let (digest, status) = upload(client, build, noise(500_000, 1_000 + seed)).await;
        assert_eq!(status.code, 0, "{}", status.message);
        uploaded.push(digest);
    }
    uploaded
}

/// User-asks failure modes 2 and 27: the blobs of a hit, of an answer of FindMissingBlobs and of an Execute stay
/// although another build uploads at full speed. The other build loses its own oldest leases, which breaks no promise.
#[tokio::test]
async fn what_a_build_was_promised_stays_while_another_fills_the_store() {
    let server = Server::with(&[SMALL]).await;
    let client = server.client().await;
    let input = client.upload(noise(10_000, 1)).await;
    let root = client.upload(directory(vec![file("in", input)], vec![], vec![])).await;
    let action =
        client.action(sh_with("mkdir -p d/e; cat in > d/e/n; echo out > f", &["f", "d"]), root).await;
    let result = client.run(action).await.result.unwrap();
    let mut promised = vec![input, root, action, sha256(b"out\n")];
    promised.push(client.digest(result.output_directories[0].tree_digest.as_ref()));
    let (uploaded, _) = upload(&client, "ours", noise(10_000, 2)).await;
    promised.push(uploaded);
    assert_eq!(missing(&client, "ours", &promised).await, 0);
    assert_eq!(result_for(&client, "ours", action).await, Ok(()));

    let others = churn(&client, "theirs").await;
    assert_eq!(missing(&client, "", &promised).await, 0);
    for blob in &promised {
        assert!(client.read(*blob).await.is_ok(), "{blob}");
    }
    assert!(client.run(action).await.cached_result);
    assert!(missing(&client, "", &others[..40]).await > 30, "the other build has lost its oldest");
    assert_eq!(missing(&client, "", &others[75..]).await, 0);
    server.logged("leases_withdrawn").await;
}

/// Both principals use the same connection, so only the principal tells them apart.
#[tokio::test]
async fn a_principal_with_more_than_its_share_loses_its_own_oldest_leases() {
    let guarded = Guarded::start(&[SMALL]).await;
    let client = guarded.server.client().await;
    let [modest, greedy] = [guarded.token("ci").await.text, guarded.token("ci").await.text];
    let upload_as = async |token: &str, data| {
        let (digest, status) = upload_in(&client, data, |message| with(token, message)).await;
        assert_eq!(status.code, 0, "{}", status.message);
        digest
    };
    let promised = upload_as(&modest, noise(10_000, 1)).await;
    let mut others = Vec::new();
    for seed in 0..80 {
        others.push(upload_as(&greedy, noise(500_000, 1_000 + seed)).await);
    }
    let missing = async |digests: &[Digest]| {
        let blob_digests = digests.iter().map(|digest| digest.to_wire()).collect();
        let request = FindMissingBlobsRequest { blob_digests, ..Default::default() };
        let reply = client.cas.clone().find_missing_blobs(with(&modest, request)).await.unwrap();
        reply.into_inner().missing_blob_digests.len()
    };
    assert_eq!(missing(&[promised]).await, 0);
    assert!(missing(&others[..40]).await > 30);
    assert_eq!(missing(&others[75..]).await, 0);
}

/// A build is active while it waits for an action, although it sends no requests.
#[tokio::test]
async fn what_a_build_was_promised_stays_while_it_waits_for_an_action() {
    let server = Server::with(&[SMALL, ("CACHE__BUILD_LEASE", "2s")]).await;
    let client = server.client().await;
    let outside = shared_dir();
    let gate = outside.path().join("gate");
    let script = format!("while [ ! -e {} ]; do sleep 0.1; done; echo > f", gate.display());
    let action = client.action(sh_with(&script, &["f"]), empty()).await;
    let (promised, _) = upload(&client, "ours", noise(10_000, 2)).await;
    let run = client.execution.clone().execute(of("ours", client.request(action))).await.unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(5) {
        churn(&client, "theirs").await;
    }
    assert_eq!(missing(&client, "", &[promised]).await, 0);
    fs::write(gate, "").unwrap();
    let end = Run(run.into_inner()).finish().await;
    assert_eq!(end.status.unwrap_or_default().code, 0);
}

/// Sets the recorded use of all stored files to five hours ago.
fn use_long_ago(directory: &Path) {
    let long_ago = SystemTime::now() - Duration::from_secs(5 * 3_600);
    for entry in fs::read_dir(directory).unwrap().flatten() {
        if entry.path().is_dir() {
            use_long_ago(&entry.path());
        } else {
            let file = fs::File::open(entry.path()).unwrap();
            file.set_times(fs::FileTimes::new().set_accessed(long_ago)).unwrap();
        }
    }
}

/// At nine tenths, a result whose blobs would have to be leased too is NOT_FOUND for a build that has its share, and is
/// logged. An upload that does not fit beside the leases is RESOURCE_EXHAUSTED.
#[tokio::test]
async fn leases_that_fill_the_store_cost_rebuilds_and_no_promise() {
    let server = Server::with(&[SMALL]).await;
    let client = server.client().await;
    let action = client.action(sh_with("head -c 1000000 /dev/zero > f", &["f"]), empty()).await;
    client.run(action).await;
    let mut blobs = Vec::new();
    for seed in 0..13 {
        blobs.push(client.upload(noise(500_000, seed)).await);
    }
    // Blobs whose last use is longer ago are not leased after a restart.
    let store = server.kill().await;
    use_long_ago(&store.path().join("v1"));
    let server = Server::on(store, &[SMALL]).await;
    let client = server.client().await;
    assert_eq!(missing(&client, "full", &blobs).await, 0);
    assert_eq!(result_for(&client, "full", action).await, Err(Code::NotFound));
    server.logged("leases_full").await;
    assert_eq!(missing(&client, "full", &blobs).await, 0, "nothing was lost");
    assert_eq!(missing(&client, "another", &blobs).await, 0, "what both need is charged to neither");
    let (_, status) = upload(&client, "full", noise(2_000_000, 99)).await;
    assert_eq!(status.code, Code::ResourceExhausted as i32, "{}", status.message);
    assert!(status.message.contains("leased to builds"), "{}", status.message);
    assert!(status.details.iter().any(|any| any.type_url.ends_with("google.rpc.RetryInfo")), "{status:?}");
}
