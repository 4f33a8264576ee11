//! Reads blobs. All bytes are checked against the requested digest.

use super::{
    CALL_TIMEOUT, Client, Progress, STREAM_IDLE_TIMEOUT, backoff, blocking, limit_of_answer,
    retrying_transfer,
    status::{from_message, from_status},
    timed, within,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::{bytestream, reapi},
};
use std::{collections::HashMap, io::Write, sync::Arc};
use tokio::sync::mpsc;
use tonic::Streaming;

/// Number of messages that may wait between the network and a slow sink.
const CHUNKS_IN_FLIGHT: usize = 4;

impl Client {
    /// Reads a blob into `sink` and returns the sink. A broken stream is resumed at the same offset.
    ///
    /// # Errors
    /// `DataLoss` when the bytes do not match the digest; `Invalid` when writing to the sink fails; errors of the
    /// server.
    pub async fn read_into<W: Write + Send + 'static>(
        &self,
        digest: Digest,
        sink: W,
        progress: &Arc<Progress>,
    ) -> Result<W> {
        let (sender, mut receiver) = mpsc::channel::<Bytes>(CHUNKS_IN_FLIGHT);
        let writer = blocking(move || {
            let (mut sink, mut hasher) = (sink, digest.hasher());
            while let Some(chunk) = receiver.blocking_recv() {
                hasher.update(&chunk);
                sink.write_all(&chunk).map_err(|error| {
                    Error::Invalid(format!("could not write the content of blob {digest}: {error}"))
                })?;
            }
            Ok((sink, hasher.finish()))
        });
        let source = async move { self.read_chunks(digest, &sender, progress).await };
        let (written, read) = tokio::join!(writer, source);
        let (sink, received) = written?;
        read?;
        check_digest(digest, received)?;
        Ok(sink)
    }

    async fn read_chunks(
        &self,
        digest: Digest,
        sink: &mpsc::Sender<Bytes>,
        progress: &Progress,
    ) -> Result<()> {
        let (mut received, mut tries) = (0u64, 0);
        while received < digest.size() {
            let before = received;
            let Err(error) = self.read_from(digest, &mut received, sink, progress).await else { break };
            // Only attempts without progress count, so a long download may break more often than a short one.
            tries = if received > before { 1 } else { tries + 1 };
            match backoff(&error, tries) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_from(
        &self,
        digest: Digest,
        received: &mut u64,
        sink: &mpsc::Sender<Bytes>,
        progress: &Progress,
    ) -> Result<()> {
        let call = format!("download of {digest}");
        let failed = |status: tonic::Status| from_status(&call, &status);
        let mut stream = self.open_stream(self.qualify(&digest.blob_name()), *received, &call).await?;
        while let Some(message) = tokio::time::timeout(STREAM_IDLE_TIMEOUT, stream.message())
            .await
            .map_err(|_| silent(&call))?
            .map_err(failed)?
        {
            let count = message.data.len() as u64;
            *received += count;
            if *received > digest.size() {
                return Err(Error::DataLoss(format!("{call}: the server sends more than the blob holds")));
            }
            progress.advance(count);
            if sink.send(message.data).await.is_err() {
                // The writer has failed and reports the error.
                return Ok(());
            }
        }
        if *received < digest.size() {
            return Err(Error::DataLoss(format!("{call}: it ends after {received} bytes")));
        }
        Ok(())
    }

    /// Starts to read a stream of bytes at an offset. `call` names the read in errors.
    pub(super) async fn open_stream(
        &self,
        resource_name: String,
        offset: u64,
        call: &str,
    ) -> Result<Streaming<bytestream::ReadResponse>> {
        let read_offset = i64::try_from(offset).unwrap_or(i64::MAX);
        let request = bytestream::ReadRequest { resource_name, read_offset, read_limit: 0 };
        let mut client = self.byte_stream();
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.read(request)).await;
        let answer = answer.map_err(|_| silent(call))?.map_err(|status| from_status(call, &status))?;
        Ok(answer.into_inner())
    }

    /// Reads small blobs, in any order, and checks each. The sum of their sizes must be at most
    /// [`Client::batch_bytes`].
    ///
    /// # Errors
    /// The first error of any blob.
    pub(super) async fn read_batch(&self, digests: &[Digest]) -> Result<HashMap<Digest, Bytes>> {
        let request = reapi::BatchReadBlobsRequest {
            instance_name: self.instance.clone(),
            digests: digests.iter().map(|digest| digest.to_wire()).collect(),
            digest_function: self.function.wire().into(),
            ..Default::default()
        };
        let function = self.function;
        let limit = limit_of_answer(digests.iter().map(Digest::size).sum());
        let read = async || {
            let answer = self.cas().batch_read_blobs(timed(request.clone())).await;
            let answer = answer.map_err(|status| from_status("BatchReadBlobs", &status))?.into_inner();
            blocking(move || {
                let mut blobs = HashMap::new();
                for response in answer.responses {
                    let digest = Digest::from_wire(function, response.digest.as_ref(), "Response.digest")?;
                    match from_message(&format!("download of {digest}"), response.status.as_ref()) {
                        Some(error) => return Err(error),
                        None => check_digest(digest, function.digest(&response.data))?,
                    }
                    blobs.insert(digest, response.data);
                }
                Ok(blobs)
            })
            .await
        };
        retrying_transfer(|| within(limit, read())).await
    }

    /// Reads a blob of at most `max` bytes into memory.
    ///
    /// # Errors
    /// `Invalid` when it is larger than `max`; the errors of [`Client::read_into`].
    pub async fn read_bytes(&self, digest: Digest, max: u64, progress: &Arc<Progress>) -> Result<Vec<u8>> {
        if digest.size() > max {
            return Err(Error::Invalid(format!(
                "blob {digest} is larger than the {max} bytes expected here"
            )));
        }
        self.read_into(digest, Vec::new(), progress).await
    }
}

fn silent(call: &str) -> Error {
    Error::Unavailable(format!("{call}: the server is silent"))
}

fn check_digest(wanted: Digest, found: Digest) -> Result<()> {
    if wanted == found {
        return Ok(());
    }
    Err(Error::DataLoss(format!("the server sent {found} where blob {wanted} was requested")))
}
