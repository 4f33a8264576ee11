//! Calls whose request is bytes: for what the generated messages cannot say, such as fields that nobody knows.

use super::connection::Service;
use bytes::{Buf as _, BufMut as _, Bytes};
use http::uri::PathAndQuery;
use tonic::{
    Request, Status,
    client::{Grpc, GrpcService},
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// The paths of the calls that checks make so.
pub mod path {
    /// Capabilities.
    pub const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
    /// What no server has.
    pub const NO_SUCH_METHOD: &str = "/build.bazel.remote.execution.v2.Capabilities/NoSuchMethod";
    /// ContentAddressableStorage.
    pub const FIND_MISSING: &str =
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
    /// ContentAddressableStorage.
    pub const BATCH_UPDATE: &str =
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs";
    /// ContentAddressableStorage.
    pub const BATCH_READ: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
    /// ActionCache.
    pub const GET_ACTION_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
}

/// A unary call with these bytes as its request; the bytes of the answer.
///
/// # Errors
/// As the server answers.
pub async fn call(service: Service, path: &str, request: Request<Bytes>) -> Result<Bytes, Status> {
    call_on(service, path, request).await
}

/// The same over any connection.
///
/// # Errors
/// As the server answers.
pub async fn call_on<S>(service: S, path: &str, request: Request<Bytes>) -> Result<Bytes, Status>
where
    S: GrpcService<tonic::body::Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::ResponseBody: tonic::transport::Body<Data = Bytes> + Send + 'static,
    <S::ResponseBody as tonic::transport::Body>::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let mut client = Grpc::new(service);
    let not_ready = |error: S::Error| {
        let error: Box<dyn std::error::Error + Send + Sync> = error.into();
        Status::unavailable(error.to_string())
    };
    client.ready().await.map_err(not_ready)?;
    let path: PathAndQuery = path.parse().map_err(|_| Status::internal("a malformed path in a check"))?;
    Ok(client.unary(request, path, Raw).await?.into_inner())
}

#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
