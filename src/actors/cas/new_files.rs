//! [`NewFiles`]: the one way into the store.
//!
//! Batches, uploads, outputs, results, zstd forms and chunks take the same steps: reserve room, check the bytes, write
//! and stamp a new file, charge it, and let the actor make it visible. This file has the steps from writing on. Room
//! comes from [`Cas::take_room`] when the size is known, and from a [`super::guards::UploadRoom`] that grows with the
//! bytes when it is not.
//!
//! Invariant: every written file is handed to the actor, at the latest when `NewFiles` is dropped. So every file on
//! disk is counted, and unused room is given back.

use super::{
    CasActor, StoreShared,
    client::{Cas, going_down},
    guards::Reservation,
    index::{FileId, Key, Victim},
    linking::NewLinks,
    progress::EndedAttempt,
    settings::{FILES_PER_COMMIT, WRITTEN_TOGETHER_BYTES},
    volume::{Draft, NewFile, WrittenFile, outside::LeftFile},
};
use crate::caller::Owner;
use actix::{Addr, Message};
use bytes::Bytes;
use gorego_reapi::error::{Error, Result};
use std::{io, slice, sync::Arc};
use tokio::sync::oneshot;

/// Fact: these files are whole and under their final names. The reply comes once they are visible.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Commit {
    pub files: Vec<WrittenFile>,
    /// Room for all of the files.
    pub room: Reservation,
    /// The build to which the files are leased.
    pub lessee: Option<Owner>,
    /// Links of the results among the files whose blobs are known.
    pub links: Vec<NewLinks>,
    /// The upload that ends with this message because its blob is stored.
    pub upload: Option<EndedAttempt>,
    pub reply: oneshot::Sender<()>,
}

/// Written files that are not visible yet, with room for them and for more.
#[derive(Debug)]
pub(super) struct NewFiles {
    store: Addr<CasActor>,
    shared: Arc<StoreShared>,
    /// Room for the written files and for files to come.
    room: Reservation,
    /// The build to which the files are leased.
    lessee: Option<Owner>,
    /// The part of the room that the written files take.
    spent: u64,
    written: Vec<WrittenFile>,
    /// Small files that are not written yet, and the room that they will take.
    waiting: (Vec<(Key, Bytes)>, u64),
    /// Links of the written results whose blobs are known.
    links: Vec<NewLinks>,
    /// The error of earlier files of the batch that could not be written together or made durable.
    failed: Option<Error>,
    /// Whether the written files are as durable as the store promises.
    is_durable: bool,
}

/// The answer to a commit.
#[derive(Debug)]
pub(super) struct Visible(Result<oneshot::Receiver<()>>);

impl Visible {
    /// Waits until the files are visible to all requests.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down; errors of the disk, if files could not be made durable.
    pub(super) async fn wait(self) -> Result<()> {
        self.0?.await.map_err(|_| going_down())
    }
}

impl NewFiles {
    /// An empty batch, with room for files to come.
    pub(super) fn new(store: &Addr<CasActor>, shared: &Arc<StoreShared>, room: Reservation) -> Self {
        Self {
            store: store.clone(),
            shared: shared.clone(),
            room,
            lessee: None,
            spent: 0,
            written: Vec::new(),
            waiting: (Vec::new(), 0),
            links: Vec::new(),
            failed: None,
            is_durable: false,
        }
    }

    /// Returns this batch, whose files are leased to a build.
    pub(super) fn leased_to(self, lessee: Option<Owner>) -> Self {
        let mut files = self;
        files.lessee = lessee;
        files
    }

    /// The number of bytes of room that are missing to write `bytes` more.
    pub(super) fn lacks(&self, bytes: u64) -> u64 {
        let needed = self.spent.saturating_add(self.waiting.1).saturating_add(bytes);
        needed.saturating_sub(self.room.bytes())
    }

    pub(super) fn add_room(&mut self, more: Reservation) {
        self.room.absorb(more);
    }

    /// Writes bytes that were checked before. Blocks.
    ///
    /// # Errors
    /// The errors of the volume. No partial file is left behind.
    pub(super) fn write(&mut self, key: Key, pieces: &[Bytes]) -> io::Result<FileId> {
        let lost = || Err(io::Error::other("the volume wrote nothing"));
        self.write_all(&[NewFile { key, pieces }]).pop().unwrap_or_else(lost)
    }

    /// Writes bytes that were checked before, all files in one go. Blocks.
    ///
    /// # Errors
    /// Each file has its own outcome, as in [`NewFiles::write`].
    pub(super) fn write_all(&mut self, files: &[NewFile<'_>]) -> Vec<io::Result<FileId>> {
        let written = self.shared.volume.write(files);
        let shared = self.shared.clone();
        let noted = written.into_iter().map(|written| shared.disk.note_io(written));
        noted.map(|written| written.map(|written| self.add(written))).collect()
    }

    /// Adds a small file, which is written together with others that follow. This is done at the latest when the batch
    /// is handed over. Blocks.
    ///
    /// # Errors
    /// The errors of [`NewFiles::write_waiting`].
    pub(super) fn write_soon(&mut self, key: Key, content: Bytes) -> Result<()> {
        self.waiting.1 += self.shared.volume.charge(content.len() as u64);
        self.waiting.0.push((key, content));
        if self.waiting.1 < WRITTEN_TOGETHER_BYTES { Ok(()) } else { self.write_waiting() }
    }

    /// Writes the small files that wait. Blocks.
    ///
    /// # Errors
    /// The first error of the volume. Handing over the batch fails, too.
    pub(super) fn write_waiting(&mut self) -> Result<()> {
        let (waiting, _) = std::mem::take(&mut self.waiting);
        let files: Vec<NewFile<'_>> = waiting
            .iter()
            .map(|(key, content)| NewFile { key: *key, pieces: slice::from_ref(content) })
            .collect();
        for (file, written) in files.iter().zip(self.write_all(&files)) {
            if let Err(error) = written {
                let error = Error::io(&format!("store blob {}", file.key.digest), &error);
                self.failed = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Links a result of this batch to its blobs when it becomes visible.
    pub(super) fn link(&mut self, links: NewLinks) {
        self.links.push(links);
    }

    /// Keeps a draft whose content was checked. Blocks.
    ///
    /// # Errors
    /// The errors of [`NewFiles::write`].
    pub(super) fn keep(&mut self, key: Key, draft: Box<dyn Draft>) -> io::Result<FileId> {
        let written = self.shared.disk.note_io(draft.keep(key))?;
        Ok(self.add(written))
    }

    /// Adopts a file that an action left behind, if that is safe. Returns `None` when it has to be copied. Blocks.
    ///
    /// # Errors
    /// The errors of the volume.
    pub(super) fn adopt(&mut self, key: Key, left: &LeftFile<'_>) -> io::Result<Option<FileId>> {
        let written = self.shared.volume.adopt(key, left)?;
        Ok(written.map(|written| self.add(written)))
    }

    /// The number of files that are not handed over yet.
    pub(super) fn len(&self) -> usize {
        self.written.len() + self.waiting.0.len()
    }

    /// Hands over the written files, once they are durable, and keeps the remaining room. Returns `None` if there are
    /// none.
    pub(super) fn publish(&mut self) -> Option<Visible> {
        // They are written first, so that their room is among the spent. An error is kept in `failed`.
        let _ = self.write_waiting();
        let room = self.room.split(self.spent);
        self.tell(room, None)
    }

    /// Commits several batches at once, after a single wait for the disk. Blocks.
    pub(super) fn commit_all(batches: Vec<Self>) -> Vec<Option<Visible>> {
        let ids: Vec<FileId> =
            batches.iter().flat_map(|batch| &batch.written).map(|written| written.file).collect();
        // A failed sync is final: the kernel reports an error once, and a second sync of the same file may succeed
        // although data was lost.
        let synced =
            batches.first().map_or(Ok(()), |batch| batch.shared.disk.note_io(batch.shared.volume.sync(&ids)));
        let commit = |mut batch: Self| {
            match &synced {
                Ok(()) => batch.is_durable = true,
                Err(error) => {
                    let mut written = std::mem::take(&mut batch.written);
                    batch.give_up(&mut written, error);
                }
            }
            batch.commit()
        };
        batches.into_iter().map(commit).collect()
    }

    /// Hands over the written files and gives the remaining room back. Returns `None` if there are none.
    pub(super) fn commit(mut self) -> Option<Visible> {
        let room = self.room.split(u64::MAX);
        self.tell(room, None)
    }

    /// Like [`NewFiles::commit`], for the blob of an upload. The upload ends with it.
    pub(super) fn commit_upload(mut self, ended: EndedAttempt) -> Option<Visible> {
        let room = self.room.split(u64::MAX);
        self.tell(room, Some(ended))
    }

    /// Sends the files to the actor in parts, so that no message takes long.
    fn tell(&mut self, mut room: Reservation, mut upload: Option<EndedAttempt>) -> Option<Visible> {
        // An error is kept in `failed`.
        let _ = self.write_waiting();
        let mut files = std::mem::take(&mut self.written);
        self.spent = 0;
        if !self.is_durable {
            self.make_durable(&mut files);
        }
        let mut last = None;
        while !files.is_empty() || upload.is_some() {
            let rest = files.split_off(files.len().min(FILES_PER_COMMIT));
            let spent = files.iter().map(|file| file.bytes).sum();
            // The remaining room is given back with the last part.
            let room = room.split(if rest.is_empty() { u64::MAX } else { spent });
            let upload = if rest.is_empty() { upload.take() } else { None };
            let links = if rest.is_empty() { std::mem::take(&mut self.links) } else { Vec::new() };
            let (reply, visible) = oneshot::channel();
            self.store.do_send(Commit { files, room, lessee: self.lessee, links, upload, reply });
            // Messages are handled in order, so the last answer covers all of them.
            (last, files) = (Some(visible), rest);
        }
        match &self.failed {
            Some(error) => Some(Visible(Err(error.clone()))),
            None => last.map(|visible| Visible(Ok(visible))),
        }
    }

    /// Makes files as durable as the store promises. Files for which this fails are deleted and never become visible.
    fn make_durable(&mut self, files: &mut Vec<WrittenFile>) {
        let ids: Vec<FileId> = files.iter().map(|written| written.file).collect();
        if let Err(error) = self.shared.disk.note_io(self.shared.volume.sync(&ids)) {
            self.give_up(files, &error);
        }
    }

    /// Deletes files that could not be made durable. The batch fails.
    fn give_up(&mut self, files: &mut Vec<WrittenFile>, error: &io::Error) {
        self.links.clear();
        let victims: Vec<Victim> =
            files.drain(..).map(|WrittenFile { file, bytes, .. }| Victim { file, bytes }).collect();
        self.shared.volume.delete(&victims);
        self.failed = Some(Error::io("make stored files durable", error));
    }

    fn add(&mut self, written: WrittenFile) -> FileId {
        self.spent = self.spent.saturating_add(written.bytes);
        self.written.push(written);
        written.file
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        let room = self.room.split(u64::MAX);
        self.tell(room, None);
    }
}

impl Cas {
    /// Reserves room for bytes that have arrived or are about to. Returns once the files that were evicted for it are
    /// deleted.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub(super) async fn take_room(&self, bytes: u64) -> Result<Reservation> {
        self.look_at_full_disk().await?;
        Reservation::take(self.actor(), bytes).await
    }

    /// An empty batch of new files, with room that was reserved for them.
    pub(super) fn new_files(&self, room: Reservation) -> NewFiles {
        NewFiles::new(self.actor(), self.shared(), room).leased_to(self.lessee())
    }
}
