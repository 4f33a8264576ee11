//! [`NewBlob`]: stores bytes whose digest and size are known only at the end.
//!
//! Downloads and HTTP uploads work like this. A small blob stays in memory and is then stored like any small blob. A
//! larger one is written under a temporary name and gets its final name when its digest is known. Room is reserved in
//! steps, ahead of the bytes. Nothing is visible before [`NewBlob::finish`], and dropping a `NewBlob` leaves nothing
//! behind.
//!
//! Received pieces may be parts of larger buffers of a connection. Pieces of less than [`COPIED_BYTES`] are copied, so
//! that none of them keeps a whole buffer in memory.

use crate::actors::cas::{
    client::Cas,
    guards::UploadRoom,
    index::{EntryKind, Key},
    uploads::unwritten::UnwrittenPieces,
    volume::Draft,
};
use crate::instance::Instance;
use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction, Hasher},
    error::{Error, Result},
};

/// Number of bytes that are collected before a blocking thread is used. A smaller blob needs no temporary file.
const PIECE_BYTES: usize = 256 * 1024;
/// Pieces below this size are copied. It is half of the smallest buffer that connections read into.
const COPIED_BYTES: usize = 4 * 1024;

/// A blob that is being received; see the module documentation.
#[derive(Debug)]
pub struct NewBlob {
    cas: Cas,
    instance: Instance,
    function: DigestFunction,
    size: u64,
    /// The size that the sender has announced; `u64::MAX` if there is none. No room is reserved beyond it in advance.
    announced: u64,
    received: UnwrittenPieces,
    sink: Option<HashedDraft>,
    room: Option<UploadRoom>,
}

#[derive(Debug)]
struct HashedDraft {
    file: Box<dyn Draft>,
    /// `None` for a function that has to know the size first. The file is then read again to hash it.
    hasher: Option<Hasher>,
}

impl NewBlob {
    /// The number of bytes received so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Announces the size of the blob. It may turn out to be wrong.
    pub fn announce(&mut self, size: u64) {
        self.announced = size;
    }

    /// Appends the next bytes.
    ///
    /// # Errors
    /// `Invalid` beyond the largest blob size (CAP-15), `Exhausted` when there is no room.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.size = self.size.saturating_add(bytes.len() as u64);
        self.cas.check_blob_size(self.size, "the upload")?;
        let piece = if bytes.len() < COPIED_BYTES { Bytes::copy_from_slice(&bytes) } else { bytes };
        let has_room = self.received.push(piece).is_ok();
        if !has_room || self.received.bytes() >= PIECE_BYTES {
            self.spill().await?;
        }
        Ok(())
    }

    /// Stores the blob and makes it visible.
    ///
    /// # Errors
    /// `Exhausted` when there is no room.
    pub async fn finish(self) -> Result<Digest> {
        self.finish_as(None).await
    }

    /// Stores the blob if it has the hash of `expected`, whose size is ignored.
    ///
    /// # Errors
    /// `Invalid` when the hash differs, and nothing is stored; `Exhausted` when there is no room.
    pub async fn finish_checked(self, expected: Digest) -> Result<Digest> {
        self.finish_as(Some(expected)).await
    }

    async fn finish_as(self, expected: Option<Digest>) -> Result<Digest> {
        let check = move |digest: Digest| match expected {
            Some(expected) if expected.hash() != digest.hash() => Err(Error::Invalid(format!(
                "the bytes sent for hash {} have the digest {digest}; nothing was stored",
                expected.hash_hex()
            ))),
            _ => Ok(()),
        };
        if self.sink.is_none() { self.store_small(check).await } else { self.store_large(check).await }
    }

    /// Stores a blob that is in memory as a whole.
    async fn store_small(mut self, check: impl Fn(Digest) -> Result<()>) -> Result<Digest> {
        if self.size != self.received.bytes() as u64 {
            return Err(Error::internal("a write of this blob has failed before"));
        }
        let received = self.received.take();
        let bytes = Bytes::from(received.bytes().concat());
        let digest = self.function.digest(&bytes);
        check(digest)?;
        let stored = self.cas.write_many(&self.instance, vec![(digest, bytes)]).await?;
        stored.into_iter().collect::<Result<()>>()?;
        Ok(digest)
    }

    /// Stores a blob that has a temporary file.
    async fn store_large(mut self, check: impl Fn(Digest) -> Result<()> + Send + 'static) -> Result<Digest> {
        self.spill().await?;
        let (Some(HashedDraft { file, hasher }), Some(room)) = (self.sink.take(), self.room.take()) else {
            return Err(Error::internal("a new blob lost its file"));
        };
        let (function, size) = (self.function, self.size);
        let hashed = self.cas.blocking(move || -> Result<_> {
            let digest = match hasher {
                Some(hasher) => hasher.finish(),
                None => {
                    file.hash(function.hasher(size)).map_err(|error| Error::io("hash a new blob", &error))?
                }
            };
            check(digest)?;
            Ok((file, digest))
        });
        let (file, digest) = hashed.await??;
        // An existing file of the blob wins over this one, unless it is damaged and dropped here.
        self.cas.are_sound(&self.instance, vec![digest]).await?;
        let (cas, instance) = (self.cas.clone(), self.instance.blobs());
        let stored = self.cas.blocking(move || -> Result<_> {
            let key = Key { digest, instance, kind: EntryKind::Blob };
            let mut files = cas.new_files(room.into_reservation());
            let failed = |error| Error::io(&format!("store blob {digest}"), &error);
            files.keep(key, file).map_err(failed)?;
            Ok(files.commit())
        });
        if let Some(visible) = stored.await?? {
            visible.wait().await?;
        }
        Ok(digest)
    }

    /// Writes the pending bytes to the temporary file.
    async fn spill(&mut self) -> Result<()> {
        self.make_room().await?;
        let pending = self.received.take();
        // While the file is with the job, or lost by an error, `self.sink` is empty and `size` exceeds the pending
        // bytes, so `finish` fails.
        let (cas, sink, function) = (self.cas.clone(), self.sink.take(), self.function);
        let work = self.cas.blocking(move || -> Result<HashedDraft> {
            let failed = |error| Error::io("store a new blob", &error);
            let mut sink = match sink {
                Some(sink) => sink,
                None => HashedDraft {
                    file: cas.shared().volume.draft().map_err(failed)?,
                    hasher: (function != DigestFunction::GitSha1).then(|| function.hasher(0)),
                },
            };
            for bytes in pending.bytes() {
                sink.file.write(bytes).map_err(failed)?;
                if let Some(hasher) = &mut sink.hasher {
                    hasher.update(bytes);
                }
            }
            Ok(sink)
        });
        self.sink = Some(self.cas.shared().disk.note(work.await?)?);
        Ok(())
    }

    /// Reserves room for all bytes received so far.
    async fn make_room(&mut self) -> Result<()> {
        let volume = &self.cas.shared().volume;
        let (needed, most) = (volume.charge(self.size), volume.charge(self.announced));
        let room = match &mut self.room {
            Some(room) => room,
            none => none.insert(self.cas.new_room()?),
        };
        room.grow(needed, most).await
    }
}

impl Drop for NewBlob {
    /// Removes the temporary file on the blocking pool, because freeing the blocks of a large file takes a while. Its
    /// room is free after that.
    fn drop(&mut self) {
        if let Some(sink) = self.sink.take() {
            let room = self.room.take();
            self.cas.shared().runtime.spawn_blocking(move || {
                drop(sink);
                drop(room);
            });
        }
    }
}

impl Cas {
    /// Begins a blob whose digest is computed with `function`.
    pub fn new_blob(&self, instance: &Instance, function: DigestFunction) -> NewBlob {
        NewBlob {
            cas: self.clone(),
            instance: instance.clone(),
            function,
            size: 0,
            announced: u64::MAX,
            received: self.received(),
            sink: None,
            room: None,
        }
    }
}
