//! The zstd form of a blob: its zstd frames in a separate file, so that they are made only once.
//!
//! A form is made in the background when a blob is read compressed for the second time, one form at a time. A form is
//! an entry of the index like any other: it counts toward the limit, is evicted in the order of use, and is dropped if
//! it is damaged. Whether a blob is stored does not depend on its form. Each frame holds [`CHUNK_BYTES`] of the blob,
//! and a [`SeekTable`] follows the frames, so a read may begin anywhere.
//!
//! A form that this process made is trusted while its file is unchanged. Any other form is decoded and hashed from end
//! to end before its first byte is served.
//!
//! A blob that does not get smaller is remembered and sent uncompressed from then on. Blobs up to `SMALL_BLOB_BYTES`
//! get no form; [`super::zstd_reader`] caches their frames in memory.

use crate::actors::cas::{
    blob::BlobReader,
    checked::{CheckedFile, damaged, known_stamp, open, open_to_read, tell_verified},
    client::Cas,
    guards::{Hold, UploadRoom},
    index::{EntryKind, FoundEntry, Key, Stamp},
    new_files::Visible,
    settings::{ZSTD_FORM_PART, ZSTD_HISTORY_WEIGHT, ZSTD_PROBE_BYTES},
    volume::{self, Stored},
};
use crate::{
    instance::{Instance, InstanceId},
    logging::Event,
};
use gorego_reapi::{
    compression::{CHUNK_BYTES, Decoder, Encoder, SeekTable, TABLE_END_BYTES, saves},
    digest::Digest,
    error::{Error, Result},
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

/// The history of compressed reads of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum History {
    /// The blob was read compressed.
    Read,
    /// The blob does not get smaller by compression.
    Incompressible,
}

/// The pool of encoders of a store. It holds at most as many as have worked at the same time.
#[derive(Debug)]
pub(crate) struct Encoders {
    level: i32,
    idle: Mutex<Vec<Encoder>>,
}

impl Encoders {
    pub(crate) fn new(level: i32) -> Self {
        Self { level, idle: Mutex::default() }
    }

    /// Lends an encoder to `work`. The lock of the pool is not held while the encoder works.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Encoder) -> Result<T>) -> Result<T> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        let mut encoder = kept.map_or_else(|| Encoder::new(self.level), Ok)?;
        let outcome = work(&mut encoder);
        idle().push(encoder);
        outcome
    }
}

/// An open, verified form.
#[derive(Debug)]
pub(crate) struct Form {
    /// The frames, without the table.
    pub frames: BlobReader,
    /// The table of the frames.
    pub table: SeekTable,
}

impl Form {
    /// Opens the frames of a blob that is kept compressed; they serve as its form. `None` if the blob is not kept
    /// compressed. Blocks for as long as decoding and hashing takes.
    ///
    /// # Errors
    /// `NotFound` when the file is damaged or gone, which is reported.
    pub(crate) fn of_packed(cas: &Cas, found: FoundEntry, hold: &Arc<Hold>) -> Result<Option<Self>> {
        if !found.file.is_packed() {
            return Ok(None);
        }
        let stored = open_to_read(cas, &found)?;
        let opened = BlobReader::of_frames(cas.clone(), found, stored, hold.clone());
        Ok(opened.map(|(frames, table)| Self { frames, table }))
    }

    /// Opens a located form. Returns `None` when the form is unusable, which is reported. Blocks for as long as
    /// decoding takes.
    pub(crate) fn open(cas: &Cas, found: FoundEntry, hold: &Arc<Hold>) -> Option<Self> {
        // `open` reports a damaged form. Other errors, such as too many open files, say nothing about the form.
        let file = open(cas, &found).ok()?;
        let (table, stamp) = match known_stamp(cas, &found, &*file).ok()? {
            Some(stamp) => (table_of(cas, &found, &*file).ok()?, stamp),
            None => check_form(cas, &found, &*file).ok()?,
        };
        let size = table.sizes().1;
        let check = |cas: &Cas, found: &FoundEntry, file: &dyn Stored| Ok(check_form(cas, found, file)?.1);
        let stored = CheckedFile::new(file, stamp, check);
        let frames = BlobReader::of_file(cas.clone(), found, stored, size, hold.clone());
        Some(Self { frames, table })
    }
}

/// Decodes and hashes a form. Returns its table and the stamp at which it was verified, and reports it to the actor.
/// Blocks.
///
/// # Errors
/// `NotFound` when it is damaged, which is reported.
fn check_form(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<(SeekTable, Stamp)> {
    let table = table_of(cas, found, file)?;
    let before = file.look().map_err(Error::internal)?;
    verify(file, &table, found.file.key.digest).map_err(|error| damaged(cas, found, error.to_string()))?;
    tell_verified(cas, found, file, before.lasting);
    Ok((table, before.stamp))
}

/// The table of a form.
///
/// # Errors
/// `NotFound` when it does not fit the form, which is reported.
fn table_of(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<SeekTable> {
    let length = file.look().map_err(Error::internal)?.size;
    read_table(file, length)
        .ok()
        .flatten()
        .filter(|table| table.sizes().0 == found.file.key.digest.size())
        .ok_or_else(|| damaged(cas, found, "its table does not fit it".into()))
}

/// The table at the end of a file of this length, if it covers everything before it.
fn read_table(file: &dyn Stored, length: u64) -> io::Result<Option<SeekTable>> {
    let mut end = [0; TABLE_END_BYTES];
    let Some(end_at) = length.checked_sub(end.len() as u64) else { return Ok(None) };
    volume::read_exact(file, &mut end, end_at)?;
    let Some(bytes) = SeekTable::length(&end).filter(|bytes| *bytes as u64 <= length) else {
        return Ok(None);
    };
    let mut table = vec![0; bytes];
    let table_at = length - bytes as u64;
    volume::read_exact(file, &mut table, table_at)?;
    Ok(SeekTable::decode(&table).filter(|table| table.sizes().1 == table_at))
}

/// Decodes every frame, and checks that its sizes are those in the table and that the frames together make the blob.
fn verify(file: &dyn Stored, table: &SeekTable, digest: Digest) -> Result<()> {
    let wrong = |problem: &str| Error::Internal(format!("as a zstd stream, {problem}"));
    let mut hasher = digest.hasher();
    let mut decoder = Decoder::new(digest.size())?;
    let (mut buffer, mut at) = (Vec::new(), 0);
    for (plain, packed) in table.frames() {
        // Frames of this server are never larger, and a table that claims so would cost memory.
        if plain > CHUNK_BYTES as u64 || packed > 2 * CHUNK_BYTES as u64 {
            return Err(wrong("it has a frame that is too large"));
        }
        buffer.resize(packed as usize, 0);
        volume::read_exact(file, &mut buffer, at).map_err(Error::internal)?;
        at += packed;
        decoder.decode(&buffer, |piece| {
            hasher.update(piece);
            Ok(())
        })?;
        decoder.finish()?;
        if decoder.produced() != hasher.size() || at > table.sizes().1 {
            return Err(wrong("its frames are not where its table says"));
        }
    }
    let actual = hasher.finish();
    if actual == digest { Ok(()) } else { Err(wrong(&format!("its content has the digest {actual}"))) }
}

impl Cas {
    /// Locates the zstd form of one blob.
    fn locate_form(&self, instance: &Instance, digest: Digest) -> Result<Option<FoundEntry>> {
        let key = Key { digest, instance: instance.blobs(), kind: EntryKind::Zstd };
        self.look_up(|index| index.renew(&key))
    }

    /// Records a compressed read of a larger blob without a form, and returns what earlier reads have shown. From the
    /// second read on, a form is made in the background.
    pub(crate) fn note_zstd_read(&self, instance: &Instance, digest: Digest) -> Option<History> {
        let shared = self.shared();
        let key = (instance.blobs(), digest);
        let history = shared.zstd_history.get(&key);
        match history {
            None => shared.zstd_history.insert(key, History::Read, ZSTD_HISTORY_WEIGHT),
            Some(History::Incompressible) => {}
            Some(History::Read) => self.make_form(instance, digest),
        }
        history
    }

    /// Starts making the form of a blob. If another form is being made, a later read tries again.
    fn make_form(&self, instance: &Instance, digest: Digest) {
        if digest.size() > self.shared().settings.max_bytes / ZSTD_FORM_PART {
            return;
        }
        let Ok(turn) = self.shared().form_turn.clone().try_acquire_owned() else { return };
        let (cas, instance) = (self.clone(), instance.clone());
        self.shared().runtime.spawn(async move {
            let _turn = turn;
            if let Err(error) = cas.try_make_form(&instance, digest).await {
                Event::debug(crate::actors::cas::LOG, "zstd_form_not_made")
                    .with_shown("digest", &digest)
                    .with_shown("error", &error)
                    .log(format_args!("could not keep the zstd form of a blob"));
            }
        });
    }

    async fn try_make_form(&self, instance: &Instance, digest: Digest) -> Result<()> {
        if self.locate_form(instance, digest)?.is_some() {
            // Another read has made the form meanwhile.
            return Ok(());
        }
        let blob = self.open(instance, digest).await?;
        let (cas, id) = (self.clone(), instance.blobs());
        let visible = self.blocking(move || cas.write_form(&blob, id, digest)).await??;
        if let Some(visible) = visible {
            let _ = visible.wait().await;
        }
        Ok(())
    }

    /// Compresses a blob into a file and hands it to the actor. Returns `None` when the blob does not get smaller.
    fn write_form(&self, blob: &BlobReader, instance: InstanceId, digest: Digest) -> Result<Option<Visible>> {
        let shared = self.shared();
        let failed = |error: io::Error| Error::io(&format!("write the zstd form of blob {digest}"), &error);
        let mut target = shared.volume.draft().map_err(failed)?;
        // One form is made at a time, so at most one thread waits for room.
        let mut room = UploadRoom::none(self.actor().clone());
        let mut grow = |bytes: u64| room.grow_here(&shared.runtime, shared.volume.charge(bytes), u64::MAX);
        let mut table = SeekTable::default();
        let mut frame = Vec::new();
        let mut at = 0;
        while at < digest.size() {
            let length = (digest.size() - at).min(CHUNK_BYTES as u64);
            let chunk = blob.read_exact(at, length as usize)?;
            frame.clear();
            shared.encoders.with(|encoder| encoder.frames(&chunk, &mut frame))?;
            grow(table.sizes().1 + frame.len() as u64)?;
            target.write(&frame).map_err(failed)?;
            table.push(length, frame.len() as u64)?;
            at += length;
            let is_probe = at >= ZSTD_PROBE_BYTES || at == digest.size();
            if is_probe && !saves(at, table.sizes().1) {
                let key = (instance, digest);
                shared.zstd_history.insert(key, History::Incompressible, ZSTD_HISTORY_WEIGHT);
                return Ok(None);
            }
        }
        let table_bytes = table.encode();
        let length = table.sizes().1 + table_bytes.len() as u64;
        grow(length)?;
        target.write(&table_bytes).map_err(failed)?;
        let key = Key { digest, instance, kind: EntryKind::Zstd };
        let mut files = self.new_files(room.into_reservation());
        files.keep(key, target).map_err(failed)?;
        Ok(files.commit())
    }
}
