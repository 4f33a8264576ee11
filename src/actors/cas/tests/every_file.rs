//! Every kind of damage to every kind of file of a store, while it runs and while it is stopped: nothing wrong is ever served, and
//! uploads heal it.

use super::*;
use gorego_reapi::compression::decode_all;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
};

/// What happens to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A bit differs, so many eighths into the file.
    Flip(u64),
    /// Only so many eighths are left.
    Truncate(u64),
    /// A sector is zero, as after a power cut.
    Zeros,
    /// Bytes follow its end.
    Extend,
    Delete,
    /// It trades places with another file of its directory.
    Swap,
    /// Nobody may read it, but root.
    Unreadable,
}

const FAULTS: [Fault; 11] = [
    Fault::Flip(0),
    Fault::Flip(3),
    Fault::Flip(5),
    Fault::Flip(8),
    Fault::Truncate(0),
    Fault::Truncate(4),
    Fault::Zeros,
    Fault::Extend,
    Fault::Delete,
    Fault::Swap,
    Fault::Unreadable,
];

/// What the store has, and has to return.
struct Stock {
    blobs: Vec<Bytes>,
    compressible: Bytes,
    results: Vec<(Digest, reapi::ActionResult)>,
}

impl Stock {
    async fn fill(store: &TestStore) -> Self {
        let mut blobs: Vec<Bytes> = (0..12).map(|seed| noise(20_000, seed)).collect();
        blobs.extend([noise(LARGE, 100), noise(LARGE + 77, 101)]);
        let compressible = Bytes::from(noise(LARGE / 2, 102).repeat(4));
        let mut results = vec![];
        for (number, bytes) in blobs.iter().chain([&compressible]).enumerate() {
            let blob = store.put(bytes.clone()).await;
            let file =
                reapi::OutputFile { path: "o".into(), digest: Some(blob.to_wire()), ..Default::default() };
            let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
            let action = digest(&[number as u8]);
            store.cas.put_result(&store.main, action, result.clone(), Provenance::default()).await.unwrap();
            results.push((action, result));
        }
        // A journal, because something was replaced.
        let (action, result) = results[0].clone();
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
        for _ in 0..3 {
            read_zstd(store, &compressible).await.unwrap();
        }
        eventually(|| async { (store.inspect().await.totals.zstd_forms == 1).then_some(()) }).await;
        Self { blobs, compressible, results }
    }

    /// Reads everything in every way. An error is fine, wrong bytes are not.
    async fn read(&self, store: &TestStore) {
        let shared = store.cas.shared();
        shared.recent.clear();
        shared.results.clear();
        for bytes in self.blobs.iter().chain([&self.compressible]) {
            let blob = digest(bytes);
            match store.get(blob).await {
                Ok(read) => assert_eq!(read, bytes),
                Err(_) => assert!(store.get(blob).await.is_err() || store.has(blob).await),
            }
            if let Ok(read) = store.cas.read_many(&store.main, vec![blob]).await.unwrap().remove(0) {
                assert_eq!(read, bytes);
            }
            if let Ok(read) = read_zstd(store, bytes).await {
                assert_eq!(Bytes::from(read), bytes);
            }
        }
        for (action, result) in &self.results {
            if let Some(found) = store.cas.get_result(&store.main, *action).await.ok().flatten() {
                assert_eq!(found.output_files, result.output_files);
            }
        }
    }

    async fn heal(&self, store: &TestStore) {
        for bytes in self.blobs.iter().chain([&self.compressible]) {
            store.put(bytes.clone()).await;
            assert_eq!(store.get(digest(bytes)).await.unwrap(), bytes);
        }
        for (action, result) in &self.results {
            store.cas.put_result(&store.main, *action, result.clone(), Provenance::default()).await.unwrap();
            assert!(store.cas.get_result(&store.main, *action).await.unwrap().is_some());
        }
    }
}

async fn read_zstd(store: &TestStore, bytes: &Bytes) -> Result<Vec<u8>> {
    let mut reader = store.cas.open_zstd(&store.main, digest(bytes), 0).await?;
    let mut stream = vec![];
    while let Some(piece) = reader.next(100_000).await? {
        stream.extend_from_slice(&piece);
    }
    decode_all(&stream, bytes.len() as u64)
}

/// The files below a directory, by their paths in it.
fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            if entry.path().is_dir() {
                directories.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Copies a store, with its times.
fn copy_store(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), target).unwrap();
    }
}

fn damage(path: &Path, fault: Fault) {
    let before = fs::metadata(path).unwrap();
    let size = before.len();
    let in_place = |change: &dyn Fn(&fs::File)| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        change(&fs::OpenOptions::new().read(true).write(true).open(path).unwrap());
        fs::set_permissions(path, before.permissions()).unwrap();
    };
    match fault {
        Fault::Flip(eighths) => in_place(&|file| {
            let (mut byte, at) = ([0], (size * eighths / 8).min(size.saturating_sub(1)));
            if file.read_exact_at(&mut byte, at).is_ok() {
                file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
            }
        }),
        Fault::Truncate(eighths) => in_place(&|file| file.set_len(size * eighths / 8).unwrap()),
        Fault::Zeros => {
            in_place(&|file| file.write_all_at(&[0; 512][..(size / 2).min(512) as usize], size / 4).unwrap())
        }
        Fault::Extend => in_place(&|file| file.write_all_at(&[7; 700], size).unwrap()),
        Fault::Delete => fs::remove_file(path).unwrap(),
        Fault::Swap => {
            let others = fs::read_dir(path.parent().unwrap()).unwrap().flatten().map(|entry| entry.path());
            let other = others.filter(|other| other.is_file() && other != path).min();
            if let Some(other) = other {
                renameat_with(CWD, path, CWD, &other, RenameFlags::EXCHANGE).unwrap();
            }
        }
        Fault::Unreadable => fs::set_permissions(path, fs::Permissions::from_mode(0)).unwrap(),
    }
}

/// Opens a store, unless it refuses because of its format, which must be said.
fn open(root: &Path, max_bytes: u64) -> Option<CasActor> {
    let instances = Instances::new(["", "other/one"]).unwrap();
    let settings = settings_at(root.join("store"), max_bytes);
    match CasActor::open(settings, &instances, Handle::current()) {
        Ok(actor) => Some(actor),
        Err(error) => {
            assert!(matches!(error, Error::Precondition(_)), "{error}");
            assert!(error.to_string().contains("format"), "{error}");
            None
        }
    }
}

/// Which kind of file this is, so that not every blob is damaged in every way.
fn kind_of(file: &Path) -> String {
    let text = file.to_string_lossy().into_owned();
    let top: Vec<&str> = text.split('/').take(2).collect();
    let extension = file.extension().map(|kind| kind.to_string_lossy().into_owned()).unwrap_or_default();
    match top[..] {
        ["segments", _] => format!("segments {extension}"),
        ["checksums", _] => "checksums".into(),
        _ => top.join("/"),
    }
}

async fn every_fault_in_every_kind_of_file(max_bytes: u64, expected: &[&str]) {
    let store = TestStore::with_limit(max_bytes).await;
    let stock = Stock::fill(&store).await;
    // The table of the last segment is written by the next start.
    let store = store.restart().await;
    let TestStore { root: template, cas, .. } = store;
    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);
    let template = template.path().join("store");
    let mut files = files_below(&template);
    files.retain(|file| file.as_os_str() != "lock");
    files.dedup_by_key(|file| kind_of(file));
    let kinds: Vec<String> = files.iter().map(|file| kind_of(file)).collect();
    for kind in expected {
        assert!(kinds.iter().any(|found| found == kind), "{kind} is not in {kinds:?}");
    }
    let is_root = rustix::process::geteuid().is_root();
    for file in &files {
        for fault in FAULTS {
            for running in [false, true] {
                let root = Rc::new(TempDir::new().unwrap());
                copy_store(&template, &root.path().join("store"));
                let path = root.path().join("store").join(file);
                if !running {
                    damage(&path, fault);
                }
                let Some(actor) = open(root.path(), max_bytes) else {
                    let is_swapped = fault == Fault::Swap && file.as_os_str() == "note";
                    assert!(is_swapped || file.as_os_str() == "format", "{file:?} {fault:?}");
                    continue;
                };
                let instances = Instances::new(["", "other/one"]).unwrap();
                let (main, other) = (instances.get("").unwrap(), instances.get("other/one").unwrap());
                let store = TestStore { root, cas: actor.launch(), main, other, max_bytes };
                if running {
                    stock.read(&store).await;
                    damage(&path, fault);
                }
                stock.read(&store).await;
                if fault != Fault::Unreadable || is_root {
                    stock.heal(&store).await;
                    stock.read(&store).await;
                }
                store.cas.actor().send(CloseStore).await.unwrap();
            }
        }
    }
}

/// CAS-22, AC-03, user reports 1, 24 and 25.
#[actix::test]
async fn damage_in_a_store_with_segments_is_never_served() {
    let kinds =
        ["segments segment", "segments journal", "checksums", "v1/blobs", "v1/zstd", "format", "note"];
    every_fault_in_every_kind_of_file(1_000 * MB, &kinds).await;
}

#[actix::test]
async fn damage_in_a_store_of_files_is_never_served() {
    every_fault_in_every_kind_of_file(
        200 * MB,
        &["checksums", "v1/blobs", "v1/results", "v1/zstd", "format"],
    )
    .await;
}
