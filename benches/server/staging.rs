//! What it costs to bring inputs into place and to take outputs in.
//!
//! The inputs are in the store, and an action with the same root ran before ("warm"), so that only their way to the
//! command is measured. Beside each figure stands a bare spawn, which needs no inputs.

use crate::{
    machine::{cpu_time, percentiles, spawn_latency},
    report::Report,
    target::{Client, Target},
};
use futures::{StreamExt as _, stream};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{Directory, DirectoryNode, FileNode},
};
use prost::Message as _;
use std::{
    process::Command,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

const SHA256: DigestFunction = DigestFunction::Sha256;
/// Blobs in one batch.
const BATCH: usize = 2_000;
/// Files in each directory.
const FILES: usize = 20;
/// Actions at once.
const AT_ONCE: usize = 2;
/// Actions of one measurement.
const ACTIONS: usize = 100;

/// Directories that differ from one another, each with [`FILES`] files, and what they are made of.
#[derive(Default)]
struct Blobs(Vec<Vec<u8>>);

impl Blobs {
    fn add(&mut self, bytes: Vec<u8>) -> Digest {
        let digest = SHA256.digest(&bytes);
        self.0.push(bytes);
        digest
    }

    /// A directory with files; `salt` is in the first of them.
    fn files(&mut self, number: usize, salt: &str) -> Digest {
        let files = (0..FILES).map(|file| {
            let salt = if file == 0 { salt } else { "" };
            let text = format!("file {file} of directory {number} {salt}\n").repeat(32);
            FileNode {
                name: format!("f{file:02}"),
                digest: Some(self.add(text.into_bytes()).to_wire()),
                ..Default::default()
            }
        });
        let directory = Directory { files: files.collect(), ..Default::default() };
        self.add(directory.encode_to_vec())
    }

    fn directory(&mut self, children: impl Iterator<Item = Digest>) -> Digest {
        let nodes = children
            .enumerate()
            .map(|(at, digest)| DirectoryNode { name: format!("d{at:03}"), digest: Some(digest.to_wire()) });
        let directory = Directory { directories: nodes.collect(), ..Default::default() };
        self.add(directory.encode_to_vec())
    }

    async fn upload(self, client: &Client) {
        for part in self.0.chunks(BATCH) {
            client.upload(part.iter().cloned()).await;
        }
    }
}

/// An input root of this many directories; the first file in the first of them differs with `salt`.
async fn flat(client: &Client, directories: usize, salt: &str) -> Digest {
    let mut blobs = Blobs::default();
    let children: Vec<_> =
        (0..directories).map(|number| blobs.files(number, if number == 0 { salt } else { "" })).collect();
    let root = blobs.directory(children.into_iter());
    blobs.upload(client).await;
    root
}

/// An input root of `outer` times `inner` directories.
async fn nested(client: &Client, outer: usize, inner: usize) -> Digest {
    let mut blobs = Blobs::default();
    let mut tops = Vec::new();
    for top in 0..outer {
        let children: Vec<_> = (0..inner).map(|number| blobs.files(top * inner + number, "")).collect();
        tops.push(blobs.directory(children.into_iter()));
    }
    let root = blobs.directory(tops.into_iter());
    blobs.upload(client).await;
    root
}

/// Runs actions, a few at once, and returns the median time and the server's CPU time of one.
async fn run(target: &Target, client: &Client, actions: &[Digest]) -> (Duration, Duration) {
    let before = cpu_time(target.pid());
    let samples: Vec<_> = stream::iter(actions)
        .map(|action| async move {
            let start = Instant::now();
            client.run(*action).await;
            start.elapsed()
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let cpu = (cpu_time(target.pid()) - before) / u32::try_from(actions.len()).expect("few actions");
    (percentiles(samples).0, cpu)
}

async fn noops(client: &Client, roots: &[Digest], what: &str) -> Vec<Digest> {
    let mut actions = Vec::new();
    for (at, root) in roots.iter().enumerate() {
        actions.push(client.upload_action_in(*root, &["/bin/true"], &[], &format!("{what} {at}")).await);
    }
    actions
}

/// Input roots that were used before, and outputs.
pub(crate) fn staging(report: &mut Report) {
    let spawn = spawn_latency(300);
    let target = Target::start();
    let runtime = Runtime::new().expect("a runtime");
    let mut add = |what: &str, (p50, cpu): (Duration, Duration), goal: Duration, goal_name: &str| {
        report.add(
            what,
            format!("{:.2} ms, {:.2} ms of CPU", ms(p50), ms(cpu)),
            format!("bare spawn {:.2} ms", ms(spawn)),
            goal_name,
            p50 <= goal,
        );
    };
    runtime.block_on(async {
        let client = Client::connect(&target.endpoint).await;
        let same = flat(&client, 50, "").await;
        let warm = noops(&client, &[same], "warm up").await;
        run(&target, &client, &warm).await;
        let actions = noops(&client, &[same; ACTIONS], "same").await;
        let goal = spawn + Duration::from_millis(2);
        add(
            "1,000 input files in 50 directories, warm, p50 (2 at once)",
            run(&target, &client, &actions).await,
            goal,
            "spawn + 2 ms",
        );

        let mut roots = Vec::new();
        for at in 0..ACTIONS {
            roots.push(flat(&client, 50, &at.to_string()).await);
        }
        let actions = noops(&client, &roots, "different").await;
        let goal = spawn + Duration::from_millis(3);
        add(
            "the same, one file differs in each action",
            run(&target, &client, &actions).await,
            goal,
            "spawn + 3 ms",
        );

        let large = nested(&client, 50, 100).await;
        let warm = noops(&client, &[large], "warm up").await;
        run(&target, &client, &warm).await;
        let actions = noops(&client, &[large; 10], "large").await;
        let goal = Duration::from_millis(60);
        add(
            "100,000 input files in 5,000 directories, warm, p50 (2 at once)",
            run(&target, &client, &actions).await,
            goal,
            "60 ms",
        );
    });
    outputs(report, &target, &runtime);
}

/// 200 output files of 4 KiB, beside the same command alone.
fn outputs(report: &mut Report, target: &Target, runtime: &Runtime) {
    const WRITE: &str =
        "i=0; while [ $i -lt 200 ]; do printf '%4096s' \"$i$SALT\" > out/$i; i=$((i+1)); done";
    let directory = tempfile::tempdir().expect("a directory");
    let alone = (0..30).map(|at: u32| {
        let work = directory.path().join(at.to_string());
        std::fs::create_dir_all(work.join("out")).expect("a directory");
        let start = Instant::now();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", WRITE]).env("SALT", format!("{at:05}")).current_dir(work);
        assert!(command.status().expect("sh runs").success());
        start.elapsed()
    });
    let alone = percentiles(alone.collect()).0;
    let (p50, cpu) = runtime.block_on(async {
        let client = Client::connect(&target.endpoint).await;
        let mut actions = Vec::new();
        for at in 0..60 {
            let script = format!("SALT={at:05}; mkdir -p out; {WRITE}");
            let empty = Digest::empty(SHA256);
            let arguments = ["/bin/sh", "-c", &script];
            actions.push(client.upload_action_in(empty, &arguments, &["out"], "outputs").await);
        }
        let mut samples = Vec::new();
        let before = cpu_time(target.pid());
        for action in &actions {
            let start = Instant::now();
            client.run(*action).await;
            samples.push(start.elapsed());
        }
        (percentiles(samples).0, (cpu_time(target.pid()) - before) / 60)
    });
    report.add(
        "200 output files of 4 KiB, one at a time, p50",
        format!("{:.1} ms, {:.1} ms of CPU", ms(p50), ms(cpu)),
        format!("the command alone {:.1} ms", ms(alone)),
        "alone + 5 ms",
        p50 <= alone + Duration::from_millis(5),
    );
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
