//! EXE-33 to EXE-39: the directory tree in which a command starts.

use crate::{
    check::{Answer as _, Check, Step as _, Verdict, absent, ensure, equal, fail, inline},
    checks,
    job::{Folder, Job},
    session::Session,
};
use gorego_reapi::proto::reapi::{
    Directory, FileNode, NodeProperties, NodeProperty, symlink_absolute_path_strategy::Value as Strategy,
};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    the_input_root_is_reproduced_and_holds_nothing_else => "EXE-33";
    only_executable_inputs_can_be_run => "EXE-34";
    symlinks_have_their_exact_targets => "EXE-35";
    absolute_symlinks_are_treated_as_the_capabilities_say => "EXE-36";
    unknown_node_properties_of_inputs_do_no_harm => "EXE-37";
    advertised_node_properties_of_inputs_are_applied => "EXE-37";
    parents_of_outputs_exist_and_outputs_do_not => "EXE-38";
    commands_run_in_their_working_directory => "EXE-39";
];

/// Lists everything below the current directory, with the kind of each node and the hash of its content.
const LIST: &str = r#"
list() {
  for entry in "$1"/* "$1"/.[!.]*; do
    if [ -L "$entry" ]; then echo "link ${entry#./} $(readlink "$entry")"
    elif [ -d "$entry" ]; then echo "directory ${entry#./}"; list "$entry"
    elif [ -f "$entry" ]; then set -- "$1" $(sha256sum < "$entry"); echo "file ${entry#./} $2"
    elif [ -e "$entry" ]; then echo "other ${entry#./}"
    fi
  done
}
list ."#;

fn sha256(bytes: &[u8]) -> String {
    gorego_reapi::digest::DigestFunction::Sha256.digest(bytes).to_wire().hash
}

async fn the_input_root_is_reproduced_and_holds_nothing_else(s: Session) -> Verdict {
    let (one, two) = (s.text(100).data, s.blob(20_000).data);
    let deep = Folder::new().file("with space", two.clone()).folder("nothing", Folder::new());
    let root = Folder::new()
        .file(".hidden", one.clone())
        .file("empty", "")
        .file("ünï", one.clone())
        .folder("vacant", Folder::new())
        .folder("a", Folder::new().folder("b", deep))
        .symlink("link", "a/b");
    let printed = Job::sh(&s, LIST).over(&root).stdout().await?;
    let mut listed: Vec<_> = printed.lines().map(str::to_owned).collect();
    listed.sort_unstable();
    let mut expected = vec![
        format!("file .hidden {}", sha256(&one)),
        format!("file empty {}", sha256(b"")),
        format!("file ünï {}", sha256(&one)),
        "directory vacant".to_owned(),
        "directory a".to_owned(),
        "directory a/b".to_owned(),
        "directory a/b/nothing".to_owned(),
        format!("file a/b/with space {}", sha256(&two)),
        "link link a/b".to_owned(),
    ];
    expected.sort_unstable();
    let extra = listed.iter().filter(|line| !expected.contains(line)).map(|line| format!("extra {line}"));
    let lost = expected.iter().filter(|line| !listed.contains(line)).map(|line| format!("no {line}"));
    let differences: Vec<_> = extra.chain(lost).collect();
    ensure(differences.is_empty(), "the tree that was uploaded", differences.join("; "))?;
    equal("number of entries", &listed.len(), &expected.len())
}

async fn only_executable_inputs_can_be_run(s: Session) -> Verdict {
    let root = Folder::new().program("yes", "#!/bin/sh\necho ran\n").file("no", "#!/bin/sh\necho ran\n");
    let script = "test -x yes && ./yes; test -x no && echo no is executable; test -r no && echo readable";
    let printed = Job::sh(&s, script).over(&root).stdout().await?;
    equal("what the action sees", &printed.as_str(), &"ran\nreadable\n")
}

async fn symlinks_have_their_exact_targets(s: Session) -> Verdict {
    let targets = ["file", "./file", "nowhere/at/all", "../above", "a/../file", "spaced out"];
    let mut root = Folder::new().file("file", "content\n");
    for (at, target) in targets.iter().enumerate() {
        root = root.symlink(&format!("link{at}"), target);
    }
    let script = "for link in link*; do readlink \"$link\"; done; cat link0";
    let printed = Job::sh(&s, script).over(&root).stdout().await?;
    let expected: String =
        targets.iter().copied().chain(["content"]).map(|line| format!("{line}\n")).collect();
    equal("targets", &printed, &expected)
}

async fn absolute_symlinks_are_treated_as_the_capabilities_say(s: Session) -> Verdict {
    let root = Folder::new().symlink("link", "/usr/bin/env");
    let job = Job::sh(&s, "readlink link").over(&root);
    match s.cache()?.symlink_absolute_path_strategy() {
        Strategy::Allowed => equal("target", &job.stdout().await?.as_str(), &"/usr/bin/env\n"),
        Strategy::Disallowed => {
            job.refused("an absolute symlink under DISALLOWED", &[Code::InvalidArgument]).await.map(drop)
        }
        Strategy::Unknown => Err(fail("a symlink_absolute_path_strategy (CAP-14)", "UNKNOWN")),
    }
}

async fn unknown_node_properties_of_inputs_do_no_harm(s: Session) -> Verdict {
    let property = NodeProperty { name: "bazel_tool_input".into(), value: String::new() };
    let node_properties = Some(NodeProperties { properties: vec![property], ..Default::default() });
    let node = FileNode { name: "file".into(), node_properties, ..Default::default() };
    let printed = Job::sh(&s, "cat file").over(&Folder::new().node(node, "here\n")).stdout().await?;
    equal("stdout", &printed.as_str(), &"here\n")
}

async fn advertised_node_properties_of_inputs_are_applied(s: Session) -> Verdict {
    let supported = &s.executes()?.supported_node_properties;
    let has = |name: &str| supported.iter().any(|one| one == name);
    if !has("unix_mode") && !has("mtime") {
        return Err(absent("supported_node_properties lists neither unix_mode nor mtime"));
    }
    let properties = NodeProperties {
        unix_mode: has("unix_mode").then_some(0o444),
        mtime: has("mtime").then_some(prost_types::Timestamp { seconds: 1_000_000_000, nanos: 0 }),
        ..Default::default()
    };
    let node = FileNode { name: "file".into(), node_properties: Some(properties), ..Default::default() };
    let job = Job::sh(&s, "stat -c '%a %Y' file").over(&Folder::new().node(node, "here\n"));
    let printed = job.stdout().await?;
    let (mode, time) = printed.trim().split_once(' ').unwrap_or_default();
    if has("unix_mode") {
        equal("mode", &mode, &"444")?;
    }
    if has("mtime") {
        equal("modification time", &time, &"1000000000")?;
    }
    Ok(())
}

async fn parents_of_outputs_exist_and_outputs_do_not(s: Session) -> Verdict {
    let script = "test -d a/b && test ! -e a/b/c.o && test ! -e d && echo > a/b/c.o && echo > d";
    let paths = ["a/b/c.o".to_owned(), "d".to_owned()];
    let new = Job::sh(&s, script).outputs(paths.clone());
    #[allow(deprecated)]
    let old = Job::sh(&s, script).command(|command| command.output_files = paths.to_vec());
    for (what, job) in [("output_paths", new), ("output_files", old)] {
        let result = job.result().await.case(what)?;
        let seen = format!("exit code {}", result.exit_code);
        ensure(result.exit_code == 0, format!("parents of {what} and nothing more"), seen)?;
        equal("number of output files", &result.output_files.len(), &2).case(what)?;
    }
    Ok(())
}

async fn commands_run_in_their_working_directory(s: Session) -> Verdict {
    let inner = Folder::new().file("inner", "inner\n");
    let root = Folder::new().folder("w", Folder::new().folder("d", inner)).file("top", "top\n");
    let script = "pwd; cat inner ../../top; echo out > out";
    let job = Job::sh(&s, script).over(&root).within("w/d").outputs(["out"]);
    let in_the_tree = async {
        let result = job.result().await?;
        let printed = s.stdout_of(&result).await?;
        let as_expected = printed.ends_with("/w/d\ninner\ntop\n");
        ensure(as_expected, "a command in w/d", format!("it printed {printed:?}"))?;
        let paths: Vec<_> = result.output_files.iter().map(|file| file.path.as_str()).collect();
        equal("output paths relative to the working directory", &paths, &vec!["out"])
    };
    in_the_tree.await.case("a working directory of the input tree")?;
    beside_the_tree(&s).await.case("a working directory that is not in the input tree")
}

/// The server may create this directory or, in the strict interpretation, refuse the action.
async fn beside_the_tree(s: &Session) -> Verdict {
    let job = Job::sh(s, "pwd").over_root(&Directory::default(), []).within("not/there");
    job.upload().await?;
    let answer = match s.start(s.execute_request(&job.digest())).await {
        Ok(run) => run.finish().await?,
        Err(status) => {
            let answer: Result<(), _> = Err(status);
            return answer.refused("the action", &[Code::InvalidArgument]).map(drop);
        }
    };
    let codes = [Code::Ok, Code::InvalidArgument];
    inline("the action", answer.status.as_ref(), &codes)?;
    match answer.result {
        Some(result) if answer.status.unwrap_or_default().code == 0 => {
            let printed = s.stdout_of(&result).await?;
            ensure(
                printed.ends_with("/not/there\n"),
                "a command in not/there",
                format!("it printed {printed:?}"),
            )
        }
        _ => Ok(()),
    }
}
