//! AC-01 to AC-03, AC-11, AC-13: when a result is a hit.

use crate::{
    blob::{Blob, another_hash},
    check::{Answer as _, Check, Verdict, equal},
    checks,
    session::Session,
};
use gorego_reapi::{
    digest::DigestFunction,
    proto::reapi::{
        ActionResult, Digest, Directory, DirectoryNode, FileNode, OutputDirectory, OutputFile, Tree,
    },
};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    a_miss_is_not_found => "AC-01";
    every_part_of_the_key_counts => "AC-02";
    a_result_with_all_of_its_blobs_is_a_hit => "AC-03";
    an_absent_output_file_makes_a_miss => "AC-03", "AC-11";
    an_absent_tree_makes_a_miss => "AC-03", "AC-11";
    an_absent_file_within_a_tree_makes_a_miss => "AC-03", "AC-11";
    an_absent_file_deep_in_a_tree_makes_a_miss => "AC-03", "AC-11";
    an_absent_root_directory_makes_a_miss => "AC-03", "AC-11";
    an_absent_directory_below_the_root_makes_a_miss => "AC-03", "AC-11";
    absent_stdout_makes_a_miss => "AC-03", "AC-11";
    absent_stderr_makes_a_miss => "AC-03", "AC-11";
    a_failed_result_is_no_success => "AC-13";
];

/// How a server refuses a result whose blobs are missing (AC-11).
const REFUSED: &[Code] = &[Code::FailedPrecondition, Code::InvalidArgument, Code::NotFound];

async fn a_miss_is_not_found(s: Session) -> Verdict {
    s.cache()?;
    s.result(&s.unknown()).await.refused("GetActionResult of an unknown action", &[Code::NotFound])?;
    // The same if the Action itself is stored.
    let action = s.fresh_action().await?;
    s.result(&action).await.refused("GetActionResult of an action that never ran", &[Code::NotFound])?;
    Ok(())
}

async fn every_part_of_the_key_counts(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    s.update_result(&action, s.a_result().await?).await.needs("AC-08", "the result is stored")?;
    s.result(&action).await.needs("AC-08", "the result is a hit")?;
    let misses = [Code::NotFound, Code::InvalidArgument];
    let longer = Digest { size_bytes: action.size_bytes + 1, ..action.clone() };
    s.result(&longer).await.refused("the same hash with another size", &misses)?;
    s.result(&another_hash(&action)).await.refused("another hash with the same size", &misses)?;
    // A function with hashes of the same length, which only the function number distinguishes.
    let same_length =
        |other: &DigestFunction| *other != s.function() && other.hash_bytes() == s.function().hash_bytes();
    for other in s.functions().into_iter().filter(same_length) {
        let answer = s.with_function(other).result(&action).await;
        answer.refused(&format!("the same digest as one of {}", other.name()), &misses)?;
    }
    Ok(())
}

/// The blob of a result that is not stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MissingBlob {
    Nothing,
    File,
    Tree,
    FileInTree,
    FileDeepInTree,
    RootDirectory,
    DirectoryBelow,
    Stdout,
    Stderr,
}

/// Stores this blob unless it is the lost one.
async fn keep(s: &Session, blob: Blob, part: MissingBlob, lost: MissingBlob) -> Verdict<Option<Digest>> {
    if part != lost {
        s.store(&[&blob]).await?;
    }
    Ok(Some(blob.digest))
}

/// A result with a file, a directory, stdout and stderr. All blobs but one are stored. Its directory is a Tree unless
/// the lost blob belongs to the other representation.
async fn result_without(s: &Session, lost: MissingBlob) -> Verdict<ActionResult> {
    let file = |name: &str, digest| FileNode { name: name.into(), digest, ..Default::default() };
    let deep = keep(s, s.blob(100), MissingBlob::FileDeepInTree, lost).await?;
    let below = Directory { files: vec![file("deep", deep)], ..Default::default() };
    let digest = keep(s, s.message(&below), MissingBlob::DirectoryBelow, lost).await?;
    let shallow = keep(s, s.blob(100), MissingBlob::FileInTree, lost).await?;
    let root = Directory {
        files: vec![file("shallow", shallow)],
        directories: vec![DirectoryNode { name: "below".into(), digest }],
        ..Default::default()
    };
    let root_directory_digest = keep(s, s.message(&root), MissingBlob::RootDirectory, lost).await?;
    let tree = Tree { root: Some(root), children: vec![below] };
    let tree_digest = keep(s, s.message(&tree), MissingBlob::Tree, lost).await?;
    let directory = match lost {
        MissingBlob::RootDirectory | MissingBlob::DirectoryBelow => {
            OutputDirectory { root_directory_digest, ..Default::default() }
        }
        _ => OutputDirectory { tree_digest, ..Default::default() },
    };
    let digest = keep(s, s.blob(100), MissingBlob::File, lost).await?;
    Ok(ActionResult {
        output_files: vec![OutputFile { path: "f".into(), digest, ..Default::default() }],
        output_directories: vec![OutputDirectory { path: "d".into(), ..directory }],
        stdout_digest: keep(s, s.blob(100), MissingBlob::Stdout, lost).await?,
        stderr_digest: keep(s, s.blob(100), MissingBlob::Stderr, lost).await?,
        ..Default::default()
    })
}

/// A complete result is a hit. The same result without one blob is either refused, or stored and then a miss.
async fn loss_makes_a_miss(s: &Session, what: &str, lost: MissingBlob) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    let complete = result_without(s, MissingBlob::Nothing).await?;
    s.update_result(&action, complete).await.needs("AC-08", "a complete result is stored")?;
    s.result(&action).await.needs("AC-08", "a complete result is a hit")?;
    let action = s.fresh_action().await?;
    let incomplete = result_without(s, lost).await?;
    s.update_result(&action, incomplete).await.or_refused("UpdateActionResult of it", REFUSED)?;
    let expected = format!("GetActionResult of a result with {what}");
    s.result(&action).await.refused(&expected, &[Code::NotFound]).map(drop)
}

async fn a_result_with_all_of_its_blobs_is_a_hit(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    let stored = result_without(&s, MissingBlob::Nothing).await?;
    s.update_result(&action, stored.clone()).await.needs("AC-08", "a complete result is stored")?;
    let hit = s.result(&action).await.needs("AC-08", "a complete result is a hit")?;
    equal("output_files", &hit.output_files, &stored.output_files)?;
    equal("output_directories", &hit.output_directories, &stored.output_directories)?;
    equal("stdout_digest", &hit.stdout_digest, &stored.stdout_digest)?;
    equal("stderr_digest", &hit.stderr_digest, &stored.stderr_digest)
}

async fn an_absent_output_file_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent output file", MissingBlob::File).await
}

async fn an_absent_tree_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent Tree", MissingBlob::Tree).await
}

async fn an_absent_file_within_a_tree_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent file in the root of a Tree", MissingBlob::FileInTree).await
}

async fn an_absent_file_deep_in_a_tree_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent file in a child of a Tree", MissingBlob::FileDeepInTree).await
}

async fn an_absent_root_directory_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent root_directory_digest", MissingBlob::RootDirectory).await
}

async fn an_absent_directory_below_the_root_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "an absent Directory below root_directory_digest", MissingBlob::DirectoryBelow)
        .await
}

async fn absent_stdout_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "absent stdout", MissingBlob::Stdout).await
}

async fn absent_stderr_makes_a_miss(s: Session) -> Verdict {
    loss_makes_a_miss(&s, "absent stderr", MissingBlob::Stderr).await
}

async fn a_failed_result_is_no_success(s: Session) -> Verdict {
    s.updates_results()?;
    let action = s.fresh_action().await?;
    let result = ActionResult { exit_code: 1, ..s.a_result().await? };
    s.update_result(&action, result).await.or_refused("UpdateActionResult of a failed result", REFUSED)?;
    let served = s.result(&action).await.or_refused("GetActionResult of it", &[Code::NotFound])?;
    served.map_or(Ok(()), |served| equal("exit_code", &served.exit_code, &1))
}
