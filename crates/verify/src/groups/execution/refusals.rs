//! EXE-22 to EXE-32: refusals of missing blobs, malformed messages, platforms and timeouts.

use crate::{
    actions::metadata,
    blob::{Blob, tail},
    check::{Check, Step as _, Verdict, ensure, equal, fail, inline, show, show_inline},
    checks,
    job::{Folder, Job, Refusal, variable},
    session::Session,
};
use gorego_reapi::proto::{
    reapi::{
        Action, Directory, DirectoryNode, FileNode, SymlinkNode, execution_stage::Value as Stage,
        platform::Property,
    },
    rpc::PreconditionFailure,
};
use prost::Message as _;
use std::time::Duration;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    each_kind_of_missing_blob_is_a_failed_precondition => "EXE-22";
    subjects_of_missing_blobs_are_their_names => "EXE-23";
    missing_blobs_are_the_only_detail => "EXE-24";
    missing_inputs_are_reported_inside_the_response => "EXE-25";
    all_missing_inputs_are_listed_at_once => "EXE-26";
    malformed_actions_are_argument_errors => "EXE-27";
    malformed_directory_entries_are_refused => "EXE-28";
    paths_that_leave_the_input_root_are_refused => "EXE-29";
    unsorted_messages_are_refused_or_run => "EXE-30";
    a_platform_that_no_worker_has_is_refused_from_action_and_command => "EXE-31";
    a_negative_or_malformed_timeout_is_refused => "EXE-32";
];

/// The type URL of the detail with missing blobs (GEN-18).
const PRECONDITION_FAILURE: &str = "type.googleapis.com/google.rpc.PreconditionFailure";
/// How long a server may look for a worker before it reports that there is none. If it still waits then, it counts as
/// waiting.
const PLATFORM_PATIENCE: Duration = Duration::from_secs(5);

/// The subjects of all violations of the type `MISSING` in a refusal.
fn missing_subjects(refusal: &Refusal) -> Verdict<Vec<String>> {
    let mut subjects = Vec::new();
    for detail in &refusal.status.details {
        if detail.type_url != PRECONDITION_FAILURE {
            continue;
        }
        let failure = PreconditionFailure::decode(detail.value.as_slice())
            .map_err(|error| fail("a PreconditionFailure in the details", error))?;
        let missing = failure.violations.into_iter().filter(|violation| violation.r#type == "MISSING");
        subjects.extend(missing.map(|violation| violation.subject));
    }
    subjects.sort_unstable();
    Ok(subjects)
}

/// A job with a unique input file, subdirectory and Command, each of which can be omitted.
fn job(s: &Session) -> Job {
    let inner = Folder::new().file("inner", s.text(100).data);
    Job::sh(s, format!("exit 0 # {}", s.word()))
        .over(&Folder::new().file("file", s.text(100).data).folder("directory", inner))
}

/// Executes a job after storing all of its blobs but one.
async fn without(job: &Job, left_out: &Blob) -> Verdict<Refusal> {
    let s = job.session();
    s.runs_actions().await?;
    let blobs = job.blobs();
    let stored: Vec<_> = blobs.iter().filter(|blob| blob.digest != left_out.digest).collect();
    s.store(&stored).await?;
    let refusal = s.refusal(&job.digest()).await?;
    let what = "Execute without one of its blobs";
    inline(what, Some(&refusal.status), &[Code::FailedPrecondition]).needs("EXE-22")?;
    Ok(refusal)
}

fn subject(s: &Session, blob: &Blob) -> String {
    format!("blobs/{}", tail(s.function(), &blob.digest))
}

async fn each_kind_of_missing_blob_is_a_failed_precondition(s: Session) -> Verdict {
    // The kinds are in the order of [`Job::blobs`].
    let kinds =
        ["an input file", "a file below", "a Directory below", "the input root", "the Command", "the Action"];
    for (left_out, kind) in kinds.into_iter().enumerate() {
        s.case(format!("without {kind}"), async {
            let job = job(&s);
            let blobs = job.blobs();
            let Some(blob) = blobs.get(left_out) else { return Ok(()) };
            let refusal = without(&job, blob).await?;
            let subjects = missing_subjects(&refusal)?;
            let named = subjects.iter().any(|subject| subject.contains(&blob.digest.hash));
            let seen = format!("{} with {subjects:?}", show_inline(&refusal.status));
            let wanted = format!("a violation of type MISSING for {}", blob.digest.hash);
            ensure(named, wanted, seen)
        })
        .await?;
    }
    // With all blobs it runs.
    job(&s).stdout().await.control().map(drop)
}

async fn subjects_of_missing_blobs_are_their_names(s: Session) -> Verdict {
    let other = s.options().other_instance.clone().map(|instance| s.with_instance(instance));
    for s in std::iter::once(s).chain(other) {
        s.case(format!("instance {:?}", s.instance()), async {
            let job = job(&s);
            let Some(file) = job.blobs().into_iter().next() else { return Ok(()) };
            let subjects = missing_subjects(&without(&job, &file).await?)?;
            equal("subjects", &subjects, &vec![subject(&s, &file)])
        })
        .await?;
    }
    Ok(())
}

async fn missing_blobs_are_the_only_detail(s: Session) -> Verdict {
    let job = job(&s);
    let Some(file) = job.blobs().into_iter().next() else { return Ok(()) };
    let refusal = without(&job, &file).await?;
    let types: Vec<_> = refusal.status.details.iter().map(|detail| detail.type_url.clone()).collect();
    equal("details", &types, &vec![PRECONDITION_FAILURE.to_owned()])?;
    for detail in &refusal.status.details {
        let failure = PreconditionFailure::decode(detail.value.as_slice()).unwrap_or_default();
        let types: Vec<_> = failure.violations.iter().map(|violation| violation.r#type.as_str()).collect();
        let only = !types.is_empty() && types.iter().all(|name| *name == "MISSING");
        ensure(only, "violations of the type MISSING and no other", format!("{types:?}"))?;
    }
    Ok(())
}

async fn missing_inputs_are_reported_inside_the_response(s: Session) -> Verdict {
    // An input file and the Action itself: servers look up the latter before there is an operation.
    let (of_file, of_action) = (job(&s), job(&s));
    let left_out = [
        ("an input file", &of_file, of_file.blobs().into_iter().next()),
        ("the Action", &of_action, of_action.blobs().pop()),
    ];
    for (kind, job, blob) in left_out {
        s.case(format!("without {kind}"), async {
            let Some(blob) = blob else { return Ok(()) };
            let refusal = without(job, &blob).await?;
            ensure(refusal.inline, "missing blobs in ExecuteResponse.status", "in the status of the call")
        })
        .await?;
    }
    Ok(())
}

async fn all_missing_inputs_are_listed_at_once(s: Session) -> Verdict {
    s.runs_actions().await?;
    let mut root = Folder::new();
    let mut files = Vec::new();
    for directory in ["a", "b", "c"] {
        let mut folder = Folder::new();
        for file in 0..7 {
            let blob = s.text(100);
            folder = folder.file(&format!("f{file}"), blob.data.clone());
            files.push(blob);
        }
        root = root.folder(directory, folder);
    }
    let job = Job::sh(&s, "exit 0").over(&root);
    let blobs = job.blobs();
    let stored: Vec<_> =
        blobs.iter().filter(|blob| files.iter().all(|file| file.digest != blob.digest)).collect();
    s.store(&stored).await?;
    let refusal = s.refusal(&job.digest()).await?;
    let what = "Execute without its input files";
    inline(what, Some(&refusal.status), &[Code::FailedPrecondition]).needs("EXE-22")?;
    let mut expected: Vec<_> = files.iter().map(|file| subject(&s, file)).collect();
    expected.sort_unstable();
    let subjects = missing_subjects(&refusal)?;
    let seen = format!("{} of them: {}", subjects.len(), show_inline(&refusal.status));
    ensure(subjects == expected, format!("all {} missing files listed", files.len()), seen)
}

async fn malformed_actions_are_argument_errors(s: Session) -> Verdict {
    Job::sh(&s, "exit 0").stdout().await.control()?;
    let garbage = || s.blob_of([vec![0xff; 40], s.word().into_bytes()].concat());
    let invalid = &[Code::InvalidArgument];
    let refused = async |what: &str, action: Action, blobs: &[&Blob]| {
        s.case(what, async {
            let action = s.message(&action);
            s.store(blobs).await?;
            s.store(&[&action]).await?;
            let refusal = s.refusal(&action.digest).await?;
            inline("Execute", Some(&refusal.status), invalid)
        })
        .await
    };
    s.case("an Action that is no Action", async {
        let action = garbage();
        s.store(&[&action]).await?;
        let refusal = s.refusal(&action.digest).await?;
        inline("Execute", Some(&refusal.status), invalid)
    })
    .await?;

    let good = Job::sh(&s, "exit 0");
    let command_digest = Some(good.command_blob().digest);
    let command = good.command_blob();
    let bad = garbage();
    let with_bad = Action { command_digest: Some(bad.digest.clone()), ..good.action.clone() };
    refused("a Command that is no Command", with_bad, &[&bad]).await?;
    let with_bad = Action {
        command_digest: command_digest.clone(),
        input_root_digest: Some(bad.digest.clone()),
        ..good.action.clone()
    };
    refused("an input root that is no Directory", with_bad, &[&bad, &command]).await?;
    refused("an Action without command_digest", good.action.clone(), &[&command]).await?;
    let rootless = Action { command_digest, input_root_digest: None, ..good.action.clone() };
    refused("an Action without input_root_digest", rootless, &[&command]).await?;
    let nothing = Job::args::<String>(&s, []);
    nothing.refused("a Command without arguments", invalid).await?;
    Ok(())
}

async fn malformed_directory_entries_are_refused(s: Session) -> Verdict {
    let content = s.text(100);
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(content.digest.clone()),
        ..Default::default()
    };
    let link = |name: &str| SymlinkNode { name: name.to_owned(), target: "x".into(), ..Default::default() };
    let empty = |name: &str| DirectoryNode { name: name.to_owned(), digest: Some(s.empty().digest) };
    let files = |names: &[&str]| Directory {
        files: names.iter().map(|name| file(name)).collect(),
        ..Default::default()
    };
    let run = |root: &Directory| Job::sh(&s, "exit 0").over_root(root, [content.clone()]);
    run(&files(&["good"])).stdout().await.control()?;
    let twice = [
        files(&["x", "x"]),
        Directory { directories: vec![empty("x")], ..files(&["x"]) },
        Directory { symlinks: vec![link("x")], ..files(&["x"]) },
        Directory { directories: vec![empty("x")], symlinks: vec![link("x")], ..Default::default() },
    ];
    let names = ["", ".", "..", "a/b", "../escape", "/absolute", "nul\0"];
    let named = names.iter().flat_map(|name| {
        let directory = Directory { directories: vec![empty(name)], ..Default::default() };
        [files(&[name]), directory, Directory { symlinks: vec![link(name)], ..Default::default() }]
    });
    for root in twice.into_iter().chain(named) {
        let what = format!("an input root of {}", names_in(&root));
        run(&root).refused(&what, &[Code::InvalidArgument]).await?;
        // The check also covers a directory below the root.
        let inner = s.message(&root);
        let outer = Directory {
            directories: vec![DirectoryNode { name: "inner".into(), digest: Some(inner.digest.clone()) }],
            ..Default::default()
        };
        let below = Job::sh(&s, "exit 0").over_root(&outer, [content.clone(), inner]);
        below.refused(&format!("below the root, {what}"), &[Code::InvalidArgument]).await?;
    }
    Ok(())
}

fn names_in(directory: &Directory) -> String {
    let files = directory.files.iter().map(|node| format!("file {:?}", node.name));
    let directories = directory.directories.iter().map(|node| format!("directory {:?}", node.name));
    let symlinks = directory.symlinks.iter().map(|node| format!("symlink {:?}", node.name));
    files.chain(directories).chain(symlinks).collect::<Vec<_>>().join(" and ")
}

async fn paths_that_leave_the_input_root_are_refused(s: Session) -> Verdict {
    Job::sh(&s, "echo > out").outputs(["out"]).stdout().await.control()?;
    for path in ["/etc", "..", "../..", "a/../../.."] {
        let job = Job::sh(&s, "exit 0").within(path);
        job.refused(&format!("the working directory {path:?}"), &[Code::InvalidArgument]).await?;
    }
    for path in ["/etc/passwd", "..", "../out", "a/../../out"] {
        let job = Job::sh(&s, "exit 0").outputs([path]);
        job.refused(&format!("the output path {path:?}"), &[Code::InvalidArgument]).await?;
    }
    Ok(())
}

async fn unsorted_messages_are_refused_or_run(s: Session) -> Verdict {
    let content = s.text(100);
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(content.digest.clone()),
        ..Default::default()
    };
    let root = Directory { files: vec![file("b"), file("a")], ..Default::default() };
    let unsorted = vec![variable("PATH", "/bin"), variable("A", "1")];
    let environment = Job::sh(&s, "exit 0").command(|command| command.environment_variables = unsorted);
    let jobs = [
        ("environment_variables", environment),
        ("output_paths", Job::sh(&s, "exit 0").outputs(["b", "a"])),
        ("the files of a Directory", Job::sh(&s, "exit 0").over_root(&root, [content.clone()])),
    ];
    for (what, job) in jobs {
        s.case(format!("{what} not sorted"), async {
            job.upload().await?;
            let run = s.start(s.execute_request(&job.digest())).await;
            let answer = match run {
                Ok(run) => run.finish().await?,
                Err(status) => {
                    let refused = status.code() == Code::InvalidArgument;
                    ensure(refused, "INVALID_ARGUMENT, or a run", show(&status))?;
                    return Ok(());
                }
            };
            let refused = [Code::Ok, Code::InvalidArgument];
            inline("the response", answer.status.as_ref(), &refused)?;
            if let Some(result) = answer.result {
                equal("exit_code", &result.exit_code, &0)?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_platform_that_no_worker_has_is_refused_from_action_and_command(s: Session) -> Verdict {
    Job::sh(&s, "exit 0").stdout().await.control()?;
    let mut platform = s.platform().unwrap_or_default();
    platform.properties.retain(|property| property.name != "OSFamily");
    platform.properties.push(Property { name: "OSFamily".into(), value: "plan9".into() });
    platform.properties.sort_by(|a, b| a.name.cmp(&b.name));
    let in_action = Job::sh(&s, "exit 0").action(|action| action.platform = Some(platform.clone()));
    #[allow(deprecated)]
    let in_command = Job::sh(&s, "exit 0")
        .action(|action| action.platform = None)
        .command(|command| command.platform = Some(platform));
    for (place, job) in [("Action", in_action), ("Command", in_command)] {
        s.case(format!("OSFamily=plan9 in the platform of the {place}"), async {
            let Some(refusal) = refusal_or_wait(&job).await? else { return Ok(()) };
            let codes = [Code::FailedPrecondition, Code::InvalidArgument, Code::Unavailable];
            inline("Execute", Some(&refusal.status), &codes)?;
            let missing = missing_subjects(&refusal)?;
            ensure(missing.is_empty(), "no MISSING violation", format!("{missing:?}"))
        })
        .await?;
    }
    Ok(())
}

/// Executes an action that no worker can run. Returns the refusal, or `None` if it waits for a suitable worker.
async fn refusal_or_wait(job: &Job) -> Verdict<Option<Refusal>> {
    let s = job.session();
    job.upload().await?;
    let mut name = String::new();
    let refusal = s.refusal_after(s.execute_request(&job.digest()), |operation| {
        let executing = metadata(&operation)?.stage == i32::from(Stage::Executing);
        ensure(!executing, "a refusal", "the action is executing")?;
        name = operation.name;
        Ok(())
    });
    let answer = tokio::time::timeout(PLATFORM_PATIENCE, refusal).await;
    match answer {
        Ok(answer) => answer.map(Some),
        Err(_) => {
            s.give_up(&name).await;
            Ok(None)
        }
    }
}

async fn a_negative_or_malformed_timeout_is_refused(s: Session) -> Verdict {
    Job::sh(&s, "exit 0").stdout().await.control()?;
    Job::sh(&s, "exit 0").timeout(Duration::from_secs(10)).stdout().await.control()?;
    let job = |seconds, nanos| {
        let timeout = prost_types::Duration { seconds, nanos };
        Job::sh(&s, "exit 0").action(|action| action.timeout = Some(timeout))
    };
    for (seconds, nanos) in [(-1, 0), (0, -1), (1, 2_000_000_000), (1, -1), (i64::MAX, 0)] {
        let what = format!("a timeout of {seconds} s and {nanos} ns");
        job(seconds, nanos).refused(&what, &[Code::InvalidArgument]).await?;
    }
    Ok(())
}
