//! The calls of the store. Each makes exactly the request that its name says and returns the response unchanged, so
//! that a check can judge it. Only [`Session::store`] judges the response itself: it stores what a check needs before
//! it starts.

use super::{
    blob::Blob,
    check::{Answer as _, Step as _, Verdict, ensure, inline},
    session::Session,
};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use gorego_reapi::proto::{
    bytestream::{QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, WriteRequest},
    reapi::{
        ActionResult, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
        BatchUpdateBlobsResponse, Digest, Directory, FindMissingBlobsRequest, GetActionResultRequest,
        GetTreeRequest, GetTreeResponse, UpdateActionResultRequest, batch_update_blobs_request,
    },
};
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// Number of bytes in one WriteRequest: well below every limit on messages.
pub(crate) const PIECE_BYTES: usize = 64 * 1024;
/// How long a server may take to report the received part of an upload, and the delay between two polls.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(2);
const UPLOAD_PAUSE: Duration = Duration::from_millis(20);
/// Overhead of a batch entry besides its data, rounded up.
const ENTRY_BYTES: usize = 150;

impl Session {
    /// Makes a FindMissingBlobs call.
    ///
    /// # Errors
    /// The status of the server, here and in all methods below except [`Session::store`].
    pub async fn missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, Status> {
        let request = FindMissingBlobsRequest {
            instance_name: self.instance(),
            blob_digests: digests.to_vec(),
            digest_function: self.function_number(),
        };
        let answer = self.cas().find_missing_blobs(request).await?;
        Ok(answer.into_inner().missing_blob_digests)
    }

    /// An item of BatchUpdateBlobs.
    pub fn item(&self, blob: &Blob) -> batch_update_blobs_request::Request {
        batch_update_blobs_request::Request {
            digest: Some(blob.digest.clone()),
            data: blob.data.clone(),
            compressor: 0,
        }
    }

    /// Makes a BatchUpdateBlobs call with these blobs.
    pub async fn update(&self, blobs: &[&Blob]) -> Result<BatchUpdateBlobsResponse, Status> {
        self.update_items(blobs.iter().map(|blob| self.item(blob)).collect()).await
    }

    /// Makes a BatchUpdateBlobs call with any items.
    pub async fn update_items(
        &self,
        requests: Vec<batch_update_blobs_request::Request>,
    ) -> Result<BatchUpdateBlobsResponse, Status> {
        self.count_written(requests.iter().map(|item| item.data.len()).sum());
        let request = BatchUpdateBlobsRequest {
            instance_name: self.instance(),
            requests,
            digest_function: self.function_number(),
        };
        Ok(self.cas().batch_update_blobs(request).await?.into_inner())
    }

    /// Makes a BatchReadBlobs call.
    pub async fn batch_read(
        &self,
        digests: &[Digest],
        acceptable_compressors: &[i32],
    ) -> Result<BatchReadBlobsResponse, Status> {
        let request = BatchReadBlobsRequest {
            instance_name: self.instance(),
            digests: digests.to_vec(),
            acceptable_compressors: acceptable_compressors.to_vec(),
            digest_function: self.function_number(),
        };
        Ok(self.cas().batch_read_blobs(request).await?.into_inner())
    }

    /// Makes a GetTree call and returns all messages.
    pub async fn tree(&self, root: &Digest, page_size: i32) -> Result<Vec<GetTreeResponse>, Status> {
        self.tree_request(GetTreeRequest {
            instance_name: self.instance(),
            root_digest: Some(root.clone()),
            page_size,
            page_token: String::new(),
            digest_function: self.function_number(),
        })
        .await
    }

    /// Like [`Session::tree`], with the whole request.
    pub async fn tree_request(&self, request: GetTreeRequest) -> Result<Vec<GetTreeResponse>, Status> {
        let mut stream = self.cas().get_tree(request).await?.into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Reads a whole blob with ByteStream.
    pub async fn read(&self, digest: &Digest) -> Result<Bytes, Status> {
        self.read_named(&self.read_name(digest)).await
    }

    /// Reads everything under this resource name.
    pub async fn read_named(&self, name: &str) -> Result<Bytes, Status> {
        Ok(self.read_pieces(name, 0, 0).await?.concat().into())
    }

    /// Makes a ByteStream.Read call and returns the data of each message.
    pub async fn read_pieces(&self, name: &str, offset: i64, limit: i64) -> Result<Vec<Bytes>, Status> {
        let request = ReadRequest { resource_name: name.to_owned(), read_offset: offset, read_limit: limit };
        let mut stream = self.byte_stream().read(request).await?.into_inner();
        let mut pieces = Vec::new();
        while let Some(message) = stream.message().await? {
            pieces.push(message.data);
        }
        Ok(pieces)
    }

    /// Makes a ByteStream.Write call for a blob, under a new name. Returns the `committed_size`.
    pub async fn write(&self, blob: &Blob) -> Result<i64, Status> {
        self.write_messages(pieces(&self.write_name(blob), &blob.data, 0, PIECE_BYTES)).await
    }

    /// Makes a ByteStream.Write call with exactly these messages, then half-closes. Returns the `committed_size`.
    pub async fn write_messages(&self, messages: Vec<WriteRequest>) -> Result<i64, Status> {
        self.count_written(messages.iter().map(|message| message.data.len()).sum());
        Ok(self.byte_stream().write(stream::iter(messages)).await?.into_inner().committed_size)
    }

    /// Makes a ByteStream.QueryWriteStatus call.
    pub async fn query(&self, name: &str) -> Result<QueryWriteStatusResponse, Status> {
        let request = QueryWriteStatusRequest { resource_name: name.to_owned() };
        Ok(self.byte_stream().query_write_status(request).await?.into_inner())
    }

    /// Makes a GetActionResult call without inlining.
    pub async fn result(&self, action: &Digest) -> Result<ActionResult, Status> {
        self.result_request(self.result_of(action)).await
    }

    /// A GetActionResultRequest without inlining.
    pub fn result_of(&self, action: &Digest) -> GetActionResultRequest {
        GetActionResultRequest {
            instance_name: self.instance(),
            action_digest: Some(action.clone()),
            digest_function: self.function_number(),
            ..Default::default()
        }
    }

    /// Makes a GetActionResult call with the whole request.
    pub async fn result_request(&self, request: GetActionResultRequest) -> Result<ActionResult, Status> {
        Ok(self.action_cache().get_action_result(request).await?.into_inner())
    }

    /// Makes an UpdateActionResult call.
    pub async fn update_result(&self, action: &Digest, result: ActionResult) -> Result<ActionResult, Status> {
        let request = UpdateActionResultRequest {
            instance_name: self.instance(),
            action_digest: Some(action.clone()),
            action_result: Some(result),
            digest_function: self.function_number(),
            ..Default::default()
        };
        Ok(self.action_cache().update_action_result(request).await?.into_inner())
    }

    /// Stores blobs, by batch if they fit and by ByteStream otherwise.
    ///
    /// # Errors
    /// Needs CAS-09 or BS-23 when the server does not accept one.
    pub async fn store(&self, blobs: &[&Blob]) -> Verdict {
        let limit = self.batch_limit().min(3_000_000);
        let cost = |blob: &Blob| blob.data.len() + ENTRY_BYTES;
        let (large, small): (Vec<&Blob>, Vec<&Blob>) = blobs.iter().copied().partition(|b| cost(b) > limit);
        let mut batch = Vec::new();
        let mut bytes = 0;
        for blob in small {
            if bytes + cost(blob) > limit {
                self.store_batch(&std::mem::take(&mut batch)).await?;
                bytes = 0;
            }
            bytes += cost(blob);
            batch.push(blob);
        }
        self.store_batch(&batch).await?;
        for blob in large {
            let committed =
                self.write(blob).await.needs("BS-23", "a blob needed by the check is uploaded")?;
            let size = blob.digest.size_bytes;
            ensure(
                committed == size,
                format!("committed_size {size}"),
                format!("committed_size {committed}"),
            )
            .needs("BS-23")?;
        }
        Ok(())
    }

    async fn store_batch(&self, blobs: &[&Blob]) -> Verdict {
        if blobs.is_empty() {
            return Ok(());
        }
        let answer = self.update(blobs).await.needs("CAS-09", "blobs needed by the check are uploaded")?;
        for response in &answer.responses {
            inline("a blob needed by the check is stored", response.status.as_ref(), &[Code::Ok])
                .needs("CAS-09")?;
        }
        let seen = format!("{} answers", answer.responses.len());
        ensure(answer.responses.len() == blobs.len(), format!("{} answers", blobs.len()), seen)
            .needs("CAS-09")
    }

    /// Stores a unique blob.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn stored(&self, size: usize) -> Verdict<Blob> {
        let blob = self.blob(size);
        self.store(&[&blob]).await?;
        Ok(blob)
    }

    /// Stores a Directory.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn stored_directory(&self, directory: &Directory) -> Verdict<Blob> {
        let blob = self.message(directory);
        self.store(&[&blob]).await?;
        Ok(blob)
    }
}

impl Session {
    /// Starts an upload and aborts it when the server reports that it has received this many bytes, or after ample
    /// time.
    pub async fn broken_upload(&self, messages: Vec<WriteRequest>, bytes: i64) {
        let name = messages.first().map(|message| message.resource_name.clone()).unwrap_or_default();
        let upload = self.open_upload(messages);
        self.upload_reaches(&name, bytes).await;
        upload.abort();
    }

    /// Starts an upload that stays open after these messages until it is aborted.
    pub fn open_upload(&self, messages: Vec<WriteRequest>) -> JoinHandle<()> {
        let s = self.clone();
        tokio::spawn(async move { drop(s.byte_stream().write(stalled(messages)).await) })
    }

    /// Waits until the server reports this many bytes of an upload, or for ample time. An answer before the first byte
    /// arrived proves nothing.
    pub async fn upload_reaches(&self, name: &str, bytes: i64) {
        let reached = async {
            while !self.query(name).await.is_ok_and(|status| status.committed_size >= bytes) {
                tokio::time::sleep(UPLOAD_PAUSE).await;
            }
        };
        // A server may report no progress before the end, or answer only then.
        let _ = tokio::time::timeout(UPLOAD_PATIENCE, reached).await;
    }
}

/// The write messages for these bytes. Only the first one has the name, and only the last one has `finish_write`.
pub(crate) fn pieces(name: &str, data: &Bytes, first_offset: i64, piece: usize) -> Vec<WriteRequest> {
    let mut messages = Vec::new();
    let mut at = 0usize;
    loop {
        let end = at.saturating_add(piece.max(1)).min(data.len());
        messages.push(WriteRequest {
            resource_name: if at == 0 { name.to_owned() } else { String::new() },
            write_offset: first_offset.saturating_add(i64::try_from(at).unwrap_or(i64::MAX)),
            finish_write: end == data.len(),
            data: data.slice(at..end),
        });
        if end == data.len() {
            return messages;
        }
        at = end;
    }
}

/// The first messages of an upload, up to this many bytes, without the end.
pub(crate) fn partial_upload(name: &str, data: &Bytes, bytes: usize) -> Vec<WriteRequest> {
    let mut messages = pieces(name, &data.slice(..bytes.min(data.len())), 0, PIECE_BYTES);
    if let Some(last) = messages.last_mut() {
        last.finish_write = false;
    }
    messages
}

/// A stream of messages that stays open after the last one until it is dropped.
pub(crate) fn stalled(
    messages: Vec<WriteRequest>,
) -> impl futures::Stream<Item = WriteRequest> + Send + 'static {
    stream::iter(messages).chain(stream::pending())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_contiguous_and_only_the_last_one_finishes() {
        for size in [0usize, 1, 9, 10, 11, 25] {
            let data = Bytes::from(vec![7; size]);
            let messages = pieces("n", &data, 0, 10);
            let mut sum = 0;
            for (at, message) in messages.iter().enumerate() {
                assert_eq!(message.write_offset, sum);
                assert_eq!(message.finish_write, at + 1 == messages.len());
                assert_eq!(message.resource_name.is_empty(), at > 0);
                sum += message.data.len() as i64;
            }
            assert_eq!(sum as usize, size);
        }
        assert!(
            partial_upload("n", &Bytes::from_static(b"abcd"), 2).iter().all(|message| !message.finish_write)
        );
    }
}
