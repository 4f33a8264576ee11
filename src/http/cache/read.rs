//! Handles GET and HEAD.

use super::{
    Target,
    body::{accepts_zstd, of_blob, of_message, of_zstd},
    range::{self, Asked},
    resource::HashInPath,
};
use crate::{actors::cas::client::Cas, call::Call, http::status, instance::Instance};
use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use prost::Message as _;

/// Smaller bodies are not compressed, because they fit into one packet anyway.
const COMPRESS_FROM_BYTES: u64 = 1_024;

/// Responds with a blob or a range of it.
pub(super) async fn blob(
    (cache, instance): Target<'_>,
    hash: HashInPath,
    headers: &HeaderMap,
    call: &Call,
) -> Result<Response> {
    let like = like(instance, hash)?;
    let absent = || Error::NotFound(format!("no blob with hash {} is in the CAS", like.hash_hex()));
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    let digest = cas.blob_by_hash(instance, like)?.ok_or_else(absent)?;
    stored((&cas, instance), digest, headers, call).await
}

/// Responds with the value of a key or a range of it.
pub(super) async fn value(
    (cache, instance): Target<'_>,
    key: &str,
    headers: &HeaderMap,
    call: &Call,
) -> Result<Response> {
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    let digest = value_digest((&cas, instance), key, call).await?;
    stored((&cas, instance), digest, headers, call).await
}

/// Responds with a complete action result (AC-03).
pub(super) async fn result((cache, instance): Target<'_>, hash: HashInPath, call: &Call) -> Result<Response> {
    let like = like(instance, hash)?;
    let absent = || Error::NotFound(format!("the action with hash {} has no result", like.hash_hex()));
    let cas = cache.cas.on_behalf_of(call.caller()).for_build(call.build());
    // A result that only this principal sees is found by the hash alone.
    let action = cas.action_by_hash(instance, like)?.unwrap_or(like);
    let found = cas.get_result_for(instance, action, call.principal().name()).await?;
    call.note_cached(found.is_some());
    let result = found.ok_or_else(absent)?;
    let mut response = Response::new(of_message(&*result, call).await?);
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response.headers_mut().insert(header::CONTENT_LENGTH, result.encoded_len().into());
    Ok(response)
}

/// Checks that the digest function of a hash is enabled for this instance.
pub(super) fn like(instance: &Instance, hash: HashInPath) -> Result<Digest> {
    instance.digest_in_name(hash.like, hash.function_is_named)
}

/// The digest under which the binding of a key is stored in the action cache.
pub(super) fn value_action(instance: &Instance, key: &str) -> Result<Digest> {
    Ok(instance.digest_function(0, [])?.digest(format!("goREgo value\0{key}").as_bytes()))
}

/// The output path that contains the value in such a result.
pub(super) const VALUE_PATH: &str = "value";

/// Looks up the value of a key.
pub(super) async fn value_digest(
    (cas, instance): (&Cas, &Instance),
    key: &str,
    call: &Call,
) -> Result<Digest> {
    let absent = || Error::NotFound(format!("key \"{}\" has no value", key.escape_debug()));
    let action = value_action(instance, key)?;
    let principal = call.principal();
    let result = cas.get_result_for(instance, action, principal.name()).await?.ok_or_else(absent)?;
    let named = |file: &&reapi::OutputFile| file.path == VALUE_PATH;
    let file = result.output_files.iter().find(named).ok_or_else(absent)?;
    Digest::from_wire(action.function(), file.digest.as_ref(), VALUE_PATH)
}

/// Responds with a stored blob.
async fn stored(
    (cas, instance): (&Cas, &Instance),
    digest: Digest,
    headers: &HeaderMap,
    call: &Call,
) -> Result<Response> {
    call.note_blob(digest);
    let size = digest.size();
    // Responses have no validators, so If-Range never matches and the range is ignored.
    let range = headers.get(header::RANGE).filter(|_| !headers.contains_key(header::IF_RANGE));
    let asked = range::parse(range.and_then(|range| range.to_str().ok()), size);
    // Ranges refer to the uncompressed bytes, so they are sent uncompressed.
    let compressed = asked == Asked::Whole && size >= COMPRESS_FROM_BYTES && accepts_zstd(headers);
    let (code, body, length, content_range) = match asked {
        Asked::Whole if compressed => {
            (StatusCode::OK, of_zstd(cas.open_zstd(instance, digest, 0).await?, call.clone()), None, None)
        }
        Asked::Whole => (
            StatusCode::OK,
            of_blob(cas.open(instance, digest).await?, 0..size, call.clone()),
            Some(size),
            None,
        ),
        Asked::Part(part) => {
            let shown = format!("bytes {}-{}/{size}", part.start, part.end.saturating_sub(1));
            let length = part.end.saturating_sub(part.start);
            let body = of_blob(cas.open(instance, digest).await?, part, call.clone());
            (StatusCode::PARTIAL_CONTENT, body, Some(length), Some(shown))
        }
        Asked::Unsatisfiable => {
            let mut response = status::plain(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "the range is beyond the end of the content",
            );
            response.headers_mut().insert(header::CONTENT_RANGE, text(&format!("bytes */{size}"))?);
            return Ok(response);
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    fields.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if compressed {
        fields.insert(header::CONTENT_ENCODING, HeaderValue::from_static("zstd"));
    }
    if let Some(length) = length {
        fields.insert(header::CONTENT_LENGTH, length.into());
    }
    if let Some(range) = content_range {
        fields.insert(header::CONTENT_RANGE, text(&range)?);
    }
    Ok(response)
}

fn text(value: &str) -> Result<HeaderValue> {
    HeaderValue::from_str(value).map_err(Error::internal)
}
