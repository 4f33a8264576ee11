//! Uploads blobs concurrently: small ones in batches, large ones with ByteStream.
//!
//! Files are read when they are sent, so the concurrent calls bound the memory. A file that changed since it was hashed
//! is an error that names it.

use super::{
    BlobSet, Client, Progress, STREAM_IDLE_TIMEOUT, Source, UPLOAD_END_TIMEOUT, backoff,
    blobs::BlobProgress,
    blocking, local, retrying, retrying_transfer,
    status::{from_message, from_status},
    timed,
};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::{bytestream, reapi},
};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
};
use tokio::{sync::mpsc, time::timeout};

/// Number of concurrent calls: enough to hide a round trip, few enough to bound memory.
const CALLS_AT_A_TIME: usize = 8;
/// Most blobs in one batch call. Bounds the overhead per blob, which its size does not include.
const BLOBS_PER_BATCH: usize = 2_000;
/// Overhead of one blob in a batch message besides its bytes (GEN-24).
const BLOB_OVERHEAD_BYTES: u64 = 150;
/// Number of bytes in one message of an upload.
const CHUNK_BYTES: usize = 256 * 1024;
/// Number of messages that may wait between disk and network.
const CHUNKS_IN_FLIGHT: usize = 4;

impl Client {
    /// Uploads the blobs that the server lacks. Returns the number of these blobs and their bytes.
    ///
    /// # Errors
    /// `Invalid` when a file changed since it was added; errors of the server.
    pub async fn upload(&self, blobs: &BlobSet, progress: &Arc<Progress>) -> Result<(usize, u64)> {
        let missing = self.find_missing(blobs.digests()).await?;
        let mut todo = HashMap::new();
        for digest in missing {
            let source = blobs.get(&digest).ok_or_else(|| {
                Error::Internal(format!(
                    "the server says that {digest} is missing, although the request did not contain it"
                ))
            })?;
            todo.insert(digest, source.clone());
        }
        let bytes = todo.keys().map(Digest::size).sum();
        progress.expect(bytes);
        let (small, large): (Vec<_>, Vec<_>) =
            todo.keys().copied().partition(|digest| digest.size() + BLOB_OVERHEAD_BYTES <= self.batch_bytes);
        let todo = Arc::new(todo);
        let calls = batches(small, self.batch_bytes).into_iter().chain(large.into_iter().map(|d| vec![d]));
        stream::iter(calls)
            .map(|digests| {
                let (client, todo, progress) = (self.clone(), todo.clone(), progress.clone());
                async move { client.upload_some(digests, todo, &progress).await }
            })
            .buffer_unordered(CALLS_AT_A_TIME)
            .try_collect::<()>()
            .await?;
        Ok((todo.len(), bytes))
    }

    async fn upload_some(
        &self,
        digests: Vec<Digest>,
        sources: Arc<HashMap<Digest, Source>>,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        if let [digest] = digests[..]
            && digest.size() + BLOB_OVERHEAD_BYTES > self.batch_bytes
            && let Some(source) = sources.get(&digest)
        {
            let progress = Arc::new(progress.of_blob());
            retrying_transfer(async || self.write(digest, source.clone(), progress.clone()).await).await?;
            // The server may have ended the upload early because it has the blob (BS-24).
            progress.reach(digest.size());
            return Ok(());
        }
        let requests = blocking(move || {
            let read = digests.iter().filter_map(|digest| Some((digest, sources.get(digest)?)));
            read.map(|(digest, source)| {
                let data = read_whole(digest, source)?;
                let digest = Some(digest.to_wire());
                Ok(reapi::batch_update_blobs_request::Request { digest, data, compressor: 0 })
            })
            .collect::<Result<Vec<_>>>()
        })
        .await?;
        let bytes = requests.iter().map(|request| request.data.len() as u64).sum();
        let request = reapi::BatchUpdateBlobsRequest {
            instance_name: self.instance.clone(),
            requests,
            ..Default::default()
        };
        retrying(async || {
            let answer = self.cas().batch_update_blobs(timed(request.clone())).await;
            let answer = answer.map_err(|status| from_status("BatchUpdateBlobs", &status))?.into_inner();
            // A permanent failure of one blob takes precedence over a transient one.
            let errors = answer.responses.iter().filter_map(|response| {
                let hash = response.digest.as_ref().map_or("?", |digest| digest.hash.as_str());
                from_message(&format!("upload of {hash}"), response.status.as_ref())
            });
            errors.max_by_key(|error| backoff(error, 1).is_none()).map_or(Ok(()), Err)
        })
        .await?;
        progress.advance(bytes);
        Ok(())
    }

    /// Uploads one blob with ByteStream.Write, from the start. Gives up if the connection takes no message for
    /// [`STREAM_IDLE_TIMEOUT`], or if there is no answer [`UPLOAD_END_TIMEOUT`] after the last one.
    async fn write(&self, digest: Digest, source: Source, progress: Arc<BlobProgress>) -> Result<()> {
        let name = self.qualify(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), digest.blob_name()));
        let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT);
        let reader = blocking(move || send_chunks(&digest, &source, name, &sender, &progress));
        let receiver = Arc::new(Mutex::new(receiver));
        let (messages, is_sent) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let requests = {
            let (receiver, messages, is_sent) = (receiver.clone(), messages.clone(), is_sent.clone());
            stream::poll_fn(move |context| {
                let polled = locked(&receiver).poll_recv(context);
                messages.fetch_add(u64::from(polled.is_ready()), Relaxed);
                is_sent.fetch_or(matches!(polled, Poll::Ready(None)), Relaxed);
                polled
            })
        };
        let answer = async {
            let mut client = self.byte_stream();
            let mut answer = pin!(client.write(requests));
            let call = format!("upload of {digest}");
            loop {
                let before = messages.load(Relaxed);
                let limit = if is_sent.load(Relaxed) { UPLOAD_END_TIMEOUT } else { STREAM_IDLE_TIMEOUT };
                match timeout(limit, answer.as_mut()).await {
                    Ok(answer) => return answer.map_err(|status| from_status(&call, &status)),
                    Err(_) if messages.load(Relaxed) > before => {}
                    Err(_) => {
                        return Err(Error::Unavailable(format!("{call}: the server accepts no more bytes")));
                    }
                }
            }
        };
        // A connection keeps a stream that the server does not read, so closing the receiver is what ends the reader.
        let answer = answer.inspect(|_| locked(&receiver).close());
        let (read, answer) = tokio::join!(reader, answer);
        // A file that cannot be read explains the server's error, so its error takes precedence.
        read?;
        let committed = answer?.into_inner().committed_size;
        if u64::try_from(committed) == Ok(digest.size()) {
            Ok(())
        } else {
            Err(Error::Internal(format!("the server stored {committed} bytes of blob {digest}")))
        }
    }

    /// Groups digests so that each group fits into one batch call. Blobs that are too large form groups of one.
    pub(super) fn batches(&self, digests: Vec<Digest>) -> Vec<Vec<Digest>> {
        batches(digests, self.batch_bytes)
    }

    /// Whether a blob is small enough for batch calls.
    pub(super) fn fits_batch(&self, digest: &Digest) -> bool {
        digest.size() + BLOB_OVERHEAD_BYTES <= self.batch_bytes
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn batches(digests: Vec<Digest>, max_bytes: u64) -> Vec<Vec<Digest>> {
    let mut batches: Vec<Vec<Digest>> = Vec::new();
    let mut room = 0;
    for digest in digests {
        let cost = digest.size() + BLOB_OVERHEAD_BYTES;
        match batches.last_mut() {
            Some(batch) if cost <= room && batch.len() < BLOBS_PER_BATCH => {
                batch.push(digest);
                room -= cost;
            }
            _ => {
                batches.push(vec![digest]);
                room = max_bytes.saturating_sub(cost);
            }
        }
    }
    batches
}

fn changed(path: &std::path::Path) -> Error {
    Error::Invalid(format!("{} changed while it was being uploaded; try again", path.display()))
}

fn read_whole(digest: &Digest, source: &Source) -> Result<Bytes> {
    match source {
        Source::Bytes(bytes) => Ok(bytes.clone()),
        Source::File(path) => {
            let bytes = fs::read(path).map_err(|error| local("read", path, &error))?;
            if DigestFunction::Sha256.digest(&bytes) == *digest {
                Ok(bytes.into())
            } else {
                Err(changed(path))
            }
        }
    }
}

/// Sends a blob as WriteRequests (BS-18, BS-19, BS-21). Stops without an error when the server accepts no more (BS-24).
fn send_chunks(
    digest: &Digest,
    source: &Source,
    name: String,
    sink: &mpsc::Sender<bytestream::WriteRequest>,
    progress: &BlobProgress,
) -> Result<()> {
    let mut file = match source {
        Source::Bytes(_) => None,
        Source::File(path) => Some((path, File::open(path).map_err(|error| local("read", path, &error))?)),
    };
    let (mut sent, mut name) = (0u64, name);
    loop {
        let want = usize::try_from(digest.size() - sent).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        let data = match (source, &mut file) {
            (Source::Bytes(bytes), _) => {
                let start = usize::try_from(sent).unwrap_or(usize::MAX).min(bytes.len());
                bytes.slice(start..start.saturating_add(want).min(bytes.len()))
            }
            (Source::File(path), Some((_, file))) => {
                let mut chunk = vec![0; want];
                file.read_exact(&mut chunk).map_err(|_| changed(path))?;
                Bytes::from(chunk)
            }
            (Source::File(path), None) => return Err(changed(path)),
        };
        let write_offset = i64::try_from(sent).unwrap_or(i64::MAX);
        sent += data.len() as u64;
        let finish_write = sent >= digest.size();
        let resource_name = std::mem::take(&mut name);
        let request = bytestream::WriteRequest { resource_name, write_offset, finish_write, data };
        if sink.blocking_send(request).is_err() {
            return Ok(());
        }
        progress.reach(sent);
        if finish_write {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(size: usize) -> Digest {
        DigestFunction::Sha256.digest(&vec![0; size])
    }

    #[test]
    fn batches_hold_every_blob_once_and_stay_below_the_limit() {
        let digests: Vec<_> = (0..5_000).map(|n| digest(n % 700)).collect();
        let batches = batches(digests.clone(), 10_000);
        assert_eq!(batches.concat(), digests);
        for batch in &batches {
            let bytes: u64 = batch.iter().map(|d| d.size() + BLOB_OVERHEAD_BYTES).sum();
            assert!(bytes <= 10_000 && batch.len() <= BLOBS_PER_BATCH);
        }
    }

    /// BS-19, BS-21, BS-30.
    #[test]
    fn an_upload_is_chunks_with_running_offsets_and_one_finish() {
        let dir = tempfile::tempdir().unwrap();
        for size in [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES] {
            let content: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            let path = dir.path().join(size.to_string());
            fs::write(&path, &content).unwrap();
            let digest = DigestFunction::Sha256.digest(&content);
            for source in [Source::Bytes(content.clone().into()), Source::File(path.clone())] {
                let (sender, mut receiver) = mpsc::channel(16);
                let progress = Arc::new(Progress::default());
                let blob = progress.of_blob();
                send_chunks(&digest, &source, "name".into(), &sender, &blob).unwrap();
                assert_eq!(progress.bytes().0, size as u64);
                // Sent again, as after a broken connection: no byte counts twice.
                let (again, _receiver) = mpsc::channel(16);
                send_chunks(&digest, &source, "name".into(), &again, &blob).unwrap();
                assert_eq!(progress.bytes().0, size as u64);
                drop(sender);
                let (mut got, mut finished) = (Vec::new(), 0);
                while let Ok(request) = receiver.try_recv() {
                    assert_eq!(request.write_offset, got.len() as i64);
                    assert_eq!(request.resource_name.is_empty(), !got.is_empty());
                    got.extend_from_slice(&request.data);
                    finished += usize::from(request.finish_write);
                }
                assert!(got == content && finished == 1, "{size}");
            }
            let (sender, _receiver) = mpsc::channel(16);
            fs::write(&path, content.get(1..).unwrap_or_default()).unwrap();
            let blob = Arc::new(Progress::default()).of_blob();
            let shorter = send_chunks(&digest, &Source::File(path), "name".into(), &sender, &blob);
            assert_eq!(shorter.is_err(), size > 0);
        }
    }
}
