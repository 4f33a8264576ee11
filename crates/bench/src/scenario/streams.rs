//! Scenarios with ByteStream: small and large blobs.

use super::{
    blobs::{SMALL_BYTES, STORED_BLOBS, stored},
    seed,
};
use crate::{
    Target,
    drive::{Call, Workload, message, prepared, ready},
    figures::Work,
    noise::Noise,
    target::FUNCTION,
};
use bytes::Bytes;
use futures::stream;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::bytestream::{ReadRequest, WriteRequest},
};
use std::{
    slice,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of one message of a large upload.
const MESSAGE_BYTES: usize = 1 << 20;
/// Messages of one large blob, which has 64 MiB.
const MESSAGES: usize = 64;

/// A blob as the pieces in which it is sent.
#[derive(Clone)]
struct Blob {
    pieces: Vec<Bytes>,
    digest: Digest,
}

impl Blob {
    fn new(pieces: Vec<Bytes>) -> Self {
        let mut hasher = FUNCTION.hasher(pieces.iter().map(|piece| piece.len() as u64).sum());
        pieces.iter().for_each(|piece| hasher.update(piece));
        let digest = hasher.finish();
        Self { pieces, digest }
    }

    /// A large blob that shares all but its first piece with `rest`.
    async fn large(first: Bytes, rest: Arc<Vec<Bytes>>) -> Result<Self> {
        let make = move || Self::new([first].into_iter().chain(rest.iter().cloned()).collect());
        tokio::task::spawn_blocking(make).await.map_err(|error| Error::Internal(error.to_string()))
    }

    /// Uploads it, and checks that the server has taken all of it.
    async fn write(self, target: Target) -> std::result::Result<Work, String> {
        let name = target.resource(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), self.digest.blob_name()));
        let (count, size) = (self.pieces.len(), self.digest.size());
        let mut offset = 0;
        let messages = self.pieces.into_iter().enumerate().map(move |(at, data)| {
            let write_offset = offset;
            offset += data.len() as i64;
            let resource_name = if at == 0 { name.clone() } else { String::new() };
            WriteRequest { resource_name, write_offset, finish_write: at + 1 == count, data }
        });
        let answer = target.byte_stream().write(stream::iter(messages)).await;
        let written = answer.map_err(|status| message("Write", &status))?.into_inner().committed_size;
        if u64::try_from(written) != Ok(size) {
            return Err("Write committed another size".into());
        }
        Ok(Work { units: 1, bytes: size })
    }
}

/// Pieces of the content that large blobs share.
fn shared(piece: impl Fn(&mut Noise, usize) -> Bytes) -> Arc<Vec<Bytes>> {
    let mut noise = Noise::new(seed());
    Arc::new((1..MESSAGES).map(|_| piece(&mut noise, MESSAGE_BYTES)).collect())
}

pub(super) async fn write_small(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (target, seed) = (target.clone(), seed());
    Ok(prepared(move |number| {
        let target = target.clone();
        async move {
            let blob = Blob::new(vec![Noise::new(seed ^ (number << 20)).bytes(SMALL_BYTES)]);
            Ok(Call::new(blob.write(target)).holding(SMALL_BYTES as u64))
        }
    }))
}

pub(super) async fn write_large(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (target, rest, seed) = (target.clone(), shared(Noise::bytes), seed());
    Ok(prepared(move |number| {
        let (target, rest) = (target.clone(), rest.clone());
        async move {
            let first = Noise::new(seed ^ number).bytes(MESSAGE_BYTES);
            let blob = Blob::large(first, rest).await?;
            Ok(Call::new(blob.write(target)).holding(MESSAGE_BYTES as u64))
        }
    }))
}

pub(super) async fn read_small(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (target, stored) = (target.clone(), Arc::new(stored(target).await?));
    Ok(ready(move |number| {
        let (target, stored) = (target.clone(), stored.clone());
        async move {
            let (digest, content) = &stored[number as usize % STORED_BLOBS];
            let read = read(&target, &digest.blob_name()).await?;
            if read.concat() != **content {
                return Err("Read gave wrong content".into());
            }
            Ok(Work { units: 1, bytes: SMALL_BYTES as u64 })
        }
    }))
}

pub(super) async fn read_large(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let blob = Blob::large(Noise::new(seed()).bytes(MESSAGE_BYTES), shared(Noise::bytes)).await?;
    blob.clone().write(target.clone()).await.map_err(Error::Unavailable)?;
    let (target, blob) = (target.clone(), Arc::new(blob));
    Ok(ready(move |_| {
        let (target, blob) = (target.clone(), blob.clone());
        async move {
            let messages = read(&target, &blob.digest.blob_name()).await?;
            if !is_same(&messages, &blob.pieces) {
                return Err("Read gave wrong content".into());
            }
            Ok(Work { units: 1, bytes: blob.digest.size() })
        }
    }))
}

pub(super) async fn read_zstd(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let blob = Blob::large(Noise::new(seed()).text(MESSAGE_BYTES), shared(Noise::text)).await?;
    blob.clone().write(target.clone()).await.map_err(Error::Unavailable)?;
    let name = format!("compressed-blobs/zstd/{}/{}", blob.digest.hash_hex(), blob.digest.size());
    // The stream that a server sends for a blob is usually the same each time. So each distinct stream is decoded once,
    // and later streams are compared with it. Decoding each would cost more than the transfer.
    let known = Arc::new(Mutex::new(None::<Vec<u8>>));
    let first = read(target, &name).await.map_err(Error::Unavailable)?.concat();
    check_zstd(&first, &blob).map_err(Error::Unavailable)?;
    *known.lock().unwrap_or_else(PoisonError::into_inner) = Some(first);
    let (target, blob, name) = (target.clone(), Arc::new(blob), Arc::new(name));
    Ok(ready(move |_| {
        let (target, blob, name, known) = (target.clone(), blob.clone(), name.clone(), known.clone());
        async move {
            let messages = read(&target, &name).await?;
            let is_known = {
                let known = known.lock().unwrap_or_else(PoisonError::into_inner);
                known.as_ref().is_some_and(|known| is_same(&messages, slice::from_ref(known)))
            };
            if !is_known {
                let stream = messages.concat();
                check_zstd(&stream, &blob)?;
                *known.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
            }
            Ok(Work { units: 1, bytes: blob.digest.size() })
        }
    }))
}

fn check_zstd(stream: &[u8], blob: &Blob) -> std::result::Result<(), String> {
    let decoded = zstd::stream::decode_all(stream).map_err(|_| "Read gave no zstd stream")?;
    if FUNCTION.digest(&decoded) != blob.digest {
        return Err("Read gave wrong content".into());
    }
    Ok(())
}

/// Reads a whole blob. Returns the data of each message.
async fn read(target: &Target, name: &str) -> std::result::Result<Vec<Bytes>, String> {
    let request = ReadRequest { resource_name: target.resource(name), ..Default::default() };
    let answer = target.byte_stream().read(request).await;
    let mut stream = answer.map_err(|status| message("Read", &status))?.into_inner();
    let mut messages = Vec::new();
    while let Some(read) = stream.message().await.map_err(|status| message("Read", &status))? {
        messages.push(read.data);
    }
    Ok(messages)
}

/// Whether two lists of pieces are the same content.
fn is_same(read: &[impl AsRef<[u8]>], expected: &[impl AsRef<[u8]>]) -> bool {
    let (mut expected, mut rest) = (expected.iter(), &[][..]);
    for piece in read {
        let mut piece = piece.as_ref();
        while !piece.is_empty() {
            if rest.is_empty() {
                match expected.next() {
                    Some(next) => rest = next.as_ref(),
                    None => return false,
                }
                continue;
            }
            let length = piece.len().min(rest.len());
            if piece[..length] != rest[..length] {
                return false;
            }
            (piece, rest) = (&piece[length..], &rest[length..]);
        }
    }
    rest.is_empty() && expected.all(|piece| piece.as_ref().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_compared_however_it_is_cut() {
        let same = |read: &[&str], expected: &[&str]| is_same(read, expected);
        assert!(same(&["ab", "", "c"], &["a", "bc"]) && same(&[], &[]) && same(&[], &[""]));
        assert!(!same(&["ab"], &["abc"]) && !same(&["abc"], &["ab"]) && !same(&["ax"], &["ab"]));
    }
}
