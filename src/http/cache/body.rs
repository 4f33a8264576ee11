//! Bodies: stored blobs in responses and uploads in requests, uncompressed or compressed with zstd.
//!
//! Memory is bounded: an upload is decoded in pieces of constant size, and its window is limited.

use crate::{
    actors::cas::{
        blob::BlobReader,
        forms::zstd_reader::ZstdReader,
        uploads::{decoders, new_blob::NewBlob},
    },
    budget::Budget,
    call::Call,
    caller::Caller,
};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use gorego_reapi::{
    compression::Decoder,
    error::{Error, Result},
};
use std::{ops::Range, time::Duration};

/// Number of bytes that are sent at a time.
const PIECE_BYTES: usize = 128 * 1024;
/// Time limit between two pieces of an upload.
const PIECE_LIMIT: Duration = Duration::from_secs(60);

/// A range of a blob, uncompressed. Each piece is read when the connection has room for it.
pub(super) fn of_blob(reader: BlobReader, part: Range<u64>, call: Call) -> Body {
    Body::from_stream(stream::try_unfold((reader, part, call), |(reader, mut part, call)| async move {
        if part.is_empty() {
            return Ok::<_, Error>(None);
        }
        let max = call.reserve_piece(PIECE_BYTES).await?;
        give_way().await;
        let piece = next_piece(&reader, &part, max).await?;
        part.start = part.start.saturating_add(piece.len() as u64);
        Ok(Some((call.charge(piece), (reader, part, call))))
    }))
}

/// A whole blob, compressed with zstd. Otherwise like [`of_blob`].
pub(super) fn of_zstd(reader: ZstdReader, call: Call) -> Body {
    Body::from_stream(stream::try_unfold((reader, call), |(mut reader, call)| async move {
        let max = call.reserve_piece(PIECE_BYTES).await?;
        give_way().await;
        let piece = reader.next(max).await?;
        Ok::<_, Error>(piece.map(|piece| (call.charge(piece), (reader, call))))
    }))
}

/// Encodes a message when the connection has room for it.
///
/// # Errors
/// `Exhausted` when there is no room for too long.
pub(super) async fn of_message(message: &impl prost::Message, call: &Call) -> Result<Body> {
    call.reserve(message.encoded_len()).await?;
    Ok(Body::from(call.charge(message.encode_to_vec().into())))
}

/// Lets other requests run between two pieces. Otherwise a body could be written without a pause, because the kernel
/// accepts megabytes for a client that reads nothing.
async fn give_way() {
    tokio::task::yield_now().await;
}

async fn next_piece(reader: &BlobReader, part: &Range<u64>, max: usize) -> Result<Bytes> {
    let left = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
    let piece = reader.read_at(part.start, left.min(max)).await?;
    if piece.is_empty() {
        return Err(Error::DataLoss(format!("a blob ends early, at byte {}", part.start)));
    }
    Ok(piece)
}

/// Whether the client accepts zstd.
pub(super) fn accepts_zstd(headers: &HeaderMap) -> bool {
    let lists = headers.get_all(header::ACCEPT_ENCODING).into_iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).any(|item| {
        let (name, weight) = item.split_once(';').unwrap_or((item, ""));
        let weight: String = weight.split_whitespace().collect();
        let refused = weight.strip_prefix("q=").and_then(|q| q.parse::<f32>().ok()).is_some_and(|q| q <= 0.0);
        name.trim().eq_ignore_ascii_case("zstd") && !refused
    })
}

/// The size limit of a decoded upload.
#[derive(Debug, Clone, Copy)]
pub(super) struct UploadLimit {
    pub(super) bytes: u64,
    /// What has this limit, for the error.
    pub(super) of: &'static str,
}

impl UploadLimit {
    /// The limit of blobs and values.
    pub(super) fn of_blob(max_blob_bytes: u64) -> Self {
        Self { bytes: max_blob_bytes, of: "a blob or value (cache.max_blob_size_gb)" }
    }

    fn exceeded(self) -> Error {
        Error::OutOfRange(format!("{} may have at most {} bytes", self.of, self.bytes))
    }
}

/// The decoded bytes of an upload, in pieces.
pub(super) struct UploadBody {
    body: axum::body::BodyDataStream,
    decoder: Option<Decoder>,
    /// The budget for a decoder; `None` once the decoder has its share.
    decoders: Option<(Budget, Caller)>,
    /// Received bytes that are not yet decoded.
    raw: Bytes,
    left: u64,
    limit: UploadLimit,
    /// The size of the blob by the Content-Length. `None` if it is absent, or if the body is compressed.
    announced: Option<u64>,
}

impl UploadBody {
    /// The upload of a request. If it is compressed, its decoder takes a share of `decoders`.
    ///
    /// # Errors
    /// `Invalid` for a part of a value (RFC 9110, 14.5); `Unimplemented` for an unknown encoding; `OutOfRange` when the
    /// Content-Length exceeds the limit.
    pub(super) fn new(request: Request, call: &Call, limit: UploadLimit, decoders: &Budget) -> Result<Self> {
        let (parts, body) = request.into_parts();
        if parts.headers.contains_key(header::CONTENT_RANGE) {
            let problem =
                "a value is stored as a whole, and this is a part of one (Content-Range); send all of it";
            return Err(Error::Invalid(problem.into()));
        }
        let encodings: Vec<&str> = (parts.headers.get_all(header::CONTENT_ENCODING).into_iter())
            .flat_map(|value| value.to_str().unwrap_or("?").split(','))
            .map(str::trim)
            .filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case("identity"))
            .collect();
        let decoder = match encodings.as_slice() {
            [] => None,
            // The output is counted below, because exceeding the limit has its own status.
            [name] if name.eq_ignore_ascii_case("zstd") => Some(Decoder::new(u64::MAX)?),
            others => {
                let shown = others.join(", ");
                let shown = shown.escape_debug();
                return Err(Error::Unimplemented(format!("encoding \"{shown}\" is not supported; zstd is")));
            }
        };
        let length =
            parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let announced = length.filter(|_| decoder.is_none());
        if announced.is_some_and(|length: u64| length > limit.bytes) {
            return Err(limit.exceeded());
        }
        let decoders = Some((decoders.clone(), call.caller()));
        Ok(Self {
            body: body.into_data_stream(),
            decoder,
            decoders,
            raw: Bytes::new(),
            left: limit.bytes,
            limit,
            announced,
        })
    }

    /// The next decoded bytes; `None` at the end.
    ///
    /// # Errors
    /// `Invalid` when the bytes do not decode or end early; `OutOfRange` when there are too many; `DeadlineExceeded`
    /// when none arrive in time; `Exhausted` when there is no room for a decoder for too long.
    pub(super) async fn next(&mut self, call: &Call) -> Result<Option<Bytes>> {
        loop {
            if let Some(piece) = self.decode()? {
                self.left = self.left.checked_sub(piece.len() as u64).ok_or_else(|| self.limit.exceeded())?;
                return Ok(Some(piece));
            }
            let silent =
                || Error::DeadlineExceeded(format!("no bytes of the upload arrived for {PIECE_LIMIT:?}"));
            call.wait_for_client();
            let bytes = tokio::time::timeout(PIECE_LIMIT, self.body.next()).await;
            call.client_moved();
            match bytes.map_err(|_| silent())? {
                Some(Ok(bytes)) => {
                    call.received(bytes.len());
                    call.count_upload()?;
                    self.raw = bytes;
                    self.make_room().await?;
                }
                Some(Err(error)) => return Err(Error::Invalid(format!("the upload broke off: {error}"))),
                None => {
                    self.decoder.as_ref().map_or(Ok(()), Decoder::finish)?;
                    return Ok(None);
                }
            }
        }
    }

    /// Waits for the room that the decoder needs, before it gets its first bytes.
    async fn make_room(&mut self) -> Result<()> {
        let Some(decoder) = &mut self.decoder else { return Ok(()) };
        let Some((decoders, caller)) = self.decoders.take_if(|_| !self.raw.is_empty()) else { return Ok(()) };
        decoder.hold(decoders::room(&decoders, caller, &self.raw, self.limit.bytes).await?);
        Ok(())
    }

    /// Decodes from the received bytes; `None` when more are needed.
    fn decode(&mut self) -> Result<Option<Bytes>> {
        let Some(decoder) = &mut self.decoder else {
            let bytes = std::mem::take(&mut self.raw);
            return Ok((!bytes.is_empty()).then_some(bytes));
        };
        let mut unread = self.raw.as_ref();
        let piece = decoder.next(&mut unread)?.map(Bytes::copy_from_slice);
        self.raw = self.raw.slice_ref(unread);
        Ok(piece)
    }

    /// Writes all bytes to a new blob.
    ///
    /// # Errors
    /// See [`UploadBody::next`]; and the errors of the store.
    pub(super) async fn fill(mut self, blob: &mut NewBlob, call: &Call) -> Result<()> {
        if let Some(size) = self.announced {
            blob.announce(size);
        }
        while let Some(bytes) = self.next(call).await? {
            blob.write(bytes).await?;
        }
        Ok(())
    }

    /// Collects a small upload in memory. `hold` is called with the size of each piece before it is added.
    ///
    /// # Errors
    /// See [`UploadBody::next`]; and the errors of `hold`.
    pub(super) async fn collect(
        mut self,
        call: &Call,
        mut hold: impl FnMut(u64) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next(call).await? {
            hold(bytes.len() as u64)?;
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::compression::WINDOW_MAX_LOG;
    use proptest::prelude::*;
    use std::io::Write as _;
    use tokio::runtime::Builder;

    /// Decodes an upload that arrives in pieces of this size.
    fn upload(body: &[u8], piece: usize, max: u64) -> Result<Vec<u8>> {
        let pieces: Vec<_> =
            body.chunks(piece).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece))).collect();
        let mut request = Request::new(Body::from_stream(stream::iter(pieces)));
        request.headers_mut().insert(header::CONTENT_ENCODING, "zstd".parse().unwrap());
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let call = Call::default();
        let decoders = Budget::new(decoders::DECODERS);
        runtime.block_on(async {
            UploadBody::new(request, &call, UploadLimit::of_blob(max), &decoders)?
                .collect(&call, |_| Ok(()))
                .await
        })
    }

    #[test]
    fn a_bomb_ends_at_the_limit() {
        let bomb = zstd::encode_all(std::io::Read::take(std::io::repeat(0), 64 << 20), 1).unwrap();
        assert!(bomb.len() < 100_000);
        assert!(matches!(upload(&bomb, 1_000, 1 << 20), Err(Error::OutOfRange(_))));
    }

    /// A few bytes of a client can request a large window for each of many uploads.
    #[test]
    fn windows_are_bounded_as_over_grpc() {
        for (log, fits) in [(WINDOW_MAX_LOG, true), (WINDOW_MAX_LOG + 1, false)] {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(b"content").unwrap();
            assert_eq!(upload(&encoder.finish().unwrap(), 100, 100).is_ok(), fits, "{log}");
        }
    }

    proptest! {
        /// The pieces may split frames anywhere.
        #[test]
        fn frames_in_pieces_are_what_was_compressed(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3_000), 0..4), piece in 1usize..500,
        ) {
            let frames: Vec<u8> = parts.iter().flat_map(|part| zstd::encode_all(part.as_slice(), 1).unwrap()).collect();
            prop_assert_eq!(upload(&frames, piece, u64::MAX), Ok(parts.concat()));
        }

        #[test]
        fn garbage_and_broken_frames_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 1..300), cut in 1usize..20) {
            let whole = zstd::encode_all(bytes.as_slice(), 1).unwrap();
            prop_assert!(upload(&whole[..whole.len() - cut.min(whole.len() - 1)], 7, 1_000).is_err());
            bytes[0] |= 1;
            prop_assert!(upload(&bytes, 7, 1_000).is_err());
        }
    }

    #[test]
    fn encodings_that_are_refused_are_not_accepted() {
        let accepts = |list: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, list.parse().unwrap());
            accepts_zstd(&headers)
        };
        for list in ["zstd", "gzip, zstd", "ZSTD;q=0.1", "zstd ; q = 1"] {
            assert!(accepts(list), "{list}");
        }
        for list in ["", "gzip", "zstd;q=0", "zstd;q=0.000", "xzstd", "*"] {
            assert!(!accepts(list), "{list}");
        }
        assert!(!accepts_zstd(&HeaderMap::new()));
    }
}
