//! GEN: digests and instances, errors, transport.

use super::Beyond;
use crate::{
    checks,
    proto::reapi::Digest,
    verify::{
        check::{Answer as _, Check, Verdict, equal},
        session::Session,
    },
};
use tonic::Code;

/// What this file checks.
pub const CHECKS: &[Check] = checks![
    an_upper_case_hash_is_refused => "GEN-01";
];

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[];

async fn an_upper_case_hash_is_refused(s: Session) -> Verdict {
    let good = s.unknown();
    let answer = s.missing(std::slice::from_ref(&good)).await.wanted("FindMissingBlobs answers")?;
    equal("missing", &answer, &vec![good.clone()])?;
    let folded = Digest { hash: good.hash.to_uppercase(), ..good };
    s.missing(&[folded]).await.refused("an upper-case hash", &[Code::InvalidArgument])?;
    Ok(())
}
