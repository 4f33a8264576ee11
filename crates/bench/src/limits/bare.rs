//! Calls to a gRPC server that does nothing. They measure the cost of the gRPC library and the loopback
//! interface.

mod nothing;

use super::{BATCH, DIGESTS, MESSAGE_BYTES, SMALL_BYTES};
use crate::{
    Options,
    drive::{self, Workload, message, ready},
    figures::{Figures, Work},
    noise::Noise,
    target::FUNCTION,
};
use futures::stream;
use gorego_client::stubs::{ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient};
use gorego_reapi::{
    error::{Error, Result},
    proto::{
        bytestream::{ReadRequest, WriteRequest},
        reapi::{BatchReadBlobsRequest, Digest, FindMissingBlobsRequest, GetCapabilitiesRequest},
    },
};
use std::collections::HashSet;
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::transport::{Channel, Endpoint, server::TcpIncoming};

/// Flow-control windows of both sides.
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
/// Maximum size of a decoded message.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A running server on separate threads, and a connection to it.
pub(super) struct Bare {
    channel: Channel,
    options: Options,
    runtime: Option<Runtime>,
}

impl Bare {
    /// Starts the server and connects to it. The options say how long each kind of call is measured.
    ///
    /// # Errors
    /// If there is no port or no thread for it.
    pub(super) async fn start(options: Options) -> Result<Self> {
        let runtime = Runtime::new().map_err(|error| Error::io("start the threads of a server", &error))?;
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|error| Error::io("listen", &error))?;
        let address = listener.local_addr().map_err(|error| Error::io("listen", &error))?;
        runtime.spawn(
            nothing::server().serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))),
        );
        let failed =
            |error: tonic::transport::Error| Error::Unavailable(format!("connect to {address}: {error}"));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(failed)?;
        let endpoint = endpoint
            .tcp_nodelay(true)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES);
        Ok(Self { channel: endpoint.connect().await.map_err(failed)?, options, runtime: Some(runtime) })
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
        self.measure(&*workload, 32).await
    }

    /// Existence checks by 8 callers, in which each second digest is missing.
    pub(super) async fn find_missing(&self) -> Result<Figures> {
        let mut noise = Noise::new(1);
        let blob_digests = (0..DIGESTS).map(|_| FUNCTION.digest(&noise.bytes(64)).to_wire()).collect();
        let (request, channel) =
            (FindMissingBlobsRequest { blob_digests, ..Default::default() }, self.channel.clone());
        let workload = ready(move |_| {
            let (mut client, request) = (cas(&channel), request.clone());
            async move {
                let answer = client.find_missing_blobs(request).await;
                let answer = answer.map_err(|status| message("FindMissingBlobs", &status))?.into_inner();
                let missing: HashSet<_> =
                    answer.missing_blob_digests.iter().map(|digest| &digest.hash).collect();
                if missing.len() != DIGESTS / 2 {
                    return Err("FindMissingBlobs gave the wrong number of digests".into());
                }
                Ok(Work { units: DIGESTS as u64, bytes: 0 })
            }
        });
        self.measure(&*workload, 8).await
    }

    /// Reads of batches of small blobs by 8 callers.
    pub(super) async fn batch_reads(&self) -> Result<Figures> {
        let digest = Digest { size_bytes: SMALL_BYTES as i64, ..FUNCTION.digest(b"a small blob").to_wire() };
        let request = BatchReadBlobsRequest { digests: vec![digest; BATCH], ..Default::default() };
        let channel = self.channel.clone();
        let workload = ready(move |_| {
            let (mut client, request) = (cas(&channel), request.clone());
            async move {
                let answer = client.batch_read_blobs(request).await;
                let answer = answer.map_err(|status| message("BatchReadBlobs", &status))?.into_inner();
                let bytes = answer.responses.iter().map(|response| response.data.len()).sum::<usize>();
                Ok(Work { units: answer.responses.len() as u64, bytes: bytes as u64 })
            }
        });
        self.measure(&*workload, 8).await
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
        self.measure(&*workload, callers).await
    }

    /// Reads of this many bytes, in messages of at most 1 MiB.
    pub(super) async fn reads(&self, bytes: usize, callers: usize) -> Result<Figures> {
        let channel = self.channel.clone();
        let workload = ready(move |_| {
            let mut client = byte_stream(&channel);
            async move {
                let request = ReadRequest { read_limit: bytes as i64, ..Default::default() };
                let answer = client.read(request).await.map_err(|status| message("Read", &status))?;
                let (mut stream, mut bytes) = (answer.into_inner(), 0);
                while let Some(read) = stream.message().await.map_err(|status| message("Read", &status))? {
                    bytes += read.data.len() as u64;
                }
                Ok(Work { units: 1, bytes })
            }
        });
        self.measure(&*workload, callers).await
    }

    async fn measure(&self, workload: &dyn Workload, callers: usize) -> Result<Figures> {
        let figures = drive::measure("limits", workload, callers, &self.options, &|_| {}).await?.figures;
        match figures.errors.keys().next() {
            Some(error) => {
                Err(Error::Internal(format!("a call to the server that does nothing failed: {error}")))
            }
            None => Ok(figures),
        }
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

fn cas(channel: &Channel) -> ContentAddressableStorageClient<Channel> {
    ContentAddressableStorageClient::new(channel.clone())
}

fn byte_stream(channel: &Channel) -> ByteStreamClient<Channel> {
    ByteStreamClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
}
