//! Handles PUT. Everything is checked before it becomes visible.

use super::{
    Target,
    body::{UploadBody, UploadLimit},
    read::{VALUE_PATH, like, value_action},
    resource::HashInPath,
};
use crate::{call::Call, http::status};
use axum::{extract::Request, http::StatusCode, response::Response};
use gorego_reapi::{
    error::{Error, Result},
    proto::reapi,
};

/// Size limit of an ActionResult message, as over gRPC.
const RESULT_LIMIT: UploadLimit = UploadLimit { bytes: 16 * 1024 * 1024, of: "an ActionResult" };
/// Largest memory of a decoded ActionResult, as over gRPC.
const RESULT_MAX_MEMORY: u64 = 64 * 1024 * 1024;

/// Stores a blob after checking its hash.
pub(super) async fn blob(
    (cache, instance): Target<'_>,
    hash: HashInPath,
    request: Request,
    call: &Call,
) -> Result<Response> {
    let like = like(instance, hash)?;
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    let upload = UploadBody::new(request, call, UploadLimit::of_blob(cache.max_blob_bytes), cas.decoders())?;
    let mut blob = cas.new_blob(instance, like.function());
    upload.fill(&mut blob, call).await?;
    call.note_blob(blob.finish_checked(like).await?);
    Ok(created())
}

/// Stores an action result after the same checks as over gRPC (AC-10).
pub(super) async fn result(
    (cache, instance): Target<'_>,
    hash: HashInPath,
    request: Request,
    call: &Call,
) -> Result<Response> {
    let like = like(instance, hash)?;
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    let mut held = cas.hold(call.caller(), 0)?;
    let of_blob = UploadLimit::of_blob(cache.max_blob_bytes);
    let limit = if of_blob.bytes < RESULT_LIMIT.bytes { of_blob } else { RESULT_LIMIT };
    let upload = UploadBody::new(request, call, limit, cas.decoders())?;
    let bytes = upload.collect(call, |bytes| Ok(held.grow(bytes)?)).await?;
    let decoded = cas.decode(bytes.into(), RESULT_MAX_MEMORY, "ActionResult").await;
    let (result, _room): (reapi::ActionResult, _) = decoded.map_err(|error| {
        Error::Invalid(format!("this is not an ActionResult ({error}); store other formats under /cache/"))
    })?;
    // The stored Action provides the size, so that gRPC clients find the result too.
    let action = match cas.blob_by_hash(instance, like)? {
        Some(action) => action,
        None => cas.action_by_hash(instance, like)?.unwrap_or(like),
    };
    cas.put_result(instance, action, result, call.provenance()).await?;
    Ok(created())
}

/// Stores a value under a key and replaces the previous one.
pub(super) async fn value(
    (cache, instance): Target<'_>,
    key: &str,
    request: Request,
    call: &Call,
) -> Result<Response> {
    let action = value_action(instance, key)?;
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    let upload = UploadBody::new(request, call, UploadLimit::of_blob(cache.max_blob_bytes), cas.decoders())?;
    let mut blob = cas.new_blob(instance, action.function());
    upload.fill(&mut blob, call).await?;
    let digest = blob.finish().await?;
    call.note_blob(digest);
    let file =
        reapi::OutputFile { path: VALUE_PATH.into(), digest: Some(digest.to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    cas.put_value(instance, action, result, call.provenance()).await?;
    Ok(created())
}

/// The response after a successful write.
pub(super) fn created() -> Response {
    status::plain(StatusCode::CREATED, "stored")
}
