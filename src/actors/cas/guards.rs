//! Guards that end when they are dropped: a [`Hold`] protects blobs from eviction, a [`Reservation`] keeps disk space,
//! and an [`UploadRoom`] is a reservation that grows with the bytes of an upload.
//!
//! The end of a hold is marked in the index at once. The end of a reservation is sent to the actor with `do_send`,
//! which ignores the bound of the mailbox, so none is lost while the actor lives.

use super::{
    CasActor,
    client::{Cas, going_down},
    index::{EntryRef, Key},
    settings::{RESERVE_STEP_BYTES, ROOM_STEP_BYTES},
};
use crate::{
    budget::{Bound, Share},
    caller::Caller,
};
use actix::{Addr, Message};
use gorego_reapi::error::Result;
use tokio::runtime::Handle;

/// Fact: look-ups have left a batch of notes in [`super::view::View`].
#[derive(Message)]
#[rtype(result = "()")]
pub struct SettleUses;

/// Reserves room for bytes that have arrived or are about to; see [`Reservation::take`].
#[derive(Message)]
#[rtype(result = "Result<Reservation>")]
pub struct ReserveRoom {
    /// Bytes to reserve; at most [`RESERVE_STEP_BYTES`].
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

/// Fact: this many reserved bytes are not needed any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Unreserve(pub u64);

/// Discards broken uploads of a caller that reached a bound, the oldest first, until `bytes` are free or none are left.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DiscardPartials {
    pub caller: Caller,
    pub bound: Bound,
    pub bytes: u64,
}

/// Entries that are not evicted while this is held.
pub(crate) struct Hold {
    cas: Cas,
    entries: Vec<EntryRef>,
}

impl Hold {
    pub(crate) fn none(cas: Cas) -> Self {
        Self { cas, entries: Vec::new() }
    }

    /// Adds an entry whose hold is already counted in the index.
    pub(crate) fn add(&mut self, entry: EntryRef) {
        self.entries.push(entry);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.entries.is_empty() {
            let is_work = self.cas.shared().view.release(std::mem::take(&mut self.entries));
            if is_work {
                self.cas.actor().do_send(SettleUses);
            }
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hold({} entries)", self.entries.len())
    }
}

/// Disk space that is reserved while this is held.
pub struct Reservation {
    store: Addr<CasActor>,
    bytes: u64,
}

impl Reservation {
    /// A reservation that is already counted in the index.
    pub fn new(store: Addr<CasActor>, bytes: u64) -> Self {
        Self { store, bytes }
    }

    /// Asks the actor for room, in steps that keep each of its messages short.
    ///
    /// # Errors
    /// `Exhausted` when there is not enough room for all of it; `Unavailable` when the server is shutting down.
    pub async fn take(store: &Addr<CasActor>, bytes: u64) -> Result<Self> {
        Self::take_for(store, bytes, 0, None).await
    }

    /// Like [`Reservation::take`], for a write to `blob` that has already reserved `held` bytes.
    ///
    /// # Errors
    /// Also `Unavailable` when the blob is stored already.
    async fn take_for(store: &Addr<CasActor>, bytes: u64, held: u64, blob: Option<Key>) -> Result<Self> {
        let mut taken = Self::new(store.clone(), 0);
        while taken.bytes < bytes {
            let of = bytes - taken.bytes;
            let held = held.saturating_add(taken.bytes);
            let step = ReserveRoom { bytes: of.min(RESERVE_STEP_BYTES), of, held, blob };
            taken.absorb(store.send(step).await.map_err(|_| going_down()).flatten()?);
        }
        Ok(taken)
    }

    /// Number of bytes that are reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Merges another reservation into this one.
    pub fn absorb(&mut self, other: Self) {
        self.bytes += other.disarm();
    }

    /// Splits off this many bytes, or all of them if there are fewer.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { store: self.store.clone(), bytes }
    }

    /// Ends the reservation without a message to the actor, which itself calls this. Returns its bytes.
    pub fn disarm(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.store.do_send(Unreserve(self.bytes));
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reservation({} bytes)", self.bytes)
    }
}

/// Disk space for an upload, reserved at most [`ROOM_STEP_BYTES`] ahead of the bytes received. A declared size reserves
/// nothing. The bytes count against the bounds of the client's connection and peer, also while a broken upload is kept.
/// No upload waits for room that another one holds: either evictions free enough, or the write fails and the client
/// tries again later. So two uploads cannot wait for each other.
#[derive(Debug)]
pub struct UploadRoom {
    reservation: Reservation,
    /// `None` for the server's own writes.
    share: Option<Share>,
    /// The blob that is uploaded; `None` while its digest is not known.
    blob: Option<Key>,
}

impl UploadRoom {
    /// Creates room without a reservation, which is not tied to a blob.
    pub fn none(store: Addr<CasActor>) -> Self {
        Self { reservation: Reservation::new(store, 0), share: None, blob: None }
    }

    /// Creates empty room for an upload of this blob. It stops growing once the blob is stored.
    pub fn for_blob(store: Addr<CasActor>, blob: Key) -> Self {
        Self { blob: Some(blob), ..Self::none(store) }
    }

    /// Creates room from a reservation that is counted in the index.
    #[cfg(test)]
    pub fn of(reservation: Reservation) -> Self {
        Self { reservation, share: None, blob: None }
    }

    /// Number of bytes that are reserved.
    pub fn bytes(&self) -> u64 {
        self.reservation.bytes()
    }

    /// The caller that is charged for it.
    pub fn caller(&self) -> Option<Caller> {
        self.share.as_ref().map(Share::caller)
    }

    /// Charges the caller of this share for the room from now on.
    ///
    /// # Errors
    /// `Exhausted` at a bound of the caller.
    pub fn charge_to(&mut self, mut share: Share) -> Result<()> {
        self.share = None;
        share.grow(self.bytes())?;
        self.share = Some(share);
        Ok(())
    }

    /// Grows to `needed` bytes or up to one step beyond, but never beyond `most`.
    ///
    /// # Errors
    /// `Exhausted` when there is no room, or at a bound of the caller; `Unavailable` when the blob is stored already.
    pub async fn grow(&mut self, needed: u64, most: u64) -> Result<()> {
        let Some(lacking) = needed.checked_sub(self.bytes()).filter(|lacking| *lacking > 0) else {
            return Ok(());
        };
        let more = lacking.max(ROOM_STEP_BYTES.min(most.saturating_sub(self.bytes())));
        let store = self.reservation.store.clone();
        // This part is kept apart from the share held so far, so that an error, or dropping this future, gives it back.
        let mut charge = self.share.as_mut().map(|share| share.split(0));
        if let Some(charge) = &mut charge
            && let Err(refusal) = charge.grow(more)
        {
            // The caller's own broken uploads are discarded first.
            let discard = DiscardPartials { caller: charge.caller(), bound: refusal.bound(), bytes: more };
            store.send(discard).await.map_err(|_| going_down())?;
            charge.grow(more)?;
        }
        let reservation = Reservation::take_for(&store, more, self.bytes(), self.blob).await?;
        self.reservation.absorb(reservation);
        if let (Some(share), Some(charge)) = (&mut self.share, charge) {
            share.merge(charge);
        }
        Ok(())
    }

    /// Like [`UploadRoom::grow`], on a blocking thread.
    ///
    /// # Errors
    /// See [`UploadRoom::grow`].
    pub fn grow_here(&mut self, runtime: &Handle, needed: u64, most: u64) -> Result<()> {
        if needed <= self.bytes() { Ok(()) } else { runtime.block_on(self.grow(needed, most)) }
    }

    /// The reservation, to be spent on the written bytes.
    pub fn into_reservation(self) -> Reservation {
        self.reservation
    }
}

impl Cas {
    /// Empty room for an upload through this handle.
    pub(super) fn new_room(&self) -> Result<UploadRoom> {
        let mut room = UploadRoom::none(self.actor().clone());
        self.pay_for(&mut room)?;
        Ok(room)
    }

    /// Charges the room of an upload to the client, if there is one.
    ///
    /// # Errors
    /// `Exhausted` when a bound is reached.
    pub(super) fn pay_for(&self, room: &mut UploadRoom) -> Result<()> {
        match self.client() {
            Some(caller) => room.charge_to(self.shared().upload_budget.take(caller, 0)?),
            None => Ok(()),
        }
    }
}
