//! Storing what a worker hands over: files that an action left behind, and bytes at hand.
//!
//! A file that nobody else can reach becomes the stored file itself: it is hashed where it lies, made read-only, and moved
//! to its stored name. All processes of the action are dead by then, and a read lease makes sure that nobody has the file open
//! for writing from before it is hashed until it is stored. Any other file is copied, and hashed as it is copied.

use crate::actors::cas::{
    client::{Cas, spoilt},
    guards::Reservation,
    index::{Key, Kind},
    new_files::NewFiles,
    settings::{FILES_PER_COMMIT, ROOM_AHEAD_BYTES, SOUND_TRIES},
    volume::{Draft, PIECE_BYTES, outside::LeftFile},
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use std::{collections::HashSet, fs::File, io};

/// Blobs that a worker stores together: room for them is taken ahead, and they become visible together. What was written when it
/// is dropped becomes visible too. Methods block and are for worker threads.
#[derive(Debug)]
pub struct OutputBatch {
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    /// What the caller says is still to come, in bytes on disk.
    expected: u64,
    /// What was written and is not visible yet, with room for more.
    files: NewFiles,
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
            files: self.new_files(Reservation::new(self.actor().clone(), 0)),
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
        let left = LeftFile::new(parent, name, file).map_err(failed)?;
        self.cas.check_blob_size(left.size(), name)?;
        let changed =
            || Error::Precondition(format!("output \"{}\" changed while it was stored", name.escape_debug()));
        let digest = left.hash(self.function.hasher(left.size())).map_err(failed)?;
        if digest.size() != left.size() {
            return Err(changed());
        }
        let Some(key) = self.make_room(digest)? else { return Ok(digest) };
        if self.files.adopt(key, &left).map_err(failed)?.is_none() {
            let copy = self.copy(digest, &left).map_err(failed)?.ok_or_else(changed)?;
            self.files.keep(key, copy, digest.size()).map_err(failed)?;
        }
        self.stored(digest);
        Ok(digest)
    }

    /// Stores bytes at hand.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        let digest = self.function.digest(&bytes);
        self.cas.check_blob_size(digest.size(), "the bytes at hand")?;
        let Some(key) = self.make_room(digest)? else { return Ok(digest) };
        self.files
            .write(key, &[Bytes::from(bytes)])
            .map_err(|error| Error::io(&format!("store blob {digest}"), &error))?;
        self.stored(digest);
        Ok(digest)
    }

    /// Returns when everything is visible to others.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn commit(mut self) -> Result<()> {
        match self.files.commit() {
            // The actor handles what it is told in order, so the last answer stands for all.
            Some(visible) => self.cas.block_on(async |_| visible.wait().await),
            None => Ok(()),
        }
    }

    /// Takes room for a blob; `None` when it is stored already.
    fn make_room(&mut self, digest: Digest) -> Result<Option<Key>> {
        let bytes = self.cas.shared().volume.charge(digest.size());
        let left = self.expected.saturating_sub(bytes);
        let ahead = std::mem::replace(&mut self.expected, left).min(ROOM_AHEAD_BYTES);
        if digest.is_empty() || self.stored.contains(&digest) {
            return Ok(None);
        }
        let (instance, room) = (&self.instance, self.files.room());
        let more = self.cas.block_on(async |cas| -> Result<_> {
            if cas.is_stored(instance, digest).await? {
                return Ok(None);
            }
            let Some(lacking) = bytes.checked_sub(room).filter(|lacking| *lacking > 0) else {
                return Ok(Some(None));
            };
            match cas.take_room(lacking.max(ahead)).await {
                // What is to come may be stored already, or be smaller.
                Err(_) if ahead > lacking => cas.take_room(lacking).await.map(Some).map(Some),
                room => room.map(Some).map(Some),
            }
        })?;
        let Some(more) = more else { return Ok(None) };
        if let Some(more) = more {
            self.files.add_room(more);
        }
        Ok(Some(Key { digest, instance: self.instance.blobs(), kind: Kind::Blob }))
    }

    fn stored(&mut self, digest: Digest) {
        self.stored.insert(digest);
        if self.files.len() >= FILES_PER_COMMIT {
            self.files.commit();
        }
    }

    /// Copies a file; `None` when it is not what it was when it was hashed.
    fn copy(&self, digest: Digest, left: &LeftFile<'_>) -> io::Result<Option<Box<dyn Draft>>> {
        let mut copy = self.cas.shared().volume.draft()?;
        let mut hasher = digest.hasher();
        let mut piece = vec![0; PIECE_BYTES];
        // One byte more than expected is enough to know.
        while hasher.size() <= digest.size() {
            let read = left.read_at(&mut piece, hasher.size())?;
            let Some(bytes) = piece.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            hasher.update(bytes);
            copy.write(bytes)?;
        }
        Ok((hasher.finish() == digest).then_some(copy))
    }
}
