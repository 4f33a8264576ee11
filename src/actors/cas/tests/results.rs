//! Tests of the action cache.

use super::{super::settings::LOOKUPS_PER_TURN, *};
use crate::{
    actors::cas::results::ResultCondition, instance::InstancePolicy, nondeterminism::NonDeterminismReports,
    result::SharedResult,
};
use futures::future::join_all;
use prost::Message as _;

fn file(name: &str, content: Digest) -> reapi::FileNode {
    reapi::FileNode { name: name.into(), digest: Some(content.to_wire()), ..Default::default() }
}

fn output(path: &str, content: Digest) -> reapi::OutputFile {
    reapi::OutputFile { path: path.into(), digest: Some(content.to_wire()), ..Default::default() }
}

/// A result with every kind of reference, and a name for each of them.
pub(super) async fn rich_result(store: &TestStore) -> (reapi::ActionResult, Vec<(&'static str, Digest)>) {
    let in_child = store.put("in a child of the Tree").await;
    let in_root = store.put("in the root of the Tree").await;
    let child = reapi::Directory { files: vec![file("c", in_child)], ..Default::default() };
    let child_node =
        reapi::DirectoryNode { name: "child".into(), digest: Some(digest(&child.encode_to_vec()).to_wire()) };
    let root = reapi::Directory {
        files: vec![file("r", in_root), file("empty", digest(b""))],
        directories: vec![child_node.clone()],
        ..Default::default()
    };
    let tree = reapi::Tree { root: Some(root), children: vec![child] };
    let tree = store.put(tree.encode_to_vec()).await;

    let in_directory = store.put("in a Directory below the root").await;
    let below = reapi::Directory { files: vec![file("b", in_directory)], ..Default::default() };
    let below = store.put(below.encode_to_vec()).await;
    let above = reapi::Directory {
        directories: vec![reapi::DirectoryNode { name: "below".into(), digest: Some(below.to_wire()) }],
        ..Default::default()
    };
    let above = store.put(above.encode_to_vec()).await;

    let (plain, out, err) =
        (store.put("a file").await, store.put("standard output").await, store.put("standard error").await);
    let result = reapi::ActionResult {
        output_files: vec![output("o", plain), output("nothing", digest(b""))],
        output_directories: vec![
            reapi::OutputDirectory {
                path: "t".into(),
                tree_digest: Some(tree.to_wire()),
                ..Default::default()
            },
            reapi::OutputDirectory {
                path: "d".into(),
                root_directory_digest: Some(above.to_wire()),
                ..Default::default()
            },
        ],
        stdout_digest: Some(out.to_wire()),
        stderr_digest: Some(err.to_wire()),
        ..Default::default()
    };
    let references = vec![
        ("an output file", plain),
        ("a Tree", tree),
        ("a file in the root of a Tree", in_root),
        ("a file in a child of a Tree", in_child),
        ("a root Directory", above),
        ("a Directory below it", below),
        ("a file in that", in_directory),
        ("stdout", out),
        ("stderr", err),
    ];
    (result, references)
}

pub(super) async fn update(store: &TestStore, action: Digest, result: reapi::ActionResult) -> SharedResult {
    store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap()
}

async fn lookup(store: &TestStore, action: Digest) -> Option<SharedResult> {
    store.cas.get_result(&store.main, action).await.unwrap()
}

/// AC-03. Tested for each kind of reference, with the result in memory and after a restart.
#[actix::test]
async fn a_result_is_served_only_while_everything_it_references_is_stored() {
    let (_, kinds) = rich_result(&TestStore::new().await).await;
    for (n, (kind, _)) in kinds.iter().enumerate() {
        for restarted in [false, true] {
            let mut store = TestStore::new().await;
            let (result, references) = rich_result(&store).await;
            let action = digest(b"action");
            let stored = update(&store, action, result).await;
            assert_eq!(lookup(&store, action).await.as_ref(), Some(&stored));
            if restarted {
                store = store.restart().await;
            }
            store.lose(references[n].1).await;
            assert_eq!(lookup(&store, action).await, None, "without {kind}");
            assert_eq!(store.inspect().await.totals.results, 0, "it is dropped");
            eventually(|| async { store.files_of(action).is_empty().then_some(()) }).await;
        }
    }
}

/// AC-03. Tested for a result with more references than are looked up in one turn.
#[actix::test]
async fn a_result_of_thousands_of_blobs_is_served_only_while_all_of_them_are_stored() {
    let mut store = TestStore::new().await;
    let mut output_files = Vec::new();
    for n in 0..LOOKUPS_PER_TURN + 100 {
        output_files.push(output(&n.to_string(), store.put(n.to_string()).await));
    }
    let last =
        Digest::from_wire(SHA256, output_files.iter().filter_map(|f| f.digest.as_ref()).next_back(), "last");
    let (action, result) = (digest(b"action"), reapi::ActionResult { output_files, ..Default::default() });
    let stored = update(&store, action, result).await;
    assert_eq!(lookup(&store, action).await.as_ref(), Some(&stored));
    store = store.restart().await;
    assert_eq!(lookup(&store, action).await.as_ref(), Some(&stored));
    store.lose(last.unwrap()).await;
    assert_eq!(lookup(&store, action).await, None);
    eventually(|| async { store.files_of(action).is_empty().then_some(()) }).await;
}

/// AC-04: a hit renews its blobs, including those inside its Trees.
#[actix::test]
async fn a_hit_renews_everything_it_references() {
    let store = TestStore::with_limit(60 * 4_096).await;
    let (result, references) = rich_result(&store).await;
    let action = digest(b"action");
    update(&store, action, result).await;
    for seed in 0..200 {
        store.put(noise(10 * 4_096, seed)).await;
        assert!(lookup(&store, action).await.is_some(), "after {seed} writes");
    }
    for (kind, reference) in references {
        assert!(store.has(reference).await, "{kind}");
    }
}

/// AC-08, AC-14, GEN-15.
#[actix::test]
async fn results_survive_a_restart_and_stay_in_their_instance() {
    let store = TestStore::new().await;
    let (result, _) = rich_result(&store).await;
    let action = digest(b"action");
    let stored = update(&store, action, result).await;
    let store = store.restart().await;
    assert_eq!(lookup(&store, action).await, Some(stored));
    assert_eq!(store.cas.get_result(&store.other, action).await.unwrap(), None);
    assert_eq!(lookup(&store, digest(b"another")).await, None);
}

/// AC-08.
#[actix::test]
async fn a_hundred_racing_updates_leave_one_whole_result() {
    let store = TestStore::of_files().await;
    let action = digest(b"action");
    let updates = (0..100u8).map(|n| {
        let store = &store;
        async move {
            let result = reapi::ActionResult {
                stdout_raw: Bytes::from(vec![n; 10]),
                output_files: vec![reapi::OutputFile {
                    contents: Bytes::from(vec![n; 20]),
                    ..output("o", digest(&[n; 20]))
                }],
                ..Default::default()
            };
            update(store, action, result).await
        }
    });
    let all = join_all(updates).await;
    let winner = lookup(&store, action).await.unwrap();
    assert!(all.contains(&winner));
    eventually(|| async { (store.files_of(action).len() == 1).then_some(()) }).await;
    let last = reapi::ActionResult::default();
    let last = update(&store, action, last).await;
    assert_eq!(lookup(&store, action).await, Some(last));
    let store = store.restart().await;
    assert_eq!(lookup(&store, action).await.unwrap().output_files.len(), 0);
}

/// AC-08: look-ups during an update return the old result or the new one, even when its Trees have to be read.
#[actix::test]
async fn a_result_that_is_being_replaced_is_never_a_miss() {
    let store = TestStore::new().await;
    let (result, _) = rich_result(&store).await;
    let action = digest(b"action");
    update(&store, action, result.clone()).await;
    let replacing = async {
        for n in 0..100u32 {
            let auxiliary = prost_types::Any { type_url: n.to_string(), value: vec![] };
            let metadata =
                reapi::ExecutedActionMetadata { auxiliary_metadata: vec![auxiliary], ..Default::default() };
            update(
                &store,
                action,
                reapi::ActionResult { execution_metadata: Some(metadata), ..result.clone() },
            )
            .await;
        }
    };
    let asking = async {
        for n in 0..400 {
            assert!(lookup(&store, action).await.is_some(), "lookup {n}");
        }
    };
    futures::join!(replacing, asking);
}

/// A kill in the middle of an update leaves the beginning of a file that is newer than the complete one.
#[actix::test]
async fn a_torn_update_does_not_cost_the_result_before_it() {
    let store = TestStore::of_files().await;
    let action = digest(b"action");
    let stored = update(&store, action, reapi::ActionResult::default()).await;
    let whole = store.file_of(action);
    let bytes = std::fs::read(&whole).unwrap();
    let name = whole.file_name().unwrap().to_str().unwrap();
    let (stem, _) = name.rsplit_once('-').unwrap();
    for (generation, length) in [("fff", bytes.len() - 1), ("ffff", 0)] {
        std::fs::write(whole.with_file_name(format!("{stem}-{generation}")), &bytes[..length]).unwrap();
    }
    let store = store.restart().await;
    assert_eq!(lookup(&store, action).await, Some(stored));
    assert_eq!(store.file_of(action), whole);
}

/// AC-05, AC-06.
#[actix::test]
async fn inlined_contents_become_blobs() {
    let store = TestStore::new().await;
    let result = reapi::ActionResult { stdout_raw: Bytes::from("hello"), ..Default::default() };
    let stored = update(&store, digest(b"action"), result).await;
    assert_eq!(stored.stdout_digest, Some(digest(b"hello").to_wire()));
    assert_eq!(store.get(digest(b"hello")).await.unwrap(), "hello");
}

/// AC-13.
#[actix::test]
async fn the_result_of_a_failed_command_is_not_a_hit() {
    let mut store = TestStore::new().await;
    let action = digest(b"action");
    update(&store, action, reapi::ActionResult { exit_code: 1, ..Default::default() }).await;
    for _ in 0..2 {
        assert_eq!(lookup(&store, action).await, None);
        store = store.restart().await;
    }
}

#[actix::test]
async fn a_damaged_result_file_is_a_miss() {
    let store = TestStore::new().await;
    let action = digest(b"action");
    update(&store, action, reapi::ActionResult::default()).await;
    let store = store.restart().await;
    store.damage(action);
    assert_eq!(lookup(&store, action).await, None);
    assert_eq!(store.inspect().await.totals.results, 0);
}

fn by(principal: &str) -> Provenance {
    Provenance { principal: principal.into(), ..Provenance::default() }
}

/// With `client_results = "private"`, before and after a restart, no client gets a result of another principal under
/// any key, and the result of a worker has precedence.
#[actix::test]
async fn a_private_result_is_seen_by_its_principal_alone() {
    let root = TempDir::new().unwrap();
    let settings = settings_at(root.path().join("store"), 1_000 * MB);
    let private = InstancePolicy { private_results: true, ..InstancePolicy::default() };
    let names = [(String::new(), InstancePolicy::default()), ("private".into(), private)];
    let instances = Instances::with_policies(names).unwrap();
    let [main, private] = ["", "private"].map(|name| instances.get(name).unwrap());
    let open = || async {
        let open = || async { CasActor::open(settings.clone(), &instances, Handle::current()).ok() };
        eventually(open).await.launch()
    };
    let action = digest(b"action");
    let result = |code: &str| reapi::ActionResult {
        output_symlinks: vec![reapi::OutputSymlink {
            path: "l".into(),
            target: code.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let cas = open().await;
    cas.put_result(&private, action, result("of a"), by("token:a")).await.unwrap();
    cas.put_result(&private, action, result("of b"), by("token:b")).await.unwrap();
    cas.put_result(&main, action, result("of all"), by("token:a")).await.unwrap();
    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);
    let cas = open().await;
    let target = async |instance: &Instance, action: Digest, principal: &str| {
        let found = cas.get_result_for(instance, action, principal).await.unwrap();
        found.map(|result| result.output_symlinks[0].target.clone())
    };
    for (instance, principal, seen) in [
        (&private, "token:a", Some("of a")),
        (&private, "token:b", Some("of b")),
        (&private, "token:c", None),
        (&private, "", None),
        (&main, "token:c", Some("of all")),
    ] {
        assert_eq!(target(instance, action, principal).await.as_deref(), seen, "{principal}");
    }
    let (_, key) = private.private_result("token:a", action).unwrap();
    for principal in ["token:a", "token:b"] {
        assert_eq!(target(&private, key, principal).await, None, "a key is no action");
    }
    // A purge finds private results, and names their actions.
    let condition =
        ResultCondition { principal: Some("token:b".into()), action: Some(action), ..Default::default() };
    let page = cas.purge_results(&private, &condition, 0, 10, true).await.unwrap();
    assert_eq!(page.results.len(), 1);
    assert!(page.results[0].is_private && page.results[0].action_digest == Some(action.to_wire()));
    assert_eq!(target(&private, action, "token:b").await, None);
    assert_eq!(target(&private, action, "token:a").await.as_deref(), Some("of a"));
    // Results of this server's workers are served to all.
    let (worker, space) = (cas.clone(), private.clone());
    tokio::task::spawn_blocking(move || {
        let mut batch = worker.begin_outputs(&space, action.function(), 0);
        batch.result(action, result("of a worker"), by("token:a")).unwrap();
        batch.commit().unwrap();
    })
    .await
    .unwrap();
    for principal in ["token:a", "token:c"] {
        assert_eq!(target(&private, action, principal).await.as_deref(), Some("of a worker"));
    }
}

/// The later result stays (AC-08), and the report names both.
#[actix::test]
async fn a_different_result_of_one_action_is_reported() {
    let store = TestStore::new().await;
    let reports = NonDeterminismReports::default();
    store.cas.report_to(reports.clone());
    let [one, two] = [store.put("one").await, store.put("two").await];
    let action = digest(b"action");
    let with =
        |content| reapi::ActionResult { output_files: vec![output("o", content)], ..Default::default() };
    let times = || {
        let page = reports.page("", u64::MAX, 10);
        page.reports.iter().map(|report| report.times).collect::<Vec<_>>()
    };
    for (content, provenance, expected) in
        [(one, by("a"), vec![]), (one, by("b"), vec![]), (two, by("c"), vec![1]), (one, by("d"), vec![2])]
    {
        store.cas.put_result(&store.main, action, with(content), provenance).await.unwrap();
        assert_eq!(times(), expected);
        assert_eq!(lookup(&store, action).await.unwrap().output_files, with(content).output_files);
    }
    let report = reports.page("", u64::MAX, 10).reports[0].clone();
    let (earlier, later) = (report.earlier.clone().unwrap(), report.later.clone().unwrap());
    assert_eq!((&*earlier.principal, &*later.principal, report.differing_outputs), ("c", "d", 1));
    // A worker's result is compared as well, even after the memory is lost. A value under a key is not compared.
    store.cas.put_value(&store.main, digest(b"key"), with(one), by("a")).await.unwrap();
    store.cas.put_value(&store.main, digest(b"key"), with(two), by("a")).await.unwrap();
    assert_eq!(times(), [2]);
    let store = store.restart().await;
    store.cas.report_to(reports.clone());
    store
        .worker(move |cas, main| {
            let mut batch = cas.begin_outputs(&main, action.function(), 0);
            batch.result(action, with(two), by("e")).unwrap();
            batch.commit().unwrap();
        })
        .await;
    assert_eq!(times(), [3]);
}

/// AC-03: no client can build a directory whose Tree lacks a Directory that it names.
#[actix::test]
async fn a_result_whose_tree_lacks_a_directory_is_a_miss() {
    let store = TestStore::new().await;
    let directory = |below: &[&reapi::Directory]| {
        let node = |(number, below): (usize, &&reapi::Directory)| reapi::DirectoryNode {
            name: format!("d{number}"),
            digest: Some(digest(&prost::Message::encode_to_vec(*below)).to_wire()),
        };
        reapi::Directory { directories: below.iter().enumerate().map(node).collect(), ..Default::default() }
    };
    let link = reapi::SymlinkNode { name: "l".into(), target: "t".into(), ..Default::default() };
    let leaf = reapi::Directory { symlinks: vec![link], ..Default::default() };
    let (empty, middle) = (reapi::Directory::default(), directory(&[&leaf]));
    let root = directory(&[&middle, &empty]);
    for (number, (children, is_complete)) in [
        (vec![], false),
        (vec![&middle], false),
        (vec![&leaf], false),
        (vec![&leaf, &middle], true),
        (vec![&leaf, &middle, &empty], true),
    ]
    .into_iter()
    .enumerate()
    {
        let children = children.into_iter().cloned().collect();
        let tree = reapi::Tree { root: Some(root.clone()), children };
        let tree = store.put(prost::Message::encode_to_vec(&tree)).await;
        let output = reapi::OutputDirectory {
            path: "o".into(),
            tree_digest: Some(tree.to_wire()),
            ..Default::default()
        };
        let result = reapi::ActionResult { output_directories: vec![output], ..Default::default() };
        let action = digest(&number.to_le_bytes());
        store.cas.put_result(&store.main, action, result, Provenance::default()).await.unwrap();
        let found = store.cas.get_result(&store.main, action).await.unwrap();
        assert_eq!(found.is_some(), is_complete, "Tree number {number}");
    }
}
