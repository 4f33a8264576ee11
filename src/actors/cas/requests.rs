//! The actor's private messages: what [`super::client::Cas`] and the handles ask and report. Questions that need only the
//! index are no messages: see [`super::lookup`].
//!
//! Questions are sent and answered; facts are told with `do_send`, which no mailbox bound refuses, and are handled in the
//! order in which they were told. A dropped answer undoes itself: what it grants are [`Reservation`]s.

use super::{
    guards::Reservation,
    index::{EntryRef, FileId, Key, Stamp, Totals},
    uploads::{Attempt, Partial, Progress},
};
use crate::{budget::Bound, caller::Caller};
use actix::Message;
use gorego_reapi::{digest::Digest, error::Result};
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
