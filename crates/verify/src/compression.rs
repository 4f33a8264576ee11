//! zstd as clients use it: with default settings, and in frames.

use super::check::{Verdict, fail};
use bytes::Bytes;
use std::{future::Future, io::Read as _, time::Duration};

/// The number of zstd in the API.
pub const ZSTD: i32 = 1;
/// The number of deflate in the API.
pub const DEFLATE: i32 = 2;
/// The number of brotli in the API.
pub const BROTLI: i32 = 3;
/// The largest window that decoders accept by default is 2 to the power of this (BS-13).
const WINDOW_LOG_MAX: u32 = 23;

/// One frame.
///
/// # Errors
/// A failure of this program, in words.
pub fn compress(data: &[u8]) -> Verdict<Bytes> {
    zstd::encode_all(data, 1).map(Bytes::from).map_err(|error| fail("zstd of this program compresses", error))
}

/// What any number of frames hold, as a decoder with default settings sees it; at most `limit` bytes and one more.
///
/// # Errors
/// A failure that says why it is not decodable.
pub fn decompress(data: &[u8], limit: usize) -> Verdict<Bytes> {
    let undecodable = |error| fail("data that a zstd decoder takes with default settings", error);
    let mut decoder = zstd::Decoder::new(data).map_err(undecodable)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(undecodable)?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    decoder.take(limit).read_to_end(&mut bytes).map_err(undecodable)?;
    Ok(bytes.into())
}

/// How long a server may take to refuse a [`bomb`]: far more than it needs to see that the content is too long, far less than it
/// takes to unpack it all.
const BOMB_PATIENCE: Duration = Duration::from_secs(10);

/// The answer to a [`bomb`].
///
/// # Errors
/// A failure when none comes before the server can only be unpacking.
pub async fn defused<T>(answer: impl Future<Output = T>) -> Verdict<T> {
    let late = |_| fail(format!("a refusal of a bomb within {BOMB_PATIENCE:?}"), "no answer");
    tokio::time::timeout(BOMB_PATIENCE, answer).await.map_err(late)
}

/// A few hundred kB that decompress to this many MiB of zeros.
///
/// # Errors
/// As [`compress`].
pub fn bomb(mebibytes: usize) -> Verdict<Bytes> {
    Ok(compress(&vec![0; 1024 * 1024])?.repeat(mebibytes).into())
}
