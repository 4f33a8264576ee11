//! Handles PUT. Everything is checked before it becomes visible.

use super::{
    Target,
    body::UploadBody,
    read::{VALUE_PATH, like, value_action},
    resource::HashInPath,
};
use crate::{
    actors::cas::client::Provenance,
    http::{request_log::RequestLog, status},
    instance::Instance,
};
use axum::{extract::Request, http::StatusCode, response::Response};
use gorego_reapi::{
    error::{Error, Result},
    proto::reapi,
};

/// Largest ActionResult message, as over gRPC.
const MAX_RESULT_BYTES: u64 = 16 * 1024 * 1024;
/// Largest memory of a decoded ActionResult, as over gRPC.
const RESULT_MAX_MEMORY: u64 = 64 * 1024 * 1024;

/// Stores a blob after checking its hash.
pub(super) async fn blob(
    (cache, instance): Target<'_>,
    hash: HashInPath,
    request: Request,
    line: &mut RequestLog,
) -> Result<Response> {
    let like = like(instance, hash)?;
    let cas = cache.cas.on_behalf_of(line.caller());
    let upload = UploadBody::new(request, cache.max_blob_bytes, cas.decoders())?;
    let mut blob = cas.new_blob(instance, like.function());
    upload.fill(&mut blob, line).await?;
    line.blob(blob.finish_checked(like).await?);
    Ok(created())
}

/// Stores an action result after the same checks as over gRPC (AC-10).
pub(super) async fn result(
    (cache, instance): Target<'_>,
    hash: HashInPath,
    request: Request,
    line: &mut RequestLog,
) -> Result<Response> {
    let like = like(instance, hash)?;
    check_writable(instance)?;
    let (caller, cas) = (line.caller(), cache.cas.on_behalf_of(line.caller()));
    let mut held = cas.hold(caller, 0)?;
    let upload = UploadBody::new(request, MAX_RESULT_BYTES.min(cache.max_blob_bytes), cas.decoders())?;
    let bytes = upload.collect(line, |bytes| Ok(held.grow(bytes)?)).await?;
    let decoded = cas.decode(bytes.into(), RESULT_MAX_MEMORY, "ActionResult").await;
    let (result, _room): (reapi::ActionResult, _) = decoded.map_err(|error| {
        Error::Invalid(format!("this is not an ActionResult ({error}); store other formats under /cache/"))
    })?;
    // The stored Action provides the size, so that gRPC clients find the result too.
    let action = match cas.blob_by_hash(instance, like)? {
        Some(action) => action,
        None => cas.action_by_hash(instance, like)?.unwrap_or(like),
    };
    cas.put_result(instance, action, result, provenance(line)).await?;
    Ok(created())
}

/// Stores a value under a key and replaces the previous one.
pub(super) async fn value(
    (cache, instance): Target<'_>,
    key: &str,
    request: Request,
    line: &mut RequestLog,
) -> Result<Response> {
    let action = value_action(instance, key)?;
    check_writable(instance)?;
    let cas = cache.cas.on_behalf_of(line.caller());
    let upload = UploadBody::new(request, cache.max_blob_bytes, cas.decoders())?;
    let mut blob = cas.new_blob(instance, action.function());
    upload.fill(&mut blob, line).await?;
    let digest = blob.finish().await?;
    line.blob(digest);
    let file =
        reapi::OutputFile { path: VALUE_PATH.into(), digest: Some(digest.to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    cas.put_result(instance, action, result, provenance(line)).await?;
    Ok(created())
}

/// Refuses instances whose clients may not write results.
pub(super) fn check_writable(instance: &Instance) -> Result<()> {
    if instance.policy().action_cache_updates {
        return Ok(());
    }
    Err(Error::Denied("clients may not write results to this instance (action_cache_updates = false)".into()))
}

fn provenance(line: &RequestLog) -> Provenance {
    Provenance { peer: line.peer().to_string(), ..Provenance::default() }
}

/// The response after a successful write.
pub(super) fn created() -> Response {
    status::plain(StatusCode::CREATED, "stored")
}
