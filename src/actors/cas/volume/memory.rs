//! [`Memory`]: a volume in memory, for tests. They show that the store relies only on the promises of the
//! trait.

use super::{
    Compacted, Draft, Look, Moved, Moves, NewFile, Recovered, Repairs, Stored, Take, Urgency, Volume,
    WrittenFile, outside::LeftFile, stored::copy_in_pieces,
};
use crate::{
    actors::cas::index::{FileId, Key, Stamp, Victim},
    disk::Space,
};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, Hasher};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
};

/// The files of a store, by generation. Clones share their files.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    files: Arc<Mutex<BTreeMap<u64, (FileId, Bytes)>>>,
    last_number: Arc<AtomicU64>,
    /// The number of the error with which every call fails that opens or writes a file; 0 for none.
    fault: Arc<AtomicI32>,
    /// How often a caller has waited for the disk.
    syncs: Arc<AtomicU64>,
    /// The error of the next wait for the disk; 0 for none.
    sync_fault: Arc<AtomicI32>,
    /// `None` for a volume whose deleted files take no bytes.
    dead: Option<Arc<DeadBytes>>,
    /// The size of its disk, and the bytes that others take there; `None` for a disk that never fills.
    disk: Option<(u64, Arc<AtomicU64>)>,
}

/// The bytes of deleted files, which compaction does not reclaim.
#[derive(Debug, Default)]
struct DeadBytes {
    bytes: AtomicU64,
    /// The number of steps of compaction.
    steps: AtomicU64,
}

impl Memory {
    /// A volume in which deleted files keep their bytes, whatever is compacted.
    pub(crate) fn that_reclaims_nothing() -> Self {
        Self { dead: Some(Arc::default()), ..Self::default() }
    }

    /// A volume on a disk of this size, on which others take a number of bytes.
    pub(crate) fn on_a_disk(total_bytes: u64, others: Arc<AtomicU64>) -> Self {
        Self { disk: Some((total_bytes, others)), ..Self::default() }
    }

    /// Reclaims the bytes of all deleted files.
    pub(crate) fn reclaim(&self) {
        self.dead.iter().for_each(|dead| dead.bytes.store(0, Ordering::Relaxed));
    }

    /// Copies a file, as compaction does. Returns the generation of the copy.
    pub(crate) fn copy(&self, file: &FileId) -> u64 {
        let bytes = self.files.lock().unwrap().get(&file.generation).unwrap().1.clone();
        self.keep(file.key, bytes).file.generation
    }

    /// Fails every call that opens or writes a file from now on, or with 0 no more.
    pub(crate) fn fail_with(&self, errno: i32) {
        self.fault.store(errno, Ordering::Relaxed);
    }

    fn fault(&self) -> io::Result<()> {
        match self.fault.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// How often a caller has waited for the disk.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Makes the next wait for the disk fail, and only that one, as the kernel reports an error once.
    pub(crate) fn fail_next_sync(&self, errno: i32) {
        self.sync_fault.store(errno, Ordering::Relaxed);
    }

    /// The number of steps of compaction that have reclaimed nothing.
    pub(crate) fn steps_in_vain(&self) -> u64 {
        self.dead.as_ref().map_or(0, |dead| dead.steps.load(Ordering::Relaxed))
    }

    /// The number of files.
    pub(crate) fn len(&self) -> usize {
        self.files.lock().unwrap().len()
    }

    /// Files are never changed, so the generation serves as the stamp.
    fn keep(&self, key: Key, bytes: Bytes) -> WrittenFile {
        let file = FileId { key, generation: self.next_generation() };
        let charge = self.charge(bytes.len() as u64);
        self.files.lock().unwrap().insert(file.generation, (file, bytes));
        WrittenFile { file, bytes: charge, stamp: Stamp::new(file.generation, 0) }
    }

    fn open_file(&self, file: &FileId) -> io::Result<Open> {
        self.fault()?;
        let files = self.files.lock().unwrap();
        let (_, bytes) = files.get(&file.generation).ok_or(io::ErrorKind::NotFound)?;
        Ok(Open { bytes: bytes.clone(), stamp: Stamp::new(file.generation, 0) })
    }
}

#[derive(Debug)]
struct Open {
    bytes: Bytes,
    stamp: Stamp,
}

#[derive(Debug)]
struct Growing {
    bytes: Vec<u8>,
    volume: Memory,
}

impl Volume for Memory {
    fn next_generation(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn charge(&self, size: u64) -> u64 {
        size.max(1)
    }

    fn sync(&self, _: &[FileId]) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        match self.sync_fault.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn overhead(&self) -> u64 {
        self.dead.as_ref().map_or(0, |dead| dead.bytes.load(Ordering::Relaxed))
    }

    fn space(&self) -> io::Result<Space> {
        let plenty =
            Space { free_bytes: 1 << 40, total_bytes: 1 << 40, free_inodes: 1 << 30, total_inodes: 0 };
        let Some((total_bytes, others)) = &self.disk else { return Ok(plenty) };
        let files: u64 =
            self.files.lock().unwrap().values().map(|(_, bytes)| self.charge(bytes.len() as u64)).sum();
        let taken = files + others.load(Ordering::Relaxed);
        Ok(Space { free_bytes: total_bytes.saturating_sub(taken), total_bytes: *total_bytes, ..plenty })
    }

    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>> {
        Ok(Box::new(self.open_file(file)?))
    }

    fn look(&self, file: &FileId) -> io::Result<Look> {
        self.open_file(file)?.look()
    }

    fn write(&self, files: &[NewFile<'_>]) -> Vec<io::Result<WrittenFile>> {
        let write = |file: &NewFile<'_>| {
            self.fault()?;
            Ok(self.keep(file.key, file.pieces.concat().into()))
        };
        files.iter().map(write).collect()
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        self.fault()?;
        Ok(Box::new(Growing { bytes: Vec::new(), volume: self.clone() }))
    }

    fn adopt(&self, _: Key, _: &LeftFile<'_>) -> io::Result<Option<WrittenFile>> {
        Ok(None)
    }

    fn delete(&self, victims: &[Victim]) -> Vec<(FileId, io::Error)> {
        for victim in victims {
            self.files.lock().unwrap().remove(&victim.file.generation);
            if let Some(dead) = &self.dead {
                dead.bytes.fetch_add(victim.bytes, Ordering::Relaxed);
            }
        }
        Vec::new()
    }

    fn touch(&self, _: &[FileId], _: &mut dyn FnMut(Vec<Moved>)) {}

    fn wants_compaction(&self) -> Option<Urgency> {
        (self.overhead() > 0).then_some(Urgency::WritersWait)
    }

    fn compact(
        &self,
        _: &dyn Fn(&[FileId]) -> Vec<bool>,
        _: &mut dyn FnMut(Moves) -> Vec<bool>,
    ) -> io::Result<Compacted> {
        let Some(dead) = &self.dead else { return Ok(Compacted::NothingToGain) };
        dead.steps.fetch_add(1, Ordering::Relaxed);
        Ok(Compacted::Kept)
    }

    fn recover(&self, _: &(dyn Fn(&dyn Stored) -> bool + Sync), take: Take<'_>) -> Repairs {
        let files: Vec<_> = self.files.lock().unwrap().values().cloned().collect();
        let found = |(file, bytes): (FileId, Bytes)| Recovered {
            file,
            bytes: self.charge(bytes.len() as u64),
            touched: 0,
        };
        take(&mut files.into_iter().map(found));
        Repairs::default()
    }
}

impl Stored for Open {
    fn look(&self) -> io::Result<Look> {
        Ok(Look { size: self.bytes.len() as u64, stamp: self.stamp, lasting: self.stamp })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = self.bytes.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buffer.len());
        buffer[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize> {
        let rest = self.bytes.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buffer.capacity() - buffer.len());
        buffer.extend_from_slice(&rest[..read]);
        Ok(read)
    }

    fn nobody_writes(&self) -> bool {
        true
    }

    fn copy_to(&self, to: &File, size: u64) -> io::Result<()> {
        copy_in_pieces(self, to, size)
    }
}

impl Draft for Growing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn hash(&self, mut hasher: Hasher) -> io::Result<Digest> {
        hasher.update(&self.bytes);
        Ok(hasher.finish())
    }

    fn keep(self: Box<Self>, key: Key) -> io::Result<WrittenFile> {
        Ok(self.volume.keep(key, self.bytes.into()))
    }
}
