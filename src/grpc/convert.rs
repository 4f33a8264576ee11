//! Conversion between wire and domain types: digests, client metadata, names of operations, and the Operation message.
//!
//! No other code converts them. Nothing here does IO.

use crate::{
    actors::{
        scheduler::operation::{
            ClientInfo, OperationId, OperationInfo, QueueStatus, ServerLog, Snapshot, Stage,
        },
        worker::messages::RunStage,
    },
    instance::Instance,
    log_streams::{
        name::{LogName, StreamId},
        run::LogKind,
    },
};
use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use gorego_reapi::{
    any::pack,
    auxiliary::{pack_queue_status, pack_request},
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    escape::shown,
    find_missing::UnresolvedDigests,
    proto::{gorego, longrunning, reapi},
    resource_name::MAX_RESOURCE_NAME_BYTES,
    status,
};
use http::HeaderMap;
use prost::Message;
use std::time::SystemTime;

/// The digest function of a request: [`Instance::digest_function`] of its digests.
///
/// # Errors
/// The errors of [`Instance::digest_function`].
pub fn digest_function<'a>(
    instance: &Instance,
    number: i32,
    digests: impl IntoIterator<Item = Option<&'a reapi::Digest>>,
) -> Result<DigestFunction> {
    instance.digest_function(number, digests.into_iter().flatten().map(|digest| digest.hash.len()))
}

/// The digest in a request that has one.
///
/// # Errors
/// [`Error::Invalid`] when it is absent or malformed, or its function is not supported (GEN-01..05, GEN-09).
pub fn digest(
    instance: &Instance,
    number: i32,
    digest: Option<&reapi::Digest>,
    field: &str,
) -> Result<Digest> {
    Digest::from_wire(digest_function(instance, number, [digest])?, digest, field)
}

/// All digests of a request that fails as a whole when one of them is malformed (CAS-06).
///
/// # Errors
/// [`Error::Invalid`] naming the field.
pub fn digests(
    instance: &Instance,
    number: i32,
    digests: UnresolvedDigests,
    field: &str,
) -> Result<Vec<Digest>> {
    let function = instance.digest_function(number, digests.hash_chars())?;
    digests.resolve(function, field)
}

/// Headers with RequestMetadata: the current one, and an older one that some clients still use.
const METADATA_HEADERS: [&str; 2] = [
    "build.bazel.remote.execution.v2.requestmetadata-bin",
    "google.devtools.remoteexecution.v1test.requestmetadata-bin",
];

/// Longest text of the client metadata that is kept, in bytes. Operations and log lines contain it.
const CLIENT_TEXT_MAX_BYTES: usize = 512;

/// The client metadata in the headers. Headers that do not decode are ignored (GEN-28).
pub fn client_info(headers: &HeaderMap) -> ClientInfo {
    /// Some clients pad the text, others do not.
    const BASE64: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new()
            .with_decode_padding_mode(DecodePaddingMode::Indifferent)
            .with_decode_allow_trailing_bits(true),
    );
    let decode = |wanted: &&str| {
        // A request has few headers, so that comparing is faster than hashing these names.
        let (_, value) = headers.iter().find(|(name, _)| name.as_str() == *wanted)?;
        // Repeated binary headers may arrive joined by commas; the first one counts.
        let value = value.as_bytes().split(|byte| *byte == b',').next()?;
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

/// Splits `[instance/]operations/{id}` into the instance name and the id. The instance name is not looked up.
///
/// # Errors
/// [`Error::NotFound`] for every name that this server cannot have given. Clients run the action again only after this
/// code (EXE-13).
pub fn operation_name(name: &str) -> Result<(&str, OperationId)> {
    if name.len() > MAX_RESOURCE_NAME_BYTES {
        return Err(Error::NotFound(format!(
            "there is no operation \"{}\": the name has {} bytes, and at most {MAX_RESOURCE_NAME_BYTES} are possible",
            shown(name),
            name.len()
        )));
    }
    let unknown = || no_operation(name);
    let (collection, id) = name.rsplit_once('/').ok_or_else(unknown)?;
    let instance_name = operations_of(collection).ok_or_else(unknown)?;
    Ok((instance_name, id.parse().map_err(|_| unknown())?))
}

/// The error for a name that cannot be an operation of this server.
pub fn no_operation(name: &str) -> Error {
    Error::NotFound(format!(
        "there is no operation \"{}\"; names have the form [instance/]operations/{{id}}",
        shown(name)
    ))
}

/// The instance name in `[instance/]operations`; `None` for any other text.
pub fn operations_of(collection: &str) -> Option<&str> {
    if collection == "operations" {
        return Some("");
    }
    collection.strip_suffix("/operations").filter(|instance| !instance.is_empty())
}

/// The level of detail of an Operation message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The fields that clients need to run an action. Streams send many of these messages.
    Short,
    /// All fields, including the owner of the operation. The Operations service sends these messages.
    Full,
}

/// The Operation message of a snapshot. `result` is the result of the outcome, prepared for this client with inlined
/// contents. It is ignored if there is no outcome.
pub fn operation(
    info: &OperationInfo,
    snapshot: &Snapshot,
    result: Option<reapi::ActionResult>,
    detail: Detail,
) -> longrunning::Operation {
    let response = snapshot.outcome.as_ref().map(|outcome| {
        let result = result.map(|mut result| {
            // One client requires this field (EXE-60).
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
            server_logs: outcome.server_logs.iter().map(server_log).collect(),
            // A link to a page of the operation would be added here, because only the edge knows its address.
            message: outcome.message.clone(),
        };
        pack("build.bazel.remote.execution.v2.ExecuteResponse", &response)
    });
    longrunning::Operation {
        name: info.name(),
        metadata: Some(pack(
            "build.bazel.remote.execution.v2.ExecuteOperationMetadata",
            &operation_metadata(info, snapshot, detail),
        )),
        done: response.is_some(),
        result: response.map(longrunning::operation::Result::Response),
    }
}

fn operation_metadata(
    info: &OperationInfo,
    snapshot: &Snapshot,
    detail: Detail,
) -> reapi::ExecuteOperationMetadata {
    let mut partial = execution_metadata(snapshot);
    if detail == Detail::Full {
        partial.auxiliary_metadata.push(request_of(info, snapshot));
    }
    let stage = match snapshot.stage {
        // Stage and `done` must agree (EXE-05), so both follow from the outcome.
        _ if snapshot.outcome.is_some() => reapi::execution_stage::Value::Completed,
        Stage::Queued => reapi::execution_stage::Value::Queued,
        Stage::Executing | Stage::Completed => reapi::execution_stage::Value::Executing,
    };
    reapi::ExecuteOperationMetadata {
        stage: stage.into(),
        action_digest: Some(info.action.to_wire()),
        digest_function: info.action.function().wire().into(),
        partial_execution_metadata: Some(partial),
        stdout_stream_name: stream_name(info, snapshot, LogKind::Stdout),
        stderr_stream_name: stream_name(info, snapshot, LogKind::Stderr),
    }
}

/// The name of an output stream of the latest run (EXE-64); empty if there is none.
fn stream_name(info: &OperationInfo, snapshot: &Snapshot, kind: LogKind) -> String {
    let name = |logs| {
        let parent = info.instance.name().to_owned();
        LogName { parent, id: StreamId::Run(logs, kind), token: None }.to_string()
    };
    snapshot.logs.map_or_else(String::new, name)
}

/// EXE-61.
fn server_log(log: &ServerLog) -> (String, reapi::LogFile) {
    (log.name.clone(), reapi::LogFile { digest: Some(log.digest.to_wire()), human_readable: true })
}

/// The known part of the run's metadata. It is complete once there is a result.
fn execution_metadata(snapshot: &Snapshot) -> reapi::ExecutedActionMetadata {
    let result = snapshot.outcome.as_ref().and_then(|outcome| outcome.result.as_ref());
    if let Some(metadata) = result.and_then(|result| result.execution_metadata.as_ref()) {
        return metadata.clone();
    }
    let mut metadata = reapi::ExecutedActionMetadata {
        queued_timestamp: Some(timestamp(snapshot.queued_at)),
        worker: snapshot.place.as_ref().map(|place| place.worker.to_string()).unwrap_or_default(),
        auxiliary_metadata: snapshot.queue.iter().map(|status| queue_status(status)).collect(),
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

fn queue_status(status: &QueueStatus) -> prost_types::Any {
    let number = |count| i64::try_from(count).unwrap_or(i64::MAX);
    let status = gorego::QueueStatus {
        pool: status.pool.clone(),
        position: status.position.map_or(0, number),
        waiting: number(status.waiting),
        busy_slots: number(status.busy),
        slots: number(status.slots),
        reason: status.reason.clone(),
        other_pools: status.other_pools.clone(),
    };
    pack_queue_status(&status)
}

fn request_of(info: &OperationInfo, snapshot: &Snapshot) -> prost_types::Any {
    let ClientInfo { tool_invocation_id, target_id, action_mnemonic } = info.client.clone();
    pack_request(&gorego::OperationRequest {
        action_mnemonic,
        target_id,
        tool_invocation_id,
        principal: info.principal.name().to_owned(),
        peer: info.peer.to_string(),
        pool: snapshot.place.as_ref().map(|place| place.pool.to_string()).unwrap_or_default(),
    })
}

fn timestamp(time: SystemTime) -> prost_types::Timestamp {
    time.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::scheduler::operation::Outcome;
    use crate::instance::Instances;
    use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD};
    use gorego_reapi::find_missing::FindMissingBlobsRequest;
    use http::HeaderValue;
    use proptest::prelude::*;
    use std::{sync::Arc, time::Duration};

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn wire(hash: &str) -> reapi::Digest {
        reapi::Digest { hash: hash.into(), size_bytes: 0 }
    }

    fn instances() -> Instances {
        Instances::new(["", "a/b"]).unwrap()
    }

    fn info() -> OperationInfo {
        OperationInfo {
            id: OperationId::random(Default::default()),
            instance: instances().get("a/b").unwrap(),
            action: Digest::empty(DigestFunction::Sha256),
            inline: Default::default(),
            client: ClientInfo::default(),
            principal: Default::default(),
            peer: Default::default(),
        }
    }

    fn ended(result: Option<reapi::ActionResult>, error: Option<Error>) -> Snapshot {
        let outcome = Outcome {
            result: result.map(Into::into),
            cached: true,
            error,
            message: "m".into(),
            server_logs: Vec::new(),
        };
        Snapshot {
            stage: Stage::Completed,
            outcome: Some(Arc::new(outcome)),
            ..Snapshot::queued(SystemTime::UNIX_EPOCH)
        }
    }

    fn metadata(operation: &longrunning::Operation) -> reapi::ExecuteOperationMetadata {
        let any = operation.metadata.as_ref().unwrap();
        assert_eq!(
            any.type_url,
            "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata"
        );
        Message::decode(any.value.as_slice()).unwrap()
    }

    fn response(operation: &longrunning::Operation) -> reapi::ExecuteResponse {
        let Some(longrunning::operation::Result::Response(any)) = &operation.result else {
            panic!("no response: {operation:?}")
        };
        assert_eq!(any.type_url, "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse");
        Message::decode(any.value.as_slice()).unwrap()
    }

    /// GEN-08, GEN-09, GEN-10, CAS-06.
    #[test]
    fn the_digests_of_a_request_are_all_of_one_supported_function() {
        let instance = instances().get("").unwrap();
        let digests = |number, list: &[reapi::Digest]| {
            let request =
                reapi::FindMissingBlobsRequest { blob_digests: list.to_vec(), ..Default::default() };
            let request = FindMissingBlobsRequest::decode(&*request.encode_to_vec()).unwrap();
            digests(&instance, number, request.blob_digests, "d")
        };
        let sha1 = wire(&HASH[..40]);
        assert_eq!(digests(0, &[]), Ok(vec![]));
        assert_eq!(digests(0, &[wire(HASH), wire(HASH)]).unwrap().len(), 2);
        assert_eq!(digests(1, &[wire(HASH)]).unwrap().len(), 1);
        assert_eq!(digests(9, &[wire(HASH)]).unwrap()[0].function(), DigestFunction::Blake3);
        assert_eq!(digests(0, std::slice::from_ref(&sha1)).unwrap()[0].function(), DigestFunction::Sha1);
        for (number, list) in [
            (0, vec![wire(HASH), sha1.clone()]),
            (0, vec![sha1.clone(), wire(HASH)]),
            (0, vec![wire(&HASH[..42])]),
            (0, vec![wire(HASH), wire("")]),
            (10, vec![wire(HASH)]),
            (1, vec![sha1]),
            (99, vec![]),
            (4, vec![]),
            (-1, vec![wire(HASH)]),
        ] {
            assert!(matches!(digests(number, &list), Err(Error::Invalid(_))), "{number} {list:?}");
        }
    }

    /// GEN-28: both header names are read, with and without padding, and so is the text of an old client.
    #[test]
    fn who_asks_is_read_from_either_header_in_either_padding() {
        let metadata = reapi::RequestMetadata {
            tool_invocation_id: "invocation".into(),
            target_id: "//pkg:target".into(),
            action_mnemonic: "CppCompile".into(),
            ..Default::default()
        }
        .encode_to_vec();
        for name in METADATA_HEADERS {
            for text in [BASE64_STANDARD.encode(&metadata), BASE64_STANDARD_NO_PAD.encode(&metadata)] {
                let mut headers = HeaderMap::new();
                headers.insert(name, HeaderValue::from_str(&text).unwrap());
                let client = client_info(&headers);
                assert_eq!(client.tool_invocation_id, "invocation");
                assert_eq!(client.target_id, "//pkg:target");
                assert_eq!(client.action_mnemonic, "CppCompile");
            }
        }
        assert_eq!(client_info(&HeaderMap::new()), ClientInfo::default());
    }

    proptest! {
        /// GEN-28.
        #[test]
        fn a_header_that_does_not_decode_counts_as_absent(value in proptest::collection::vec(32u8..127, 0..200)) {
            let mut headers = HeaderMap::new();
            headers.insert(METADATA_HEADERS[0], HeaderValue::from_bytes(&value).unwrap());
            let client = client_info(&headers);
            prop_assert!(client.target_id.len() <= CLIENT_TEXT_MAX_BYTES);
        }
    }

    /// EXE-02, EXE-13.
    #[test]
    fn operation_names_are_read_back_and_all_others_are_not_found() {
        let info = info();
        let name = info.name();
        let (instance_name, id) = operation_name(&name).unwrap();
        assert_eq!((instance_name, id), ("a/b", info.id));
        let id = info.id;
        assert!(operation_name(&format!("operations/{id}")).is_ok());
        for name in [
            String::new(),
            id.to_string(),
            format!("/operations/{id}"),
            format!("xoperations/{id}"),
            format!("a/b/operations/{id}/"),
            format!("a/b/operations/{}", id.to_string().to_uppercase()),
            "operations/1".into(),
            "x".repeat(10_000),
        ] {
            assert!(matches!(operation_name(&name), Err(Error::NotFound(_))), "{name}");
        }
    }

    /// EXE-13.
    #[test]
    fn a_name_of_any_length_that_no_operation_has_is_not_found_with_a_short_error() {
        let id = info().id;
        for length in [1_000, 16 * 1024 * 1024] {
            let strange = "\u{7f}".repeat(length);
            for name in
                [format!("operations/{strange}"), format!("{strange}/operations/{id}"), strange.clone()]
            {
                let error = operation_name(&name).map_or_else(|error| error, |_| no_operation(&name));
                let Error::NotFound(text) = error else { panic!("{error}") };
                assert!(text.len() < 4096, "{}", text.len());
                let says_why = text.contains(&format!("has {} bytes, and at most 16384 are", name.len()));
                assert_eq!(says_why, length > 16_384, "{text}");
            }
        }
    }

    /// EXE-03, EXE-04, EXE-05, EXE-07.
    #[test]
    fn stage_completed_and_done_come_together() {
        let running = Snapshot {
            stage: Stage::Executing,
            run_stage: Some((RunStage::Running, SystemTime::UNIX_EPOCH + Duration::from_secs(5))),
            outcome: None,
            ..ended(None, None)
        };
        let queued = Snapshot { stage: Stage::Queued, run_stage: None, ..running.clone() };
        let info = info();
        for (snapshot, stage) in [
            (queued, reapi::execution_stage::Value::Queued),
            (running, reapi::execution_stage::Value::Executing),
            (ended(None, Some(Error::Cancelled("x".into()))), reapi::execution_stage::Value::Completed),
        ] {
            let operation = operation(&info, &snapshot, None, Detail::Short);
            let metadata = metadata(&operation);
            assert_eq!(metadata.stage(), stage);
            assert_eq!(metadata.action_digest, Some(info.action.to_wire()));
            assert_eq!(metadata.digest_function, 1);
            let partial = metadata.partial_execution_metadata.unwrap();
            assert_eq!(partial.queued_timestamp, Some(prost_types::Timestamp::default()));
            assert_eq!(operation.done, stage == reapi::execution_stage::Value::Completed);
            assert_eq!(operation.result.is_some(), operation.done);
            assert_eq!(operation.name, info.name());
        }
    }

    /// EXE-08, EXE-16, EXE-45, EXE-60.
    #[test]
    fn a_response_has_a_result_or_says_why_not() {
        let failed = reapi::ActionResult { exit_code: 7, ..Default::default() };
        let ok = response(&operation(
            &info(),
            &ended(Some(failed.clone()), None),
            Some(failed.clone()),
            Detail::Short,
        ));
        assert_eq!(ok.status.unwrap().code, 0);
        assert_eq!(ok.result.as_ref().unwrap().exit_code, 7);
        assert!(ok.result.unwrap().execution_metadata.is_some());
        assert!(ok.cached_result);
        assert_eq!(ok.message, "m");

        let late = Some(Error::DeadlineExceeded("late".into()));
        let late =
            response(&operation(&info(), &ended(Some(failed.clone()), late), Some(failed), Detail::Short));
        assert_eq!(late.status.unwrap().code, tonic::Code::DeadlineExceeded as i32);
        assert!(late.result.is_some());

        let nothing = response(&operation(&info(), &ended(None, None), None, Detail::Short));
        assert_eq!(nothing.status.unwrap().code, tonic::Code::Internal as i32);
    }
}
