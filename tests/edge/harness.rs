//! [`Server`]: an endpoint for one test, and its scheduler.

use crate::support::{
    Client,
    endpoint::{ActorThread, Endpoint, log_streams, store_settings},
};
use actix::{Actor, Context, Handler, Message};
use gorego::{
    access::authenticator::Authenticator,
    actors::{
        cas::CasActor,
        scheduler::{
            messages::{Admit, Cancel, Explain, Forget, ListOperations, OperationPage, Record, Watch},
            operation::{OperationId, OperationInfo, Outcome, QueueStatus, Snapshot, Stage, Subscription},
            settings::Priorities,
        },
    },
    config::CommittedSize,
    gate::Gate,
    grpc::{Edge, ProtocolSettings, ask::Scheduler},
    instance::{InstancePolicy, Instances},
    unfinished_requests::UnfinishedRequests,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::{
        bytestream::{
            QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, WriteRequest, WriteResponse,
        },
        reapi,
    },
};
use std::{ops::Deref, sync::Arc, time::SystemTime};
use tokio::{runtime::Handle, sync::watch};
use tonic::{Response, Status};

/// Largest blob of the test server.
pub(crate) const MAX_BLOB_BYTES: u64 = 64_000_000;

/// A running endpoint with the instances "" and "a/b/c".
pub(crate) struct Server {
    pub(crate) scheduler: actix::Addr<FakeScheduler>,
    pub(crate) endpoint: Endpoint,
    _actors: ActorThread,
    _directory: tempfile::TempDir,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(true).await
    }

    /// Without `executes`, the endpoint is a read-only cache.
    pub(crate) async fn with(executes: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let policy = || InstancePolicy { action_cache_updates: executes, ..InstancePolicy::default() };
        let instances = ["", "a/b/c"].map(|name| (name.to_owned(), policy()));
        let instances = Instances::with_policies(instances).unwrap();
        let settings = store_settings(directory.path(), MAX_BLOB_BYTES);
        let (of_store, runtime) = (instances.clone(), Handle::current());
        let (actors, (cas, scheduler)) = ActorThread::start(move || {
            let cas = CasActor::open(settings, &of_store, runtime).unwrap().launch();
            (cas, FakeScheduler::default().start())
        });
        let endpoint = Endpoint::start(Edge {
            assets: None,
            gate: Gate::new(instances, Authenticator::open()),
            cas,
            scheduler: executes.then(|| Scheduler::new(scheduler.clone(), Default::default())),
            log_streams: log_streams(executes, directory.path()),
            unfinished_requests: UnfinishedRequests::default(),
            connections: Default::default(),
            administration: Default::default(),
            metrics: Default::default(),
            settings: protocol_settings(executes),
        });
        Self { scheduler, endpoint: endpoint.await, _actors: actors, _directory: directory }
    }

    /// Stores blobs in the default instance.
    pub(crate) async fn store(&self, blobs: &[&[u8]]) {
        self.upload_all(blobs.iter().copied()).await;
    }

    /// The digests that the default instance does not have.
    pub(crate) async fn missing(&self, digests: &[reapi::Digest]) -> Vec<reapi::Digest> {
        let digests: Vec<_> = digests.iter().map(|digest| self.digest(Some(digest))).collect();
        self.endpoint.client.missing(&digests).await.into_iter().map(Digest::to_wire).collect()
    }
}

/// The settings that clients see.
pub(crate) fn protocol_settings(chunking: bool) -> ProtocolSettings {
    ProtocolSettings {
        max_blob_bytes: MAX_BLOB_BYTES,
        compressed_committed_size: CommittedSize::Compressed,
        chunking,
        priorities: Priorities { min: -100, max: 100 },
    }
}

impl Deref for Server {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.endpoint.client
    }
}

pub(crate) fn digest(bytes: &[u8]) -> reapi::Digest {
    DigestFunction::Sha256.digest(bytes).to_wire()
}

/// The path of a digest in resource names.
pub(crate) fn path(digest: &reapi::Digest) -> String {
    format!("blobs/{}/{}", digest.hash, digest.size_bytes)
}

/// Writes these messages. Returns the `committed_size`.
pub(crate) async fn write(server: &Server, messages: Vec<WriteRequest>) -> Result<i64, Status> {
    let answer = server.bytes.clone().write(tokio_stream::iter(messages)).await;
    answer.map(Response::into_inner).map(|WriteResponse { committed_size }| committed_size)
}

/// All messages of a Read.
pub(crate) async fn read(
    server: &Server,
    name: &str,
    offset: i64,
    limit: i64,
) -> Result<Vec<Vec<u8>>, Status> {
    let request = ReadRequest { resource_name: name.into(), read_offset: offset, read_limit: limit };
    let mut stream = server.bytes.clone().read(request).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message.data.to_vec());
    }
    Ok(messages)
}

/// The `committed_size` of an upload, and whether it is complete.
pub(crate) async fn query(server: &Server, name: &str) -> (i64, bool) {
    let request = QueryWriteStatusRequest { resource_name: name.into() };
    let QueryWriteStatusResponse { committed_size, complete } =
        server.bytes.clone().query_write_status(request).await.unwrap().into_inner();
    (committed_size, complete)
}

/// A scheduler that remembers operations and changes them only when a test tells it to.
#[derive(Default)]
pub(crate) struct FakeScheduler {
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
pub(crate) struct Refuse(pub Error);

/// Sets the next state of the newest operation. The answer is the number of its subscribers.
#[derive(Message)]
#[rtype(result = "usize")]
pub(crate) struct Show(pub Snapshot);

/// Stops the actor as a panic would.
#[derive(Message)]
#[rtype(result = "()")]
pub(crate) struct Die;

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
            principal: message.principal,
        });
        let (cell, snapshots) = watch::channel(queued());
        self.operations.push((info.clone(), cell));
        Ok(Subscription { info, snapshots })
    }
}

impl Handler<Record> for FakeScheduler {
    type Result = ();

    fn handle(&mut self, _: Record, _: &mut Self::Context) {}
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

pub(crate) fn queued() -> Snapshot {
    Snapshot::queued(SystemTime::now())
}

pub(crate) fn executing() -> Snapshot {
    Snapshot { stage: Stage::Executing, ..queued() }
}

pub(crate) fn completed(result: Option<reapi::ActionResult>, error: Option<Error>) -> Snapshot {
    let outcome = Outcome {
        result: result.map(Into::into),
        cached: false,
        error,
        message: String::new(),
        server_logs: Vec::new(),
    };
    Snapshot { stage: Stage::Completed, outcome: Some(Arc::new(outcome)), ..queued() }
}

/// The digest of a blob that is not stored.
pub(crate) fn absent(n: u64) -> Digest {
    DigestFunction::Sha256.digest(format!("absent {n}").as_bytes())
}
