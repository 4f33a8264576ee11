//! Batches of whole blobs: [`Cas::read_many`] and [`Cas::write_many`].
//!
//! Each item has its own result. Room is reserved for several items at once; items that are already stored need none.
//!
//! Bounds: jobs run to their end, even if their request is cancelled, so they hold shares of the memory for reads
//! ([`READS`]) and for batches that are written ([`BATCHES`]). A request waits for its share. A request that has one
//! waits for nothing else but a thread.

use super::{
    checked::{not_found, read_whole},
    client::{Cas, going_down, spoilt},
    guards::Reservation,
    index::{EntryKind, FoundEntry, Key},
    joint_writes::JOINT_FILE_BYTES,
    lookup::Purpose,
    new_files::{NewFiles, Visible},
    settings::{BATCHES, READS, ROOM_STEP_BYTES, SOUND_TRIES},
    uploads::{
        begin::Upload,
        sink::{Payload, WHOLE_BYTES, check_bytes, check_item, check_stream, failed},
    },
    volume::NewFile,
};
use crate::{
    budget::Share,
    instance::{Instance, InstanceId},
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// The answer of [`Cas::prepare`].
pub(super) struct Prepared {
    /// The blobs that are not stored.
    pub absent: Vec<Digest>,
    /// Room for all absent blobs.
    pub room: Result<Reservation>,
}

/// The items of a batch that is written. They may be parts of one buffer, so each job takes memory for all of them.
struct WrittenBatch {
    items: Vec<(Digest, Payload)>,
    /// The bytes of all items as they were received.
    bytes: u64,
}

impl Cas {
    /// Waits for memory for a job that reads this many bytes of blobs.
    pub(super) async fn memory_to_read(&self, bytes: u64) -> Result<Share> {
        Ok(self.shared().reads.wait_for(self.caller(), bytes.min(READS.total)).await?)
    }

    /// Waits for memory for jobs that write this many bytes.
    pub(super) async fn memory_to_write(&self, bytes: u64) -> Result<Share> {
        Ok(self.shared().batches.wait_for(self.caller(), bytes.min(BATCHES.connection)).await?)
    }

    /// Reads whole blobs, in the order of the digests; duplicates are allowed. It is meant for small blobs: the caller
    /// bounds their total size.
    ///
    /// # Errors
    /// Each blob has its own result. The call fails when the server is shutting down.
    pub async fn read_many(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Vec<Result<Bytes>>> {
        let located = self.locate(instance, &digests, Purpose::Look).await?;
        let at_hand = |(digest, found): (&Digest, &Option<FoundEntry>)| match found {
            Some(_) => self.shared().recent.get(&(instance.blobs(), *digest)).map(Ok),
            None if digest.is_empty() => Some(Ok(Bytes::new())),
            None => Some(Err(not_found(*digest))),
        };
        let known: Vec<Option<Result<Bytes>>> = digests.iter().zip(&located.found).map(at_hand).collect();
        if known.iter().all(Option::is_some) {
            return Ok(known.into_iter().flatten().collect());
        }
        let unread = digests.iter().zip(&known).filter(|(_, known)| known.is_none());
        let memory =
            self.memory_to_read(unread.map(|(digest, _)| digest.size()).fold(0, u64::saturating_add));
        let cas = self.clone();
        let reading = self.blocking_with(memory.await?, move || {
            let read = |(known, found): (Option<Result<Bytes>>, Option<FoundEntry>)| match (known, found) {
                (Some(known), _) => Some(known),
                (None, found) => found.map(|found| read_whole(&cas, &found)),
            };
            known.into_iter().zip(located.found).filter_map(read).collect()
        });
        reading.await.map(|(read, _memory)| read)
    }

    /// Stores whole blobs, each checked against its digest (CAS-09..13); duplicates are allowed.
    ///
    /// # Errors
    /// Each blob has its own result. The call fails when the server is shutting down.
    pub async fn write_many(
        &self,
        instance: &Instance,
        blobs: Vec<(Digest, impl Into<Payload>)>,
    ) -> Result<Vec<Result<()>>> {
        let items: Vec<(Digest, Payload)> =
            blobs.into_iter().map(|(digest, bytes)| (digest, bytes.into())).collect();
        if let Some(outcomes) = self.write_few(instance, &items).await? {
            return Ok(outcomes);
        }
        let bytes_of =
            |(_, Payload::Plain(bytes) | Payload::Zstd(bytes)): &(Digest, Payload)| bytes.len() as u64;
        let bytes = items.iter().map(bytes_of).sum();
        let batch = Arc::new(WrittenBatch { items, bytes });
        let mut outcomes = vec![Ok(()); batch.items.len()];
        let mut all_visible = Vec::new();
        for step in in_steps(&batch.items) {
            if let [at] = step[..]
                && let Some((digest, Payload::Zstd(stream))) = batch.items.get(at)
                && digest.size() > WHOLE_BYTES
            {
                outcomes[at] = self.write_stream(instance, *digest, stream.clone(), batch.bytes).await;
                continue;
            }
            let (stored, visible) = self.write_step(instance, batch.clone(), step.clone()).await?;
            for (at, outcome) in step.into_iter().zip(stored) {
                outcomes[at] = outcome;
            }
            all_visible.extend(visible);
        }
        for visible in all_visible {
            visible.wait().await?;
        }
        Ok(outcomes)
    }

    /// Stores a small batch of blobs that are not stored, together with files of other requests. Returns `None` for
    /// other batches.
    async fn write_few(
        &self,
        instance: &Instance,
        blobs: &[(Digest, Payload)],
    ) -> Result<Option<Vec<Result<()>>>> {
        let Some(plain) = small_and_plain(blobs) else { return Ok(None) };
        let digests: Vec<Digest> = plain.iter().map(|(digest, _)| *digest).collect();
        // Otherwise some are stored, or there are duplicates.
        if self.find_missing(instance, &digests).await?.len() < digests.len() {
            return Ok(None);
        }
        let bytes = digests.iter().map(Digest::size).sum();
        let Ok(memory) = self.charge_received(bytes) else { return Ok(None) };
        let check = |(digest, bytes): &(Digest, Bytes)| {
            self.check_blob_size(digest.size(), digest)?;
            check_bytes(*digest, bytes)
        };
        let mut outcomes: Vec<Result<()>> = plain.iter().map(check).collect();
        let mut checked = outcomes.iter();
        let good = plain.into_iter().filter(|_| checked.next().is_some_and(Result::is_ok)).collect();
        let mut stored = self.write_checked(instance.blobs(), good, memory).await.into_iter();
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.is_ok()) {
            *outcome = stored.next().unwrap_or_else(|| Err(going_down()));
        }
        Ok(Some(outcomes))
    }

    /// Stores the items of a batch that share one reservation.
    async fn write_step(
        &self,
        instance: &Instance,
        batch: Arc<WrittenBatch>,
        step: Vec<usize>,
    ) -> Result<(Vec<Result<()>>, Option<Visible>)> {
        let fits = |digest: &Digest, payload: &Payload| match payload {
            Payload::Plain(bytes) => digest.size() == bytes.len() as u64 && !digest.is_empty(),
            Payload::Zstd(_) => !digest.is_empty(),
        };
        let items = step.iter().filter_map(|&at| batch.items.get(at));
        let digests: HashSet<Digest> =
            items.filter(|(digest, bytes)| fits(digest, bytes)).map(|(digest, _)| *digest).collect();
        let prepared = self.prepare(instance, digests.into_iter().collect()).await?;
        let (cas, id) = (self.clone(), instance.blobs());
        let memory = self.memory_to_write(batch.bytes).await?;
        let written = self.blocking_with(memory, move || {
            let items: Vec<_> = step.iter().filter_map(|&at| batch.items.get(at)).collect();
            cas.write_batch(id, &items, prepared)
        });
        written.await.map(|(written, _memory)| written)
    }

    /// Stores one large compressed item of a batch, as an upload that cannot be resumed.
    async fn write_stream(
        &self,
        instance: &Instance,
        digest: Digest,
        stream: Bytes,
        batch_bytes: u64,
    ) -> Result<()> {
        let name = format!("batch/{:x}", self.shared().volume.next_generation());
        match self.begin_upload(instance, &name, digest, 0).await? {
            Upload::Present => {
                let memory = self.memory_to_write(batch_bytes).await?;
                self.blocking_with(memory, move || check_stream(digest, &stream)).await?.0
            }
            Upload::Writer(writer) => {
                let mut writer = writer.decoding().unresumable();
                writer.write(stream).await?;
                writer.finish().await.map(drop)
            }
        }
    }

    /// Reserves room for the blobs that are not stored. The files of stored blobs are checked, so a damaged blob is
    /// dropped and counts as not stored.
    pub(super) async fn prepare(&self, instance: &Instance, digests: Vec<Digest>) -> Result<Prepared> {
        for _ in 0..SOUND_TRIES {
            let absent = self.find_missing(instance, &digests).await?;
            if absent.len() < digests.len() {
                let absent: HashSet<&Digest> = absent.iter().collect();
                let present = digests.iter().filter(|digest| !absent.contains(digest)).copied().collect();
                if !self.are_sound(instance, present).await? {
                    continue;
                }
            }
            let room = self.reserve_for(&absent).await?;
            return Ok(Prepared { absent, room });
        }
        Err(spoilt())
    }

    /// Reserves room for blobs that are not stored.
    async fn reserve_for(&self, absent: &[Digest]) -> Result<Result<Reservation>> {
        let charge = |digest: &Digest| self.shared().volume.charge(digest.size());
        let bytes = absent.iter().map(charge).fold(0, u64::saturating_add);
        match self.take_room(bytes).await {
            Err(error @ Error::Unavailable(_)) => Err(error),
            room => Ok(room),
        }
    }

    /// Checks and writes items; the written files are handed to the actor before this returns. Blocks.
    fn write_batch(
        &self,
        instance: InstanceId,
        blobs: &[&(Digest, Payload)],
        prepared: Prepared,
    ) -> (Vec<Result<()>>, Option<Visible>) {
        let mut absent: HashSet<Digest> = prepared.absent.into_iter().collect();
        let mut files = prepared.room.map(|room| self.new_files(room));
        let mut new: Vec<(Key, [Bytes; 1])> = Vec::new();
        let outcomes = blobs.iter().map(|(digest, payload)| {
            self.check_blob_size(digest.size(), digest)?;
            let bytes = check_item(*digest, payload)?;
            if absent.contains(digest) {
                files.as_ref().map_err(|error| error.clone())?;
                new.push((Key { digest: *digest, instance, kind: EntryKind::Blob }, [bytes]));
                absent.remove(digest);
            }
            Ok(())
        });
        let mut outcomes: Vec<Result<()>> = outcomes.collect();
        if let Ok(files) = &mut files {
            let unwritten = self.write_new(files, &new);
            for ((digest, _), outcome) in blobs.iter().zip(&mut outcomes) {
                // A duplicate shares the outcome of the item that was to be written.
                if let Some(error) = unwritten.get(digest).filter(|_| outcome.is_ok()) {
                    *outcome = Err(error.clone());
                }
            }
        }
        (outcomes, files.ok().and_then(NewFiles::commit))
    }

    /// Writes the new blobs of a batch. Returns those that could not be written.
    fn write_new(&self, files: &mut NewFiles, blobs: &[(Key, [Bytes; 1])]) -> HashMap<Digest, Error> {
        let new: Vec<NewFile<'_>> = blobs.iter().map(|(key, pieces)| NewFile { key: *key, pieces }).collect();
        let mut unwritten = HashMap::new();
        for (written, (key, pieces)) in files.write_all(&new).into_iter().zip(blobs) {
            match written {
                Ok(_) => self.shared().remember(key.instance, key.digest, pieces),
                Err(error) => {
                    unwritten.insert(key.digest, failed(key.digest, &error));
                }
            }
        }
        unwritten
    }
}

/// The items of a batch, if all of them are uncompressed and of the right length, and few enough to be hashed at once.
fn small_and_plain(blobs: &[(Digest, Payload)]) -> Option<Vec<(Digest, Bytes)>> {
    let mut left = JOINT_FILE_BYTES;
    let plain = blobs.iter().map(|(digest, payload)| match payload {
        Payload::Plain(bytes) if digest.size() == bytes.len() as u64 && !bytes.is_empty() => {
            left = left.checked_sub(digest.size())?;
            Some((*digest, bytes.clone()))
        }
        Payload::Plain(_) | Payload::Zstd(_) => None,
    });
    plain.collect()
}

/// Groups the items of a batch, by position, into steps that share one reservation. Plain items form one step, because
/// their bytes are already there. Compressed items declare their size only in the digest, so a step reserves at most
/// [`ROOM_STEP_BYTES`] for them; a larger item is a step of its own.
fn in_steps(blobs: &[(Digest, Payload)]) -> Vec<Vec<usize>> {
    let (mut plain, mut steps): (Vec<usize>, Vec<Vec<usize>>) = (Vec::new(), Vec::new());
    let mut left = 0;
    for (at, (digest, payload)) in blobs.iter().enumerate() {
        let size = digest.size().max(1);
        match (payload, steps.last_mut()) {
            (Payload::Plain(_), _) => plain.push(at),
            (Payload::Zstd(_), Some(step)) if size <= left => {
                step.push(at);
                left -= size;
            }
            (Payload::Zstd(_), _) => {
                steps.push(vec![at]);
                left = ROOM_STEP_BYTES.saturating_sub(size);
            }
        }
    }
    if !plain.is_empty() {
        steps.insert(0, plain);
    }
    steps
}
