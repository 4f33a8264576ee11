//! The services ContentAddressableStorage and ActionCache over the wire.

use crate::harness::{Server, absent, digest};
use gorego_reapi::proto::reapi::{
    self, ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, Directory, DirectoryNode,
    FindMissingBlobsRequest, GetActionResultRequest, GetTreeRequest, OutputFile, SplitBlobRequest,
    UpdateActionResultRequest, batch_update_blobs_request::Request,
};
use prost::Message as _;
use std::collections::HashSet;
use tonic::Code;

fn item(data: Vec<u8>) -> Request {
    Request { digest: Some(digest(&data)), data: data.into(), compressor: 0 }
}

/// CAS-01, CAS-02, CAS-06, CAS-07, GEN-06.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_exactly_what_is_not_stored() {
    let server = Server::start().await;
    server.store(&[b"one", b"two"]).await;
    let (one, two, none) = (digest(b"one"), digest(b"two"), absent(0).to_wire());
    assert_eq!(server.missing(&[]).await, []);
    let asked = [one, none.clone(), digest(b""), two, none.clone()];
    assert_eq!(server.missing(&asked).await, [none]);

    let many: Vec<_> = (0..15_000).map(|n| absent(n).to_wire()).collect();
    let answered: HashSet<_> = server.missing(&many).await.into_iter().map(|d| d.hash).collect();
    assert_eq!(answered, many.iter().map(|d| d.hash.clone()).collect());

    let mut bad = many[..9].to_vec();
    bad.push(reapi::Digest { hash: "0".repeat(63), size_bytes: 1 });
    let request = FindMissingBlobsRequest { blob_digests: bad, ..Default::default() };
    let status = server.cas.clone().find_missing_blobs(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

/// GEN-12, GEN-14, GEN-15.
#[tokio::test(flavor = "multi_thread")]
async fn instances_do_not_see_each_other_and_unknown_ones_are_no_misses() {
    let server = Server::start().await;
    server.store(&[b"here"]).await;
    let ask = |instance: &str| FindMissingBlobsRequest {
        instance_name: instance.into(),
        blob_digests: vec![digest(b"here")],
        digest_function: 0,
    };
    let missing = server.cas.clone().find_missing_blobs(ask("a/b/c")).await.unwrap().into_inner();
    assert_eq!(missing.missing_blob_digests.len(), 1);
    for unknown in ["nope", "blobs", "/a", "a//b"] {
        let status = server.cas.clone().find_missing_blobs(ask(unknown)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{unknown}");
        let request = GetActionResultRequest {
            instance_name: unknown.into(),
            action_digest: Some(digest(b"here")),
            ..Default::default()
        };
        let status = server.action_cache.clone().get_action_result(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{unknown}");
    }
}

/// CAS-09 to CAS-13.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_batch_the_good_ones_are_stored_and_the_bad_ones_named() {
    let server = Server::start().await;
    let lie = Request { data: "other bytes".into(), ..item(b"claimed".to_vec()) };
    let short = Request { data: "claime".into(), ..item(b"claimed".to_vec()) };
    let requests = vec![item(b"good".to_vec()), lie, short, item(vec![]), item(b"good".to_vec())];
    let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
    let answer = server.cas.clone().batch_update_blobs(request.clone()).await.unwrap().into_inner();
    let codes: Vec<_> = answer.responses.iter().map(|r| r.status.as_ref().unwrap().code).collect();
    let invalid = Code::InvalidArgument as i32;
    assert_eq!(codes, [0, invalid, invalid, 0, 0]);
    for (asked, answered) in request.requests.iter().zip(&answer.responses) {
        assert_eq!(asked.digest, answered.digest);
    }
    assert_eq!(server.missing(&[digest(b"good"), digest(b"claimed")]).await, [digest(b"claimed")]);
}

/// GEN-24, GEN-25, CAP-10, CAP-11, CAS-15, CAS-21: uploads and downloads of a client with default settings.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_exactly_the_limit_passes_as_one_blob_and_as_many() {
    let server = Server::start().await;
    let one = vec![item(vec![7; 4_000_000])];
    let many = (0..2_000u32).map(|n| {
        let mut blob = vec![0; 2_000];
        blob[..4].copy_from_slice(&n.to_le_bytes());
        item(blob)
    });
    for requests in [one, many.collect()] {
        let digests: Vec<_> = requests.iter().map(|r| r.digest.clone().unwrap()).collect();
        let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
        let answer = server.cas.clone().batch_update_blobs(request).await.unwrap().into_inner();
        assert!(answer.responses.iter().all(|r| r.status.as_ref().unwrap().code == 0));
        let request = BatchReadBlobsRequest { digests, ..Default::default() };
        let answer = server.cas.clone().batch_read_blobs(request).await.unwrap().into_inner();
        for response in answer.responses {
            assert_eq!(response.status.unwrap().code, 0);
            assert_eq!(digest(&response.data), response.digest.unwrap());
        }
    }
    let over = vec![item(vec![1; 4_000_000]), item(vec![1])];
    let request = BatchUpdateBlobsRequest { requests: over, ..Default::default() };
    let status = server.cas.clone().batch_update_blobs(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

/// CAS-17, CAS-18, CAS-19, CAS-23, GEN-06.
#[tokio::test(flavor = "multi_thread")]
async fn every_blob_asked_for_has_an_entry() {
    let server = Server::start().await;
    server.store(&[b"here"]).await;
    let malformed = reapi::Digest { hash: "x".into(), size_bytes: 1 };
    let digests = vec![digest(b"here"), absent(0).to_wire(), malformed, digest(b""), digest(b"here")];
    let request = BatchReadBlobsRequest { digests: digests.clone(), ..Default::default() };
    let answer = server.cas.clone().batch_read_blobs(request).await.unwrap().into_inner();
    let codes: Vec<_> = answer.responses.iter().map(|r| r.status.as_ref().unwrap().code).collect();
    assert_eq!(codes, [0, Code::NotFound as i32, Code::InvalidArgument as i32, 0, 0]);
    let answered: Vec<_> = answer.responses.iter().map(|r| r.digest.clone().unwrap()).collect();
    assert_eq!(answered, digests);
    assert_eq!(&answer.responses[4].data[..], b"here");
}

/// GEN-25: 35,000 entries fit into a message, but not with 35,000 error messages. Clients act on the codes.
#[tokio::test(flavor = "multi_thread")]
async fn the_answer_for_very_many_absent_blobs_stays_within_a_message() {
    let server = Server::start().await;
    let digests: Vec<_> = (0..35_000u64).map(|n| digest(&n.to_le_bytes())).collect();
    let request = BatchReadBlobsRequest { digests: digests.clone(), ..Default::default() };
    // With the default limits of clients.
    let answer = server.cas.clone().batch_read_blobs(request).await.unwrap().into_inner();
    assert_eq!(answer.responses.len(), digests.len());
    let codes = answer.responses.iter().map(|response| response.status.as_ref().unwrap().code);
    assert!(codes.into_iter().all(|code| code == Code::NotFound as i32));
}

/// GEN-25: if the response would not fit into a message, the request is refused as a whole, however small the blobs
/// are.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_more_blobs_than_a_message_has_entries_for_is_refused() {
    let server = Server::start().await;
    let request = BatchReadBlobsRequest { digests: vec![digest(b"x"); 100_000], ..Default::default() };
    let status = server.cas.clone().batch_read_blobs(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

/// CAS-24, CAS-27, CAS-28 over the wire. The traversal itself has its own tests.
#[tokio::test(flavor = "multi_thread")]
async fn one_call_streams_a_whole_tree_and_a_token_goes_on_after_its_page() {
    let server = Server::start().await;
    let mut blobs = vec![Directory::default().encode_to_vec()];
    for level in 0..6 {
        let child = digest(blobs.last().unwrap());
        let node = DirectoryNode { name: format!("d{level}"), digest: Some(child) };
        blobs.push(Directory { directories: vec![node], ..Default::default() }.encode_to_vec());
    }
    let blobs: Vec<_> = blobs.iter().map(Vec::as_slice).collect();
    server.store(&blobs).await;
    let request = |page_token: String| GetTreeRequest {
        root_digest: Some(digest(blobs[6])),
        page_size: 2,
        page_token,
        ..Default::default()
    };
    let mut stream = server.cas.clone().get_tree(request(String::new())).await.unwrap().into_inner();
    let mut pages = Vec::new();
    while let Some(page) = stream.message().await.unwrap() {
        pages.push(page);
    }
    let all: Vec<_> = pages.iter().flat_map(|page| &page.directories).cloned().collect();
    assert_eq!(pages.len(), 4);
    assert_eq!(all.len(), 7);
    assert_eq!(all[0].encode_to_vec(), blobs[6]);
    let mut stream =
        server.cas.clone().get_tree(request(pages[1].next_page_token.clone())).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().directories, all[4..6]);

    let absent = GetTreeRequest { root_digest: Some(absent(0).to_wire()), ..Default::default() };
    let mut stream = server.cas.clone().get_tree(absent).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap_err().code(), Code::NotFound);
}

/// CAP-16, GEN-16.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_offered_is_unimplemented() {
    let server = Server::with(false).await;
    let status = server.cas.clone().split_blob(SplitBlobRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

fn update(result: Option<ActionResult>) -> UpdateActionResultRequest {
    let action_digest = Some(digest(b"any blob, no Action"));
    UpdateActionResultRequest { action_digest, action_result: result, ..Default::default() }
}

fn get() -> GetActionResultRequest {
    GetActionResultRequest { action_digest: update(None).action_digest, ..Default::default() }
}

/// AC-01, AC-05 to AC-09.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_comes_back_with_what_was_asked_to_be_inlined() {
    let server = Server::start().await;
    let mut cache = server.action_cache.clone();
    assert_eq!(cache.get_action_result(get()).await.unwrap_err().code(), Code::NotFound);
    let large = vec![b'x'; 10_000_000];
    let mut messages = Vec::new();
    for (at, chunk) in large.chunks(1_000_000).enumerate() {
        let name = format!("uploads/{}/blobs/{}/10000000", uuid::Uuid::new_v4(), digest(&large).hash);
        messages.push(gorego_reapi::proto::bytestream::WriteRequest {
            resource_name: if at == 0 { name } else { String::new() },
            write_offset: at as i64 * 1_000_000,
            finish_write: at == 9,
            data: chunk.to_vec().into(),
        });
    }
    server.bytes.clone().write(tokio_stream::iter(messages)).await.unwrap();
    server.store(&[b"file"]).await;
    let file = OutputFile { path: "out".into(), digest: Some(digest(b"file")), ..Default::default() };
    let result = ActionResult {
        output_files: vec![file],
        stdout_raw: "stdout".into(),
        stderr_digest: Some(digest(&large)),
        ..Default::default()
    };
    cache.update_action_result(update(Some(result))).await.unwrap();

    let plain = cache.get_action_result(get()).await.unwrap().into_inner();
    assert!(plain.stdout_raw.is_empty() && plain.output_files[0].contents.is_empty());
    assert_eq!(plain.stdout_digest, Some(digest(b"stdout")));
    assert!(plain.execution_metadata.is_some());
    let inlined = GetActionResultRequest {
        inline_stdout: true,
        inline_stderr: true,
        inline_output_files: vec!["out".into(), "nope".into()],
        ..get()
    };
    let inlined = cache.get_action_result(inlined).await.unwrap().into_inner();
    assert_eq!(&inlined.stdout_raw[..], b"stdout");
    assert_eq!(&inlined.output_files[0].contents[..], b"file");
    assert!(inlined.stderr_raw.is_empty(), "10 MB do not fit");
    assert_eq!(inlined.stderr_digest, Some(digest(&large)));
}

/// AC-10, AC-12, AC-13, CAP-09.
#[tokio::test(flavor = "multi_thread")]
async fn failures_are_not_served_and_updates_can_be_switched_off() {
    let server = Server::start().await;
    let mut cache = server.action_cache.clone();
    assert_eq!(cache.update_action_result(update(None)).await.unwrap_err().code(), Code::InvalidArgument);
    let failed = ActionResult { exit_code: 1, ..Default::default() };
    cache.update_action_result(update(Some(failed))).await.unwrap();
    assert_eq!(cache.get_action_result(get()).await.unwrap_err().code(), Code::NotFound);

    let server = Server::with(false).await;
    let mut cache = server.action_cache.clone();
    let denied = cache.update_action_result(update(Some(ActionResult::default()))).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(cache.get_action_result(get()).await.unwrap_err().code(), Code::NotFound);
}
