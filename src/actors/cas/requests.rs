//! The actor's private messages: what [`super::client::Cas`] and the handles ask and report. Questions that need only the
//! index are no messages: see [`super::lookup`].
//!
//! Questions are sent and answered; facts are told with `do_send`, which no mailbox bound refuses, and are handled in the
//! order in which they were told. A dropped answer undoes itself: what it grants are [`Reservation`]s.

use super::{
    CasActor,
    guards::Reservation,
    index::{EntryRef, FileId, Found, Key, Stamp, Totals},
    results::LoadedResult,
    settings::FILES_PER_COMMIT,
    uploads::{Attempt, Partial, Progress},
};
use crate::{budget::Bound, caller::Caller};
use actix::{Addr, Message};
use gorego_reapi::{digest::Digest, error::Result, proto::reapi};
use std::sync::Arc;
use tokio::sync::oneshot;

/// Room for those of some blobs that are not stored.
pub struct Prepared {
    /// Those that are not stored.
    pub absent: Vec<Digest>,
    /// Room for all of them.
    pub room: Result<Reservation>,
}

/// Room for bytes that are there or about to come; see [`Reservation::take`].
#[derive(Message)]
#[rtype(result = "Result<Reservation>")]
pub struct Reserve {
    /// At most [`RESERVE_STEP_BYTES`](super::settings::RESERVE_STEP_BYTES).
    pub bytes: u64,
    /// All that is wanted, these included; what cannot have that gets nothing, and nothing is evicted for it.
    pub of: u64,
}

/// Starts or resumes an upload.
#[derive(Message)]
#[rtype(result = "Result<Began>")]
pub struct BeginUpload {
    /// Digest of the resource name within its instance.
    pub name: Digest,
    pub blob: Key,
    pub offset: u64,
    /// Do not wait for another upload of the same blob, whatever room there is for both.
    pub beside: bool,
}

/// The answer to [`BeginUpload`].
pub enum Began {
    /// Stored already.
    Present,
    /// An earlier stream of this upload is still there.
    Busy(Arc<Progress>),
    /// There is no room for two of this blob, and another stream uploads it.
    NoRoomBeside(Arc<Progress>),
    /// Go on.
    Start(Box<Attempt>),
}

/// Broken uploads of a caller that met this bound are to go, the oldest first, until this much room is free again or none is
/// left.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DiscardPartials {
    pub caller: Caller,
    pub bound: Bound,
    pub bytes: u64,
}

/// How far is an upload, and is its blob stored?
#[derive(Message)]
#[rtype(result = "super::client::UploadStatus")]
pub struct QueryUpload {
    pub name: Digest,
    pub blob: Key,
}

/// What is known of a result.
pub enum ResultLookup {
    /// Complete; everything it references was just renewed.
    Hit(Arc<reapi::ActionResult>),
    /// None, or not complete.
    Miss,
    /// There is one; its file, or blobs of it that nobody has read since the start, have to be read to know more.
    Cold(Found),
    /// It is in memory, and refers to more blobs than are looked up in one turn.
    Long(Found, Arc<LoadedResult>),
}

/// The sums of the store, for people and health checks.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "StoreInspection")]
pub struct InspectStore;

/// The answer to [`InspectStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreInspection {
    /// Entries and bytes.
    pub totals: Totals,
    /// Uploads with an open stream.
    pub running_uploads: usize,
    /// Broken uploads that can be resumed.
    pub partial_uploads: usize,
}

/// Stops the store once everything told to it before is done. The answer comes when the last uses are on disk. Later calls
/// get `Unavailable`; the directory can be opened again when the last handle is gone.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct CloseStore;

/// Fact: these files are whole and under their final names. The reply comes once they are visible.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Commit {
    pub files: Vec<WrittenFile>,
    /// Covers all of them.
    pub room: Reservation,
    /// The upload that ends with this, having stored its blob.
    pub upload: Option<EndUpload>,
    pub reply: oneshot::Sender<()>,
}

impl Commit {
    /// Tells the store of one file; the answer comes once it is visible.
    pub fn tell(store: &Addr<CasActor>, file: WrittenFile, room: Reservation) -> oneshot::Receiver<()> {
        let (reply, visible) = oneshot::channel();
        store.do_send(Self { files: vec![file], room, upload: None, reply });
        visible
    }

    /// Tells the store of any number of files, some at a time, so that none of these messages takes long. The answer comes once
    /// all of them are visible; there is none where there are no files.
    pub fn tell_all(
        store: &Addr<CasActor>,
        mut files: Vec<WrittenFile>,
        mut room: Reservation,
    ) -> Option<oneshot::Receiver<()>> {
        let mut last = None;
        while !files.is_empty() {
            let rest = files.split_off(files.len().min(FILES_PER_COMMIT));
            let spent = files.iter().map(|file| file.bytes).sum();
            // What is left over is given back with the last of them.
            let room = room.split(if rest.is_empty() { u64::MAX } else { spent });
            let (reply, visible) = oneshot::channel();
            store.do_send(Self { files, room, upload: None, reply });
            // What is told is handled in order, so the last answer stands for all.
            (last, files) = (Some(visible), rest);
        }
        last
    }

    /// The same of the blob of an upload, which is over then.
    pub fn tell_of_upload(attempt: Attempt, file: WrittenFile, room: Reservation) -> oneshot::Receiver<()> {
        let (reply, visible) = oneshot::channel();
        let store = attempt.store().clone();
        store.do_send(Self { files: vec![file], room, upload: Some(attempt.into_end()), reply });
        visible
    }
}

/// A file to be made visible.
#[derive(Debug)]
pub struct WrittenFile {
    pub file: FileId,
    /// Bytes on disk.
    pub bytes: u64,
    pub stamp: Stamp,
}

/// Fact: look-ups have left a batch of notes in the [`super::view::View`].
#[derive(Message)]
#[rtype(result = "()")]
pub struct SettleUses;

/// Fact: room is not needed any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Unreserve(pub u64);

/// Fact: a file was hashed and is right.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Verified {
    pub at: EntryRef,
    pub stamp: Stamp,
}

/// Fact: the server itself moved the change times of these files. Their content did not change.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Touched(pub Vec<Touch>);

/// One of them.
pub struct Touch {
    pub at: EntryRef,
    pub before: Stamp,
    pub after: Stamp,
}

/// Fact: a file is not what it should be.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Damaged {
    pub at: EntryRef,
    pub reason: String,
}

/// Fact: a stored result references what is not stored any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Incomplete {
    pub at: EntryRef,
    pub reason: String,
}

/// Fact: so many bytes of files that the index let go are gone from the disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deleted(pub u64);

/// Fact: a stream of an upload ended without its blob, or with a blob that is stored already. The end of one that stored its
/// blob is a part of [`Commit`].
#[derive(Message)]
#[rtype(result = "()")]
pub struct EndUpload {
    pub name: Digest,
    pub number: u64,
    pub blob: Key,
    pub progress: Arc<Progress>,
    /// What is worth keeping of it.
    pub partial: Option<Partial>,
}
