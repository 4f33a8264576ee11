//! The services of a server that does nothing: it receives requests and sends answers of the right size.

use super::{CONNECTION_WINDOW_BYTES, MAX_MESSAGE_BYTES, STREAM_WINDOW_BYTES};
use crate::limits::MESSAGE_BYTES;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use gorego_reapi::proto::{
    bytestream::{
        QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
        WriteResponse,
    },
    reapi::{
        BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest, BatchUpdateBlobsResponse,
        FindMissingBlobsRequest, FindMissingBlobsResponse, GetCapabilitiesRequest, GetTreeRequest,
        GetTreeResponse, ServerCapabilities, SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest,
        SplitBlobResponse, batch_read_blobs_response,
    },
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Router},
};

#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::pedantic, rustdoc::all)]
mod generated {
    tonic::include_proto!("build.bazel.remote.execution.v2");
    tonic::include_proto!("google.bytestream");
}

use generated::{
    byte_stream_server::{ByteStream, ByteStreamServer},
    capabilities_server::{Capabilities, CapabilitiesServer},
    content_addressable_storage_server::{ContentAddressableStorage, ContentAddressableStorageServer},
};

type Answer<T> = Result<Response<T>, Status>;

/// The server with its services.
pub(super) fn server() -> Router {
    let nothing = Nothing { zeros: vec![0; MESSAGE_BYTES].into() };
    Server::builder()
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .add_service(CapabilitiesServer::new(nothing.clone()))
        .add_service(ContentAddressableStorageServer::new(nothing.clone()))
        .add_service(ByteStreamServer::new(nothing).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

#[derive(Clone)]
struct Nothing {
    /// The content of every blob.
    zeros: Bytes,
}

impl Nothing {
    /// This many zero bytes, at most [`MESSAGE_BYTES`].
    fn zeros(&self, count: usize) -> Bytes {
        self.zeros.slice(..count.min(MESSAGE_BYTES))
    }
}

/// The error of a method that is not measured.
fn unused<T>() -> Answer<T> {
    Err(Status::unimplemented("this server does nothing"))
}

#[tonic::async_trait]
impl Capabilities for Nothing {
    async fn get_capabilities(&self, _: Request<GetCapabilitiesRequest>) -> Answer<ServerCapabilities> {
        Ok(Response::new(ServerCapabilities::default()))
    }
}

#[tonic::async_trait]
impl ContentAddressableStorage for Nothing {
    type GetTreeStream = BoxStream<'static, Result<GetTreeResponse, Status>>;

    /// Each second blob is missing.
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Answer<FindMissingBlobsResponse> {
        let digests = request.into_inner().blob_digests.into_iter();
        Ok(Response::new(FindMissingBlobsResponse { missing_blob_digests: digests.step_by(2).collect() }))
    }

    /// Every blob has zero bytes as its content.
    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Answer<BatchReadBlobsResponse> {
        let blob = |digest: gorego_reapi::proto::reapi::Digest| batch_read_blobs_response::Response {
            data: self.zeros(usize::try_from(digest.size_bytes).unwrap_or(0)),
            digest: Some(digest),
            ..Default::default()
        };
        let responses = request.into_inner().digests.into_iter().map(blob).collect();
        Ok(Response::new(BatchReadBlobsResponse { responses }))
    }

    async fn batch_update_blobs(
        &self,
        _: Request<BatchUpdateBlobsRequest>,
    ) -> Answer<BatchUpdateBlobsResponse> {
        unused()
    }

    async fn get_tree(&self, _: Request<GetTreeRequest>) -> Answer<Self::GetTreeStream> {
        unused()
    }

    async fn split_blob(&self, _: Request<SplitBlobRequest>) -> Answer<SplitBlobResponse> {
        unused()
    }

    async fn splice_blob(&self, _: Request<SpliceBlobRequest>) -> Answer<SpliceBlobResponse> {
        unused()
    }
}

#[tonic::async_trait]
impl ByteStream for Nothing {
    type ReadStream = BoxStream<'static, Result<ReadResponse, Status>>;

    /// Sends `read_limit` zero bytes.
    async fn read(&self, request: Request<ReadRequest>) -> Answer<Self::ReadStream> {
        let bytes = usize::try_from(request.into_inner().read_limit).unwrap_or(0);
        let nothing = self.clone();
        let messages = (0..bytes).step_by(MESSAGE_BYTES);
        let messages = messages.map(move |offset| Ok(ReadResponse { data: nothing.zeros(bytes - offset) }));
        Ok(Response::new(Box::pin(stream::iter(messages))))
    }

    async fn write(&self, request: Request<Streaming<WriteRequest>>) -> Answer<WriteResponse> {
        let (mut messages, mut committed_size) = (request.into_inner(), 0);
        while let Some(message) = messages.message().await? {
            committed_size += message.data.len() as i64;
        }
        Ok(Response::new(WriteResponse { committed_size }))
    }

    async fn query_write_status(
        &self,
        _: Request<QueryWriteStatusRequest>,
    ) -> Answer<QueryWriteStatusResponse> {
        unused()
    }
}
