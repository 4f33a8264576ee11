//! Storing what a worker hands over: files that an action left behind, bytes at hand, and the result.
//!
//! A file that nobody else can reach becomes the stored file itself: it is hashed where it lies, made read-only, and moved
//! to its stored name. All processes of the action are dead by then, and a read lease makes sure that nobody has the file open
//! for writing from before it is hashed until it is stored. Any other file is copied, and hashed as it is copied.

use super::{
    action_cache::PreparedResult,
    blob::{PIECE_BYTES, hash_file},
    client::{Cas, Provenance, going_down, spoilt},
    files::{STORED_MODE, TemporaryFile, in_shard},
    guards::Reservation,
    index::{FileId, Key, Kind, Stamp},
    requests::{Commit, WrittenFile},
    results::Uploader,
    settings::{FILES_PER_COMMIT, ROOM_AHEAD_BYTES, RUN_ROOM_BYTES, RUN_ROOM_PART, SOUND_TRIES},
    stamps::{Writers, lease},
    writer::write_new,
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use rustix::fs::{CWD, Mode, fchmod, renameat};
use std::{
    collections::HashSet,
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
};
use tokio::sync::oneshot;

/// What a worker stores together, blobs and the result that refers to them: room for them is taken ahead, and they become visible
/// together. What was written when it is dropped becomes visible too. Methods block and are for worker threads.
#[derive(Debug)]
pub struct OutputBatch {
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    /// What the caller says is still to come, in bytes on disk.
    expected: u64,
    /// For what was written, and for what is to come.
    room: Reservation,
    /// Bytes on disk of what was written.
    spent: u64,
    written: Vec<WrittenFile>,
    /// All of it, also what was made visible already.
    stored: HashSet<Digest>,
}

impl Cas {
    /// Begins to store what an action of this function has made; about `expected` bytes.
    pub fn begin_outputs(&self, instance: &Instance, function: DigestFunction, expected: u64) -> OutputBatch {
        OutputBatch {
            cas: self.clone(),
            instance: instance.clone(),
            function,
            expected,
            room: Reservation::new(self.actor().clone(), 0),
            spent: 0,
            written: Vec::new(),
            stored: HashSet::new(),
        }
    }

    /// Whether a blob is stored and its file is as it should be; a bad one is dropped.
    async fn is_stored(&self, instance: &Instance, digest: Digest) -> Result<bool> {
        for _ in 0..SOUND_TRIES {
            if !self.find_missing(instance, &[digest]).await?.is_empty() {
                return Ok(false);
            }
            if self.are_sound(instance, vec![digest]).await? {
                return Ok(true);
            }
        }
        Err(spoilt())
    }
}

impl OutputBatch {
    /// Stores a file that an action left behind: takes the file itself over when nobody else can reach it (one link, ours, same
    /// file system, no writer), copies it otherwise. `file` is open for reading, `parent`/`name` is where it lies, and may not
    /// lie any more afterwards. Returns its digest.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `Invalid` when it is larger than the largest blob allowed.
    pub fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest> {
        let failed =
            |error: io::Error| Error::io(&format!("store output \"{}\"", name.escape_debug()), &error);
        // Held until `file` is closed.
        let writers = lease(&file);
        let before = file.metadata().map_err(failed)?;
        self.cas.check_blob_size(before.len(), name)?;
        let changed =
            || Error::Precondition(format!("output \"{}\" changed while it was stored", name.escape_debug()));
        let digest = hash_file(&file, self.function.hasher(before.len())).map_err(failed)?;
        if digest.size() != before.len() {
            return Err(changed());
        }
        let Some(id) = self.make_room(digest)? else { return Ok(digest) };
        let adopted = match writers {
            Writers::Present => None,
            Writers::ShutOut | Writers::Unknown => {
                self.cas.adopt(&id, &before, parent, name, &file).map_err(failed)?
            }
        };
        let stamp = match adopted {
            Some(stamp) => stamp,
            None => self.cas.copy_in(&id, &file).map_err(failed)?.ok_or_else(changed)?,
        };
        self.push_blob(id, stamp);
        Ok(digest)
    }

    /// Stores bytes at hand.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        let digest = self.function.digest(&bytes);
        self.cas.check_blob_size(digest.size(), "the bytes at hand")?;
        let Some(id) = self.make_room(digest)? else { return Ok(digest) };
        let files = &self.cas.shared().files;
        let stamp = write_new(files, &files.path(&id), &[Bytes::from(bytes)])
            .map_err(|error| Error::io(&format!("store blob {digest}"), &error))?;
        self.push_blob(id, stamp);
        Ok(digest)
    }

    /// Says that about so many bytes on disk are still to come.
    pub fn expect(&mut self, bytes: u64) {
        self.expected = bytes;
    }

    /// Adds the result of the action that made all this. It replaces an earlier one when all of it becomes visible (AC-08).
    ///
    /// # Errors
    /// `Exhausted` when there is no room for it; what else is in the batch is not concerned.
    pub fn result(
        &mut self,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<()> {
        let prepared = PreparedResult::new(&self.instance, action, result, provenance, Uploader::Worker)?;
        for (_, bytes) in prepared.contents.iter() {
            self.bytes(bytes.to_vec())?;
        }
        let charge = prepared.charge(&self.cas);
        let ahead = std::mem::take(&mut self.expected);
        let (room, spent) = (&self.room, self.spent);
        let more = self.cas.block_on(async |cas| take_room(&cas, charge, room, spent, ahead).await)?;
        self.room.absorb(more);
        let written = prepared.write(&self.cas, self.instance.id())?;
        self.push(written);
        Ok(())
    }

    /// Returns when all that was stored so far is visible to others. Room that is left is kept for what is to come.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn publish(&mut self) -> Result<()> {
        let room = self.room.split(self.spent);
        let told = self.tell(room);
        self.wait_for(told)
    }

    /// Returns when everything is visible to others.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn commit(mut self) -> Result<()> {
        let room = self.room.split(u64::MAX);
        let told = self.tell(room);
        self.wait_for(told)
    }

    /// The actor handles what it is told in order, so the last answer stands for all.
    fn wait_for(&self, visible: Option<oneshot::Receiver<()>>) -> Result<()> {
        match visible {
            Some(visible) => self.cas.block_on(async |_| visible.await).map_err(|_| going_down()),
            None => Ok(()),
        }
    }

    /// A new file for a blob, with room for it; `None` when it is stored already.
    fn make_room(&mut self, digest: Digest) -> Result<Option<FileId>> {
        let bytes = self.cas.shared().files.charge(digest.size());
        let left = self.expected.saturating_sub(bytes);
        let ahead = std::mem::replace(&mut self.expected, left);
        if digest.is_empty() || self.stored.contains(&digest) {
            return Ok(None);
        }
        let (instance, room, spent) = (&self.instance, &self.room, self.spent);
        let more = self.cas.block_on(async |cas| -> Result<_> {
            if cas.is_stored(instance, digest).await? {
                return Ok(None);
            }
            take_room(&cas, bytes, room, spent, ahead).await.map(Some)
        })?;
        let Some(more) = more else { return Ok(None) };
        self.room.absorb(more);
        let key = Key { digest, instance: self.instance.blobs(), kind: Kind::Blob };
        Ok(Some(FileId { key, generation: self.cas.shared().files.next_generation() }))
    }

    fn push_blob(&mut self, file: FileId, stamp: Stamp) {
        let bytes = self.cas.shared().files.charge(file.key.digest.size());
        self.stored.insert(file.key.digest);
        self.push(WrittenFile { file, bytes, stamp });
    }

    fn push(&mut self, written: WrittenFile) {
        self.spent += written.bytes;
        self.written.push(written);
        if self.written.len() >= FILES_PER_COMMIT {
            let room = self.room.split(self.spent);
            self.tell(room);
        }
    }

    /// Tells the actor of what was written, with the room for it; the answer comes once it is visible.
    fn tell(&mut self, room: Reservation) -> Option<oneshot::Receiver<()>> {
        self.spent = 0;
        Commit::tell_all(self.cas.actor(), std::mem::take(&mut self.written), room)
    }
}

/// Room for `bytes` more than `spent`, as far as `room` does not cover it; and for what is expected to come, if there is any to
/// be had.
async fn take_room(
    cas: &Cas,
    bytes: u64,
    room: &Reservation,
    spent: u64,
    expected: u64,
) -> Result<Reservation> {
    let lacking = spent.saturating_add(bytes).saturating_sub(room.bytes());
    if lacking == 0 {
        return Ok(Reservation::new(cas.actor().clone(), 0));
    }
    // A small action stores its logs, its outputs and its result with one step.
    let step = RUN_ROOM_BYTES.min(cas.shared().settings.max_bytes / RUN_ROOM_PART);
    let ahead = lacking.max(expected.min(ROOM_AHEAD_BYTES)).max(step);
    match Reservation::take(cas.actor(), ahead).await {
        // What is to come may be stored already, or be smaller.
        Err(Error::Exhausted { .. }) if ahead > lacking => Reservation::take(cas.actor(), lacking).await,
        room => room,
    }
}

impl Drop for OutputBatch {
    fn drop(&mut self) {
        let room = self.room.split(u64::MAX);
        self.tell(room);
    }
}

impl Cas {
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
