//! Stores the outputs of workers: files, bytes in memory, and the action result.
//!
//! A file that no other process can reach becomes the stored file. It is hashed in place, made read-only, and moved to
//! its stored name. All processes of the action are dead by then. A read lease, taken before the file is hashed,
//! ensures that no process has it open for writing until it is stored. Any other file is copied, and hashed as it is
//! copied. A small file is read into memory and written together with other small files.

use super::{
    client::{Cas, Provenance, spoilt},
    guards::{Hold, Reservation},
    index::{EntryKind, Key},
    joint_writes::JOINT_FILE_BYTES,
    lookup::Purpose,
    new_files::{NewFiles, Visible},
    results::{DirectReferences, PreparedResult, Uploader},
    settings::{FILES_PER_COMMIT, MAX_LINKS, ROOM_AHEAD_BYTES, RUN_ROOM_BYTES, RUN_ROOM_PART, SOUND_TRIES},
    volume::{Draft, PIECE_BYTES, outside::LeftFile},
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read as _},
};

/// Blobs and the result that refers to them, which a worker stores together. Room is reserved ahead, and they become
/// visible together. If the batch is dropped, the files written so far become visible too. The methods block and are
/// for worker threads.
#[derive(Debug)]
pub struct OutputBatch {
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    /// Bytes on disk that the caller still expects to store.
    expected: u64,
    /// Written files that are not visible yet, with room for more.
    files: NewFiles,
    /// Every blob of the batch, including those already visible.
    stored: HashSet<Digest>,
    /// Holds of blobs that were stored before and that the result refers to.
    held: Vec<Hold>,
    /// Every blob that was handed over or held, whether or not it was stored before, up to the number of blobs that a
    /// result is linked to.
    handed_over: HashSet<Digest>,
}

impl Cas {
    /// Begins to store the outputs of an action, about `expected` bytes. Digests are computed with `function`.
    pub fn begin_outputs(&self, instance: &Instance, function: DigestFunction, expected: u64) -> OutputBatch {
        OutputBatch {
            cas: self.clone(),
            instance: instance.clone(),
            function,
            expected,
            files: self.new_files(Reservation::new(self.actor().clone(), 0)),
            stored: HashSet::new(),
            held: Vec::new(),
            handed_over: HashSet::new(),
        }
    }

    /// Whether a blob is stored and its file is intact. A damaged blob is dropped.
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
    /// Stores a file that an action left behind. A small file is read and written with the other small files of the
    /// batch. A larger file is moved into the store if no other process can reach it (one link, owned by this process,
    /// same file system, no writer); otherwise it is copied. `file` is open for reading, and `parent`/`name` is its
    /// path, which may be gone afterwards. Returns the digest.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `Invalid` when it exceeds the largest allowed blob; `Precondition` when the
    /// file changes meanwhile; the errors of reading and writing it.
    pub fn file(&mut self, parent: &File, name: &str, file: File) -> Result<Digest> {
        let failed =
            |error: io::Error| Error::io(&format!("store output \"{}\"", name.escape_debug()), &error);
        let changed =
            || Error::Precondition(format!("output \"{}\" changed while it was stored", name.escape_debug()));
        let size = file.metadata().map_err(failed)?.len();
        self.cas.check_blob_size(size, name)?;
        if size <= JOINT_FILE_BYTES {
            let content = read_small(&file, size).map_err(failed)?.ok_or_else(changed)?;
            return self.bytes(content);
        }
        let left = LeftFile::new(parent, name, file).map_err(failed)?;
        let digest = left.hash(self.function.hasher(left.size())).map_err(failed)?;
        if digest.size() != left.size() {
            return Err(changed());
        }
        let Some(key) = self.make_room(digest)? else { return Ok(digest) };
        if self.files.adopt(key, &left).map_err(failed)?.is_none() {
            let copy = self.cas.shared().disk.note_io(self.copy(digest, &left));
            let copy = copy.map_err(failed)?.ok_or_else(changed)?;
            self.files.keep(key, copy).map_err(failed)?;
        }
        self.add_stored(digest);
        Ok(digest)
    }

    /// Stores bytes from memory. A few bytes are written with other small files, at the latest by
    /// [`OutputBatch::publish`], which then reports the errors of writing them.
    ///
    /// # Errors
    /// `Exhausted` when there is no room; `Invalid` when they exceed the largest allowed blob; the errors of writing
    /// them.
    pub fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        let digest = self.function.digest(&bytes);
        self.cas.check_blob_size(digest.size(), "an output")?;
        let Some(key) = self.make_room(digest)? else { return Ok(digest) };
        let content = Bytes::from(bytes);
        if digest.size() <= JOINT_FILE_BYTES {
            self.files.write_soon(key, content)?;
        } else {
            let written = self.files.write(key, &[content]);
            written.map_err(|error| Error::io(&format!("store blob {digest}"), &error))?;
        }
        self.add_stored(digest);
        Ok(digest)
    }

    /// Holds stored blobs that the result will refer to until the end of the batch.
    ///
    /// # Errors
    /// `MissingBlobs` with the blobs that are not stored.
    pub fn hold(&mut self, mut digests: Vec<Digest>) -> Result<()> {
        digests.retain(|digest| !digest.is_empty());
        let instance = &self.instance;
        let located = self.cas.block_on(async |cas| cas.locate(instance, &digests, Purpose::Read).await)?;
        let (_, hold) = located.complete(&digests)?;
        digests.iter().for_each(|digest| self.note(*digest));
        self.held.push(hold);
        Ok(())
    }

    /// Sets the estimate of bytes on disk that are still to come.
    pub fn expect(&mut self, bytes: u64) {
        self.expected = bytes;
    }

    /// Adds the result of the action. It replaces an earlier one when the batch becomes visible (AC-08).
    ///
    /// # Errors
    /// `Exhausted` when there is no room for it; the rest of the batch is not affected.
    pub fn result(
        &mut self,
        action: Digest,
        result: reapi::ActionResult,
        provenance: Provenance,
    ) -> Result<()> {
        let mut prepared = PreparedResult::new(&self.instance, action, result, provenance, Uploader::Worker)?;
        for (_, bytes) in prepared.contents.iter() {
            self.bytes(bytes.to_vec())?;
        }
        // A result is not written before the blobs that it needs.
        self.files.write_waiting()?;
        prepared.references = self.references(&prepared.direct);
        let charge = prepared.charge(&self.cas);
        let ahead = std::mem::take(&mut self.expected);
        let lacking = self.files.lacks(charge);
        let more = self.cas.block_on(async |cas| take_room(&cas, lacking, ahead).await)?;
        self.files.add_room(more);
        self.cas.report_difference(&self.instance, &prepared);
        prepared.write(&self.cas, &mut self.files, &self.instance)?;
        self.publish_if_full();
        Ok(())
    }

    /// Makes everything stored so far visible, and waits for that. Remaining room is kept.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub fn publish(&mut self) -> Result<()> {
        let told = self.files.publish();
        wait_for(&self.cas, told)
    }

    /// Makes everything visible, and waits for that.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub fn commit(self) -> Result<()> {
        let told = self.files.commit();
        wait_for(&self.cas, told)
    }

    /// Reserves room for a blob; `None` when it is already stored.
    fn make_room(&mut self, digest: Digest) -> Result<Option<Key>> {
        self.note(digest);
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
        Ok(Some(Key { digest, instance: self.instance.blobs(), kind: EntryKind::Blob }))
    }

    /// Records a blob that the result of the batch may need.
    fn note(&mut self, digest: Digest) {
        if self.handed_over.len() <= MAX_LINKS {
            self.handed_over.insert(digest);
        }
    }

    /// Every blob that the result of this batch needs, including the contents of its Trees and Directories; `None` if
    /// there are too many to link, or if the result names a blob that is not in this batch.
    fn references(&self, direct: &DirectReferences) -> Option<Vec<Digest>> {
        let mut named = direct.blobs.iter().chain(&direct.trees).chain(&direct.roots);
        let is_of_batch = named.all(|digest| digest.is_empty() || self.handed_over.contains(digest));
        let is_known = is_of_batch && self.handed_over.len() <= MAX_LINKS;
        is_known.then(|| self.handed_over.iter().copied().collect())
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

    /// Copies a file; `None` when it has changed since it was hashed.
    fn copy(&self, digest: Digest, left: &LeftFile<'_>) -> io::Result<Option<Box<dyn Draft>>> {
        let mut copy = self.cas.shared().volume.draft()?;
        let mut hasher = digest.hasher();
        let mut piece = vec![0; PIECE_BYTES];
        // One byte too many is enough to detect a change.
        while hasher.size() <= digest.size() {
            let read = left.read_at(&mut piece, hasher.size())?;
            let Some(bytes) = piece.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            hasher.update(bytes);
            copy.write(bytes)?;
        }
        Ok((hasher.finish() == digest).then_some(copy))
    }
}

/// The content of a file of `size` bytes; `None` if it has another size by now.
fn read_small(file: &File, size: u64) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::with_capacity(size as usize + 1);
    file.take(size + 1).read_to_end(&mut content)?;
    Ok((content.len() as u64 == size).then_some(content))
}

/// Waits until handed-over files are visible. The actor handles messages in order, so the last answer covers all of
/// them.
fn wait_for(cas: &Cas, visible: Option<Visible>) -> Result<()> {
    match visible {
        Some(visible) => cas.block_on(async |_| visible.wait().await),
        None => Ok(()),
    }
}

/// Reserves the lacking room and, if possible, room for the expected bytes.
async fn take_room(cas: &Cas, lacking: u64, expected: u64) -> Result<Reservation> {
    if lacking == 0 {
        return Ok(Reservation::new(cas.actor().clone(), 0));
    }
    // One step is enough for the logs, outputs and result of a small action.
    let step = RUN_ROOM_BYTES.min(cas.shared().settings.max_bytes / RUN_ROOM_PART);
    let ahead = lacking.max(expected.min(ROOM_AHEAD_BYTES)).max(step);
    match cas.take_room(ahead).await {
        // The expected outputs may already be stored, or be smaller.
        Err(Error::Exhausted { .. }) if ahead > lacking => cas.take_room(lacking).await,
        room => room,
    }
}
