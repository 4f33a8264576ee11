//! Calls whose request is raw bytes, for content that the generated messages cannot express, such as unknown fields.

use super::connection::Service;
use bytes::Bytes;
use gorego_client::Raw;
use http::uri::PathAndQuery;
use tonic::{
    Request, Status,
    client::{Grpc, GrpcService},
};

/// Paths of these calls.
pub(crate) mod path {
    pub(crate) const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
    /// A method that no server implements.
    pub(crate) const NO_SUCH_METHOD: &str = "/build.bazel.remote.execution.v2.Capabilities/NoSuchMethod";
    pub(crate) const FIND_MISSING: &str =
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
    pub(crate) const BATCH_UPDATE: &str =
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs";
    pub(crate) const BATCH_READ: &str =
        "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
    pub(crate) const GET_ACTION_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
}

/// Makes a unary call with these request bytes and returns the response bytes.
///
/// # Errors
/// The status of the server.
pub(crate) async fn call(service: Service, path: &str, request: Request<Bytes>) -> Result<Bytes, Status> {
    call_on(service, path, request).await
}

/// Like [`call`], over any connection.
///
/// # Errors
/// The status of the server.
pub(crate) async fn call_on<S>(service: S, path: &str, request: Request<Bytes>) -> Result<Bytes, Status>
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
