//! A gRPC proxy without knowledge of services: messages pass as bytes, so that everything without a fault arrives
//! unchanged.
//!
//! Every call, unary or streaming, is a [`Call`]: a path, headers and a stream of messages. [`Upstream::forward`] makes
//! the same call to the real server and returns the [`Reply`]: headers, and messages up to the final status. A
//! [`Behaviour`] is applied in between. A client that disconnects drops the reply, and with it the call to the real
//! server.

use axum::Router;
use bytes::Bytes;
use futures::{StreamExt as _, future::BoxFuture, stream, stream::BoxStream};
use gorego_client::Raw;
use http::uri::PathAndQuery;
use std::{convert::Infallible, sync::Arc};
use tokio::task::JoinHandle;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::MetadataMap,
    service::Routes,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};

/// The messages of one direction. An error is the final status.
pub(crate) type Messages = BoxStream<'static, Result<Bytes, Status>>;

/// The effect of a fault on a call.
pub(crate) type Behaviour =
    Arc<dyn Fn(Call, Upstream) -> BoxFuture<'static, Result<Reply, Status>> + Send + Sync>;

/// Windows so large that the proxy does not limit the suite.
const WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// A call of the client.
pub(crate) struct Call {
    pub(crate) path: PathAndQuery,
    pub(crate) metadata: MetadataMap,
    pub(crate) messages: Messages,
}

impl Call {
    /// The name of the method without its service.
    pub(crate) fn method(&self) -> &str {
        self.path.path().rsplit('/').next().unwrap_or_default()
    }
}

/// The response to a call.
pub(crate) struct Reply {
    pub(crate) metadata: MetadataMap,
    pub(crate) messages: Messages,
}

impl Reply {
    /// Responds with exactly these messages, and OK.
    pub(crate) fn of(messages: impl IntoIterator<Item = Bytes>) -> Self {
        let messages: Vec<_> = messages.into_iter().map(Ok).collect();
        Self { metadata: MetadataMap::new(), messages: stream::iter(messages).boxed() }
    }
}

/// The real server.
#[derive(Clone)]
pub(crate) struct Upstream(pub Channel);

impl Upstream {
    /// Makes the call to the real server.
    pub(crate) async fn forward(&self, call: Call) -> Result<Reply, Status> {
        let mut client = tonic::client::Grpc::new(self.0.clone())
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX);
        let ready = client.ready().await;
        ready.map_err(|error| Status::unavailable(format!("the real server is not there: {error}")))?;
        // A client that aborts has not finished its request, so the end is not forwarded. The reply is dropped soon,
        // which cancels the call.
        let messages = call.messages.flat_map(|message| match message {
            Ok(message) => stream::once(async { message }).left_stream(),
            Err(_) => stream::pending().right_stream(),
        });
        let mut request = Request::new(messages);
        *request.metadata_mut() = call.metadata;
        let response = client.streaming(request, call.path, Raw).await?;
        let (metadata, messages, _) = response.into_parts();
        Ok(Reply { metadata, messages: messages.boxed() })
    }
}

/// The stream limit of the connection, for a fault below the level of calls.
#[derive(Clone, Copy, Default)]
pub(crate) struct Transport {
    /// Number of concurrent streams of one connection.
    pub(crate) max_streams: Option<u32>,
}

/// A proxy that serves until it is dropped.
pub(crate) struct Proxy {
    pub(crate) endpoint: String,
    serving: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy on a free port.
    pub(crate) async fn start(server: &str, transport: Transport, behaviour: Behaviour) -> Self {
        let upstream = Endpoint::from_shared(server.to_owned())
            .unwrap()
            .tcp_nodelay(true)
            .initial_connection_window_size(WINDOW_BYTES)
            .initial_stream_window_size(WINDOW_BYTES)
            .connect_lazy();
        let upstream = Upstream(upstream);
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap().with_nodelay(Some(true));
        let endpoint = format!("grpc://{}", incoming.local_addr().unwrap());
        let service = tower::service_fn(move |request: http::Request<axum::body::Body>| {
            let (upstream, behaviour) = (upstream.clone(), behaviour.clone());
            async move { Ok::<_, Infallible>(answer(request, upstream, behaviour).await) }
        });
        let router = Server::builder()
            .max_concurrent_streams(transport.max_streams)
            .initial_connection_window_size(WINDOW_BYTES)
            .initial_stream_window_size(WINDOW_BYTES)
            .add_routes(Routes::from(Router::new().fallback_service(service)));
        let serving = tokio::spawn(async move {
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self { endpoint, serving }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn answer(
    request: http::Request<axum::body::Body>,
    upstream: Upstream,
    behaviour: Behaviour,
) -> http::Response<tonic::body::Body> {
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let handler = tower::service_fn(move |request: Request<Streaming<Bytes>>| {
        let (upstream, behaviour, path) = (upstream.clone(), behaviour.clone(), path.clone());
        async move {
            let (metadata, _, messages) = request.into_parts();
            let call = Call { path, metadata, messages: messages.boxed() };
            let reply = behaviour(call, upstream).await?;
            Ok::<_, Status>(Response::from_parts(reply.metadata, reply.messages, Default::default()))
        }
    });
    tonic::server::Grpc::new(Raw)
        .max_decoding_message_size(usize::MAX)
        .max_encoding_message_size(usize::MAX)
        .streaming(handler, request)
        .await
}
