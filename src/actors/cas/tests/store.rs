//! Tests of blobs: presence, damage, restart and eviction.

use super::{
    super::{lookup::Purpose, relief::Relieve, settings::LOOKUPS_PER_TURN},
    *,
};
use crate::disk::Space;
use std::{cell::Cell, collections::BTreeMap, rc::Rc, time::SystemTime};

/// CAS-01, CAS-02, CAS-03, GEN-04, GEN-07.
#[actix::test]
async fn present_blobs_can_be_read_and_missing_ones_are_reported_once() {
    let store = TestStore::new().await;
    let (small, large) = (store.put("small").await, store.put(noise(LARGE, 1)).await);
    let absent = digest(b"absent");
    let resized = Digest::parse(SHA256, &small.hash_hex(), 6).unwrap();
    let not_empty = Digest::parse(SHA256, &"0".repeat(64), 0).unwrap();
    let asked = vec![absent, small, absent, large, resized, not_empty];
    let missing = store.cas.find_missing(&store.main, &asked).await.unwrap();
    assert_eq!(missing, [absent, resized, not_empty]);
    assert_eq!(store.get(small).await.unwrap(), "small");
    assert_eq!(store.get(large).await.unwrap(), noise(LARGE, 1));
    let read = store.cas.read_many(&store.main, asked).await.unwrap();
    let found: Vec<bool> = read.iter().map(Result::is_ok).collect();
    assert_eq!(found, [false, true, false, true, false, false]);
}

/// Look-ups never wait, so a thread that makes many of them serves no other task unless they yield.
#[actix::test]
async fn look_ups_let_other_tasks_run_in_whatever_parts_they_are_made() {
    let store = TestStore::new().await;
    let turns = Rc::new(Cell::new(0));
    let others = turns.clone();
    let other = actix::spawn(async move {
        loop {
            others.set(others.get() + 1);
            tokio::task::yield_now().await;
        }
    });
    let asked = vec![digest(b"absent"); 8 * LOOKUPS_PER_TURN];
    for size in [asked.len(), LOOKUPS_PER_TURN, 10] {
        let before = turns.get();
        for part in asked.chunks(size) {
            store.cas.find_missing(&store.main, part).await.unwrap();
        }
        assert!(turns.get() >= before + 6, "{size}");
        let before = turns.get();
        for part in asked.chunks(size) {
            store.cas.locate(&store.main, part, Purpose::Read).await.unwrap();
        }
        assert!(turns.get() >= before + 6, "{size}");
    }
    other.abort();
}

/// GEN-06.
#[actix::test]
async fn the_empty_blob_is_always_present_without_a_file() {
    let store = TestStore::new().await;
    let empty = digest(b"");
    for instance in [&store.main, &store.other] {
        assert!(store.cas.find_missing(instance, &[empty]).await.unwrap().is_empty());
        assert_eq!(store.cas.open(instance, empty).await.unwrap().size(), 0);
        assert_eq!(store.cas.read_many(instance, vec![empty]).await.unwrap(), [Ok(Bytes::new())]);
        assert!(store.cas.directories(instance, &[empty]).await.unwrap()[0].is_some());
        let begun = store.cas.begin_upload(instance, "uploads/x", empty, 0).await.unwrap();
        assert!(matches!(begun, Upload::Present));
    }
    assert_eq!(store.cas.write_many(&store.main, vec![(empty, Bytes::new())]).await.unwrap(), [Ok(())]);
    assert!(store.files().is_empty());
}

/// GEN-15.
#[actix::test]
async fn blobs_of_one_instance_are_not_seen_from_another() {
    let store = TestStore::new().await;
    let blob = store.put("x").await;
    assert_eq!(store.cas.find_missing(&store.other, &[blob]).await.unwrap(), [blob]);
    assert!(matches!(store.cas.open(&store.other, blob).await, Err(Error::NotFound(_))));
}

/// CAS-10, CAS-11, CAS-12.
#[actix::test]
async fn items_of_a_batch_succeed_and_fail_independently() {
    let store = TestStore::new().await;
    let (good, short) = (digest(b"good"), digest(b"short"));
    let batch = vec![
        (good, Bytes::from("good")),
        (good, Bytes::from("good")),
        (good, Bytes::from("evil")),
        (short, Bytes::from("shor")),
    ];
    for _ in 0..2 {
        let outcomes = store.cas.write_many(&store.main, batch.clone()).await.unwrap();
        assert!(outcomes[0].is_ok() && outcomes[1].is_ok());
        assert!(
            matches!(outcomes[2], Err(Error::Invalid(_))) && matches!(outcomes[3], Err(Error::Invalid(_)))
        );
    }
    assert_eq!(store.get(good).await.unwrap(), "good");
    assert!(!store.has(short).await);
    assert_eq!(store.inspect().await.totals.reserved, 0);
}

/// A flipped bit, a short file or an empty file is a miss, never wrong bytes, and the blob can be stored again
/// (CAS-22).
#[actix::test]
async fn a_damaged_file_is_a_miss_and_is_dropped() {
    let mut store = TestStore::of_files().await;
    for (length, restarted) in [(1_000, false), (1_000, true), (LARGE, true)] {
        for damage in [
            |bytes: &mut Vec<u8>| bytes[999] ^= 1,
            |bytes: &mut Vec<u8>| bytes.truncate(500),
            |bytes: &mut Vec<u8>| bytes.clear(),
        ] {
            let blob = store.put(noise(length, 7)).await;
            if restarted {
                store = store.restart().await;
            }
            overwrite(&store.file_of(blob), damage);
            // The file of a cached blob is not read.
            store.cas.shared().recent.clear();
            assert!(matches!(store.get(blob).await, Err(Error::NotFound(_))));
            assert!(!store.has(blob).await);
            eventually(|| async { store.files_of(blob).is_empty().then_some(()) }).await;
        }
    }
    let blob = store.put(noise(LARGE, 7)).await;
    assert_eq!(store.get(blob).await.unwrap(), noise(LARGE, 7));
}

/// A large file that this process has written is hashed at a read only if it has changed.
#[actix::test]
async fn a_large_file_that_changed_since_it_was_written_is_hashed_again() {
    let store = TestStore::new().await;
    let (same, other) = (store.put(noise(LARGE, 1)).await, store.put(noise(LARGE, 2)).await);
    overwrite(&store.file_of(same), |_| {});
    overwrite(&store.file_of(other), |bytes| bytes[LARGE - 1] ^= 1);
    assert_eq!(store.get(same).await.unwrap(), noise(LARGE, 1));
    assert!(matches!(store.get(other).await, Err(Error::NotFound(_))));
}

/// The process exits right after the answer, and these times determine the order of eviction after the next start.
#[actix::test]
async fn closing_the_store_writes_the_uses() {
    let mut store = TestStore::of_files().await;
    let mut blobs = Vec::new();
    for n in 0..500 {
        let blob = store.put(format!("{n}")).await;
        let long_ago = std::fs::FileTimes::new().set_accessed(UNIX_EPOCH);
        std::fs::File::open(store.file_of(blob)).unwrap().set_times(long_ago).unwrap();
        blobs.push(blob);
    }
    store = store.restart().await;
    assert!(store.cas.find_missing(&store.main, &blobs).await.unwrap().is_empty());
    store.cas.actor().send(CloseStore).await.unwrap();
    let accessed = |path: &PathBuf| path.metadata().unwrap().accessed().unwrap();
    let is_blob = |path: &PathBuf| path.metadata().unwrap().len() > 0;
    let files: Vec<_> = store.files().into_iter().filter(is_blob).collect();
    assert!(files.len() >= 500);
    let stale = files.iter().filter(|path| accessed(path) == UNIX_EPOCH).count();
    assert_eq!(stale, 0);
}

/// This test simulates a full disk, because not every test machine can mount a small one.
#[actix::test]
async fn a_full_disk_is_relieved_of_the_least_recently_used_entries() {
    let store = TestStore::new().await;
    let mut blobs = Vec::new();
    for n in 0..20 {
        blobs.push(store.put(noise(4_096, n)).await);
    }
    // A fifth of a percent of the disk has to be free, which is less than half of the store.
    let full = Space { free_bytes: 0, total_bytes: 16 << 20, free_inodes: 0, total_inodes: 0 };
    store.cas.actor().send(Relieve(full)).await.unwrap();
    assert_eq!(store.cas.find_missing(&store.main, &blobs).await.unwrap(), blobs[..8]);
    assert_eq!(store.inspect().await.totals.deleting, 0, "the files are gone");
}

/// Another relief of the disk is running while the server is about to stop.
#[actix::test]
async fn an_action_that_is_cancelled_does_not_wait_for_room_on_the_disk() {
    let store = TestStore::new().await;
    let _turn = store.cas.shared().relief_turn.lock().await;
    let asked = Instant::now();
    store.worker(|cas, _| cas.relieve_disk(&|| true)).await;
    assert!(asked.elapsed() < settings::RELIEF_WAIT);
}

/// A reader outlives the blob, and notices when its file is truncated.
#[actix::test]
async fn a_reader_gets_all_bytes_or_an_error() {
    let store = TestStore::new().await;
    let (lost, cut) = (store.put(noise(LARGE, 1)).await, store.put(noise(LARGE, 2)).await);
    let (of_lost, of_cut) =
        (store.cas.open(&store.main, lost).await.unwrap(), store.cas.open(&store.main, cut).await.unwrap());
    store.lose(lost).await;
    assert_eq!(read_all(&of_lost).await.unwrap(), noise(LARGE, 1));
    assert_eq!(of_lost.read_at(LARGE as u64 - 5, 100).await.unwrap().len(), 5);
    let path = store.file_of(cut);
    let mut permissions = std::fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&path, permissions).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1_000).unwrap();
    assert!(matches!(read_all(&of_cut).await, Err(Error::Unavailable(_))));
    assert!(!store.has(cut).await);
}

/// After kill -9 at any moment, complete files are recovered, incomplete ones are removed, and nothing else is touched.
#[actix::test]
async fn a_restart_recovers_complete_files_and_removes_the_others() {
    let store = TestStore::of_files().await;
    let (small, large) = (store.put("small").await, store.put(noise(LARGE, 1)).await);
    let cut = store.put(noise(5_000, 2)).await;
    overwrite(&store.file_of(cut), |bytes| bytes.truncate(4_999));
    let file = store.file_of(small);
    // This second file of the same blob is left by a crash between a rename and the deletion of a superfluous file.
    std::fs::copy(&file, file.with_file_name(format!("{}-5-ffff", small.hash_hex()))).unwrap();
    std::fs::write(file.with_file_name("README"), "not ours").unwrap();
    std::fs::write(file.with_file_name(format!("{}-5-", small.hash_hex())), "not ours").unwrap();
    std::fs::write(store.root.path().join("store/v1/tmp/17"), "unfinished").unwrap();
    let unserved = store.root.path().join("store/v1/blobs/=gone/sha256/00");
    std::fs::create_dir_all(&unserved).unwrap();
    std::fs::write(unserved.join("x"), "x").unwrap();
    let store = store.restart().await;
    assert_eq!(store.inspect().await.totals.blobs, 2);
    assert_eq!(store.get(small).await.unwrap(), "small");
    assert_eq!(store.get(large).await.unwrap(), noise(LARGE, 1));
    assert!(!store.has(cut).await);
    // Two blobs and the two foreign files are left.
    eventually(|| async { (store.files().len() == 4).then_some(()) }).await;
    // Generations continue after the largest one found.
    store.put("new").await;
    assert!(store.file_of(digest(b"new")).to_string_lossy().ends_with("-10000"));
}

/// The limit holds on disk after every step, and the least recently used blobs are evicted first.
#[actix::test]
async fn the_least_recently_used_blobs_make_room() {
    let limit = 40 * 4096;
    let store = TestStore::with_limit(limit).await;
    let keep = store.put(noise(4_096, 0)).await;
    for seed in 1..200 {
        store.put(noise(1 + (seed as usize * 997) % 20_000, seed)).await;
        assert!(store.has(keep).await, "it is used before each write; write {seed}");
        let on_disk: u64 =
            store.files().iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum();
        assert!(on_disk <= limit, "{on_disk} after {seed}");
    }
    assert!(!store.has(digest(&noise(998, 1))).await);
}

/// A blob that is being read is not evicted. Until the reader is gone, a write without room fails and the error names
/// the held bytes. A blob above the limit is refused for good.
#[actix::test]
async fn held_blobs_stay_and_a_full_store_reports_them() {
    let store = TestStore::with_limit(2 * MB).await;
    let held = store.put(noise(1_500_000, 1)).await;
    let reader = store.cas.open(&store.main, held).await.unwrap();
    let bytes = noise(1_000_000, 2);
    let batch = vec![(digest(&bytes), bytes.clone())];
    let error = store.cas.write_many(&store.main, batch.clone()).await.unwrap().remove(0).unwrap_err();
    assert!(
        matches!(&error, Error::Exhausted { message, retry_after: Some(_) } if message.contains("1503232")),
        "{error}"
    );
    let error = store.cas.begin_upload(&store.main, "u", batch[0].0, 0).await.unwrap_err();
    assert!(matches!(error, Error::Exhausted { .. }));
    assert_eq!(store.get(held).await.unwrap(), noise(1_500_000, 1));
    drop(reader);
    store.put(bytes).await;
    assert!(!store.has(held).await);
    let huge = digest(&noise(3 * MB as usize, 3));
    let error = store.cas.begin_upload(&store.main, "u", huge, 0).await.unwrap_err();
    assert!(matches!(error, Error::Exhausted { retry_after: None, .. }), "waiting does not help");
}

/// The order of use survives in access times, and a lower limit is enforced at start.
#[actix::test]
async fn a_restart_under_a_lower_limit_keeps_what_was_used_last() {
    let store = TestStore::of_files().await;
    let mut blobs = vec![];
    for seed in 0..10u64 {
        let blob = store.put(noise(4_096, seed)).await;
        let used = SystemTime::now() - Duration::from_secs(10_000 - 100 * ((seed + 5) % 10));
        let file = std::fs::File::open(store.file_of(blob)).unwrap();
        file.set_times(std::fs::FileTimes::new().set_accessed(used)).unwrap();
        blobs.push(blob);
    }
    let store = store.restart_with_limit(3 * 4_096).await;
    let missing = store.cas.find_missing(&store.main, &blobs).await.unwrap();
    assert_eq!(missing, [0, 1, 5, 6, 7, 8, 9].map(|n| blobs[n]));
}

#[actix::test]
async fn a_store_that_cannot_be_written_is_refused_at_start() {
    let root = TempDir::new().unwrap();
    std::fs::write(root.path().join("file"), "").unwrap();
    let settings = StoreSettings {
        root: root.path().join("file/store"),
        max_bytes: MB,
        max_blob_bytes: MB,
        partial_upload_retention: Duration::ZERO,
        leases: LeaseTimes::default(),
        result_links_bytes: 1 << 20,
        packing: None,
        zstd_level: 1,
        sync: Default::default(),
        scrub_bytes_per_second: 0,
        timeouts: TimeoutPolicy { default: Duration::ZERO, max: Duration::ZERO },
    };
    let error = CasActor::open(settings, &Instances::new([""]).unwrap(), Handle::current()).unwrap_err();
    assert!(matches!(&error, Error::Precondition(message) if message.contains("file/store")), "{error}");
}

/// The answer comes when the files are deleted.
#[actix::test]
async fn a_full_disk_is_relieved_of_a_part_of_the_store() {
    let store = TestStore::new().await;
    for seed in 0..20 {
        store.put(noise(LARGE, seed)).await;
    }
    let space = Space { free_bytes: 0, total_bytes: 16 * MB, free_inodes: 1_000_000, total_inodes: 0 };
    store.cas.actor().send(Relieve(space)).await.unwrap();
    let totals = store.inspect().await.totals;
    assert!((1..20).contains(&totals.blobs) && totals.deleting == 0, "{totals:?}");
    assert_eq!(store.files().len() as u64, totals.blobs);
    assert!(!store.has(digest(&noise(LARGE, 0))).await && store.has(digest(&noise(LARGE, 19))).await);
}

/// Files that an earlier version has stored stay in place, and new entries go to segments.
#[actix::test]
async fn an_older_store_is_upgraded_in_place_and_a_newer_one_is_refused() {
    let store = TestStore::of_files().await;
    let (old, action) = (store.put("old").await, digest(b"action"));
    store
        .cas
        .put_result(&store.main, action, reapi::ActionResult::default(), Provenance::default())
        .await
        .unwrap();
    let (file, of_result) = (store.file_of(old), store.file_of(action));
    let format = store.root.path().join("store/format");
    std::fs::write(&format, "gorego store 1\n").unwrap();
    let store = store.restart_with_limit(1_000 * MB).await;
    assert_eq!(std::fs::read_to_string(&format).unwrap(), "gorego store 3\n");
    assert_eq!(store.get(old).await.unwrap(), "old");
    assert_eq!(store.file_of(old), file);
    // A newer result replaces the old one, even after a restart.
    let metadata = reapi::ExecutedActionMetadata { worker: "newer".into(), ..Default::default() };
    let newer = reapi::ActionResult { execution_metadata: Some(metadata), ..Default::default() };
    store.cas.put_result(&store.main, action, newer, Provenance::default()).await.unwrap();
    let new = store.put("new").await;
    eventually(|| async { (!of_result.exists()).then_some(()) }).await;
    let store = store.restart().await;
    assert_eq!(store.get(new).await.unwrap(), "new");
    let result = store.cas.get_result(&store.main, action).await.unwrap().unwrap();
    assert_eq!(result.execution_metadata.as_ref().unwrap().worker, "newer");
    assert_eq!(store.files(), [file], "new blobs and results have no files of their own");
    let TestStore { root, cas, .. } = store;
    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);
    std::fs::write(&format, "gorego store 4\n").unwrap();
    let settings = settings_at(root.path().join("store"), MB);
    let instances = Instances::new([""]).unwrap();
    let (refusal, before) = eventually(|| async {
        let before = everything_in(root.path());
        let refusal = CasActor::open(settings.clone(), &instances, Handle::current()).unwrap_err();
        (!refusal.to_string().contains("another gorego server")).then_some((refusal, before))
    })
    .await;
    assert!(refusal.to_string().contains("gorego store 4"), "{refusal}");
    assert_eq!(before[&format].1.as_deref(), Some(&b"gorego store 4\n"[..]));
    assert_eq!(everything_in(root.path()), before);
}

/// The time of change and the content of every file in this directory. A directory has no content, and an entry of its
/// own.
fn everything_in(directory: &Path) -> BTreeMap<PathBuf, (SystemTime, Option<Vec<u8>>)> {
    let changed = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let mut all = BTreeMap::from([(directory.to_owned(), (changed(directory), None))]);
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.append(&mut everything_in(&path));
        } else {
            let content = std::fs::read(&path).unwrap();
            all.insert(path.clone(), (changed(&path), Some(content)));
        }
    }
    all
}

/// The whole store, with segments, stays within its limit on disk while most of what it stores is evicted again.
#[actix::test]
async fn dead_records_never_take_the_store_beyond_its_limit() {
    let limit = 256 * MB;
    let store = TestStore::with_limit(limit).await;
    let on_disk = || {
        fn bytes(directory: &Path) -> u64 {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            let size = |entry: std::fs::DirEntry| match entry.path() {
                path if path.is_dir() => bytes(&path),
                path => path
                    .metadata()
                    .map_or(0, |metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512),
            };
            entries.map(size).sum()
        }
        bytes(&store.root.path().join("store"))
    };
    // Some blobs are used repeatedly, among others that are not used any more, so that few segments die as a whole.
    let mut hot = Vec::new();
    for round in 0..55u64 {
        let content = |n: u64| {
            let mut bytes = vec![0; 60_000];
            bytes[..8].copy_from_slice(&(round * 100 + n).to_le_bytes());
            Bytes::from(bytes)
        };
        let blobs: Vec<(Digest, Bytes)> =
            (0..100).map(content).map(|bytes| (digest(&bytes), bytes)).collect();
        if hot.len() < 400 {
            hot.extend(blobs.iter().step_by(10).map(|(digest, _)| *digest));
        }
        let outcomes = store.cas.write_many(&store.main, blobs).await.unwrap();
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert!(store.cas.find_missing(&store.main, &hot).await.unwrap().is_empty(), "{round}");
        assert!(on_disk() <= limit, "{round}");
    }
    let totals = store.inspect().await.totals;
    assert!(totals.used + totals.overhead <= limit && totals.used > limit / 2, "{totals:?}");
    for digest in &hot {
        store.get(*digest).await.unwrap();
    }
    assert_eq!(store.restart().await.inspect().await.totals.reserved, 0);
}
