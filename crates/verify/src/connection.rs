//! Connections with the limits of a default client: messages of up to 4 MiB, headers of up to 8 KiB (GEN-19, GEN-25). Every
//! request has a deadline, so that the server does not work for long on an abandoned check, and carries the identity of the
//! client.
//!
//! TLS is not supported.

use super::{
    Options,
    blob::Salt,
    check::{Verdict, fail, innermost},
};
use gorego_client::parse_endpoint;
use gorego_reapi::{
    error::{Error, Result},
    proto::reapi::{RequestMetadata, ToolDetails},
};
use prost::Message as _;
use std::time::Duration;
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

/// Time limit for connecting, and for the first GetCapabilities.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Header limit of grpc-java and C-core by default (GEN-19).
const MAX_HEADER_BYTES: u32 = 8 * 1024;
/// Flow-control windows of streams and connections. They are large, so that a slow check does not block others on its
/// connection.
const WINDOW_BYTES: (u32, u32) = (16 * 1024 * 1024, 64 * 1024 * 1024);
/// The request metadata header (GEN-28).
pub const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A connection whose requests carry a deadline and the identity of the run.
pub type Service = InterceptedService<Channel, Header>;

/// An interceptor that adds the deadline and the identity to each request.
#[derive(Debug, Clone)]
pub struct Header {
    identity: BinaryMetadataValue,
    limit: Duration,
}

impl Interceptor for Header {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert_bin(METADATA_HEADER, self.identity.clone());
        if !request.metadata().contains_key("grpc-timeout") {
            request.set_timeout(self.limit);
        }
        Ok(request)
    }
}

fn identity(salt: &Salt) -> BinaryMetadataValue {
    let metadata = RequestMetadata {
        tool_details: Some(ToolDetails {
            tool_name: "gorego verify".into(),
            tool_version: env!("CARGO_PKG_VERSION").into(),
        }),
        tool_invocation_id: salt.run(),
        ..Default::default()
    };
    MetadataValue::from_bytes(&metadata.encode_to_vec())
}

/// The server under test, and how to connect to it.
#[derive(Debug)]
pub struct Target {
    endpoint: Endpoint,
    header: Header,
}

impl Target {
    /// The server of these options. Nothing is sent yet.
    ///
    /// # Errors
    /// `Invalid` for a malformed endpoint.
    pub fn new(options: &Options, salt: &Salt) -> Result<Self> {
        let endpoint = Endpoint::from_shared(parse_endpoint(&options.endpoint)?)
            .map_err(Error::invalid)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES.0)
            .initial_connection_window_size(WINDOW_BYTES.1)
            .http2_max_header_list_size(MAX_HEADER_BYTES);
        Ok(Self { endpoint, header: Header { identity: identity(salt), limit: options.check_limit() } })
    }

    /// Opens a new connection.
    ///
    /// # Errors
    /// A failure when the server does not accept it.
    pub async fn connect(&self) -> Verdict<Channel> {
        open(&self.endpoint).await
    }

    /// Opens a new connection that sends pings at this interval, even without open calls (GEN-26).
    ///
    /// # Errors
    /// See [`Target::connect`].
    pub async fn connect_pinging(&self, interval: Duration) -> Verdict<Channel> {
        let endpoint = self.endpoint.clone().http2_keep_alive_interval(interval);
        open(&endpoint.keep_alive_while_idle(true)).await
    }

    /// Adds the deadline and the identity to a connection.
    pub fn service(&self, channel: Channel) -> Service {
        InterceptedService::new(channel, self.header.clone())
    }
}

async fn open(endpoint: &Endpoint) -> Verdict<Channel> {
    endpoint.connect().await.map_err(|error| fail("a connection is accepted", innermost(&error)))
}
