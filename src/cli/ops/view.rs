//! Describes an operation in words and as JSON. `docs/administration.md` documents the JSON.

use super::super::table::short_duration;
use gorego_client::{OperationState, Stage};
use gorego_reapi::duration::time_from_wire;
use prost_types::Timestamp;
use serde_json::{Map, Value, json};
use std::time::SystemTime;

/// The state in one word.
pub(super) fn state(operation: &OperationState) -> &'static str {
    match operation.stage {
        _ if operation.finished.is_some() => "completed",
        Stage::Executing => match step(operation) {
            Some(step) => step,
            None => "executing",
        },
        Stage::Completed => "completed",
        Stage::CacheCheck | Stage::Queued | Stage::Unknown => "queued",
    }
}

/// What the worker is doing.
fn step(operation: &OperationState) -> Option<&'static str> {
    let metadata = &operation.metadata;
    if metadata.output_upload_start_timestamp.is_some() {
        Some("uploading")
    } else if metadata.execution_start_timestamp.is_some() {
        Some("running")
    } else {
        metadata.input_fetch_start_timestamp.as_ref().map(|_| "fetching")
    }
}

/// The time since the submission or, if it has ended, from the submission to the end. `None` if it has ended without a
/// run, because only the end of a run is on record.
pub(super) fn age(operation: &OperationState, now: SystemTime) -> Option<std::time::Duration> {
    let queued = time(operation.metadata.queued_timestamp.as_ref())?;
    let end = match operation.finished {
        Some(_) => time(operation.metadata.worker_completed_timestamp.as_ref())?,
        None => now,
    };
    end.duration_since(queued).ok()
}

fn time(timestamp: Option<&Timestamp>) -> Option<SystemTime> {
    timestamp.and_then(time_from_wire)
}

/// A time as RFC 3339.
pub(in crate::cli) fn rfc3339(timestamp: Option<&Timestamp>) -> Option<String> {
    time(timestamp).map(|time| humantime::format_rfc3339_millis(time).to_string())
}

/// The pool that runs it or ran it; while it waits, the pool that will probably run it.
pub(super) fn pool(operation: &OperationState) -> &str {
    match &operation.queue {
        Some(queue) if operation.request.pool.is_empty() => &queue.pool,
        _ => &operation.request.pool,
    }
}

/// The digest of the action as `hash/size`; empty if it is not known.
pub(super) fn action(operation: &OperationState) -> String {
    operation
        .action
        .as_ref()
        .map(|digest| format!("{}/{}", digest.hash, digest.size_bytes))
        .unwrap_or_default()
}

/// A short description of its end; empty if it has not ended.
pub(super) fn end(operation: &OperationState) -> String {
    let Some(finished) = &operation.finished else { return String::new() };
    match (&finished.error, &finished.result) {
        (Some(error), _) => format!("{}: {error}", error.code_name()),
        (None, Some(result)) => {
            let cached = if finished.cached { " (cached)" } else { "" };
            format!("exit code {}{cached}", result.exit_code)
        }
        (None, None) => "no result".into(),
    }
}

/// Whether it has ended without an error and with exit code 0.
pub(super) fn succeeded(operation: &OperationState) -> bool {
    operation.finished.as_ref().is_some_and(|finished| {
        finished.error.is_none() && finished.result.as_ref().is_some_and(|result| result.exit_code == 0)
    })
}

/// The known values with their labels, in a useful order for people.
pub(super) fn lines(operation: &OperationState, now: SystemTime) -> Vec<(&'static str, String)> {
    let (metadata, request) = (&operation.metadata, &operation.request);
    let at = |timestamp: &Option<Timestamp>| rfc3339(timestamp.as_ref()).unwrap_or_default();
    let queue = operation.queue.as_ref().map(|queue| queue.reason.clone()).unwrap_or_default();
    let lines = [
        ("operation", operation.name.clone()),
        ("state", state(operation).to_owned()),
        ("end", end(operation)),
        ("message", operation.finished.as_ref().map(|end| end.message.clone()).unwrap_or_default()),
        ("age", age(operation, now).map(short_duration).unwrap_or_default()),
        ("waits", queue),
        ("action", action(operation)),
        ("mnemonic", request.action_mnemonic.clone()),
        ("target", request.target_id.clone()),
        ("build", request.tool_invocation_id.clone()),
        ("principal", request.principal.clone()),
        ("peer", request.peer.clone()),
        ("pool", pool(operation).to_owned()),
        ("worker", metadata.worker.clone()),
        ("queued at", at(&metadata.queued_timestamp)),
        ("inputs from", at(&metadata.input_fetch_start_timestamp)),
        ("running from", at(&metadata.execution_start_timestamp)),
        ("outputs from", at(&metadata.output_upload_start_timestamp)),
        ("ended at", at(&metadata.worker_completed_timestamp)),
        ("stdout", operation.logs.stdout.clone()),
        ("stderr", operation.logs.stderr.clone()),
    ];
    lines.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

/// The operation as JSON. Unknown values are absent.
pub(super) fn json(operation: &OperationState, now: SystemTime) -> Value {
    let (metadata, request) = (&operation.metadata, &operation.request);
    let mut object = Map::new();
    let mut add = |key: &str, value: Value| {
        let is_unknown = value.is_null() || value.as_str() == Some("");
        if !is_unknown {
            object.insert(key.to_owned(), value);
        }
    };
    add("name", json!(operation.name));
    add("state", json!(state(operation)));
    add("age_seconds", json!(age(operation, now).map(|age| age.as_secs())));
    add("action_digest", json!(action(operation)));
    add("action_mnemonic", json!(request.action_mnemonic));
    add("target_id", json!(request.target_id));
    add("invocation_id", json!(request.tool_invocation_id));
    add("principal", json!(request.principal));
    add("peer", json!(request.peer));
    add("pool", json!(pool(operation)));
    add("worker", json!(metadata.worker));
    for (key, timestamp) in [
        ("queued_at", &metadata.queued_timestamp),
        ("fetch_started_at", &metadata.input_fetch_start_timestamp),
        ("run_started_at", &metadata.execution_start_timestamp),
        ("upload_started_at", &metadata.output_upload_start_timestamp),
        ("ended_at", &metadata.worker_completed_timestamp),
    ] {
        add(key, json!(rfc3339(timestamp.as_ref())));
    }
    add("stdout_stream", json!(operation.logs.stdout));
    add("stderr_stream", json!(operation.logs.stderr));
    if let Some(queue) = &operation.queue {
        add(
            "queue",
            json!({
                "pool": queue.pool,
                "position": queue.position,
                "waiting": queue.waiting,
                "busy_slots": queue.busy_slots,
                "slots": queue.slots,
                "reason": queue.reason,
            }),
        );
    }
    if let Some(finished) = &operation.finished {
        add("cached", json!(finished.cached));
        add("exit_code", json!(finished.result.as_ref().map(|result| result.exit_code)));
        add("message", json!(finished.message));
        add("error_code", json!(finished.error.as_ref().map(|error| error.code_name())));
        add("error", json!(finished.error.as_ref().map(ToString::to_string)));
    }
    Value::Object(object)
}
