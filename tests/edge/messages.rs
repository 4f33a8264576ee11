//! Counts the messages to actors that a call costs. A store, a scheduler and a worker run as in the server, behind a
//! real endpoint.
//!
//! `docs/performance.md` has the figures.

use crate::{
    harness::{MAX_BLOB_BYTES, digest as digest_of, protocol_settings},
    support::{
        Client, empty,
        endpoint::{ActorThread, Endpoint, log_streams, store_settings},
        sh_with, sha256,
    },
};
use actix::{Actor, Addr, SyncArbiter};
use gorego::{
    access::authenticator::Authenticator,
    actors::{
        cas::{CasActor, InspectStore, client::Cas},
        mail::Mail,
        scheduler::{
            Pool, SchedulerActor,
            messages::Inspect,
            settings::{Priorities, SchedulerConfig, SchedulerSettings},
            slots::PoolSpec,
        },
        worker::{PoolLimits, WorkerActor, WorkerSettings, build_root::BuildRoot, staging::StagingActor},
    },
    gate::Gate,
    grpc::{Edge, ask::Scheduler},
    instance::Instances,
    node::NodeName,
    platform::UnknownProperties,
    unfinished_requests::UnfinishedRequests,
};
use gorego_reapi::proto::{
    bytestream::WriteRequest,
    longrunning::ListOperationsRequest,
    reapi::{
        Action, ActionResult, Command, Directory, DirectoryNode, FileNode, command::EnvironmentVariable,
    },
};
use prost::Message as _;
use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};
use tokio::runtime::Handle;

/// The most messages that an Execute whose action runs may cost: one more than it does cost.
const EXECUTE_MAX: u64 = 10;

/// A server in this process whose actors' mail is counted.
struct Server {
    cas: Cas,
    scheduler: Addr<SchedulerActor>,
    mail: [Mail; 3],
    endpoint: Endpoint,
    _actors: ActorThread,
    _directory: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let instances = Instances::new([""]).unwrap();
        let (actors, (cas, scheduler, mail)) = actors(directory.path(), &instances);
        let endpoint = Endpoint::start(Edge {
            assets: None,
            gate: Gate::new(instances, Authenticator::open()),
            cas: cas.clone(),
            scheduler: Some(Scheduler::new(scheduler.clone(), NodeName::default())),
            log_streams: log_streams(false, directory.path()),
            unfinished_requests: UnfinishedRequests::default(),
            connections: Default::default(),
            administration: Default::default(),
            metrics: Default::default(),
            settings: protocol_settings(false),
        });
        Self { cas, scheduler, mail, endpoint: endpoint.await, _actors: actors, _directory: directory }
    }

    /// The number of messages that each actor has handled, after all messages that were sent so far.
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

    fn client(&self) -> &Client {
        &self.endpoint.client
    }
}

/// The store, the scheduler, and the counts of the mail to them and to the worker.
type Actors = (Cas, Addr<SchedulerActor>, [Mail; 3]);

fn actors(directory: &Path, instances: &Instances) -> (ActorThread, Actors) {
    let settings = store_settings(directory, MAX_BLOB_BYTES);
    let worker = Arc::new(WorkerSettings {
        name: "host".into(),
        pool: "local".into(),
        build_root: BuildRoot::open(&directory.join("build")).unwrap(),
        transfer_timeout: Duration::from_secs(60),
        max_output_file_bytes: 1 << 20,
        runner: vec![env!("CARGO_BIN_EXE_gorego").into(), "runner".into()],
        images: None,
        sandbox: None,
        limits: PoolLimits::default(),
        tools: None,
        log_streams: log_streams(false, directory),
        metrics: Default::default(),
    });
    let minute = Duration::from_secs(60);
    let of_scheduler = SchedulerSettings::new(SchedulerConfig {
        node: NodeName::default(),
        queue_size: 100,
        priorities: Priorities { min: -100, max: 100 },
        priority_ageing: minute,
        unknown_properties: UnknownProperties::Ignore,
        queue_timeout: minute,
        transfer_timeout: minute,
        retention: minute,
        retained_operations: 1_000,
        abandon_grace: minute,
        contended_abandon_grace: minute,
        max_attempts: 1,
    });
    let (instances, runtime) = (instances.clone(), Handle::current());
    ActorThread::start(move || {
        let store = CasActor::open(settings, &instances, runtime).unwrap();
        let (of_store, of_workers) = (store.mail(), Mail::default());
        let cas = store.launch();
        let (blobs, counted) = (Arc::new(cas.clone()), of_workers.clone());
        let (of_stager, inputs) = (worker.clone(), blobs.clone());
        let stager = SyncArbiter::start(1, move || StagingActor::new(of_stager.clone(), inputs.clone()));
        let workers = SyncArbiter::start(1, move || {
            WorkerActor::new(worker.clone(), blobs.clone()).counted_in(counted.clone())
        });
        let spec = PoolSpec {
            name: "local".into(),
            section: "execution.platform".into(),
            worker: "host".into(),
            slots: 1,
            offers: Default::default(),
            limits: Default::default(),
            room: None,
        };
        let pool = Pool { spec, runner: workers.recipient(), stager: Some(stager.recipient()) };
        let scheduler = SchedulerActor::new(of_scheduler, vec![pool], cas.clone());
        let mail = [of_store, scheduler.mail(), of_workers];
        (cas, scheduler.start(), mail)
    })
}

/// The blobs of an action; the last one is the Action. Its input root has five levels and three files. Its command
/// prints to both logs and makes a file.
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
        digest: Some(digest_of(content)),
        ..Default::default()
    };
    let mut directory = Directory { files: vec![file("three", b"third")], ..Default::default() };
    for name in ["d", "c", "b", "a"] {
        let bytes = directory.encode_to_vec();
        directory = Directory::default();
        directory.directories.push(DirectoryNode { name: name.into(), digest: Some(digest_of(&bytes)) });
        blobs.push(bytes);
    }
    directory.files = vec![file("one", b"first"), file("two", b"second")];
    let action = Action {
        command_digest: Some(digest_of(&command.encode_to_vec())),
        input_root_digest: Some(digest_of(&directory.encode_to_vec())),
        ..Default::default()
    };
    blobs.extend([directory.encode_to_vec(), command.encode_to_vec(), action.encode_to_vec()]);
    blobs
}

fn sum(cost: &BTreeMap<&str, u64>) -> u64 {
    cost.values().sum()
}

/// Each message wakes the one thread on which all actors except the workers run, and most messages make a caller wait.
#[tokio::test(flavor = "multi_thread")]
async fn an_execute_costs_few_messages_and_those_from_the_cache_share_one() {
    let server = Server::start().await;
    let blobs = action();
    server.client().upload_all(blobs.clone()).await;
    let action = sha256(blobs.last().unwrap());
    let (fresh, cost) = server.cost(server.client().run(action)).await;
    let ActionResult { exit_code, output_files, stdout_digest, stderr_digest, .. } = fresh.result.unwrap();
    assert_eq!((exit_code, output_files.len()), (0, 1));
    assert_eq!(
        (stdout_digest, stderr_digest),
        (Some(digest_of(b"said\n")), Some(digest_of(b"complained\n")))
    );
    assert!(!fresh.cached_result && sum(&cost) <= EXECUTE_MAX, "{}: {cost:?}", sum(&cost));
    println!("an Execute that runs: {}: {cost:?}", sum(&cost));

    let many = 200;
    let hits_and_a_list = async {
        for _ in 0..many / 50 {
            let hits = futures::future::join_all((0..50).map(|_| server.client().run(action))).await;
            assert!(hits.iter().all(|hit| hit.cached_result));
        }
        // The scheduler knows all of them when it handles this request.
        let request = ListOperationsRequest { page_size: 1000, ..Default::default() };
        server.client().operations.clone().list_operations(request).await.unwrap().into_inner().operations
    };
    let (operations, mut cost) = server.cost(hits_and_a_list).await;
    println!("{many} Executes from the cache: {}: {cost:?}", sum(&cost));
    assert_eq!(operations.len(), many + 1);
    assert_eq!(cost.remove("ListOperations"), Some(1));
    let records = cost.remove("Record").unwrap();
    assert!(records < many as u64 && cost.is_empty(), "{records} {cost:?}");
}

/// Outputs are prepared and made visible together.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_outputs_cost_no_message_each() {
    let server = Server::start().await;
    let script = "mkdir d; for n in $(seq 1000); do echo $n > d/$n; done";
    let command = sh_with(script, &["d"]);
    let action = server.client().action(command, empty()).await;
    let (fresh, cost) = server.cost(server.client().run(action)).await;
    let result = fresh.result.unwrap();
    assert_eq!((result.exit_code, result.output_directories.len()), (0, 1));
    assert!(sum(&cost) <= EXECUTE_MAX, "{}: {cost:?}", sum(&cost));
    assert_eq!(server.client().read(sha256(b"1000\n")).await.unwrap(), b"1000\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_cost_two_messages_in_a_batch_or_a_stream_of_one_message_and_three_in_a_longer_stream() {
    let server = Server::start().await;
    let (_, cost) = server.cost(server.client().upload_all(action())).await;
    println!("a batch: {}: {cost:?}", sum(&cost));
    assert_eq!(sum(&cost), 2, "{cost:?}");

    let data = b"sent in one message".to_vec();
    let digest = digest_of(&data);
    let name =
        format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{}/{}", digest.hash, digest.size_bytes);
    let message =
        WriteRequest { resource_name: name, write_offset: 0, finish_write: true, data: data.into() };
    let write = async || {
        let stream = futures::stream::iter([message.clone()]);
        server.client().bytes.clone().write(stream).await.unwrap().into_inner().committed_size
    };
    let (committed, cost) = server.cost(write()).await;
    println!("a stream: {}: {cost:?}", sum(&cost));
    assert_eq!((committed, sum(&cost)), (digest.size_bytes, 2), "{cost:?}");
    let (_, cost) = server.cost(write()).await;
    assert_eq!(sum(&cost), 1, "of what is stored: {cost:?}");

    let data = b"sent in two messages".to_vec();
    let digest = digest_of(&data);
    let name =
        format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{}/{}", digest.hash, digest.size_bytes);
    let (first, second) = data.split_at(5);
    let messages = [
        WriteRequest { resource_name: name, data: first.to_vec().into(), ..Default::default() },
        WriteRequest {
            write_offset: 5,
            finish_write: true,
            data: second.to_vec().into(),
            ..Default::default()
        },
    ];
    let stream = futures::stream::iter(messages);
    let (_, cost) = server.cost(server.client().bytes.clone().write(stream)).await;
    assert_eq!(sum(&cost), 3, "{cost:?}");
}
