//! Scenarios for the action cache and the capabilities.

use super::seed;
use crate::{
    Target,
    drive::{Call, Workload, message, prepared, ready},
    figures::Work,
    noise::Noise,
    target::{FUNCTION, refused},
};
use gorego_reapi::{digest::Digest, error::Result, proto::reapi};
use std::sync::Arc;
use tonic::Code;

/// Results that are read again and again.
const RESULTS: usize = 1_000;
/// The work of a call that reads or writes one result.
const ONE: Work = Work { units: 1, bytes: 0 };

pub(super) async fn capabilities(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let target = target.clone();
    Ok(ready(move |_| {
        let target = target.clone();
        async move {
            let request = reapi::GetCapabilitiesRequest { instance_name: target.instance.clone() };
            let answer = target.capabilities().get_capabilities(request).await;
            answer.map_err(|status| message("GetCapabilities", &status))?;
            Ok(ONE)
        }
    }))
}

/// A result with three stored outputs.
async fn result(target: &Target) -> Result<reapi::ActionResult> {
    let mut noise = Noise::new(seed());
    let digests = target.upload((0..3).map(|_| noise.bytes(1_000))).await?;
    let file = |(at, digest): (usize, &Digest)| reapi::OutputFile {
        path: format!("out/file-{at}"),
        digest: Some(digest.to_wire()),
        ..Default::default()
    };
    Ok(reapi::ActionResult {
        output_files: digests.iter().enumerate().map(file).collect(),
        ..Default::default()
    })
}

/// A new action, whose blobs are stored.
async fn actions(target: &Target, seed: u64, numbers: std::ops::Range<u64>) -> Result<Vec<Digest>> {
    let root = Digest::empty(FUNCTION);
    let command = super::execute::command(&["/bin/true"], &[]);
    let command = target.upload([command]).await?[0];
    let encode = |number| super::execute::action(command, root, &format!("{seed:x}-{number}"));
    target.upload(numbers.map(encode)).await
}

fn update_request(
    target: &Target,
    action: Digest,
    result: reapi::ActionResult,
) -> reapi::UpdateActionResultRequest {
    reapi::UpdateActionResultRequest {
        instance_name: target.instance.clone(),
        action_digest: Some(action.to_wire()),
        action_result: Some(result),
        ..Default::default()
    }
}

fn get_request(target: &Target, action: Digest) -> reapi::GetActionResultRequest {
    reapi::GetActionResultRequest {
        instance_name: target.instance.clone(),
        action_digest: Some(action.to_wire()),
        ..Default::default()
    }
}

pub(super) async fn hit(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let result = result(target).await?;
    let actions = actions(target, seed(), 0..RESULTS as u64).await?;
    for action in &actions {
        let answer =
            target.action_cache().update_action_result(update_request(target, *action, result.clone())).await;
        answer.map_err(|status| refused("UpdateActionResult", &status))?;
    }
    let (target, actions, outputs) = (target.clone(), Arc::new(actions), Arc::new(result.output_files));
    Ok(ready(move |number| {
        let (target, actions, outputs) = (target.clone(), actions.clone(), outputs.clone());
        async move {
            let request = get_request(&target, actions[number as usize % RESULTS]);
            let answer = target.action_cache().get_action_result(request).await;
            let answer = answer.map_err(|status| message("GetActionResult", &status))?.into_inner();
            if answer.output_files != *outputs {
                return Err("GetActionResult gave another result".into());
            }
            Ok(ONE)
        }
    }))
}

pub(super) async fn miss(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (target, seed) = (target.clone(), seed());
    Ok(ready(move |number| {
        let target = target.clone();
        async move {
            let action = FUNCTION.digest(format!("{seed:x}-{number}").as_bytes());
            match target.action_cache().get_action_result(get_request(&target, action)).await {
                Err(status) if status.code() == Code::NotFound => Ok(ONE),
                Err(status) => Err(message("GetActionResult", &status)),
                Ok(_) => Err("GetActionResult gave a result that was never stored".into()),
            }
        }
    }))
}

pub(super) async fn update(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (result, seed) = (result(target).await?, seed());
    let target = target.clone();
    Ok(prepared(move |number| {
        let (target, result) = (target.clone(), result.clone());
        async move {
            let action = actions(&target, seed, number..number + 1).await?[0];
            let request = update_request(&target, action, result);
            Ok(Call::new(async move {
                let answer = target.action_cache().update_action_result(request).await;
                answer.map_err(|status| message("UpdateActionResult", &status))?;
                Ok(ONE)
            }))
        }
    }))
}
