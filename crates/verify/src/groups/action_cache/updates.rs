//! AC-08 to AC-10, AC-12, AC-14, AC-15: what is stored, and how it is returned.

use crate::{
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, skipped},
    checks,
    session::Session,
};
use futures::future::join_all;
use gorego_reapi::proto::reapi::{
    ActionResult, Directory, ExecutedActionMetadata, NodeProperties, NodeProperty, OutputDirectory,
    OutputFile, OutputSymlink, ResultsCachePolicy, Tree, UpdateActionResultRequest,
};
use prost::Message as _;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    an_update_is_seen_over_another_connection => "AC-08";
    a_later_update_replaces_the_earlier_one => "AC-08";
    racing_updates_leave_one_whole_result => "AC-08";
    results_have_metadata_although_none_was_sent => "AC-09";
    malformed_results_are_refused => "AC-10";
    an_update_without_permission_is_refused_as_such => "AC-12";
    fields_that_are_not_used_come_back => "AC-14";
    a_cache_policy_is_harmless => "AC-15";
];

/// Number of concurrent updates.
const RACERS: usize = 20;

async fn an_update_is_seen_over_another_connection(s: Session) -> Verdict {
    s.updates_results()?;
    let (action, result) = (s.fresh_action().await?, s.a_result().await?);
    let answer = s.update_result(&action, result.clone()).await.wanted("the result is stored")?;
    equal("output_files of the answer", &answer.output_files, &result.output_files)?;
    let hit = s.reconnect().await.control()?.result(&action).await.wanted("the result is a hit at once")?;
    equal("output_files", &hit.output_files, &result.output_files)
}

async fn a_later_update_replaces_the_earlier_one(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    for update in ["the first update", "the second update"] {
        s.case(update, async {
            let result = s.a_result().await?;
            s.update_result(&action, result.clone()).await.wanted("the result is stored")?;
            let hit = s.result(&action).await.wanted("the result is a hit")?;
            equal("output_files", &hit.output_files, &result.output_files)
        })
        .await?;
    }
    Ok(())
}

async fn racing_updates_leave_one_whole_result(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    let mut results = Vec::new();
    for _ in 0..RACERS {
        // Two outputs, so that a mixture of two results would be visible.
        let mut result = s.a_result().await?;
        let second = s.a_result().await?.output_files.remove(0);
        result.output_files.push(OutputFile { path: "second".into(), ..second });
        results.push(result);
    }
    let updates = results.iter().map(|result| s.update_result(&action, result.clone()));
    for (at, answer) in join_all(updates).await.into_iter().enumerate() {
        answer.wanted(&format!("update {at} of {RACERS} that race is accepted"))?;
    }
    let hit = s.result(&action).await.wanted("one of them is a hit")?;
    let whole = results.iter().any(|result| result.output_files == hit.output_files);
    ensure(whole, "the outputs of one of the updates", format!("{:?}", hit.output_files))
}

async fn results_have_metadata_although_none_was_sent(s: Session) -> Verdict {
    s.updates_results()?;
    let bare = ActionResult::default();
    for (case, result) in [("a result with an output", s.a_result().await?), ("an empty result", bare)] {
        s.case(case, async {
            let action = s.fresh_action().await?;
            s.update_result(&action, result).await.wanted("a result without metadata is stored")?;
            let hit = s.result(&action).await.needs("AC-08", "the result is a hit")?;
            ensure(hit.execution_metadata.is_some(), "execution_metadata is set", "it is not set")?;
            ensure(hit.encoded_len() > 0, "a result that is not empty on the wire", "0 bytes")
        })
        .await?;
    }
    Ok(())
}

async fn malformed_results_are_refused(s: Session) -> Verdict {
    s.updates_results()?;
    let good = s.a_result().await?;
    let action = s.fresh_action().await?;
    s.update_result(&action, good.clone()).await.needs("AC-08", "a good result is stored")?;
    let request = UpdateActionResultRequest {
        instance_name: s.instance(),
        action_digest: Some(action),
        digest_function: s.function_number(),
        ..Default::default()
    };
    let answer = s.action_cache().update_action_result(request).await;
    answer.refused("an update without action_result", &[Code::InvalidArgument])?;

    let file = good.output_files.first().cloned().unwrap_or_default();
    let at = |path: &str| OutputFile { path: path.into(), ..file.clone() };
    let with = |output_files: Vec<OutputFile>| ActionResult { output_files, ..Default::default() };
    let mut short = file.clone();
    if let Some(digest) = &mut short.digest {
        digest.hash.pop();
    }
    for (what, result) in [
        ("a malformed digest", with(vec![short])),
        ("an output without a digest", with(vec![OutputFile { digest: None, ..file.clone() }])),
        ("an absolute path", with(vec![at("/etc/passwd")])),
        ("a path that leaves the root", with(vec![at("a/../../b")])),
        ("a path twice", with(vec![at("x"), at("x")])),
        ("an empty path", with(vec![at("")])),
    ] {
        s.case(what, async {
            let action = s.fresh_action().await?;
            let answer = s.update_result(&action, result).await;
            answer.refused(&format!("a result with {what}"), &[Code::InvalidArgument])?;
            s.result(&action).await.refused(&format!("GetActionResult after {what}"), &[Code::NotFound])?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn an_update_without_permission_is_refused_as_such(s: Session) -> Verdict {
    s.cache()?;
    if s.updates_results().is_ok() {
        return Err(skipped("needs a server, or an --instance, where this caller may not update results"));
    }
    let action = s.fresh_action().await?;
    let codes = [Code::PermissionDenied, Code::Unimplemented];
    s.update_result(&action, s.a_result().await?).await.refused("UpdateActionResult", &codes)?;
    s.result(&action).await.refused("GetActionResult of an unknown action", &[Code::NotFound])?;
    Ok(())
}

async fn fields_that_are_not_used_come_back(s: Session) -> Verdict {
    s.updates_results()?;
    let (output, stdout) = (s.stored(100).await?, s.stored(100).await?);
    let tree = s.message(&Tree { root: Some(Directory::default()), children: vec![] });
    s.store(&[&tree]).await?;
    let stamp =
        |seconds: i64| Some(prost_types::Timestamp { seconds: 1_700_000_000 + seconds, nanos: 123_000_000 });
    let properties = NodeProperties {
        properties: vec![NodeProperty { name: "colour".into(), value: "green".into() }],
        mtime: stamp(0),
        unix_mode: Some(0o640),
    };
    let auxiliary = prost_types::Any {
        type_url: "type.googleapis.com/google.protobuf.Duration".into(),
        value: prost_types::Duration { seconds: 7, nanos: 0 }.encode_to_vec(),
    };
    #[allow(deprecated)]
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "a/out".into(),
            digest: Some(output.digest),
            is_executable: true,
            node_properties: Some(properties.clone()),
            ..Default::default()
        }],
        output_directories: vec![OutputDirectory {
            path: "d".into(),
            tree_digest: Some(tree.digest),
            is_topologically_sorted: true,
            ..Default::default()
        }],
        output_symlinks: vec![OutputSymlink {
            path: "l".into(),
            target: "a/out".into(),
            node_properties: Some(properties),
        }],
        stdout_digest: Some(stdout.digest),
        execution_metadata: Some(ExecutedActionMetadata {
            worker: "some worker".into(),
            queued_timestamp: stamp(0),
            worker_start_timestamp: stamp(1),
            input_fetch_start_timestamp: stamp(2),
            input_fetch_completed_timestamp: stamp(3),
            execution_start_timestamp: stamp(4),
            execution_completed_timestamp: stamp(5),
            output_upload_start_timestamp: stamp(6),
            output_upload_completed_timestamp: stamp(7),
            worker_completed_timestamp: stamp(8),
            virtual_execution_duration: Some(prost_types::Duration { seconds: 1, nanos: 5 }),
            auxiliary_metadata: vec![auxiliary.clone()],
        }),
        ..Default::default()
    };
    let action = s.fresh_action().await?;
    s.update_result(&action, result.clone()).await.wanted("a full result is stored")?;
    let hit = s.result(&action).await.needs("AC-08", "the result is a hit")?;
    equal("output_files", &hit.output_files, &result.output_files)?;
    equal("output_directories", &hit.output_directories, &result.output_directories)?;
    equal("output_symlinks", &hit.output_symlinks, &result.output_symlinks)?;
    equal("stdout_digest", &hit.stdout_digest, &result.stdout_digest)?;
    let metadata = hit.execution_metadata.ok_or_else(|| fail("execution_metadata", "none"))?;
    let sent = result.execution_metadata.unwrap_or_default();
    // A server may add to the metadata, but not remove or change any.
    ensure(
        metadata.auxiliary_metadata.contains(&auxiliary),
        "auxiliary_metadata as sent",
        format!("{metadata:?}"),
    )?;
    let rest = ExecutedActionMetadata { auxiliary_metadata: sent.auxiliary_metadata.clone(), ..metadata };
    equal("execution_metadata", &rest, &sent)
}

async fn a_cache_policy_is_harmless(s: Session) -> Verdict {
    s.updates_results()?;
    for priority in [0, 7, -7] {
        s.case(format!("cache priority {priority}"), async {
            let action = s.fresh_action().await?;
            let request = UpdateActionResultRequest {
                instance_name: s.instance(),
                action_digest: Some(action.clone()),
                action_result: Some(s.a_result().await?),
                results_cache_policy: Some(ResultsCachePolicy { priority }),
                digest_function: s.function_number(),
            };
            let answer = s.action_cache().update_action_result(request).await;
            answer.wanted("the update is accepted")?;
            s.result(&action).await.needs("AC-08", "the result is a hit")?;
            Ok(())
        })
        .await?;
    }
    Ok(())
}
