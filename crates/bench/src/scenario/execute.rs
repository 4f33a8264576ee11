//! Scenarios with actions that run.

use super::seed;
use crate::{
    Target,
    drive::{Call, Workload, message, prepared, ready, unusable},
    figures::Work,
    noise::Noise,
};
use bytes::Bytes;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    proto::reapi,
};
use prost::Message as _;

/// Directories and files of an input tree.
const TREE_DIRECTORIES: usize = 50;
const FILES_PER_DIRECTORY: usize = 20;
/// Clients that ask for the same action at the same time.
const IDENTICAL: u64 = 16;
/// Files that the command of `execute-outputs` writes.
pub(super) const OUTPUTS: usize = 200;
/// Bytes of each of them.
const OUTPUT_BYTES: u64 = 4096;

/// Encodes a Command that runs these arguments and declares these output paths.
pub(super) fn command(arguments: &[&str], outputs: &[&str]) -> Bytes {
    let own = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let path = reapi::command::EnvironmentVariable { name: "PATH".into(), value: "/usr/bin:/bin".into() };
    let command = reapi::Command {
        arguments: own(arguments),
        environment_variables: vec![path],
        output_paths: own(outputs),
        ..Default::default()
    };
    command.encode_to_vec().into()
}

/// An encoded Action. The salt makes it unique.
pub(super) fn action(command: Digest, root: Digest, salt: &str) -> Bytes {
    let action = reapi::Action {
        command_digest: Some(command.to_wire()),
        input_root_digest: Some(root.to_wire()),
        salt: salt.to_owned().into(),
        ..Default::default()
    };
    action.encode_to_vec().into()
}

async fn one(target: &Target, blob: Bytes) -> Result<Digest> {
    target.upload([blob]).await?.pop().ok_or_else(|| unusable("no digest"))
}

/// Runs an action to its end and checks that it succeeded.
async fn run(
    target: Target,
    action: Digest,
    looks_up: bool,
) -> std::result::Result<reapi::ActionResult, String> {
    let request = reapi::ExecuteRequest {
        instance_name: target.instance.clone(),
        action_digest: Some(action.to_wire()),
        skip_cache_lookup: !looks_up,
        ..Default::default()
    };
    let failed = |status: tonic::Status| message("Execute", &status);
    let mut stream = target.execution().execute(request).await.map_err(failed)?.into_inner();
    let mut last = None;
    while let Some(operation) = stream.message().await.map_err(failed)? {
        last = Some(operation);
    }
    let result = last.filter(|operation| operation.done).and_then(|operation| operation.result);
    let Some(gorego_reapi::proto::longrunning::operation::Result::Response(response)) = result else {
        return Err("Execute ended without a response".into());
    };
    let response =
        reapi::ExecuteResponse::decode(&*response.value).map_err(|_| "Execute gave no response")?;
    if let Some(status) = response.status.filter(|status| status.code != 0) {
        return Err(format!("Execute: {}", status.message));
    }
    match response.result {
        Some(result) if result.exit_code == 0 => Ok(result),
        Some(result) => Err(format!("the command exited with {}", result.exit_code)),
        None => Err("Execute gave no result".into()),
    }
}

/// A workload of actions, each with this command and with the input root that `root` returns for its number.
fn runs<R>(
    target: &Target,
    command: Digest,
    root: impl Fn(u64) -> R + Send + Sync + 'static,
    check: fn(&reapi::ActionResult) -> std::result::Result<Work, String>,
) -> Box<dyn Workload>
where
    R: Future<Output = Result<Digest>> + Send + 'static,
{
    let (target, seed) = (target.clone(), seed());
    prepared(move |number| {
        let (target, root) = (target.clone(), root(number));
        async move {
            let salt = format!("{seed:x}-{number}");
            let action = one(&target, action(command, root.await?, &salt)).await?;
            Ok(Call::new(async move { check(&run(target, action, false).await?) }))
        }
    })
}

fn ran(_: &reapi::ActionResult) -> std::result::Result<Work, String> {
    Ok(Work { units: 1, bytes: 0 })
}

/// The digest of an empty directory, which is stored.
async fn empty_root(target: &Target) -> Result<Digest> {
    one(target, Bytes::new()).await
}

pub(super) async fn plain(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let root = empty_root(target).await?;
    let command = one(target, command(&["/bin/true"], &[])).await?;
    Ok(runs(target, command, move |_| async move { Ok(root) }, ran))
}

pub(super) async fn cached(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let root = empty_root(target).await?;
    let command = one(target, command(&["/bin/true"], &[])).await?;
    let action = one(target, action(command, root, &format!("{:x}", seed()))).await?;
    run(target.clone(), action, true).await.map_err(Error::Unavailable)?;
    let target = target.clone();
    Ok(ready(move |_| {
        let target = target.clone();
        async move { ran(&run(target, action, true).await?) }
    }))
}

fn directory(files: Vec<(String, Digest)>, directories: Vec<(String, Digest)>) -> Bytes {
    let directory = reapi::Directory {
        files: files
            .into_iter()
            .map(|(name, digest)| reapi::FileNode {
                name,
                digest: Some(digest.to_wire()),
                ..Default::default()
            })
            .collect(),
        directories: directories
            .into_iter()
            .map(|(name, digest)| reapi::DirectoryNode { name, digest: Some(digest.to_wire()) })
            .collect(),
        ..Default::default()
    };
    directory.encode_to_vec().into()
}

/// Uploads the subdirectories of an input tree.
async fn subtrees(target: &Target) -> Result<Vec<(String, Digest)>> {
    let mut noise = Noise::new(seed());
    let count = TREE_DIRECTORIES * FILES_PER_DIRECTORY;
    let files = target.upload((0..count).map(|_| noise.bytes(1_000)).collect::<Vec<_>>()).await?;
    let directories = files.chunks(FILES_PER_DIRECTORY).map(|files| {
        directory(
            files.iter().enumerate().map(|(at, digest)| (format!("file-{at:03}"), *digest)).collect(),
            vec![],
        )
    });
    let digests = target.upload(directories.collect::<Vec<_>>()).await?;
    Ok(digests.into_iter().enumerate().map(|(at, digest)| (format!("dir-{at:03}"), digest)).collect())
}

pub(super) async fn tree(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let root = one(target, directory(vec![], subtrees(target).await?)).await?;
    let command = one(target, command(&["/bin/true"], &[])).await?;
    Ok(runs(target, command, move |_| async move { Ok(root) }, ran))
}

pub(super) async fn changed_tree(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let (subtrees, seed) = (subtrees(target).await?, seed());
    let command = one(target, command(&["/bin/true"], &[])).await?;
    let own = target.clone();
    let root = move |number| {
        let (target, mut directories) = (own.clone(), subtrees.clone());
        async move {
            let changed = one(&target, format!("{seed:x} {number}").into_bytes().into()).await?;
            let inner = one(&target, directory(vec![("changed".into(), changed)], vec![])).await?;
            directories.push(("own".into(), inner));
            one(&target, directory(vec![], directories)).await
        }
    };
    Ok(runs(target, command, root, ran))
}

pub(super) async fn outputs(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let root = empty_root(target).await?;
    let script = format!(
        "mkdir -p out; read -r salt < /proc/sys/kernel/random/uuid; i=0; while [ $i -lt {OUTPUTS} ]; do \
         printf '%{OUTPUT_BYTES}s' \"$i $salt\" > out/$i; i=$((i+1)); done"
    );
    let command = one(target, command(&["/bin/sh", "-c", &script], &["out"])).await?;
    let check = |result: &reapi::ActionResult| match result.output_directories.len() {
        1 => Ok(Work { units: 1, bytes: OUTPUTS as u64 * OUTPUT_BYTES }),
        _ => Err("the output directory is missing".into()),
    };
    Ok(runs(target, command, move |_| async move { Ok(root) }, check))
}

pub(super) async fn identical(target: &Target, _: usize) -> Result<Box<dyn Workload>> {
    let root = empty_root(target).await?;
    let command = one(target, command(&["/bin/sleep", "0.01"], &[])).await?;
    let (target, seed) = (target.clone(), seed());
    Ok(prepared(move |number| {
        let target = target.clone();
        async move {
            let salt = format!("{seed:x}-{}", number / IDENTICAL);
            let action = one(&target, action(command, root, &salt)).await?;
            Ok(Call::new(async move { ran(&run(target, action, true).await?) }))
        }
    }))
}
