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
    requests::{Commit, Reserve, WrittenFile},
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
    room: Reservation,
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
        Self { store: store.clone(), shared: shared.clone(), room, written: Vec::new() }
    }

    /// Room that is not used up yet.
    pub(super) fn room(&self) -> u64 {
        let used = self.written.iter().map(|file| file.bytes).fold(0, u64::saturating_add);
        self.room.bytes().saturating_sub(used)
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

    /// Hands over what was written, with all of the room. `None` when nothing was.
    pub(super) fn commit(&mut self) -> Option<Visible> {
        if self.written.is_empty() {
            return None;
        }
        let (reply, visible) = oneshot::channel();
        let files = std::mem::take(&mut self.written);
        let room = std::mem::replace(&mut self.room, Reservation::new(self.store.clone(), 0));
        self.store.do_send(Commit { files, room, reply });
        Some(Visible(visible))
    }

    fn next(&self, key: Key) -> FileId {
        FileId { key, generation: self.shared.volume.next_generation() }
    }

    fn add(&mut self, file: FileId, size: u64, stamp: Stamp) -> FileId {
        self.written.push(WrittenFile { file, bytes: self.shared.volume.charge(size), stamp });
        file
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        self.commit();
    }
}

impl Cas {
    /// Takes room for bytes that are at hand or about to come. Returns once files that had to go for it are gone.
    ///
    /// # Errors
    /// `Exhausted` when there is none.
    pub(super) async fn take_room(&self, bytes: u64) -> Result<Reservation> {
        self.ask(Reserve(bytes)).await?
    }

    /// Files to come, with room that was taken for them.
    pub(super) fn new_files(&self, room: Reservation) -> NewFiles {
        NewFiles::new(self.actor(), self.shared(), room)
    }
}
