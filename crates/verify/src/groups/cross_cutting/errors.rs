//! GEN-16 to GEN-22: codes, details and sizes of errors.

use crate::{
    actions::{metadata, response},
    blob::Blob,
    check::{
        Answer as _, Check, Step as _, Verdict, absent, code_name, ensure, equal, fail, inline, only, show,
    },
    checks, raw,
    session::Session,
    store::pieces,
};
use gorego_reapi::proto::{
    asset::{FetchBlobRequest, PushBlobRequest, Qualifier},
    logstream::CreateLogStreamRequest,
    longrunning::{DeleteOperationRequest, ListOperationsRequest, WaitOperationRequest, operation},
    reapi::{
        ActionResult, Digest, Directory, FileNode, GetCapabilitiesRequest, SpliceBlobRequest,
        SplitBlobRequest,
    },
    rpc,
};
use prost::Message as _;
use tonic::{Code, Request, Status};

pub(crate) const CHECKS: &[Check] = checks![
    methods_that_do_not_exist_are_unimplemented => "GEN-16";
    optional_methods_work_or_say_that_they_do_not_exist => "GEN-16", "OPS-02";
    unsupported_values_are_argument_errors => "GEN-16", "BS-04";
    details_of_errors_repeat_code_and_message => "GEN-17";
    packed_messages_have_the_usual_type_url => "GEN-18";
    a_long_list_of_missing_inputs_arrives => "GEN-19", "EXE-25";
    an_error_about_a_long_name_arrives => "GEN-19";
    permanent_errors_have_no_code_that_is_retried => "GEN-20";
    errors_that_a_retry_cannot_fix_carry_no_retry_info => "GEN-21";
    codes_inside_messages_exist => "GEN-22";
];

/// Codes that some clients retry (GEN-20).
const RETRIED: &[Code] = &[
    Code::Cancelled,
    Code::Unknown,
    Code::DeadlineExceeded,
    Code::Aborted,
    Code::Internal,
    Code::Unavailable,
    Code::ResourceExhausted,
];

async fn methods_that_do_not_exist_are_unimplemented(s: Session) -> Verdict {
    let known = GetCapabilitiesRequest { instance_name: s.instance() }.encode_to_vec();
    let call = |path: &'static str| raw::call(s.service(), path, Request::new(known.clone().into()));
    call(raw::path::GET_CAPABILITIES).await.control("GetCapabilities answers")?;
    for path in [raw::path::NO_SUCH_METHOD, "/build.bazel.remote.execution.v2.NoSuchService/GetCapabilities"]
    {
        call(path).await.refused(path, &[Code::Unimplemented])?;
    }
    Ok(())
}

/// The call does not hang (see the time limit of the check) and does not fail with a server fault.
fn answered<T>(what: &str, answer: Result<T, Status>) -> Verdict {
    match answer {
        Err(status) if matches!(status.code(), Code::Internal | Code::Unknown) => {
            Err(fail(format!("{what}: OK, UNIMPLEMENTED, or an error of the request"), show(&status)))
        }
        _ => Ok(()),
    }
}

async fn optional_methods_work_or_say_that_they_do_not_exist(s: Session) -> Verdict {
    let name = s.qualify(&format!("operations/{}", s.word()));
    let list = ListOperationsRequest { name: s.qualify("operations"), page_size: 1, ..Default::default() };
    answered("ListOperations", s.operations().list_operations(list).await)?;
    let delete = DeleteOperationRequest { name: name.clone() };
    answered("DeleteOperation of an unknown name", s.operations().delete_operation(delete).await)?;
    let wait = WaitOperationRequest { name, ..Default::default() };
    answered("WaitOperation of an unknown name", s.operations().wait_operation(wait).await)?;
    let split = SplitBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(s.unknown()),
        digest_function: s.function_number(),
        ..Default::default()
    };
    answered("SplitBlob of an unknown blob", s.cas().split_blob(split).await)?;
    let splice = SpliceBlobRequest {
        instance_name: s.instance(),
        blob_digest: Some(s.unknown()),
        chunk_digests: vec![s.unknown()],
        digest_function: s.function_number(),
        ..Default::default()
    };
    answered("SpliceBlob of unknown chunks", s.cas().splice_blob(splice).await)?;
    answered("FetchBlob without URIs", s.fetch().fetch_blob(FetchBlobRequest::default()).await)?;
    answered("PushBlob without URIs", s.push().push_blob(PushBlobRequest::default()).await)?;
    let create = CreateLogStreamRequest { parent: String::new() };
    answered("CreateLogStream without a parent", s.log_streams().create_log_stream(create).await)
}

async fn unsupported_values_are_argument_errors(s: Session) -> Verdict {
    let blob = s.stored(100).await?;
    s.read(&blob.digest).await.needs("BS-07", "the blob is read")?;
    let name = s.qualify(&blob.compressed_name("lzma"));
    s.read_named(&name).await.refused("Read with the compressor lzma", &[Code::InvalidArgument])?;
    let mut item = s.item(&blob);
    item.compressor = 99;
    let answer = s.update_items(vec![item]).await.wanted("BatchUpdateBlobs answers")?;
    let what = "an item with compressor 99";
    inline(what, only(what, answer.responses)?.status.as_ref(), &[Code::InvalidArgument])
}

/// The statuses of requests that can never succeed, each with the reason.
async fn permanent_errors(s: &Session) -> Vec<(&'static str, Status)> {
    let good = s.unknown();
    let short = Digest { hash: good.hash.get(1..).unwrap_or_default().to_owned(), ..good.clone() };
    let asked = std::slice::from_ref(&short);
    let mut found = Vec::new();
    // An unimplemented call does not count.
    let mut keep = |what, answer: Option<Status>| {
        let answer = answer.filter(|status| status.code() != Code::Unimplemented);
        found.extend(answer.map(|status| (what, status)));
    };
    keep("FindMissingBlobs of a malformed digest", s.missing(asked).await.err());
    keep("Read of a malformed name", s.read_named(&s.qualify("blobs/x")).await.err());
    keep("Read of an unknown blob", s.read(&good).await.err());
    keep("GetActionResult of a malformed digest", s.result(&short).await.err());
    keep("GetActionResult of an unknown action", s.result(&good).await.err());
    keep("GetTree of a malformed digest", s.tree(&short, 0).await.err());
    keep("GetTree of an unknown root", s.tree(&good, 0).await.err());
    let blob = s.blob(100);
    let name = s.write_name(&blob);
    keep("QueryWriteStatus of a malformed name", s.query(&s.qualify("uploads/x")).await.err());
    keep("Write to a malformed name", s.write(&Blob { digest: short.clone(), ..blob.clone() }).await.err());
    let other = pieces(&name, &s.blob(100).data, 0, 100);
    keep("Write of other bytes", s.write_messages(other).await.err());
    let result = ActionResult { stdout_digest: Some(short.clone()), ..Default::default() };
    keep("UpdateActionResult with a malformed digest", s.update_result(&good, result).await.err());
    if s.executes().is_ok() {
        keep("Execute of a malformed digest", s.start(s.execute_request(&short)).await.err());
        let name = s.qualify(&format!("operations/{}", s.word()));
        let waited = match s.wait(&name).await {
            Ok(mut run) => run.next_status().await,
            Err(status) => Some(status),
        };
        keep("WaitExecution of an unknown name", waited);
    }
    found
}

async fn permanent_errors_have_no_code_that_is_retried(s: Session) -> Verdict {
    let errors = permanent_errors(&s).await;
    ensure(errors.len() >= 8, "malformed requests are refused", format!("{} of them are", errors.len()))?;
    for (what, status) in errors {
        let fine = !RETRIED.contains(&status.code());
        ensure(fine, format!("{what}: a code that no client retries"), show(&status))?;
    }
    Ok(())
}

async fn errors_that_a_retry_cannot_fix_carry_no_retry_info(s: Session) -> Verdict {
    let errors = permanent_errors(&s).await;
    ensure(errors.len() >= 8, "malformed requests are refused", format!("{} of them are", errors.len()))?;
    for (what, status) in errors {
        let details = rpc::Status::decode(status.details()).unwrap_or_default().details;
        let retry = details.iter().any(|any| any.type_url.ends_with("google.rpc.RetryInfo"));
        ensure(!retry, format!("{what}: no RetryInfo"), format!("RetryInfo on {}", show(&status)))?;
    }
    Ok(())
}

async fn details_of_errors_repeat_code_and_message(s: Session) -> Verdict {
    let mut errors = permanent_errors(&s).await;
    if s.executes().is_ok()
        && let Err(status) = s.start(s.execute_request(&s.unknown())).await
    {
        errors.push(("Execute of an unknown action", status));
    }
    let fetch = FetchBlobRequest {
        instance_name: s.instance(),
        uris: vec!["https://example.invalid/x".into()],
        qualifiers: vec![Qualifier { name: "x.y".into(), value: "z".into() }],
        ..Default::default()
    };
    if let Err(status) = s.fetch().fetch_blob(fetch).await {
        errors.push(("FetchBlob with an unknown qualifier", status));
    }
    let mut seen = 0;
    for (what, status) in errors.iter().filter(|(_, status)| !status.details().is_empty()) {
        let details = rpc::Status::decode(status.details())
            .map_err(|error| fail(format!("{what}: the details are a google.rpc.Status"), error))?;
        equal(&format!("{what}: code in the details"), &details.code, &(status.code() as i32))?;
        equal(&format!("{what}: message in the details"), &details.message.as_str(), &status.message())?;
        seen += 1;
    }
    let none = format!("none of {} errors carried details", errors.len());
    if seen > 0 { Ok(()) } else { Err(absent(none)) }
}

async fn packed_messages_have_the_usual_type_url(s: Session) -> Verdict {
    s.runs_actions().await?;
    let is = |url: &str, name: &str| {
        let wanted = format!("type.googleapis.com/{name}");
        equal("type_url", &url, &wanted.as_str())
    };
    let missing = s.action(&s.shell("true", &[]), &s.unknown()).await?;
    let good = s.fresh_action().await?;
    for (what, action) in [("an action that runs", good), ("an action without its inputs", missing)] {
        s.case(what, async {
            let mut run = s.start(s.execute_request(&action)).await.wanted("Execute is accepted")?;
            let last = loop {
                let next = run.message().await.needs("EXE-25", "the operation stream goes on to done")?;
                let next =
                    next.ok_or_else(|| fail("a done message", "the end of the stream")).needs("EXE-10")?;
                ensure(next.metadata.is_some(), "metadata in each message", "none").needs("EXE-03")?;
                let url = next.metadata.as_ref().map_or("", |any| any.type_url.as_str());
                is(url, "build.bazel.remote.execution.v2.ExecuteOperationMetadata")?;
                metadata(&next)?;
                if next.done {
                    break next;
                }
            };
            if let Some(operation::Result::Response(any)) = &last.result {
                is(&any.type_url, "build.bazel.remote.execution.v2.ExecuteResponse")?;
            }
            for any in response(&last)?.status.unwrap_or_default().details {
                ensure(
                    any.type_url.starts_with("type.googleapis.com/google.rpc."),
                    "type.googleapis.com/google.rpc.PreconditionFailure",
                    &any.type_url,
                )?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_long_list_of_missing_inputs_arrives(s: Session) -> Verdict {
    s.runs_actions().await?;
    let file =
        |at: usize| FileNode { name: format!("f{at:04}"), digest: Some(s.unknown()), ..Default::default() };
    let root = Directory { files: (0..500).map(file).collect(), ..Default::default() };
    let root = s.stored_directory(&root).await?;
    let action = s.action(&s.shell("true", &[]), &root.digest).await?;
    let refusal = s.refusal(&action).await.own()?;
    let what = "an Execute without 500 of its inputs";
    let verdict = inline(what, Some(&refusal.status), &[Code::FailedPrecondition]);
    // Trailers do not matter for another code inside the response.
    if refusal.inline { verdict.needs("EXE-22") } else { verdict }
}

async fn an_error_about_a_long_name_arrives(s: Session) -> Verdict {
    let short =
        s.read_named("nonsense").await.refused("Read of a malformed name", &[Code::InvalidArgument])?;
    let long = "nonsense/".repeat(4_000);
    let long = s.read_named(&long).await;
    let long = long.refused("Read of a malformed name of 36 kB", &[Code::InvalidArgument])?;
    for (what, status) in [("an error about a short name", short), ("an error about 36 kB", long)] {
        s.case(what, async {
            let headers = status.metadata().clone().into_headers();
            let rest: usize =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            let trailers = rest + status.message().len() + status.details().len() * 4 / 3;
            ensure(trailers < 8192, "trailers below 8192 bytes", format!("{trailers} bytes"))
        })
        .await?;
    }
    Ok(())
}

async fn codes_inside_messages_exist(s: Session) -> Verdict {
    let good = s.unknown();
    let short = Digest { hash: good.hash.get(1..).unwrap_or_default().to_owned(), ..good.clone() };
    let wrong = Blob { digest: s.unknown(), ..s.blob(100) };
    let mut codes = Vec::new();
    if let Ok(answer) = s.batch_read(&[good, s.empty().digest], &[]).await {
        let found = answer.responses.into_iter().filter_map(|one| one.status);
        codes.extend(found.map(|status| ("BatchReadBlobs", status.code)));
    }
    if let Ok(answer) = s.batch_read(&[short], &[]).await {
        let found = answer.responses.into_iter().filter_map(|one| one.status);
        codes.extend(found.map(|status| ("BatchReadBlobs of a malformed digest", status.code)));
    }
    let answer = s.update(&[&wrong, &s.blob(100)]).await.wanted("BatchUpdateBlobs answers")?;
    let found = answer.responses.into_iter().filter_map(|one| one.status);
    codes.extend(found.map(|status| ("BatchUpdateBlobs", status.code)));
    ensure(codes.len() >= 2, "inline statuses of several kinds", format!("{codes:?}"))?;
    for (what, code) in codes {
        ensure((0..=16).contains(&code), format!("{what}: a code within 0 to 16"), code_name(code))?;
    }
    Ok(())
}
