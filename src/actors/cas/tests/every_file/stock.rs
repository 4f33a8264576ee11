//! What a store has, and has to return: blobs of every form, results that refer to them, results of single principals,
//! a blob of another instance, and a result that was purged.

use super::{super::*, fault::Fault};
use crate::actors::cas::{
    forms::packing::pack_now,
    results::ResultCondition,
    settings::{PackingSettings, SMALL_BLOB_BYTES},
};
use gorego_reapi::compression::decode_all;
use std::{cell::Cell, collections::HashSet};

/// Blobs of this size have files of their own, of three blocks.
const SIZE: usize = 150_000;
/// What a compressible blob takes compressed, which is too much for a segment.
const COMPRESSED: usize = 80_000;
/// The number of ways to read a blob.
pub(super) const WAYS: usize = 6;
/// The principals that have a private result of one action.
const PRINCIPALS: [&str; 2] = ["token:a", "token:b"];

/// How many entries a fault may cost.
#[derive(Debug)]
pub(super) struct Tolerance {
    /// Before anything is uploaded again. A result that goes with its blob does not count.
    pub(super) lost: usize,
    /// At the next start, of what was uploaded again.
    pub(super) lost_at_restart: usize,
    /// At the next start, of what was stored after the fault.
    pub(super) new_lost_at_restart: usize,
    /// A start may find a result again that was purged.
    pub(super) purged_may_return: bool,
}

impl Tolerance {
    pub(super) fn of(kind: &str, fault: Fault, is_running: bool, is_appended: bool) -> Self {
        let lost = match (kind, fault) {
            (_, Fault::Open | Fault::Unreadable) => 0,
            ("segment", Fault::Extend) => 0,
            ("segment", Fault::Flip(_)) if !is_appended => 1,
            // A sector may be at the border of two records.
            ("segment", Fault::Zeros) if !is_appended => 2,
            ("segment", _) => usize::MAX,
            ("v1/blobs" | "v1/packed" | "v1/results" | "v1/private", Fault::Swap) => 2,
            ("v1/blobs" | "v1/packed" | "v1/results" | "v1/private", _) => 1,
            // Everything else only saves work.
            _ => 0,
        };
        let most = |is_gone: bool| if is_gone { usize::MAX } else { 0 };
        // A segment that has no table yet is found by its head.
        let is_headless = kind == "segment" && is_appended && fault == Fault::Flip(0);
        // One that is open can be read until the restart.
        let is_unseen = kind == "segment" && is_running && [Fault::Delete, Fault::Swap].contains(&fault);
        Self {
            lost,
            lost_at_restart: most(is_headless || is_unseen),
            new_lost_at_restart: most(is_headless),
            purged_may_return: kind == "journal"
                && ![Fault::Open, Fault::Unreadable, Fault::Extend].contains(&fault),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Stock {
    blobs: Vec<Bytes>,
    /// Each refers to one of the blobs.
    results: Vec<(Digest, reapi::ActionResult)>,
    /// Only the other instance has it.
    of_other: Bytes,
    /// The action that each of [`PRINCIPALS`] has a result of.
    private: Digest,
    purged: Digest,
    /// Counts the calls of [`Stock::read`] on all clones. Each begins with another way to read.
    reads: Rc<Cell<usize>>,
}

impl Stock {
    pub(super) async fn fill(store: &TestStore, seed: u64) -> Self {
        // It is kept compressed from now on.
        let packed = noise(COMPRESSED, seed + 102).repeat(3).into();
        store.put(Bytes::clone(&packed)).await;
        let at_once = PackingSettings {
            after_secs: 0,
            min_bytes: SMALL_BLOB_BYTES,
            min_saving_percent: 20,
            cpu_percent: 100,
        };
        let tally = store.worker(move |cas, _| pack_now(&cas, at_once, || Ok(()))).await.unwrap();
        assert!(tally.blobs > 0);
        let with_form = noise(COMPRESSED, seed + 103).repeat(3).into();
        let mut blobs: Vec<Bytes> = (0..5).map(|number| noise(20_000, seed + number)).collect();
        blobs.extend([noise(SIZE, seed + 100), noise(SIZE + 77, seed + 101), packed, with_form]);
        let mut results = vec![];
        for (number, bytes) in blobs.iter().enumerate() {
            let blob = store.put(bytes.clone()).await;
            let file =
                reapi::OutputFile { path: "o".into(), digest: Some(blob.to_wire()), ..Default::default() };
            let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
            results.push((digest(format!("{seed} {number}").as_bytes()), result));
        }
        let stock = Self {
            blobs,
            results,
            of_other: noise(SIZE, seed + 104),
            private: digest(format!("{seed} private").as_bytes()),
            purged: digest(format!("{seed} purged").as_bytes()),
            reads: Rc::default(),
        };
        // Older results, which are replaced and removed.
        let older = reapi::ActionResult { exit_code: 0, stdout_raw: "older".into(), ..Default::default() };
        for action in [stock.results[0].0, stock.results[1].0, stock.purged] {
            store.cas.put_result(&store.main, action, older.clone(), Provenance::default()).await.unwrap();
        }
        stock.put_results(store).await;
        stock.put_apart(store).await;
        let purge = ResultCondition { action: Some(stock.purged), ..Default::default() };
        let page = store.cas.purge_results(&store.main, &purge, 0, 1_000, true).await.unwrap();
        assert_eq!(page.results.len(), 1);
        for _ in 0..3 {
            read_zstd(store, &stock.blobs[stock.blobs.len() - 1]).await.unwrap();
        }
        let with_form = digest(&stock.blobs[stock.blobs.len() - 1]);
        let is_form = |path: &PathBuf| path.to_string_lossy().contains("/zstd/");
        eventually(|| async { store.files_of(with_form).iter().any(is_form).then_some(()) }).await;
        eventually(|| async { (store.inspect().await.totals.deleting == 0).then_some(()) }).await;
        stock
    }

    async fn put_results(&self, store: &TestStore) {
        for (action, result) in &self.results {
            store.cas.put_result(&store.main, *action, result.clone(), Provenance::default()).await.unwrap();
        }
    }

    /// Stores what only one instance or one principal sees.
    async fn put_apart(&self, store: &TestStore) {
        let of_other = vec![(digest(&self.of_other), self.of_other.clone())];
        store.cas.write_many(&store.other, of_other).await.unwrap().remove(0).unwrap();
        for principal in PRINCIPALS {
            let link =
                reapi::OutputSymlink { path: "l".into(), target: principal.into(), ..Default::default() };
            let result = reapi::ActionResult { output_symlinks: vec![link], ..Default::default() };
            let by = Provenance { principal: principal.into(), ..Default::default() };
            store.cas.put_result(&private_instance(), self.private, result, by).await.unwrap();
        }
    }

    /// No principal sees the results of others. Returns the number of entries that are lost.
    async fn read_apart(&self, store: &TestStore) -> usize {
        let mut lost = 0;
        for principal in ["token:c", "token:a", "token:b"] {
            let found = store.cas.get_result_for(&private_instance(), self.private, principal).await.unwrap();
            match found {
                Some(found) => assert_eq!(found.output_symlinks[0].target, principal),
                None => lost += usize::from(PRINCIPALS.contains(&principal)),
            }
        }
        let of_other = digest(&self.of_other);
        assert!(store.get(of_other).await.is_err(), "it belongs to another instance");
        let read = async { read_all(&store.cas.open(&store.other, of_other).await?).await };
        match read.await {
            Ok(read) => assert_eq!(read, self.of_other),
            Err(Error::NotFound(_) | Error::Unavailable(_)) => lost += 1,
            Err(error) => panic!("not a miss: {error}"),
        }
        lost
    }

    /// Right after a start, everything that a hit refers to can be read (AC-03).
    pub(super) async fn check_hits(&self, store: &TestStore) {
        for ((action, result), bytes) in self.results.iter().zip(&self.blobs) {
            if let Some(found) = store.cas.get_result(&store.main, *action).await.unwrap() {
                assert_eq!(found.output_files, result.output_files);
                assert_eq!(store.get(digest(bytes)).await.unwrap(), bytes, "a hit without its blob");
            }
        }
    }

    /// Asks for everything without reading it.
    pub(super) async fn look_up(&self, store: &TestStore) {
        let blobs: Vec<Digest> = self.blobs.iter().map(|bytes| digest(bytes)).collect();
        store.cas.find_missing(&store.main, &blobs).await.unwrap();
    }

    /// Reads everything in every way. Only misses are forgiven, and each of them shows in FindMissingBlobs. Returns the
    /// number of entries that are lost; a result does not count if its blob is lost.
    pub(super) async fn read(&self, store: &TestStore) -> usize {
        let shared = store.cas.shared();
        shared.recent.clear();
        shared.packed.clear();
        shared.results.clear();
        let first = self.reads.replace(self.reads.get() + 1);
        let mut lost = HashSet::new();
        for bytes in &self.blobs {
            let blob = digest(bytes);
            let mut reads = vec![];
            for way in first..first + WAYS {
                reads.push(read_by(way, store, bytes).await);
            }
            let is_there = store.has(blob).await;
            for read in reads {
                match read {
                    Ok(read) => assert!(read == bytes, "wrong bytes were served"),
                    Err(Error::NotFound(_) | Error::MissingBlobs(_) | Error::Unavailable(_)) => {}
                    Err(error) => panic!("not a miss: {error}"),
                }
            }
            let read = store.get(blob).await;
            assert!(read.is_ok() == is_there, "{is_there} {:?}", read.map(|_| ()));
            if !is_there {
                lost.insert(blob);
            }
        }
        let mut results_lost = 0;
        for ((action, result), bytes) in self.results.iter().zip(&self.blobs) {
            match store.cas.get_result(&store.main, *action).await.unwrap() {
                Some(found) => {
                    assert_eq!(found.output_files, result.output_files, "not the newest result");
                    assert!(!lost.contains(&digest(bytes)), "a hit without its blob");
                }
                None => results_lost += usize::from(!lost.contains(&digest(bytes))),
            }
        }
        lost.len() + results_lost + self.read_apart(store).await
    }

    /// While a directory cannot be entered, what is in it cannot be read, and is not missing.
    pub(super) async fn read_while_closed(&self, store: &TestStore) {
        store.cas.shared().recent.clear();
        store.cas.shared().results.clear();
        for ((action, result), bytes) in self.results.iter().zip(&self.blobs) {
            match store.get(digest(bytes)).await {
                Ok(read) => assert_eq!(read, bytes),
                Err(error) => assert!(matches!(error, Error::Unavailable(_)), "{error}"),
            }
            assert!(store.has(digest(bytes)).await);
            match store.cas.get_result(&store.main, *action).await {
                Ok(found) => assert_eq!(found.unwrap().output_files, result.output_files),
                Err(error) => assert!(matches!(error, Error::Unavailable(_)), "{error}"),
            }
        }
    }

    /// What was purged stays away.
    pub(super) async fn check_purged(&self, store: &TestStore) {
        assert_eq!(store.cas.get_result(&store.main, self.purged).await.unwrap(), None, "it was purged");
    }

    /// What a client does that finds something missing.
    pub(super) async fn heal(&self, store: &TestStore) {
        for bytes in &self.blobs {
            store.put(bytes.clone()).await;
            assert_eq!(store.get(digest(bytes)).await.unwrap(), bytes);
        }
        self.put_results(store).await;
        self.put_apart(store).await;
        for (action, _) in &self.results {
            assert!(store.cas.get_result(&store.main, *action).await.unwrap().is_some());
        }
    }
}

/// The instance in which each principal has results of its own.
fn private_instance() -> Instance {
    instances().get("private").unwrap()
}

/// Reads a blob in one of the [`WAYS`].
pub(super) async fn read_by(way: usize, store: &TestStore, bytes: &Bytes) -> Result<Bytes> {
    let blob = digest(bytes);
    match way % WAYS {
        0 => damage::materialise(store, blob).await,
        1 => read_by_stream(store, bytes).await,
        2 => store.cas.read_many(&store.main, vec![blob]).await.unwrap().remove(0),
        3 => read_zstd(store, bytes).await,
        4 => read_many_zstd(store, bytes).await,
        _ => store.get(blob).await,
    }
}

/// Reads a blob in pieces, and each piece twice.
async fn read_by_stream(store: &TestStore, bytes: &Bytes) -> Result<Bytes> {
    let reader = store.cas.open(&store.main, digest(bytes)).await?;
    let mut at = 0;
    while at < bytes.len() {
        for _ in 0..2 {
            let piece = reader.read_at(at as u64, 70_000).await?;
            assert!(!piece.is_empty() && piece == bytes[at..at + piece.len()], "wrong bytes were served");
        }
        at += 50_000;
    }
    Ok(bytes.clone())
}

async fn read_zstd(store: &TestStore, bytes: &Bytes) -> Result<Bytes> {
    let mut reader = store.cas.open_zstd(&store.main, digest(bytes), 0).await?;
    let mut stream = vec![];
    while let Some(piece) = reader.next(100_000).await? {
        stream.extend_from_slice(&piece);
    }
    Ok(decode_all(&stream, bytes.len() as u64).unwrap().into())
}

async fn read_many_zstd(store: &TestStore, bytes: &Bytes) -> Result<Bytes> {
    let read = store.cas.read_many_zstd(&store.main, vec![digest(bytes)]).await.unwrap().remove(0)?;
    Ok(match read {
        Item::Plain(bytes) => bytes,
        Item::Zstd(stream) => decode_all(&stream, bytes.len() as u64).unwrap().into(),
    })
}
