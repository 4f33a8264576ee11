//! Wire to domain and back: digests of a request, who asks, names of operations, and the Operation message.
//!
//! The only code that knows both sides. It reads nothing and waits for nothing.

use super::status;
use crate::{
    actors::{
        scheduler::operation::{ClientInfo, OperationId, OperationInfo, Snapshot, Stage},
        worker::messages::RunStage,
    },
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    instance::{Instance, Instances},
    proto::{longrunning, reapi},
};
use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::HeaderMap;
use prost::Message;
use std::time::SystemTime;

/// Every `Any` names its type under this authority; one client compares the whole string (GEN-18).
const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// Packs a message of the given full name.
pub fn pack(full_name: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any { type_url: format!("{TYPE_URL_PREFIX}{full_name}"), value: message.encode_to_vec() }
}

/// The digest function of a request: the number it sent, else what the first hash of a familiar length says, else SHA-256
/// (GEN-08). Hashes of another length are for [`Digest::from_wire`] to refuse, one by one or all together (GEN-10).
///
/// # Errors
/// [`Error::Invalid`] for a number that this server does not support (GEN-09).
pub fn digest_function<'a>(
    number: i32,
    digests: impl IntoIterator<Item = Option<&'a reapi::Digest>>,
) -> Result<DigestFunction> {
    if number == 0 {
        let lengths = digests.into_iter().flatten().map(|digest| digest.hash.len());
        for length in lengths {
            if let Ok(function) = DigestFunction::from_wire(0, Some(length)) {
                return Ok(function);
            }
        }
    }
    DigestFunction::from_wire(number, None)
}

/// The one digest that a request is about.
///
/// # Errors
/// [`Error::Invalid`] when it is absent or malformed, or its function is not supported (GEN-01..05, GEN-09).
pub fn digest(number: i32, digest: Option<&reapi::Digest>, field: &str) -> Result<Digest> {
    Digest::from_wire(digest_function(number, [digest])?, digest, field)
}

/// All digests of a request that fails as a whole when one of them is malformed (CAS-06).
///
/// # Errors
/// [`Error::Invalid`] naming the field.
pub fn digests(number: i32, digests: &[reapi::Digest], field: &str) -> Result<Vec<Digest>> {
    let function = digest_function(number, digests.iter().map(Some))?;
    digests.iter().map(|digest| Digest::from_wire(function, Some(digest), field)).collect()
}

/// Headers that carry RequestMetadata: today's, and the one that some clients still use.
const METADATA_HEADERS: [&str; 2] = [
    "build.bazel.remote.execution.v2.requestmetadata-bin",
    "google.devtools.remoteexecution.v1test.requestmetadata-bin",
];

/// How much of each text a client says about itself is kept, in bytes; operations and log lines hold on to it.
const CLIENT_TEXT_MAX_BYTES: usize = 512;

/// Who asks, as far as the headers say. Anything that does not decode counts as not said (GEN-28).
pub fn client_info(headers: &HeaderMap) -> ClientInfo {
    /// Clients differ in padding, and none of them should fail for it.
    const BASE64: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    let decode = |name: &&str| {
        // Repeated binary headers may arrive joined by commas; the first one counts.
        let value = headers.get(*name)?.as_bytes().split(|byte| *byte == b',').next()?;
        reapi::RequestMetadata::decode(BASE64.decode(value.trim_ascii()).ok()?.as_slice()).ok()
    };
    let Some(metadata) = METADATA_HEADERS.iter().find_map(decode) else { return ClientInfo::default() };
    let text = |text: String| status::shorten(text, CLIENT_TEXT_MAX_BYTES);
    ClientInfo {
        tool_invocation_id: text(metadata.tool_invocation_id),
        target_id: text(metadata.target_id),
        action_mnemonic: text(metadata.action_mnemonic),
    }
}

/// Takes `[instance/]operations/{id}` apart.
///
/// # Errors
/// [`Error::NotFound`] for every name that cannot be one of ours: clients run the action again only on that (EXE-13).
pub fn operation_name(instances: &Instances, name: &str) -> Result<(Instance, OperationId)> {
    let unknown = || {
        Error::NotFound(format!(
            "there is no operation \"{}\"; names have the form [instance/]operations/{{id}}",
            status::shorten(name.escape_debug().to_string(), CLIENT_TEXT_MAX_BYTES)
        ))
    };
    let (collection, id) = name.rsplit_once('/').ok_or_else(unknown)?;
    let instance = match collection.strip_suffix("operations") {
        Some("") => "",
        Some(prefix) => prefix.strip_suffix('/').ok_or_else(unknown)?,
        None => return Err(unknown()),
    };
    let id = id.parse().map_err(|_| unknown())?;
    Ok((instances.get(instance).map_err(|_| unknown())?, id))
}

/// The Operation message of a snapshot. `result` is the outcome's result made ready for this client (inlined contents); it
/// is ignored while there is no outcome.
pub fn operation(
    info: &OperationInfo,
    snapshot: &Snapshot,
    result: Option<reapi::ActionResult>,
) -> longrunning::Operation {
    let response = snapshot.outcome.as_ref().map(|outcome| {
        let result = result.map(|mut result| {
            // One client refuses a result without it (EXE-60).
            result.execution_metadata.get_or_insert_default();
            result
        });
        let status = match &outcome.error {
            Some(error) => status::inline(error),
            None if result.is_some() => status::inline_ok(),
            None => {
                status::inline(&Error::internal("the action ended without a result and without an error"))
            }
        };
        let response = reapi::ExecuteResponse {
            result,
            cached_result: outcome.cached,
            status: Some(status),
            server_logs: Default::default(),
            message: outcome.message.clone(),
        };
        pack("build.bazel.remote.execution.v2.ExecuteResponse", &response)
    });
    longrunning::Operation {
        name: info.name(),
        metadata: Some(pack(
            "build.bazel.remote.execution.v2.ExecuteOperationMetadata",
            &operation_metadata(info, snapshot),
        )),
        done: response.is_some(),
        result: response.map(longrunning::operation::Result::Response),
    }
}

fn operation_metadata(info: &OperationInfo, snapshot: &Snapshot) -> reapi::ExecuteOperationMetadata {
    let stage = match snapshot.stage {
        // The pair of stage and `done` must never disagree (EXE-05), so the outcome decides.
        _ if snapshot.outcome.is_some() => reapi::execution_stage::Value::Completed,
        Stage::Queued => reapi::execution_stage::Value::Queued,
        Stage::Executing | Stage::Completed => reapi::execution_stage::Value::Executing,
    };
    reapi::ExecuteOperationMetadata {
        stage: stage.into(),
        action_digest: Some(info.action.to_wire()),
        digest_function: info.action.function().wire().into(),
        partial_execution_metadata: Some(execution_metadata(snapshot)),
        ..Default::default()
    }
}

/// What is known about the run by now; the whole of it once there is a result.
fn execution_metadata(snapshot: &Snapshot) -> reapi::ExecutedActionMetadata {
    let result = snapshot.outcome.as_ref().and_then(|outcome| outcome.result.as_ref());
    if let Some(metadata) = result.and_then(|result| result.execution_metadata.as_ref()) {
        return metadata.clone();
    }
    let mut metadata = reapi::ExecutedActionMetadata {
        queued_timestamp: Some(timestamp(snapshot.queued_at)),
        ..Default::default()
    };
    if let Some((stage, since)) = snapshot.run_stage {
        let since = Some(timestamp(since));
        match stage {
            RunStage::Fetching => metadata.input_fetch_start_timestamp = since,
            RunStage::Running => metadata.execution_start_timestamp = since,
            RunStage::Uploading => metadata.output_upload_start_timestamp = since,
        }
    }
    metadata
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    time.into()
}
