//! Content that clients push, and what is remembered across a restart.

use super::{Origin, code, content, fetch, push, qualifier, sri, wanted};
use crate::support::{Server, damage, sha256};
use gorego_reapi::{digest::Digest, proto::asset::PushBlobRequest};
use std::time::{Duration, SystemTime};
use tonic::Code;

/// AST-11.
#[tokio::test]
async fn what_is_pushed_is_found_under_every_uri_with_the_same_qualifiers() {
    let server = Server::start().await;
    let client = server.client().await;
    let uris = ["urn:fdc:example:source", "http://example.test/a"];
    let absent = fetch(&server, wanted(&uris[..1], &[])).await.unwrap();
    assert_eq!(code(&absent), Code::NotFound, "a name is no place, so there is nothing to deny");
    let offer = |digest: Digest| PushBlobRequest {
        uris: uris.iter().map(ToString::to_string).collect(),
        qualifiers: vec![qualifier("x.y", "z")],
        blob_digest: Some(digest.to_wire()),
        ..Default::default()
    };
    let unstored = push(&server, offer(sha256(b"unstored"))).await.unwrap_err();
    assert_eq!(unstored.code(), Code::FailedPrecondition);
    let pushed = client.upload("pushed").await;
    push(&server, offer(pushed)).await.unwrap();
    for uri in uris {
        assert_eq!(content(&server, wanted(&[uri], &[("x.y", "z")])).await, b"pushed");
        let other = fetch(&server, wanted(&[uri], &[("x.y", "other")])).await;
        assert!(other.is_err_and(|status| status.code() == Code::InvalidArgument) || uri.starts_with("urn"));
    }
    // Checksums apply to pushed content too.
    let checked = PushBlobRequest {
        qualifiers: vec![qualifier("checksum.sri", &sri("sha256", &[7; 32]))],
        ..offer(pushed)
    };
    assert_eq!(push(&server, checked).await.unwrap_err().code(), Code::InvalidArgument);
    // It is gone after its expiry.
    let past = Some((SystemTime::now() - Duration::from_secs(1)).into());
    push(&server, PushBlobRequest { expire_at: past, ..offer(pushed) }).await.unwrap();
    for uri in uris {
        let expired = fetch(&server, wanted(&[uri], &[("x.y", "z")])).await.unwrap();
        assert_eq!(code(&expired), Code::NotFound, "{uri}");
    }
    // It is a hit only if everything that it refers to is stored.
    let missing = PushBlobRequest { references_blobs: vec![sha256(b"gone").to_wire()], ..offer(pushed) };
    assert_eq!(push(&server, missing).await.unwrap_err().code(), Code::FailedPrecondition);
}

/// AST-11: bindings survive a restart, and are not served after their blob is lost.
#[tokio::test]
async fn bindings_survive_a_restart_and_lost_content_is_fetched_again() {
    let origin = Origin::of("hello").await;
    let allowed = [("ASSETS__ALLOWED_HOSTS", r#"["127.0.0.1"]"#)];
    let mut first = Server::with(&allowed).await;
    let client = first.client().await;
    let request = wanted(&[&origin.uri("/")], &[]);
    assert_eq!(content(&first, request.clone()).await, b"hello");
    let pushed = client.upload("pushed").await;
    let offer = PushBlobRequest {
        uris: vec!["urn:x".into()],
        blob_digest: Some(pushed.to_wire()),
        ..Default::default()
    };
    push(&first, offer).await.unwrap();
    drop(client);
    first.signal("TERM");
    first.exit().await;
    let second = Server::on(first.shared_store(), &allowed).await;
    assert_eq!(content(&second, request.clone()).await, b"hello");
    assert_eq!(content(&second, wanted(&["urn:x"], &[])).await, b"pushed");
    assert_eq!(origin.hits(), 1);
    for digest in [sha256(b"hello"), pushed] {
        damage(&second, digest);
        assert!(second.client().await.read(digest).await.is_err());
    }
    assert_eq!(content(&second, request).await, b"hello");
    assert_eq!(origin.hits(), 2);
    let gone = fetch(&second, wanted(&["urn:x"], &[])).await.unwrap();
    assert_eq!(code(&gone), Code::NotFound);
}
