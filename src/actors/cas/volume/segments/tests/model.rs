//! Random writes, deletions, compactions and crashes against a map.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Write {
        first: u8,
        count: u8,
        length: u16,
    },
    PutResult {
        name: u8,
        version: u8,
    },
    Delete {
        name: u8,
    },
    DeleteResult {
        name: u8,
    },
    Compact,
    /// The process dies.
    Crash,
    /// The process dies while it writes: the end of the last segment is missing or was never written.
    Torn {
        cut: u16,
        as_zeros: bool,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..60u8, 1..6u8, 0..6_000u16).prop_map(|(first, count, length)| Op::Write { first, count, length }),
        2 => (0..4u8, any::<u8>()).prop_map(|(name, version)| Op::PutResult { name, version }),
        5 => (0..66u8).prop_map(|name| Op::Delete { name }),
        1 => (0..4u8).prop_map(|name| Op::DeleteResult { name }),
        3 => Just(Op::Compact),
        1 => Just(Op::Crash),
        1 => (0..9_000u16, any::<bool>()).prop_map(|(cut, as_zeros)| Op::Torn { cut, as_zeros }),
    ];
    prop::collection::vec(op, 1..60)
}

fn result_key(name: u8) -> Key {
    key_of(EntryKind::Result, &[name])
}

/// Cuts off the end of the last segment, which has no table yet.
fn tear(store: &Store, cut: u16, as_zeros: bool) -> bool {
    let Some(last) = store.files("segment").pop() else { return false };
    let file = OpenOptions::new().read(true).write(true).open(&last).unwrap();
    let size = file.metadata().unwrap().len();
    let keep = size.saturating_sub(u64::from(cut));
    file.set_len(keep).unwrap();
    if as_zeros {
        file.set_len(size).unwrap();
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// A crash changes nothing. After a torn write, files may be missing, but no content is wrong, no deleted file is
    /// back, and no older result takes the place of a newer one.
    #[test]
    fn segments_are_a_map(ops in ops()) {
        let mut store = Store::new();
        let mut model: HashMap<Key, Bytes> = HashMap::new();
        // The results that were ever written, in order, and those that were deleted last.
        for op in ops {
            let mut may_miss = false;
            match op {
                Op::Write { first, count, length } => {
                    let files: Vec<(Key, Bytes)> = (first..first + count)
                        .map(|name| blob(usize::from(length) + usize::from(name), name))
                        .filter(|(key, _)| !model.contains_key(key))
                        .collect();
                    store.write(&files);
                    model.extend(files);
                }
                Op::PutResult { name, version } => {
                    let bytes = content(500, version);
                    store.write(&[(result_key(name), bytes.clone())]);
                    model.insert(result_key(name), bytes);
                }
                Op::Delete { name } => {
                    let mut keys: Vec<Key> = model.keys().filter(|key| key.kind == EntryKind::Blob).copied().collect();
                    keys.sort_by_key(|key| key.digest);
                    if let Some(key) = keys.get(usize::from(name) % keys.len().max(1)) {
                        store.delete(key);
                        model.remove(key);
                    }
                }
                Op::DeleteResult { name } => {
                    store.delete(&result_key(name));
                    model.remove(&result_key(name));
                }
                Op::Compact => {
                    store.compact();
                }
                Op::Crash => store = store.crash(),
                Op::Torn { cut, as_zeros } => {
                    may_miss = tear(&store, cut, as_zeros);
                    store = store.crash();
                }
            }
            if may_miss {
                // A result that has lost its last version may show an earlier one, if a crash came before that was
                // deleted. Here it was deleted, so the result is a miss.
                let lost: Vec<Key> = model.keys().filter(|key| store.read(key).is_err()).copied().collect();
                for key in lost {
                    store.delete(&key);
                    model.remove(&key);
                }
            }
            prop_assert_eq!(store.index.len(), model.len());
            for (key, bytes) in &model {
                prop_assert_eq!(&store.read(key).unwrap(), bytes);
            }
            store.check_counts();
        }
    }
}
