//! Look-ups that [`Cas`] answers from the index and from memory, without a message to the actor.

use super::{
    CasActor,
    client::{Cas, going_down},
    guards::{Hold, SettleUses},
    index::{EntryKind, EntryRef, FoundEntry, Key, Seal},
    settings::{LOOKUPS_PER_HOLD, LOOKUPS_PER_TURN},
    view::LookUp,
};
use crate::{
    actors::mail::Receive,
    instance::{Instance, InstanceId},
};
use actix::AsyncContext as _;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use hashbrown::{HashTable, hash_table::Entry};
use std::hash::{BuildHasher as _, RandomState};
use tokio::task;

/// The answer of [`Cas::locate`], in the order of the digests. The empty blob has no file and is never found.
#[derive(Debug)]
pub(super) struct Located {
    pub found: Vec<Option<FoundEntry>>,
    /// The zstd forms of the blobs, if they were requested.
    pub zstd: Vec<Option<FoundEntry>>,
    /// Protects the entries from eviction, if this was requested.
    pub hold: Hold,
}

impl Located {
    /// The files of these digests, which were looked up, and the hold that protects them.
    ///
    /// # Errors
    /// `MissingBlobs` with the digests that were not found.
    pub(super) fn complete(self, digests: &[Digest]) -> Result<(Vec<FoundEntry>, Hold)> {
        let missing = digests.iter().zip(&self.found).filter(|(_, found)| found.is_none());
        let missing: Vec<_> = missing.map(|(digest, _)| *digest).collect();
        if missing.is_empty() {
            Ok((self.found.into_iter().flatten().collect(), self.hold))
        } else {
            Err(Error::MissingBlobs(missing))
        }
    }
}

/// The purpose of a look-up, which decides what is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To find out whether a blob is stored, or to read it at once. No hold is taken.
    Look,
    /// To read the blob, under a hold.
    Read,
    /// To read the blob or its zstd form, both under a hold.
    ReadZstd,
}

/// A set of digests in the order in which they were added.
#[derive(Default)]
struct MissingDigests {
    /// The largest number of digests that it will contain.
    most: usize,
    digests: Vec<Digest>,
    /// The hash of each digest and its position in the list.
    places: HashTable<(u64, usize)>,
    hasher: RandomState,
}

impl MissingDigests {
    fn add(&mut self, digest: &Digest) {
        let Self { digests, places, hasher, most } = self;
        if digests.is_empty() {
            // Most sets stay empty; the others are often large.
            places.reserve(*most, |(hash, _)| *hash);
            digests.reserve_exact(*most);
        }
        let hash = hasher.hash_one(digest);
        let is_it = |(_, place): &(u64, usize)| digests.get(*place) == Some(digest);
        if let Entry::Vacant(vacant) = places.entry(hash, is_it, |(hash, _)| *hash) {
            vacant.insert((hash, digests.len()));
            digests.push(*digest);
        }
    }
}

/// Lets other tasks run after a full turn of look-ups, and sometimes after smaller ones. Look-ups never wait, so a
/// caller that makes many of them would otherwise keep its thread busy, in parts of any size.
async fn end_turn(look_ups: usize) {
    if look_ups < LOOKUPS_PER_TURN {
        task::coop::consume_budget().await;
    } else {
        task::yield_now().await;
    }
}

impl Cas {
    /// Makes a few look-ups under one hold of the index's lock.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub(super) fn look_up<T>(&self, look: impl FnOnce(&mut LookUp<'_>) -> T) -> Result<T> {
        if !self.actor().connected() {
            return Err(going_down());
        }
        let (answer, is_work) = self.shared().view.read(self.lessee(), look);
        if is_work {
            self.actor().do_send(SettleUses);
        }
        Ok(answer)
    }

    /// Returns the digests that are not stored, each once, and renews the others (CAS-01..04). The empty blob is never
    /// missing (GEN-06).
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub async fn find_missing(&self, instance: &Instance, digests: &[Digest]) -> Result<Vec<Digest>> {
        let mut missing = MissingDigests { most: digests.len(), ..MissingDigests::default() };
        for part in digests.chunks(LOOKUPS_PER_TURN) {
            self.find_missing_now(instance.blobs(), part, &mut missing)?;
            end_turn(part.len()).await;
        }
        Ok(missing.digests)
    }

    fn find_missing_now(
        &self,
        instance: InstanceId,
        digests: &[Digest],
        missing: &mut MissingDigests,
    ) -> Result<()> {
        for part in digests.chunks(LOOKUPS_PER_HOLD) {
            self.look_up(|index| {
                // The check for the empty blob comes last: it is rare, and it costs a hash.
                let is_missing = |digest: &&Digest| !index.has_blob(instance, **digest) && !digest.is_empty();
                part.iter().filter(is_missing).for_each(|digest| missing.add(digest));
            })?;
        }
        Ok(())
    }

    /// Locates blobs. Stored blobs are renewed, and held if the purpose requires it.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub(super) async fn locate(
        &self,
        instance: &Instance,
        digests: &[Digest],
        purpose: Purpose,
    ) -> Result<Located> {
        let capacity = digests.len();
        let mut located =
            Located { found: Vec::with_capacity(capacity), zstd: Vec::new(), hold: Hold::none(self.clone()) };
        for part in digests.chunks(LOOKUPS_PER_TURN) {
            for part in part.chunks(LOOKUPS_PER_HOLD) {
                self.locate_part(instance.blobs(), part, purpose, &mut located)?;
            }
            end_turn(part.len()).await;
        }
        Ok(located)
    }

    fn locate_part(
        &self,
        instance: InstanceId,
        digests: &[Digest],
        purpose: Purpose,
        located: &mut Located,
    ) -> Result<()> {
        let Located { found, zstd, hold } = located;
        self.look_up(|index| {
            let mut locate = |kind| {
                let look = |&digest: &Digest| {
                    let key = Key { digest, instance, kind };
                    match purpose {
                        Purpose::Look => index.renew(&key),
                        Purpose::Read | Purpose::ReadZstd => {
                            index.hold(&key).inspect(|found| hold.add(found.at))
                        }
                    }
                };
                digests.iter().map(look).collect::<Vec<_>>()
            };
            // Forms are looked up first, so that a form is always older than its blob and is evicted before it.
            if purpose == Purpose::ReadZstd {
                zstd.extend(locate(EntryKind::Zstd));
            }
            found.extend(locate(EntryKind::Blob));
        })
    }

    /// The stamp at which the content of an entry was last verified.
    pub(super) fn known_stamp(&self, at: EntryRef) -> Result<Option<Seal>> {
        self.look_up(|index| index.stamp(at))
    }

    /// The digest of a stored blob of which only the hash is known. The size in `like` is ignored.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub fn blob_by_hash(&self, instance: &Instance, like: Digest) -> Result<Option<Digest>> {
        let empty = Digest::empty(like.function());
        if like.hash() == empty.hash() {
            return Ok(Some(empty));
        }
        let key = Key { digest: like, instance: instance.blobs(), kind: EntryKind::Blob };
        self.look_up(|index| index.find_by_hash(&key))
    }
}

impl CasActor {
    /// Looks an entry up and counts it as used now.
    pub(super) fn renew(&self, key: &Key) -> Option<FoundEntry> {
        self.shared.view.read(None, |index| index.renew(key)).0
    }
}

impl Receive<SettleUses> for CasActor {
    type Answer = ();

    fn receive(&mut self, _: SettleUses, ctx: &mut Self::Context) {
        self.change(|_| ());
        self.write_touches(ctx.address());
    }
}
