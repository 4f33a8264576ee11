//! EXE-59 to EXE-64: stdout and stderr, metadata, node properties, server logs, live streams.

use crate::{
    actions::{metadata, response, result_of},
    check::{Answer as _, Check, Verdict, absent, ensure, equal, fail},
    checks,
    job::Job,
    session::Session,
};
use futures::future::try_join_all;
use gorego_reapi::proto::reapi::{ActionResult, ExecuteRequest, ExecutedActionMetadata};
use std::time::Duration;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    logs_are_stored_byte_for_byte => "EXE-59";
    contents_are_inlined_only_on_request => "EXE-59";
    metadata_is_present_and_its_times_are_in_order => "EXE-60";
    server_logs_are_stored_under_plain_names => "EXE-61";
    unknown_output_node_properties_are_refused_and_known_ones_filled_in => "EXE-63";
    stdout_can_be_read_while_the_action_runs => "EXE-64";
];

/// Longest `ExecuteResponse.message` that counts as short (EXE-61).
const SHORT_MESSAGE_BYTES: usize = 4096;

async fn logs_are_stored_byte_for_byte(s: Session) -> Verdict {
    // The digest is absent or names the empty blob, but is never zero-valued.
    let silent = s.case("a silent command", Job::sh(&s, "exit 0").result()).await?;
    for (what, digest) in [("stdout_digest", &silent.stdout_digest), ("stderr_digest", &silent.stderr_digest)]
    {
        if let Some(digest) = digest {
            equal(&format!("{what} of a silent command"), digest, &s.empty().digest)?;
        }
    }
    let loud = Job::sh(&s, "printf 'a\\000\\001\\377\\r\\nb'; printf '\\000e' >&2");
    let loud = s.case("a command that prints", loud.result()).await?;
    for (what, digest, raw, bytes) in [
        ("stdout", &loud.stdout_digest, &loud.stdout_raw, &b"a\0\x01\xff\r\nb"[..]),
        ("stderr", &loud.stderr_digest, &loud.stderr_raw, &b"\0e"[..]),
    ] {
        s.case(what, async {
            let wanted = s.blob_of(bytes.to_vec()).digest;
            equal("its digest", digest, &Some(wanted.clone()))?;
            equal("its raw bytes, which nobody asked for", &raw.len(), &0)?;
            let read = s.read(&wanted).await.wanted("a log can be read")?;
            ensure(read == bytes, "the bytes that were printed", format!("{read:?}"))
        })
        .await?;
    }
    // Larger than any message.
    let large = Job::sh(&s, "head -c 6000000 /dev/zero");
    let large = s.case("a command that prints 6,000,000 zeros", large.result()).await?;
    let zeros = s.blob_of(vec![0; 6_000_000]);
    equal("stdout_digest of 6,000,000 zeros", &large.stdout_digest, &Some(zeros.digest))
}

async fn contents_are_inlined_only_on_request(s: Session) -> Verdict {
    let script = "echo out; echo err >&2; echo one > one; echo two > two";
    let run = async |change: fn(&mut ExecuteRequest)| {
        let job = Job::sh(&s, script).outputs(["one", "two"]);
        result_of(job.start_with(change).await?.finish().await?)
    };
    let contents = |result: &ActionResult| {
        let file = |path: &str| {
            let file = result.output_files.iter().find(|file| file.path == path);
            file.map(|file| file.contents.clone()).unwrap_or_default()
        };
        [result.stdout_raw.clone(), result.stderr_raw.clone(), file("one"), file("two")]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let nothing = contents(&s.case("without a request", run(|_| {})).await?);
    equal("inlined without a request", &nothing, &["", "", "", ""].map(str::to_owned))?;
    let asking = run(|request| {
        (request.inline_stdout, request.inline_stderr) = (true, true);
        request.inline_output_files = vec!["two".into(), "no-such-output".into()];
    });
    let result = s.case("on request", asking).await?;
    // A server may omit inlined bytes, but must not inline other bytes.
    let inlined = contents(&result);
    let wanted =
        [("stdout", "out\n"), ("stderr", "err\n"), ("a file not asked for", ""), ("a file", "two\n")];
    for ((what, whole), seen) in wanted.iter().zip(&inlined) {
        let fits = seen.is_empty() || seen == whole;
        ensure(fits, format!("{what}: {whole:?} inlined"), format!("{seen:?}"))?;
    }
    // The digests are present beside inlined bytes.
    equal("stdout_digest", &result.stdout_digest, &Some(s.blob_of("out\n").digest))?;
    equal("stderr_digest", &result.stderr_digest, &Some(s.blob_of("err\n").digest))
}

/// The nine timestamps in their required order.
fn times(metadata: &ExecutedActionMetadata) -> [(&'static str, Option<prost_types::Timestamp>); 9] {
    [
        ("queued", metadata.queued_timestamp),
        ("worker_start", metadata.worker_start_timestamp),
        ("input_fetch_start", metadata.input_fetch_start_timestamp),
        ("input_fetch_completed", metadata.input_fetch_completed_timestamp),
        ("execution_start", metadata.execution_start_timestamp),
        ("execution_completed", metadata.execution_completed_timestamp),
        ("output_upload_start", metadata.output_upload_start_timestamp),
        ("output_upload_completed", metadata.output_upload_completed_timestamp),
        ("worker_completed", metadata.worker_completed_timestamp),
    ]
}

async fn metadata_is_present_and_its_times_are_in_order(s: Session) -> Verdict {
    let scripts = ["exit 0", "exit 3", "echo > out", "sleep 0.2"];
    let run = async |script: &'static str| {
        let job = Job::sh(&s, script).outputs(["out"]);
        Ok((script, s.case(script, job.result()).await?))
    };
    for (script, result) in try_join_all(scripts.map(run)).await? {
        s.case(script, async {
            let metadata = result.execution_metadata.ok_or_else(|| fail("execution_metadata", "none"))?;
            if metadata.worker.is_empty() {
                return Ok(());
            }
            let times = times(&metadata);
            for (name, time) in &times {
                ensure(time.is_some(), format!("{name}_timestamp, since worker is set"), "none")?;
            }
            let in_order = times.is_sorted_by_key(|(_, time)| time.map(|time| (time.seconds, time.nanos)));
            ensure(in_order, "the nine timestamps in their order", format!("{times:?}"))?;
            if let Some(duration) = metadata.virtual_execution_duration {
                let duration = Duration::try_from(duration);
                let sane = matches!(&duration, Ok(duration) if *duration < Duration::from_secs(3600));
                ensure(sane, "a plausible virtual_execution_duration", format!("{duration:?}"))?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn server_logs_are_stored_under_plain_names(s: Session) -> Verdict {
    let job = Job::sh(&s, "echo out; echo err >&2; exit 3");
    let slow = Job::sh(&s, "echo out; sleep 20").timeout(Duration::from_secs(1));
    let responses = [job.response().await?, slow.response().await?];
    for (case, response) in ["a failure", "a timeout"].into_iter().zip(&responses) {
        s.case(case, async {
            let length = response.message.len();
            let seen = format!("{length} bytes");
            ensure(length <= SHORT_MESSAGE_BYTES, "a message of a few lines", seen)?;
            for (name, log) in &response.server_logs {
                let plain = !name.is_empty() && !name.contains('/') && !name.contains("..");
                ensure(plain, "a plain file name for each server log", format!("{name:?}"))?;
                let digest =
                    log.digest.as_ref().ok_or_else(|| fail("a digest for each server log", "none"))?;
                let read = s.read(digest).await.wanted("a server log can be read")?;
                let text = !log.human_readable || std::str::from_utf8(&read).is_ok();
                ensure(text, "text in a log that is human_readable", format!("{name} is not UTF-8"))?;
            }
            Ok(())
        })
        .await?;
    }
    let some = responses.iter().any(|one| !one.server_logs.is_empty() || !one.message.is_empty());
    if some { Ok(()) } else { Err(absent("neither server_logs nor a message after a failure or a timeout")) }
}

async fn unknown_output_node_properties_are_refused_and_known_ones_filled_in(s: Session) -> Verdict {
    let job = |property: &str| {
        let script = "echo > out; chmod 640 out; touch -d @1000000000 out";
        Job::sh(&s, script).outputs(["out"]).command(|command| {
            command.output_node_properties = vec![property.to_owned()];
        })
    };
    let supported = s.executes()?.supported_node_properties.clone();
    let has = |name: &str| supported.iter().any(|one| one == name);
    if !has("unix_mode") && !has("mtime") {
        return Err(absent("supported_node_properties lists neither unix_mode nor mtime"));
    }
    for name in ["unix_mode", "mtime"].into_iter().filter(|name| has(name)) {
        s.case(name, async {
            let result = job(name).result().await?;
            let properties = result.output_files.into_iter().find_map(|file| file.node_properties);
            let properties = properties.unwrap_or_default();
            let filled_in = match name {
                "unix_mode" => properties.unix_mode == Some(0o640),
                _ => properties.mtime.is_some_and(|time| time.seconds == 1_000_000_000),
            };
            ensure(
                filled_in,
                format!("{name} of the output as the command set it"),
                format!("{properties:?}"),
            )?;
            Ok(())
        })
        .await?;
    }
    job("nonsense").refused("an unknown output node property", &[Code::InvalidArgument]).await.map(drop)
}

async fn stdout_can_be_read_while_the_action_runs(s: Session) -> Verdict {
    let script = "echo first; sleep 1; echo second; sleep 1; echo third";
    let mut run = Job::sh(&s, script).uncached().start().await?;
    let mut name = String::new();
    while let Some(operation) = run.next().await? {
        name = metadata(&operation)?.stdout_stream_name;
        if operation.done {
            response(&operation)?;
            let why = "no stdout_stream_name while an action runs: log streaming is off";
            if name.is_empty() {
                return Err(absent(why));
            }
            break;
        }
        if !name.is_empty() {
            break;
        }
    }
    let read = tokio::time::timeout(Duration::from_secs(15), s.read_named(&name)).await;
    let read = read.map_err(|_| fail("an end of the stream with the action", "it stays open"))?;
    let read = read.wanted("the stream of stdout can be read")?;
    equal("what was read live", &String::from_utf8_lossy(&read).as_ref(), &"first\nsecond\nthird\n")?;
    result_of(run.finish().await?).map(drop)
}
