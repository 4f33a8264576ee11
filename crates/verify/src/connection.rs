//! The way to the server, as a client at its defaults has it: messages of up to 4 MiB, headers of up to 8 KiB (GEN-19,
//! GEN-25). Every request carries a deadline, so that nothing goes on at the server for long after a check was given up, and
//! says who asks.
//!
//! Not here: TLS, which the client of this build does not speak.

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

/// How long connecting, and the first GetCapabilities, may take.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// What grpc-java and C-core accept of headers by default (GEN-19).
const MAX_HEADER_BYTES: u32 = 8 * 1024;
/// Bytes that the server may send ahead: wide, so that a slow check does not stop the others of its connection.
const WINDOW_BYTES: (u32, u32) = (16 * 1024 * 1024, 64 * 1024 * 1024);
/// The header of GEN-28.
pub const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A connection whose requests carry a deadline and the identity of the run.
pub type Service = InterceptedService<Channel, Header>;

/// Puts the deadline and the identity into each request.
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

/// Where the server is, and how it is spoken to.
#[derive(Debug)]
pub struct Target {
    endpoint: Endpoint,
    header: Header,
}

impl Target {
    /// The server of these options; nothing is sent yet.
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

    /// A new connection.
    ///
    /// # Errors
    /// A failure when the server does not take it.
    pub async fn connect(&self) -> Verdict<Channel> {
        open(&self.endpoint).await
    }

    /// A new connection that sends a ping at this interval, also while nothing is asked (GEN-26).
    ///
    /// # Errors
    /// As [`Target::connect`].
    pub async fn connect_pinging(&self, interval: Duration) -> Verdict<Channel> {
        let endpoint = self.endpoint.clone().http2_keep_alive_interval(interval);
        open(&endpoint.keep_alive_while_idle(true)).await
    }

    /// A connection with deadline and identity.
    pub fn service(&self, channel: Channel) -> Service {
        InterceptedService::new(channel, self.header.clone())
    }
}

async fn open(endpoint: &Endpoint) -> Verdict<Channel> {
    endpoint.connect().await.map_err(|error| fail("a connection is accepted", innermost(&error)))
}
