//! BS-31 to BS-33: QueryWriteStatus, which is optional.

use super::write::resume;
use crate::{
    check::{Answer as _, Check, Verdict, ensure, equal, fail},
    checks,
    compression::{ZSTD, compress},
    session::{Session, listed},
    store::pieces,
};
use std::time::Duration;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) const CHECKS: &[Check] = checks![
    the_status_follows_the_upload => "BS-31";
    a_stored_blob_is_complete_under_any_name => "BS-31";
    an_upload_that_nobody_began_is_at_0 => "BS-32";
    a_broken_compressed_upload_goes_on_at_a_plain_offset => "BS-33";
];

/// How often a running upload is polled until the server has received everything, and the delay in between.
const POLLS: usize = 40;
const PAUSE: Duration = Duration::from_millis(50);

async fn the_status_follows_the_upload(s: Session) -> Verdict {
    let blob = s.blob(100_000);
    let name = s.write_name(&blob);
    s.query(&name).await.offered("QueryWriteStatus before the upload answers")?;
    let mut messages = pieces(&name, &blob.data, 0, 50_000).into_iter();
    let (send, stream) = tokio::sync::mpsc::channel(1);
    let uploading = s.clone();
    s.count_written(blob.data.len());
    let upload =
        tokio::spawn(async move { uploading.byte_stream().write(ReceiverStream::new(stream)).await });
    if let Some(first) = messages.next() {
        let _ = send.send(first).await;
    }
    let (mut before, mut polls) = (0, 0);
    // A server may report progress in its own steps, but it never goes back and is not complete.
    while before < 50_000 && polls < POLLS {
        let status = s.query(&name).await.wanted("QueryWriteStatus during the upload answers")?;
        ensure(!status.complete, "complete: false during the upload", "true")?;
        let now = status.committed_size;
        ensure(before <= now && now <= 50_000, format!("committed_size {before} to 50000"), now)?;
        (before, polls) = (now, polls + 1);
        tokio::time::sleep(PAUSE).await;
    }
    for message in messages {
        let _ = send.send(message).await;
    }
    drop(send);
    let answer = upload.await.map_err(|error| fail("an answer", error))?;
    let committed = answer.wanted("the upload is accepted")?.into_inner().committed_size;
    equal("committed_size of the upload", &committed, &100_000)?;
    let status = s.query(&name).await.wanted("QueryWriteStatus after the upload answers")?;
    equal("complete and committed_size", &(status.complete, status.committed_size), &(true, 100_000))
}

async fn a_stored_blob_is_complete_under_any_name(s: Session) -> Verdict {
    let blob = s.stored(1000).await?;
    let status = s.query(&s.write_name(&blob)).await.offered("QueryWriteStatus of a stored blob answers")?;
    equal("complete and committed_size", &(status.complete, status.committed_size), &(true, 1000))
}

async fn an_upload_that_nobody_began_is_at_0(s: Session) -> Verdict {
    let status = s.query(&s.write_name(&s.blob(1000))).await;
    let status = status.offered("QueryWriteStatus of an upload that nobody began answers")?;
    equal("complete and committed_size", &(status.complete, status.committed_size), &(false, 0))
}

async fn a_broken_compressed_upload_goes_on_at_a_plain_offset(s: Session) -> Verdict {
    listed("zstd for ByteStream", &s.cache()?.supported_compressors, ZSTD)?;
    let blob = s.text(200_000);
    let name = s.compressed_write_name(&blob);
    s.query(&name).await.offered("QueryWriteStatus of a compressed upload answers")?;
    // The upload sends one frame, with half of the blob.
    let frame = compress(&blob.data.slice(..100_000))?;
    let mut messages = pieces(&name, &frame, 0, 1000);
    if let Some(last) = messages.last_mut() {
        last.finish_write = false;
    }
    s.count_written(frame.len());
    s.broken_upload(messages, 1).await;
    let committed = resume(&s, &name, |at| {
        ensure((0..=100_000).contains(&at), "a position in the uncompressed blob, up to 100000", at)?;
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(blob.data.len());
        Ok(pieces(&name, &compress(&blob.data.slice(from..))?, at, 1000))
    });
    committed.await?;
    let read = s.read(&blob.digest).await.needs("BS-07", "the blob is read")?;
    ensure(read == blob.data, "its bytes", "others")
}
