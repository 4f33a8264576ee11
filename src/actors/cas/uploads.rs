//! [`Uploads`]: the actor's table of running and broken uploads. It deletes no files itself, and hands them out for
//! deletion.
//!
//! An upload is identified by its whole resource name (BS-06). A name has one entry: its latest attempt while that is
//! running, or the bytes of a broken attempt. A new attempt at offset 0 takes the name over. The older attempt may
//! still finish, but if it breaks, its bytes are discarded (BS-20). Broken uploads are bounded in number, bytes and
//! age, and are discarded first when room is needed. When a bound is exceeded, the peer that holds most loses its
//! oldest broken upload. So no peer loses an upload because another peer has many. The bounds are not per connection,
//! because an upload breaks when its connection does.
//!
//! The modules below handle the incoming bytes: [`begin`] starts an upload, [`writer`] writes one, [`small`] stores a
//! small blob whose bytes arrived at once, and [`new_blob`] stores bytes of unknown digest. They share [`unwritten`],
//! [`sink`] and [`decoders`].

pub(crate) mod begin;
pub(crate) mod decoders;
pub(crate) mod new_blob;
pub(crate) mod sink;
pub(crate) mod small;
pub(crate) mod unwritten;
pub(crate) mod writer;

use super::{
    CasActor,
    guards::UploadRoom,
    index::Key,
    progress::{EndedAttempt, Progress},
    settings::MAX_PARTIAL_UPLOADS,
    uploads::sink::{Inflow, Sink},
};
use crate::{
    budget::Bound,
    caller::{Caller, Owner, Peer},
};
use actix::{Addr, Message};
use gorego_reapi::digest::Digest;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Broken uploads may hold at most `1 / PARTIAL_PART` of the store.
const PARTIAL_PART: u64 = 4;

/// How many other attempts at the same blob are considered when an upload begins.
const MAX_TWINS: usize = 64;

/// The bytes of a broken attempt. The file is deleted before its room is given back.
#[derive(Debug)]
pub(crate) struct Partial {
    /// The file with the bytes so far.
    pub sink: Sink,
    /// The room that the bytes take.
    pub room: UploadRoom,
}

impl Partial {
    fn peer(&self) -> Peer {
        self.room.caller().unwrap_or_default().peer
    }
}

/// Fact: a stream of an upload ended without its blob, or found the blob already stored. A stream that stored its blob
/// ends with [`Commit`](super::new_files::Commit).
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct EndUpload {
    pub attempt: EndedAttempt,
    /// The bytes so far, if the upload may be resumed.
    pub partial: Option<Partial>,
}

/// The right to write one upload. When it is dropped, its remaining bytes are reported to the actor. The end of an
/// attempt that stored its blob is reported together with the blob ([`Attempt::into_ended`]).
pub struct Attempt {
    /// `None` until the first bytes are written. Declared before `room`, so that the file is dropped first.
    pub sink: Option<Sink>,
    /// Converts the bytes of this stream to bytes of the blob.
    pub inflow: Inflow,
    /// Room for the bytes so far; `None` once it is spent.
    pub room: Option<UploadRoom>,
    /// Whether the bytes so far may be resumed.
    pub keep: bool,
    /// Progress that others can observe.
    pub progress: Arc<Progress>,
    /// The blob that is uploaded.
    pub blob: Key,
    /// The build to which the blob is leased.
    pub lessee: Option<Owner>,
    name: Digest,
    number: u64,
    store: Addr<CasActor>,
    /// Whether the actor already knows that the attempt has ended.
    is_told: bool,
}

impl Attempt {
    /// An attempt that [`Uploads::begin`] has registered.
    pub fn new(store: Addr<CasActor>, name: Digest, blob: Key, entered: Entered, room: UploadRoom) -> Self {
        let Entered { number, progress } = entered;
        let (sink, inflow, room) = (None, Inflow::Plain, Some(room));
        Self {
            sink,
            inflow,
            room,
            keep: true,
            progress,
            blob,
            lessee: None,
            name,
            number,
            store,
            is_told: false,
        }
    }

    /// Ends this attempt without remaining bytes. The caller reports it to the actor.
    pub(crate) fn into_ended(mut self) -> EndedAttempt {
        self.is_told = true;
        self.ended()
    }

    fn ended(&self) -> EndedAttempt {
        let (name, number, blob, progress) = (self.name, self.number, self.blob, self.progress.clone());
        EndedAttempt { name, number, blob, progress }
    }

    pub fn store(&self) -> &Addr<CasActor> {
        &self.store
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let partial = match (self.keep, self.sink.take(), self.room.take()) {
            (true, Some(sink), Some(room)) => Some(Partial { sink, room }),
            (_, sink, room) => {
                drop(sink);
                drop(room);
                None
            }
        };
        if !self.is_told {
            self.store.do_send(EndUpload { attempt: self.ended(), partial });
        }
    }
}

impl std::fmt::Debug for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attempt")
            .field("blob", &self.blob)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// A registered attempt: its number, and the progress that others can observe.
#[derive(Debug, Clone)]
pub struct Entered {
    /// Unique in this process.
    pub number: u64,
    /// The progress that others can observe.
    pub progress: Arc<Progress>,
}

/// The answer of [`Uploads::begin`].
#[derive(Debug)]
pub(crate) enum Begin {
    /// Starts at 0. The bytes of an earlier attempt are to be deleted.
    Fresh(Entered, Option<Partial>),
    /// Resumes where the earlier attempt broke.
    Resume(Entered, Partial),
    /// An earlier stream has not ended yet.
    Busy(Arc<Progress>),
    /// The upload is at another offset.
    Elsewhere(u64),
}

enum UploadState {
    Running(Arc<Progress>),
    Parked(Box<Partial>),
}

struct Named {
    number: u64,
    state: UploadState,
}

/// The table of uploads; see the module documentation.
#[derive(Default)]
pub(crate) struct Uploads {
    named: HashMap<Digest, Named>,
    /// Names of parked uploads, in the order in which they broke.
    parked: BTreeMap<(Instant, u64), Digest>,
    parked_bytes: u64,
    running: HashMap<Key, Vec<Arc<Progress>>>,
    running_count: usize,
    last_number: u64,
}

impl Uploads {
    /// Registers an attempt that starts at `offset`.
    pub(crate) fn begin(&mut self, name: Digest, blob: Key, offset: u64) -> Begin {
        let parked = match self.named.get(&name) {
            Some(Named { state: UploadState::Running(progress), .. }) if offset > 0 => {
                return Begin::Busy(progress.clone());
            }
            Some(Named { state: UploadState::Parked(partial), .. }) if offset > 0 => {
                let committed = partial.sink.hasher.size();
                if committed != offset {
                    return Begin::Elsewhere(committed);
                }
                self.unpark(name)
            }
            None if offset > 0 => return Begin::Elsewhere(0),
            _ => self.unpark(name),
        };
        self.last_number += 1;
        let entered = Entered { number: self.last_number, progress: Arc::default() };
        entered.progress.accepted.store(offset, Ordering::Relaxed);
        let state = UploadState::Running(entered.progress.clone());
        self.named.insert(name, Named { number: entered.number, state });
        self.running.entry(blob).or_default().push(entered.progress.clone());
        self.running_count += 1;
        match parked {
            Some(partial) if offset > 0 => Begin::Resume(entered, partial),
            parked => Begin::Fresh(entered, parked),
        }
    }

    /// The attempt at the same blob that has accepted the most bytes.
    pub(crate) fn twin(&self, blob: &Key, entered: &Entered) -> Option<Arc<Progress>> {
        self.twins(blob, entered).max_by_key(|twin| twin.accepted.load(Ordering::Relaxed)).cloned()
    }

    /// The number of bytes that the other attempts at a blob of this size still have to receive.
    pub(crate) fn left_to_twins(&self, blob: &Key, entered: &Entered, size: u64) -> u64 {
        let left = |twin: &Arc<Progress>| size.saturating_sub(twin.accepted.load(Ordering::Relaxed));
        self.twins(blob, entered).map(left).fold(0, u64::saturating_add)
    }

    /// Other attempts at the same blob, at most [`MAX_TWINS`].
    fn twins(&self, blob: &Key, entered: &Entered) -> impl Iterator<Item = &Arc<Progress>> {
        let attempts = self.running.get(blob).into_iter().flatten().take(MAX_TWINS + 1);
        attempts.filter(|progress| !Arc::ptr_eq(progress, &entered.progress))
    }

    /// Removes an attempt that ended. Returns bytes that are to be deleted.
    pub(crate) fn end(&mut self, ended: EndUpload, now: Instant) -> Option<Partial> {
        let EndUpload { attempt: EndedAttempt { name, number, blob, progress }, partial } = ended;
        if let Some(attempts) = self.running.get_mut(&blob) {
            let before = attempts.len();
            attempts.retain(|other| !Arc::ptr_eq(other, &progress));
            self.running_count -= before - attempts.len();
            if attempts.is_empty() {
                self.running.remove(&blob);
            }
        }
        let is_latest = self.named.get(&name).is_some_and(|named| named.number == number);
        // A stored blob needs no resumed upload.
        let is_of_use = is_latest && !progress.is_superseded();
        let discarded = match partial {
            Some(partial) if is_of_use => {
                self.parked_bytes += partial.room.bytes();
                self.parked.insert((now, number), name);
                self.named.insert(name, Named { number, state: UploadState::Parked(Box::new(partial)) });
                None
            }
            partial => {
                if is_latest {
                    self.named.remove(&name);
                }
                partial
            }
        };
        progress.end();
        discarded
    }

    /// Bytes that an upload has accepted; 0 for an unknown one (BS-32).
    pub(crate) fn committed(&self, name: Digest) -> u64 {
        match self.named.get(&name).map(|named| &named.state) {
            Some(UploadState::Running(progress)) => progress.accepted.load(Ordering::Relaxed),
            Some(UploadState::Parked(partial)) => partial.sink.hasher.size(),
            None => 0,
        }
    }

    /// Marks all running uploads of this blob as superseded.
    pub(crate) fn supersede(&self, blob: &Key) {
        for progress in self.running.get(blob).into_iter().flatten() {
            progress.supersede();
        }
    }

    /// Removes a broken upload to make room: the oldest of the peer whose broken uploads hold the most bytes.
    pub(crate) fn pop_for_room(&mut self) -> Option<Partial> {
        self.pop_of_largest(|partial| partial.room.bytes())
    }

    /// Removes the oldest broken upload of the peer with the largest total weight. If several peers tie, removes the
    /// oldest of their uploads.
    fn pop_of_largest(&mut self, weight: impl Fn(&Partial) -> u64) -> Option<Partial> {
        let mut weights: HashMap<Peer, u64> = HashMap::new();
        for (_, partial) in self.by_age() {
            let sum = weights.entry(partial.peer()).or_default();
            *sum = sum.saturating_add(weight(partial));
        }
        let most = weights.values().copied().max()?;
        let is_theirs = |(_, partial): &(Digest, &Partial)| weights.get(&partial.peer()) == Some(&most);
        let (name, _) = self.by_age().find(is_theirs)?;
        self.unpark(name)
    }

    /// The broken uploads, the oldest first.
    fn by_age(&self) -> impl Iterator<Item = (Digest, &Partial)> {
        self.parked.values().filter_map(|name| match &self.named.get(name)?.state {
            UploadState::Parked(partial) => Some((*name, &**partial)),
            UploadState::Running(_) => None,
        })
    }

    /// Removes the oldest broken upload that counts against this bound of the caller: an upload of its connection, or
    /// otherwise of its peer.
    pub(crate) fn pop_oldest_of(&mut self, caller: Caller, bound: Bound) -> Option<Partial> {
        let counts = |other: Caller| match bound {
            Bound::Connection => other.connection == caller.connection,
            Bound::ConnectionShare | Bound::Peer | Bound::Server => other.peer == caller.peer,
        };
        let (name, _) = self.by_age().find(|(_, partial)| partial.room.caller().is_some_and(counts))?;
        self.unpark(name)
    }

    /// Removes a broken upload if a bound is exceeded: it is too old, there are too many, or they hold too much of a
    /// store of `limit` bytes.
    pub(crate) fn pop_excess(&mut self, now: Instant, retention: Duration, limit: u64) -> Option<Partial> {
        let (&(since, _), &oldest) = self.parked.first_key_value()?;
        if now.saturating_duration_since(since) >= retention {
            self.unpark(oldest)
        } else if self.parked.len() > MAX_PARTIAL_UPLOADS {
            self.pop_of_largest(|_| 1)
        } else if self.parked_bytes > limit / PARTIAL_PART {
            self.pop_for_room()
        } else {
            None
        }
    }

    /// Bytes that broken uploads hold; they can be reclaimed.
    pub(crate) fn parked_bytes(&self) -> u64 {
        self.parked_bytes
    }

    /// The number of running attempts, and of uploads that can be resumed.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.running_count, self.parked.len())
    }

    fn unpark(&mut self, name: Digest) -> Option<Partial> {
        if !matches!(self.named.get(&name)?.state, UploadState::Parked(_)) {
            return None;
        }
        let Named { number, state: UploadState::Parked(partial) } = self.named.remove(&name)? else {
            return None;
        };
        self.parked.retain(|(_, parked), _| *parked != number);
        self.parked_bytes -= partial.room.bytes();
        Some(*partial)
    }
}

impl std::fmt::Debug for Uploads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploads").field("counts", &self.counts()).finish_non_exhaustive()
    }
}
