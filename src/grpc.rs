//! The protocol edge: gRPC services over the scheduler and the store.
//!
//! Each service decodes, asks, encodes. What is wire stays here: nothing outside this directory (and the wiring and the client)
//! knows tonic. The files by what they own:
//!
//! - [`execution`], [`operations`], [`cas`], [`get_tree`], [`action_cache`], [`byte_stream`], [`log_stream`], [`asset`],
//!   [`capabilities`], [`health`]: the services; reflection comes from the descriptors. [`services`]: what `build.rs` generates.
//! - [`convert`]: wire to domain and back. [`inline`], [`page_token`], [`filter`],
//!   [`operation_stream`], [`stalled`]: parts of answers.
//! - [`ask`]: the way to the scheduler. [`accept`], [`serving`], [`conduct`], [`frames`], [`intake`], [`claim`], [`codec`], [`answers`],
//!   [`request_log`], [`panic_guard`]: what every connection and call goes through.
//!
//! No service keeps state of its own, so any number of connections sees the same. Graceful shutdown is driven from outside:
//! [`serve`] stops accepting when its future says so and returns when the last connection is closed.

pub mod accept;
pub mod action_cache;
pub mod answers;
pub mod ask;
pub mod asset;
pub mod byte_stream;
pub mod capabilities;
pub mod cas;
pub mod chunks;
pub mod claim;
pub mod codec;
mod conduct;
pub mod convert;
pub mod execution;
pub mod filter;
mod frames;
pub mod get_tree;
pub mod health;
pub mod inline;
pub mod intake;
pub mod log_stream;
pub mod operation_stream;
pub mod operations;
pub mod page_token;
pub mod panic_guard;
pub mod request_log;
pub mod services;
mod serving;
pub mod stalled;

use crate::{
    actors::{asset::client::Assets, cas::client::Cas, scheduler::settings::Priorities},
    config::{CommittedSize, Config},
    connections::Connections,
    grpc::services::{
        action_cache_server::ActionCacheServer, byte_stream_server::ByteStreamServer,
        capabilities_server::CapabilitiesServer,
        content_addressable_storage_server::ContentAddressableStorageServer,
        execution_server::ExecutionServer, fetch_server::FetchServer,
        log_stream_service_server::LogStreamServiceServer, operations_server::OperationsServer,
        push_server::PushServer,
    },
    instance::Instances,
    log_streams::LogStreams,
    under_way::UnderWay,
};
use ask::Scheduler;
use futures::stream::BoxStream;
use gorego_reapi::{
    error::{Error, Result},
    proto::{self, bytestream, longrunning, reapi},
};
use health::Health;
use std::{future::Future, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tonic::{Status, codec::CompressionEncoding, service::Routes};
use tonic_health::{pb::health_server::HealthServer, server::HealthService};
use tower::ServiceBuilder;

/// Largest request message. Above the advertised batch limit by far, so that a batch of exactly that limit passes with the
/// digests of its blobs and whatever else is in it (GEN-24).
pub const REQUEST_MAX_BYTES: usize = 16 * 1024 * 1024;
/// Streams that one connection may have open. A build tool keeps one open for every action that waits or runs.
pub const STREAMS_MAX: u32 = 20_000;
/// Streams that a client may have reset before this server looked at them. Build tools cancel by the hundred when a build
/// fails; the library's own bound of 20 would close their connection over it.
pub const PENDING_RESETS_MAX: usize = STREAMS_MAX as usize;
/// Bytes that one stream may send ahead of its handler; what a fast link with 10 ms of latency needs.
pub const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Bytes that one connection may send ahead of all its handlers, as far as all connections together are within their bound
/// ([`crate::connections::ahead`]); what is collected of unfinished messages counts elsewhere ([`intake`]). It also sets how many small frames the HTTP/2 library lets wait: half of it in bytes, 256 for each. A window
/// that starts small and adapts would close connections on which 170 small requests arrive at once.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
/// Largest header list of a request.
pub const HEADERS_MAX_BYTES: u32 = 64 * 1024;
/// Silence after which the other end is pinged, also on idle connections; with [`PING_TIMEOUT`], a connection that a NAT
/// dropped is noticed within a minute.
pub const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long the answer to a ping may take.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Messages of Execute and WaitExecution.
pub type OperationStream = BoxStream<'static, Result<longrunning::Operation, Status>>;
/// Messages of GetTree.
pub type TreeStream = BoxStream<'static, Result<reapi::GetTreeResponse, Status>>;
/// Messages of ByteStream.Read.
pub type ReadStream = BoxStream<'static, Result<bytestream::ReadResponse, Status>>;

/// What the services need to answer: where to ask, and a few settings.
#[derive(Debug)]
pub struct Edge {
    /// The namespaces.
    pub instances: Instances,
    /// The store.
    pub cas: Cas,
    /// The scheduler; `None` where execution is switched off.
    pub scheduler: Option<Scheduler>,
    /// The places that there are for walks of trees.
    pub walks: get_tree::Walks,
    /// The log streams.
    pub log_streams: LogStreams,
    /// Remote assets; `None` where they are not served.
    pub assets: Option<Assets>,
    /// Counts the calls that a shutdown waits for.
    pub under_way: UnderWay,
    /// The connections, and what they may have under way.
    pub connections: Connections,
    /// What the configuration says about the protocol.
    pub settings: Settings,
}

/// The part of the configuration that shows on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Largest blob that is accepted, in bytes (CAP-15).
    pub max_blob_bytes: u64,
    /// What a finished compressed upload answers (BS-25).
    pub compressed_committed_size: CommittedSize,
    /// Whether blobs are split and spliced (CAP-16).
    pub chunking: bool,
    /// The priorities of actions that count (CAP-18).
    pub priorities: Priorities,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            max_blob_bytes: config.cache.max_blob_size_gb.bytes(),
            compressed_committed_size: config.cache.compressed_committed_size,
            chunking: config.cache.chunking,
            priorities: Priorities { min: config.execution.min_priority, max: config.execution.max_priority },
        }
    }
}

impl Edge {
    /// The scheduler.
    ///
    /// # Errors
    /// [`Error::Unimplemented`] where execution is switched off (CAP-08).
    pub fn scheduler(&self) -> Result<&Scheduler> {
        self.scheduler.as_ref().ok_or_else(|| {
            Error::Unimplemented(
                "this server is a cache; it runs no actions (execution.enabled = false)".into(),
            )
        })
    }
}

/// Serves on `listener` until `shutdown` ends; then accepts nothing more, tells clients to go elsewhere, and returns when all
/// open streams are over and all connections closed. The caller ends the streams that would go on for long, by draining the
/// scheduler and closing the log streams, and knows from [`Edge::under_way`] when those that are left may be cut.
///
/// # Errors
/// [`Error::Internal`] when the services cannot be set up.
pub async fn serve(
    edge: Arc<Edge>,
    health: &Health,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (under_way, connections) = (edge.under_way.clone(), edge.connections.clone());
    let routes = routes(edge, health)?;
    let layers = ServiceBuilder::new()
        .layer(request_log::RequestLogLayer { under_way })
        .layer(answers::AnswersLayer)
        .layer(panic_guard::PanicGuardLayer)
        .layer(intake::IntakeLayer::default());
    serving::serve(accept::connections(listener, connections), layers.service(routes), shutdown).await;
    Ok(())
}

/// Sets the limits that all our services share.
macro_rules! limited {
    ($service:expr) => {
        $service
            .max_decoding_message_size(REQUEST_MAX_BYTES)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd)
    };
}

fn routes(edge: Arc<Edge>, health: &Health) -> Result<Routes> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let unusable = |error| Error::Internal(format!("the descriptors are unusable: {error}"));
    let mut routes = Routes::builder();
    routes
        .add_service(limited!(ExecutionServer::new(execution::ExecutionService(edge.clone()))))
        .add_service(limited!(OperationsServer::new(operations::OperationsService(edge.clone()))))
        .add_service(limited!(ContentAddressableStorageServer::new(cas::CasService(edge.clone()))))
        .add_service(limited!(ActionCacheServer::new(action_cache::ActionCacheService(edge.clone()))))
        .add_service(limited!(LogStreamServiceServer::new(log_stream::LogStreamService(edge.clone()))))
        .add_service(limited!(ByteStreamServer::new(byte_stream::ByteStreamService(edge.clone()))))
        .add_service(limited!(FetchServer::new(asset::AssetService(edge.clone()))))
        .add_service(limited!(PushServer::new(asset::AssetService(edge.clone()))))
        .add_service(limited!(CapabilitiesServer::new(capabilities::CapabilitiesService(edge))))
        .add_service(HealthServer::new(HealthService::from_health_reporter(health.reporter())))
        .add_service(reflection().build_v1().map_err(unusable)?)
        .add_service(reflection().build_v1alpha().map_err(unusable)?);
    Ok(routes.routes().prepare())
}
