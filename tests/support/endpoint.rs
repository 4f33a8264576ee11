//! [`Endpoint`]: the gRPC port of a server in this process.

use super::client::Client;
use actix::System;
use gorego::{
    action::TimeoutPolicy,
    actors::cas::StoreSettings,
    grpc::{self, Edge, health::Health},
    log_streams::{LogSettings, LogStreams, StreamLimits},
};
use gorego_reapi::error::Result;
use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// A running endpoint, and a client that is connected to it.
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
    pub(crate) health: Health,
    pub(crate) serving: JoinHandle<Result<()>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Endpoint {
    /// Serves on a free port.
    pub(crate) async fn start(edge: Edge) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::serving().await;
        let (stop, stopped) = oneshot::channel::<()>();
        let of_service = health.clone();
        let serving = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            grpc::serve(Arc::new(edge), &of_service, listener, shutdown).await
        });
        let client = Client::connect(format!("http://{address}")).await;
        Self { address, client, health, serving, stop: Some(stop) }
    }

    /// Begins the shutdown.
    pub(crate) fn shut_down(&mut self) {
        drop(self.stop.take());
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The thread of the actors, until this is dropped.
pub(crate) struct ActorThread(System);

impl ActorThread {
    /// Starts actors on a separate thread, as the server does.
    pub(crate) fn start<T: Send + 'static>(start: impl FnOnce() -> T + Send + 'static) -> (Self, T) {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let system = System::new();
            system.block_on(async { sender.send((Self(System::current()), start())).unwrap_or_default() });
            system.run().unwrap();
        });
        receiver.recv().unwrap()
    }
}

impl Drop for ActorThread {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// The settings of a store below this directory.
pub(crate) fn store_settings(directory: &Path, max_blob_bytes: u64) -> StoreSettings {
    StoreSettings {
        root: directory.join("store"),
        max_bytes: 1 << 30,
        max_blob_bytes,
        partial_upload_retention: Duration::from_secs(600),
        leases: Default::default(),
        result_links_bytes: 1 << 20,
        packing: None,
        zstd_level: 1,
        sync: Default::default(),
        scrub_bytes_per_second: 0,
        timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(60) },
    }
}

/// Log streams with limits that a test can reach.
pub(crate) fn log_streams(client_streams: bool, spool_directory: &Path) -> LogStreams {
    let kept = Duration::from_secs(600);
    // One client may have 40 of them.
    let clients =
        StreamLimits { streams: 45, bytes: 10_000_000, stream_bytes: 4_000_000, idle: Some(kept), kept };
    let runs = StreamLimits { idle: None, ..clients };
    LogStreams::new(LogSettings { client_streams, clients, runs, spool_directory: spool_directory.into() })
}
