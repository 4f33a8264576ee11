//! A worker with an in-memory store, for tests that run real processes.

use actix::{Actor, Addr, Context, Handler, SyncArbiter, System};
use gorego::{
    action::{Action, TimeoutPolicy},
    actors::{
        cas::client::Provenance,
        worker::{
            PoolLimits, WorkerActor, WorkerSettings,
            cancel::CancelToken,
            launcher::PoolSandbox,
            messages::{
                RunAction, RunControl, RunFailure, RunOrder, RunReport, RunStage, SlotId, StageReached,
                TaskId,
            },
            staged_trees::StagingLimits,
            store::{BlobStore, Inputs, Outputs},
            tools::{ToolLimits, Tools},
            workspace::BuildRoot,
        },
    },
    caller::{Owner, Peer},
    instance::{Instance, Instances},
    log_streams::{LogSettings, LogStreams, StreamLimits},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
    tree::{Directory, InputTree},
};
use prost::Message;
use rustix::fs::{AtFlags, Mode, OFlags};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs::File,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

pub const SHA256: DigestFunction = DigestFunction::Sha256;

/// An in-memory store. Like the real one, it moves output files instead of copying them if possible.
#[derive(Default)]
pub struct MemoryStore {
    pub blobs: Mutex<HashMap<Digest, Vec<u8>>>,
    pub results: Mutex<HashMap<Digest, reapi::ActionResult>>,
    /// What batches were to hold.
    pub held: Mutex<HashSet<Digest>>,
    /// Makes `open_inputs` panic once.
    pub panic_next: Mutex<bool>,
}

impl MemoryStore {
    pub fn put(&self, bytes: impl Into<Vec<u8>>) -> Digest {
        let bytes = bytes.into();
        let digest = SHA256.digest(&bytes);
        self.blobs.lock().unwrap().insert(digest, bytes);
        digest
    }

    pub fn get(&self, digest: &reapi::Digest) -> Vec<u8> {
        let digest = Digest::parse(SHA256, &digest.hash, digest.size_bytes).unwrap();
        self.blobs.lock().unwrap().get(&digest).expect("the blob is stored").clone()
    }
}

/// A wrapper, because the trait is implemented for the shared handle.
pub struct Handle(pub Arc<MemoryStore>);

struct Opened {
    tree: Arc<InputTree>,
    blobs: HashMap<Digest, Vec<u8>>,
    held: HashSet<Digest>,
}

impl BlobStore for Handle {
    fn open_inputs(&self, _: &Instance, root: Digest, _: Owner) -> Result<Box<dyn Inputs>> {
        let blobs = self.0.blobs.lock().unwrap().clone();
        if std::mem::take(&mut *self.0.panic_next.lock().unwrap()) {
            panic!("as the test asked");
        }
        let (mut directories, mut todo) = (HashMap::new(), vec![root]);
        while let Some(digest) = todo.pop() {
            let bytes = if digest.is_empty() { Some(&[][..]) } else { blobs.get(&digest).map(|b| &**b) };
            let bytes = bytes.ok_or_else(|| Error::MissingBlobs(vec![digest]))?;
            let directory = Directory::decode(bytes, SHA256)?;
            todo.extend(directory.directories.iter().map(|child| child.digest));
            directories.insert(digest, Arc::new(directory));
        }
        let tree = Arc::new(InputTree::new(root, directories)?);
        Ok(Box::new(Opened { tree, blobs, held: HashSet::new() }))
    }

    fn begin_outputs(&self, _: &Instance, function: DigestFunction, _: Owner) -> Box<dyn Outputs + '_> {
        assert_eq!(function, DigestFunction::Sha256, "the function of all actions here");
        Box::new(Batch(self.0.clone()))
    }

    fn relieve_disk(&self, _: &dyn Fn() -> bool) {}
}

struct Batch(Arc<MemoryStore>);

impl Outputs for Batch {
    fn file(&mut self, parent: &File, name: &str, mut file: File) -> Result<Digest> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        if rustix::fs::fstat(&file).unwrap().st_nlink == 1 {
            rustix::fs::unlinkat(parent, name, AtFlags::empty()).unwrap();
        }
        Ok(self.0.put(bytes))
    }

    fn bytes(&mut self, bytes: Vec<u8>) -> Result<Digest> {
        Ok(self.0.put(bytes))
    }

    fn hold(&mut self, digests: Vec<Digest>) -> Result<()> {
        let blobs = self.0.blobs.lock().unwrap();
        let missing: Vec<_> = digests.iter().filter(|digest| !blobs.contains_key(digest)).copied().collect();
        self.0.held.lock().unwrap().extend(digests);
        if missing.is_empty() { Ok(()) } else { Err(Error::MissingBlobs(missing)) }
    }

    fn expect(&mut self, _: u64) {}

    fn publish(&mut self) -> Result<()> {
        Ok(())
    }

    fn result(&mut self, action: Digest, result: reapi::ActionResult, _: Provenance) -> Result<()> {
        self.0.results.lock().unwrap().insert(action, result);
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl Inputs for Opened {
    fn tree(&self) -> &Arc<InputTree> {
        &self.tree
    }

    fn hold_all(&mut self) -> Result<()> {
        self.hold(self.tree.blobs().to_vec())
    }

    fn hold(&mut self, blobs: Vec<Digest>) -> Result<()> {
        self.held.extend(blobs);
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        assert!(digest.is_empty() || self.held.contains(digest), "{name} is not held");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(mode)).unwrap();
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).unwrap();
        File::from(fd).write_all(&self.blobs[digest]).unwrap();
        Ok(())
    }
}

/// An actor that records stages.
struct Listener(Arc<Mutex<Vec<RunStage>>>);

impl Actor for Listener {
    type Context = Context<Self>;
}

impl Handler<StageReached> for Listener {
    type Result = ();

    fn handle(&mut self, fact: StageReached, _: &mut Self::Context) {
        self.0.lock().unwrap().push(fact.stage);
    }
}

/// A worker with an in-memory store.
pub struct Bench {
    pub store: Arc<MemoryStore>,
    pub build_root: PathBuf,
    /// Commands run in a sandbox.
    pub is_sandboxed: bool,
    pub stages: Arc<Mutex<Vec<RunStage>>>,
    worker: Addr<WorkerActor>,
    listener: Addr<Listener>,
    _directory: tempfile::TempDir,
}

/// Log streams with limits that no test reaches.
pub fn log_streams() -> LogStreams {
    let kept = Duration::from_secs(600);
    let limits = StreamLimits { streams: 1_000, bytes: 1 << 30, stream_bytes: 1 << 30, idle: None, kept };
    let spool_directory = std::env::temp_dir();
    LogStreams::new(LogSettings { client_streams: true, clients: limits, runs: limits, spool_directory })
}

/// Runs a test with one worker, whose commands may write files of up to 1 GiB.
pub fn with_worker<T>(body: impl AsyncFnOnce(&Bench) -> T) -> T {
    with_worker_of(1 << 30, body)
}

/// Runs a test with one worker, whose commands may write files of up to this size.
pub fn with_worker_of<T>(max_output_file_bytes: u64, body: impl AsyncFnOnce(&Bench) -> T) -> T {
    // Most tests look at their commands from outside. tests/sandbox is about the sandbox.
    with_bench(max_output_file_bytes, StagingLimits::default(), None, |_, _| None, body)
}

/// Runs a test with a sandboxed worker that stages all inputs, if this machine can, and whose commands may write files of up to
/// this size.
pub fn with_staging(max_output_file_bytes: u64, body: impl AsyncFn(&Bench)) {
    let limits = StagingLimits { min_nodes: 0, ..StagingLimits::default() };
    with_bench(max_output_file_bytes, limits, None, sandbox_with_layers, async |bench| {
        if bench.is_sandboxed {
            body(bench).await;
        }
    });
}

fn sandbox_with_layers(runner: &[OsString], build_root: &BuildRoot) -> Option<PoolSandbox> {
    let sandbox = PoolSandbox::usual(runner, build_root);
    if !sandbox.has_layers() {
        eprintln!("without a sandbox, because there are no overlays here");
    }
    sandbox.has_layers().then_some(sandbox)
}

/// Runs a test three times: with a worker that copies all inputs, the same in a sandbox, and with one that stages all inputs, if
/// this machine can.
pub fn with_each_staging(body: impl AsyncFn(&Bench)) {
    with_worker(&body);
    for min_nodes in [u64::MAX, 0] {
        let limits = StagingLimits { min_nodes, ..StagingLimits::default() };
        with_bench(1 << 30, limits, None, sandbox_with_layers, &body);
    }
}

/// Runs a test with one worker that keeps tools, first without a sandbox and then in one, if this machine can.
pub fn with_tools(limits: ToolLimits, body: impl AsyncFn(&Bench)) {
    let sandbox = |runner: &[OsString], build_root: &BuildRoot| Some(PoolSandbox::usual(runner, build_root));
    with_bench(1 << 30, StagingLimits::default(), Some(limits), |_, _| None, &body);
    with_bench(1 << 30, StagingLimits::default(), Some(limits), sandbox, &body);
}

fn with_bench<T>(
    max_output_file_bytes: u64,
    limits: StagingLimits,
    tools: Option<ToolLimits>,
    sandbox: impl FnOnce(&[OsString], &BuildRoot) -> Option<PoolSandbox>,
    body: impl AsyncFnOnce(&Bench) -> T,
) -> T {
    System::new().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("build");
        let store = Arc::new(MemoryStore::default());
        let build_root = BuildRoot::with_trees(&path, limits).unwrap();
        let runner: Vec<OsString> = vec![env!("CARGO_BIN_EXE_gorego").into(), "runner".into()];
        let sandbox = sandbox(&runner, &build_root);
        let is_sandboxed = sandbox.is_some();
        let settings = Arc::new(WorkerSettings {
            pool: "test".into(),
            name: "testhost".into(),
            build_root,
            transfer_timeout: Duration::from_secs(60),
            max_output_file_bytes,
            runner,
            images: None,
            sandbox,
            limits: PoolLimits::default(),
            tools: tools.map(|limits| Arc::new(Tools::new("test", limits))),
            log_streams: log_streams(),
            metrics: Default::default(),
        });
        let handle: Arc<dyn BlobStore> = Arc::new(Handle(store.clone()));
        let worker = SyncArbiter::start(1, move || WorkerActor::new(settings.clone(), handle.clone()));
        let stages = Arc::new(Mutex::new(Vec::new()));
        let listener = Listener(stages.clone()).start();
        let bench = Bench {
            store,
            build_root: path.canonicalize().unwrap(),
            is_sandboxed,
            stages,
            worker,
            listener,
            _directory: directory,
        };
        body(&bench).await
    })
}

/// An action under construction; usually started with [`sh`].
#[derive(Clone)]
pub struct Job {
    pub command: reapi::Command,
    pub root: Option<Digest>,
    pub timeout: Duration,
    pub do_not_cache: bool,
    /// Platform properties.
    pub platform: Vec<(String, String)>,
    pub cancel: CancelToken,
}

/// An action that runs a shell script.
pub fn sh(script: &str) -> Job {
    argv(&["/bin/sh", "-c", script]).env("PATH", "/usr/bin:/bin")
}

/// An action that runs a program.
pub fn argv(arguments: &[&str]) -> Job {
    Job {
        command: reapi::Command {
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            ..Default::default()
        },
        root: None,
        timeout: Duration::from_secs(60),
        do_not_cache: false,
        platform: Vec::new(),
        cancel: CancelToken::new(),
    }
}

impl Job {
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command
            .environment_variables
            .push(reapi::command::EnvironmentVariable { name: name.into(), value: value.into() });
        self
    }

    pub fn outputs(mut self, paths: &[&str]) -> Self {
        self.command.output_paths = paths.iter().map(|p| (*p).to_owned()).collect();
        self
    }

    pub fn workdir(mut self, path: &str) -> Self {
        self.command.working_directory = path.into();
        self
    }

    pub fn root(mut self, root: Digest) -> Self {
        self.root = Some(root);
        self
    }

    pub fn platform(mut self, name: &str, value: &str) -> Self {
        self.platform.push((name.into(), value.into()));
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl Bench {
    pub fn action(&self, job: &Job) -> Action {
        let root = job.root.unwrap_or(Digest::empty(SHA256));
        let wire = reapi::Action {
            command_digest: Some(self.store.put(job.command.encode_to_vec()).to_wire()),
            input_root_digest: Some(root.to_wire()),
            timeout: Some(job.timeout.try_into().unwrap()),
            do_not_cache: job.do_not_cache,
            platform: Some(reapi::Platform {
                properties: job
                    .platform
                    .iter()
                    .cloned()
                    .map(|(name, value)| reapi::platform::Property { name, value })
                    .collect(),
            }),
            ..Default::default()
        };
        let policy = TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(600) };
        let digest = self.store.put(wire.encode_to_vec());
        let instance = Instances::new([""]).unwrap().get("").unwrap();
        Action::from_wire(instance, digest, &wire, &job.command, policy).unwrap()
    }

    pub async fn report(&self, job: &Job) -> RunReport {
        self.worker
            .send(RunAction {
                order: RunOrder {
                    task: TaskId(7),
                    attempt: 1,
                    slot: SlotId(0),
                    action: Arc::new(self.action(job)),
                    peer: Peer::default(),
                    queued_at: SystemTime::now(),
                    tool_invocation_id: "invocation".into(),
                    principal: "token:ci".into(),
                },
                control: RunControl {
                    cancel: job.cancel.clone(),
                    progress: self.listener.clone().recipient(),
                },
            })
            .await
            .expect("the worker lives")
    }

    /// The result of an action that must run to its end.
    pub async fn result(&self, job: &Job) -> reapi::ActionResult {
        self.report(job).await.unwrap_or_else(|failure| panic!("{}", failure.error)).result.into_inner()
    }

    pub async fn failure(&self, job: &Job) -> RunFailure {
        self.report(job).await.expect_err("the run fails")
    }

    pub fn text(&self, digest: &Option<reapi::Digest>) -> String {
        digest.as_ref().map_or(String::new(), |d| String::from_utf8(self.store.get(d)).unwrap())
    }

    /// Stores an input root; each entry is a path and a node.
    pub fn input(&self, entries: &[(&str, Node)]) -> Digest {
        #[derive(Default)]
        struct Building {
            nodes: Vec<(String, Node)>,
            children: std::collections::BTreeMap<String, Building>,
        }
        let mut top = Building::default();
        for (path, node) in entries {
            let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
            let mut at = &mut top;
            for segment in parents.split('/').filter(|s| !s.is_empty()) {
                at = at.children.entry(segment.into()).or_default();
            }
            match node {
                Node::Dir => drop(at.children.entry(name.into()).or_default()),
                node => at.nodes.push((name.into(), node.clone())),
            }
        }
        fn write(store: &MemoryStore, building: &Building) -> Digest {
            let mut directory = reapi::Directory::default();
            for (name, node) in &building.nodes {
                match node {
                    Node::File(content) | Node::Program(content) | Node::Tool(content) => {
                        directory.files.push(reapi::FileNode {
                            name: name.clone(),
                            digest: Some(store.put(content.as_bytes()).to_wire()),
                            is_executable: !matches!(node, Node::File(_)),
                            node_properties: matches!(node, Node::Tool(_)).then(|| reapi::NodeProperties {
                                properties: vec![reapi::NodeProperty {
                                    name: "bazel_tool_input".into(),
                                    value: String::new(),
                                }],
                                ..Default::default()
                            }),
                        });
                    }
                    Node::Link(target) => directory.symlinks.push(reapi::SymlinkNode {
                        name: name.clone(),
                        target: target.clone(),
                        ..Default::default()
                    }),
                    Node::Dir => {}
                }
            }
            for (name, child) in &building.children {
                let digest = Some(write(store, child).to_wire());
                directory.directories.push(reapi::DirectoryNode { name: name.clone(), digest });
            }
            store.put(directory.encode_to_vec())
        }
        write(&self.store, &top)
    }
}

/// A node of an input root.
#[derive(Clone)]
pub enum Node {
    File(String),
    Program(String),
    /// A program that belongs to a persistent worker.
    Tool(String),
    Link(String),
    Dir,
}

pub fn file(content: &str) -> Node {
    Node::File(content.into())
}

pub fn program(content: &str) -> Node {
    Node::Program(content.into())
}

pub fn tool(content: &str) -> Node {
    Node::Tool(content.into())
}

pub fn link(target: &str) -> Node {
    Node::Link(target.into())
}

/// Waits for a condition that another process establishes.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        actix::clock::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether a process exists and is not a zombie.
pub fn is_alive(pid: &str) -> bool {
    std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}
