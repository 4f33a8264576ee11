//! Promises of the actor that end when they are dropped: [`Lease`] keeps blobs, [`Reservation`] keeps room, and [`Room`] is a
//! reservation that grows with the bytes that arrive.
//!
//! The end of a lease is marked in the index at once. That of a reservation is told to the actor by a message that no mailbox
//! bound can refuse, so none is lost while the actor lives.

use super::{
    CasActor,
    client::{Cas, going_down},
    index::EntryRef,
    requests::{DiscardPartials, Reserve, SettleUses, Unreserve},
    settings::{RESERVE_STEP_BYTES, ROOM_STEP_BYTES},
};
use crate::{budget::Share, caller::Caller};
use actix::Addr;
use gorego_reapi::error::Result;
use tokio::runtime::Handle;

/// Entries that are not evicted while this is held.
pub struct Lease {
    cas: Cas,
    entries: Vec<EntryRef>,
}

impl Lease {
    /// A lease on nothing yet.
    pub fn none(cas: Cas) -> Self {
        Self { cas, entries: Vec::new() }
    }

    /// Adds an entry that the index has counted as leased.
    pub fn add(&mut self, entry: EntryRef) {
        self.entries.push(entry);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.entries.is_empty() {
            let is_work = self.cas.shared().view.release(std::mem::take(&mut self.entries));
            if is_work {
                self.cas.actor().do_send(SettleUses);
            }
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} entries)", self.entries.len())
    }
}

/// Room on disk that nobody else gets while this is held.
pub struct Reservation {
    store: Addr<CasActor>,
    bytes: u64,
}

impl Reservation {
    /// A reservation that the index has counted.
    pub fn new(store: Addr<CasActor>, bytes: u64) -> Self {
        Self { store, bytes }
    }

    /// Asks the actor for room, in steps for which it makes room in moments.
    ///
    /// # Errors
    /// `Exhausted` when there is none for all of it; `Unavailable` when the server is going down.
    pub async fn take(store: &Addr<CasActor>, bytes: u64) -> Result<Self> {
        let mut taken = Self::new(store.clone(), 0);
        while taken.bytes < bytes {
            let of = bytes - taken.bytes;
            let step = Reserve { bytes: of.min(RESERVE_STEP_BYTES), of };
            taken.absorb(store.send(step).await.map_err(|_| going_down()).flatten()?);
        }
        Ok(taken)
    }

    /// How much room.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds another one to this.
    pub fn absorb(&mut self, other: Self) {
        self.bytes += other.disarm();
    }

    /// Takes this much of it out, or all that there is.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { store: self.store.clone(), bytes }
    }

    /// Ends it without telling the actor; for the actor itself. Returns how much room it was.
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
/// nothing. What is reserved for a client counts against the bounds of its connection and its peer, also while a broken
/// upload is kept. Nobody waits for room that others hold: there is room once what may go is gone, or the write fails and its
/// client tries again later, so no two uploads can wait for one another.
#[derive(Debug)]
pub struct Room {
    reservation: Reservation,
    /// `None` for what the server does on its own account.
    share: Option<Share>,
}

impl Room {
    /// None yet.
    pub fn none(store: Addr<CasActor>) -> Self {
        Self { reservation: Reservation::new(store, 0), share: None }
    }

    /// Room that the index has counted.
    #[cfg(test)]
    pub fn of(reservation: Reservation) -> Self {
        Self { reservation, share: None }
    }

    /// How much.
    pub fn bytes(&self) -> u64 {
        self.reservation.bytes()
    }

    /// Who is charged for it.
    pub fn caller(&self) -> Option<Caller> {
        self.share.as_ref().map(Share::caller)
    }

    /// From here on it counts as that of this share's caller.
    ///
    /// # Errors
    /// `Exhausted` at a bound of the caller's.
    pub fn charge_to(&mut self, mut share: Share) -> Result<()> {
        self.share = None;
        share.grow(self.bytes())?;
        self.share = Some(share);
        Ok(())
    }

    /// Has room for `needed` bytes when this returns, and perhaps for a step more, but not for more than `most`.
    ///
    /// # Errors
    /// `Exhausted` when there is none, or at a bound of the caller's.
    pub async fn grow(&mut self, needed: u64, most: u64) -> Result<()> {
        let Some(lacking) = needed.checked_sub(self.bytes()).filter(|lacking| *lacking > 0) else {
            return Ok(());
        };
        let more = lacking.max(ROOM_STEP_BYTES.min(most.saturating_sub(self.bytes())));
        let store = self.reservation.store.clone();
        // Apart from what is held already, so that an error, or the end of this future, gives it back.
        let mut charge = self.share.as_mut().map(|share| share.split(0));
        if let Some(charge) = &mut charge
            && let Err(refusal) = charge.grow(more)
        {
            // Its own broken uploads are the first to go.
            let discard = DiscardPartials { caller: charge.caller(), bound: refusal.bound(), bytes: more };
            store.send(discard).await.map_err(|_| going_down())?;
            charge.grow(more)?;
        }
        let reservation = Reservation::take(&store, more).await?;
        self.reservation.absorb(reservation);
        if let (Some(share), Some(charge)) = (&mut self.share, charge) {
            share.merge(charge);
        }
        Ok(())
    }

    /// [`Room::grow`] on a blocking thread.
    ///
    /// # Errors
    /// See [`Room::grow`].
    pub fn grow_here(&mut self, runtime: &Handle, needed: u64, most: u64) -> Result<()> {
        if needed <= self.bytes() { Ok(()) } else { runtime.block_on(self.grow(needed, most)) }
    }

    /// The reservation, which the bytes that were written take up.
    pub fn into_reservation(self) -> Reservation {
        self.reservation
    }
}
