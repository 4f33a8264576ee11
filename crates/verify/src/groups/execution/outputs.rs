//! EXE-47 to EXE-54: which outputs are collected, and under which paths.

use crate::{
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, inline},
    checks,
    job::Job,
    session::Session,
};
use gorego_reapi::proto::reapi::{ActionResult, Digest, symlink_absolute_path_strategy::Value as Strategy};
use std::time::Duration;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    output_paths_replace_the_old_lists => "EXE-47";
    paths_are_reported_to_the_letter => "EXE-48";
    each_output_is_reported_once => "EXE-49";
    an_output_that_was_not_made_is_left_out => "EXE-50";
    the_old_lists_ask_for_a_kind => "EXE-51";
    symlinks_are_reported_with_their_targets => "EXE-52", "EXE-53";
    absolute_output_symlinks_are_treated_as_the_capabilities_say => "EXE-52";
    outputs_and_logs_of_a_failure_are_stored_before_it_is_done => "EXE-54";
    a_fifo_is_no_output => "EXE-54";
];

/// The sorted paths of the files, directories and symlinks of a result.
fn listed(result: &ActionResult) -> [Vec<String>; 3] {
    let mut lists = [
        result.output_files.iter().map(|file| file.path.clone()).collect::<Vec<_>>(),
        result.output_directories.iter().map(|directory| directory.path.clone()).collect(),
        result.output_symlinks.iter().map(|link| link.path.clone()).collect(),
    ];
    lists.iter_mut().for_each(|list| list.sort_unstable());
    lists
}

/// Checks that exactly these outputs are reported.
fn outputs(result: &ActionResult, files: &[&str], directories: &[&str], symlinks: &[&str]) -> Verdict {
    let expected = [files, directories, symlinks]
        .map(|list| list.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>());
    equal("files, directories and symlinks", &listed(result), &expected)
}

async fn output_paths_replace_the_old_lists(s: Session) -> Verdict {
    let script =
        "echo > file; mkdir directory; echo > directory/inner; ln -s file link; echo > decoy; mkdir other";
    #[allow(deprecated)]
    let job = |paths: &[&str]| {
        Job::sh(&s, script).outputs(paths.iter().copied()).command(|command| {
            command.output_files = vec!["decoy".into()];
            command.output_directories = vec!["other".into()];
        })
    };
    s.case("a file and a directory", async {
        outputs(&job(&["directory", "file"]).result().await?, &["file"], &["directory"], &[])
    })
    .await?;
    s.case("a symlink too", async {
        let result = job(&["directory", "file", "link"]).result().await.needs("EXE-52")?;
        outputs(&result, &["file"], &["directory"], &["link"])
    })
    .await
}

async fn paths_are_reported_to_the_letter(s: Session) -> Verdict {
    let script = "mkdir -p 'a b/c' 'tree ü'; echo > 'a b/c/ünï cödé'; echo > 'tree ü/x'; echo > plain";
    let job = Job::sh(&s, script).outputs(["a b/c/ünï cödé", "plain", "tree ü"]);
    outputs(&job.result().await?, &["a b/c/ünï cödé", "plain"], &["tree ü"], &[])
}

async fn each_output_is_reported_once(s: Session) -> Verdict {
    let script = "mkdir -p d/e; echo > d/f; echo > d/e/g; ln -s f d/link; echo > unasked; ln -s d top";
    let job = Job::sh(&s, script).outputs(["d", "d/e", "d/f"]);
    outputs(&job.result().await?, &["d/f"], &["d", "d/e"], &[])
}

async fn an_output_that_was_not_made_is_left_out(s: Session) -> Verdict {
    for code in [0, 3] {
        s.case(format!("a command that exits with {code} and makes one of three outputs"), async {
            let script = format!("echo > made; exit {code}");
            let result = Job::sh(&s, script).outputs(["absent", "made", "not/there"]).result().await?;
            equal("exit_code", &result.exit_code, &code)?;
            outputs(&result, &["made"], &[], &[])
        })
        .await?;
    }
    Ok(())
}

#[allow(deprecated)]
async fn the_old_lists_ask_for_a_kind(s: Session) -> Verdict {
    let script = "echo > file; mkdir directory; echo > directory/inner";
    let old = |files: &[&str], directories: &[&str]| {
        let owned = |list: &[&str]| list.iter().map(|path| (*path).to_owned()).collect();
        Job::sh(&s, script).command(|command| {
            command.output_files = owned(files);
            command.output_directories = owned(directories);
        })
    };
    for (case, job) in [
        ("each path in the list of its kind", old(&["file"], &["directory"])),
        ("both paths in both lists", old(&["directory", "file"], &["directory", "file"])),
    ] {
        s.case(case, async { outputs(&job.result().await?, &["file"], &["directory"], &[]) }).await?;
    }
    for (what, job) in [
        ("a directory that was asked for as a file", old(&["directory"], &[])),
        ("a file that was asked for as a directory", old(&[], &["file"])),
    ] {
        s.case(what, async {
            let response = job.response().await?;
            inline("the response", response.status.as_ref(), &[Code::FailedPrecondition])
        })
        .await?;
    }
    Ok(())
}

async fn symlinks_are_reported_with_their_targets(s: Session) -> Verdict {
    let script = "mkdir d; echo > f; ln -s ./f file; ln -s d directory; ln -s nowhere/at/all dangling; ln -s d/../f round";
    let job = Job::sh(&s, script).outputs(["dangling", "directory", "file", "round"]);
    let result = job.result().await?;
    outputs(&result, &[], &[], &["dangling", "directory", "file", "round"])?;
    let mut targets: Vec<_> =
        result.output_symlinks.iter().map(|link| (link.path.as_str(), link.target.as_str())).collect();
    targets.sort_unstable();
    let expected =
        vec![("dangling", "nowhere/at/all"), ("directory", "d"), ("file", "./f"), ("round", "d/../f")];
    equal("targets", &targets, &expected)?;
    // Older clients read the two legacy lists, and newer clients read `output_symlinks` (EXE-53).
    #[allow(deprecated)]
    let old = result.output_file_symlinks.iter().chain(&result.output_directory_symlinks);
    let mut old: Vec<_> = old.map(|link| (link.path.as_str(), link.target.as_str())).collect();
    old.sort_unstable();
    equal("output_file_symlinks and output_directory_symlinks together", &old, &expected)
}

async fn absolute_output_symlinks_are_treated_as_the_capabilities_say(s: Session) -> Verdict {
    let job = Job::sh(&s, "ln -s /usr/bin/env link").outputs(["link"]);
    let response = job.response().await?;
    match s.cache()?.symlink_absolute_path_strategy() {
        Strategy::Allowed => {
            inline("an absolute output symlink under ALLOWED", response.status.as_ref(), &[Code::Ok])?;
            let links = response.result.unwrap_or_default().output_symlinks;
            let targets: Vec<_> = links.iter().map(|link| link.target.as_str()).collect();
            equal("targets", &targets, &vec!["/usr/bin/env"])
        }
        Strategy::Disallowed => {
            let refused = [Code::FailedPrecondition];
            inline("an absolute output symlink under DISALLOWED", response.status.as_ref(), &refused)
        }
        Strategy::Unknown => Err(fail("a symlink_absolute_path_strategy (CAP-14)", "UNKNOWN")),
    }
}

async fn outputs_and_logs_of_a_failure_are_stored_before_it_is_done(s: Session) -> Verdict {
    let word = s.word();
    let script = format!(
        "echo {word} file > file; echo {word} tool > tool; chmod 644 file; chmod 755 tool
         mkdir d; echo {word} inner > d/inner; echo {word} out; echo {word} err >&2; exit 3"
    );
    let result = Job::sh(&s, script).outputs(["d", "file", "tool"]).result().await?;
    equal("exit_code", &result.exit_code, &3)?;
    let mut digests: Vec<Digest> = Vec::new();
    for (file, executable) in [("file", false), ("tool", true)] {
        let found = result.output_files.iter().find(|one| one.path == file);
        let found =
            found.ok_or_else(|| fail(format!("{file} in output_files"), format!("{:?}", listed(&result))))?;
        equal(&format!("is_executable of {file}"), &found.is_executable, &executable)?;
        digests.extend(found.digest.clone());
    }
    digests.extend(result.output_directories.iter().filter_map(|directory| directory.tree_digest.clone()));
    digests.extend(result.stdout_digest.clone());
    digests.extend(result.stderr_digest.clone());
    equal("number of blobs", &digests.len(), &5)?;
    let missing = s.missing(&digests).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("blobs of the result that are missing", &missing, &Vec::new())?;
    for digest in &digests {
        s.case(format!("the blob {}", digest.hash), async {
            let read = s.read(digest).await.wanted("a blob of the result can be read")?;
            ensure(s.blob_of(read).digest == *digest, "the bytes of the digest", "other bytes")
        })
        .await?;
    }
    Ok(())
}

async fn a_fifo_is_no_output(s: Session) -> Verdict {
    let job = Job::sh(&s, "mkfifo fifo").outputs(["fifo"]).timeout(Duration::from_secs(10));
    let codes = [Code::InvalidArgument, Code::FailedPrecondition];
    job.refused("a FIFO as an output", &codes).await.map(drop)
}
