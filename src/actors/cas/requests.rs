//! The actor's private messages: the requests and reports of [`super::client::Cas`] and the guards. Look-ups that need
//! only the index take no message: see [`super::lookup`].
//!
//! Requests are sent and answered. Reports ("Fact:" below) are sent with `do_send`, which ignores the bound of the
//! mailbox, and are handled in the order of sending. A dropped answer gives its room back, because this room is a
//! [`Reservation`].

use super::{
    guards::Reservation,
    index::{EntryRef, FileId, Key, Stamp, Tally, Totals},
    linking::NewLinks,
    uploads::{Attempt, Partial, Progress},
    volume::{Moves, WrittenFile},
};
use crate::{
    budget::Bound,
    caller::{Caller, Owner},
};
use actix::Message;
use gorego_reapi::{digest::Digest, error::Result};
use std::sync::Arc;
use tokio::sync::oneshot;

/// The answer of [`super::client::Cas::prepare`].
pub(super) struct Prepared {
    /// The blobs that are not stored.
    pub absent: Vec<Digest>,
    /// Room for all absent blobs.
    pub room: Result<Reservation>,
}

/// Reserves room for bytes that have arrived or are about to; see [`Reservation::take`].
#[derive(Message)]
#[rtype(result = "Result<Reservation>")]
pub struct ReserveRoom {
    /// Bytes to reserve; at most [`RESERVE_STEP_BYTES`](super::settings::RESERVE_STEP_BYTES).
    pub bytes: u64,
    /// The total that is wanted, including `bytes`. If the total does not fit, nothing is reserved and nothing is
    /// evicted.
    pub of: u64,
    /// The bytes that the sender has already reserved for the same write.
    pub held: u64,
    /// The blob that the room is for, if it is known. Nothing is reserved for a stored blob, because that might evict
    /// the blob itself.
    pub blob: Option<Key>,
}

/// Starts or resumes an upload.
#[derive(Message)]
#[rtype(result = "Result<Began>")]
pub struct BeginUpload {
    /// Digest of the resource name within its instance.
    pub name: Digest,
    pub blob: Key,
    pub offset: u64,
    /// Whether to start even if another upload of the same blob is running and there is no room for both.
    pub beside: bool,
}

/// The answer to [`BeginUpload`].
pub enum Began {
    /// The blob is already stored.
    Present,
    /// An earlier stream of this upload has not ended.
    Busy(Arc<Progress>),
    /// Another stream uploads this blob, and there is no room for both.
    NoRoomBeside(Arc<Progress>),
    /// The upload may start.
    Start(Box<Attempt>),
}

/// Discards broken uploads of a caller that reached a bound, the oldest first, until `bytes` are free or none are left.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DiscardPartials {
    pub caller: Caller,
    pub bound: Bound,
    pub bytes: u64,
}

/// Asks for the progress of an upload, and whether its blob is stored.
#[derive(Message)]
#[rtype(result = "super::client::UploadStatus")]
pub struct QueryUpload {
    pub name: Digest,
    pub blob: Key,
}

/// Asks for the totals of the store, for logs and health checks.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "StoreInspection")]
pub struct InspectStore;

/// The answer to [`InspectStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreInspection {
    /// Counts and bytes of the entries.
    pub totals: Totals,
    /// Uploads with an open stream.
    pub running_uploads: usize,
    /// Broken uploads that can be resumed.
    pub partial_uploads: usize,
    /// Counts of events since the start.
    pub tally: Tally,
    /// The last recorded use of the entry that would be evicted first, in seconds since 1970; `None` for an empty
    /// store.
    pub oldest_use: Option<u32>,
}

/// Counts of the scrub since the start of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubTally {
    /// Bytes that were verified.
    pub bytes: u64,
    /// Entries that were damaged.
    pub damaged: u64,
    /// Completed passes over the whole store.
    pub passes: u64,
}

/// The store in numbers, without a message: see [`super::client::Cas::measure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreMeasurement {
    /// Counts and bytes of the entries.
    pub totals: Totals,
    /// Counts of events since the start.
    pub tally: Tally,
    /// The last recorded use of the least recently used entry, in seconds since 1970; `None` for an empty store.
    pub oldest_use: Option<u32>,
    /// Memory that the index takes, in bytes, without the links of results to blobs.
    pub index_bytes: u64,
    /// Counts of the scrub since the start.
    pub scrub: ScrubTally,
}

/// Stops the store after all earlier messages. The answer comes when the last uses are written to disk. Later calls get
/// `Unavailable`. The directory can be opened again when the last handle is dropped.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct CloseStore;

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
    pub upload: Option<EndUpload>,
    pub reply: oneshot::Sender<()>,
}

/// Fact: look-ups have left a batch of notes in [`super::view::View`].
#[derive(Message)]
#[rtype(result = "()")]
pub struct SettleUses;

/// Fact: this many reserved bytes are not needed any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Unreserve(pub u64);

/// Fact: the content of a file was verified.
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

/// A change of one file's stamp.
pub struct Touch {
    pub at: EntryRef,
    pub before: Stamp,
    pub after: Stamp,
}

/// Fact: a stored file is damaged or gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Damaged {
    pub at: EntryRef,
    pub reason: String,
}

/// Fact: compaction has copied files. The answer says for each copy whether it took the place of its original.
/// Originals that turned out to be damaged are dropped.
#[derive(Message)]
#[rtype(result = "Vec<bool>")]
pub(super) struct Relocate(pub Moves);

/// Fact: the blob in a file was compressed into another file. The answer says whether the new file took the place of
/// the old one.
#[derive(Message)]
#[rtype(result = "bool")]
pub(super) struct Repack {
    pub from: FileId,
    pub to: WrittenFile,
    /// Room for the new file.
    pub room: Reservation,
}

/// Fact: this many bytes of evicted or replaced files are deleted from disk.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deleted(pub u64);

/// Fact: a stream of an upload ended without its blob, or found the blob already stored. A stream that stored its blob
/// ends with [`Commit`].
#[derive(Message)]
#[rtype(result = "()")]
pub struct EndUpload {
    pub name: Digest,
    pub number: u64,
    pub blob: Key,
    pub progress: Arc<Progress>,
    /// The bytes so far, if the upload may be resumed.
    pub partial: Option<Partial>,
}
