//! Connects to a server, explains failures, and adds the header that identifies the client.

use crate::{
    credentials::AuthorizedChannel,
    options::{CONNECT_TIMEOUT, ConnectOptions, innermost},
    probe::explain,
};
use gorego_reapi::{
    error::{Error, Result},
    proto::reapi,
};
use prost::Message as _;
use std::time::Duration;
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
};

/// Flow-control windows: the bytes that the server may send ahead on the connection and on one stream. They are large
/// and fixed. The HTTP/2 library derives from the connection window how many small messages may wait, and closes the
/// connection when hundreds of streams exceed that at once.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Interval between probes of an idle connection, and time limit for the answer (GEN-26).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// The request metadata header (GEN-28).
const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A connection whose requests carry credentials and the [`Identity`] header.
pub type Service = InterceptedService<AuthorizedChannel, Header>;

/// The client's identity, sent with every request (GEN-28).
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Name of the program (`tool_name`).
    pub tool: String,
    /// Id of one run of the program (`tool_invocation_id`).
    pub invocation_id: String,
    /// The target that is being built (`target_id`).
    pub target_id: String,
    /// The kind of action (`action_mnemonic`).
    pub mnemonic: String,
}

/// An interceptor that adds the encoded identity to each request.
#[derive(Debug, Clone)]
pub struct Header(BinaryMetadataValue);

impl Interceptor for Header {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert_bin(METADATA_HEADER, self.0.clone());
        Ok(request)
    }
}

impl Identity {
    fn header(&self) -> Header {
        let metadata = reapi::RequestMetadata {
            tool_details: Some(reapi::ToolDetails {
                tool_name: self.tool.clone(),
                tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            tool_invocation_id: self.invocation_id.clone(),
            target_id: self.target_id.clone(),
            action_mnemonic: self.mnemonic.clone(),
            ..Default::default()
        };
        Header(MetadataValue::from_bytes(&metadata.encode_to_vec()))
    }
}

pub(super) async fn connect(options: &ConnectOptions, identity: &Identity) -> Result<Service> {
    let transport = options
        .transport()?
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true);
    let credentials = options.credentials()?;
    credentials.prepare().await?;
    // The limit of the endpoint covers only the TCP connection, not a peer that accepts it and never answers.
    match tokio::time::timeout(CONNECT_TIMEOUT, transport.connect()).await {
        Ok(Ok(channel)) => {
            Ok(InterceptedService::new(AuthorizedChannel::new(channel, credentials), identity.header()))
        }
        Ok(Err(error)) => match explain(options, &error).await {
            Some(why) => Err(Error::Precondition(format!("{}: {why}", options.endpoint))),
            None => Err(unreachable(&options.endpoint, &innermost(&error))),
        },
        Err(_) => {
            Err(unreachable(&options.endpoint, &format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())))
        }
    }
}

fn unreachable(endpoint: &str, why: &str) -> Error {
    Error::Unavailable(format!(
        "no server answers at {endpoint} ({why}); start one with `gorego`, or name another with --endpoint"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_connection_is_explained_with_a_remedy() {
        // The port was just released, so no server listens there.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error =
            connect(&format!("grpc://127.0.0.1:{port}").into(), &Identity::default()).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable(_)));
        assert!(text.contains("refused") && text.contains("--endpoint"), "{text}");
    }
}
