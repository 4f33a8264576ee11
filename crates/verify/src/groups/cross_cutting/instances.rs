//! GEN-12 to GEN-15: instance names, and the isolation of instances.

use crate::{
    actions::result_of,
    check::{Answer as _, Check, Step as _, Verdict, absent, ensure, equal, inline, skipped},
    checks,
    session::Session,
};
use gorego_reapi::proto::{longrunning::GetOperationRequest, reapi::GetCapabilitiesRequest};
use tonic::{Code, Status};

pub(crate) const CHECKS: &[Check] = checks![
    messages_and_resource_names_mean_the_same_instance => "GEN-12", "BS-01";
    instance_names_of_several_segments_work => "GEN-12", "BS-01";
    malformed_instance_names_are_refused => "GEN-13";
    an_unknown_instance_is_refused_by_every_call => "GEN-14";
    blobs_of_one_instance_are_not_seen_in_another => "GEN-15";
    results_of_one_instance_are_not_seen_in_another => "GEN-15";
    operations_of_one_instance_are_not_named_alike_in_another => "GEN-15";
];

async fn capabilities(s: &Session, instance_name: &str) -> Result<(), Status> {
    let request = GetCapabilitiesRequest { instance_name: instance_name.to_owned() };
    s.capabilities_client().get_capabilities(request).await.map(drop)
}

/// Uploads and reads a blob both by batch and by ByteStream, in both combinations.
async fn round_trip(s: &Session) -> Verdict {
    let (streamed, batched) = (s.blob(100), s.blob(100));
    let committed = s.write(&streamed).await.wanted("Write is accepted under this instance")?;
    equal("committed_size", &committed, &streamed.digest.size_bytes)?;
    s.store(&[&batched]).await?;
    let asked = [streamed.digest.clone(), batched.digest.clone()];
    let missing = s.missing(&asked).await.wanted("FindMissingBlobs answers under this instance")?;
    equal("missing_blob_digests", &missing, &Vec::new())?;
    let read = s.read(&batched.digest).await.wanted("what came in by a batch is read by name")?;
    ensure(read == batched.data, "the bytes that were uploaded", "others")
}

async fn messages_and_resource_names_mean_the_same_instance(s: Session) -> Verdict {
    round_trip(&s).await
}

async fn instance_names_of_several_segments_work(s: Session) -> Verdict {
    let named = [Some(&s.options().instance), s.options().other_instance.as_ref()];
    let long = named.into_iter().flatten().find(|name| name.contains('/'));
    let name = match long {
        Some(name) => name.clone(),
        None if capabilities(&s, "a/b/c").await.is_ok() => "a/b/c".to_owned(),
        None => {
            return Err(skipped("no instance with a slash in its name: name one with --other-instance"));
        }
    };
    round_trip(&s.with_instance(name)).await
}

async fn malformed_instance_names_are_refused(s: Session) -> Verdict {
    capabilities(&s, &s.instance()).await.control("the instance of the run has capabilities")?;
    for name in ["blobs", "x/uploads", "/x", "x/", "x//y", "a/compressed-blobs/b", "operations"] {
        let answer = capabilities(&s, name).await;
        answer.refused(&format!("GetCapabilities of the instance \"{name}\""), &[Code::InvalidArgument])?;
        let answer = s.with_instance(name).missing(&[s.unknown()]).await;
        answer.refused(&format!("FindMissingBlobs of the instance \"{name}\""), &[Code::InvalidArgument])?;
    }
    Ok(())
}

async fn an_unknown_instance_is_refused_by_every_call(s: Session) -> Verdict {
    let nowhere = s.with_instance(format!("gorego-verify-{}", s.word()));
    if capabilities(&s, &nowhere.instance()).await.is_ok() {
        return Err(absent("the server takes every instance name"));
    }
    let stored = s.stored(100).await?.digest;
    let codes = [Code::InvalidArgument, Code::PermissionDenied, Code::Unauthenticated];
    let wider = [Code::InvalidArgument, Code::PermissionDenied, Code::Unauthenticated, Code::NotFound];
    let asked = std::slice::from_ref(&stored);
    // Clients would interpret NOT_FOUND from these two as a cache miss.
    nowhere.result(&stored).await.refused("GetActionResult of an unknown instance", &codes)?;
    nowhere.read(&stored).await.refused("Read of an unknown instance", &codes)?;
    let answer = capabilities(&s, &nowhere.instance()).await;
    answer.refused("GetCapabilities of an unknown instance", &wider)?;
    nowhere.missing(asked).await.refused("FindMissingBlobs of an unknown instance", &wider)?;
    nowhere.batch_read(asked, &[]).await.refused("BatchReadBlobs of an unknown instance", &wider)?;
    nowhere.update(&[&s.blob(100)]).await.refused("BatchUpdateBlobs of an unknown instance", &wider)?;
    nowhere.write(&s.blob(100)).await.refused("Write of an unknown instance", &wider)?;
    if s.executes().is_ok() {
        // The status may end the call, or may be inline at the end of the stream.
        let refusal = nowhere.refusal(&stored).await.own()?;
        inline("Execute of an unknown instance", Some(&refusal.status), &codes)?;
    }
    Ok(())
}

/// The other instance of the run.
fn other(s: &Session) -> Verdict<Session> {
    let name = s.options().other_instance.as_ref();
    let name = name.ok_or_else(|| {
        skipped("needs a second instance that does not share its store: name it with --other-instance")
    })?;
    Ok(s.with_instance(name.clone()))
}

async fn blobs_of_one_instance_are_not_seen_in_another(s: Session) -> Verdict {
    let other = other(&s)?;
    let blob = s.stored(100).await?;
    let asked = std::slice::from_ref(&blob.digest);
    let missing = other.missing(asked).await.wanted("FindMissingBlobs answers in the other instance")?;
    equal("missing there", &missing, &asked.to_vec())?;
    other.read(&blob.digest).await.refused("Read in the other instance", &[Code::NotFound])?;
    Ok(())
}

async fn results_of_one_instance_are_not_seen_in_another(s: Session) -> Verdict {
    let other = other(&s)?;
    s.updates_results()?;
    let action = s.fresh_action().await?;
    s.update_result(&action, s.a_result().await?).await.needs("AC-08", "the result is stored")?;
    s.result(&action).await.needs("AC-08", "the result is a hit in its own instance")?;
    other.result(&action).await.refused("GetActionResult in the other instance", &[Code::NotFound])?;
    Ok(())
}

async fn operations_of_one_instance_are_not_named_alike_in_another(s: Session) -> Verdict {
    let other = other(&s)?;
    s.runs_actions().await?;
    let action = s.action(&s.shell("true", &[]), &s.empty().digest).await?;
    let mut run = s.start(s.execute_request(&action)).await.wanted("Execute is accepted")?;
    let last = run.until("done", |operation| operation.done).await?;
    result_of(crate::actions::response(&last)?)?;
    let (own, foreign) = (s.qualify(""), other.qualify(""));
    let id = last.name.strip_prefix(&own).unwrap_or(&last.name);
    let name = format!("{foreign}{id}");
    if name == last.name {
        return Err(skipped("operation names do not show their instance"));
    }
    let answer = s.operations().get_operation(GetOperationRequest { name }).await;
    let codes = [Code::NotFound, Code::InvalidArgument, Code::PermissionDenied, Code::Unimplemented];
    answer.refused("GetOperation of it under the other instance", &codes)?;
    Ok(())
}
