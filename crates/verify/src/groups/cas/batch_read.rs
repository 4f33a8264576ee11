//! CAS-17 to CAS-23: BatchReadBlobs.

use crate::{
    check::{Answer as _, Check, Verdict, absent, ensure, equal, fail, inline},
    checks,
    compression::{BROTLI, DEFLATE, ZSTD, decompress},
    session::Session,
};
use gorego_reapi::proto::reapi::{BatchReadBlobsResponse, Digest, batch_read_blobs_response::Response};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    every_digest_has_a_response_with_digest_and_status => "CAS-17", "CAS-18", "CAS-19";
    no_digests_have_no_responses => "CAS-17";
    data_is_compressed_only_as_acceptable => "CAS-20";
    a_batch_above_the_limit_is_refused_by_its_digests => "CAS-21";
    what_is_read_is_what_was_stored => "CAS-22";
    a_malformed_digest_is_an_error_of_its_own => "CAS-23";
];

fn only<'a>(answer: &'a BatchReadBlobsResponse, digest: &Digest) -> Verdict<&'a Response> {
    let found: Vec<_> = answer.responses.iter().filter(|one| one.digest.as_ref() == Some(digest)).collect();
    match found[..] {
        [one] => Ok(one),
        _ => Err(fail("one response for each digest", format!("{} for {}", found.len(), digest.hash))),
    }
}

async fn every_digest_has_a_response_with_digest_and_status(s: Session) -> Verdict {
    let (first, last, absent) = (s.stored(100).await?, s.stored(200).await?, s.unknown());
    let asked = [first.digest.clone(), absent.clone(), last.digest.clone()];
    let answer = s.batch_read(&asked, &[]).await.wanted("the call is OK although a blob is absent")?;
    equal("responses", &answer.responses.len(), &3)?;
    for response in &answer.responses {
        let digest = response.digest.as_ref();
        let asked_for = digest.is_some_and(|digest| asked.contains(digest));
        ensure(asked_for, "digests that were asked for", format!("{digest:?}"))?;
        // Pants reads an absent message as UNKNOWN.
        let expected = format!("a status message in the response for {digest:?}");
        ensure(response.status.is_some(), expected, "none")?;
    }
    inline("an absent blob", only(&answer, &absent)?.status.as_ref(), &[Code::NotFound])?;
    for (which, blob) in [("the first", first), ("the last", last)] {
        s.case(format!("{which} of three digests"), async {
            let response = only(&answer, &blob.digest)?;
            inline("a stored blob", response.status.as_ref(), &[Code::Ok])?;
            ensure(response.data == blob.data, "its bytes", "others")
        })
        .await?;
    }
    Ok(())
}

async fn no_digests_have_no_responses(s: Session) -> Verdict {
    let answer = s.batch_read(&[], &[]).await.wanted("an empty batch is answered")?;
    equal("responses", &answer.responses.len(), &0)?;
    let answer = s.batch_read(&[s.unknown()], &[]).await.control("a batch of one is answered")?;
    equal("responses", &answer.responses.len(), &1)
}

async fn data_is_compressed_only_as_acceptable(s: Session) -> Verdict {
    let blob = s.text(10_000);
    s.store(&[&blob]).await?;
    let asked = std::slice::from_ref(&blob.digest);
    for acceptable in [&[][..], &[0], &[ZSTD], &[BROTLI], &[DEFLATE], &[ZSTD, 0]] {
        s.case(format!("accepting {acceptable:?}"), async {
            let answer = s.batch_read(asked, acceptable).await.wanted("BatchReadBlobs answers")?;
            let response = only(&answer, &blob.digest)?;
            inline("a stored blob", response.status.as_ref(), &[Code::Ok])?;
            let compressor = response.compressor;
            let fine = compressor == 0 || acceptable.contains(&compressor);
            ensure(fine, "one of them, or IDENTITY", format!("compressor {compressor}"))?;
            let data = match compressor {
                0 => response.data.clone(),
                ZSTD => decompress(&response.data, blob.data.len())?,
                // There is no decoder for it here.
                _ => return Ok(()),
            };
            ensure(data == blob.data, "the bytes, in the encoding that it names", "others")
        })
        .await?;
    }
    Ok(())
}

async fn a_batch_above_the_limit_is_refused_by_its_digests(s: Session) -> Verdict {
    let limit = s.cache()?.max_batch_total_size_bytes;
    if limit <= 0 {
        return Err(absent("the server states no limit"));
    }
    // Nothing of it is stored; only the sizes matter.
    let of_size = |size_bytes| Digest { size_bytes, ..s.unknown() };
    let exact = [of_size(limit - 1000), of_size(1000)];
    let answer = s.batch_read(&exact, &[]).await.wanted("a batch of exactly the limit is answered")?;
    for (at, response) in answer.responses.iter().enumerate() {
        inline(&format!("response {at}, of an absent blob"), response.status.as_ref(), &[Code::NotFound])?;
    }
    let above = [of_size(limit - 1000), of_size(1001)];
    s.batch_read(&above, &[])
        .await
        .refused("a batch of one byte above the limit", &[Code::InvalidArgument])?;
    Ok(())
}

async fn what_is_read_is_what_was_stored(s: Session) -> Verdict {
    let mut blobs = vec![s.blob_of(&b"1"[..]), s.empty()];
    blobs.extend([16, 17, 1000, 16_384, 65_537, 300_000].map(|size| s.blob(size)));
    s.store(&blobs.iter().collect::<Vec<_>>()).await?;
    let asked: Vec<_> = blobs.iter().map(|blob| blob.digest.clone()).collect();
    let answer = s.batch_read(&asked, &[]).await.needs("CAS-17", "BatchReadBlobs answers")?;
    for blob in &blobs {
        s.case(format!("a blob of {} bytes", blob.digest.size_bytes), async {
            let response = only(&answer, &blob.digest)?;
            inline("a stored blob", response.status.as_ref(), &[Code::Ok])?;
            ensure(
                response.data == blob.data,
                "the bytes that were stored",
                format!("{} bytes", response.data.len()),
            )?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_malformed_digest_is_an_error_of_its_own(s: Session) -> Verdict {
    let mut asked = Vec::new();
    for _ in 0..5 {
        asked.push(s.stored(100).await?.digest);
    }
    let mut bad = s.unknown();
    bad.hash.pop();
    asked.insert(2, bad.clone());
    // Some servers refuse the whole call, which the rule tolerates.
    let Some(answer) = s.batch_read(&asked, &[]).await.or_refused("the call", &[Code::InvalidArgument])?
    else {
        return Ok(());
    };
    equal("responses", &answer.responses.len(), &6)?;
    for (at, response) in answer.responses.iter().enumerate() {
        let malformed = response.digest.as_ref() == Some(&bad);
        let code = if malformed { Code::InvalidArgument } else { Code::Ok };
        let kind = if malformed { "a malformed digest" } else { "a stored blob" };
        inline(&format!("response {at}, of {kind}"), response.status.as_ref(), &[code])?;
    }
    Ok(())
}
