//! [`NewFiles`]: the one way into the store.
//!
//! Batches, uploads, outputs, results, zstd forms and chunks take the same steps: room is reserved, the bytes are checked, a new file
//! is written and stamped, it is charged, and the actor makes it visible. The steps from the file on are here. Room comes from
//! [`Cas::take_room`] when the size is known, and from a [`super::guards::Room`] that grows with the bytes when it is not.
//!
//! Invariant: every file that was written is handed to the actor, at the latest when this is dropped. So no file stays on disk that
//! nobody counts, and what is left of the room goes back.

use super::{
    CasActor, Shared,
    client::{Cas, going_down},
    guards::Reservation,
    index::{FileId, Key, Stamp},
    requests::{Commit, EndUpload, WrittenFile},
    settings::FILES_PER_COMMIT,
    uploads::Attempt,
    volume::{Draft, outside::LeftFile},
};
use actix::Addr;
use bytes::Bytes;
use gorego_reapi::error::Result;
use std::{io, sync::Arc};
use tokio::sync::oneshot;

/// Files that are written and not yet visible, with room for them.
#[derive(Debug)]
pub(super) struct NewFiles {
    store: Addr<CasActor>,
    shared: Arc<Shared>,
    /// For what was written, and for what is to come.
    room: Reservation,
    /// The part of it that what was written takes.
    spent: u64,
    written: Vec<WrittenFile>,
}

/// The answer to a commit.
#[derive(Debug)]
pub(super) struct Visible(oneshot::Receiver<()>);

impl Visible {
    /// Returns when the files are visible to everybody.
    ///
    /// # Errors
    /// `Unavailable` when the server is going down.
    pub(super) async fn wait(self) -> Result<()> {
        self.0.await.map_err(|_| going_down())
    }
}

impl NewFiles {
    /// None yet, with room for what is to come.
    pub(super) fn new(store: &Addr<CasActor>, shared: &Arc<Shared>, room: Reservation) -> Self {
        Self { store: store.clone(), shared: shared.clone(), room, spent: 0, written: Vec::new() }
    }

    /// How much room is lacking to write so many bytes more.
    pub(super) fn lacks(&self, bytes: u64) -> u64 {
        self.spent.saturating_add(bytes).saturating_sub(self.room.bytes())
    }

    /// Adds room.
    pub(super) fn add_room(&mut self, more: Reservation) {
        self.room.absorb(more);
    }

    /// Writes bytes that were checked before. Blocks.
    ///
    /// # Errors
    /// Those of the volume; nothing is left of the file then.
    pub(super) fn write(&mut self, key: Key, pieces: &[Bytes]) -> io::Result<FileId> {
        let file = self.next(key);
        let stamp = self.shared.volume.write(&file, pieces)?;
        let size = pieces.iter().map(|bytes| bytes.len() as u64).sum();
        Ok(self.add(file, size, stamp))
    }

    /// Keeps a draft of `size` bytes whose content was checked. Blocks.
    ///
    /// # Errors
    /// As [`NewFiles::write`].
    pub(super) fn keep(&mut self, key: Key, draft: Box<dyn Draft>, size: u64) -> io::Result<FileId> {
        let file = self.next(key);
        let stamp = draft.keep(&file)?;
        Ok(self.add(file, size, stamp))
    }

    /// Takes a file over that an action left behind, if that is safe; `None` when it has to be copied. Blocks.
    ///
    /// # Errors
    /// Those of the volume.
    pub(super) fn adopt(&mut self, key: Key, left: &LeftFile<'_>) -> io::Result<Option<FileId>> {
        let file = self.next(key);
        let stamp = self.shared.volume.adopt(&file, left)?;
        Ok(stamp.map(|stamp| self.add(file, left.size(), stamp)))
    }

    /// How many files wait to be made visible.
    pub(super) fn len(&self) -> usize {
        self.written.len()
    }

    /// Hands over what was written so far; room that is left is kept for what is to come. `None` when nothing was.
    pub(super) fn publish(&mut self) -> Option<Visible> {
        let room = self.room.split(self.spent);
        self.tell(room, None)
    }

    /// Hands over what was written, and what is left of the room. `None` when nothing was.
    pub(super) fn commit(mut self) -> Option<Visible> {
        let room = self.room.split(u64::MAX);
        self.tell(room, None)
    }

    /// The same of the blob of an upload, which is over then.
    pub(super) fn commit_upload(mut self, attempt: Attempt) -> Option<Visible> {
        let room = self.room.split(u64::MAX);
        self.tell(room, Some(attempt.into_end()))
    }

    /// Tells the actor of a few files at a time, so that none of these messages takes long.
    fn tell(&mut self, mut room: Reservation, mut upload: Option<EndUpload>) -> Option<Visible> {
        let mut files = std::mem::take(&mut self.written);
        self.spent = 0;
        let mut last = None;
        while !files.is_empty() || upload.is_some() {
            let rest = files.split_off(files.len().min(FILES_PER_COMMIT));
            let spent = files.iter().map(|file| file.bytes).sum();
            // What is left over is given back with the last of them.
            let room = room.split(if rest.is_empty() { u64::MAX } else { spent });
            let upload = if rest.is_empty() { upload.take() } else { None };
            let (reply, visible) = oneshot::channel();
            self.store.do_send(Commit { files, room, upload, reply });
            // What is told is handled in order, so the last answer stands for all.
            (last, files) = (Some(Visible(visible)), rest);
        }
        last
    }

    fn next(&self, key: Key) -> FileId {
        FileId { key, generation: self.shared.volume.next_generation() }
    }

    fn add(&mut self, file: FileId, size: u64, stamp: Stamp) -> FileId {
        let bytes = self.shared.volume.charge(size);
        self.spent = self.spent.saturating_add(bytes);
        self.written.push(WrittenFile { file, bytes, stamp });
        file
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        let room = self.room.split(u64::MAX);
        self.tell(room, None);
    }
}

impl Cas {
    /// Takes room for bytes that are at hand or about to come. Returns once files that had to go for it are gone.
    ///
    /// # Errors
    /// `Exhausted` when there is none.
    pub(super) async fn take_room(&self, bytes: u64) -> Result<Reservation> {
        Reservation::take(self.actor(), bytes).await
    }

    /// Files to come, with room that was taken for them.
    pub(super) fn new_files(&self, room: Reservation) -> NewFiles {
        NewFiles::new(self.actor(), self.shared(), room)
    }
}
