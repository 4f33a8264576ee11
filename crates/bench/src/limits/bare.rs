//! A gRPC server that does nothing, and calls to it. They measure the cost of the gRPC library and the loopback
//! interface.

use super::{LARGE_BYTES, MESSAGE_BYTES, TIME};
use crate::{
    Options, Pace,
    drive::{self, Workload, message},
    figures::{Figures, Work},
    noise::Noise,
    scenario::ready,
};
use bytes::Bytes;
use futures::stream;
use gorego_client::stubs::{ByteStreamClient, CapabilitiesClient};
use gorego_reapi::{
    error::{Error, Result},
    proto::{
        bytestream::{
            QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
            WriteResponse,
        },
        reapi::{GetCapabilitiesRequest, ServerCapabilities},
    },
};
use std::time::Duration;
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};

#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::pedantic, rustdoc::all)]
mod generated {
    tonic::include_proto!("build.bazel.remote.execution.v2");
    tonic::include_proto!("google.bytestream");
}

use generated::{
    byte_stream_server::{ByteStream, ByteStreamServer},
    capabilities_server::{Capabilities, CapabilitiesServer},
};

/// Flow-control windows of both sides.
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Maximum size of a decoded message.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A running server on separate threads, and a connection to it.
pub(super) struct Bare {
    channel: Channel,
    runtime: Option<Runtime>,
}

impl Bare {
    /// Starts the server and connects to it.
    ///
    /// # Errors
    /// If there is no port or no thread for it.
    pub(super) async fn start() -> Result<Self> {
        let runtime = Runtime::new().map_err(|error| Error::io("start the threads of a server", &error))?;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| Error::io("listen", &error))?;
        let address = listener.local_addr().map_err(|error| Error::io("listen", &error))?;
        let server = Server::builder()
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .add_service(CapabilitiesServer::new(Nothing))
            .add_service(ByteStreamServer::new(Nothing).max_decoding_message_size(MAX_MESSAGE_BYTES));
        runtime.spawn(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))));
        let failed =
            |error: tonic::transport::Error| Error::Unavailable(format!("connect to {address}: {error}"));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(failed)?;
        let endpoint = endpoint
            .tcp_nodelay(true)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES);
        Ok(Self { channel: endpoint.connect().await.map_err(failed)?, runtime: Some(runtime) })
    }

    /// Unary calls by 32 callers.
    pub(super) async fn unary(&self) -> Result<Figures> {
        let channel = self.channel.clone();
        let workload = ready(move |_| {
            let mut client = CapabilitiesClient::new(channel.clone());
            async move {
                let answer = client.get_capabilities(GetCapabilitiesRequest::default()).await;
                answer.map_err(|status| message("GetCapabilities", &status))?;
                Ok(Work { units: 1, bytes: 0 })
            }
        });
        measure(&*workload, 32).await
    }

    /// Writes of this many bytes, in messages of at most 1 MiB.
    pub(super) async fn writes(&self, bytes: usize, callers: usize) -> Result<Figures> {
        let channel = self.channel.clone();
        let piece = Noise::new(1).bytes(bytes.min(MESSAGE_BYTES));
        let count = bytes.div_ceil(piece.len().max(1));
        let workload = ready(move |_| {
            let (mut client, piece) = (byte_stream(&channel), piece.clone());
            async move {
                let messages = (0..count).map(move |at| WriteRequest {
                    data: piece.clone(),
                    finish_write: at + 1 == count,
                    ..Default::default()
                });
                let answer = client.write(stream::iter(messages)).await;
                answer.map_err(|status| message("Write", &status))?;
                Ok(Work { units: 1, bytes: bytes as u64 })
            }
        });
        measure(&*workload, callers).await
    }

    /// Reads of large blobs.
    pub(super) async fn reads(&self, callers: usize) -> Result<Figures> {
        let channel = self.channel.clone();
        let workload = ready(move |_| {
            let mut client = byte_stream(&channel);
            async move {
                let request = ReadRequest { read_limit: LARGE_BYTES as i64, ..Default::default() };
                let answer = client.read(request).await.map_err(|status| message("Read", &status))?;
                let (mut stream, mut bytes) = (answer.into_inner(), 0);
                while let Some(read) = stream.message().await.map_err(|status| message("Read", &status))? {
                    bytes += read.data.len() as u64;
                }
                Ok(Work { units: 1, bytes })
            }
        });
        measure(&*workload, callers).await
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // A runtime must not be dropped on a thread of another runtime, because that would block.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn byte_stream(channel: &Channel) -> ByteStreamClient<Channel> {
    ByteStreamClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

async fn measure(workload: &dyn Workload, callers: usize) -> Result<Figures> {
    let options = Options {
        callers: None,
        pace: Pace::Closed,
        warm_up: Duration::from_millis(300),
        duration: TIME,
        pid: None,
    };
    Ok(drive::measure("limits", workload, callers, &options, &|_| {}).await?.figures)
}

struct Nothing;

#[tonic::async_trait]
impl Capabilities for Nothing {
    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> std::result::Result<Response<ServerCapabilities>, Status> {
        Ok(Response::new(ServerCapabilities::default()))
    }
}

#[tonic::async_trait]
impl ByteStream for Nothing {
    type ReadStream = stream::BoxStream<'static, std::result::Result<ReadResponse, Status>>;

    /// Sends `read_limit` zero bytes.
    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> std::result::Result<Response<Self::ReadStream>, Status> {
        let bytes = usize::try_from(request.into_inner().read_limit).unwrap_or(0);
        let piece = Bytes::from(vec![0; MESSAGE_BYTES]);
        let messages = (0..bytes / MESSAGE_BYTES).map(move |_| Ok(ReadResponse { data: piece.clone() }));
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> std::result::Result<Response<WriteResponse>, Status> {
        let (mut messages, mut committed_size) = (request.into_inner(), 0);
        while let Some(message) = messages.message().await? {
            committed_size += message.data.len() as i64;
        }
        Ok(Response::new(WriteResponse { committed_size }))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> std::result::Result<Response<QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented("this server does nothing"))
    }
}
