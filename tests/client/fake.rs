//! A small server that misbehaves as its test tells it to.

use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use gorego::grpc::services::{
    byte_stream_server as bs, capabilities_server as caps, content_addressable_storage_server as cas,
    execution_server as exec, operations_server as ops,
};
use gorego_client::{Client, Identity};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    find_missing::{FindMissingBlobsRequest, FindMissingBlobsResponse},
    proto::{
        bytestream,
        longrunning::{self, Operation, operation},
        reapi::{self, execution_stage::Value as Stage},
        rpc,
    },
};
use http::{HeaderName, HeaderValue};
use prost::Message;
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Request, Response, Status, Streaming};

pub(crate) const SHA256: DigestFunction = DigestFunction::Sha256;
pub(crate) const NAME: &str = "operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
/// A small limit, so that even a modest file is transferred by ByteStream.
pub(crate) const BATCH_BYTES: u64 = 20_000;

/// The script for the next call of Execute or WaitExecution: messages, and how the stream ends.
pub(crate) type Script = (Vec<Operation>, Option<Status>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) blobs: HashMap<Digest, Bytes>,
    pub(crate) calls: Vec<&'static str>,
    pub(crate) scripts: VecDeque<Script>,
    /// Reads end once with UNAVAILABLE after this many bytes.
    pub(crate) break_read_after: Option<usize>,
    /// How many more blobs of batches are UNAVAILABLE.
    pub(crate) unavailable_blobs: usize,
    /// Blobs for which wrong bytes are returned.
    pub(crate) corrupt: bool,
    /// Whether streams stay open after their script.
    pub(crate) hang: bool,
    /// Log streams by name: their bytes, and the error with which they end, if any.
    pub(crate) logs: HashMap<String, (Bytes, Option<Status>)>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

impl Fake {
    pub(crate) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn store(&self, bytes: &[u8]) -> reapi::Digest {
        let digest = SHA256.digest(bytes);
        self.state().blobs.insert(digest, Bytes::copy_from_slice(bytes));
        digest.to_wire()
    }

    pub(crate) fn follow(
        &self,
        call: &'static str,
    ) -> Response<BoxStream<'static, Result<Operation, Status>>> {
        let mut state = self.state();
        state.calls.push(call);
        let (messages, end) = state.scripts.pop_front().expect("no script for this call");
        let script = stream::iter(messages.into_iter().map(Ok).chain(end.map(Err)));
        Response::new(if state.hang { script.chain(stream::pending()).boxed() } else { script.boxed() })
    }

    /// Serves on a free port and returns its endpoint.
    pub(crate) async fn serve(&self) -> String {
        let incoming = tonic::transport::server::TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let endpoint = format!("grpc://{}", incoming.local_addr().unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(caps::CapabilitiesServer::new(self.clone()))
            .add_service(cas::ContentAddressableStorageServer::new(self.clone()))
            .add_service(bs::ByteStreamServer::new(self.clone()))
            .add_service(ops::OperationsServer::new(self.clone()))
            .add_service(exec::ExecutionServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        endpoint
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.serve().await, "", &Identity::default()).await.unwrap()
    }
}

/// Serves on a free port, and returns the endpoint. GetCapabilities succeeds, and FindMissingBlobs returns this digest.
/// All other calls get the head of an answer and nothing else, and what they send is not read.
pub(crate) async fn silent_server(missing: Digest) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer_heads(socket, missing));
        }
    });
    endpoint
}

/// Serves one connection on a free port like [`silent_server`], and returns the endpoint. At the first Execute it
/// closes the connection and the port, as if it were killed.
pub(crate) async fn dying_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        answer_until(socket, Digest::empty(SHA256), Some("Execute")).await;
    });
    endpoint
}

async fn answer_heads(socket: TcpStream, missing: Digest) {
    answer_until(socket, missing, None).await;
}

/// Answers until a call of the method `last`, which gets no answer.
async fn answer_until(socket: TcpStream, missing: Digest, last: Option<&str>) {
    let mut connection = h2::server::handshake(socket).await.unwrap();
    let mut held = Vec::new();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        if last.is_some() && request.uri().path().rsplit('/').next() == last {
            return;
        }
        let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut answer = respond.send_response(head, false).unwrap();
        let message = match request.uri().path().rsplit('/').next().unwrap() {
            "GetCapabilities" => Some(
                reapi::ServerCapabilities {
                    cache_capabilities: Some(reapi::CacheCapabilities {
                        digest_functions: vec![1],
                        ..Default::default()
                    }),
                    ..Default::default()
                }
                .encode_to_vec(),
            ),
            "FindMissingBlobs" => Some(
                reapi::FindMissingBlobsResponse { missing_blob_digests: vec![missing.to_wire()] }
                    .encode_to_vec(),
            ),
            _ => None,
        };
        if let Some(message) = message {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            answer.send_data([&[0], &length[..], &message].concat().into(), false).unwrap();
            answer.send_trailers([("grpc-status", "0")].map(header).into_iter().collect()).unwrap();
        }
        held.push((request, answer));
    }
}

fn header((name, value): (&'static str, &'static str)) -> (HeaderName, HeaderValue) {
    (HeaderName::from_static(name), HeaderValue::from_static(value))
}

pub(crate) fn digest(wire: Option<&reapi::Digest>) -> Digest {
    Digest::from_wire(SHA256, wire, "digest").unwrap()
}

#[tonic::async_trait]
impl caps::Capabilities for Fake {
    async fn get_capabilities(
        &self,
        _: Request<reapi::GetCapabilitiesRequest>,
    ) -> Result<Response<reapi::ServerCapabilities>, Status> {
        let cache = reapi::CacheCapabilities {
            digest_functions: vec![1],
            max_batch_total_size_bytes: BATCH_BYTES as i64,
            ..Default::default()
        };
        Ok(Response::new(reapi::ServerCapabilities { cache_capabilities: Some(cache), ..Default::default() }))
    }
}

#[tonic::async_trait]
impl cas::ContentAddressableStorage for Fake {
    type GetTreeStream = BoxStream<'static, Result<reapi::GetTreeResponse, Status>>;

    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let state = self.state();
        let asked = request.into_inner().blob_digests;
        let mut missing_blob_digests = asked.resolve(DigestFunction::Sha256, "blob_digests").unwrap();
        missing_blob_digests.retain(|digest| !digest.is_empty() && !state.blobs.contains_key(digest));
        Ok(Response::new(FindMissingBlobsResponse { missing_blob_digests }))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<reapi::BatchUpdateBlobsRequest>,
    ) -> Result<Response<reapi::BatchUpdateBlobsResponse>, Status> {
        let mut state = self.state();
        state.calls.push("BatchUpdateBlobs");
        let requests = request.into_inner().requests;
        assert!(requests.iter().map(|r| r.data.len() as u64).sum::<u64>() <= BATCH_BYTES);
        let responses = requests.into_iter().map(|request| {
            assert_eq!(SHA256.digest(&request.data), digest(request.digest.as_ref()));
            state.blobs.insert(digest(request.digest.as_ref()), request.data);
            reapi::batch_update_blobs_response::Response { digest: request.digest, status: None }
        });
        Ok(Response::new(reapi::BatchUpdateBlobsResponse { responses: responses.collect() }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<reapi::BatchReadBlobsRequest>,
    ) -> Result<Response<reapi::BatchReadBlobsResponse>, Status> {
        let mut state = self.state();
        let responses = request.into_inner().digests.into_iter().map(|wire| {
            if state.unavailable_blobs > 0 {
                state.unavailable_blobs -= 1;
                let status = rpc::Status { code: Code::Unavailable as i32, ..Default::default() };
                return reapi::batch_read_blobs_response::Response {
                    digest: Some(wire),
                    status: Some(status),
                    ..Default::default()
                };
            }
            let mut data = state.blobs.get(&digest(Some(&wire))).cloned();
            if state.corrupt {
                data = data.map(|data| [&data[1..], b"!"].concat().into());
            }
            let code = if data.is_some() { Code::Ok } else { Code::NotFound };
            reapi::batch_read_blobs_response::Response {
                digest: Some(wire),
                data: data.unwrap_or_default(),
                status: Some(rpc::Status { code: code as i32, ..Default::default() }),
                compressor: 0,
            }
        });
        Ok(Response::new(reapi::BatchReadBlobsResponse { responses: responses.collect() }))
    }

    async fn get_tree(
        &self,
        _: Request<reapi::GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn split_blob(
        &self,
        _: Request<reapi::SplitBlobRequest>,
    ) -> Result<Response<reapi::SplitBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn splice_blob(
        &self,
        _: Request<reapi::SpliceBlobRequest>,
    ) -> Result<Response<reapi::SpliceBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl bs::ByteStream for Fake {
    type ReadStream = BoxStream<'static, Result<bytestream::ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<bytestream::ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.calls.push("Read");
        if request.resource_name.contains("logstreams") {
            let (bytes, end) = state.logs.get(&request.resource_name).cloned().unwrap_or_default();
            let rest = bytes.slice(usize::try_from(request.read_offset).unwrap()..);
            let pieces: Vec<_> = rest.chunks(2).map(Bytes::copy_from_slice).collect();
            let pieces = pieces.into_iter().map(|data| Ok(bytestream::ReadResponse { data }));
            return Ok(Response::new(stream::iter(pieces.chain(end.map(Err))).boxed()));
        }
        let name = gorego_reapi::resource_name::ResourceName::parse_read(&request.resource_name).unwrap();
        let blob = state.blobs.get(&name.digest).cloned().ok_or_else(|| Status::not_found("no blob"))?;
        let mut rest = blob.slice(usize::try_from(request.read_offset).unwrap()..);
        let end = state.break_read_after.take().map(|after| {
            rest.truncate(after);
            Status::unavailable("broken")
        });
        let chunks: Vec<_> = rest.chunks(7_000).map(Bytes::copy_from_slice).collect();
        let messages = chunks.into_iter().map(|data| Ok(bytestream::ReadResponse { data }));
        Ok(Response::new(stream::iter(messages.chain(end.map(Err))).boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<bytestream::WriteRequest>>,
    ) -> Result<Response<bytestream::WriteResponse>, Status> {
        let mut stream = request.into_inner();
        let (mut name, mut data, mut finished) = (String::new(), Vec::new(), false);
        while let Some(message) = stream.message().await? {
            assert!(!finished && message.write_offset == data.len() as i64);
            name.push_str(&message.resource_name);
            data.extend_from_slice(&message.data);
            finished = message.finish_write;
        }
        let name = gorego_reapi::resource_name::ResourceName::parse_write(&name).unwrap();
        assert!(finished && SHA256.digest(&data) == name.digest);
        let mut state = self.state();
        state.calls.push("Write");
        state.blobs.insert(name.digest, data.into());
        Ok(Response::new(bytestream::WriteResponse { committed_size: name.digest.size() as i64 }))
    }

    async fn query_write_status(
        &self,
        _: Request<bytestream::QueryWriteStatusRequest>,
    ) -> Result<Response<bytestream::QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl exec::Execution for Fake {
    type ExecuteStream = BoxStream<'static, Result<Operation, Status>>;
    type WaitExecutionStream = BoxStream<'static, Result<Operation, Status>>;

    async fn execute(
        &self,
        _: Request<reapi::ExecuteRequest>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        Ok(self.follow("Execute"))
    }

    async fn wait_execution(
        &self,
        request: Request<reapi::WaitExecutionRequest>,
    ) -> Result<Response<Self::WaitExecutionStream>, Status> {
        assert_eq!(request.into_inner().name, NAME);
        Ok(self.follow("WaitExecution"))
    }
}

#[tonic::async_trait]
impl ops::Operations for Fake {
    async fn cancel_operation(
        &self,
        request: Request<longrunning::CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        assert_eq!(request.into_inner().name, NAME);
        self.state().calls.push("CancelOperation");
        Ok(Response::new(()))
    }

    async fn list_operations(
        &self,
        _: Request<longrunning::ListOperationsRequest>,
    ) -> Result<Response<longrunning::ListOperationsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_operation(
        &self,
        _: Request<longrunning::GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_operation(
        &self,
        _: Request<longrunning::DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn wait_operation(
        &self,
        _: Request<longrunning::WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }
}

pub(crate) fn any(name: &str, message: &impl Message) -> prost_types::Any {
    let type_url = format!("type.googleapis.com/build.bazel.remote.execution.v2.{name}");
    prost_types::Any { type_url, value: message.encode_to_vec() }
}

pub(crate) fn stage(stage: Stage) -> Operation {
    let metadata = reapi::ExecuteOperationMetadata { stage: stage as i32, ..Default::default() };
    let metadata = Some(any("ExecuteOperationMetadata", &metadata));
    longrunning::Operation { name: NAME.into(), metadata, ..Default::default() }
}

/// A message with the names of the log streams.
pub(crate) fn followable() -> Operation {
    let metadata = reapi::ExecuteOperationMetadata {
        stage: Stage::Executing.into(),
        stdout_stream_name: "logstreams/out".into(),
        stderr_stream_name: "logstreams/err".into(),
        ..Default::default()
    };
    Operation { metadata: Some(any("ExecuteOperationMetadata", &metadata)), ..stage(Stage::Executing) }
}

pub(crate) fn done(response: &reapi::ExecuteResponse) -> Operation {
    let result = Some(operation::Result::Response(any("ExecuteResponse", response)));
    Operation { done: true, result, ..stage(Stage::Completed) }
}

pub(crate) fn success(exit_code: i32) -> reapi::ExecuteResponse {
    let result = reapi::ActionResult { exit_code, ..Default::default() };
    reapi::ExecuteResponse { result: Some(result), ..Default::default() }
}
