//! BS-18 to BS-24, BS-28 to BS-30: uncompressed uploads.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, ensure, equal, fail},
    checks,
    compression::{ZSTD, compress},
    session::Session,
    store::{partial_upload, pieces},
};
use bytes::Bytes;
use futures::{StreamExt as _, future::join_all, stream};
use gorego_reapi::proto::bytestream::WriteRequest;
use std::time::Duration;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    the_name_may_be_on_the_first_or_on_every_message => "BS-18", "BS-23";
    a_name_that_changes_or_is_missing_is_refused => "BS-18";
    offsets_with_gaps_and_overlaps_are_refused => "BS-19";
    a_broken_upload_starts_over_under_its_name => "BS-20";
    a_broken_upload_goes_on_where_the_server_says => "BS-20", "BS-31";
    a_stream_without_finish_write_stores_nothing => "BS-21";
    data_after_finish_write_is_refused => "BS-21";
    content_that_is_not_the_digests_is_refused => "BS-22";
    an_endless_upload_is_refused_once_it_is_too_long => "BS-22";
    a_stored_blob_may_be_written_again => "BS-24", "BS-23";
    two_racing_uploads_both_end_ok => "BS-24";
    many_simultaneous_uploads_of_one_blob_all_succeed => "BS-28";
    cancelled_uploads_leave_nothing => "BS-29";
    an_empty_blob_is_uploaded => "BS-30", "GEN-06";
    empty_messages_within_an_upload_are_harmless => "BS-30";
];

const INVALID: &[Code] = &[Code::InvalidArgument];
/// Time limit for a server to detect a broken or oversized stream.
const NOTICE: Duration = Duration::from_secs(10);
/// Number of concurrent uploads of one blob. Most of the 64 of BS-28 would only wait for a connection.
const WRITERS: usize = 32;

async fn is_stored(s: &Session, blob: &Blob) -> Verdict {
    let read = s.read(&blob.digest).await.needs("BS-07", "the blob is read after its upload")?;
    ensure(read == blob.data, "the bytes that were uploaded", "others")
}

async fn is_missing(s: &Session, what: &str, blob: &Blob) -> Verdict {
    let asked = std::slice::from_ref(&blob.digest);
    let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal(&format!("after {what}: missing_blob_digests"), &missing, &asked.to_vec())
}

/// Starts an upload, sends these messages, and aborts it after the server has had time to receive them.
async fn broken(s: &Session, messages: Vec<WriteRequest>) {
    let bytes: usize = messages.iter().map(|message| message.data.len()).sum();
    s.broken_upload(messages, i64::try_from(bytes).unwrap_or(i64::MAX)).await;
}

/// Resumes a broken upload at the position that the server reports, with the messages that `rest` creates for this
/// position. Returns the `committed_size`. The server may still be receiving what was sent before the break. Its answer
/// may then be outdated, and the client asks again.
pub(crate) async fn resume(
    s: &Session,
    name: &str,
    rest: impl Fn(i64) -> Verdict<Vec<WriteRequest>>,
) -> Verdict<i64> {
    let ask = async || {
        let status = s.query(name).await.offered("QueryWriteStatus of a broken upload answers")?;
        equal("complete", &status.complete, &false)?;
        Ok(status.committed_size)
    };
    let mut at = ask().await?;
    loop {
        let answer = s.write_messages(rest(at)?).await;
        let now = if answer.is_err() { ask().await? } else { at };
        if now == at {
            return answer.wanted(&format!("the upload goes on at {at}, where QueryWriteStatus has it"));
        }
        at = now;
    }
}

async fn the_name_may_be_on_the_first_or_on_every_message(s: Session) -> Verdict {
    for (what, repeated) in [("on the first message only", false), ("on every message", true)] {
        s.case(format!("the name {what}"), async {
            let blob = s.blob(1000);
            let name = s.write_name(&blob);
            let mut messages = pieces(&name, &blob.data, 0, 300);
            if repeated {
                messages.iter_mut().for_each(|message| message.resource_name.clone_from(&name));
            }
            let committed = s.write_messages(messages).await;
            let committed = committed.wanted("the upload is accepted")?;
            equal("committed_size", &committed, &1000)?;
            is_stored(&s, &blob).await
        })
        .await?;
    }
    Ok(())
}

async fn a_name_that_changes_or_is_missing_is_refused(s: Session) -> Verdict {
    s.write(&s.blob(1000)).await.needs("BS-23", "an upload is accepted")?;
    let (blob, other) = (s.blob(1000), s.blob(1000));
    let mut changed = pieces(&s.write_name(&blob), &blob.data, 0, 300);
    if let Some(message) = changed.get_mut(2) {
        message.resource_name = s.write_name(&other);
    }
    s.write_messages(changed).await.refused("an upload whose name changes", INVALID)?;
    is_missing(&s, "a change of the name", &blob).await?;
    let nameless = pieces("", &blob.data, 0, 300);
    s.write_messages(nameless).await.refused("an upload without a name", INVALID)?;
    is_missing(&s, "an upload without a name", &blob).await
}

async fn offsets_with_gaps_and_overlaps_are_refused(s: Session) -> Verdict {
    s.write(&s.blob(1000)).await.needs("BS-23", "an upload is accepted")?;
    for (what, second) in [("a gap", 301), ("an overlap", 299), ("0 again", 0), ("a negative offset", -1)] {
        s.case(what, async {
            let blob = s.blob(1000);
            let mut messages = pieces(&s.write_name(&blob), &blob.data, 0, 300);
            if let Some(message) = messages.get_mut(1) {
                message.write_offset = second;
            }
            let answer = s.write_messages(messages).await;
            answer.refused(&format!("an upload whose second offset is {what}"), INVALID)?;
            is_missing(&s, what, &blob).await
        })
        .await?;
    }
    Ok(())
}

async fn a_broken_upload_starts_over_under_its_name(s: Session) -> Verdict {
    let blob = s.blob(200_000);
    let name = s.write_name(&blob);
    broken(&s, partial_upload(&name, &blob.data, 100_000)).await;
    is_missing(&s, "a broken upload", &blob).await?;
    let committed = s.write_messages(pieces(&name, &blob.data, 0, 50_000)).await;
    let committed = committed.wanted("the same name is accepted from offset 0 again")?;
    equal("committed_size", &committed, &200_000)?;
    is_stored(&s, &blob).await
}

async fn a_broken_upload_goes_on_where_the_server_says(s: Session) -> Verdict {
    let blob = s.blob(200_000);
    let name = s.write_name(&blob);
    broken(&s, partial_upload(&name, &blob.data, 100_000)).await;
    let committed = resume(&s, &name, |at| {
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        ensure(from <= 100_000, "a committed_size of at most what was sent", at)?;
        Ok(pieces(&name, &blob.data.slice(from.min(100_000)..), at, 50_000))
    });
    equal("committed_size", &committed.await?, &200_000)?;
    is_stored(&s, &blob).await
}

async fn a_stream_without_finish_write_stores_nothing(s: Session) -> Verdict {
    // The first upload sends all of the data without the end, and the second sends half of it.
    for sent in [1000, 500] {
        let blob = s.blob(1000);
        let messages = partial_upload(&s.write_name(&blob), &blob.data, sent);
        // The answer is either an error, or the number of bytes that were kept.
        let answer = s.write_messages(messages).await;
        let kept = answer.or_refused(
            &format!("{sent} of 1000 bytes without finish_write"),
            &[Code::InvalidArgument, Code::Cancelled, Code::Aborted, Code::FailedPrecondition],
        )?;
        if let Some(kept) = kept {
            let fits = usize::try_from(kept).is_ok_and(|kept| kept <= sent);
            ensure(fits, format!("a committed_size of at most {sent}"), kept)?;
        }
        is_missing(&s, &format!("{sent} of 1000 bytes without finish_write"), &blob).await?;
    }
    let blob = s.blob(1000);
    s.write(&blob).await.needs("BS-23", "a stream with finish_write is accepted")?;
    is_stored(&s, &blob).await
}

async fn data_after_finish_write_is_refused(s: Session) -> Verdict {
    let blob = s.blob(1000);
    let name = s.write_name(&blob);
    let mut messages = pieces(&name, &blob.data, 0, 500);
    messages.push(WriteRequest {
        resource_name: name,
        write_offset: 1000,
        finish_write: true,
        data: Bytes::from_static(b"more"),
    });
    // A server may answer when the blob is complete, before it sees the further data. Only the stored bytes matter.
    let committed = s.write_messages(messages).await.or_refused("data after finish_write", INVALID)?;
    match committed {
        Some(committed) => {
            equal("committed_size", &committed, &1000)?;
            is_stored(&s, &blob).await
        }
        None => Ok(()),
    }
}

async fn content_that_is_not_the_digests_is_refused(s: Session) -> Verdict {
    for what in ["a flipped bit", "a byte too few", "a byte too many"] {
        s.case(what, async {
            let good = s.blob(1000);
            let mut data = good.data.to_vec();
            match what {
                "a flipped bit" => data[500] ^= 1,
                "a byte too few" => drop(data.pop()),
                _ => data.push(b'x'),
            }
            let answer = s.write(&Blob { data: data.into(), ..good.clone() }).await;
            answer.refused(&format!("an upload with {what}"), INVALID)?;
            is_missing(&s, what, &good).await?;
            // The failure must not prevent an upload of the right bytes.
            s.write(&good).await.wanted("the right bytes are accepted afterwards")?;
            is_stored(&s, &good).await
        })
        .await?;
    }
    Ok(())
}

async fn an_endless_upload_is_refused_once_it_is_too_long(s: Session) -> Verdict {
    let blob = s.blob(1000);
    let name = s.write_name(&blob);
    let noise = s.blob(1000).data;
    s.count_written(100_000);
    let endless = stream::iter(0..100i64).map(move |at| WriteRequest {
        resource_name: if at == 0 { name.clone() } else { String::new() },
        write_offset: at * 1000,
        finish_write: false,
        data: noise.clone(),
    });
    let upload = async { s.byte_stream().write(endless.chain(stream::pending())).await };
    match tokio::time::timeout(NOTICE, upload).await {
        Ok(answer) => drop(answer.refused("100 kB for a blob of 1 kB", INVALID)?),
        Err(_) => {
            return Err(fail("100 kB for a blob of 1 kB are refused while the stream is open", "no answer"));
        }
    }
    is_missing(&s, "an endless upload", &blob).await
}

async fn a_stored_blob_may_be_written_again(s: Session) -> Verdict {
    let blob = s.stored(100_000).await?;
    for upload in ["the second upload", "the third upload"] {
        s.case(upload, async {
            let committed = s.write(&blob).await.wanted("a blob that is stored is accepted again")?;
            equal("committed_size", &committed, &100_000)
        })
        .await?;
    }
    is_stored(&s, &blob).await
}

async fn two_racing_uploads_both_end_ok(s: Session) -> Verdict {
    let blob = s.blob(100_000);
    let mut whole = pieces(&s.write_name(&blob), &blob.data, 0, 10_000);
    let rest = whole.split_off(5);
    // The slow upload sends its second half after the quick one has finished.
    let (done, waiting) = tokio::sync::oneshot::channel::<()>();
    let tail = stream::once(waiting).flat_map(move |_| stream::iter(rest.clone()));
    let slow_session = s.clone();
    let slow = tokio::spawn(async move {
        let messages = stream::iter(whole).chain(tail);
        slow_session.byte_stream().write(messages).await
    });
    s.count_written(blob.data.len());
    let quick = s.write(&blob).await;
    let _ = done.send(());
    equal(
        "committed_size of the first to finish",
        &quick.wanted("one of two uploads is accepted")?,
        &100_000,
    )?;
    let slow = slow.await.map_err(|error| fail("an answer", error))?;
    let slow = slow.wanted("the other one is accepted")?.into_inner().committed_size;
    equal("committed_size of the other", &slow, &100_000)?;
    is_stored(&s, &blob).await
}

async fn many_simultaneous_uploads_of_one_blob_all_succeed(s: Session) -> Verdict {
    let blob = s.text(100_000);
    let zstd = s.cache()?.supported_compressors.contains(&ZSTD);
    let packed = compress(&blob.data)?;
    let upload = |at: usize| {
        let (s, blob) = (s.clone(), blob.clone());
        let compressed = zstd && at % 2 == 1;
        let messages = if compressed {
            pieces(&s.compressed_write_name(&blob), &packed, 0, 100)
        } else {
            pieces(&s.write_name(&blob), &blob.data, 0, 5000 + at * 100)
        };
        async move { (compressed, s.write_messages(messages).await) }
    };
    for (at, (compressed, answer)) in join_all((0..WRITERS).map(upload)).await.into_iter().enumerate() {
        let form = if compressed { "compressed" } else { "plain" };
        s.case(format!("upload {at} of {WRITERS}, {form}"), async {
            let committed = answer.wanted("it is accepted")?;
            ensure(compressed || committed == 100_000, "committed_size 100000", committed)
        })
        .await?;
    }
    is_stored(&s, &blob).await
}

async fn cancelled_uploads_leave_nothing(s: Session) -> Verdict {
    let blobs: Vec<Blob> = (0..20).map(|_| s.blob(20_000)).collect();
    let upload = |blob: &Blob| broken(&s, partial_upload(&s.write_name(blob), &blob.data, 10_000));
    join_all(blobs.iter().map(upload)).await;
    let mut asked: Vec<_> = blobs.iter().map(|blob| blob.digest.clone()).collect();
    let control = s.stored(100).await?;
    asked.push(control.digest);
    let missing = s.missing(&asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing of 20 cancelled uploads", &missing.len(), &20)?;
    for (at, blob) in blobs.iter().take(3).enumerate() {
        s.case(format!("upload {at} of 20"), async {
            s.read(&blob.digest).await.refused("Read of a cancelled upload", &[Code::NotFound])?;
            s.write(blob).await.wanted("a cancelled upload is accepted anew")?;
            is_stored(&s, blob).await
        })
        .await?;
    }
    Ok(())
}

async fn an_empty_blob_is_uploaded(s: Session) -> Verdict {
    let empty = s.empty();
    let committed = s.write(&empty).await.wanted("an upload of no bytes is accepted")?;
    equal("committed_size", &committed, &0)?;
    is_stored(&s, &empty).await?;
    let wrong = Blob { data: Bytes::from_static(b"x"), ..empty };
    s.write(&wrong).await.map_or_else(
        |status| {
            ensure(status.code() == Code::InvalidArgument, "INVALID_ARGUMENT", crate::check::show(&status))
        },
        // It is already stored, so the write may end early (BS-24).
        |committed| equal("committed_size", &committed, &0),
    )
}

async fn empty_messages_within_an_upload_are_harmless(s: Session) -> Verdict {
    let blob = s.blob(1000);
    let mut messages = pieces(&s.write_name(&blob), &blob.data, 0, 500);
    let nothing =
        |write_offset, finish_write| WriteRequest { write_offset, finish_write, ..Default::default() };
    if let Some(last) = messages.last_mut() {
        last.finish_write = false;
    }
    messages.insert(1, nothing(500, false));
    messages.push(nothing(1000, true));
    let committed = s.write_messages(messages).await.wanted("an upload with empty messages is accepted")?;
    equal("committed_size", &committed, &1000)?;
    is_stored(&s, &blob).await
}
