//! [`Ports`]: the gRPC and the HTTP port while they are served, and their shutdown.

use super::{LOG, observer::Observer};
use crate::{
    connections::Connections,
    grpc::{self, Edge, health::Health},
    http,
    logging::Event,
    tls::ServerTls,
    unfinished_requests::UnfinishedRequests,
};
use futures::{FutureExt as _, future::BoxFuture};
use gorego_reapi::error::{Error, Result};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    runtime::Handle,
    select,
    sync::oneshot,
    time::{Instant, timeout_at},
};

/// During a shutdown, a connection whose client is inactive for this long is closed.
const INACTIVE_CLIENT_LIMIT: Duration = Duration::from_secs(2);

/// The ports, and what they share.
pub(super) struct Ports {
    /// The address of the gRPC port.
    pub address: SocketAddr,
    pub connections: Connections,
    pub unfinished_requests: UnfinishedRequests,
    pub observer: Arc<Observer>,
    pub health: Health,
    pub grpc: ServedPort,
    pub http: ServedPort,
}

impl Ports {
    /// Completes when a port has failed.
    pub(super) async fn failed(&mut self) -> Error {
        select! {
            error = &mut self.grpc.ended => error,
            error = &mut self.http.ended => error,
        }
    }

    /// Marks the server as draining, for health checks.
    pub(super) async fn drain(&self) {
        self.observer.drain();
        self.health.drain().await;
    }

    /// Accepts no more connections, closes idle ones, and waits for the open requests, but not longer than `until`.
    pub(super) async fn close(self, until: Instant) {
        let Self { grpc, http, unfinished_requests, .. } = self;
        drop((grpc.close, http.close));
        select! {
            _ = async { tokio::join!(grpc.ended, http.ended) } => {}
            _ = timeout_at(until, unfinished_requests.finished(INACTIVE_CLIENT_LIMIT)) => {
                Event::warn(LOG, "connections_cut")
                    .log(format_args!("closing connections that clients keep open"));
            }
        }
    }
}

/// A port that is served until `close` is dropped.
pub(super) struct ServedPort {
    close: oneshot::Sender<()>,
    /// Completes with the reason when the port is no longer served.
    ended: BoxFuture<'static, Error>,
}

impl ServedPort {
    /// Serves gRPC on this listener.
    pub(super) fn grpc(
        (edge, health): (Arc<Edge>, Health),
        listener: TcpListener,
        tls: Option<&ServerTls>,
        workers: &Handle,
    ) -> Self {
        let (close, closed) = oneshot::channel::<()>();
        let tls = tls.map(ServerTls::grpc_port);
        let serving = workers.spawn(async move {
            let shutdown = async move { drop(closed.await) };
            grpc::serve_with(edge, &health, listener, tls, shutdown).await
        });
        let ended = async move {
            match serving.await {
                Ok(Ok(())) => Error::internal("the gRPC server stopped by itself"),
                Ok(Err(error)) => error,
                Err(panic) => Error::Internal(format!("the gRPC server panicked: {panic}")),
            }
        };
        Self { close, ended: ended.boxed() }
    }

    /// Serves HTTP/1.1, if there is a listener for it.
    pub(super) fn http(
        port: http::Port,
        listener: Option<TcpListener>,
        tls: Option<&ServerTls>,
        workers: &Handle,
    ) -> Result<Self> {
        let (close, closed) = oneshot::channel::<()>();
        // Without a listener, the future must not complete before the shutdown.
        let Some(listener) = listener else {
            let ended = closed.map(|_| Error::internal("there is no HTTP server"));
            return Ok(Self { close, ended: ended.boxed() });
        };
        let address =
            listener.local_addr().map_err(|error| Error::io("learn the port of the HTTP cache", &error))?;
        Event::info(LOG, "http_started")
            .with_shown("listen_addr", &address)
            .log(format_args!("serving the HTTP cache on {address}"));
        let shutdown = async move { drop(closed.await) };
        let serving = workers.spawn(http::serve(port, listener, tls.map(ServerTls::http_port), shutdown));
        let ended = async move {
            match serving.await {
                Ok(()) => Error::internal("the HTTP server stopped by itself"),
                Err(panic) => Error::Internal(format!("the HTTP server panicked: {panic}")),
            }
        };
        Ok(Self { close, ended: ended.boxed() })
    }
}
