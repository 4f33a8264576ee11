//! CAS-30 to CAS-38: SplitBlob and SpliceBlob, which are optional.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Step as _, Verdict, absent, ensure, equal, fail, inline, only, skipped},
    checks,
    session::Session,
};
use bytes::Bytes;
use fastcdc::v2020::{FastCDC, Normalization};
use gorego_reapi::proto::reapi::{
    ActionResult, Digest, OutputFile, SpliceBlobRequest, SplitBlobRequest, SplitBlobResponse,
    chunking_function::Value as Chunking,
};
use tonic::{Code, Status};

pub(crate) const CHECKS: &[Check] = checks![
    split_chunks_join_to_the_blob => "CAS-30", "CAS-31";
    splitting_what_is_not_there_is_not_found => "CAS-32";
    chunks_keep_to_the_bounds_of_their_function => "CAS-33";
    fast_cdc_chunks_are_those_of_the_reference => "CAS-34";
    a_splice_in_the_wrong_order_is_refused => "CAS-35";
    a_splice_of_the_wrong_size_is_refused => "CAS-35";
    a_splice_without_one_of_its_chunks_is_not_found => "CAS-36";
    a_chunk_may_be_repeated_in_a_splice => "CAS-36";
    a_spliced_blob_is_a_blob_like_others => "CAS-37";
    splicing_again_is_ok => "CAS-38";
];

/// The approximate number of average chunks in a blob that is split.
const CHUNKS: u64 = 12;
/// The average chunk size if the server states none.
const DEFAULT_AVERAGE: u64 = 524_288;

fn splits(s: &Session) -> Verdict {
    let claimed = s.cache()?.split_blob_support;
    if claimed { Ok(()) } else { Err(absent("the server does not claim split_blob_support")) }
}

fn splices(s: &Session) -> Verdict {
    let claimed = s.cache()?.splice_blob_support;
    if claimed { Ok(()) } else { Err(absent("the server does not claim splice_blob_support")) }
}

async fn split(s: &Session, digest: &Digest, function: Chunking) -> Result<SplitBlobResponse, Status> {
    let request = SplitBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(digest.clone()),
        digest_function: s.function_number(),
        chunking_function: function.into(),
    };
    Ok(s.cas().split_blob(request).await?.into_inner())
}

async fn splice(s: &Session, blob: &Digest, chunks: &[&Blob]) -> Result<Option<Digest>, Status> {
    let request = SpliceBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(blob.clone()),
        chunk_digests: chunks.iter().map(|chunk| chunk.digest.clone()).collect(),
        digest_function: s.function_number(),
        chunking_function: Chunking::Unknown.into(),
    };
    Ok(s.cas().splice_blob(request).await?.into_inner().blob_digest)
}

/// Stores a blob of about a dozen chunks and splits it.
async fn stored_and_split(s: &Session, function: Chunking) -> Verdict<(Blob, SplitBlobResponse)> {
    splits(s)?;
    let average =
        s.cache()?.fast_cdc_2020_params.as_ref().map_or(DEFAULT_AVERAGE, |fast| fast.avg_chunk_size_bytes);
    let size = average.clamp(1024, 1_048_576).saturating_mul(CHUNKS);
    let blob = s.stored(usize::try_from(size).unwrap_or(usize::MAX)).await?;
    match split(s, &blob.digest, function).await {
        // The rule allows servers that know only the chunks of spliced blobs.
        Err(status) if status.code() == Code::NotFound => Err(skipped(format!(
            "the server has no split information for a blob that was uploaded whole: {}",
            status.message()
        ))),
        answer => Ok((blob, answer.needs("CAS-30", "SplitBlob of a stored blob answers")?)),
    }
}

async fn split_chunks_join_to_the_blob(s: Session) -> Verdict {
    let (blob, answer) = stored_and_split(&s, Chunking::Unknown).await?;
    let chunks = &answer.chunk_digests;
    ensure(!chunks.is_empty(), "chunks", "an empty list")?;
    ensure(chunks.iter().all(|chunk| chunk.size_bytes > 0), "chunks of positive size", "one of size 0")?;
    let sum: i64 = chunks.iter().map(|chunk| chunk.size_bytes).sum();
    equal("the sum of the sizes", &sum, &blob.digest.size_bytes)?;
    let mut joined = Vec::new();
    for (at, chunk) in chunks.iter().enumerate() {
        s.case(format!("chunk {at} of {}", chunks.len()), async {
            let bytes = s.read(chunk).await.wanted("it is read under the function of the request")?;
            ensure(
                s.blob_of(bytes.clone()).digest == *chunk,
                "bytes that hash to the chunk's digest",
                "others",
            )?;
            joined.extend_from_slice(&bytes);
            Ok(())
        })
        .await?;
    }
    ensure(blob.data == joined, "chunks that join to the blob", "other bytes")?;
    // CAS-31 also names BatchReadBlobs.
    let first = chunks.get(..1).unwrap_or_default();
    let answer = s.batch_read(first, &[]).await.wanted("BatchReadBlobs of a chunk answers")?;
    inline("a chunk", only("a chunk", answer.responses)?.status.as_ref(), &[Code::Ok])
}

async fn splitting_what_is_not_there_is_not_found(s: Session) -> Verdict {
    stored_and_split(&s, Chunking::Unknown).await?;
    let answer = split(&s, &s.unknown(), Chunking::Unknown).await;
    answer.refused("SplitBlob of an unknown blob", &[Code::NotFound])?;
    Ok(())
}

async fn chunks_keep_to_the_bounds_of_their_function(s: Session) -> Verdict {
    splits(&s)?;
    let cache = s.cache()?;
    let fast = cache.fast_cdc_2020_params.as_ref().map(|fast| fast.avg_chunk_size_bytes.saturating_mul(4));
    let rep_max = cache.rep_max_cdc_params.as_ref().map(|rep| rep.min_chunk_size_bytes.saturating_mul(2) - 1);
    let bound_of = |function: i32| match Chunking::try_from(function) {
        Ok(Chunking::FastCdc2020) => fast,
        Ok(Chunking::RepMaxCdc) => rep_max,
        _ => None,
    };
    let mut asked = vec![Chunking::Unknown];
    asked.extend(fast.map(|_| Chunking::FastCdc2020));
    asked.extend(rep_max.map(|_| Chunking::RepMaxCdc));
    for function in asked {
        s.case(function.as_str_name(), async {
            let (_, answer) = stored_and_split(&s, function).await.own()?;
            let used = answer.chunking_function;
            if function != Chunking::Unknown {
                equal("chunking_function of the response", &used, &(function as i32))?;
            }
            let largest = answer.chunk_digests.iter().map(|chunk| chunk.size_bytes).max().unwrap_or(0);
            if let Some(bound) = bound_of(used) {
                let within = u64::try_from(largest).is_ok_and(|largest| largest <= bound);
                ensure(within, format!("chunks of at most {bound} bytes"), format!("one of {largest}"))?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// The chunk sizes of the reference implementation.
fn reference(data: &[u8], average: u64, seed: u32) -> Verdict<Vec<i64>> {
    let size = |bytes: u64| usize::try_from(bytes).map_err(|_| fail("a chunk size that fits", bytes));
    let (least, average, most) = (size(average / 4)?, size(average)?, size(average.saturating_mul(4))?);
    let level = Normalization::Level2;
    let cuts = FastCDC::with_level_and_seed(data, least, average, most, level, u64::from(seed));
    Ok(cuts.map(|chunk| i64::try_from(chunk.length).unwrap_or(i64::MAX)).collect())
}

async fn fast_cdc_chunks_are_those_of_the_reference(s: Session) -> Verdict {
    splits(&s)?;
    let Some(fast) = &s.cache()?.fast_cdc_2020_params else {
        return Err(absent("the server does not list FAST_CDC_2020"));
    };
    let (blob, answer) = stored_and_split(&s, Chunking::FastCdc2020).await?;
    let sizes: Vec<i64> = answer.chunk_digests.iter().map(|chunk| chunk.size_bytes).collect();
    let expected = reference(&blob.data, fast.avg_chunk_size_bytes, fast.seed)?;
    equal("chunk sizes", &sizes, &expected)
}

/// Two stored chunks of different size and content, and the blob that they form, which is not stored.
async fn parts(s: &Session) -> Verdict<(Blob, Blob, Blob)> {
    splices(s)?;
    let (first, second) = (s.stored(1000).await?, s.stored(2000).await?);
    let whole = join(s, &[&first, &second]);
    Ok((first, second, whole))
}

fn join(s: &Session, chunks: &[&Blob]) -> Blob {
    s.blob_of(Bytes::from(chunks.iter().flat_map(|chunk| chunk.data.iter().copied()).collect::<Vec<u8>>()))
}

async fn is_missing(s: &Session, digest: &Digest) -> Verdict {
    let asked = std::slice::from_ref(digest);
    let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing_blob_digests after a refused splice", &missing, &asked.to_vec())
}

async fn a_splice_in_the_wrong_order_is_refused(s: Session) -> Verdict {
    let (first, second, whole) = parts(&s).await?;
    let swapped = splice(&s, &whole.digest, &[&second, &first]).await;
    swapped.refused("a splice of swapped chunks", &[Code::InvalidArgument])?;
    is_missing(&s, &whole.digest).await?;
    splice(&s, &whole.digest, &[&first, &second])
        .await
        .needs("CAS-37", "a splice in the right order is accepted")?;
    Ok(())
}

async fn a_splice_of_the_wrong_size_is_refused(s: Session) -> Verdict {
    let (first, second, whole) = parts(&s).await?;
    for (what, chunks) in
        [("a chunk too few", &[&first][..]), ("a chunk too many", &[&first, &second, &first])]
    {
        s.case(what, async {
            let answer = splice(&s, &whole.digest, chunks).await;
            answer.refused(&format!("a splice with {what}"), &[Code::InvalidArgument])?;
            is_missing(&s, &whole.digest).await
        })
        .await?;
    }
    splice(&s, &whole.digest, &[&first, &second])
        .await
        .needs("CAS-37", "a splice of all chunks is accepted")?;
    Ok(())
}

async fn a_splice_without_one_of_its_chunks_is_not_found(s: Session) -> Verdict {
    let (first, _, _) = parts(&s).await?;
    let absent = s.blob(500);
    let whole = join(&s, &[&first, &absent]);
    let answer = splice(&s, &whole.digest, &[&first, &absent]).await;
    answer.refused("a splice with a chunk that is not stored", &[Code::NotFound])?;
    is_missing(&s, &whole.digest).await?;
    s.store(&[&absent]).await?;
    splice(&s, &whole.digest, &[&first, &absent]).await.wanted("it is accepted once the chunk is stored")?;
    Ok(())
}

async fn a_chunk_may_be_repeated_in_a_splice(s: Session) -> Verdict {
    let (first, second, _) = parts(&s).await?;
    let chunks = [&first, &second, &first];
    let whole = join(&s, &chunks);
    splice(&s, &whole.digest, &chunks).await.wanted("a splice with a chunk twice is accepted")?;
    let read = s.read(&whole.digest).await.wanted("it is read")?;
    ensure(read == whole.data, "the chunks in the order given", "other bytes")
}

async fn a_spliced_blob_is_a_blob_like_others(s: Session) -> Verdict {
    let (first, second, whole) = parts(&s).await?;
    let answer = splice(&s, &whole.digest, &[&first, &second]).await.wanted("the splice is accepted")?;
    equal("blob_digest of the response", &answer, &Some(whole.digest.clone()))?;
    let asked = std::slice::from_ref(&whole.digest);
    let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("missing_blob_digests", &missing, &Vec::new())?;
    let read = s.read(&whole.digest).await.wanted("it is read")?;
    ensure(read == whole.data, "its bytes", "others")?;
    let answer = s.batch_read(asked, &[]).await.wanted("BatchReadBlobs answers")?;
    let response = only("a spliced blob", answer.responses)?;
    inline("a spliced blob", response.status.as_ref(), &[Code::Ok])?;
    ensure(response.data == whole.data, "its bytes", "others")?;
    if s.updates_results().is_ok() {
        let action = s.fresh_action().await?;
        let file = OutputFile { path: "out".into(), digest: Some(whole.digest), ..Default::default() };
        let result = ActionResult { output_files: vec![file], ..Default::default() };
        s.update_result(&action, result).await.needs("AC-08", "a result with it is stored")?;
        s.result(&action).await.wanted("a result with it is complete")?;
    }
    Ok(())
}

async fn splicing_again_is_ok(s: Session) -> Verdict {
    let (first, second, whole) = parts(&s).await?;
    for what in ["the splice is accepted", "the same splice is accepted again"] {
        splice(&s, &whole.digest, &[&first, &second]).await.wanted(what)?;
    }
    let uploaded = s.stored(100).await?;
    splice(&s, &uploaded.digest, &[&uploaded]).await.wanted("a splice of what was uploaded is accepted")?;
    Ok(())
}
