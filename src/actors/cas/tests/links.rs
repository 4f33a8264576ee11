//! Tests of the links of results to the blobs that they need.

use super::*;
use prost::Message as _;

/// A Tree with one file.
fn tree_of(file: Digest) -> Vec<u8> {
    let node = reapi::FileNode { name: "f".into(), digest: Some(file.to_wire()), ..Default::default() };
    let root = reapi::Directory { files: vec![node], ..Default::default() };
    reapi::Tree { root: Some(root), children: Vec::new() }.encode_to_vec()
}

fn with_file(file: Digest) -> reapi::ActionResult {
    let output = reapi::OutputFile { path: "o".into(), digest: Some(file.to_wire()), ..Default::default() };
    reapi::ActionResult { output_files: vec![output], ..Default::default() }
}

fn with_tree(tree: Digest) -> reapi::ActionResult {
    let output =
        reapi::OutputDirectory { path: "d".into(), tree_digest: Some(tree.to_wire()), ..Default::default() };
    reapi::ActionResult { output_directories: vec![output], ..Default::default() }
}

/// Loses a blob, and checks that the only result is dropped in the same step.
async fn lose_with_result(store: &TestStore, blob: Digest, how: &str) {
    let before = store.inspect().await;
    assert_eq!((before.totals.results, before.tally.followed), (1, 0), "{how}");
    store.lose(blob).await;
    let after = store.inspect().await;
    assert_eq!((after.totals.results, after.tally.followed), (0, 1), "{how}");
}

/// A result is linked in the step that makes it visible, in whichever way it is stored, and also to blobs that
/// only its Trees name.
#[actix::test]
async fn a_result_goes_with_its_blob_although_nobody_has_asked_for_it() {
    let action = digest(b"action");
    let put = async |store: &TestStore, result| {
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    };

    let store = TestStore::of_files().await;
    let file = store.put(noise(5_000, 1)).await;
    put(&store, with_file(file)).await;
    lose_with_result(&store, file, "a client names a file").await;

    let store = TestStore::of_files().await;
    let file = store.put(noise(5_000, 1)).await;
    let tree = store.put(tree_of(file)).await;
    put(&store, with_tree(tree)).await;
    lose_with_result(&store, file, "a client names a Tree").await;

    let store = TestStore::of_files().await;
    let file = store
        .worker(move |cas, main| {
            let mut batch = cas.begin_outputs(&main, SHA256, 0);
            let file = batch.bytes(noise(5_000, 1).to_vec()).unwrap();
            let tree = batch.bytes(tree_of(file)).unwrap();
            batch.result(action, with_tree(tree), Provenance::default()).unwrap();
            batch.commit().unwrap();
            file
        })
        .await;
    lose_with_result(&store, file, "a worker stores a directory").await;
}

/// A result that a client stores before its blobs is linked once it is found complete.
#[actix::test]
async fn a_result_that_was_stored_before_its_blobs_is_linked_when_it_is_complete() {
    let (store, action) = (TestStore::of_files().await, digest(b"action"));
    let bytes = noise(5_000, 1);
    store
        .cas
        .put_result(&store.main, action, with_file(digest(&bytes)), Provenance::default())
        .await
        .unwrap();
    let file = store.put(bytes).await;
    assert!(store.cas.get_result(&store.main, action).await.unwrap().is_some());
    lose_with_result(&store, file, "stored before").await;
}
