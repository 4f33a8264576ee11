//! SplitBlob and SpliceBlob: checks of the requests, and the capabilities of chunking. The store does the work.
//!
//! Only the functions in [`CHUNKINGS`] are supported, and only with their parameters. So clients that split blobs
//! themselves get the same chunks.

use super::{Edge, convert, inline::MESSAGE_MAX_BYTES};
use crate::{
    call::Call,
    {actors::cas::forms::splice::SPLICE_MAX_CHUNKS, instance::Instance},
};
use gorego_reapi::{
    chunking::Chunking,
    digest::Digest,
    error::{Error, Result},
    proto::reapi::{
        self, CacheCapabilities, SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse,
        chunking_function::Value,
    },
};
use prost::Message as _;

/// The advertised functions. The first one is the default.
const CHUNKINGS: [Chunking; 2] = [Chunking::FAST_CDC, Chunking::REP_MAX];
/// Tag and length of one digest in an answer, and everything else of the answer, each rounded up.
const ENTRY_BYTES: usize = 4;
const ENVELOPE_BYTES: usize = 64;

/// Adds the capabilities of chunking (CAP-16, CAP-17).
pub(crate) fn advertise(enabled: bool, cache: &mut CacheCapabilities) {
    cache.split_blob_support = enabled;
    cache.splice_blob_support = enabled;
    for chunking in CHUNKINGS.iter().filter(|_| enabled) {
        cache.fast_cdc_2020_params = cache.fast_cdc_2020_params.or(chunking.fast_cdc_params());
        cache.rep_max_cdc_params = cache.rep_max_cdc_params.or(chunking.rep_max_params());
    }
}

/// Answers a SplitBlob request.
///
/// # Errors
/// The errors of [`crate::actors::cas::client::Cas::split`]; `Unimplemented` when chunking is disabled.
pub(crate) async fn split(
    edge: &Edge,
    call: &Call,
    instance: &Instance,
    message: &SplitBlobRequest,
) -> Result<SplitBlobResponse> {
    check_enabled(edge, "SplitBlob")?;
    let blob =
        convert::digest(instance, message.digest_function, message.blob_digest.as_ref(), "blob_digest")?;
    call.note_blob(blob);
    let chunking = chunking(message.chunking_function)?;
    let cas = edge.cas.on_behalf_of(call.caller()).for_build(call.build());
    let chunks = cas.split(instance, blob, chunking, max_chunks(blob)).await?;
    let entry = |chunk: &Digest| chunk.hash_hex().len() + 4 * ENTRY_BYTES;
    call.reserve_soon(chunks.iter().map(entry).sum::<usize>() + ENVELOPE_BYTES).await?;
    Ok(SplitBlobResponse {
        chunk_digests: chunks.iter().map(|chunk| chunk.to_wire()).collect(),
        chunking_function: chunking.wire().into(),
    })
}

/// Answers a SpliceBlob request.
///
/// # Errors
/// The errors of [`crate::actors::cas::client::Cas::splice`]; `Unimplemented` when chunking is disabled.
pub(crate) async fn splice(
    edge: &Edge,
    call: &Call,
    instance: &Instance,
    message: &SpliceBlobRequest,
) -> Result<SpliceBlobResponse> {
    check_enabled(edge, "SpliceBlob")?;
    let count = message.chunk_digests.len();
    if count > SPLICE_MAX_CHUNKS {
        // Checked before the digests are parsed, because an entry may have only two bytes in a request.
        return Err(Error::Invalid(format!(
            "chunk_digests has {count} entries; a blob is made of at most {SPLICE_MAX_CHUNKS}"
        )));
    }
    let blob = message.blob_digest.as_ref();
    // Chunks have the blob's digest function (CAS-36), which is not inferred from their own hashes.
    let function = convert::digest_function(instance, message.digest_function, [blob])?;
    let blob = Digest::from_wire(function, blob, "blob_digest")?;
    call.note_blob(blob);
    let chunking = chunking(message.chunking_function)?;
    let chunks = message.chunk_digests.iter();
    let chunks: Result<Vec<Digest>> =
        chunks.map(|chunk| Digest::from_wire(function, Some(chunk), "chunk_digests")).collect();
    let cas = edge.cas.on_behalf_of(call.caller()).for_build(call.build());
    cas.splice(instance, blob, chunks?, chunking).await?;
    // One client requires this field (CAS-37).
    Ok(SpliceBlobResponse { blob_digest: Some(blob.to_wire()) })
}

fn check_enabled(edge: &Edge, method: &str) -> Result<()> {
    if edge.settings.chunking {
        return Ok(());
    }
    Err(Error::Unimplemented(format!(
        "{method} is disabled on this server (cache.chunking), as its capabilities say"
    )))
}

/// The chunking function with this number; the default for UNKNOWN (CAS-33).
fn chunking(number: i32) -> Result<Chunking> {
    match Value::try_from(number) {
        Ok(Value::Unknown) => Ok(Chunking::FAST_CDC),
        Ok(value) => CHUNKINGS.into_iter().find(|chunking| chunking.wire() == value).ok_or_else(|| {
            Error::Invalid(format!("chunking function {} is not supported here", value.as_str_name()))
        }),
        Err(_) => Err(Error::Invalid(format!(
            "chunking function {number} is unknown; the capabilities list those of this server"
        ))),
    }
}

/// Largest number of chunks of this blob that fits into an answer (GEN-25).
fn max_chunks(blob: Digest) -> usize {
    // This is the largest possible entry: no chunk is larger, and all hashes have the same length.
    let largest = CHUNKINGS.iter().map(|chunking| *chunking.chunk_sizes().end()).max().unwrap_or_default();
    let entry = reapi::Digest { hash: blob.hash_hex(), size_bytes: largest as i64 };
    (MESSAGE_MAX_BYTES - ENVELOPE_BYTES) / (entry.encoded_len() + ENTRY_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::digest::DigestFunction;

    /// CAS-33, CAP-17.
    #[test]
    fn every_advertised_function_is_taken_and_no_other() {
        let mut cache = CacheCapabilities::default();
        advertise(true, &mut cache);
        assert!(cache.split_blob_support && cache.splice_blob_support);
        assert_eq!(cache.fast_cdc_2020_params.unwrap().avg_chunk_size_bytes, 524_288);
        assert_eq!(cache.rep_max_cdc_params.unwrap().min_chunk_size_bytes, 262_144);
        assert_eq!(chunking(0).unwrap(), Chunking::FAST_CDC);
        for value in [Value::FastCdc2020, Value::RepMaxCdc] {
            assert_eq!(chunking(value.into()).unwrap().wire(), value);
        }
        for number in [-1, 3, 99, i32::MAX] {
            assert!(matches!(chunking(number), Err(Error::Invalid(_))), "{number}");
        }
    }

    /// CAP-16.
    #[test]
    fn what_is_switched_off_is_not_advertised() {
        let mut cache = CacheCapabilities::default();
        advertise(false, &mut cache);
        assert_eq!(cache, CacheCapabilities::default());
    }

    /// GEN-25.
    #[test]
    fn an_answer_with_as_many_chunks_as_are_allowed_fits_a_message() {
        for function in DigestFunction::ALL {
            let blob = function.digest(b"");
            let largest = reapi::Digest { hash: blob.hash_hex(), size_bytes: 2_097_152 };
            let chunk_digests = vec![largest; max_chunks(blob)];
            let answer = SplitBlobResponse { chunk_digests, chunking_function: i32::MAX };
            let size = answer.encoded_len();
            assert!((MESSAGE_MAX_BYTES * 9 / 10..=MESSAGE_MAX_BYTES - 5).contains(&size), "{size}");
        }
    }
}
