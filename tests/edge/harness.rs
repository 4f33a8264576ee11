//! [`Server`]: an endpoint for one test, and its scheduler.

use actix::{Actor, Context, Handler, Message, System};
use gorego::{
    action::TimeoutPolicy,
    actors::{
        cas::{CasActor, StoreSettings, client::Cas},
        scheduler::{
            messages::{Admit, Cancel, Explain, Forget, ListOperations, OperationPage, Watch},
            operation::{OperationId, OperationInfo, Outcome, QueueStatus, Snapshot, Stage, Subscription},
            settings::Priorities,
        },
    },
    config::CommittedSize,
    grpc::{Edge, ProtocolSettings, ask::Scheduler, health::Health},
    instance::{Instances, Policy},
    log_streams::{LogSettings, LogStreams, StreamLimits},
    under_way::UnderWay,
};
use gorego_client::stubs::{
    ActionCacheClient, ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient,
    ExecutionClient, OperationsClient,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, SystemTime},
};
use tokio::{net::TcpListener, runtime::Handle, sync::watch, task::JoinHandle};
use tonic::transport::{Channel, Endpoint};

/// Largest blob of the test server.
pub const MAX_BLOB_BYTES: u64 = 64_000_000;

/// A running endpoint with the instances "" and "a/b/c".
pub struct Server {
    pub scheduler: actix::Addr<FakeScheduler>,
    pub health: Health,
    pub channel: Channel,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    pub serving: JoinHandle<Result<()>>,
    system: System,
    _store: tempfile::TempDir,
}

impl Server {
    pub async fn start() -> Self {
        Self::with(true).await
    }

    /// Without `executes`, the endpoint is a read-only cache.
    pub async fn with(executes: bool) -> Self {
        let store = tempfile::tempdir().unwrap();
        let policy = || Policy { action_cache_updates: executes, ..Policy::default() };
        let instances = ["", "a/b/c"].map(|name| (name.to_owned(), policy()));
        let instances = Instances::with_policies(instances).unwrap();
        let settings = StoreSettings {
            root: store.path().join("store"),
            max_bytes: 1_000_000_000,
            max_blob_bytes: MAX_BLOB_BYTES,
            partial_upload_retention: Duration::from_secs(600),
            zstd_level: 1,
            timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(60) },
        };
        let (system, cas, scheduler) = actors(settings, instances.clone());
        let edge = Edge {
            assets: None,
            instances,
            cas,
            scheduler: executes.then(|| Scheduler::new(scheduler.clone())),
            log_streams: log_streams(executes, store.path()),
            under_way: UnderWay::default(),
            connections: Default::default(),
            settings: ProtocolSettings {
                max_blob_bytes: MAX_BLOB_BYTES,
                compressed_committed_size: CommittedSize::Compressed,
                chunking: executes,
                priorities: Priorities { min: -100, max: 100 },
            },
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::serving().await;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn({
            let health = health.clone();
            async move {
                let shutdown = async {
                    let _ = stopped.await;
                };
                gorego::grpc::serve(Arc::new(edge), &health, listener, shutdown).await
            }
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { scheduler, health, channel, stop: Some(stop), serving, system, _store: store }
    }

    pub fn shut_down(&mut self) {
        drop(self.stop.take());
    }

    pub fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.channel.clone())
    }

    pub fn bytes(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(self.channel.clone())
    }

    pub fn action_cache(&self) -> ActionCacheClient<Channel> {
        ActionCacheClient::new(self.channel.clone())
    }

    pub fn execution(&self) -> ExecutionClient<Channel> {
        ExecutionClient::new(self.channel.clone())
    }

    pub fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone())
    }

    pub fn capabilities(&self) -> CapabilitiesClient<Channel> {
        CapabilitiesClient::new(self.channel.clone())
    }

    /// Stores blobs in the default instance.
    pub async fn store(&self, blobs: &[&[u8]]) {
        let request = |blob: &&[u8]| reapi::batch_update_blobs_request::Request {
            digest: Some(digest(blob)),
            data: blob.to_vec().into(),
            compressor: 0,
        };
        let requests = blobs.iter().map(request).collect();
        let request = reapi::BatchUpdateBlobsRequest { requests, ..Default::default() };
        let answer = self.cas().batch_update_blobs(request).await.unwrap().into_inner();
        assert!(answer.responses.iter().all(|response| response.status.as_ref().unwrap().code == 0));
    }

    /// The digests that the default instance does not have.
    pub async fn missing(&self, digests: &[reapi::Digest]) -> Vec<reapi::Digest> {
        let request = reapi::FindMissingBlobsRequest { blob_digests: digests.to_vec(), ..Default::default() };
        self.cas().find_missing_blobs(request).await.unwrap().into_inner().missing_blob_digests
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
        self.system.stop();
    }
}

/// Log streams with limits that a test can reach.
pub fn log_streams(client_streams: bool, spool_directory: &std::path::Path) -> LogStreams {
    let kept = Duration::from_secs(600);
    // One client may have 40 of them.
    let clients =
        StreamLimits { streams: 45, bytes: 10_000_000, stream_bytes: 4_000_000, idle: Some(kept), kept };
    let runs = StreamLimits { idle: None, ..clients };
    LogStreams::new(LogSettings { client_streams, clients, runs, spool_directory: spool_directory.into() })
}

/// Starts the actors on their own thread, like the server.
fn actors(settings: StoreSettings, instances: Instances) -> (System, Cas, actix::Addr<FakeScheduler>) {
    let runtime = Handle::current();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let system = System::new();
        system.block_on(async {
            let cas = CasActor::open(settings, &instances, runtime).unwrap().launch();
            let scheduler = FakeScheduler::default().start();
            sender.send((System::current(), cas, scheduler)).unwrap();
        });
        system.run().unwrap();
    });
    receiver.recv().unwrap()
}

pub fn digest(bytes: &[u8]) -> reapi::Digest {
    DigestFunction::Sha256.digest(bytes).to_wire()
}

/// The path of a digest in resource names.
pub fn path(digest: &reapi::Digest) -> String {
    format!("blobs/{}/{}", digest.hash, digest.size_bytes)
}

/// Waits until a condition holds, for a short time.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A scheduler that remembers operations and changes them only when a test tells it to.
#[derive(Default)]
pub struct FakeScheduler {
    refusal: Option<Error>,
    operations: Vec<(Arc<OperationInfo>, watch::Sender<Snapshot>)>,
}

impl FakeScheduler {
    fn find(&self, id: OperationId) -> Result<&(Arc<OperationInfo>, watch::Sender<Snapshot>)> {
        let found = self.operations.iter().find(|(info, _)| info.id == id);
        found.ok_or_else(|| Error::NotFound(format!("there is no operation {id}")))
    }
}

impl Actor for FakeScheduler {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(4096);
    }
}

/// Makes every later Admit fail with this error.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Refuse(pub Error);

/// Sets the next state of the newest operation. The answer is the number of its subscribers.
#[derive(Message)]
#[rtype(result = "usize")]
pub struct Show(pub Snapshot);

/// Stops the actor as a panic would.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Die;

impl Handler<Refuse> for FakeScheduler {
    type Result = ();

    fn handle(&mut self, message: Refuse, _: &mut Self::Context) {
        self.refusal = Some(message.0);
    }
}

impl Handler<Show> for FakeScheduler {
    type Result = usize;

    fn handle(&mut self, message: Show, _: &mut Self::Context) -> usize {
        let Some((_, cell)) = self.operations.last() else { return 0 };
        cell.send_replace(message.0);
        cell.receiver_count()
    }
}

impl Handler<Die> for FakeScheduler {
    type Result = ();

    fn handle(&mut self, _: Die, context: &mut Self::Context) {
        self.operations.clear();
        actix::ActorContext::terminate(context);
    }
}

impl Handler<Admit> for FakeScheduler {
    type Result = Result<Subscription>;

    fn handle(&mut self, Admit { submit: message, .. }: Admit, _: &mut Self::Context) -> Self::Result {
        if let Some(error) = &self.refusal {
            return Err(error.clone());
        }
        let info = Arc::new(OperationInfo {
            id: OperationId::random(Default::default()),
            instance: message.instance,
            action: message.action,
            inline: message.inline,
            client: message.client,
            peer: message.caller.peer,
        });
        let (cell, snapshots) = watch::channel(queued());
        self.operations.push((info.clone(), cell));
        Ok(Subscription { info, snapshots })
    }
}

impl Handler<Watch> for FakeScheduler {
    type Result = Result<Subscription>;

    fn handle(&mut self, message: Watch, _: &mut Self::Context) -> Self::Result {
        let (info, cell) = self.find(message.id)?;
        Ok(Subscription { info: info.clone(), snapshots: cell.subscribe() })
    }
}

impl Handler<Cancel> for FakeScheduler {
    type Result = Result<()>;

    fn handle(&mut self, message: Cancel, _: &mut Self::Context) -> Self::Result {
        let (_, cell) = self.find(message.id)?;
        cell.send_replace(completed(None, Some(Error::Cancelled("cancelled".into()))));
        Ok(())
    }
}

impl Handler<Forget> for FakeScheduler {
    type Result = Result<()>;

    fn handle(&mut self, message: Forget, _: &mut Self::Context) -> Self::Result {
        self.find(message.id)?;
        self.operations.retain(|(info, _)| info.id != message.id);
        Ok(())
    }
}

impl Handler<Explain> for FakeScheduler {
    type Result = Option<Box<QueueStatus>>;

    fn handle(&mut self, _: Explain, _: &mut Self::Context) -> Self::Result {
        let reason = "the test says so".into();
        Some(Box::new(QueueStatus { pool: "fake".into(), position: Some(3), reason, ..Default::default() }))
    }
}

impl Handler<ListOperations> for FakeScheduler {
    type Result = Result<OperationPage>;

    fn handle(&mut self, message: ListOperations, _: &mut Self::Context) -> Self::Result {
        let after = usize::try_from(message.after).unwrap();
        let rest = self.operations.iter().skip(after);
        let operations: Vec<_> =
            rest.take(message.limit).map(|(info, cell)| (info.clone(), cell.borrow().clone())).collect();
        let end = after + operations.len();
        Ok(OperationPage { operations, next: (end < self.operations.len()).then_some(end as u64) })
    }
}

pub fn queued() -> Snapshot {
    Snapshot::queued(SystemTime::now())
}

pub fn executing() -> Snapshot {
    Snapshot { stage: Stage::Executing, ..queued() }
}

pub fn completed(result: Option<reapi::ActionResult>, error: Option<Error>) -> Snapshot {
    let outcome = Outcome {
        result: result.map(Arc::new),
        cached: false,
        error,
        message: String::new(),
        server_logs: Vec::new(),
    };
    Snapshot { stage: Stage::Completed, outcome: Some(Arc::new(outcome)), ..queued() }
}

/// The digest of a blob that is not stored.
pub fn absent(n: u64) -> Digest {
    DigestFunction::Sha256.digest(format!("absent {n}").as_bytes())
}
