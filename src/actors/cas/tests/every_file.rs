//! Every kind of damage to every kind of file of a store, while it is stopped, while it runs, and in what it has just
//! written.
//!
//! Whatever the fault, nothing wrong is served, what lies in other files stays, an upload heals what was lost, and what
//! is stored after the fault survives a restart.

mod fault;
mod stock;
mod uploads;

use super::*;
use fault::{Fault, kind_of, obeying_permissions};
use std::{collections::BTreeMap, fs};
use stock::{Stock, Tolerance};

/// When a file is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Between two runs.
    Stopped,
    /// While the store runs and has read everything.
    Running,
    /// While the store runs, in a file that it has written in this run and may go on writing.
    Written,
}

/// The files that belong to the store, by kind, each with its path below the store.
fn files_by_kind(store: &Path) -> BTreeMap<String, Vec<PathBuf>> {
    let mut kinds: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for file in fault::files_below(store) {
        kinds.entry(kind_of(&file)).or_default().push(file);
    }
    kinds
}

/// A stopped store with one file of each kind at least, and what is in it.
async fn template(max_bytes: u64) -> (Rc<TempDir>, Stock) {
    let store = TestStore::with_limit(max_bytes).await;
    let stock = Stock::fill(&store, 0).await;
    // The table of the last segment is written by the next start.
    let store = store.restart().await;
    store.cas.actor().send(CloseStore).await.unwrap();
    (store.root.clone(), stock)
}

/// Opens a copy of the store, unless it refuses because of its format or lock, which it must say.
async fn open(root: Rc<TempDir>, max_bytes: u64) -> Option<TestStore> {
    let path = root.path().join("store");
    let format = fs::read_to_string(path.join("format"));
    let is_closed = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    let why = match format {
        Ok(text) if text != "gorego store 3\n" => "format",
        Err(error) if is_closed(&error) => "format",
        _ if fs::OpenOptions::new()
            .write(true)
            .open(path.join("lock"))
            .is_err_and(|error| is_closed(&error)) =>
        {
            "not writable"
        }
        _ => return Some(TestStore::at(root, max_bytes).await),
    };
    let error = CasActor::open(settings_at(path, max_bytes), &instances(), Handle::current()).unwrap_err();
    assert!(matches!(error, Error::Precondition(_)), "{error}");
    assert!(error.to_string().contains(why), "{error}");
    None
}

/// No second server may run on the directory, whatever happened to its files.
fn refuses_a_second_server(store: &TestStore) {
    let settings = settings_at(store.root.path().join("store"), store.max_bytes);
    let error = CasActor::open(settings, &instances(), Handle::current()).unwrap_err();
    let why = error.to_string();
    let lock = store.root.path().join("store/lock");
    let is_closed = || fs::OpenOptions::new().write(true).open(lock).is_err();
    assert!(why.contains("another gorego server runs on it") || is_closed(), "{error}");
}

/// The files of a store with their sizes.
fn sizes(store: &Path) -> BTreeMap<PathBuf, u64> {
    let size = |file: PathBuf| Some((file.clone(), fs::metadata(store.join(&file)).ok()?.len()));
    fault::files_below(store).into_iter().filter_map(size).collect()
}

async fn read_all_of(stocks: &[Stock], store: &TestStore) -> usize {
    let mut lost = 0;
    for stock in stocks {
        lost += stock.read(store).await;
    }
    lost
}

/// Damages one file, and checks the store from then on. `file` is the one to damage; [`When::Written`] takes the last
/// new one of its kind instead. With `looks_up_first`, look-ups come before the first read. Returns whether there was
/// one.
async fn check_fault(
    template: &Path,
    stock: &Stock,
    file: &Path,
    fault: Fault,
    when: When,
    looks_up_first: bool,
    max_bytes: u64,
) -> bool {
    let root = Rc::new(TempDir::new().unwrap());
    let directory = root.path().join("store");
    fault::copy_store(template, &directory);
    let kind = kind_of(file);
    if when == When::Stopped {
        fault.damage(&directory, file);
    }
    let Some(store) = open(root.clone(), max_bytes).await else {
        assert!(when == When::Stopped && ["format", "note", "lock"].contains(&&*kind), "{kind} {fault:?}");
        return true;
    };
    let mut damaged = file.to_owned();
    let tolerance = Tolerance::of(&kind, fault, when != When::Stopped, when == When::Written);
    let mut stocks = vec![stock.clone()];
    if when != When::Stopped {
        assert_eq!(stock.read(&store).await, 0, "nothing is wrong yet");
    }
    if when == When::Written {
        let before = sizes(&directory);
        stocks.push(Stock::fill(&store, 1_000).await);
        let new = files_by_kind(&directory).remove(&kind).unwrap_or_default();
        let after = sizes(&directory);
        let Some(written) = new.into_iter().rfind(|file| before.get(file) != after.get(file)) else {
            return false;
        };
        damaged = written;
    }
    if when != When::Stopped {
        fault.damage(&directory, &damaged);
        refuses_a_second_server(&store);
    }
    if looks_up_first {
        for stock in &stocks {
            stock.look_up(&store).await;
        }
    }
    if looks_up_first && when == When::Stopped {
        stock.check_hits(&store).await;
    }
    let lost = read_all_of(&stocks, &store).await;
    assert!(lost <= tolerance.lost, "{lost} entries are lost");
    for stock in &stocks {
        if when != When::Stopped || !tolerance.purged_may_return {
            stock.check_purged(&store).await;
        }
        stock.heal(&store).await;
    }
    assert_eq!(read_all_of(&stocks, &store).await, 0, "what was uploaded again is there");
    let new = if when == When::Written { vec![Stock::fill(&store, 2_000).await] } else { vec![] };
    store.cas.actor().send(CloseStore).await.unwrap();
    drop(store);
    let Some(store) = open(root, max_bytes).await else {
        let is_of_directory = ["format", "note", "lock"].contains(&&*kind);
        assert!(is_of_directory, "only the next start notices, and it refuses the store");
        return true;
    };
    let lost = read_all_of(&new, &store).await;
    assert!(
        lost <= tolerance.new_lost_at_restart,
        "{lost} entries of after the fault are lost with the restart"
    );
    let lost = read_all_of(&stocks, &store).await;
    for stock in stocks.iter().filter(|_| !tolerance.purged_may_return) {
        stock.check_purged(&store).await;
    }
    assert!(lost <= tolerance.lost_at_restart, "{lost} entries are lost with the restart");
    store.cas.actor().send(CloseStore).await.unwrap();
    true
}

/// Damages one or two files of each kind in every way. `expected` are kinds that have to exist.
fn every_fault_in_every_kind_of_file(max_bytes: u64, when: When, expected: &'static [&'static str]) {
    obeying_permissions(move || async move {
        let (root, stock) = template(max_bytes).await;
        let template = root.path().join("store");
        let kinds = files_by_kind(&template);
        for kind in expected {
            assert!(kinds.contains_key(*kind), "{kind} is not in {:?}", kinds.keys());
        }
        let mut alternating = false;
        for (kind, files) in kinds {
            let (first, last) = (&files[0], &files[files.len() - 1]);
            let has_two = files.len() > 1 && ["segment", "v1/blobs"].contains(&&*kind);
            for fault in Fault::ALL {
                alternating = !alternating;
                // Between two runs, each fault is found by a look-up once and by a read once.
                let samples = match when {
                    When::Stopped => vec![(first, true), (last, false)],
                    When::Running if has_two => vec![(first, alternating), (last, !alternating)],
                    When::Running | When::Written => vec![(first, alternating)],
                };
                for (file, looks_up_first) in samples {
                    println!(
                        "{kind}: {fault:?} of {} {when:?}, look-up first: {looks_up_first}",
                        file.display()
                    );
                    let was_there =
                        check_fault(&template, &stock, file, fault, when, looks_up_first, max_bytes).await;
                    assert!(
                        was_there || ["format", "lock", "note"].contains(&&*kind),
                        "no new file of {kind}"
                    );
                }
            }
        }
    });
}

const WITH_SEGMENTS: u64 = 1_000 * MB;
const OF_FILES: u64 = 200 * MB;
const SEGMENT_KINDS: &[&str] =
    &["lock", "format", "note", "segment", "journal", "checksums", "v1/blobs", "v1/packed", "v1/zstd"];
const FILE_KINDS: &[&str] =
    &["lock", "format", "note", "checksums", "v1/blobs", "v1/packed", "v1/results", "v1/private", "v1/zstd"];

/// CAS-22, AC-03.
#[test]
fn damage_to_a_stopped_store_with_segments_is_never_served_and_heals() {
    every_fault_in_every_kind_of_file(WITH_SEGMENTS, When::Stopped, SEGMENT_KINDS);
}

#[test]
fn damage_to_a_running_store_with_segments_is_never_served_and_heals() {
    every_fault_in_every_kind_of_file(WITH_SEGMENTS, When::Running, SEGMENT_KINDS);
}

#[test]
fn damage_to_what_a_store_with_segments_has_just_written_is_never_served_and_heals() {
    every_fault_in_every_kind_of_file(WITH_SEGMENTS, When::Written, SEGMENT_KINDS);
}

#[test]
fn damage_to_a_stopped_store_of_files_is_never_served_and_heals() {
    every_fault_in_every_kind_of_file(OF_FILES, When::Stopped, FILE_KINDS);
}

#[test]
fn damage_to_a_running_store_of_files_is_never_served_and_heals() {
    every_fault_in_every_kind_of_file(OF_FILES, When::Running, FILE_KINDS);
}

/// Directories that the store makes are removed, or cannot be entered for a while, while it runs.
#[test]
fn a_directory_that_is_removed_or_closed_is_made_again_or_waited_for() {
    use std::os::unix::fs::PermissionsExt as _;
    obeying_permissions(|| async {
        for max_bytes in [WITH_SEGMENTS, OF_FILES] {
            let (template, stock) = template(max_bytes).await;
            let template = template.path().join("store");
            for name in ["segments", "checksums", "v1/tmp", "v1/trash", "v1/blobs", "v1/results", "v1"] {
                for is_removed in [true, false] {
                    println!("{name} is {}", if is_removed { "removed" } else { "closed" });
                    let root = Rc::new(TempDir::new().unwrap());
                    let directory = root.path().join("store").join(name);
                    fault::copy_store(&template, &root.path().join("store"));
                    let store = open(root, max_bytes).await.unwrap();
                    stock.read(&store).await;
                    if is_removed {
                        fs::remove_dir_all(&directory).unwrap();
                        stock.read(&store).await;
                    } else {
                        fs::set_permissions(&directory, fs::Permissions::from_mode(0o0)).unwrap();
                        stock.read_while_closed(&store).await;
                        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
                        assert_eq!(stock.read(&store).await, 0, "nothing was dropped");
                    }
                    stock.heal(&store).await;
                    assert_eq!(stock.read(&store).await, 0);
                    let new = Stock::fill(&store, 1_000).await;
                    let store = store.restart().await;
                    assert_eq!(new.read(&store).await, 0, "what was uploaded after the fault is there");
                    let lost = stock.read(&store).await;
                    // Segments that were open when they were removed could be read until the restart.
                    assert!(lost == 0 || is_removed && name == "segments", "{lost}");
                    store.cas.actor().send(CloseStore).await.unwrap();
                }
            }
        }
    });
}
