//! Files that do not belong to the store: [`LeftFile`], which an action left behind, and [`NewInput`], which an action
//! gets.
//!
//! They are in the directories of workers on this machine, whatever the store's volume is.

use super::{
    checksums::{ChecksumBuilder, Checksums},
    hash, stamps,
};
use bytes::Bytes;
use gorego_reapi::digest::{Digest, Hasher};
use rustix::fs::{Mode, OFlags, fchmod, openat};
use std::{
    cell::OnceCell,
    fs::{File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

/// A file that an action left behind, open for reading. All processes of the action are dead. While this is held, a
/// read lease keeps others from opening the file for writing, or has shown that a process already has it open.
#[derive(Debug)]
pub(crate) struct LeftFile<'a> {
    pub(super) file: File,
    /// The directory of the file.
    pub(super) parent: &'a File,
    pub(super) name: &'a str,
    /// Its metadata before it was hashed.
    pub(super) before: Metadata,
    writers: stamps::Writers,
    /// The checksums of the content that was hashed.
    sums: OnceCell<Checksums>,
}

impl<'a> LeftFile<'a> {
    /// The file `name` in `parent`.
    pub(crate) fn new(parent: &'a File, name: &'a str, file: File) -> io::Result<Self> {
        let writers = stamps::lease(&file);
        let before = file.metadata()?;
        Ok(Self { file, parent, name, before, writers, sums: OnceCell::new() })
    }

    /// The size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.before.len()
    }

    /// The digest of its content.
    pub(crate) fn hash(&self, hasher: Hasher) -> io::Result<Digest> {
        let mut sums = ChecksumBuilder::default();
        let digest = hash(hasher, |piece, at| {
            let read = self.file.read_at(piece, at)?;
            sums.update(piece.get(..read).unwrap_or_default());
            Ok(read)
        })?;
        let _ = self.sums.set(sums.finish());
        Ok(digest)
    }

    /// The checksums of the content that was hashed first, if it was.
    pub(super) fn checksums(&self) -> Option<&Checksums> {
        self.sums.get()
    }

    /// Reads bytes from `offset`.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    /// Its content, if it has this digest. It is hashed again unless a lease and its times show that it has not changed
    /// since it was hashed.
    pub(super) fn read_unchanged(&self, digest: Digest) -> io::Result<Option<Bytes>> {
        let mut bytes = vec![0; usize::try_from(self.size()).map_err(io::Error::other)?];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.read_at(rest, filled as u64)? {
                0 => return Ok(None),
                read => filled += read,
            }
        }
        let is_leased = self.writers == stamps::Writers::ShutOut;
        let after = self.file.metadata()?;
        let unchanged =
            after.len() == self.size() && stamps::stamp_of(&after) == stamps::stamp_of(&self.before);
        if (is_leased && unchanged) || digest.function().digest(&bytes) == digest {
            return Ok(Some(bytes.into()));
        }
        Ok(None)
    }

    /// Whether no other process can reach the file: it is a regular file owned by this process, with one name and no
    /// writer.
    pub(super) fn is_ours_alone(&self) -> bool {
        self.writers != stamps::Writers::Present
            && self.before.is_file()
            && self.before.nlink() == 1
            && self.before.uid() == rustix::process::geteuid().as_raw()
    }
}

/// An input file that is created for an action.
#[derive(Debug)]
pub(crate) struct NewInput(File);

impl NewInput {
    /// Creates an empty file. If an earlier node has made a link of this name, this is an error, so that no link leads
    /// out of the directory.
    pub(crate) fn create(parent: &File, name: &str) -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self(openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?.into()))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// The file, to copy into it.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// Sets its permission bits, regardless of the umask.
    pub(crate) fn finish(self, mode: u32) -> io::Result<()> {
        Ok(fchmod(&self.0, Mode::from_raw_mode(mode & 0o7777))?)
    }
}
