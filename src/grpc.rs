//! The protocol edge: gRPC services over the scheduler and the store.
//!
//! Each service decodes, asks and encodes. Wire types stay here: only this directory, the wiring and the client know
//! tonic. The files:
//!
//! - [`execution`], [`operations`], [`cas`] (with [`get_tree`] and [`chunks`]), [`action_cache`], [`byte_stream`],
//!   [`log_stream`], [`asset`], [`capabilities`], [`health`], [`admin`]: the services. Reflection comes from the
//!   descriptors. [`services`]: the code that `build.rs` generates. [`permissions`]: the permissions that each RPC
//!   requires.
//! - [`convert`]: conversion between wire and domain types. [`inline`], [`page_token`], [`filter`],
//!   [`operation_stream`], [`stalled`]: parts of answers. [`write_stream`]: the request of ByteStream.Write, and
//!   [`ask`] sends requests to the scheduler.
//! - [`accept`], [`connection`], [`turn`], [`bulk`], [`serving`], [`flood_guard`], [`frames`], [`intake`],
//!   [`request_memory`], [`codec`], [`answers`], [`request_log`], [`panic_guard`], [`mod@routes`]: layers that every
//!   connection and call passes.
//!
//! Services are stateless, so all connections see the same data. Graceful shutdown is driven from outside: [`serve`]
//! stops accepting when its shutdown future completes, and returns when the last connection is closed.

pub(crate) mod accept;
pub(crate) mod action_cache;
pub(crate) mod admin;
pub(crate) mod answers;
pub mod ask;
pub(crate) mod asset;
mod bulk;
pub(crate) mod byte_stream;
pub(crate) mod capabilities;
pub(crate) mod cas;
pub(crate) mod chunks;
pub(crate) mod codec;
mod connection;
pub mod convert;
pub(crate) mod execution;
pub mod filter;
mod flood_guard;
mod frames;
pub mod get_tree;
pub mod health;
pub(crate) mod inline;
pub(crate) mod intake;
pub(crate) mod log_stream;
pub(crate) mod operation_stream;
pub(crate) mod operations;
pub mod page_token;
pub(crate) mod panic_guard;
mod permissions;
pub(crate) mod request_log;
pub(crate) mod request_memory;
mod routes;
pub mod services;
mod serving;
pub(crate) mod stalled;
pub(crate) mod stream_limits;
mod turn;
mod write_stream;

use crate::{
    access::permission::Permission,
    actors::{
        asset::client::Assets,
        cas::client::Cas,
        scheduler::{
            messages::Watch,
            operation::{OperationId, OperationInfo, Snapshot, Subscription},
            settings::Priorities,
        },
    },
    administration::Administration,
    call::Call,
    config::CommittedSize,
    connections::Connections,
    gate::Gate,
    grpc::services::{
        action_cache_server::ActionCacheServer, admin_server::AdminServer,
        capabilities_server::CapabilitiesServer,
        content_addressable_storage_server::ContentAddressableStorageServer,
        execution_server::ExecutionServer, fetch_server::FetchServer,
        log_stream_service_server::LogStreamServiceServer, operations_server::OperationsServer,
        push_server::PushServer,
    },
    instance::Instance,
    log_streams::LogStreams,
    telemetry::Metrics,
    tls::TlsPort,
    unfinished_requests::UnfinishedRequests,
};
use ask::Scheduler;
use bytes::Bytes;
use futures::stream::BoxStream;
use gorego_reapi::{
    error::{Error, Result},
    proto::{self, bytestream, longrunning, reapi},
};
use health::Health;
use http_body::Body;
use routes::{Routes, RoutesBuilder};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tonic::{Status, codec::CompressionEncoding};
use tonic_health::{pb::health_server::HealthServer, server::HealthService};
use tower::ServiceBuilder;

/// Largest request message. Far above the advertised batch limit, so that a batch of exactly that limit fits with its
/// digests and other fields (GEN-24).
pub const REQUEST_MAX_BYTES: usize = 16 * 1024 * 1024;
/// Number of streams that a client may have reset before the server has processed them. A failed build cancels hundreds
/// of calls at once; the library's default of 20 would close its connection.
pub const PENDING_RESETS_MAX: usize = crate::connections::STREAMS_MAX as usize;
/// Flow-control window of a stream: the bytes that it may send ahead of its handler. Sufficient for a fast link with a
/// latency of 10 ms.
pub const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Largest frame that a client may send. Each frame passes the HTTP/2 library and the limits of its connection, so
/// uploads need less CPU time with larger frames than the 16 KiB that HTTP/2 has by default. While a frame is sent,
/// nothing else of its connection is, and the library holds the part of a frame that has arrived.
pub const FRAME_MAX_BYTES: u32 = 64 * 1024;
/// Largest header list of a request, in bytes.
pub const HEADERS_MAX_BYTES: u32 = 64 * 1024;
/// Idle time after which the client is pinged. Together with [`PING_TIMEOUT`], a connection that was dropped by a NAT
/// is noticed within two minutes.
pub const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Time limit for the answer to a ping. Longer than a message may wait for its turn to be decoded, because the server
/// does not read a connection while its requests wait for the server ([`crate::connections::ahead`]).
pub const PING_TIMEOUT: Duration = Duration::from_secs(75);

/// The response messages of Execute and WaitExecution.
pub type OperationStream = BoxStream<'static, Result<longrunning::Operation, Status>>;
/// The response messages of GetTree.
pub type TreeStream = BoxStream<'static, Result<reapi::GetTreeResponse, Status>>;
/// The response messages of ByteStream.Read.
pub type ReadStream = BoxStream<'static, Result<bytestream::ReadResponse, Status>>;

/// The resources and settings of the services.
#[derive(Debug)]
pub struct Edge {
    /// Checks the permissions of requests, and finds the instances that they name.
    pub gate: Gate,
    /// The store of blobs and action results.
    pub cas: Cas,
    /// The scheduler; `None` if execution is disabled.
    pub scheduler: Option<Scheduler>,
    /// Log streams of clients and of running actions.
    pub log_streams: LogStreams,
    /// The assets service; `None` if it is disabled.
    pub assets: Option<Assets>,
    /// Counts the calls that a shutdown waits for.
    pub unfinished_requests: UnfinishedRequests,
    /// The open connections and their limits.
    pub connections: Connections,
    /// The parts that the Admin service uses, besides the store.
    pub administration: Administration,
    /// The counters and histograms of the server.
    pub metrics: Arc<Metrics>,
    /// The settings that are visible on the wire.
    pub settings: ProtocolSettings,
}

/// The part of the configuration that is visible on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProtocolSettings {
    /// Size limit of one blob in bytes (CAP-15).
    pub max_blob_bytes: u64,
    /// The `committed_size` after a compressed upload (BS-25).
    pub compressed_committed_size: CommittedSize,
    /// Whether SplitBlob and SpliceBlob are offered (CAP-16).
    pub chunking: bool,
    /// The range of effective priorities (CAP-18).
    pub priorities: Priorities,
}

impl Edge {
    /// The scheduler, if execution is enabled.
    ///
    /// # Errors
    /// [`Error::Unimplemented`] if execution is disabled (CAP-08).
    pub fn scheduler(&self) -> Result<&Scheduler> {
        self.scheduler.as_ref().ok_or_else(|| {
            Error::Unimplemented(
                "this server is a cache; it runs no actions (execution.enabled = false)".into(),
            )
        })
    }

    /// Subscribes to the operation that a request names, if its principal may see it. The id is recorded in the call.
    ///
    /// # Errors
    /// [`Error::NotFound`] for every name that is not an operation of this server (EXE-13); [`Error::Denied`],
    /// [`Error::Unauthenticated`].
    pub(crate) async fn watch(&self, call: &Call, name: &str) -> Result<Subscription> {
        let (instance, id) = self.operation(call, name)?;
        self.watch_in(call, instance, id).await
    }

    /// Subscribes to an operation of an instance that the call has already entered, if its principal may see the
    /// operation.
    ///
    /// # Errors
    /// As [`Edge::watch`].
    pub(crate) async fn watch_in(
        &self,
        call: &Call,
        instance: Instance,
        id: OperationId,
    ) -> Result<Subscription> {
        let subscription = self.scheduler()?.watch(Watch { instance, id }).await?;
        if !subscription.info.principal.is_same(call.principal()) {
            self.gate.require(call, &subscription.info.instance, Permission::OperationsAll)?;
        }
        Ok(subscription)
    }

    /// Records that a client has been told the names of the live output of an operation. This permits it to read the
    /// output. Clients that may see all operations need no record.
    pub(crate) fn tell_logs(&self, call: &Call, info: &OperationInfo, snapshot: &Snapshot) {
        if let Some(run) = snapshot.logs
            && !call.principal().may(info.instance.name(), Permission::OperationsAll)
        {
            self.log_streams.tell(run, call.principal());
        }
    }

    /// The instance and the id of the operation that a request names, if the principal may see its own operations in
    /// this instance. The id is recorded in the call.
    fn operation(&self, call: &Call, name: &str) -> Result<(Instance, OperationId)> {
        let (instance_name, id) = convert::operation_name(name)?;
        let instance = self.gate.enter(call, instance_name).map_err(|error| match error {
            Error::Invalid(_) => convert::no_operation(name),
            other => other,
        })?;
        call.note_operation(id);
        Ok((instance, id))
    }
}

/// The path of every RPC, and its name in log lines and metrics.
pub(crate) fn rpcs() -> impl Iterator<Item = (String, String)> {
    permissions::rpcs()
}

/// Serves on `listener` until `shutdown` completes. Then it accepts no new connections, sends GOAWAY, and returns when
/// all open streams have ended and all connections are closed. The caller ends long-lived streams by draining the
/// scheduler and closing the log streams. [`Edge::unfinished_requests`] tells it when the remaining ones may be cut
/// off.
///
/// # Errors
/// [`Error::Internal`] when the services cannot be created.
pub async fn serve(
    edge: Arc<Edge>,
    health: &Health,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    serve_with(edge, health, listener, None, shutdown).await
}

/// Serves like [`serve`], with TLS if `tls` is set.
///
/// # Errors
/// See [`serve`].
pub(crate) async fn serve_with(
    edge: Arc<Edge>,
    health: &Health,
    listener: TcpListener,
    tls: Option<TlsPort>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (unfinished_requests, connections) = (edge.unfinished_requests.clone(), edge.connections.clone());
    let (gate, metrics) = (edge.gate.clone(), edge.metrics.clone());
    let layers = ServiceBuilder::new()
        .layer(answers::AnswersLayer)
        .layer(panic_guard::PanicGuardLayer)
        .layer(intake::IntakeLayer::default());
    let service = layers.service(routes(edge, health)?);
    let of_connection = move |connection| request_log::RequestLog {
        inner: service.clone(),
        gate: gate.clone(),
        unfinished_requests: unfinished_requests.clone(),
        metrics: metrics.clone(),
        connection,
    };
    serving::serve(accept::connections(listener, connections, tls), of_connection, shutdown).await;
    Ok(())
}

/// Sets the message limits that all services share.
macro_rules! limited {
    ($service:expr) => {
        $service
            .max_decoding_message_size(REQUEST_MAX_BYTES)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd)
    };
}

fn routes<B>(edge: Arc<Edge>, health: &Health) -> Result<Routes<B>>
where
    B: Body<Data = Bytes, Error = Status> + Send + 'static,
{
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let unusable = |error| Error::Internal(format!("the descriptors are unusable: {error}"));
    let routes = RoutesBuilder::new()
        .add(limited!(ExecutionServer::new(execution::ExecutionService(edge.clone()))))
        .add(limited!(OperationsServer::new(operations::OperationsService(edge.clone()))))
        .add(limited!(ContentAddressableStorageServer::new(cas::CasService(edge.clone()))))
        .add(limited!(ActionCacheServer::new(action_cache::ActionCacheService(edge.clone()))))
        .add(limited!(LogStreamServiceServer::new(log_stream::LogStreamService(edge.clone()))))
        .add(byte_stream::ByteStreamRoute::new(byte_stream::ByteStreamService(edge.clone()), |server| {
            limited!(server)
        }))
        .add(limited!(FetchServer::new(asset::AssetService(edge.clone()))))
        .add(limited!(PushServer::new(asset::AssetService(edge.clone()))))
        .add(limited!(CapabilitiesServer::new(capabilities::CapabilitiesService(edge.clone()))))
        .add(limited!(AdminServer::new(admin::AdminService(edge))))
        .add(HealthServer::new(HealthService::from_health_reporter(health.reporter())))
        .add(reflection().build_v1().map_err(unusable)?)
        .add(reflection().build_v1alpha().map_err(unusable)?);
    Ok(routes.build())
}
