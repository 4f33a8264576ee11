//! Tests of which actions a tool can serve, the key of the tool, and the request.

use super::*;
use crate::{action::TimeoutPolicy, instance::Instances};
use gorego_reapi::proto::reapi;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

const SHA256: DigestFunction = DigestFunction::Sha256;

/// An action under construction: `javac -x @args` with a tool of one file.
#[derive(Clone)]
struct Case {
    instance: &'static str,
    arguments: Vec<&'static str>,
    environment: Vec<(&'static str, &'static str)>,
    platform: Vec<(&'static str, &'static str)>,
    working_directory: &'static str,
    outputs: Vec<&'static str>,
    /// Path, content, and whether the file belongs to the tool.
    files: Vec<(&'static str, &'static str, bool)>,
    /// The identity of the root file system's directory.
    root: Option<FileIdentity>,
}

fn case() -> Case {
    Case {
        instance: "",
        arguments: vec!["bin/javac", "-x", "@args"],
        environment: vec![("LANG", "C")],
        platform: vec![("OSFamily", "linux"), (WORKER_KEY, "k")],
        working_directory: "",
        outputs: vec!["out/a.jar"],
        files: vec![
            ("bin/javac", "javac 1", true),
            ("src/A.java", "class A", false),
            ("args", "-d\nout\n", false),
        ],
        root: Some((1, 1)),
    }
}

impl Case {
    fn action(&self) -> Action {
        let digest = Digest::empty(SHA256);
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let properties = self.platform.iter().map(pair);
        let variables = self.environment.iter().map(pair);
        let action = reapi::Action {
            input_root_digest: Some(digest.to_wire()),
            platform: Some(reapi::Platform {
                properties: properties
                    .map(|(name, value)| reapi::platform::Property { name, value })
                    .collect(),
            }),
            ..Default::default()
        };
        let command = reapi::Command {
            arguments: self.arguments.iter().map(ToString::to_string).collect(),
            environment_variables: variables
                .map(|(name, value)| reapi::command::EnvironmentVariable { name, value })
                .collect(),
            working_directory: self.working_directory.into(),
            output_paths: self.outputs.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let instance = Instances::new(["", "team"]).unwrap().get(self.instance).unwrap();
        Action::from_wire(instance, digest, &action, &command, TimeoutPolicy::UNLIMITED).unwrap()
    }

    fn tree(&self) -> InputTree {
        #[derive(Default)]
        struct Level {
            files: Vec<reapi::FileNode>,
            below: BTreeMap<String, Level>,
        }
        fn seal(level: Level, all: &mut HashMap<Digest, Arc<Directory>>) -> Digest {
            let below = level
                .below
                .into_iter()
                .map(|(name, child)| reapi::DirectoryNode { name, digest: Some(seal(child, all).to_wire()) });
            let directory =
                reapi::Directory { files: level.files, directories: below.collect(), ..Default::default() };
            let bytes = prost::Message::encode_to_vec(&directory);
            let digest = SHA256.digest(&bytes);
            all.insert(digest, Arc::new(Directory::decode(&bytes, SHA256).unwrap()));
            digest
        }
        let mut top = Level::default();
        for (path, content, is_tool) in &self.files {
            let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
            let mut level = &mut top;
            for segment in above.split('/').filter(|segment| !segment.is_empty()) {
                level = level.below.entry(segment.into()).or_default();
            }
            let mark = reapi::NodeProperty { name: TOOL_INPUT.into(), value: String::new() };
            level.files.push(reapi::FileNode {
                name: name.into(),
                digest: Some(SHA256.digest(content.as_bytes()).to_wire()),
                node_properties: is_tool
                    .then(|| reapi::NodeProperties { properties: vec![mark], ..Default::default() }),
                ..Default::default()
            });
        }
        let mut all = HashMap::new();
        let root = seal(top, &mut all);
        InputTree::new(root, all).unwrap()
    }

    fn call(&self) -> Option<ToolCall> {
        ToolCall::of(&self.action(), &self.tree(), self.root).ok().flatten()
    }

    fn key(&self) -> ToolKey {
        self.call().unwrap().key
    }

    fn request(&self) -> Result<WorkRequest, String> {
        let read = |path: &str| {
            self.files.iter().find(|(name, ..)| *name == path).map(|(_, text, _)| (*text).to_owned())
        };
        let call = self.call().unwrap();
        let bytes = call.request(&self.tree(), &self.action().command.working_directory, &mut { read })?;
        Ok(prost::Message::decode_length_delimited(&*bytes).unwrap())
    }
}

#[test]
fn an_action_that_no_tool_can_do_runs_by_itself() {
    assert!(case().call().is_some());
    let changes: &[fn(&mut Case)] = &[
        |case| _ = case.platform.pop(),
        |case| case.platform.push((WORKER_PROTOCOL, "xml")),
        |case| _ = case.arguments.pop(),
        |case| _ = case.arguments.drain(..2),
        |case| case.files[0].2 = false,
        |case| case.outputs.push(""),
        |case| case.working_directory = "bin/javac/x",
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut case = case();
        change(&mut case);
        let problem = ToolCall::of(&case.action(), &case.tree(), case.root);
        assert!(if number == 0 { problem == Ok(None) } else { problem.is_err() }, "change {number}");
    }
}

#[test]
fn the_tool_starts_with_what_the_requests_do_not_have() {
    let arguments = vec!["java", "@a", "-jar", "--flagfile=b", "-flagfile=c", "@", "x@y"];
    let call = Case { arguments, ..case() }.call().unwrap();
    assert_eq!(call.start, ["java", "-jar", "@", "x@y", "--persistent_worker"]);
    assert_eq!(call.flagfiles, ["@a", "--flagfile=b", "-flagfile=c"]);
    let with = |protocol| {
        let mut case = case();
        case.platform.push((WORKER_PROTOCOL, protocol));
        case.call().unwrap().encoding
    };
    assert_eq!([with("json"), with("proto")], [Encoding::Json, Encoding::Proto]);
}

#[test]
fn a_tool_serves_only_actions_that_would_start_it_in_the_same_way() {
    let same: &[fn(&mut Case)] = &[
        |case| case.files[1].1 = "class A {}",
        |case| case.files.push(("src/B.java", "class B", false)),
        |case| case.files[2].1 = "-d\nelsewhere\n",
        |case| case.arguments[2] = "@other",
        |case| case.outputs = vec!["b.jar"],
        |case| case.platform.reverse(),
    ];
    let other: &[fn(&mut Case)] = &[
        |case| case.instance = "team",
        |case| case.files[0].1 = "javac 2",
        |case| case.files[0].0 = "bin/javac2",
        |case| case.files[1].2 = true,
        |case| case.arguments[1] = "-y",
        |case| case.environment[0].1 = "C.UTF-8",
        |case| case.environment.push(("A", "B")),
        |case| case.platform[1].1 = "k2",
        |case| case.platform.push(("container-image", "x")),
        |case| case.platform.push((WORKER_PROTOCOL, "json")),
        |case| case.working_directory = "bin",
        |case| case.root = Some((1, 2)),
        |case| case.root = None,
    ];
    for (changes, is_same) in [(same, true), (other, false)] {
        for (number, change) in changes.iter().enumerate() {
            let mut changed = case();
            change(&mut changed);
            assert_eq!(changed.key() == case().key(), is_same, "change {number} ({is_same})");
        }
    }
}

#[test]
fn files_of_arguments_become_arguments_and_all_files_are_inputs() {
    let mut case = case();
    case.arguments.push("--flagfile=args");
    case.files[2].1 = "-d\r\nout\n\n@more\n@@literal\n@repo//target\n";
    case.files.push(("more", "--last", false));
    let request = case.request().unwrap();
    assert_eq!(
        request.arguments,
        ["-d", "out", "", "--last", "@@literal", "@repo//target", "--flagfile=args"]
    );
    let inputs: Vec<_> = request.inputs.iter().map(|input| &*input.path).collect();
    assert_eq!(inputs, ["args", "more", "bin/javac", "src/A.java"]);
    assert_eq!(request.inputs[3].digest, SHA256.digest(b"class A").hash_hex().into_bytes());
    assert_eq!(request.request_id, 0);
}

#[test]
fn inputs_are_named_as_the_working_directory_sees_them() {
    let mut case = case();
    case.files.push(("src/gen/C.java", "class C", false));
    for (working_directory, expected) in [
        ("src", ["../args", "../bin/javac", "A.java", "gen/C.java"]),
        ("src/gen/x", ["../../../args", "../../../bin/javac", "../../A.java", "../C.java"]),
    ] {
        let request = Case { working_directory, ..case.clone() }.request().unwrap();
        let inputs: Vec<_> = request.inputs.iter().map(|input| &*input.path).collect();
        assert_eq!(inputs, expected);
    }
}

#[test]
fn files_of_arguments_that_are_missing_or_never_end_are_refused() {
    let with = |text| {
        let mut case = case();
        case.files[2].1 = text;
        case.request().unwrap_err()
    };
    assert!(with("@nowhere").contains("nowhere"));
    assert!(with("@args").contains("deep"));
    let often: &'static str = "@args\n".repeat(100).leak();
    assert!(with(often).contains("deep"));
    // Many files with arguments, without deep nesting.
    let mut case = case();
    case.files[2].1 = "@empty\n".repeat(100_000).leak();
    case.files.push(("empty", "", false));
    assert!(case.request().unwrap_err().contains("bytes"));
}

/// Each directory repeats the path of all directories above it, so a small tree can have paths of many gigabytes.
#[test]
fn an_action_whose_inputs_have_too_long_paths_runs_by_itself() {
    const NAME: usize = 250;
    const DEPTH: usize = 500;
    const _: () = assert!(DEPTH * DEPTH / 2 * (NAME + 1) < MAX_REQUEST_BYTES / 2, "the chain itself fits");
    let call = |directories: usize, files: usize| {
        let mut all = HashMap::new();
        let mut add = |directory: &reapi::Directory| {
            let bytes = prost::Message::encode_to_vec(directory);
            let digest = SHA256.digest(&bytes);
            all.insert(digest, Arc::new(Directory::decode(&bytes, SHA256).unwrap()));
            digest
        };
        let subdirectory =
            |name, digest: Digest| reapi::DirectoryNode { name, digest: Some(digest.to_wire()) };
        let file =
            |name| reapi::FileNode { name, digest: Some(SHA256.digest(b"").to_wire()), ..Default::default() };
        let empty = add(&reapi::Directory::default());
        let mut digest = add(&reapi::Directory {
            directories: (0..directories).map(|number| subdirectory(number.to_string(), empty)).collect(),
            files: (0..files).map(|number| file(format!("f{number}"))).collect(),
            ..Default::default()
        });
        let mark = reapi::NodeProperty { name: TOOL_INPUT.into(), value: String::new() };
        let marked = reapi::NodeProperties { properties: vec![mark], ..Default::default() };
        for depth in (0..DEPTH).rev() {
            let tool = reapi::FileNode { node_properties: Some(marked.clone()), ..file("tool".into()) };
            digest = add(&reapi::Directory {
                directories: vec![subdirectory("d".repeat(NAME), digest)],
                files: (depth == 0).then_some(tool).into_iter().collect(),
                ..Default::default()
            });
        }
        let tree = InputTree::new(digest, all).unwrap();
        ToolCall::of(&case().action(), &tree, None)
    };
    let enough = MAX_REQUEST_BYTES / (DEPTH * NAME);
    assert!(matches!(call(enough / 4, enough / 4), Ok(Some(_))));
    assert!(call(enough, 0).is_err_and(|reason| reason.contains("paths")));
    assert!(call(0, enough).is_err_and(|reason| reason.contains("paths")));
}
