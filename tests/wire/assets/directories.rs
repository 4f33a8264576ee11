//! Archives that become directories.

use super::{Origin, qualifier, server};
use crate::support::{Client, Server, sha256};
use gorego_client::stubs::{FetchClient, PushClient};
use gorego_reapi::proto::{
    asset::{FetchDirectoryRequest, FetchDirectoryResponse, PushDirectoryRequest},
    reapi::{self, GetTreeRequest},
};
use tonic::Code;

fn archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, mode: u32, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, path, content).unwrap();
    };
    add("pkg/run.sh", 0o755, b"#!/bin/sh\n");
    add("pkg/sub/large", 0o644, &vec![7; 1_000_000]);
    add("pkg/empty", 0o644, b"");
    zstd::encode_all(tar.into_inner().unwrap().as_slice(), 1).unwrap()
}

async fn fetch_directory(server: &Server, uri: &str, path: &str) -> FetchDirectoryResponse {
    let mut client = FetchClient::connect(server.endpoint()).await.unwrap();
    let qualifiers = if path.is_empty() { vec![] } else { vec![qualifier("directory", path)] };
    let request = FetchDirectoryRequest { uris: vec![uri.into()], qualifiers, ..Default::default() };
    client.fetch_directory(request).await.unwrap().into_inner()
}

async fn tree(client: &Client, root: Option<reapi::Digest>) -> Vec<reapi::Directory> {
    let request = GetTreeRequest { root_digest: root, ..Default::default() };
    let mut stream = client.cas.clone().get_tree(request).await.unwrap().into_inner();
    let mut directories = Vec::new();
    while let Some(page) = stream.message().await.unwrap() {
        directories.extend(page.directories);
    }
    directories
}

/// AST-06.
#[tokio::test]
async fn an_archive_becomes_directories_with_everything_in_the_cas() {
    let origin = Origin::of(archive()).await;
    let server = server().await;
    let client = server.client().await;
    let uri = origin.uri("/pkg.tar.zst");
    let response = fetch_directory(&server, &uri, "").await;
    assert_eq!(response.status.unwrap().code, 0);
    let directories = tree(&client, response.root_directory_digest.clone()).await;
    assert_eq!(directories.len(), 3);
    let pkg = directories.iter().find(|directory| directory.files.len() == 2).unwrap();
    assert_eq!((pkg.files[0].name.as_str(), pkg.files[1].name.as_str()), ("empty", "run.sh"));
    assert!(pkg.files[1].is_executable && !pkg.files[0].is_executable);
    assert_eq!(client.read(sha256(&vec![7; 1_000_000])).await.unwrap().len(), 1_000_000);
    let below = fetch_directory(&server, &uri, "pkg/sub").await;
    assert_eq!(tree(&client, below.root_directory_digest).await.len(), 1);
    let none = fetch_directory(&server, &uri, "pkg/nonsense").await;
    assert_eq!(none.status.unwrap().code, Code::NotFound as i32);
    // The directory comes from the binding the second time, and is also pushed under another name.
    let hits = origin.hits();
    let again = fetch_directory(&server, &uri, "").await;
    assert_eq!((again.root_directory_digest, origin.hits()), (response.root_directory_digest.clone(), hits));
    let offer = PushDirectoryRequest {
        uris: vec!["urn:tree".into()],
        root_directory_digest: response.root_directory_digest.clone(),
        ..Default::default()
    };
    let mut pusher = PushClient::connect(server.endpoint()).await.unwrap();
    pusher.push_directory(offer).await.unwrap();
    let pushed = fetch_directory(&server, "urn:tree", "").await;
    assert_eq!(pushed.root_directory_digest, response.root_directory_digest);
    // A response that is not an archive, or a hostile one, is an error of the origin.
    let hostile = Origin::of("this is no archive").await;
    let response = fetch_directory(&server, &hostile.uri("/x.tar.gz"), "").await;
    assert_eq!(response.status.unwrap().code, Code::Aborted as i32);
}
