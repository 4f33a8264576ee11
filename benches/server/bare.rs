//! The baseline: a tonic server without logic in a separate process.

use futures::stream;
use gorego::grpc::services::{
    byte_stream_server::{ByteStream, ByteStreamServer},
    capabilities_server::{Capabilities, CapabilitiesServer},
};
use gorego_reapi::proto::{
    bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse,
    },
    reapi::{GetCapabilitiesRequest, ServerCapabilities},
};
use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// The argument with which this program becomes the bare server.
pub(crate) const SUBCOMMAND: &str = "bare-server";

/// A running bare server. It is stopped when dropped.
pub(crate) struct Bare {
    child: Child,
    /// `http://host:port` for clients.
    pub(crate) endpoint: String,
}

impl Bare {
    /// Starts a bare server and waits until it listens.
    pub(crate) fn start() -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child =
            Command::new(program).arg(SUBCOMMAND).stdout(Stdio::piped()).spawn().expect("it starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says where it listens");
        Self { child, endpoint: format!("http://{}", line.trim()) }
    }

    /// Process id of the server.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until the process is killed.
pub(crate) fn serve() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        println!("{}", listener.local_addr().expect("an address"));
        Server::builder()
            .initial_connection_window_size(32 << 20)
            .initial_stream_window_size(16 << 20)
            .add_service(CapabilitiesServer::new(Nothing))
            .add_service(ByteStreamServer::new(Nothing).max_decoding_message_size(16 << 20))
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
            .await
            .expect("it serves");
    });
}

struct Nothing;

#[tonic::async_trait]
impl Capabilities for Nothing {
    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        Ok(Response::new(ServerCapabilities::default()))
    }
}

#[tonic::async_trait]
impl ByteStream for Nothing {
    type ReadStream = stream::BoxStream<'static, Result<ReadResponse, Status>>;

    /// Sends `read_limit` zero bytes in chunks of `read_offset`.
    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let ReadRequest { read_offset, read_limit, .. } = request.into_inner();
        let chunk = bytes::Bytes::from(vec![0; read_offset as usize]);
        let messages = read_limit / read_offset;
        let stream = stream::iter((0..messages).map(move |_| Ok(ReadResponse { data: chunk.clone() })));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut messages = request.into_inner();
        let mut committed_size = 0;
        while let Some(message) = messages.message().await? {
            committed_size += message.data.len() as i64;
        }
        Ok(Response::new(WriteResponse { committed_size }))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented("a yardstick"))
    }
}
