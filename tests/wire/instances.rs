//! Instances with their own policies: GEN-14, GEN-15, CAP-01, CAP-05, CAP-08, CAP-09, AC-12.

use crate::support::{Client, Server, empty, sh, sha256};
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::{
    digest::DigestFunction,
    proto::reapi::{ActionResult, GetCapabilitiesRequest, ServerCapabilities, UpdateActionResultRequest},
};
use tonic::Code;

async fn server() -> Server {
    let instances = r#"{ "cache" = { execution = false, digest_functions = ["blake3"] }, "ci/readers" = { blobs_of = "main", action_cache_updates = false } }"#;
    Server::with(&[("INSTANCE_NAMES", r#"["", "main"]"#), ("INSTANCES", instances)]).await
}

async fn client(server: &Server, instance: &str) -> Client {
    Client { instance: instance.into(), ..server.client().await }
}

async fn capabilities(server: &Server, instance: &str) -> Result<ServerCapabilities, tonic::Status> {
    let mut client = CapabilitiesClient::connect(server.endpoint()).await.unwrap();
    let request = GetCapabilitiesRequest { instance_name: instance.into() };
    client.get_capabilities(request).await.map(tonic::Response::into_inner)
}

async fn update(client: &Client, action: gorego_reapi::digest::Digest) -> Result<(), tonic::Status> {
    let request = UpdateActionResultRequest {
        instance_name: client.instance.clone(),
        action_digest: Some(action.to_wire()),
        action_result: Some(ActionResult { stdout_raw: "x".into(), ..Default::default() }),
        ..Default::default()
    };
    client.action_cache.clone().update_action_result(request).await.map(drop)
}

#[tokio::test]
async fn every_instance_announces_and_keeps_its_own_policy() {
    let server = server().await;
    let cache = capabilities(&server, "cache").await.unwrap();
    assert_eq!(cache.execution_capabilities, None);
    assert_eq!(cache.cache_capabilities.unwrap().digest_functions, [DigestFunction::Blake3.wire() as i32]);
    let readers = capabilities(&server, "ci/readers").await.unwrap();
    let updates = readers.cache_capabilities.unwrap().action_cache_update_capabilities.unwrap();
    assert!(!updates.update_enabled);
    assert!(readers.execution_capabilities.is_some());
    assert_eq!(capabilities(&server, "nope").await.unwrap_err().code(), Code::InvalidArgument);

    let (cache, main) = (client(&server, "cache").await, client(&server, "main").await);
    let readers = client(&server, "ci/readers").await;
    let blake3 = Client { function: DigestFunction::Blake3, ..cache.clone() };
    let digest = blake3.upload("x").await;
    assert_eq!(blake3.read(digest).await.unwrap(), b"x");
    assert_eq!(cache.read(sha256(b"x")).await.unwrap_err().code(), Code::NotFound, "taken for BLAKE3");
    let action = main.action(sh("true"), empty()).await;
    let refused = cache.start_request(blake3.request(digest)).await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(update(&readers, action).await.unwrap_err().code(), Code::PermissionDenied);
    update(&main, action).await.unwrap();
}

/// GEN-15.
#[tokio::test]
async fn instances_share_blobs_only_where_the_configuration_says_so_and_results_never() {
    let server = server().await;
    let (main, readers) = (client(&server, "main").await, client(&server, "ci/readers").await);
    let default = client(&server, "").await;
    let blob = main.upload("shared").await;
    assert_eq!(readers.missing(&[blob]).await, []);
    assert_eq!(readers.read(blob).await.unwrap(), b"shared");
    assert_eq!(default.missing(&[blob]).await, [blob]);

    let action = readers.action(sh("echo from the readers"), empty()).await;
    let result = readers.run(action).await.result.unwrap();
    assert!(readers.cached(action).await.is_some(), "complete, with the blobs of the other");
    assert_eq!(main.cached(action).await, None);
    assert_eq!(main.stdout(&result).await, "from the readers\n");
}
