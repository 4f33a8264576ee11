//! Storing what a worker hands over: files that an action left behind, bytes at hand, and the result.
//!
//! A file that nobody else can reach becomes the stored file itself: it is hashed where it lies, made read-only, and moved
//! to its stored name. All processes of the action are dead by then, and a read lease makes sure that nobody has the file open
//! for writing from before it is hashed until it is stored. Any other file is copied, and hashed as it is copied.

use super::{
    client::{Cas, Provenance, spoilt},
    guards::Reservation,
    index::{Key, Kind},
    new_files::{NewFiles, Visible},
    results::{PreparedResult, Uploader},
    settings::{FILES_PER_COMMIT, ROOM_AHEAD_BYTES, RUN_ROOM_BYTES, RUN_ROOM_PART, SOUND_TRIES},
    volume::{Draft, PIECE_BYTES, outside::LeftFile},
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use std::{collections::HashSet, fs::File, io};

/// What a worker stores together, blobs and the result that refers to them: room for them is taken ahead, and they become visible
/// together. What was written when it is dropped becomes visible too. Methods block and are for worker threads.
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
        self.add_stored(digest);
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
        self.add_stored(digest);
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
        let lacking = self.files.lacks(charge);
        let more = self.cas.block_on(async |cas| take_room(&cas, lacking, ahead).await)?;
        self.files.add_room(more);
        prepared.write(&self.cas, &mut self.files, self.instance.id())?;
        self.publish_if_full();
        Ok(())
    }

    /// Returns when all that was stored so far is visible to others. Room that is left is kept for what is to come.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn publish(&mut self) -> Result<()> {
        let told = self.files.publish();
        wait_for(&self.cas, told)
    }

    /// Returns when everything is visible to others.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub fn commit(self) -> Result<()> {
        let told = self.files.commit();
        wait_for(&self.cas, told)
    }

    /// Takes room for a blob; `None` when it is stored already.
    fn make_room(&mut self, digest: Digest) -> Result<Option<Key>> {
        let bytes = self.cas.shared().volume.charge(digest.size());
        let left = self.expected.saturating_sub(bytes);
        let ahead = std::mem::replace(&mut self.expected, left);
        if digest.is_empty() || self.stored.contains(&digest) {
            return Ok(None);
        }
        let (instance, lacking) = (&self.instance, self.files.lacks(bytes));
        let more = self.cas.block_on(async |cas| -> Result<_> {
            if cas.is_stored(instance, digest).await? {
                return Ok(None);
            }
            take_room(&cas, lacking, ahead).await.map(Some)
        })?;
        let Some(more) = more else { return Ok(None) };
        self.files.add_room(more);
        Ok(Some(Key { digest, instance: self.instance.blobs(), kind: Kind::Blob }))
    }

    fn add_stored(&mut self, digest: Digest) {
        self.stored.insert(digest);
        self.publish_if_full();
    }

    fn publish_if_full(&mut self) {
        if self.files.len() >= FILES_PER_COMMIT {
            self.files.publish();
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

/// The actor handles what it is told in order, so the last answer stands for all.
fn wait_for(cas: &Cas, visible: Option<Visible>) -> Result<()> {
    match visible {
        Some(visible) => cas.block_on(async |_| visible.wait().await),
        None => Ok(()),
    }
}

/// The room that is lacking, and room for what is expected to come, if there is any to be had.
async fn take_room(cas: &Cas, lacking: u64, expected: u64) -> Result<Reservation> {
    if lacking == 0 {
        return Ok(Reservation::new(cas.actor().clone(), 0));
    }
    // A small action stores its logs, its outputs and its result with one step.
    let step = RUN_ROOM_BYTES.min(cas.shared().settings.max_bytes / RUN_ROOM_PART);
    let ahead = lacking.max(expected.min(ROOM_AHEAD_BYTES)).max(step);
    match cas.take_room(ahead).await {
        // What is to come may be stored already, or be smaller.
        Err(Error::Exhausted { .. }) if ahead > lacking => cas.take_room(lacking).await,
        room => room,
    }
}
