//! How stored bytes lie on disk.
//!
//! [`Volume`] is all that the rest of the store knows of it. A stored file is named by its [`FileId`]. It is written once, opened,
//! touched and deleted, and never changed. [`files::Files`] keeps each in a file of its own below one directory. A segment store,
//! an object store or a shard on another machine would be another implementation of the trait: nothing outside this module names
//! a path or a call of the file system, which `tests/tidy` checks.
//!
//! A volume decides nothing. The index says which files there are and which of them go; callers say whether a content is right. A
//! volume knows the words of the index and nothing else of the store. All calls block, unless their documentation says otherwise,
//! and are made on blocking threads. One call through a `dyn` costs a few nanoseconds, and each of them makes a system call.
//!
//! [`outside`] has the files that are not the store's: what actions left behind, and what they get.

pub(crate) mod draft;
pub(crate) mod files;
#[cfg(test)]
pub(crate) mod memory;
pub(crate) mod outside;
pub(crate) mod scan;
pub(crate) mod stamps;
pub(crate) mod stored;

pub(crate) use stamps::COARSE_TICK;

use super::index::{FileId, Stamp};
use crate::{disk::Space, regular_file};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, Hasher};
use outside::LeftFile;
use std::{fmt::Debug, fs::File, io};

/// Pieces in which a large file is hashed or copied.
pub(crate) const PIECE_BYTES: usize = 256 * 1024;

/// Where stored files lie.
pub(crate) trait Volume: Debug + Send + Sync {
    /// A number that no file of this volume has or had. Does not block.
    fn next_generation(&self) -> u64;

    /// Bytes that a file of this size takes. Does not block.
    fn charge(&self, size: u64) -> u64;

    /// The room that is left beneath it.
    fn space(&self) -> io::Result<Space>;

    /// Opens a stored file.
    fn open(&self, file: &FileId) -> io::Result<Box<dyn Stored>>;

    /// What a stored file looks like, without opening it.
    fn look(&self, file: &FileId) -> io::Result<Look>;

    /// Writes bytes that were checked before to a new file; leaves none behind if that fails. Returns what the file is known by.
    fn write(&self, file: &FileId, pieces: &[Bytes]) -> io::Result<Stamp>;

    /// Begins a file whose name is not known yet.
    fn draft(&self) -> io::Result<Box<dyn Draft>>;

    /// Makes a file that an action left behind the stored one, if nobody else can reach it and it still is what it was when it was
    /// hashed. Returns what it is known by. `None` means that it has to be copied; it may be gone from its place by then, and can
    /// still be read.
    fn adopt(&self, file: &FileId, left: &LeftFile<'_>) -> io::Result<Option<Stamp>>;

    /// Deletes a stored file. One that is gone already is no error.
    fn delete(&self, file: &FileId) -> io::Result<()>;

    /// Writes down that these files are used now. `moved` is told of the stamps that this changes.
    fn touch(&self, files: &[FileId], moved: &mut dyn FnMut(Vec<Moved>));

    /// Finds the files that are there at start. `is_whole` tells a whole action result from the beginning of one; `take` gets each
    /// file and returns one that is to be deleted: this one, or an earlier one whose place it took.
    fn recover(
        &self,
        is_whole: &(dyn Fn(&dyn Stored) -> bool + Sync),
        take: &mut dyn FnMut(Recovered) -> Option<FileId>,
    ) -> Repairs;
}

/// A stored file that is open. It can be read to its end even if it is deleted meanwhile.
pub(crate) trait Stored: Debug + Send + Sync {
    /// What it looks like now.
    fn look(&self) -> io::Result<Look>;

    /// Reads at least one byte, unless the file ends at `offset`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads what is in memory already into the spare capacity of a buffer. Does not block.
    fn read_cached(&self, buffer: &mut Vec<u8>, offset: u64) -> io::Result<usize>;

    /// Whether no other process has it open for writing, as far as that can be known.
    fn nobody_writes(&self) -> bool;

    /// Copies its first `size` bytes into an empty file.
    fn copy_to(&self, to: &File, size: u64) -> io::Result<()>;
}

/// A file that is being written. It is deleted when it is dropped before it was kept.
pub(crate) trait Draft: Debug + Send + Sync {
    /// Adds bytes at its end.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// The digest of all that was written, by reading it once more.
    fn hash(&self, hasher: Hasher) -> io::Result<Digest>;

    /// Makes it the stored file of this name. Its content was checked. Returns what it is known by.
    fn keep(self: Box<Self>, file: &FileId) -> io::Result<Stamp>;
}

/// What a stored file looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// Its length in bytes.
    pub size: u64,
    /// Moves with every change of it.
    pub stamp: Stamp,
    /// The same, or [`Stamp::UNTRUSTED`] while another change could leave the stamp as it is.
    pub lasting: Stamp,
}

/// A change of a stamp that the volume itself has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Position of the file in the list that was touched.
    pub at: usize,
    /// The stamp before.
    pub before: Stamp,
    /// The stamp after.
    pub after: Stamp,
}

/// A file that was found at start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recovered {
    /// Which.
    pub file: FileId,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Seconds since 1970 of the last use that was written down.
    pub touched: u32,
}

/// What was wrong at start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Repairs {
    /// Files that were removed: unfinished, or doubled.
    pub removed: u64,
    /// Names that this store does not give. They are left alone.
    pub foreign: u64,
    /// Files and directories that could not be read.
    pub unreadable: u64,
}

/// Whether a failed call says that a stored file is lost: gone, replaced by something else, cut short, or not readable from its
/// disk. Other failures, such as too many open files, say nothing of it.
pub(crate) fn is_lost(error: &io::Error) -> bool {
    let is_bad = error.raw_os_error() == Some(libc::EIO) || regular_file::is_something_else(error);
    is_bad
        || matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::FileTooLarge
        )
}

/// The digest of what `read_at` gives, from the start to the end.
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

/// Reads exactly as many bytes as the buffer has.
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

/// Reads all of a file that has at most `max` bytes.
pub(crate) fn read_all(file: &dyn Stored, max: u64) -> io::Result<Vec<u8>> {
    let size = file.look()?.size;
    if size > max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    read_exact(file, &mut bytes, 0)?;
    Ok(bytes)
}
