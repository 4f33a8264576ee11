//! [`ByteStreamRoute`]: the ByteStream service as it is served. The messages of an uncompressed Write are read by
//! [`WriteStream`], and those of a Read are written by [`ReadBody`], because tonic copies their data. tonic handles
//! everything else.

use super::{ByteStreamService, read_body::ReadBody};
use crate::{
    call::Call,
    grpc::{
        REQUEST_MAX_BYTES, ReadStream, codec,
        services::byte_stream_server::{ByteStream as _, ByteStreamServer},
        write_stream::WriteStream,
    },
};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _};
use gorego_reapi::proto::bytestream::{ReadRequest, ReadResponse, WriteRequest, WriteResponse};
use http_body::Body;
use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body as TonicBody,
    server::{NamedService, ServerStreamingService},
};
use tower::Service;

const READ: &str = "/google.bytestream.ByteStream/Read";
const WRITE: &str = "/google.bytestream.ByteStream/Write";

/// The ByteStream service, in which the messages with data are handled by this crate and everything else by tonic.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct ByteStreamRoute {
    server: ByteStreamServer<ByteStreamService>,
    service: Arc<ByteStreamService>,
}

impl ByteStreamRoute {
    pub(in crate::grpc) fn new(
        service: ByteStreamService,
        limited: impl FnOnce(ByteStreamServer<ByteStreamService>) -> ByteStreamServer<ByteStreamService>,
    ) -> Self {
        let service = Arc::new(service);
        Self { server: limited(ByteStreamServer::from_arc(service.clone())), service }
    }
}

impl NamedService for ByteStreamRoute {
    const NAME: &'static str = <ByteStreamServer<ByteStreamService> as NamedService>::NAME;
}

impl<B> Service<http::Request<B>> for ByteStreamRoute
where
    B: Body<Data = Bytes, Error = Status> + Send + 'static,
{
    type Response = http::Response<TonicBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let is_plain = request.headers().get("grpc-encoding").is_none_or(|encoding| encoding == "identity");
        match request.uri().path() {
            READ if is_plain => self.read(request),
            WRITE if is_plain => self.write(request),
            _ => self.server.call(request),
        }
    }
}

impl ByteStreamRoute {
    fn read<B>(&self, request: http::Request<B>) -> <Self as Service<http::Request<B>>>::Future
    where
        B: Body<Data = Bytes, Error = Status> + Send + 'static,
    {
        let read = PlainRead { service: self.service.clone(), messages: Arc::default() };
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(codec::Codec::<ReadResponse, ReadRequest>::default())
                .apply_max_message_size_config(Some(REQUEST_MAX_BYTES), None);
            let messages = read.messages.clone();
            let response = grpc.server_streaming(read, request).await;
            let messages = messages.lock().unwrap_or_else(PoisonError::into_inner).take();
            Ok(match messages {
                Some(messages) => response.map(|_| TonicBody::new(ReadBody::new(messages))),
                None => response,
            })
        })
    }

    fn write<B>(&self, request: http::Request<B>) -> <Self as Service<http::Request<B>>>::Future
    where
        B: Body<Data = Bytes, Error = Status> + Send + 'static,
    {
        let (head, body) = request.into_parts();
        let write = PlainWrite { service: self.service.clone(), body: Some(TonicBody::new(body)) };
        let request = http::Request::from_parts(head, TonicBody::empty());
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(codec::Codec::<WriteResponse, WriteRequest>::default());
            Ok(grpc.client_streaming(write, request).await)
        })
    }
}

/// One Read. tonic handles the request and the head of the response, and [`ReadBody`] sends the messages.
struct PlainRead {
    service: Arc<ByteStreamService>,
    /// The messages, once the response begins.
    messages: Arc<Mutex<Option<ReadStream>>>,
}

impl ServerStreamingService<ReadRequest> for PlainRead {
    type Response = ReadResponse;
    type ResponseStream = ReadStream;
    type Future = BoxFuture<'static, Result<Response<ReadStream>, Status>>;

    fn call(&mut self, request: Request<ReadRequest>) -> Self::Future {
        let (service, slot) = (self.service.clone(), self.messages.clone());
        Box::pin(async move {
            let (metadata, messages, extensions) = service.read(request).await?.into_parts();
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(messages);
            Ok(Response::from_parts(metadata, stream::empty().boxed(), extensions))
        })
    }
}

/// One uncompressed Write. tonic handles the head of the request and the answer, and [`WriteStream`] reads the body.
struct PlainWrite {
    service: Arc<ByteStreamService>,
    body: Option<TonicBody>,
}

impl Service<Request<Streaming<WriteRequest>>> for PlainWrite {
    type Response = Response<WriteResponse>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<WriteResponse>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<WriteRequest>>) -> Self::Future {
        let call = Call::of(request.extensions());
        let (service, body) = (self.service.clone(), self.body.take().unwrap_or_default());
        Box::pin(async move {
            let messages = WriteStream::of_body(body, call.clone());
            service.write_stream(&call, messages).await
        })
    }
}
