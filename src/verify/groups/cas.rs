//! CAS: FindMissingBlobs, the batch calls, GetTree, SplitBlob and SpliceBlob.

use super::Beyond;
use crate::{
    checks,
    verify::{
        check::{Answer as _, Check, Verdict, equal},
        session::Session,
    },
};

/// What this file checks.
pub const CHECKS: &[Check] = checks![
    exactly_the_absent_blobs_are_missing => "CAS-01";
];

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[];

async fn exactly_the_absent_blobs_are_missing(s: Session) -> Verdict {
    let stored = [s.blob(100), s.blob(101), s.blob(102)];
    s.store(&stored.each_ref()).await?;
    let absent = [s.unknown(), s.unknown(), s.unknown()];
    let mut asked: Vec<_> = stored.iter().map(|blob| blob.digest.clone()).collect();
    asked.splice(1..1, absent.clone());
    let mut missing = s.missing(&asked).await.wanted("FindMissingBlobs answers")?;
    missing.sort_by(|a, b| a.hash.cmp(&b.hash));
    let mut absent = absent.to_vec();
    absent.sort_by(|a, b| a.hash.cmp(&b.hash));
    equal("missing_blob_digests", &missing, &absent)
}
