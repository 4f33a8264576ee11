//! CAS-09 to CAS-16: BatchUpdateBlobs.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, absent, ensure, equal, fail, inline, skipped},
    checks,
    compression::{ZSTD, bomb, compress, defused},
    session::{Session, listed},
};
use bytes::Bytes;
use gorego_reapi::proto::reapi::{BatchUpdateBlobsResponse, Digest};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    every_item_has_a_response => "CAS-09";
    no_items_have_no_responses => "CAS-09";
    a_bad_item_leaves_the_others_alone => "CAS-10";
    data_that_is_not_the_digests_is_refused_and_not_stored => "CAS-11";
    a_stored_blob_may_be_uploaded_again => "CAS-12";
    the_same_digest_twice_is_ok_twice => "CAS-12";
    compressed_items_are_checked_by_their_content => "CAS-14";
    a_batch_above_the_limit_is_refused_as_a_whole => "CAS-15";
    compressed_items_count_by_what_is_sent => "CAS-15";
    an_item_above_the_largest_blob_is_refused_alone => "CAS-16";
];

const INVALID: &[Code] = &[Code::InvalidArgument];

fn digests_of(answer: &BatchUpdateBlobsResponse) -> Verdict<Vec<Digest>> {
    let digest = |one: &gorego_reapi::proto::reapi::batch_update_blobs_response::Response| {
        one.digest.clone().ok_or_else(|| fail("a digest in each response", "none"))
    };
    let mut digests = answer.responses.iter().map(digest).collect::<Verdict<Vec<_>>>()?;
    digests.sort_by(|a, b| a.hash.cmp(&b.hash));
    Ok(digests)
}

/// Checks that the status for this digest is one of these codes.
fn status_of(answer: &BatchUpdateBlobsResponse, what: &str, digest: &Digest, codes: &[Code]) -> Verdict {
    let mut found = answer.responses.iter().filter(|one| one.digest.as_ref() == Some(digest)).peekable();
    ensure(found.peek().is_some(), format!("a response for {what}"), "none")?;
    found.try_for_each(|one| inline(what, one.status.as_ref(), codes))
}

async fn stored(s: &Session, what: &str, blob: &Blob) -> Verdict {
    let read = s.read(&blob.digest).await.needs("BS-07", &format!("{what} is read"))?;
    ensure(read == blob.data, format!("the bytes of {what}"), "others")
}

async fn not_stored(s: &Session, what: &str, digest: &Digest) -> Verdict {
    let asked = std::slice::from_ref(digest);
    let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal(&format!("{what}: missing_blob_digests"), &missing, &asked.to_vec())
}

async fn every_item_has_a_response(s: Session) -> Verdict {
    let blobs: Vec<Blob> = (0..100).map(|at| s.blob(64 + at)).collect();
    let answer = s.update(&blobs.iter().collect::<Vec<_>>()).await.wanted("a batch of 100 is accepted")?;
    for (at, response) in answer.responses.iter().enumerate() {
        inline(&format!("response {at}"), response.status.as_ref(), &[Code::Ok])?;
    }
    let mut asked: Vec<Digest> = blobs.into_iter().map(|blob| blob.digest).collect();
    asked.sort_by(|a, b| a.hash.cmp(&b.hash));
    ensure(digests_of(&answer)? == asked, "the 100 digests that were sent", "others")?;
    let missing = s.missing(&asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing_blob_digests", &missing, &Vec::new())
}

async fn no_items_have_no_responses(s: Session) -> Verdict {
    let answer = s.update(&[]).await.wanted("an empty batch is accepted")?;
    equal("responses", &answer.responses.len(), &0)?;
    let answer = s.update(&[&s.blob(100)]).await.control("a batch of one is accepted")?;
    equal("responses", &answer.responses.len(), &1)
}

async fn a_bad_item_leaves_the_others_alone(s: Session) -> Verdict {
    let (first, last) = (s.blob(100), s.blob(100));
    let bad = Blob { digest: s.unknown(), ..s.blob(100) };
    let answer = s.update(&[&first, &bad, &last]).await.wanted("the call is OK although an item is bad")?;
    equal("responses", &answer.responses.len(), &3)?;
    status_of(&answer, "the bad item", &bad.digest, INVALID)?;
    for (which, good) in [("the item before it", &first), ("the item after it", &last)] {
        s.case(which, async {
            status_of(&answer, "a good item", &good.digest, &[Code::Ok])?;
            stored(&s, "a good item", good).await
        })
        .await?;
    }
    Ok(())
}

async fn data_that_is_not_the_digests_is_refused_and_not_stored(s: Session) -> Verdict {
    let flip = |data: &Bytes| -> Bytes {
        data.iter().enumerate().map(|(at, byte)| if at == 50 { byte ^ 1 } else { *byte }).collect()
    };
    let longer = |data: &Bytes| -> Bytes { [&data[..], b"x"].concat().into() };
    for (what, change) in [
        ("data with a flipped bit", Box::new(flip) as Box<dyn Fn(&Bytes) -> Bytes + Send + Sync>),
        ("truncated data", Box::new(|data: &Bytes| data.slice(..data.len() - 1))),
        ("data with a byte too many", Box::new(longer)),
        ("no data", Box::new(|_: &Bytes| Bytes::new())),
    ] {
        s.case(what, async {
            let good = s.blob(100);
            let bad = Blob { data: change(&good.data), ..good.clone() };
            let answer = s.update(&[&bad]).await.wanted("the call is OK although its item is bad")?;
            status_of(&answer, what, &good.digest, INVALID)?;
            not_stored(&s, what, &good.digest).await?;
            s.read(&good.digest).await.refused(&format!("Read after {what}"), &[Code::NotFound])?;
            // The failure must not prevent an upload of the right bytes.
            s.store(&[&good]).await?;
            stored(&s, "the right data", &good).await
        })
        .await?;
    }
    Ok(())
}

async fn a_stored_blob_may_be_uploaded_again(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    let answer = s.update(&[&blob]).await.wanted("the second upload is accepted")?;
    status_of(&answer, "the second upload", &blob.digest, &[Code::Ok])?;
    stored(&s, "the blob", &blob).await
}

async fn the_same_digest_twice_is_ok_twice(s: Session) -> Verdict {
    let blob = s.blob(100);
    let answer = s.update(&[&blob, &blob]).await.wanted("a batch with a blob twice is accepted")?;
    equal("responses", &answer.responses.len(), &2)?;
    status_of(&answer, "each of them", &blob.digest, &[Code::Ok])?;
    stored(&s, "the blob", &blob).await
}

/// Uploads an item whose data is labelled as zstd.
async fn update_zstd(s: &Session, digest: &Digest, data: Bytes) -> Verdict<BatchUpdateBlobsResponse> {
    let mut item = s.item(&Blob { digest: digest.clone(), ..s.blob_of(data) });
    item.compressor = ZSTD;
    s.update_items(vec![item]).await.wanted("a batch with a compressed item is answered")
}

async fn compressed_items_are_checked_by_their_content(s: Session) -> Verdict {
    listed("zstd for batches", &s.cache()?.supported_batch_update_compressors, ZSTD)?;
    let good = s.text(10_000);
    let answer = update_zstd(&s, &good.digest, compress(&good.data)?).await?;
    status_of(&answer, "a compressed item", &good.digest, &[Code::Ok])?;
    stored(&s, "a compressed item", &good).await?;

    let frame = compress(&s.text(10_000).data)?;
    let noise = s.blob(100).data;
    for (what, data) in [
        ("a truncated frame", frame.slice(..frame.len() / 2)),
        ("no zstd at all", noise.clone()),
        ("a frame and garbage", [&frame[..], &noise[..]].concat().into()),
        ("a frame of other content", frame.clone()),
        ("no data", Bytes::new()),
    ] {
        s.case(what, async {
            let claimed = s.text(10_000).digest;
            let answer = update_zstd(&s, &claimed, data).await?;
            status_of(&answer, what, &claimed, INVALID)?;
            not_stored(&s, what, &claimed).await
        })
        .await?;
    }
    // 1 GiB of zeros with a claimed size of 1000 bytes. A server that decompresses everything is too late.
    let claimed = Digest { size_bytes: 1000, ..s.unknown() };
    let answer = defused(update_zstd(&s, &claimed, bomb(1024)?)).await??;
    status_of(&answer, "a bomb", &claimed, INVALID)
}

async fn a_batch_above_the_limit_is_refused_as_a_whole(s: Session) -> Verdict {
    let limit = usize::try_from(s.cache()?.max_batch_total_size_bytes).unwrap_or(0);
    match limit {
        0 => return Err(absent("the server states no limit")),
        // A batch of exactly the limit has its own check.
        16_000_000.. if !s.options().large => return Err(skipped("a full batch is large: run with --large")),
        _ => {}
    }
    let (small, rest) = (s.blob(100), s.blob(limit - 99));
    let answer = s.update(&[&small, &rest]).await;
    answer.refused("a batch of one byte above the limit", INVALID)?;
    not_stored(&s, "an item of a refused batch", &small.digest).await
}

async fn compressed_items_count_by_what_is_sent(s: Session) -> Verdict {
    listed("zstd for batches", &s.cache()?.supported_batch_update_compressors, ZSTD)?;
    let size = s.batch_limit().min(16_000_000) / 2 + 1000;
    let blobs = [s.text(size), s.text(size)];
    let mut items = Vec::new();
    for blob in &blobs {
        let mut item = s.item(blob);
        (item.data, item.compressor) = (compress(&blob.data)?, ZSTD);
        items.push(item);
    }
    let answer = s.update_items(items).await;
    let answer = answer.wanted("a batch above the limit, but not as it is sent, is accepted")?;
    for (which, blob) in ["the first item", "the second item"].into_iter().zip(&blobs) {
        status_of(&answer, which, &blob.digest, &[Code::Ok])?;
    }
    Ok(())
}

async fn an_item_above_the_largest_blob_is_refused_alone(s: Session) -> Verdict {
    let largest = usize::try_from(s.cache()?.max_cas_blob_size_bytes).unwrap_or(0);
    if largest == 0 {
        return Err(absent("the server states no largest blob"));
    }
    if largest + 1000 > s.batch_limit().min(16_000_000) {
        let why = "needs a server whose largest blob is smaller than a batch";
        return Err(skipped(format!("{why}; this one takes {largest} bytes")));
    }
    let (fits, too_large) = (s.blob(500), s.blob(largest + 1));
    let answer =
        s.update(&[&fits, &too_large]).await.wanted("the call is OK although an item is too large")?;
    status_of(&answer, "an item that fits", &fits.digest, &[Code::Ok])?;
    status_of(&answer, "an item that is too large", &too_large.digest, INVALID)
}
