//! [`CheckedFile`]: an open stored file whose content was verified, and the ways to open and verify one.
//!
//! A blob of up to `SMALL_BLOB_BYTES` is hashed at every read, unless the volume has checked its checksums and it was
//! hashed before. Every read of a larger blob checks the checksums of its blocks, so that its first byte is served at
//! once, even after a restart. It is first hashed from end to end if it has no checksums, or if its [`Stamp`] differs
//! from the one that this process knows. The stamp is checked again after each read, before the bytes are handed out. A
//! blob that does not match is reported to the actor, which drops it. From then on it is a miss.
//!
//! The checksums of an input file are not checked when the kernel copies or clones it for an action. Such a blob is
//! hashed once in the life of the process, and again when its stamp changes ([`open_checked`]). The scrub finds later
//! errors of the disk in it.

use super::{
    client::Cas,
    index::{EntryRef, FileId, FoundEntry, Seal, Stamp},
    lookup::Purpose,
    settings::SMALL_BLOB_BYTES,
    volume::{self, COARSE_TICK, Stored, checksums::ChecksumBuilder},
};
use crate::{budget::Share, instance::Instance};
use actix::Message;
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use std::{
    io,
    sync::{Mutex, PoisonError},
    thread,
};

/// Number of times that a file whose stamp differs from the verified one is checked again, [`COARSE_TICK`] apart,
/// before it is hashed.
const STAMP_LOOKS: usize = 3;

/// Fact: the content of a file was verified.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Verified {
    pub at: EntryRef,
    pub stamp: Stamp,
}

/// Fact: a stored file is damaged or gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Damaged {
    pub at: EntryRef,
    pub reason: String,
}

/// Verifies the content of a stored file from end to end. Returns the stamp at which it was verified. Blocks.
///
/// # Errors
/// `NotFound` when the content is wrong. This is reported to the actor.
pub(super) type ContentCheck = fn(&Cas, &FoundEntry, &dyn Stored) -> Result<Stamp>;

/// An open stored file, with its stamp when its content was last verified.
#[derive(Debug)]
pub(super) struct CheckedFile {
    file: Box<dyn Stored>,
    stamp: Mutex<Stamp>,
    check: ContentCheck,
}

impl CheckedFile {
    /// A file whose content was verified at this stamp; `check` verifies it again.
    pub(super) fn new(file: Box<dyn Stored>, stamp: Stamp, check: ContentCheck) -> Self {
        Self { file, stamp: Mutex::new(stamp), check }
    }

    /// The file. [`CheckedFile::confirm`] has to follow each read.
    pub(super) fn file(&self) -> &dyn Stored {
        &*self.file
    }

    /// Whether the file still has the verified stamp. One system call.
    pub(super) fn is_unchanged(&self) -> bool {
        let stamp = *self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.look().is_ok_and(|now| now.stamp == stamp)
    }

    /// Ensures that the bytes read so far are right: a changed file is verified again. Blocks.
    ///
    /// # Errors
    /// `NotFound` when the content is wrong. This is reported to the actor.
    pub(super) fn confirm(&self, cas: &Cas, found: &FoundEntry) -> Result<()> {
        if self.is_unchanged() {
            return Ok(());
        }
        let stamp = match known_stamp(cas, found, self.file())? {
            Some(known) => known,
            None => (self.check)(cas, found, self.file())?,
        };
        *self.stamp.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
        Ok(())
    }
}

impl Cas {
    /// Waits for a place if one of these blobs is large and has to be hashed before it is read.
    pub(super) async fn place_to_hash(
        &self,
        found: impl IntoIterator<Item = &FoundEntry>,
    ) -> Result<Option<Share>> {
        let is_laborious = |found: &FoundEntry| {
            found.stamp == Stamp::UNTRUSTED && found.file.key.digest.size() > SMALL_BLOB_BYTES
        };
        if !found.into_iter().any(is_laborious) {
            return Ok(None);
        }
        Ok(Some(self.shared().cold_reads.wait_for(self.caller(), 1).await?))
    }

    /// Whether these blobs are stored and their files are intact. Files whose state is not known are hashed. Damaged
    /// blobs are dropped.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down.
    pub(super) async fn are_sound(&self, instance: &Instance, digests: Vec<Digest>) -> Result<bool> {
        let located = self.locate(instance, &digests, Purpose::Read).await?;
        let place = self.place_to_hash(located.found.iter().flatten()).await?;
        let cas = self.clone();
        self.blocking(move || {
            let _place = place;
            let mut all = true;
            for found in &located.found {
                all &= match found {
                    Some(found) => is_sound(&cas, found)?,
                    None => false,
                };
            }
            Ok(all)
        })
        .await?
    }
}

/// Opens the file of a larger blob. Its blocks are checked when they are read. If it has no checksums or has changed,
/// it is hashed now. Blocks for as long as that takes.
pub(super) fn open_to_read(cas: &Cas, found: &FoundEntry) -> Result<CheckedFile> {
    let file = open(cas, found)?;
    let look = file.look().map_err(|error| failed(cas, found, &error))?;
    if !file.is_checked_when_read() || look.size != found.file.key.digest.size() {
        let stamp = check_content(cas, found, &*file)?;
        // Hashing has added checksums, so the file is opened again with them.
        return Ok(CheckedFile::new(open(cas, found)?, stamp, check_content));
    }
    let is_new = found.stamp == Seal::UNTRUSTED;
    let stamp = match if is_new { Some(look.stamp) } else { known_stamp(cas, found, &*file)? } {
        Some(stamp) => stamp,
        None => check_content(cas, found, &*file)?,
    };
    if is_new {
        // Damage at the start of the blob is a miss, not an answer that breaks off.
        let mut start = [0];
        file.read_at(&mut start, 0).map_err(|error| failed(cas, found, &error))?;
    }
    Ok(CheckedFile::new(file, stamp, check_content))
}

/// Opens the file of a stored blob of any size and verifies its content. Blocks for as long as hashing takes.
pub(super) fn open_checked(cas: &Cas, found: &FoundEntry) -> Result<CheckedFile> {
    let file = open(cas, found)?;
    let look = file.look().map_err(|error| failed(cas, found, &error))?;
    let has_its_size = look.size == found.file.key.digest.size();
    let known = if has_its_size { known_stamp(cas, found, &*file)? } else { None };
    let stamp = match known {
        Some(stamp) => stamp,
        None => check_content(cas, found, &*file)?,
    };
    Ok(CheckedFile::new(file, stamp, check_content))
}

/// The current stamp of a file, if its content was verified at that stamp. The server itself changes the change time
/// when it records a use, and the actor learns of this a moment later. So a file with a different stamp is checked a
/// few times before it is hashed. Blocks.
pub(super) fn known_stamp(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<Option<Stamp>> {
    for look in 0..STAMP_LOOKS {
        if look > 0 {
            thread::sleep(COARSE_TICK);
        }
        let now = file.look().map_err(|error| failed(cas, found, &error))?.stamp;
        if now == found.stamp {
            return Ok(Some(now));
        }
        match cas.known_stamp(found.at)? {
            Some(known) if known == now => return Ok(Some(now)),
            // Only a verified stamp can be out of date.
            None | Some(Seal::UNTRUSTED) => return Ok(None),
            Some(_) => {}
        }
    }
    Ok(None)
}

/// Hashes a stored blob. Returns the stamp at which it was verified and reports it to the actor. Blocks.
fn check_content(cas: &Cas, found: &FoundEntry, file: &dyn Stored) -> Result<Stamp> {
    check_content_slowly(cas, found, file, &mut |_| Ok(()))
}

/// Like [`check_content`], but calls `pause` after each piece with the number of its bytes. An error of `pause` ends
/// the check.
pub(super) fn check_content_slowly(
    cas: &Cas,
    found: &FoundEntry,
    file: &dyn Stored,
    pause: &mut dyn FnMut(usize) -> io::Result<()>,
) -> Result<Stamp> {
    let digest = found.file.key.digest;
    // The stamp is taken before hashing, because a later change in the same clock tick would not show.
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    if before.size != digest.size() {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let mut sums = ChecksumBuilder::default();
    let read = |piece: &mut [u8], at| {
        let read = file.read_at(piece, at)?;
        sums.update(piece.get(..read).unwrap_or_default());
        pause(read)?;
        Ok(read)
    };
    let actual = volume::hash(digest.hasher(), read).map_err(|error| failed(cas, found, &error))?;
    if actual != digest {
        return Err(damaged(cas, found, format!("its content has the digest {actual}")));
    }
    if !file.is_checked_when_read() {
        // Without checksums, the file is only hashed again.
        let _ = cas.shared().volume.add_checksums(&found.file, &sums.finish());
    }
    tell_verified(cas, found, file, before.lasting);
    Ok(before.stamp)
}

/// Reports to the actor that a file was verified, if the file still has the stamp from before it was read.
pub(super) fn tell_verified(cas: &Cas, found: &FoundEntry, file: &dyn Stored, stamp: Stamp) {
    let is_unchanged = file.look().is_ok_and(|now| now.stamp == stamp);
    if is_unchanged && file.nobody_writes() {
        cas.actor().do_send(Verified { at: found.at, stamp });
    }
}

/// Whether a stored blob's file is intact. The file is hashed only if its stamp does not show this. A damaged file is
/// reported. Blocks.
///
/// # Errors
/// Errors that say nothing about the blob, such as too many open files.
pub(super) fn is_sound(cas: &Cas, found: &FoundEntry) -> Result<bool> {
    let look = cas.shared().volume.look(&found.file);
    if look.is_ok_and(|now| now.size == found.file.key.digest.size() && now.stamp == found.stamp) {
        return Ok(true);
    }
    match open_checked(cas, found) {
        Ok(_) => Ok(true),
        Err(Error::NotFound(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a stored blob into memory and verifies its content. Blocks.
pub(super) fn read_whole(cas: &Cas, found: &FoundEntry) -> Result<Bytes> {
    let digest = found.file.key.digest;
    let file = open(cas, found)?;
    let before = file.look().map_err(|error| failed(cas, found, &error))?;
    let size = digest.size();
    if before.size != size {
        return Err(damaged(cas, found, format!("it has {} bytes", before.size)));
    }
    let checked = file.whole();
    let is_checked = checked.is_some();
    let bytes = match checked {
        Some(bytes) => bytes,
        None => {
            let mut bytes = vec![0; usize::try_from(size).map_err(Error::internal)?];
            volume::read_exact(&*file, &mut bytes, 0).map_err(|error| failed(cas, found, &error))?;
            bytes.into()
        }
    };
    // The stamp is checked after the bytes were read, so that any earlier change shows.
    let is_known = file.look().is_ok_and(|now| now.stamp == found.stamp);
    if !is_known || (size <= SMALL_BLOB_BYTES && !is_checked) {
        let actual = digest.function().digest(&bytes);
        if actual != digest {
            return Err(damaged(cas, found, format!("its content has the digest {actual}")));
        }
        if !is_known {
            tell_verified(cas, found, &*file, before.lasting);
        }
    }
    Ok(bytes)
}

/// Reads all of a stored file of at most `max` bytes, whose content the caller checks. Blocks.
pub(super) fn read_unchecked(cas: &Cas, found: &FoundEntry, max: u64) -> Result<Vec<u8>> {
    let file = open(cas, found)?;
    volume::read_all(&*file, max).map_err(|error| failed(cas, found, &error))
}

/// Reads all of a stored file of at most `max` bytes, whose content the caller checks. For a longer file, the inner
/// error is its size. Blocks.
pub(super) fn read_unless_large(
    cas: &Cas,
    found: &FoundEntry,
    max: u64,
) -> Result<std::result::Result<Vec<u8>, u64>> {
    let file = open(cas, found)?;
    let failed = |error: io::Error| failed(cas, found, &error);
    let size = file.look().map_err(failed)?.size;
    if size > max {
        return Ok(Err(size));
    }
    volume::read_all(&*file, max).map(Ok).map_err(failed)
}

/// The error for a blob that is not stored.
pub(super) fn not_found(digest: Digest) -> Error {
    Error::NotFound(format!("blob {digest} is not in the CAS"))
}

/// Opens a stored file without checking its content. Blocks.
pub(super) fn open(cas: &Cas, found: &FoundEntry) -> Result<Box<dyn Stored>> {
    open_file(cas, &found.file).map_err(|error| failed(cas, found, &error))
}

/// Opens a stored file that was looked up. If compaction has moved it since, it is looked up again. Blocks.
pub(super) fn open_file(cas: &Cas, file: &FileId) -> io::Result<Box<dyn Stored>> {
    let mut file = *file;
    loop {
        let error = match cas.shared().volume.open(&file) {
            Err(error) if volume::is_lost(&error) => error,
            opened => return opened,
        };
        match cas.look_up(|index| index.renew(&file.key)) {
            // The loop ends, because each turn needs another compaction.
            Ok(Some(found)) if found.file != file => file = found.file,
            _ => return Err(error),
        }
    }
}

/// Classifies a failed read. A lost file ([`volume::is_lost`]) is reported as damaged and is a miss. Other failures,
/// such as too many open files, say nothing about the blob.
pub(super) fn failed(cas: &Cas, found: &FoundEntry, error: &io::Error) -> Error {
    if volume::is_lost(error) {
        return damaged(cas, found, error.to_string());
    }
    Error::io(&format!("read blob {}", found.file.key.digest), error)
}

pub(super) fn damaged(cas: &Cas, found: &FoundEntry, reason: String) -> Error {
    report(cas, found, reason);
    not_found(found.file.key.digest)
}

/// Hides the entry at once and reports it to the actor, which knows whether the file was merely evicted meanwhile.
pub(super) fn report(cas: &Cas, found: &FoundEntry, reason: String) {
    cas.shared().view.condemn(found.at);
    cas.actor().do_send(Damaged { at: found.at, reason });
}
