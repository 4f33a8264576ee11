//! CAS-01 to CAS-07: FindMissingBlobs.

use crate::{
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, inline},
    checks,
    session::Session,
    store::partial_upload,
};
use gorego_reapi::proto::reapi::Digest;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    exactly_the_absent_blobs_are_missing => "CAS-01";
    nothing_asked_is_nothing_missing => "CAS-02";
    a_digest_asked_five_times_is_missing_once => "CAS-02";
    what_is_not_missing_is_read_at_once_over_another_connection => "CAS-03", "CAS-13";
    a_blob_in_upload_is_missing => "CAS-05", "BS-21";
    one_malformed_digest_fails_the_call => "CAS-06";
    fifteen_thousand_digests_are_answered_in_one_call => "CAS-07";
];

/// The number of digests that CAS-07 requires: about 1 MiB of SHA-256 digests.
const MANY: usize = 15_000;

/// Sorts the digests, because servers may answer in any order.
fn sorted(mut digests: Vec<Digest>) -> Vec<Digest> {
    digests.sort_by(|a, b| (&a.hash, a.size_bytes).cmp(&(&b.hash, b.size_bytes)));
    digests
}

async fn exactly_the_absent_blobs_are_missing(s: Session) -> Verdict {
    let stored = [s.blob(100), s.blob(101), s.blob(102)];
    s.store(&stored.each_ref()).await?;
    let absent = [s.unknown(), s.unknown(), s.unknown()];
    let mut asked: Vec<_> = stored.iter().map(|blob| blob.digest.clone()).collect();
    asked.splice(1..1, absent.clone());
    let missing = s.missing(&asked).await.wanted("FindMissingBlobs answers")?;
    equal("missing_blob_digests", &sorted(missing), &sorted(absent.to_vec()))
}

async fn nothing_asked_is_nothing_missing(s: Session) -> Verdict {
    let missing = s.missing(&[]).await.wanted("FindMissingBlobs of no digests answers")?;
    equal("missing_blob_digests", &missing, &Vec::new())?;
    let one = s.unknown();
    let missing = s.missing(std::slice::from_ref(&one)).await.wanted("FindMissingBlobs of one answers")?;
    equal("missing_blob_digests", &missing, &vec![one])
}

async fn a_digest_asked_five_times_is_missing_once(s: Session) -> Verdict {
    let absent = s.unknown();
    let missing = s.missing(&vec![absent.clone(); 5]).await.wanted("FindMissingBlobs answers")?;
    equal("missing_blob_digests", &missing, &vec![absent])
}

async fn what_is_not_missing_is_read_at_once_over_another_connection(s: Session) -> Verdict {
    let other = s.reconnect().await?;
    for round in 0..25 {
        s.case(format!("round {round} of 25"), async {
            let (batched, streamed) = (s.blob(200), s.blob(200));
            s.store(&[&batched]).await?;
            s.write(&streamed).await.needs("BS-23", "the upload is accepted")?;
            let asked = [batched.digest.clone(), streamed.digest.clone()];
            let missing = other.missing(&asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
            equal("missing_blob_digests", &missing, &Vec::new())?;
            let read = other.read(&batched.digest).await.wanted("what is not missing is read")?;
            ensure(read == batched.data, "its bytes", "others")?;
            let batch = other.batch_read(&asked, &[]).await.wanted("BatchReadBlobs answers")?;
            equal("responses", &batch.responses.len(), &2)?;
            for (at, response) in batch.responses.iter().enumerate() {
                inline(
                    &format!("response {at}, of what is not missing"),
                    response.status.as_ref(),
                    &[Code::Ok],
                )?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_blob_in_upload_is_missing(s: Session) -> Verdict {
    let (blob, control) = (s.blob(100_000), s.stored(100).await?);
    let name = s.write_name(&blob);
    let messages = partial_upload(&name, &blob.data, 50_000);
    let other = s.reconnect().await.control()?;
    let upload = s.open_upload(messages);
    other.upload_reaches(&name, 50_000).await;
    let asked = [blob.digest.clone(), control.digest];
    let missing = other.missing(&asked).await;
    let read = other.read(&blob.digest).await;
    upload.abort();
    let missing = missing.wanted("FindMissingBlobs answers beside the upload")?;
    equal("missing_blob_digests", &missing, &vec![blob.digest])?;
    read.refused("Read of a blob in upload", &[Code::NotFound])?;
    Ok(())
}

async fn one_malformed_digest_fails_the_call(s: Session) -> Verdict {
    let mut asked: Vec<Digest> = (0..10).map(|_| s.unknown()).collect();
    let missing = s.missing(&asked).await.needs("CAS-01", "FindMissingBlobs of ten good digests answers")?;
    equal("missing", &missing.len(), &10)?;
    if let Some(digest) = asked.get_mut(6) {
        digest.hash.pop();
    }
    s.missing(&asked).await.refused("nine good digests and a short one", &[Code::InvalidArgument])?;
    Ok(())
}

async fn fifteen_thousand_digests_are_answered_in_one_call(s: Session) -> Verdict {
    // The hashes are invented, because hashing so many blobs would not test more.
    let length = s.unknown().hash.len();
    let made_up = |at: usize| {
        let hash = s.word().bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let hash: String = format!("{at:08x}{hash}").chars().cycle().take(length).collect();
        Digest { hash, size_bytes: 100 }
    };
    let absent: Vec<Digest> = (0..MANY).map(made_up).collect();
    let missing = s.missing(&absent).await.wanted(&format!("FindMissingBlobs of {MANY} digests answers"))?;
    ensure(sorted(missing) == sorted(absent), format!("all {MANY} are missing"), "another answer")
}
