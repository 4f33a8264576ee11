//! Tests of the leases of builds: every call that promises an entry to a build protects it (AC-03, AC-04, CAS-03).

use super::{
    super::volume::{Volume as _, memory::Memory},
    volumes::leasing_over,
    *,
};
use crate::caller::Build;
use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A build of a peer.
fn build(peer: u8, name: &str) -> Owner {
    Owner { peer: Peer::V4(Ipv4Addr::new(127, 0, 0, peer)), build: Build::of(name) }
}

impl TestStore {
    /// A handle to the store for the requests of a build.
    fn of(&self, build: Owner) -> Cas {
        self.cas.on_behalf_of(Caller::without_connection(build.peer)).for_build(build)
    }

    async fn put_of(&self, build: Owner, bytes: Bytes) -> Result<Digest> {
        let digest = digest(&bytes);
        self.of(build).write_many(&self.main, vec![(digest, bytes)]).await?.remove(0)?;
        Ok(digest)
    }

    /// Stores more blobs of a build than the whole store can hold.
    async fn churn(&self, build: Owner, seed: u64) {
        for number in 0..40 {
            self.put_of(build, noise(100_000, seed + number)).await.unwrap();
        }
    }
}

/// Stores a result with a file and a directory. Only the Tree names the file in the directory.
async fn stored_result(store: &TestStore) -> (Digest, Vec<Digest>) {
    let (plain, inner) = (store.put(noise(10_000, 1)).await, store.put(noise(10_000, 2)).await);
    let node = reapi::FileNode { name: "f".into(), digest: Some(inner.to_wire()), ..Default::default() };
    let child = reapi::Directory { files: vec![node], ..Default::default() };
    let tree = reapi::Tree { root: Some(reapi::Directory::default()), children: vec![child] };
    let tree = store.put(prost::Message::encode_to_vec(&tree)).await;
    let result = reapi::ActionResult {
        output_files: vec![reapi::OutputFile {
            path: "o".into(),
            digest: Some(plain.to_wire()),
            ..Default::default()
        }],
        output_directories: vec![reapi::OutputDirectory {
            path: "d".into(),
            tree_digest: Some(tree.to_wire()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let action = digest(b"action");
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    (action, vec![plain, inner, tree])
}

/// Failure modes 1 to 3 of the user requests: a hit remains complete for as long as the build runs, with everything
/// below its Trees.
#[actix::test]
async fn everything_that_a_hit_refers_to_stays_whatever_others_upload() {
    let store = TestStore::with_leases(MB).await;
    let (action, closure) = stored_result(&store).await;
    let ours = store.of(build(1, "ours"));
    assert!(ours.get_result(&store.main, action).await.unwrap().is_some());
    for seed in [1_000, 2_000] {
        store.churn(build(2, "theirs"), seed).await;
        assert!(store.cas.get_result(&store.main, action).await.unwrap().is_some(), "the result too");
    }
    for blob in closure {
        assert!(ours.open(&store.main, blob).await.is_ok(), "{blob} was promised");
    }
    let inspection = store.inspect().await;
    assert_eq!(inspection.tally.broken_promises, 0);
    assert!(inspection.tally.evicted > 50 && inspection.tally.withdrawn_leases > 0, "{inspection:?}");
}

/// A lease lasts for the configured time after the last request, whatever happens to the system time meanwhile.
#[actix::test]
async fn a_system_clock_that_jumps_neither_ends_leases_nor_makes_them_longer() {
    const HOUR: i32 = 3_600;
    for jump in [5 * HOUR, -5 * HOUR, 30 * 24 * HOUR, -30 * 24 * HOUR] {
        let store = TestStore::with_leases(MB).await;
        let (ours, theirs) = (build(1, "ours"), build(2, "theirs"));
        let before = store.put_of(ours, noise(5_000, 1)).await.unwrap();
        clock::set_ahead(jump);
        let meanwhile = store.put_of(ours, noise(5_000, 2)).await.unwrap();
        store.churn(theirs, 1_000).await;
        clock::set_ahead(0);
        store.churn(theirs, 2_000).await;
        clock::pass(TIMES.named - 600);
        store.churn(theirs, 3_000).await;
        for blob in [before, meanwhile] {
            assert!(store.has(blob).await, "{jump}");
        }
        clock::pass(600);
        store.churn(theirs, 4_000).await;
        for blob in [before, meanwhile] {
            assert!(!store.has(blob).await, "{jump}");
        }
        assert_eq!(store.inspect().await.tally.broken_promises, 0);
    }
}

/// A blob is promised to a build by an upload, by an upload that finds the blob stored, and by FindMissingBlobs.
#[actix::test]
async fn uploads_and_answers_that_a_blob_is_present_lease_it() {
    let store = TestStore::with_leases(MB).await;
    let ours = build(1, "ours");
    let [present, again] = [noise(5_000, 1), noise(5_000, 2)].map(|bytes| (digest(&bytes), bytes));
    for (_, bytes) in [&present, &again] {
        store.put(bytes.clone()).await;
    }
    assert_eq!(store.inspect().await.totals.leased, 0, "the server itself promises nothing");
    let cas = store.of(ours);
    assert!(cas.find_missing(&store.main, &[present.0]).await.unwrap().is_empty());
    assert!(matches!(cas.begin_upload(&store.main, "u", again.0, 0).await.unwrap(), Upload::Present));
    let batch = store.put_of(ours, noise(5_000, 3)).await.unwrap();
    let streamed = noise(LARGE, 4);
    let Upload::Writer(mut writer) = cas.begin_upload(&store.main, "s", digest(&streamed), 0).await.unwrap()
    else {
        panic!("it is not stored");
    };
    writer.write(streamed.clone()).await.unwrap();
    writer.finish().await.unwrap();
    store.churn(build(2, "theirs"), 1_000).await;
    for blob in [present.0, again.0, batch, digest(&streamed)] {
        assert!(store.get(blob).await.is_ok(), "{blob}");
    }
    assert_eq!(store.inspect().await.tally.broken_promises, 0);
}

/// When leases take nine tenths of the store, a result that needs more is not served. It is kept, and is served when
/// there is room. A build with more than its share makes room for others.
#[actix::test]
async fn a_result_for_which_leases_leave_no_room_is_not_served() {
    let store = TestStore::with_leases(MB).await;
    let (action, _) = stored_result(&store).await;
    let full = build(1, "full");
    for seed in 0..9 {
        store.put_of(full, noise(100_000, 100 + seed)).await.unwrap();
    }
    let cas = store.of(full);
    assert!(cas.get_result(&store.main, action).await.unwrap().is_none());
    let tally = store.inspect().await.tally;
    assert_eq!((tally.refused_results, tally.withdrawn_leases, tally.broken_promises), (1, 0, 0));
    assert!(store.of(build(2, "modest")).get_result(&store.main, action).await.unwrap().is_some());
    let tally = store.inspect().await.tally;
    assert!(tally.withdrawn_leases > 0 && tally.broken_promises == 0, "{tally:?}");
}

/// The configured limit is far above the size of the disk. Leases count against what the disk can hold, so no promise
/// is broken, and the disk never gets low.
#[actix::test]
async fn leases_leave_room_on_a_disk_that_is_smaller_than_the_limit() {
    // The margin of this disk has 8 MB.
    let others = Arc::new(AtomicU64::new(2 * MB));
    let volume = Memory::on_a_disk(64 * MB, others.clone());
    let store = leasing_over(&volume, 100_000 * MB, TIMES).await;
    let limit = store.inspect().await.totals.limit;
    assert!((54 * MB..=56 * MB).contains(&limit), "{limit}");
    let blob = |n: u8, bytes: u64| Bytes::from(vec![n; bytes as usize]);
    let output = store.put(blob(0, 5 * MB)).await;
    let file = reapi::OutputFile { path: "o".into(), digest: Some(output.to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    let action = digest(b"action");
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
    let mut blobs = Vec::new();
    for n in 1..=46 {
        blobs.push(store.put(blob(n, MB)).await);
    }
    let one = store.of(build(1, "one"));
    assert!(one.find_missing(&store.main, &blobs).await.unwrap().is_empty());
    assert!(one.get_result(&store.main, action).await.unwrap().is_none(), "its leases would not fit");
    for n in 100..200 {
        store.put_of(build(1, "one"), blob(n, MB)).await.unwrap();
        let space = volume.space().unwrap();
        assert!(!space.is_low(), "{space}");
    }
    // Others free their space.
    others.store(0, Relaxed);
    let count = AtomicU64::new(0);
    let grown = || async {
        store.put_of(build(2, "two"), noise(1_000, count.fetch_add(1, Relaxed))).await.unwrap();
        (store.inspect().await.totals.limit == 56 * MB).then_some(())
    };
    eventually(grown).await;
    let inspection = store.inspect().await;
    assert_eq!((inspection.tally.refused_results, inspection.tally.broken_promises), (1, 0));
    assert!(!store.cas.is_read_only());
}

/// If no leases can be taken, all are kept, and an upload without room is refused with a time to try again.
#[actix::test]
async fn an_upload_without_room_beside_the_leases_is_refused() {
    let store = TestStore::with_leases(MB).await;
    let mut shared = Vec::new();
    for seed in 0..9 {
        shared.push(store.put_of(build(1, "one"), noise(100_000, seed)).await.unwrap());
    }
    assert!(store.of(build(2, "two")).find_missing(&store.main, &shared).await.unwrap().is_empty());
    let refused = store.put_of(build(3, "three"), noise(200_000, 50)).await.unwrap_err();
    let Error::Exhausted { message, retry_after: Some(_) } = &refused else { panic!("{refused}") };
    assert!(message.contains("921600 are leased to builds"), "{message}");
    assert!(store.cas.find_missing(&store.main, &shared).await.unwrap().is_empty());
}

/// A damaged leased blob is counted as a broken promise.
#[actix::test]
async fn a_leased_blob_that_is_lost_is_a_broken_promise() {
    let store = TestStore::with_leases(MB).await;
    let [leased, other] = [store.put_of(build(1, "a"), noise(5_000, 1)).await.unwrap(), store.put("x").await];
    store.lose(other).await;
    assert_eq!(store.inspect().await.tally.broken_promises, 0);
    store.lose(leased).await;
    let inspection = store.inspect().await;
    assert_eq!((inspection.tally.broken_promises, inspection.totals.leased), (1, 0));
}

/// CAS-03: entries that a build has touched before a restart are still protected after it.
#[actix::test]
async fn what_a_build_was_promised_before_a_restart_stays_after_it() {
    let store = TestStore::with_leases(MB).await;
    let mut promised = Vec::new();
    for seed in 0..6 {
        promised.push(store.put_of(build(1, "ours"), noise(50_000, seed)).await.unwrap());
    }
    store.cas.actor().send(CloseStore).await.unwrap();
    let TestStore { root, cas, .. } = store;
    drop(cas);
    let store = TestStore::with_leases_at(root, MB).await;
    store.churn(build(2, "theirs"), 1_000).await;
    for blob in promised {
        assert!(store.get(blob).await.is_ok(), "{blob}");
    }
    assert_eq!(store.inspect().await.tally.broken_promises, 0);
}

/// The inputs and outputs of an Execute belong to its build.
#[actix::test]
async fn inputs_and_outputs_of_an_action_are_leased_to_its_build() {
    let store = TestStore::with_leases(MB).await;
    let input = store.put(noise(5_000, 1)).await;
    let node = reapi::FileNode { name: "f".into(), digest: Some(input.to_wire()), ..Default::default() };
    let root = reapi::Directory { files: vec![node], ..Default::default() };
    let root = store.put(prost::Message::encode_to_vec(&root)).await;
    let ours = build(1, "ours");
    // The root was checked for another build just before.
    store.of(build(2, "theirs")).check_inputs_apart(store.main.clone(), root).await.unwrap();
    store.of(ours).check_inputs_apart(store.main.clone(), root).await.unwrap();
    let output = store
        .worker(move |cas, main| {
            let mut batch = cas.for_build(ours).begin_outputs(&main, SHA256, 0);
            let output = batch.bytes(noise(5_000, 2).to_vec());
            batch.commit().unwrap();
            output
        })
        .await
        .unwrap();
    store.churn(build(3, "others"), 1_000).await;
    for blob in [input, root, output] {
        assert!(store.get(blob).await.is_ok(), "{blob}");
    }
}
