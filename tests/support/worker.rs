//! A worker with an in-memory store, for tests that run real processes.

mod input;
mod job;
mod store;

pub(crate) use super::eventually;

pub(crate) use self::{
    input::{Node, file, link, program, tool},
    job::{Job, argv, sh},
    store::{Handle, MemoryStore},
};

use actix::{Actor, Addr, Context, Handler, SyncArbiter, System};
use gorego::{
    action::{Action, TimeoutPolicy},
    actors::worker::{
        PoolLimits, WorkerActor, WorkerSettings,
        build_root::BuildRoot,
        build_root::staged_trees::StagingLimits,
        launcher::PoolSandbox,
        messages::{
            RunAction, RunControl, RunFailure, RunOrder, RunReport, RunStage, SlotId, StageAhead,
            StageReached, TaskId,
        },
        staging::StagingActor,
        store::BlobStore,
        tools::{ToolLimits, Tools},
    },
    caller::{Build, Owner, Peer},
    instance::Instances,
    log_streams::{LogSettings, LogStreams, StreamLimits},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi,
};
use prost::Message;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

pub(crate) const SHA256: DigestFunction = DigestFunction::Sha256;

/// The time limit for transfers of most tests.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(60);

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
pub(crate) struct Bench {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) build_root: PathBuf,
    /// Commands run in a sandbox.
    pub(crate) is_sandboxed: bool,
    pub(crate) stages: Arc<Mutex<Vec<RunStage>>>,
    worker: Addr<WorkerActor>,
    stager: Addr<StagingActor>,
    listener: Addr<Listener>,
    _directory: tempfile::TempDir,
}

/// Log streams with limits that no test reaches.
pub(crate) fn log_streams() -> LogStreams {
    let kept = Duration::from_secs(600);
    let limits = StreamLimits { streams: 1_000, bytes: 1 << 30, stream_bytes: 1 << 30, idle: None, kept };
    let spool_directory = std::env::temp_dir();
    LogStreams::new(LogSettings { client_streams: true, clients: limits, runs: limits, spool_directory })
}

/// Runs a test with one worker, whose commands may write files of up to 1 GiB.
pub(crate) fn with_worker<T>(body: impl AsyncFnOnce(&Bench) -> T) -> T {
    with_worker_of(1 << 30, body)
}

/// Runs a test with one worker, whose commands may write files of up to this size.
pub(crate) fn with_worker_of<T>(max_output_file_bytes: u64, body: impl AsyncFnOnce(&Bench) -> T) -> T {
    // Most tests look at their commands from outside. tests/sandbox is about the sandbox.
    with_bench(max_output_file_bytes, StagingLimits::default(), None, |_, _| None, body)
}

/// Runs a test with a sandboxed worker that stages all inputs, if this machine supports that. Its commands may write
/// files of up to this size.
pub(crate) fn with_staging(max_output_file_bytes: u64, body: impl AsyncFn(&Bench)) {
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

/// Runs a test three times: with a worker that copies all inputs, with one that does so in a sandbox, and with one that
/// stages all inputs. The last two need a machine that supports them.
pub(crate) fn with_each_staging(body: impl AsyncFn(&Bench)) {
    with_worker(&body);
    for min_nodes in [u64::MAX, 0] {
        let limits = StagingLimits { min_nodes, ..StagingLimits::default() };
        with_bench(1 << 30, limits, None, sandbox_with_layers, &body);
    }
}

/// Runs a test with one worker that keeps tools, first without a sandbox and then in one, if this machine supports
/// that.
pub(crate) fn with_tools(limits: ToolLimits, body: impl AsyncFn(&Bench)) {
    with_tools_within(TRANSFER_TIMEOUT, limits, body);
}

/// [`with_tools`] with this time limit for transfers.
pub(crate) fn with_tools_within(transfer_timeout: Duration, limits: ToolLimits, body: impl AsyncFn(&Bench)) {
    let sandbox = |runner: &[OsString], build_root: &BuildRoot| Some(PoolSandbox::usual(runner, build_root));
    let tools = Some((limits, transfer_timeout));
    with_bench(1 << 30, StagingLimits::default(), tools, |_, _| None, &body);
    with_bench(1 << 30, StagingLimits::default(), tools, sandbox, &body);
}

fn with_bench<T>(
    max_output_file_bytes: u64,
    limits: StagingLimits,
    tools: Option<(ToolLimits, Duration)>,
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
            transfer_timeout: tools.map_or(TRANSFER_TIMEOUT, |(_, transfer_timeout)| transfer_timeout),
            max_output_file_bytes,
            runner,
            images: None,
            sandbox,
            limits: PoolLimits::default(),
            tools: tools.map(|(limits, _)| Arc::new(Tools::new("test", limits))),
            log_streams: log_streams(),
            metrics: Default::default(),
        });
        let handle: Arc<dyn BlobStore> = Arc::new(Handle(store.clone()));
        let (same, store_of_stager) = (settings.clone(), handle.clone());
        let stager = SyncArbiter::start(1, move || StagingActor::new(same.clone(), store_of_stager.clone()));
        let worker = SyncArbiter::start(1, move || WorkerActor::new(settings.clone(), handle.clone()));
        let stages = Arc::new(Mutex::new(Vec::new()));
        let listener = Listener(stages.clone()).start();
        let bench = Bench {
            store,
            build_root: path.canonicalize().unwrap(),
            is_sandboxed,
            stages,
            worker,
            stager,
            listener,
            _directory: directory,
        };
        eventually("the tree of the probe is removed", || bench.trees() == 0).await;
        body(&bench).await
    })
}

impl Bench {
    pub(crate) fn action(&self, job: &Job) -> Action {
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

    pub(crate) async fn report(&self, job: &Job) -> RunReport {
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

    /// Has the inputs of a waiting action staged.
    pub(crate) async fn stage_ahead(&self, job: &Job) {
        let (action, cancel) = (Arc::new(self.action(job)), job.cancel.clone());
        let owner = Owner { peer: Peer::default(), build: Build::of("invocation") };
        self.stager.send(StageAhead { task: TaskId(7), action, owner, cancel }).await.expect("it lives");
    }

    /// The number of staged trees.
    pub(crate) fn trees(&self) -> usize {
        let entries = std::fs::read_dir(&self.build_root).unwrap().flatten();
        entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"t-")).count()
    }

    /// The result of an action that must run to its end.
    pub(crate) async fn result(&self, job: &Job) -> reapi::ActionResult {
        self.report(job).await.unwrap_or_else(|failure| panic!("{}", failure.error)).result.into_inner()
    }

    pub(crate) async fn failure(&self, job: &Job) -> RunFailure {
        self.report(job).await.expect_err("the run fails")
    }

    pub(crate) fn text(&self, digest: &Option<reapi::Digest>) -> String {
        digest.as_ref().map_or(String::new(), |d| String::from_utf8(self.store.get(d)).unwrap())
    }
}

/// Whether a process exists and is not a zombie.
pub(crate) fn is_alive(pid: &str) -> bool {
    std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}
