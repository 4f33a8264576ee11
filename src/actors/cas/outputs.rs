//! Storing what a worker hands over: files that an action left behind, and bytes at hand.
//!
//! A file that nobody else can reach becomes the stored file itself: it is hashed where it lies, made read-only, and linked
//! to its stored name. All processes of the action are dead by then and its directory is removed soon after, so nobody is
//! left who could write it. Any other file is copied, and hashed as it is copied.

use super::{
    blob::{PIECE_BYTES, hash_file, stamp_of},
    client::Cas,
    files::{STORED_MODE, TemporaryFile, in_shard},
    guards::Reservation,
    index::{FileId, Key, Kind, Stamp},
    requests::{Commit, Prepare, WrittenFile},
    writer::write_new,
};
use crate::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    instance::Instance,
};
use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, Mode, fchmod, linkat};
use std::{
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

impl Cas {
    /// Stores a file that an action left behind, from a worker thread: takes the file itself over when nobody else can reach
    /// it (one link, ours, same file system), copies it otherwise. `file` is open for reading, `parent`/`name` is where it
    /// lies; it still lies there afterwards, but is the store's and must not be written. Returns its digest.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `Invalid` when it is larger than the largest blob allowed.
    pub fn store_output(
        &self,
        instance: &Instance,
        function: DigestFunction,
        parent: &File,
        name: &str,
        file: File,
    ) -> Result<Digest> {
        let failed =
            |error: io::Error| Error::io(&format!("store output \"{}\"", name.escape_debug()), &error);
        let before = file.metadata().map_err(failed)?;
        self.check_blob_size(before.len(), name)?;
        let changed =
            || Error::Precondition(format!("output \"{}\" changed while it was stored", name.escape_debug()));
        let digest = hash_file(&file, function.hasher(before.len())).map_err(failed)?;
        if digest.size() != before.len() {
            return Err(changed());
        }
        let Some(room) = self.room_for(instance, digest)? else { return Ok(digest) };
        let id = self.new_file(instance, digest);
        let stamp = match self.adopt(&id, &before, parent, name, &file).map_err(failed)? {
            Some(stamp) => stamp,
            None => self.copy_in(&id, &file).map_err(failed)?.ok_or_else(changed)?,
        };
        self.commit_and_wait(id, stamp, room)?;
        Ok(digest)
    }

    /// Stores bytes at hand, from a worker thread.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub fn store_bytes(
        &self,
        instance: &Instance,
        function: DigestFunction,
        bytes: Vec<u8>,
    ) -> Result<Digest> {
        let digest = function.digest(&bytes);
        self.check_blob_size(digest.size(), "the bytes at hand")?;
        let Some(room) = self.room_for(instance, digest)? else { return Ok(digest) };
        let id = self.new_file(instance, digest);
        let metadata = write_new(&self.shared().files.path(&id), &[Bytes::from(bytes)])
            .map_err(|error| Error::io(&format!("store blob {digest}"), &error))?;
        self.commit_and_wait(id, stamp_of(&metadata), room)?;
        Ok(digest)
    }

    /// Room for a blob; `None` when it is stored already.
    fn room_for(&self, instance: &Instance, digest: Digest) -> Result<Option<Reservation>> {
        if digest.is_empty() {
            return Ok(None);
        }
        let prepared = self.block_on(async |cas| {
            cas.ask(Prepare { instance: instance.blobs(), digests: vec![digest] }).await
        })?;
        if prepared.absent.is_empty() { Ok(None) } else { prepared.room.map(Some) }
    }

    fn new_file(&self, instance: &Instance, digest: Digest) -> FileId {
        let key = Key { digest, instance: instance.blobs(), kind: Kind::Blob };
        FileId { key, generation: self.shared().files.next_generation() }
    }

    fn commit_and_wait(&self, file: FileId, stamp: Stamp, room: Reservation) -> Result<()> {
        let bytes = self.shared().files.charge(file.key.digest.size());
        let visible = Commit::tell(self.actor(), WrittenFile { file, bytes, stamp }, room);
        self.block_on(async |_| visible.await).map_err(|_| super::client::going_down())
    }

    /// Makes a file itself the stored one, if that is safe.
    fn adopt(
        &self,
        id: &FileId,
        before: &Metadata,
        parent: &File,
        name: &str,
        file: &File,
    ) -> io::Result<Option<Stamp>> {
        let ours =
            before.is_file() && before.nlink() == 1 && before.uid() == rustix::process::geteuid().as_raw();
        if !ours {
            return Ok(None);
        }
        let path = self.shared().files.path(id);
        fchmod(file, Mode::from_raw_mode(STORED_MODE))?;
        if in_shard(&path, || Ok(linkat(parent, name, CWD, &path, AtFlags::empty())?)).is_err() {
            // Another file system, or one that has no links.
            return Ok(None);
        }
        let (after, linked) = (file.metadata()?, fs::symlink_metadata(&path)?);
        let same = (after.dev(), after.ino()) == (linked.dev(), linked.ino());
        let unchanged = after.len() == id.key.digest.size() && stamp_of(&after) == stamp_of(before);
        if same && unchanged && after.nlink() == 2 {
            return Ok(Some(stamp_of(&after)));
        }
        fs::remove_file(&path)?;
        Ok(None)
    }

    /// Copies a file in; `None` when it is not what it was when it was hashed.
    fn copy_in(&self, id: &FileId, file: &File) -> io::Result<Option<Stamp>> {
        let files = &self.shared().files;
        let mut copy = TemporaryFile::create(files.temporary_path(id.generation))?;
        let mut hasher = id.key.digest.hasher();
        let mut piece = vec![0; PIECE_BYTES];
        // One byte more than expected is enough to know.
        while hasher.size() <= id.key.digest.size() {
            let read = file.read_at(&mut piece, hasher.size())?;
            let Some(bytes) = piece.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            hasher.update(bytes);
            copy.file.write_all(bytes)?;
        }
        if hasher.finish() != id.key.digest {
            return Ok(None);
        }
        let stamp = stamp_of(&copy.file.metadata()?);
        copy.keep_as(&files.path(id))?;
        Ok(Some(stamp))
    }
}
