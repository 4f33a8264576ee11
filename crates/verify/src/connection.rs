//! Connections with the limits of a default client: messages of up to 4 MiB, headers of up to 8 KiB (GEN-19, GEN-25).
//! Every request has a deadline, so that the server does not work for long on an abandoned check, and carries the
//! identity of the client and its credentials.

use super::{
    Options,
    blob::Salt,
    check::{Verdict, fail, innermost},
};
use gorego_client::{AuthorizedChannel, ConnectOptions, Credentials, explain};
use gorego_reapi::{
    error::Result,
    proto::reapi::{RequestMetadata, ToolDetails},
};
use http::HeaderMap;
use prost::Message as _;
use std::time::Duration;
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Endpoint,
};

/// Time limit for connecting, and for the first GetCapabilities.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Header limit of grpc-java and C-core by default (GEN-19).
const MAX_HEADER_BYTES: u32 = 8 * 1024;
/// Flow-control windows of streams and connections. They are large, so that a slow check does not block others on its
/// connection.
const WINDOW_BYTES: (u32, u32) = (16 * 1024 * 1024, 64 * 1024 * 1024);
/// The request metadata header (GEN-28).
pub(crate) const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A connection whose requests carry a deadline and the identity of the run.
pub(crate) type Service = InterceptedService<AuthorizedChannel, Header>;

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
pub(crate) struct Target {
    options: ConnectOptions,
    endpoint: Endpoint,
    credentials: Credentials,
    header: Header,
}

impl Target {
    /// The server of these options. Nothing is sent yet.
    ///
    /// # Errors
    /// `Invalid` for a malformed endpoint, and for certificates and headers that cannot be used.
    pub(crate) fn new(options: &Options, salt: &Salt) -> Result<Self> {
        let endpoint = options
            .server
            .transport()?
            .connect_timeout(CONNECT_LIMIT)
            .initial_stream_window_size(WINDOW_BYTES.0)
            .initial_connection_window_size(WINDOW_BYTES.1)
            .http2_max_header_list_size(MAX_HEADER_BYTES);
        Ok(Self {
            options: options.server.clone(),
            endpoint,
            credentials: options.server.credentials()?,
            header: Header { identity: identity(salt), limit: options.check_limit() },
        })
    }

    /// Asks the credential helper, if there is one.
    ///
    /// # Errors
    /// `Denied` when it fails.
    pub(crate) async fn prepare(&self) -> Result<()> {
        self.credentials.prepare().await
    }

    /// Opens a new connection.
    ///
    /// # Errors
    /// A failure when the server does not accept it.
    pub(crate) async fn connect(&self) -> Verdict<AuthorizedChannel> {
        self.open(&self.endpoint, &self.credentials).await
    }

    /// Opens a new connection whose requests have these headers instead of credentials. A client certificate is
    /// presented all the same.
    ///
    /// # Errors
    /// See [`Target::connect`].
    pub(crate) async fn connect_with(&self, headers: HeaderMap) -> Verdict<AuthorizedChannel> {
        let options = ConnectOptions { headers, credential_helper: None, ..self.options.clone() };
        let credentials = options.credentials().map_err(|error| fail("headers that can be sent", error))?;
        self.open(&self.endpoint, &credentials).await
    }

    /// Opens a new connection that sends pings at this interval, even without open calls (GEN-26).
    ///
    /// # Errors
    /// See [`Target::connect`].
    pub(crate) async fn connect_pinging(&self, interval: Duration) -> Verdict<AuthorizedChannel> {
        let endpoint = self.endpoint.clone().http2_keep_alive_interval(interval);
        self.open(&endpoint.keep_alive_while_idle(true), &self.credentials).await
    }

    /// Adds the deadline and the identity to a connection.
    pub(crate) fn service(&self, channel: AuthorizedChannel) -> Service {
        InterceptedService::new(channel, self.header.clone())
    }

    async fn open(&self, endpoint: &Endpoint, credentials: &Credentials) -> Verdict<AuthorizedChannel> {
        match endpoint.connect().await {
            Ok(channel) => Ok(AuthorizedChannel::new(channel, credentials.clone())),
            Err(error) => {
                let why = explain(&self.options, &error).await.unwrap_or_else(|| innermost(&error));
                Err(fail("a connection is accepted", why))
            }
        }
    }
}
