//! zstd as clients use it: with default settings, in frames.

use super::check::{Verdict, fail};
use bytes::Bytes;
use std::{future::Future, io::Read as _, time::Duration};

/// The value of zstd in the API.
pub(crate) const ZSTD: i32 = 1;
/// The value of deflate in the API.
pub(crate) const DEFLATE: i32 = 2;
/// The value of brotli in the API.
pub(crate) const BROTLI: i32 = 3;
/// Logarithm of the largest window that decoders accept by default (BS-13).
const WINDOW_LOG_MAX: u32 = 23;

/// Compresses to one frame.
///
/// # Errors
/// A failure of this program.
pub(crate) fn compress(data: &[u8]) -> Verdict<Bytes> {
    zstd::encode_all(data, 1).map(Bytes::from).map_err(|error| fail("zstd of this program compresses", error))
}

/// Decompresses any number of frames with default settings. Stops one byte after `limit`.
///
/// # Errors
/// A failure that says why it does not decode.
pub(crate) fn decompress(data: &[u8], limit: usize) -> Verdict<Bytes> {
    let undecodable = |error| fail("data that a zstd decoder takes with default settings", error);
    let mut decoder = zstd::Decoder::new(data).map_err(undecodable)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(undecodable)?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    decoder.take(limit).read_to_end(&mut bytes).map_err(undecodable)?;
    Ok(bytes.into())
}

/// Time limit for the refusal of a [`bomb`]: it is far longer than a server needs to detect the size, and far shorter
/// than it needs to decompress everything.
const BOMB_PATIENCE: Duration = Duration::from_secs(10);

/// Waits for the response to a [`bomb`].
///
/// # Errors
/// A failure when it is so late that the server must have decompressed everything.
pub(crate) async fn defused<T>(answer: impl Future<Output = T>) -> Verdict<T> {
    let late = |_| fail(format!("a refusal of a bomb within {BOMB_PATIENCE:?}"), "no answer");
    tokio::time::timeout(BOMB_PATIENCE, answer).await.map_err(late)
}

/// A few hundred kB that decompress to `mebibytes` MiB of zeros.
///
/// # Errors
/// See [`compress`].
pub(crate) fn bomb(mebibytes: usize) -> Verdict<Bytes> {
    Ok(compress(&vec![0; 1024 * 1024])?.repeat(mebibytes).into())
}
