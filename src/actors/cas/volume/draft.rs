//! [`TemporaryFile`]: a file under a temporary name, which gets its final name once its content is verified.

use super::{
    Draft, WrittenFile,
    checksum_table::{ChecksumTable, needs_checksums},
    checksums::ChecksumBuilder,
    durable::{SyncPolicy, sync_file},
    hash,
    paths::{StorePaths, create, in_shard},
    stamps::{change_unobserved, stamp_of},
};
use crate::{
    actors::cas::index::{FileId, Key, Stamp},
    regular_file,
};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, Hasher};
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};
use std::{
    fs::{File, remove_file, rename},
    io::{self, IoSlice, Write as _},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::Arc,
};

/// A file that is deleted when it is dropped, unless [`Draft::keep`] was called.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    paths: Arc<StorePaths>,
    path: PathBuf,
    file: File,
    /// The stamp after the last change by this process; `None` once another process has changed the file.
    own: Option<Stamp>,
    /// The last use to record, if the file becomes a packed file.
    packed_for: Option<u32>,
    /// The checksums of the bytes that were written.
    sums: ChecksumBuilder,
    table: Arc<ChecksumTable>,
    is_kept: bool,
}

impl TemporaryFile {
    /// Creates the temporary file of this generation.
    pub(super) fn create(
        paths: Arc<StorePaths>,
        table: Arc<ChecksumTable>,
        generation: u64,
    ) -> io::Result<Self> {
        let path = paths.temporary_path(generation);
        let (file, sums) = (create(&path)?, ChecksumBuilder::default());
        let own = Some(stamp_of(&file.metadata()?));
        Ok(Self { file, own, paths, path, packed_for: None, sums, table, is_kept: false })
    }

    /// Makes this a draft of a packed file with this recorded use, in seconds since 1970.
    pub(super) fn packed(self, used: u32) -> Self {
        let mut file = self;
        file.packed_for = Some(used);
        file
    }

    /// Changes the file, and notes if another process has changed it since this one did. Such a file is hashed again
    /// before it is read.
    fn change(&mut self, change: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        let is_own = self.own == Some(stamp_of(&self.file.metadata()?));
        change(&mut self.file)?;
        self.own = if is_own { Some(stamp_of(&self.file.metadata()?)) } else { None };
        Ok(())
    }

    /// The generation under which the file is kept.
    fn final_generation(&mut self) -> io::Result<u64> {
        let generation = self.paths.next_generation();
        let Some(used) = self.packed_for else { return Ok(generation) };
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time(used.into(), 0), last_modification: time(0, UTIME_OMIT) };
        self.change(|file| Ok(futimens(file, &times)?))?;
        // This file replaces one that would survive a power cut.
        sync_file(&self.file)?;
        Ok(FileId::packed_generation(generation))
    }

    /// Opens the file again, for reading only.
    fn reopen(&self) -> io::Result<File> {
        regular_file::open(&self.path)
    }
}

impl Draft for TemporaryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.change(|file| file.write_all(bytes))?;
        self.sums.update(bytes);
        Ok(())
    }

    fn write_pieces(&mut self, pieces: &[Bytes]) -> io::Result<()> {
        let mut slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        self.change(|file| write_all(file, &mut slices))?;
        pieces.iter().for_each(|piece| self.sums.update(piece));
        Ok(())
    }

    fn hash(&self, hasher: Hasher) -> io::Result<Digest> {
        let file = self.reopen()?;
        hash(hasher, |piece, at| file.read_at(piece, at))
    }

    fn keep(mut self: Box<Self>, key: Key) -> io::Result<WrittenFile> {
        let file = FileId { key, generation: self.final_generation()? };
        let metadata = self.file.metadata()?;
        // A packed file has checksums of its own.
        if self.packed_for.is_none() && needs_checksums(&key, metadata.len()) {
            // A file without checksums is hashed before it is served, and gets them then.
            let _ = self.table.add(&file, &std::mem::take(&mut self.sums).finish());
        }
        if self.paths.policy == SyncPolicy::BeforeAnswer {
            sync_file(&self.file)?;
        }
        // A file that is open for writing, even by this process, gets no lease.
        self.file = self.reopen()?;
        let path = self.paths.path(&file);
        // A file that another process has changed is not trusted, so it is hashed before it is used.
        let own = self.own.unwrap_or(Stamp::UNTRUSTED);
        let moved = change_unobserved(&self.file, own, || in_shard(&path, || rename(&self.path, &path)))
            .inspect_err(|_| self.table.remove(file.generation))?;
        self.is_kept = true;
        let stamp = moved.map_or(Stamp::UNTRUSTED, |stamp| self.paths.settled(stamp));
        Ok(WrittenFile { file, bytes: self.paths.taken(&metadata), stamp })
    }
}

/// Writes all of these pieces.
fn write_all(file: &mut File, mut left: &mut [IoSlice<'_>]) -> io::Result<()> {
    // A piece may be empty, so the loop ends when no bytes are left.
    while left.iter().any(|slice| !slice.is_empty()) {
        match file.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.is_kept {
            // A file that cannot be deleted is removed at the next start.
            let _ = remove_file(&self.path);
        }
    }
}
