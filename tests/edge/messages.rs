//! What a call costs in messages to actors: a store, a scheduler and a worker as in the server, behind a real endpoint.
//!
//! `docs/performance.md` has the figures.

use crate::harness::{digest, log_streams};
use actix::{Actor, Addr, SyncArbiter, System};
use bytes::Bytes;
use gorego::{
    action::TimeoutPolicy,
    actors::{
        cas::{CasActor, InspectStore, StoreSettings, client::Cas},
        mail::Mail,
        scheduler::{
            Pool, SchedulerActor,
            messages::Inspect,
            settings::{Priorities, SchedulerSettings},
            slots::PoolSpec,
        },
        worker::{WorkerActor, WorkerSettings, workspace::BuildRoot},
    },
    config::{self, CommittedSize, Loaded, Machine},
    grpc::{Edge, ProtocolSettings, ask::Scheduler, health::Health},
    instance::Instances,
    under_way::UnderWay,
};
use gorego_client::stubs::{ByteStreamClient, ContentAddressableStorageClient, ExecutionClient};
use gorego_reapi::proto::{
    bytestream::WriteRequest,
    longrunning::{Operation, operation},
    reapi::{
        Action, ActionResult, BatchUpdateBlobsRequest, Command, Directory, DirectoryNode, ExecuteRequest,
        ExecuteResponse, FileNode, batch_update_blobs_request::Request, command::EnvironmentVariable,
    },
};
use prost::Message as _;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Handle};
use tonic::transport::{Channel, Endpoint};

/// The most that an Execute may cost which runs: one more than it does.
const EXECUTE_MAX: u64 = 10;

/// A server in this process whose actors' mail is counted.
struct Server {
    cas: Cas,
    scheduler: Addr<SchedulerActor>,
    mail: [Mail; 3],
    channel: Channel,
    system: System,
    _directory: tempfile::TempDir,
}

/// The actors, which live on a thread of their own.
type Actors = (System, Cas, Addr<SchedulerActor>, [Mail; 3]);

impl Server {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let instances = Instances::new([""]).unwrap();
        let (system, cas, scheduler, mail) = actors(directory.path(), &instances);
        let edge = Edge {
            assets: None,
            instances,
            cas: cas.clone(),
            scheduler: Some(Scheduler::new(scheduler.clone())),
            log_streams: log_streams(false, directory.path()),
            under_way: UnderWay::default(),
            connections: Default::default(),
            settings: ProtocolSettings {
                max_blob_bytes: 1 << 30,
                compressed_committed_size: CommittedSize::Compressed,
                chunking: false,
                priorities: Priorities { min: -100, max: 100 },
            },
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::serving().await;
        tokio::spawn(async move {
            gorego::grpc::serve(Arc::new(edge), &health, listener, std::future::pending()).await
        });
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Self { cas, scheduler, mail, channel, system, _directory: directory }
    }

    /// What the actors have handled, once they have handled all that was sent so far.
    async fn handled(&self) -> BTreeMap<&'static str, u64> {
        self.cas.actor().send(InspectStore).await.unwrap();
        self.scheduler.send(Inspect).await.unwrap();
        let mut sum = BTreeMap::new();
        for (kind, messages) in self.mail.iter().flat_map(Mail::by_kind) {
            *sum.entry(kind).or_default() += messages;
        }
        sum.retain(|kind, _| !["InspectStore", "Inspect"].contains(kind));
        sum
    }

    /// The messages that a call makes the actors handle.
    async fn cost<T>(&self, call: impl Future<Output = T>) -> (T, BTreeMap<&'static str, u64>) {
        let before = self.handled().await;
        let answer = call.await;
        let mut cost = self.handled().await;
        for (kind, messages) in &mut cost {
            *messages -= before.get(kind).copied().unwrap_or(0);
        }
        cost.retain(|_, messages| *messages > 0);
        (answer, cost)
    }

    async fn upload(&self, blobs: &[Vec<u8>]) {
        let request = |blob: &Vec<u8>| Request {
            digest: Some(digest(blob)),
            data: Bytes::from(blob.clone()),
            compressor: 0,
        };
        let requests = blobs.iter().map(request).collect();
        let mut client = ContentAddressableStorageClient::new(self.channel.clone());
        let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
        let answer = client.batch_update_blobs(request).await.unwrap().into_inner();
        assert!(answer.responses.iter().all(|response| response.status.as_ref().unwrap().code == 0));
    }

    async fn execute(&self, action: &[u8]) -> ExecuteResponse {
        let request = ExecuteRequest { action_digest: Some(digest(action)), ..Default::default() };
        let mut stream =
            ExecutionClient::new(self.channel.clone()).execute(request).await.unwrap().into_inner();
        let mut last = Operation::default();
        while let Some(operation) = stream.message().await.unwrap() {
            last = operation;
        }
        let Some(operation::Result::Response(any)) = last.result else { panic!("{last:?}") };
        ExecuteResponse::decode(any.value.as_slice()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.system.stop();
    }
}

fn actors(directory: &Path, instances: &Instances) -> Actors {
    let settings = StoreSettings {
        root: directory.join("store"),
        max_bytes: 1 << 30,
        max_blob_bytes: 1 << 30,
        partial_upload_retention: Duration::from_secs(600),
        zstd_level: 1,
        timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(60) },
    };
    let worker = Arc::new(WorkerSettings {
        name: "host".into(),
        pool: "local".into(),
        build_root: BuildRoot::open(&directory.join("build")).unwrap(),
        transfer_timeout: Duration::from_secs(60),
        max_output_file_bytes: 1 << 20,
        runner: vec![env!("CARGO_BIN_EXE_gorego").into(), "runner".into()],
        sandbox: None,
        log_streams: log_streams(false, directory),
    });
    let machine = Machine { cpus: 1, cache_home: Some("/cache".into()), current_dir: "/".into() };
    let config = config::Settings::new(&Loaded::defaults(), &machine).unwrap();
    let of_scheduler = SchedulerSettings::new(&config.execution.unwrap());
    let (instances, runtime) = (instances.clone(), Handle::current());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let system = System::new();
        system.block_on(async {
            let store = CasActor::open(settings, &instances, runtime).unwrap();
            let (of_store, of_workers) = (store.mail(), Mail::default());
            let cas = store.launch();
            let (blobs, counted) = (Arc::new(cas.clone()), of_workers.clone());
            let workers = SyncArbiter::start(1, move || {
                WorkerActor::new(worker.clone(), blobs.clone()).counted_in(counted.clone())
            });
            let spec = PoolSpec {
                name: "local".into(),
                section: "execution.platform".into(),
                worker: "host".into(),
                slots: 1,
                offers: Default::default(),
            };
            let pool = Pool { spec, runner: workers.recipient() };
            let scheduler = SchedulerActor::new(of_scheduler, vec![pool], cas.clone());
            let mail = [of_store, scheduler.mail(), of_workers];
            sender.send((System::current(), cas, scheduler.start(), mail)).unwrap();
        });
        system.run().unwrap();
    });
    receiver.recv().unwrap()
}

/// An action whose input root has five levels and three files, which prints to both of its logs and makes a file; with all its
/// blobs, of which it is the last.
fn action() -> Vec<Vec<u8>> {
    let script = "cat one a/b/c/d/three > out; echo said; echo complained >&2";
    let command = Command {
        arguments: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        environment_variables: vec![EnvironmentVariable {
            name: "PATH".into(),
            value: "/usr/bin:/bin".into(),
        }],
        output_paths: vec!["out".into()],
        ..Default::default()
    };
    let mut blobs = vec![b"first".to_vec(), b"second".to_vec(), b"third".to_vec()];
    let file = |name: &str, content: &[u8]| FileNode {
        name: name.into(),
        digest: Some(digest(content)),
        ..Default::default()
    };
    let mut directory = Directory { files: vec![file("three", b"third")], ..Default::default() };
    for name in ["d", "c", "b", "a"] {
        let bytes = directory.encode_to_vec();
        directory = Directory::default();
        directory.directories.push(DirectoryNode { name: name.into(), digest: Some(digest(&bytes)) });
        blobs.push(bytes);
    }
    directory.files = vec![file("one", b"first"), file("two", b"second")];
    let action = Action {
        command_digest: Some(digest(&command.encode_to_vec())),
        input_root_digest: Some(digest(&directory.encode_to_vec())),
        ..Default::default()
    };
    blobs.extend([directory.encode_to_vec(), command.encode_to_vec(), action.encode_to_vec()]);
    blobs
}

fn sum(cost: &BTreeMap<&str, u64>) -> u64 {
    cost.values().sum()
}

/// Each message is a wake-up of the one thread on which all actors but the workers live, and most make a caller wait.
#[tokio::test(flavor = "multi_thread")]
async fn an_execute_costs_few_messages_and_one_from_the_cache_one() {
    let server = Server::start().await;
    let blobs = action();
    server.upload(&blobs).await;
    let (fresh, cost) = server.cost(server.execute(blobs.last().unwrap())).await;
    let ActionResult { exit_code, output_files, stdout_digest, stderr_digest, .. } = fresh.result.unwrap();
    assert_eq!((exit_code, output_files.len()), (0, 1));
    assert_eq!((stdout_digest, stderr_digest), (Some(digest(b"said\n")), Some(digest(b"complained\n"))));
    assert!(!fresh.cached_result && sum(&cost) <= EXECUTE_MAX, "{}: {cost:?}", sum(&cost));
    println!("an Execute that runs: {}: {cost:?}", sum(&cost));

    let (hit, cost) = server.cost(server.execute(blobs.last().unwrap())).await;
    println!("an Execute from the cache: {}: {cost:?}", sum(&cost));
    assert!(hit.cached_result);
    assert_eq!(sum(&cost), 1, "{cost:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_cost_two_messages_a_batch_and_three_a_stream() {
    let server = Server::start().await;
    let (_, cost) = server.cost(server.upload(&action())).await;
    println!("a batch: {}: {cost:?}", sum(&cost));
    assert_eq!(sum(&cost), 2, "{cost:?}");

    let data = b"sent in one message".to_vec();
    let digest = digest(&data);
    let name =
        format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{}/{}", digest.hash, digest.size_bytes);
    let message =
        WriteRequest { resource_name: name, write_offset: 0, finish_write: true, data: data.into() };
    let write = async || {
        let stream = futures::stream::iter([message.clone()]);
        ByteStreamClient::new(server.channel.clone()).write(stream).await.unwrap().into_inner().committed_size
    };
    let (committed, cost) = server.cost(write()).await;
    println!("a stream: {}: {cost:?}", sum(&cost));
    assert_eq!((committed, sum(&cost)), (digest.size_bytes, 3), "{cost:?}");
    let (_, cost) = server.cost(write()).await;
    assert_eq!(sum(&cost), 1, "of what is stored: {cost:?}");
}
