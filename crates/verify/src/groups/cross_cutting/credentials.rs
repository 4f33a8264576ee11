//! GEN-23: callers without a valid credential.

use crate::{
    check::{Answer as _, Check, Verdict, skipped},
    checks,
    session::Session,
};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    a_request_with_a_wrong_credential_or_none_is_unauthenticated => "GEN-23";
];

async fn a_request_with_a_wrong_credential_or_none_is_unauthenticated(s: Session) -> Verdict {
    let asked = [s.unknown()];
    let without = s.stranger(HeaderMap::new()).await?.missing(&asked).await;
    let mut headers = HeaderMap::new();
    let wrong = HeaderValue::from_str(&format!("Bearer {}", s.word()));
    headers.insert(AUTHORIZATION, wrong.map_err(|_| skipped("no header can be made"))?);
    let wrong = s.stranger(headers).await?.missing(&asked).await;
    // Clients without a credential may have permissions, but a wrong credential must not give them.
    if without.is_ok() && wrong.is_ok() {
        return Err(skipped("needs a server that asks for credentials"));
    }
    if without.is_err() {
        without.refused("FindMissingBlobs without a credential", &[Code::Unauthenticated])?;
    }
    wrong.refused("FindMissingBlobs with a wrong credential", &[Code::Unauthenticated])?;
    Ok(())
}
