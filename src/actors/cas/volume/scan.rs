//! Finds the files of a store directory at start.
//!
//! Threads read the shard directories and stat every file without opening it, so a million files take seconds. A file
//! of the wrong length comes from a write that a kill or a power cut interrupted, and is removed. Names that the store
//! does not use are ignored and counted. Contents are checked later, at the first read. If a result has two files,
//! which is as rare as a kill, both are read to find the complete one.

use super::{
    Recovered, Repairs, Stored, Take,
    checksum_table::ChecksumTable,
    names::{FileClass, parse_file_name},
    paths::{BLOCK_UNIT_BYTES, StorePaths},
    root,
};
use crate::{
    actors::cas::index::{EntryKind, FileId, Key},
    instance::InstanceId,
    logging::Event,
};
use gorego_reapi::digest::{Digest, DigestFunction};
use std::{
    collections::HashMap,
    fs::{self, DirEntry},
    io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

/// On a cold disk, more threads than CPUs help, but more than this do not.
const MAX_THREADS: usize = 8;
/// The target of the log lines of this file.
const LOG: &str = "gorego::cas";

/// A directory of stored files.
pub(super) struct ShardId {
    class: FileClass,
    instance: InstanceId,
    function: DigestFunction,
    first: u8,
}

impl ShardId {
    fn path(&self, paths: &StorePaths) -> PathBuf {
        paths.shard(self.class, self.instance, self.function, self.first)
    }

    /// The file in this directory with this digest and number.
    fn file(&self, digest: Digest, sequence: u64) -> FileId {
        let key = Key { digest, instance: self.instance, kind: self.class.kind };
        let generation = if self.class.is_packed { FileId::packed_generation(sequence) } else { sequence };
        FileId { key, generation }
    }

    /// The name of the directory, which stays the same for as long as its instance has the same name.
    pub(super) fn name(&self, paths: &StorePaths) -> String {
        paths.name_of(&self.path(paths))
    }
}

#[derive(Default)]
struct ShardContent {
    found: Vec<Recovered>,
    repairs: Repairs,
}

/// Implements [`super::Volume::recover`].
pub(super) fn recover(
    paths: &Arc<StorePaths>,
    table: &ChecksumTable,
    is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync),
    take: Take<'_>,
) -> Repairs {
    let shards: Vec<ShardId> = all_shards(paths);
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from).clamp(2, MAX_THREADS);
    let mut sums = Repairs::default();
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..threads {
            let (sender, next, shards) = (sender.clone(), &next, &shards);
            scope.spawn(move || {
                while let Some(shard) = shards.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send(read_shard(paths, shard, is_whole)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for ShardContent { found, repairs } in receiver {
            sums.removed += repairs.removed;
            sums.foreign += repairs.foreign;
            sums.unreadable += repairs.unreadable;
            for Recovered { file, .. } in &found {
                paths.saw_generation(file.sequence());
                table.claim(file.generation);
            }
            take(&mut found.into_iter());
        }
    });
    table.end_recovery();
    empty_trash(paths);
    sums
}

/// The stored files in the directory of this name.
///
/// # Errors
/// The errors of reading the directory; `NotFound` for a name that none has.
pub(super) fn files_in(paths: &StorePaths, name: &str) -> io::Result<Vec<FileId>> {
    let is_it = |shard: &ShardId| shard.name(paths) == name;
    let shard = all_shards(paths).into_iter().find(is_it).ok_or(io::ErrorKind::NotFound)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(shard.path(paths))? {
        let name = entry?.file_name();
        let ours = name.to_str().and_then(|name| parse_file_name(shard.function, name));
        found.extend(ours.map(|(digest, sequence)| shard.file(digest, sequence)));
    }
    Ok(found)
}

/// The directories that stored files may be in, in a fixed order.
pub(super) fn all_shards(paths: &StorePaths) -> Vec<ShardId> {
    let mut shards = Vec::new();
    for instance in paths.instances() {
        for &function in DigestFunction::ALL {
            for class in FileClass::ALL {
                // Most digest functions were never used.
                let first = paths.shard(class, instance, function, 0);
                if first.parent().is_none_or(|shards| !shards.exists()) {
                    continue;
                }
                shards.extend((0..=u8::MAX).map(|first| ShardId { class, instance, function, first }));
            }
        }
    }
    shards
}

fn read_shard(
    paths: &StorePaths,
    shard: &ShardId,
    is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync),
) -> ShardContent {
    let mut content = ShardContent::default();
    let entries = match fs::read_dir(shard.path(paths)) {
        Ok(entries) => entries,
        Err(error) => {
            // A directory that was never needed does not exist.
            content.repairs.unreadable += u64::from(error.kind() != io::ErrorKind::NotFound);
            return content;
        }
    };
    for entry in entries {
        match entry {
            Ok(entry) => read_entry(paths, shard, &entry, &mut content),
            Err(_) => content.repairs.unreadable += 1,
        }
    }
    if shard.class.kind == EntryKind::Result {
        remove_torn_updates(paths, &mut content, is_whole);
    }
    content
}

/// Adds a file to the content of its shard, or counts what is wrong with it.
fn read_entry(paths: &StorePaths, shard: &ShardId, entry: &DirEntry, content: &mut ShardContent) {
    let repairs = &mut content.repairs;
    let name = entry.file_name();
    let ours = name.to_str().and_then(|name| parse_file_name(shard.function, name));
    let Some((digest, generation)) = ours.filter(|(digest, _)| digest.hash()[0] == shard.first) else {
        repairs.foreign += 1;
        return;
    };
    let Ok(metadata) = entry.metadata() else {
        repairs.unreadable += 1;
        return;
    };
    if !metadata.is_file() {
        // Something else is in the place of a stored file.
        match paths.throw_away(&entry.path()) {
            Ok(()) => repairs.removed += 1,
            Err(_) => repairs.unreadable += 1,
        }
        return;
    }
    let FileClass { kind, is_packed } = shard.class;
    if kind == EntryKind::Blob && !is_packed && metadata.len() != digest.size() {
        let _ = fs::remove_file(entry.path());
        repairs.removed += 1;
        return;
    }
    let file = shard.file(digest, generation);
    let touched = u32::try_from(metadata.atime().max(0)).unwrap_or(u32::MAX);
    content.found.push(Recovered { file, bytes: paths.taken(&metadata), touched });
}

/// Removes the remains of an interrupted update: the beginning of a new file beside the file that it should have
/// replaced. The incomplete file is the newer one, and must not be chosen.
fn remove_torn_updates(
    paths: &StorePaths,
    content: &mut ShardContent,
    is_whole: &dyn Fn(&dyn Stored) -> bool,
) {
    let mut counts: HashMap<Digest, usize> = HashMap::new();
    for Recovered { file, .. } in &content.found {
        *counts.entry(file.key.digest).or_default() += 1;
    }
    let repairs = &mut content.repairs;
    content.found.retain(|Recovered { file, .. }| {
        let is_alone = counts.get(&file.key.digest) == Some(&1);
        let path = paths.path(file);
        if is_alone || paths.open(&path).is_ok_and(|stored| is_whole(&stored)) {
            return true;
        }
        let _ = fs::remove_file(path);
        repairs.removed += 1;
        false
    });
}

/// The blocks that a file takes, or all files in a directory.
fn bytes_of(entry: &DirEntry) -> u64 {
    let Ok(metadata) = entry.metadata() else { return 0 };
    if metadata.is_dir() {
        let inside = fs::read_dir(entry.path()).into_iter().flatten().flatten();
        return inside.map(|entry| bytes_of(&entry)).sum();
    }
    metadata.blocks().saturating_mul(BLOCK_UNIT_BYTES)
}

/// Empties the trash on its own thread, and counts its bytes until then. After a crash, the next start continues.
fn empty_trash(paths: &Arc<StorePaths>) {
    let paths = paths.clone();
    let spawned = thread::Builder::new().name("store-trash".into()).spawn(move || {
        let thrown: Vec<(PathBuf, u64)> = fs::read_dir(paths.trash())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| (entry.path(), bytes_of(&entry)))
            .collect();
        paths.in_trash.store(thrown.iter().map(|(_, bytes)| bytes).sum(), Ordering::Relaxed);
        for (path, bytes) in thrown {
            // Files that cannot be removed stay counted.
            if root::remove(&path).is_ok() {
                paths.in_trash.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    });
    if let Err(error) = spawned {
        Event::warn(LOG, "trash_kept")
            .with_shown("error", &error)
            .log(format_args!("could not start deleting old files"));
    }
}
