//! The ContentAddressableStorage service: FindMissingBlobs, the two batch calls, GetTree (whose walk is in
//! [`super::get_tree`]), and SplitBlob and SpliceBlob (in [`super::chunks`]).
//!
//! Digests are parsed once, here. The number of messages to the store does not depend on the number of blobs.

use super::{Edge, TreeStream, chunks, convert, get_tree, inline, request_memory::RequestMemory};
use crate::{
    actors::cas::{Payload, forms::zstd_reader::Item},
    call::Call,
    grpc::services::content_addressable_storage_server::ContentAddressableStorage,
    instance::Instance,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    find_missing::{FindMissingBlobsRequest, FindMissingBlobsResponse},
    proto::{
        reapi::{
            self, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
            BatchUpdateBlobsResponse, GetTreeRequest, SpliceBlobRequest, SpliceBlobResponse,
            SplitBlobRequest, SplitBlobResponse, batch_read_blobs_response, batch_update_blobs_response,
            compressor,
        },
        rpc,
    },
    status,
};
use prost::Message as _;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Size limit of the payload of a batch call, as advertised in the capabilities (CAP-10). The rest of 4 MiB has room
/// for the digests and statuses of more than a thousand blobs (CAP-11).
pub(crate) const BATCH_MAX_BYTES: u64 = 4_000_000;

/// Limit on the decompressed bytes of the compressed items of one batch. A full batch reaches it at a compression ratio
/// of 60; such blobs can be sent with ByteStream. It bounds the time and disk space that one call takes. Memory is
/// bounded without it, because items are decoded one by one, and large ones into files.
pub(crate) const BATCH_DECODED_MAX_BYTES: u64 = 256 * 1024 * 1024;

/// Tags and lengths of one entry of a batch answer, rounded up.
const ENTRY_BYTES: usize = 32;

#[derive(Debug)]
pub(crate) struct CasService(pub Arc<Edge>);

#[tonic::async_trait]
impl ContentAddressableStorage for CasService {
    type GetTreeStream = TreeStream;

    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        let digests = {
            let request = request.into_inner();
            convert::digests(&instance, request.digest_function, request.blob_digests, "blob_digests")?
        };
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let missing_blob_digests = cas.find_missing(&instance, &digests).await?;
        drop(digests);
        let kept = missing_blob_digests.len() * size_of::<Digest>();
        let answer = FindMissingBlobsResponse { missing_blob_digests };
        // The digests of the request are freed, so a call that waits here does not hold memory that other requests
        // need.
        RequestMemory::settle(kept as u64);
        call.reserve_soon(answer.encoded_len()).await?;
        Ok(Response::new(answer))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let batch = UpdateBatch::decode(&instance, request.into_inner())?;
        call.reserve_soon(inline::MESSAGE_MAX_BYTES - batch.left).await?;
        let stored = cas.write_many(&instance, batch.blobs).await?;
        let (mut responses, mut left) = (batch.responses, batch.left);
        for (at, result) in batch.positions.into_iter().zip(stored) {
            if let (Some(response), Err(error)) = (responses.get_mut(at), result) {
                response.status = Some(reason(&error, &mut left));
            }
        }
        Ok(Response::new(BatchUpdateBlobsResponse { responses }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        let batch = ReadBatch::decode(&instance, request.into_inner())?;
        // The next line may wait until the client has read other answers.
        RequestMemory::settle(batch.memory());
        call.reserve(batch.answer_bytes()).await?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let contents = if batch.takes_zstd {
            cas.read_many_zstd(&instance, batch.wanted).await?
        } else {
            let contents = cas.read_many(&instance, batch.wanted).await?;
            contents.into_iter().map(|content| content.map(Item::Plain)).collect()
        };
        let (mut responses, mut left) = (batch.responses, batch.left);
        for (at, result) in batch.positions.into_iter().zip(contents) {
            if let Some(response) = responses.get_mut(at) {
                let item = result.map(|item| match item {
                    Item::Plain(data) => (data, compressor::Value::Identity),
                    Item::Zstd(data) => (data, compressor::Value::Zstd),
                });
                match item.and_then(|(data, how)| Ok((fit(data, &mut left)?, how))) {
                    Ok((data, how)) => {
                        response.data = data;
                        response.compressor = how.into();
                    }
                    Err(error) => response.status = Some(reason(&error, &mut left)),
                }
            }
        }
        Ok(Response::new(BatchReadBlobsResponse { responses }))
    }

    async fn get_tree(&self, request: Request<GetTreeRequest>) -> Result<Response<TreeStream>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        let paging = get_tree::Paging::decode(&instance, request.get_ref())?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        Ok(Response::new(get_tree::pages(&cas, &instance, paging, call)))
    }

    async fn split_blob(
        &self,
        request: Request<SplitBlobRequest>,
    ) -> Result<Response<SplitBlobResponse>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        Ok(Response::new(chunks::split(&self.0, &call, &instance, request.get_ref()).await?))
    }

    async fn splice_blob(
        &self,
        request: Request<SpliceBlobRequest>,
    ) -> Result<Response<SpliceBlobResponse>, Status> {
        let (call, instance) = self.enter(&request, |request| &request.instance_name)?;
        Ok(Response::new(chunks::splice(&self.0, &call, &instance, request.get_ref()).await?))
    }
}

impl CasService {
    fn enter<T>(&self, request: &Request<T>, name: impl Fn(&T) -> &str) -> Result<(Call, Instance)> {
        let call = Call::of(request.extensions());
        let instance = self.0.gate.enter(&call, name(request.get_ref()))?;
        Ok((call, instance))
    }
}

/// A checked BatchUpdateBlobs request: an answer for every item (CAS-09), and the items to store.
#[derive(Debug)]
struct UpdateBatch {
    responses: Vec<batch_update_blobs_response::Response>,
    /// For each of `blobs`, its index in `responses`.
    positions: Vec<usize>,
    blobs: Vec<(Digest, Payload)>,
    /// Bytes that the entries leave in the answer for error messages.
    left: usize,
}

impl UpdateBatch {
    /// A bad item gets its own status and does not affect the others (CAS-10). The whole request fails only for too
    /// many bytes (CAS-15) or blobs, or for an unsupported digest function.
    fn decode(instance: &Instance, request: BatchUpdateBlobsRequest) -> Result<Self> {
        let sum = request.requests.iter().map(|item| item.data.len() as u64).sum();
        check_batch_size("upload", sum)?;
        let left = room_beside_entries(request.requests.iter().map(|item| item.digest.as_ref()))?;
        let digests = request.requests.iter().map(|item| item.digest.as_ref());
        let function = convert::digest_function(instance, request.digest_function, digests)?;
        let count = request.requests.len();
        let mut batch = Self { responses: Vec::with_capacity(count), positions: vec![], blobs: vec![], left };
        let mut decoded_left = BATCH_DECODED_MAX_BYTES;
        for (at, item) in request.requests.into_iter().enumerate() {
            let checked = Digest::from_wire(function, item.digest.as_ref(), "digest").and_then(|digest| {
                Ok((digest, payload(item.compressor, item.data, digest, &mut decoded_left)?))
            });
            let status = match checked {
                Ok(blob) => {
                    batch.positions.push(at);
                    batch.blobs.push(blob);
                    status::inline_ok()
                }
                Err(error) => reason(&error, &mut batch.left),
            };
            let response =
                batch_update_blobs_response::Response { digest: item.digest, status: Some(status) };
            batch.responses.push(response);
        }
        Ok(batch)
    }
}

/// A checked BatchReadBlobs request: an answer for every digest (CAS-17), and the digests to read.
#[derive(Debug)]
struct ReadBatch {
    responses: Vec<batch_read_blobs_response::Response>,
    /// For each of `wanted`, its index in `responses`.
    positions: Vec<usize>,
    wanted: Vec<Digest>,
    /// Whether the client accepts zstd (CAS-20).
    takes_zstd: bool,
    /// Bytes that the entries leave in the answer for contents and error messages.
    left: usize,
}

impl ReadBatch {
    /// A malformed digest is reported on its own entry (CAS-23); the sum of all sizes is checked before anything is
    /// read (CAS-21).
    fn decode(instance: &Instance, request: BatchReadBlobsRequest) -> Result<Self> {
        let left = room_beside_entries(request.digests.iter().map(Some))?;
        let function =
            convert::digest_function(instance, request.digest_function, request.digests.iter().map(Some))?;
        let count = request.digests.len();
        let mut batch = Self {
            responses: Vec::with_capacity(count),
            positions: Vec::with_capacity(count),
            wanted: Vec::with_capacity(count),
            takes_zstd: request.acceptable_compressors.contains(&compressor::Value::Zstd.into()),
            left,
        };
        let mut sum = 0u64;
        for (at, wire) in request.digests.into_iter().enumerate() {
            let status = match Digest::from_wire(function, Some(&wire), "digests") {
                Ok(digest) => {
                    sum = sum.saturating_add(digest.size());
                    batch.positions.push(at);
                    batch.wanted.push(digest);
                    status::inline_ok()
                }
                Err(error) => reason(&error, &mut batch.left),
            };
            batch.responses.push(batch_read_blobs_response::Response {
                digest: Some(wire),
                data: Bytes::new(),
                status: Some(status),
                compressor: compressor::Value::Identity.into(),
            });
        }
        check_batch_size("read", sum)?;
        Ok(batch)
    }

    /// The approximate memory of the batch.
    fn memory(&self) -> u64 {
        const HASH_MAX_BYTES: usize = 128;
        let entry =
            size_of::<batch_read_blobs_response::Response>() + size_of::<(usize, Digest)>() + HASH_MAX_BYTES;
        (self.responses.len() * entry) as u64
    }

    /// Upper bound of the size of the answer: its entries and all contents.
    fn answer_bytes(&self) -> usize {
        let contents = self.wanted.iter().map(|digest| digest.size()).fold(0, u64::saturating_add);
        let entries = inline::MESSAGE_MAX_BYTES - self.left;
        entries.saturating_add(usize::try_from(contents).unwrap_or(usize::MAX))
    }
}

/// Takes room in the message for a blob. Only batches of thousands of tiny blobs near the limit run out of room,
/// because of their digests (GEN-25).
fn fit(data: Bytes, left: &mut usize) -> Result<Bytes> {
    *left = left.checked_sub(data.len()).ok_or_else(|| Error::Exhausted {
        message: "the answer is full; request fewer blobs in one call, or read this one with ByteStream"
            .into(),
        retry_after: None,
    })?;
    Ok(data)
}

/// Bytes that an answer has left after one entry for each digest. A batch with more entries than fit is refused before
/// it is processed, because an entry of two bytes in a request may take a hundred times as many in memory.
fn room_beside_entries<'a>(digests: impl Iterator<Item = Option<&'a reapi::Digest>>) -> Result<usize> {
    let sizes = digests.map(|digest| ENTRY_BYTES + digest.map_or(0, |digest| digest.hash.len()));
    inline::MESSAGE_MAX_BYTES
        .checked_sub(sizes.sum())
        .ok_or_else(|| Error::invalid("this batch names more blobs than fit into one answer; split it"))
}

/// The status of a failed blob. If the message has no room left, the status has only a code (GEN-25).
fn reason(error: &Error, left: &mut usize) -> rpc::Status {
    let status = status::inline(error);
    match left.checked_sub(status.encoded_len()) {
        Some(rest) => {
            *left = rest;
            status
        }
        None => rpc::Status { code: status.code, ..Default::default() },
    }
}

fn check_batch_size(what: &str, bytes: u64) -> Result<()> {
    if bytes <= BATCH_MAX_BYTES {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the blobs of this batch {what} come to {bytes} bytes; at most {BATCH_MAX_BYTES} are allowed \
         (max_batch_total_size_bytes), larger blobs go by ByteStream"
    )))
}

/// The bytes of an item as they were sent (CAS-14), if its decompressed size is within what is left of the limit.
fn payload(number: i32, data: Bytes, digest: Digest, decoded_left: &mut u64) -> Result<Payload> {
    match compressor::Value::try_from(number) {
        Ok(compressor::Value::Identity) => Ok(Payload::Plain(data)),
        Ok(compressor::Value::Zstd) => {
            *decoded_left = decoded_left.checked_sub(digest.size()).ok_or_else(|| {
                Error::Invalid(format!(
                    "the compressed blobs of this batch come to more than {BATCH_DECODED_MAX_BYTES} bytes when they \
                     are decompressed; send blob {digest} by ByteStream"
                ))
            })?;
            Ok(Payload::Zstd(data))
        }
        Ok(value) => {
            Err(Error::Invalid(format!("compressor {} is not supported, ZSTD is", value.as_str_name())))
        }
        Err(_) => Err(Error::Invalid(format!("compressor {number} is unknown"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instances;
    use gorego_reapi::{digest::DigestFunction, proto::reapi::batch_update_blobs_request};
    use tonic::Code;

    fn instance() -> Instance {
        Instances::new([""]).unwrap().get("").unwrap()
    }

    fn digest(data: &[u8]) -> reapi::Digest {
        DigestFunction::Sha256.digest(data).to_wire()
    }

    fn item(data: &[u8]) -> batch_update_blobs_request::Request {
        let data = Bytes::copy_from_slice(data);
        batch_update_blobs_request::Request { digest: Some(digest(&data)), data, compressor: 0 }
    }

    fn update(requests: Vec<batch_update_blobs_request::Request>) -> Result<UpdateBatch> {
        UpdateBatch::decode(&instance(), BatchUpdateBlobsRequest { requests, ..Default::default() })
    }

    fn read(digests: Vec<reapi::Digest>) -> Result<ReadBatch> {
        ReadBatch::decode(&instance(), BatchReadBlobsRequest { digests, ..Default::default() })
    }

    /// CAS-09, CAS-10, CAS-14, GEN-05, GEN-10: bad items keep their place, and the function is inferred past them.
    #[test]
    fn a_bad_item_gets_its_own_status_and_the_others_go_on() {
        let malformed = reapi::Digest { hash: "0".repeat(63), size_bytes: 1 };
        let sha1 = reapi::Digest { hash: "0".repeat(40), size_bytes: 1 };
        let bad = [
            batch_update_blobs_request::Request { digest: Some(malformed), ..item(b"a") },
            batch_update_blobs_request::Request { digest: None, ..item(b"a") },
            batch_update_blobs_request::Request {
                compressor: compressor::Value::Deflate.into(),
                ..item(b"a")
            },
            batch_update_blobs_request::Request { compressor: 99, ..item(b"a") },
        ];
        let other = batch_update_blobs_request::Request { digest: Some(sha1), ..item(b"a") };
        let requests: Vec<_> = bad.into_iter().chain([item(b"good"), other, item(b"")]).collect();
        let batch = update(requests.clone()).unwrap();
        assert_eq!(batch.positions, [4, 6]);
        for (at, (request, response)) in requests.iter().zip(&batch.responses).enumerate() {
            assert_eq!(request.digest, response.digest);
            let expected = if [4, 6].contains(&at) { Code::Ok } else { Code::InvalidArgument };
            assert_eq!(response.status.as_ref().unwrap().code, expected as i32, "{at}");
        }
    }

    /// CAS-14, CAS-15: compressed items count with their compressed size, and their decompressed sizes have a limit of
    /// their own.
    #[test]
    fn compressed_items_are_counted_on_the_wire_and_bounded_in_what_they_become() {
        let zstd = |size: u64| {
            let digest = Some(reapi::Digest { size_bytes: size as i64, ..digest(b"a") });
            let data = vec![0; 1_000].into();
            batch_update_blobs_request::Request { digest, data, compressor: compressor::Value::Zstd.into() }
        };
        let half = BATCH_DECODED_MAX_BYTES / 2;
        let batch = update(vec![zstd(half), zstd(half + 1), zstd(half), item(b"plain")]).unwrap();
        assert_eq!(batch.positions, [0, 2, 3]);
        assert!(matches!(batch.blobs[0].1, Payload::Zstd(_)));
        assert!(matches!(batch.blobs[2].1, Payload::Plain(_)));
        assert!(update(vec![zstd(u64::MAX / 2)]).unwrap().positions.is_empty());
    }

    /// CAP-10, CAS-15.
    #[test]
    fn a_batch_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() {
        let half = vec![0; BATCH_MAX_BYTES as usize / 2];
        assert!(update(vec![item(&half), item(&half)]).is_ok());
        assert!(matches!(update(vec![item(&half), item(&half), item(b"x")]), Err(Error::Invalid(_))));
        assert_eq!(update(vec![]).unwrap().responses, []);
    }

    /// CAS-17, CAS-18, CAS-19, CAS-21, CAS-23.
    #[test]
    fn every_digest_of_a_read_has_an_entry_with_a_status_and_the_sum_is_judged_first() {
        let malformed = reapi::Digest { hash: "x".repeat(64), size_bytes: 1 };
        let batch = read(vec![digest(b"a"), malformed.clone(), digest(b"a")]).unwrap();
        assert_eq!(batch.positions, [0, 2]);
        assert!(batch.responses.iter().all(|r| r.status.is_some() && r.digest.is_some()));
        assert_eq!(batch.responses[1].digest.as_ref(), Some(&malformed));
        assert_eq!(batch.responses[1].status.as_ref().unwrap().code, Code::InvalidArgument as i32);

        let sized = |size| reapi::Digest { size_bytes: size, ..digest(b"a") };
        let limit = BATCH_MAX_BYTES as i64;
        assert!(read(vec![sized(limit - 1), sized(1)]).is_ok());
        assert!(matches!(read(vec![sized(limit), sized(1)]), Err(Error::Invalid(_))));
        assert!(matches!(read(vec![sized(i64::MAX); 3]), Err(Error::Invalid(_))));
    }

    /// GEN-25: empty entries take memory, too.
    #[test]
    fn a_batch_of_more_blobs_than_an_answer_has_entries_for_is_refused() {
        assert!(update(vec![item(b"x"); 40_000]).is_ok());
        assert!(matches!(update(vec![item(b"x"); 50_000]), Err(Error::Invalid(_))));
        assert!(matches!(update(vec![Default::default(); 1_000_000]), Err(Error::Invalid(_))));
        assert!(matches!(read(vec![Default::default(); 1_000_000]), Err(Error::Invalid(_))));
    }

    /// GEN-25.
    #[test]
    fn the_answer_to_a_batch_of_tiny_blobs_stays_within_one_message() {
        let data = Bytes::from(vec![0; 100]);
        let batch = read(vec![digest(&data); BATCH_MAX_BYTES as usize / data.len()]).unwrap();
        let mut responses = batch.responses;
        let mut left = batch.left;
        let mut refused = 0;
        for response in &mut responses {
            match fit(data.clone(), &mut left) {
                Ok(data) => response.data = data,
                Err(error) => {
                    refused += 1;
                    let status = reason(&error, &mut left);
                    assert_eq!(status.code, Code::ResourceExhausted as i32);
                    response.status = Some(status);
                }
            }
        }
        assert!(refused > 0, "this batch must be one that does not fit");
        let size = reapi::BatchReadBlobsResponse { responses }.encoded_len();
        assert!(size <= inline::MESSAGE_MAX_BYTES, "{size}");
    }
}
