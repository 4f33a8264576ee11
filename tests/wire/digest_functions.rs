//! Digest functions: each supports everything that SHA-256 does, and blobs of different functions are separate (GEN-06,
//! GEN-08..11, CAP-05).

use crate::support::{Client, Server, directory, file, missing_subjects, sh_with};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::WriteRequest,
        reapi::{self, GetTreeRequest},
    },
};
use prost::Message as _;
use tonic::Code;

const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

async fn client(server: &Server, function: DigestFunction) -> Client {
    Client { function, ..server.client().await }
}

async fn write(client: &Client, digest: Digest, data: &[u8]) -> i64 {
    let request = WriteRequest {
        resource_name: format!("uploads/{UUID}/{}", digest.blob_name()),
        data: data.to_vec().into(),
        finish_write: true,
        ..Default::default()
    };
    client.bytes.clone().write(tokio_stream::once(request)).await.unwrap().into_inner().committed_size
}

/// CAP-05, GEN-06, BS-03, EXE-23, EXE-55: all steps of a build with each function.
#[tokio::test]
async fn a_build_works_under_every_digest_function() {
    let server = Server::start().await;
    for &function in DigestFunction::ALL {
        let client = client(&server, function).await;
        let name = function.name();
        let empty = Digest::empty(function);
        assert_eq!(client.missing(&[empty]).await, [], "{name}");
        assert_eq!(client.read(empty).await.unwrap(), b"", "{name}");

        // Large enough for several leaves, pieces and messages.
        let large: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
        let large = [name.as_bytes(), &large].concat();
        let digest = function.digest(&large);
        assert_eq!(client.missing(&[digest]).await, [digest], "{name}");
        assert_eq!(write(&client, digest, &large).await, large.len() as i64);
        assert_eq!(client.missing(&[digest]).await, []);
        assert!(client.read(digest).await.unwrap() == large, "{name}");

        let input = client.upload(format!("input of {name}")).await;
        let sub = client.upload(directory(vec![file("in", input)], vec![], vec![])).await;
        let root = reapi::Directory {
            directories: vec![reapi::DirectoryNode { name: "d".into(), digest: Some(sub.to_wire()) }],
            ..Default::default()
        };
        let root = client.upload(root.encode_to_vec()).await;
        let command = sh_with("cat d/in; mkdir -p o/p; cp d/in o/p/copy; cp d/in f", &["o", "f"]);
        let action = client.action(command, root).await;
        let response = client.run(action).await;
        assert_eq!(response.status.clone().unwrap_or_default().code, 0, "{name}: {response:?}");
        let result = response.result.unwrap();
        assert_eq!(client.stdout(&result).await, format!("input of {name}"));
        assert_eq!(client.digest(result.output_files[0].digest.as_ref()), input);
        let tree = client.digest(result.output_directories[0].tree_digest.as_ref());
        let tree = reapi::Tree::decode(&*client.read(tree).await.unwrap()).unwrap();
        let child = function.digest(&tree.children[0].encode_to_vec());
        assert_eq!(client.digest(tree.root.unwrap().directories[0].digest.as_ref()), child);
        assert!(client.run(action).await.cached_result, "{name}");

        let request = GetTreeRequest {
            root_digest: Some(root.to_wire()),
            digest_function: client.wire_function(),
            ..Default::default()
        };
        let mut pages = client.cas.clone().get_tree(request).await.unwrap().into_inner();
        assert_eq!(pages.message().await.unwrap().unwrap().directories.len(), 2, "{name}");

        let absent = function.digest(format!("absent {name}").as_bytes());
        let lacking = client.action(sh_with("true", &[]), absent).await;
        let status = client.run(lacking).await.status.unwrap();
        assert_eq!(missing_subjects(&status), [absent.blob_name()], "{name}");
    }
}

/// GEN-04, GEN-11, AC-02.
#[tokio::test]
async fn a_blob_is_known_only_under_the_function_it_was_uploaded_with() {
    let server = Server::start().await;
    for &uploaded in DigestFunction::ALL {
        let data = format!("under {} alone", uploaded.name());
        client(&server, uploaded).await.upload(data.clone()).await;
        for &other in DigestFunction::ALL.iter().filter(|&&other| other != uploaded) {
            let client = client(&server, other).await;
            let digest = other.digest(data.as_bytes());
            assert_eq!(client.missing(&[digest]).await, [digest]);
            assert_eq!(client.read(digest).await.unwrap_err().code(), Code::NotFound);
            assert_eq!(client.cached(digest).await, None);
        }
    }
}

/// GEN-08: the requests of most clients.
#[tokio::test]
async fn a_function_that_is_left_out_is_told_by_the_length_of_the_hash() {
    let server = Server::start().await;
    for &function in DigestFunction::ALL.iter().filter(|function| function.resource_segment().is_none()) {
        let client = client(&server, function).await;
        let digest = client.upload(function.name()).await;
        let request =
            reapi::FindMissingBlobsRequest { blob_digests: vec![digest.to_wire()], ..Default::default() };
        let reply = client.cas.clone().find_missing_blobs(request).await.unwrap().into_inner();
        assert_eq!(reply.missing_blob_digests, [], "{}", function.name());
    }
}

/// A store on disk keeps the functions apart and finds everything after a restart.
#[tokio::test]
async fn blobs_of_every_function_survive_kill_9() {
    let server = Server::start().await;
    let mut stored = Vec::new();
    for &function in DigestFunction::ALL {
        let client = client(&server, function).await;
        stored.push((function, client.upload(format!("kept under {}", function.name())).await));
    }
    let store = server.kill().await;
    let server = Server::on(store, &[]).await;
    for (function, digest) in stored {
        let client = client(&server, function).await;
        assert_eq!(client.missing(&[digest]).await, []);
        assert_eq!(client.read(digest).await.unwrap(), format!("kept under {}", function.name()).as_bytes());
    }
}
