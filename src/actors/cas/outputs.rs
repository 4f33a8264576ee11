//! Storing what a worker hands over: files that an action left behind, and bytes at hand.
//!
//! A file that nobody else can reach becomes the stored file itself: it is hashed where it lies, made read-only, and moved
//! to its stored name. All processes of the action are dead by then, and a read lease makes sure that nobody has the file open
//! for writing from before it is hashed until it is stored. Any other file is copied, and hashed as it is copied.

use super::{
    blob::{PIECE_BYTES, hash_file},
    client::Cas,
    files::{STORED_MODE, TemporaryFile, in_shard},
    guards::Reservation,
    index::{FileId, Key, Kind, Stamp},
    requests::{Commit, WrittenFile},
    stamps::{Writers, lease},
    writer::write_new,
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use rustix::fs::{CWD, Mode, fchmod, renameat};
use std::{
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

impl Cas {
    /// Stores a file that an action left behind, from a worker thread: takes the file itself over when nobody else can reach
    /// it (one link, ours, same file system, no writer), copies it otherwise. `file` is open for reading, `parent`/`name` is
    /// where it lies, and may not lie any more afterwards. Returns its digest.
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
        // Held until `file` is closed.
        let writers = lease(&file);
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
        let adopted = match writers {
            Writers::Present => None,
            Writers::ShutOut | Writers::Unknown => {
                self.adopt(&id, &before, parent, name, &file).map_err(failed)?
            }
        };
        let stamp = match adopted {
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
        let files = &self.shared().files;
        let stamp = write_new(files, &files.path(&id), &[Bytes::from(bytes)])
            .map_err(|error| Error::io(&format!("store blob {digest}"), &error))?;
        self.commit_and_wait(id, stamp, room)?;
        Ok(digest)
    }

    /// Room for a blob; `None` when it is stored already.
    fn room_for(&self, instance: &Instance, digest: Digest) -> Result<Option<Reservation>> {
        if digest.is_empty() {
            return Ok(None);
        }
        let prepared = self.block_on(async |cas| cas.prepare(instance, vec![digest]).await)?;
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
        if in_shard(&path, || Ok(renameat(parent, name, CWD, &path)?)).is_err() {
            // Another file system.
            return Ok(None);
        }
        let (after, moved) = (file.metadata()?, fs::symlink_metadata(&path)?);
        let same = (after.dev(), after.ino()) == (moved.dev(), moved.ino());
        let times = |metadata: &Metadata| (metadata.mtime(), metadata.mtime_nsec());
        let unchanged = after.len() == id.key.digest.size() && times(&after) == times(before);
        if same && unchanged && after.nlink() == 1 {
            return Ok(Some(self.shared().files.stamp(&after)));
        }
        self.shared().files.delete(id)?;
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
        files.keep(copy, &files.path(id)).map(Some)
    }
}
