//! BS: resource names, Read, Write, QueryWriteStatus.

use super::Beyond;
use crate::{
    checks,
    verify::{
        check::{Answer as _, Check, Verdict, ensure, equal},
        session::Session,
    },
};

/// What this file checks.
pub const CHECKS: &[Check] = checks![
    a_completed_upload_answers_its_size_and_reads_back => "BS-23", "BS-07";
];

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[];

async fn a_completed_upload_answers_its_size_and_reads_back(s: Session) -> Verdict {
    let blob = s.blob(200_000);
    let committed = s.write(&blob).await.wanted("the upload is accepted")?;
    equal("committed_size", &committed, &blob.digest.size_bytes)?;
    let read = s.read(&blob.digest).await.wanted("the blob is read")?;
    ensure(read == blob.data, "the bytes that were written", format!("{} other bytes", read.len()))
}
