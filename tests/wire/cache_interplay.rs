//! Execute and the action cache: EXE-16..21 and AC-01..15, as far as they are visible through execution.

use crate::support::{Client, Server, damage, directory, empty, file, sh, sh_with, sha256};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{ActionResult, ExecuteRequest, UpdateActionResultRequest},
};

async fn poison(client: &Client, action: Digest) {
    let poisoned = ActionResult { stdout_raw: "poison".into(), ..Default::default() };
    let request = UpdateActionResultRequest {
        instance_name: client.instance.clone(),
        action_digest: Some(action.to_wire()),
        action_result: Some(poisoned),
        ..Default::default()
    };
    client.action_cache.clone().update_action_result(request).await.unwrap();
}

/// EXE-16, EXE-18.
#[tokio::test]
async fn a_second_run_is_answered_from_the_cache() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("date +%N"), empty()).await;
    let first = client.run(action).await;
    assert!(!first.cached_result);
    assert!(client.cached(action).await.is_some(), "in the cache by the time of done");
    let second = client.run(action).await;
    assert!(second.cached_result);
    assert_eq!(first.result.unwrap().stdout_digest, second.result.unwrap().stdout_digest);
}

/// EXE-17.
#[tokio::test]
async fn skipping_the_lookup_runs_again_and_replaces_the_cached_result() {
    let server = Server::start().await;
    let client = server.client().await;
    let action = client.action(sh("echo good"), empty()).await;
    poison(&client, action).await;
    assert_eq!(client.stdout(&client.run(action).await.result.unwrap()).await, "poison");
    let request = ExecuteRequest { skip_cache_lookup: true, ..client.request(action) };
    let response = client.start_request(request).await.unwrap().finish().await;
    assert!(!response.cached_result);
    assert_eq!(client.stdout(&response.result.unwrap()).await, "good\n");
    assert_eq!(client.stdout(&client.cached(action).await.unwrap()).await, "good\n");
}

/// EXE-19, EXE-20, AC-13.
#[tokio::test]
async fn failures_and_actions_not_to_be_cached_are_run_again() {
    let server = Server::start().await;
    let client = server.client().await;
    let failing = client.action(sh("exit 1"), empty()).await;
    let uncached = client.action_with(sh("true"), empty(), |action| action.do_not_cache = true).await;
    for action in [failing, uncached] {
        for _ in 0..2 {
            assert!(!client.run(action).await.cached_result);
            assert_eq!(client.cached(action).await, None);
        }
    }
    poison(&client, uncached).await;
    assert!(!client.run(uncached).await.cached_result, "not even from an entry that somebody else wrote");
}

/// AC-03, EXE-21: if any blob is lost, the result is a miss and the action runs.
#[tokio::test]
async fn a_result_with_a_lost_blob_is_never_served() {
    let server = Server::start().await;
    let client = server.client().await;
    let input = client.upload("input").await;
    let root = client.upload(directory(vec![file("in", input)], vec![], vec![])).await;
    let script = "echo out; echo err >&2; echo file > f; mkdir -p d/e; echo nested > d/e/n";
    let action = client.action(sh_with(script, &["f", "d"]), root).await;
    let result = client.run(action).await.result.unwrap();
    let parse = |digest| Digest::from_wire(DigestFunction::Sha256, Some(digest), "digest").unwrap();
    let references = [
        parse(result.stdout_digest.as_ref().unwrap()),
        parse(result.stderr_digest.as_ref().unwrap()),
        parse(result.output_files[0].digest.as_ref().unwrap()),
        parse(result.output_directories[0].tree_digest.as_ref().unwrap()),
        sha256(b"nested\n"),
    ];
    for lost in references {
        assert!(client.cached(action).await.is_some());
        // CAS-22: a flipped bit on disk leads to a miss, never to wrong bytes.
        damage(&server, lost);
        // Damage is found when the blob is read; then the blob is missing.
        assert!(client.read(lost).await.is_err());
        assert_eq!(client.missing(&[lost]).await, [lost]);
        assert_eq!(client.cached(action).await, None, "{lost} is lost");
        let again = client.run(action).await;
        assert!(!again.cached_result);
        assert!(client.read(lost).await.is_ok(), "running it again brought the blob back");
    }
}
