//! Tests of how peers share the store's threads and memory: each bound leaves a place for another peer, however much
//! the first one requests.

use super::{
    super::{forms::chunks::ChunkWork, settings, trees::TreeRoom},
    *,
};
use crate::budget::Share;
use futures::FutureExt as _;
use gorego_reapi::chunking::Chunking;
use prost::Message as _;
use std::collections::HashSet;

/// A new connection from this loopback address.
fn client(host: u8) -> Caller {
    Caller::connected(([127, 0, 0, host], 1).into())
}

/// Takes as much of a budget as this caller can get, one unit at a time.
fn all_of(budget: &Budget, caller: Caller, unit: u64) -> Vec<Share> {
    std::iter::from_fn(|| budget.take(caller, unit).ok()).collect()
}

/// Takes as much of a budget as a peer can get with many connections.
fn all_of_peer(budget: &Budget, host: u8, unit: u64) -> Vec<Share> {
    let each = std::iter::repeat_with(|| all_of(budget, client(host), unit));
    let held: Vec<_> = each.take_while(|held| !held.is_empty()).flatten().collect();
    assert!(!held.is_empty() && budget.held() < budget.bounds().total, "the last part is for others");
    held
}

impl TestStore {
    /// Asserts that while a peer holds its full share of a budget, its next request waits, and the same request of
    /// another peer is answered.
    async fn assert_shared<T>(
        &self,
        (budget, unit): (&Budget, u64),
        request: impl AsyncFn(Cas, Caller) -> Result<T>,
    ) -> T {
        let held = all_of_peer(budget, 1, unit);
        let ask = |caller| request(self.cas.on_behalf_of(caller), caller).boxed_local();
        let mut waiting = ask(client(1));
        while !budget.is_awaited() {
            let answer = tokio::time::timeout(Duration::from_millis(1), waiting.as_mut()).await;
            assert!(answer.is_err(), "a peer gets more than its share of {:?}", budget.bounds());
        }
        let answer = tokio::time::timeout(Duration::from_secs(30), ask(client(2))).await;
        assert!(answer.expect("another peer is served").is_ok());
        assert!(budget.is_awaited() && waiting.as_mut().now_or_never().is_none());
        drop(held);
        let answer = tokio::time::timeout(Duration::from_secs(30), waiting).await;
        answer.expect("the waiting request is served in time").unwrap()
    }
}

/// A Directory whose decoding needs reserved memory and whose files are all stored.
async fn large_directory(store: &TestStore) -> Digest {
    let content = Some(store.put("content").await.to_wire());
    let file = |n| reapi::FileNode { name: format!("{n:08}"), digest: content.clone(), ..Default::default() };
    let directory = reapi::Directory { files: (0..1_000).map(file).collect(), ..Default::default() };
    store.put(directory.encode_to_vec()).await
}

#[actix::test]
async fn peers_share_memory_for_stored_messages() {
    let store = TestStore::new().await;
    let (root, shared) = (large_directory(&store).await, store.cas.shared().clone());
    let budget = (&shared.decoded, settings::LARGEST_DECODED / 4);
    let decode = async |cas: Cas, _| cas.room_to_decode(settings::LARGEST_DECODED).await;
    store.assert_shared(budget, decode).await;
    // The check is charged to the caller that it is made for.
    let instance = &store.main;
    let check = async |cas: Cas, caller| {
        shared.directories.clear();
        cas.working_for(caller).check_inputs_apart(instance.clone(), root).await
    };
    store.assert_shared(budget, check).await;
    assert_eq!(shared.decoded.held(), 0);
}

#[actix::test]
async fn peers_share_places_for_large_trees() {
    let store = TestStore::new().await;
    let shared = store.cas.shared().clone();
    let hold = async |cas: Cas, _| {
        let mut room = TreeRoom::new(&cas);
        room.grow(settings::SMALL_TREE_BYTES).await?;
        room.grow(1).await
    };
    store.assert_shared((&shared.large_trees, 1), hold).await;
}

#[actix::test]
async fn peers_share_checks_of_results_and_first_reads_of_blobs() {
    let store = TestStore::new().await;
    let blobs = [store.put(noise(LARGE, 1)).await, store.put(noise(LARGE, 2)).await];
    let actions = [digest(b"first"), digest(b"second")];
    for (action, blob) in actions.into_iter().zip(blobs) {
        let file = reapi::OutputFile { path: "o".into(), digest: Some(blob.to_wire()), ..Default::default() };
        let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    }
    let is_first = |caller: Caller| usize::from(caller.peer != client(1).peer);
    let store = store.restart().await;
    let (shared, main) = (store.cas.shared().clone(), store.main.clone());
    let look_up = async |cas: Cas, caller| cas.get_result(&main, actions[is_first(caller)]).await;
    assert!(store.assert_shared((&shared.result_checks, 1), look_up).await.is_some());
    drop(shared);
    let store = store.restart().await;
    let (shared, main) = (store.cas.shared().clone(), store.main.clone());
    let open = async |cas: Cas, caller| cas.open(&main, blobs[is_first(caller)]).await;
    store.assert_shared((&shared.cold_reads, 1), open).await;
    let here = std::thread::current().id();
    let read = async |cas: Cas, caller| {
        let blob = cas.open(&main, blobs[is_first(caller)]).await?;
        let see = |(threads, bytes): &mut (HashSet<_>, usize), piece: &[u8]| {
            threads.insert(std::thread::current().id());
            *bytes += piece.len();
        };
        let (threads, bytes) = cas.read_through(blob, (HashSet::new(), 0), see).await?;
        assert!(!threads.contains(&here) && bytes == LARGE);
        Ok(())
    };
    store.assert_shared((&shared.cold_reads, 1), read).await;
}

/// Both peers split the same blob. The first one waits for a place while the other one is served.
#[actix::test]
async fn peers_share_places_to_split_blobs() {
    let store = TestStore::new().await;
    let (blob, main) = (store.put(noise(LARGE, 1)).await, store.main.clone());
    let chunking = Chunking::fast_cdc(4_096, 0).unwrap();
    let shared = store.cas.shared().clone();
    let ChunkWork { places, .. } = &shared.chunk_work;
    let split = async |cas: Cas, _| cas.split(&main, blob, chunking, usize::MAX).await;
    store.assert_shared((places, 1), split).await;
    assert_eq!(places.held(), 0);
    // A single connection does not make the next connection of its peer wait, either.
    let held = all_of(places, client(1), 1);
    shared.chunk_work.forget();
    let answer =
        tokio::time::timeout(Duration::from_secs(30), split(store.cas.on_behalf_of(client(1)), client(1)));
    assert!(answer.await.expect("there is a place").is_ok());
    drop(held);
}

/// Compression jobs are short: a single peer may hold all places, and another peer gets the next turn.
#[actix::test]
async fn peers_take_turns_to_compress() {
    let store = TestStore::new().await;
    let blob = store.put("text ".repeat(1_000)).await;
    let places = store.cas.shared().encoding.clone();
    let mut held: Vec<_> = std::iter::from_fn(|| places.take(client(1), 1).ok()).collect();
    assert_eq!(places.held(), places.bounds().total);
    let mut more: Vec<_> = (0..50).map(|_| places.wait_for(client(1), 1).boxed_local()).collect();
    assert!(more.iter_mut().all(|wait| wait.as_mut().now_or_never().is_none()));
    let cas = store.cas.on_behalf_of(client(2));
    let mut read = cas.read_many_zstd(&store.main, vec![blob]).boxed_local();
    // The read has passed the actor once the next message is answered.
    assert!(read.as_mut().now_or_never().is_none());
    store.inspect().await;
    assert!(read.as_mut().now_or_never().is_none());
    // The first free place may go to the first peer; the next one goes to the other.
    for _ in 0..2 {
        drop(held.pop().or_else(|| more.iter_mut().find_map(|wait| wait.as_mut().now_or_never()?.ok())));
    }
    let items = tokio::time::timeout(Duration::from_secs(30), read).await.expect("its turn came").unwrap();
    assert!(matches!(items[..], [Ok(Item::Zstd(_))]));
}
