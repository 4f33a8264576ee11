//! [`ByteStreamRoute`]: the ByteStream service as it is served. It reads the messages of an uncompressed Write itself,
//! as a [`WriteStream`]. tonic handles everything else.

use super::WriteStream;
use crate::{
    call::Call,
    grpc::{byte_stream::ByteStreamService, codec, services::byte_stream_server::ByteStreamServer},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use gorego_reapi::proto::bytestream::{WriteRequest, WriteResponse};
use http_body::Body;
use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{Request, Response, Status, Streaming, body::Body as TonicBody, server::NamedService};
use tower::Service;

const PATH: &str = "/google.bytestream.ByteStream/Write";

/// The ByteStream service, in which uncompressed writes are read by this crate and everything else by tonic.
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
        if request.uri().path() != PATH || !is_plain {
            return self.server.call(request);
        }
        let (head, body) = request.into_parts();
        let write = PlainWrite { service: self.service.clone(), body: Some(TonicBody::new(body)) };
        let request = http::Request::from_parts(head, TonicBody::empty());
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(codec::Codec::<WriteResponse, WriteRequest>::default());
            Ok(grpc.client_streaming(write, request).await)
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
        Box::pin(async move { service.write_stream(&call, WriteStream::of_body(body)).await })
    }
}
