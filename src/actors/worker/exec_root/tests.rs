//! Tests that this module sees the layers as the kernel shows them.

use super::*;
use crate::actors::worker::{
    cancel::CancelToken,
    checkpoint::Checkpoint,
    delta::{Cost, Delta},
    input_attributes, inputs,
    outputs::{
        Seen,
        scan::{Content, NodeBudget, OutputScan},
    },
    tree_model::{self, Contents, Shown},
};
use proptest::{prelude::*, test_runner::TestRunner};
use std::{collections::BTreeMap, fs, io::Read as _, process, sync::Arc, time::Duration};

/// Every node by path: kind, permission bits, seconds of the mtime, and content or target.
type View = BTreeMap<String, (char, u32, i64, String)>;

/// The directories of one exec root, created as for an action.
struct Layers {
    directory: tempfile::TempDir,
    base: Arc<InputTree>,
}

impl Layers {
    /// Creates the layer of an action with the input root `wanted` above the tree `base`.
    fn new(base: &tree_model::Tree, wanted: &tree_model::Tree) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [base, wanted] = [base, wanted].map(|tree| Arc::new(tree_model::input_tree(tree)));
        for name in ["below", "own", "work", "shown"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let layers = Self { directory, base };
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", Duration::from_secs(60));
        let base = Contents(layers.base.clone());
        inputs::write(&base, &layers.open("below"), true, &checkpoint).unwrap();
        let wanted = Contents(wanted);
        let limit = Cost { entries: u64::MAX, bytes: u64::MAX };
        let delta = Delta::between(&wanted.0, &layers.base, limit).unwrap();
        inputs::write_delta(&wanted, &delta, &layers.open("own"), &checkpoint).unwrap();
        layers
    }

    fn open(&self, name: &str) -> File {
        File::open(self.directory.path().join(name)).unwrap()
    }

    /// Runs a script in the overlay and lists the overlay afterwards. `None` if overlays are not available.
    fn shown_after(&self, script: &str) -> Option<View> {
        let mount =
            "mount -t overlay -o lowerdir=below,upperdir=own,workdir=work,userxattr,volatile overlay shown";
        let list = "find . -mindepth 1 | while read -r path; do \\
            find \"$path\" -maxdepth 0 -printf '%p|%y|%m|%Ts|%l'; [ ! -f \"$path\" ] || [ -L \"$path\" ] || cat \"$path\"; echo; done";
        let output = process::Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
            .arg(format!(
                "{mount} || exit 77; cd shown || exit 1; {{ :\n{script}\n}} >/dev/null 2>&1; {list}"
            ))
            .current_dir(self.directory.path())
            .output()
            .ok()?;
        if output.status.code() == Some(77) {
            eprintln!("{}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        assert!(output.status.success(), "{output:?}");
        let view = String::from_utf8(output.stdout).unwrap();
        let node = |line: &str| {
            let parts: Vec<_> = line.splitn(5, '|').collect();
            let [path, kind, mode, time, content] = parts[..] else { panic!("{line}") };
            let mode = u32::from_str_radix(mode, 8).unwrap();
            let kind = kind.chars().next().unwrap();
            (
                path.trim_start_matches("./").to_owned(),
                (kind, mode, time.parse().unwrap(), content.to_owned()),
            )
        };
        Some(view.lines().map(node).collect())
    }

    /// The tree as this module sees it.
    fn seen(&self) -> View {
        let own = self.open("own");
        let root = ExecRoot::new(&own, Some(&self.base));
        let cancel = CancelToken::new();
        let checkpoint = Checkpoint::new(&cancel, "a test", Duration::from_secs(60));
        let top = || LayerWalk::at_top(root).unwrap();
        let seen = Seen::from(&rfs::fstat(&own).unwrap());
        let mut scan = OutputScan::of(top(), seen, "o", &checkpoint, &mut NodeBudget::new()).unwrap();
        let mut contents = Vec::new();
        scan.revisit(top(), "o", &checkpoint, |directory, own| {
            contents
                .push(directory.files.iter().map(|file| content(file.content, own, &file.name)).collect());
            Ok(())
        })
        .unwrap();
        let mut view = View::new();
        note(&scan, 0, &mut visited(&scan).into_iter().zip(contents).collect(), "", &mut view);
        view
    }
}

/// The directories of a scan in the order of a walk.
fn visited(scan: &OutputScan) -> Vec<usize> {
    fn go(scan: &OutputScan, at: usize, order: &mut Vec<usize>) {
        order.push(at);
        scan.directories[at].children.iter().for_each(|child| go(scan, *child, order));
    }
    let mut order = Vec::new();
    go(scan, 0, &mut order);
    order
}

fn content(content: Content, own: Option<&File>, name: &str) -> String {
    match content {
        Content::Stored(digest) => tree_model::content(&digest).to_string(),
        Content::Own(_) => {
            let mut text = String::new();
            dir::open_file(own.unwrap(), OsStr::new(name)).unwrap().read_to_string(&mut text).unwrap();
            text
        }
    }
}

fn note(
    scan: &OutputScan,
    at: usize,
    contents: &mut BTreeMap<usize, Vec<String>>,
    path: &str,
    view: &mut View,
) {
    let directory = &scan.directories[at];
    let mut add = |name: &str, kind, seen: &Seen, content: String| {
        view.insert(format!("{path}{name}"), (kind, seen.mode & 0o7777, seen.mtime.seconds, content));
    };
    for (file, content) in directory.files.iter().zip(contents.remove(&at).unwrap()) {
        add(&file.name, 'f', &file.seen, content);
    }
    for link in &directory.links {
        add(&link.name, 'l', &link.seen, link.target.clone());
    }
    for &child in &directory.children {
        add(&scan.directories[child].name, 'd', &scan.directories[child].seen, String::new());
    }
    for &child in &directory.children {
        note(scan, child, contents, &format!("{path}{}/", scan.directories[child].name), view);
    }
}

fn view_of(tree: &tree_model::Tree) -> View {
    let time = input_attributes::INPUT_TIME.tv_sec;
    let node = |(path, shown): (&String, &Shown)| {
        let node = match shown {
            Shown::File(number, true) => ('f', 0o755, time, number.to_string()),
            Shown::File(number, false) => ('f', 0o644, time, number.to_string()),
            Shown::Link(number) => ('l', 0o777, time, number.to_string()),
            Shown::Directory => ('d', 0o755, time, String::new()),
        };
        (path.trim_start_matches('/').to_owned(), node)
    };
    tree.iter().map(node).collect()
}

/// A command that changes its inputs, if it can.
fn act() -> impl Strategy<Value = String> {
    let path = || proptest::collection::vec("[abc]", 1..4).prop_map(|path| path.join("/"));
    prop_oneof![
        path().prop_map(|path| format!("rm -rf {path}")),
        path().prop_map(|path| format!("rm {path}; mkdir {path}")),
        path().prop_map(|path| format!("mkdir -p {path}")),
        path().prop_map(|path| format!("chmod 711 {path}")),
        path().prop_map(|path| format!("printf 7 >> {path}")),
        path().prop_map(|path| format!("rm -rf {path}; ln -s 9 {path}")),
        path().prop_map(|path| format!("touch -h -d @1000 {path}")),
        (path(), path()).prop_map(|(from, to)| format!("mv {from} {to}")),
        (path(), path()).prop_map(|(from, to)| format!("ln {from} {to}")),
        (path(), path()).prop_map(|(from, to)| format!("rm -rf {to}; cp -a {from} {to}")),
    ]
}

#[test]
fn an_action_sees_the_tree_that_it_wants_above_any_base() {
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() });
    let property = |(base, wanted): (tree_model::Tree, tree_model::Tree)| {
        prop_assert_eq!(Layers::new(&base, &wanted).seen(), view_of(&wanted));
        Ok(())
    };
    runner.run(&(tree_model::tree(), tree_model::tree()), property).unwrap();
}

#[test]
fn the_tree_after_a_command_is_seen_as_the_kernel_shows_it() {
    let empty = tree_model::Tree::new();
    if Layers::new(&empty, &empty).shown_after("true").is_none() {
        eprintln!("skipped: there are no overlays in user namespaces here");
        return;
    }
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 48,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Default::default()
    });
    let scripts = proptest::collection::vec(act(), 0..8).prop_map(|acts| acts.join("\n"));
    let property = |(base, wanted, script): (tree_model::Tree, tree_model::Tree, String)| {
        let layers = Layers::new(&base, &wanted);
        let shown = layers.shown_after(&script).expect("it was mounted before");
        if script.is_empty() {
            prop_assert_eq!(&shown, &view_of(&wanted));
        }
        prop_assert_eq!(layers.seen(), shown);
        Ok(())
    };
    runner.run(&(tree_model::tree(), tree_model::tree(), scripts), property).unwrap();
}
