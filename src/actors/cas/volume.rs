//! The layout of stored bytes on disk.
//!
//! [`Volume`] is the interface to the rest of the store. A stored file is identified by its [`FileId`]. It is written
//! once, opened, touched and deleted, and never changed. [`local::Local`] is the volume of the product:
//! [`segments::Segments`] has many small files in each file of the file system, and [`files::Files`] keeps larger ones
//! on their own. An object store or a shard on another machine would be another implementation of the trait. Nothing
//! outside this module names a path or calls the file system; `tests/tidy` checks this.
//!
//! A volume decides nothing. The index says which files exist and which are evicted, and callers verify contents. A
//! volume uses the types of the index and nothing else of the store. All calls block, unless their documentation says
//! otherwise, and are made on blocking threads.
//!
//! [`outside`] contains the files that do not belong to the store: the outputs that actions left behind, and their
//! input files.

mod checksum_table;
pub(crate) mod checksums;
pub(crate) mod draft;
mod durable;
pub(crate) mod files;
pub(crate) mod local;
#[cfg(test)]
pub(crate) mod memory;
mod names;
pub(crate) mod outside;
pub(crate) mod packed;
mod paths;
mod root;
pub(crate) mod scan;
pub(crate) mod segments;
#[cfg(test)]
pub(crate) mod simulation;
pub(crate) mod stamps;
pub(crate) mod stored;

pub use durable::SyncPolicy;
pub(crate) use stamps::COARSE_TICK;

pub(crate) use super::index::Recovered;
use super::index::{FileId, Key, Stamp, Victim};
use crate::{disk::Space, regular_file};
use bytes::Bytes;
use checksums::Checksums;
use gorego_reapi::{
    compression::SeekTable,
    digest::{Digest, Hasher},
};
use outside::LeftFile;
use std::{fmt::Debug, fs::File, io};

/// Large files are hashed and copied in pieces of this size.
pub(crate) const PIECE_BYTES: usize = 256 * 1024;

/// The storage for the files of the store.
pub(crate) trait Volume: Debug + Send + Sync {
    /// A number that no file of this volume has ever had. Does not block.
    fn next_generation(&self) -> u64;

    /// Bytes that a file of this size takes on disk. Does not block.
    fn charge(&self, size: u64) -> u64;

    /// Bytes on disk that no file is charged for, such as bytes of deleted files that are not reclaimed yet. Does not
    /// block.
    fn overhead(&self) -> u64 {
        0
    }

    /// The free space of the underlying disk.
    fn space(&self) -> io::Result<Space>;

    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>>;

    /// The size and stamp of a stored file, without opening it.
    fn look(&self, file: &FileId) -> io::Result<Look>;

    /// Writes verified bytes to new files, each with its own outcome. A failed write leaves no file behind.
    fn write(&self, files: &[NewFile<'_>]) -> Vec<io::Result<WrittenFile>>;

    /// Begins a file whose digest is not known yet.
    fn draft(&self) -> io::Result<Box<dyn Draft>>;

    /// Returns once these new files are as durable as the store promises. It has to be called before they become
    /// visible.
    fn sync(&self, files: &[FileId]) -> io::Result<()> {
        let _ = files;
        Ok(())
    }

    /// Begins a file that becomes the packed file of a blob ([`packed::Packing`]), with `used` as the recorded time of
    /// its last use, in seconds since 1970.
    ///
    /// # Errors
    /// `Unsupported` where blobs are not kept compressed.
    fn packed_draft(&self, used: u32) -> io::Result<Box<dyn Draft>> {
        let _ = used;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Moves a file that an action left behind into the store. The file must be out of reach of other processes and
    /// unchanged since it was hashed. Returns `None` if it has to be copied instead. In that case its name may be gone,
    /// but the open file can still be read.
    fn adopt(&self, key: Key, left: &LeftFile<'_>) -> io::Result<Option<WrittenFile>>;

    /// Records the checksums of a stored file that has none. They were made while its content was verified.
    fn add_checksums(&self, file: &FileId, sums: &Checksums) -> io::Result<()> {
        let _ = (file, sums);
        Ok(())
    }

    /// Deletes stored files. A missing file is no error. Returns those that could not be deleted.
    fn delete(&self, victims: &[Victim]) -> Vec<(FileId, io::Error)>;

    /// Tries again to remove files, and to note deletions, for which [`Volume::delete`] has failed. Until this
    /// succeeds, their bytes are a part of [`Volume::overhead`].
    fn delete_again(&self) {}

    /// Records that these files are used now. `moved` gets the stamps that this changes.
    fn touch(&self, files: &[FileId], moved: &mut dyn FnMut(Vec<Moved>));

    /// Of two files with the same key, the newer one has the greater sequence. It may read the disk.
    fn sequence(&self, file: &FileId) -> u64 {
        file.generation
    }

    /// Whether [`Volume::compact`] should be called to reclaim the bytes of deleted files. Does not block.
    fn wants_compaction(&self) -> Option<Urgency> {
        None
    }

    /// Reclaims bytes of deleted files, in one step. It may have to copy files that are not deleted. `may_move` returns
    /// for each file whether it is stored and may be moved. The others are not copied. `relocate` receives the copies,
    /// and returns for each whether it took the place of its original. The other copies are deleted.
    fn compact(
        &self,
        may_move: &dyn Fn(&[FileId]) -> Vec<bool>,
        relocate: &mut dyn FnMut(Moves) -> Vec<bool>,
    ) -> io::Result<Compacted> {
        let _ = (may_move, relocate);
        Ok(Compacted::NothingToGain)
    }

    /// The number of stored files that are no files of the file system.
    fn packed_together(&self) -> u64 {
        0
    }

    /// Finds the files that exist at start and passes each of them to `take`. `is_whole` returns whether the bytes of
    /// an action result are complete. There may be more than one file with the same key.
    fn recover(&self, is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync), take: Take<'_>) -> Repairs;

    /// The parts that [`Volume::files_in`] lists one at a time, in an order that restarts do not change.
    fn parts(&self) -> Vec<String> {
        Vec::new()
    }

    /// The files in one part. Files that are written or deleted meanwhile may be missing or included.
    fn files_in(&self, part: &str) -> io::Result<Vec<FileId>> {
        let _ = part;
        Ok(Vec::new())
    }

    /// The latest note, which may be from an earlier run; `None` if there is no readable note.
    fn note(&self) -> Option<String> {
        None
    }

    /// Keeps a short note beside the files. It is on disk when this returns.
    fn keep_note(&self, note: &str) -> io::Result<()> {
        let _ = note;
        Ok(())
    }

    /// The position of a file's content on disk: a path and an offset.
    #[cfg(test)]
    fn place(&self, file: &FileId) -> Option<(std::path::PathBuf, u64)> {
        let _ = file;
        None
    }
}

/// A file to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewFile<'a> {
    /// The key of the file.
    pub key: Key,
    /// The content, which was verified.
    pub pieces: &'a [Bytes],
}

impl NewFile<'_> {
    /// The length of the content.
    pub(crate) fn size(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }
}

/// A file that was written and is not visible yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenFile {
    /// The identity under which the index will know it.
    pub file: FileId,
    /// Bytes that it takes on disk, which may be a little more than [`Volume::charge`] of its size.
    pub bytes: u64,
    /// Its stamp, at which its content was verified.
    pub stamp: Stamp,
}

/// How soon deleted bytes should be reclaimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// In the background, at a bounded rate.
    Background,
    /// Before further writes, which would exceed the disk space of the store.
    WritersWait,
}

/// Copies that [`Volume::compact`] has made.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Moves {
    /// The files, each with the generation of its copy.
    pub moved: Vec<(FileId, u64)>,
    /// Files that turned out to be damaged.
    pub lost: Vec<FileId>,
}

/// The outcome of a step of compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compacted {
    /// A part was reclaimed, and there may be more to do.
    Reclaimed,
    /// A part was tried and stays, because some of its files are in use. There may be more to do.
    Kept,
    /// No part that was not tried has enough to reclaim.
    NothingToGain,
}

/// An open stored file. It can be read to its end even if it is deleted meanwhile.
pub(crate) trait Stored: Debug + Send + Sync {
    /// Its current size and stamp.
    fn look(&self) -> io::Result<Look>;

    /// The content, if it is in memory and was checked against checksums when it was read.
    fn whole(&self) -> Option<Bytes> {
        None
    }

    /// Whether every read is checked against checksums that were made with the digest. Without checksums, errors of the
    /// disk are not noticed.
    fn is_checked_when_read(&self) -> bool {
        true
    }

    /// Reads at least one byte, unless the file ends at `offset`. A block that does not match its checksum is
    /// `InvalidData`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads bytes that are in the page cache into the spare capacity of a buffer. Does not block.
    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize>;

    /// Whether no other process has the file open for writing, as far as this can be known.
    fn nobody_writes(&self) -> bool;

    /// Copies the first `size` bytes into an empty file. Checksums are not checked if the kernel copies or clones the
    /// file.
    fn copy_to(&self, to: &File, size: u64) -> io::Result<()>;

    /// The zstd frames of the file; `None` if it is not kept compressed.
    fn frames(&self) -> Option<&dyn Frames> {
        None
    }
}

/// The zstd frames of a stored file that is kept compressed.
pub(crate) trait Frames {
    /// The table of the positions of the frames.
    fn table(&self) -> &SeekTable;

    /// Reads at least one byte of the frames, unless they end at `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// A file that is being written. It is deleted if it is dropped before it is kept.
pub(crate) trait Draft: Debug + Send + Sync {
    /// Appends bytes to the file.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Appends pieces to the file.
    fn write_pieces(&mut self, pieces: &[Bytes]) -> io::Result<()> {
        pieces.iter().try_for_each(|piece| self.write(piece))
    }

    /// The digest of everything written, computed by reading the file again.
    fn hash(&self, hasher: Hasher) -> io::Result<Digest>;

    /// Turns the draft into a stored file. The caller has verified its content.
    fn keep(self: Box<Self>, key: Key) -> io::Result<WrittenFile>;
}

/// The size and stamps of a stored file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// The length in bytes.
    pub size: u64,
    /// Differs after every change of the file.
    pub stamp: Stamp,
    /// The same stamp, or [`Stamp::UNTRUSTED`] while another change could leave the stamp as it is.
    pub lasting: Stamp,
}

/// A change of a stamp that the volume itself caused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Position of the file in the touched list.
    pub at: usize,
    /// The stamp before the change.
    pub before: Stamp,
    /// The stamp after the change.
    pub after: Stamp,
}

/// Receives the files that are found at start, several at a time. Several threads may call it.
pub(crate) type Take<'a> = &'a (dyn Fn(&mut dyn Iterator<Item = Recovered>) + Sync);

/// Counts of problems in the store at start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Repairs {
    /// Files that were removed because they were unfinished.
    pub removed: u64,
    /// Files with names that the store does not use. They are ignored.
    pub foreign: u64,
    /// Files and directories that could not be read.
    pub unreadable: u64,
}

impl std::ops::AddAssign for Repairs {
    fn add_assign(&mut self, other: Self) {
        self.removed += other.removed;
        self.foreign += other.foreign;
        self.unreadable += other.unreadable;
    }
}

/// Whether an error means that a stored file is lost: deleted, replaced by something else, cut short, damaged, or
/// unreadable on its disk. Other failures, such as too many open files, say nothing about the file.
pub(crate) fn is_lost(error: &io::Error) -> bool {
    let is_bad = error.raw_os_error() == Some(libc::EIO) || regular_file::is_something_else(error);
    is_bad
        || matches!(
            error.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::UnexpectedEof
                | io::ErrorKind::FileTooLarge
                | io::ErrorKind::InvalidData
        )
}

/// The digest of the bytes that `read_at` returns, from start to end.
pub(crate) fn hash(
    mut hasher: Hasher,
    mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<Digest> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match read_at(&mut piece, hasher.size()) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(read) => hasher.update(piece.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Fills the whole buffer.
pub(crate) fn read_exact(file: &dyn Stored, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                buffer = buffer.get_mut(read..).unwrap_or_default();
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a whole file of at most `max` bytes.
pub(crate) fn read_all(file: &dyn Stored, max: u64) -> io::Result<Vec<u8>> {
    if let Some(bytes) = file.whole().filter(|bytes| bytes.len() as u64 <= max) {
        return Ok(bytes.into());
    }
    let size = file.look()?.size;
    if size > max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    read_exact(file, &mut bytes, 0)?;
    Ok(bytes)
}
