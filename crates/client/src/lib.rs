//! A client of the Remote Execution API, for `gorego exec`, `gorego verify`, tests and benchmarks.
//!
//! A [`Client`] is one connection to one instance. It is cheap to clone, and its calls may run concurrently. It works
//! with any REAPI server and trusts none: downloads are checked against their digests and written only below the
//! destination. Every call has a time limit: [`CALL_TIMEOUT`] for the whole answer, or [`STREAM_IDLE_TIMEOUT`] without
//! progress for the transfer of a blob. An execution and a log stream have a limit only until they begin, because a
//! command may be silent for as long as it runs. Failures that may pass (UNAVAILABLE, a broken stream) are retried a
//! bounded number of times. Errors are [`gorego_reapi::error::Error`]. [`stubs`] has the bare gRPC clients.
//!
//! Not supported: compression, and digest functions other than SHA-256 for uploads and execution.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod admin;
mod blobs;
mod codec;
mod connect;
mod credentials;
mod destination;
mod download;
mod endpoint;
mod execute;
mod follow_log;
mod header;
mod input;
mod input_tree;
mod listing;
mod operation;
mod operations;
mod options;
mod probe;
mod raw;
mod read;
mod status;
pub mod stubs;
mod tls_error;
mod upload;

pub use blobs::{BlobSet, Progress, Source};
pub use connect::{Identity, Service};
pub use credentials::{AuthorizedChannel, Credentials};
pub use endpoint::ServerUri;
pub use execute::{Execution, ExecutionEvent, Finished, Job, LogNames};
pub use input::scan;
pub use listing::{ListedFile, Listing, decode_tree};
pub use operation::OperationRecord;
pub use operations::{OperationPage, OperationState, Stage};
pub use options::ConnectOptions;
pub use probe::{diagnose, explain};
pub use raw::Raw;

use crate::stubs::{
    ActionCacheClient, ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient,
    ExecutionClient, OperationsClient,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    instance_name::check_instance_name,
    proto::{longrunning, reapi},
};
use status::from_status;
use std::{future::Future, time::Duration};
use tonic::Request;

/// Time limit of a unary call.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit between two messages of a blob that is being read or written. The answer to an upload may take longer
/// ([`UPLOAD_END_TIMEOUT`]).
pub const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit between the last message of an upload and its answer. Messages that were handed to the connection may
/// still be on their way, and the server has to store the blob.
pub const UPLOAD_END_TIMEOUT: Duration = Duration::from_secs(300);
/// The slowest link for which time limits of large answers are made, in bytes per second.
const SLOWEST_LINK_BYTES: u64 = 8 * 1024;
/// Largest number of attempts for a call whose failure may pass.
pub const MAX_TRIES: u32 = 5;
/// Delay before the second attempt. It doubles with each attempt.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Longest delay between two attempts, even if a server asks for more.
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Largest accepted message. Servers stay below 4 MiB (GEN-25).
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// Limit on the sum of blob sizes in one batch call, if the server states none (CAP-11).
pub const DEFAULT_BATCH_BYTES: u64 = 4_000_000;
/// Number of digests in one FindMissingBlobs call. They take about 700 kB, which every server accepts (CAS-07).
const DIGESTS_PER_CALL: usize = 10_000;

/// A connection to a server.
#[derive(Debug, Clone)]
pub struct Client {
    service: Service,
    endpoint: String,
    instance: String,
    batch_bytes: u64,
    /// The digest function of all requested blobs.
    function: DigestFunction,
}

impl Client {
    /// Connects to a server (an endpoint such as `grpc://host:port`, or [`ConnectOptions`]) and requests its
    /// capabilities.
    ///
    /// # Errors
    /// `Invalid` for a malformed endpoint or instance name; `Unavailable` with a hint when no server answers;
    /// `Precondition` when the server does not support SHA-256, or speaks another protocol.
    pub async fn connect(
        server: impl Into<ConnectOptions>,
        instance: &str,
        identity: &Identity,
    ) -> Result<Self> {
        Self::connect_for(server, instance, identity, DigestFunction::Sha256).await
    }

    /// Like [`Client::connect`], for reading blobs with digests of another function. Uploads need SHA-256.
    ///
    /// # Errors
    /// As [`Client::connect`]; `Precondition` when the server does not support the function.
    pub async fn connect_for(
        server: impl Into<ConnectOptions>,
        instance: &str,
        identity: &Identity,
        function: DigestFunction,
    ) -> Result<Self> {
        check_instance_name(instance)?;
        let options = server.into();
        let service = connect::connect(&options, identity).await?;
        let mut client = Self {
            service,
            endpoint: options.endpoint.clone(),
            instance: instance.to_owned(),
            batch_bytes: DEFAULT_BATCH_BYTES,
            function,
        };
        let capabilities = match client.capabilities().await {
            Ok(capabilities) => capabilities,
            Err(error) => {
                // Some servers accept the connection of a client and refuse it only later.
                let other = match &error {
                    Error::Denied(_) | Error::Unimplemented(_) | Error::Invalid(_) => None,
                    _ => diagnose(&options).await,
                };
                return Err(
                    other.map_or(error, |why| Error::Precondition(format!("{}: {why}", options.endpoint)))
                );
            }
        };
        if let Some(cache) = capabilities.cache_capabilities {
            if !cache.digest_functions.contains(&(function.wire() as i32)) {
                let name = function.wire().as_str_name();
                return Err(Error::Precondition(format!("{} does not offer {name}", client.endpoint)));
            }
            if let Ok(bytes @ 1..) = u64::try_from(cache.max_batch_total_size_bytes) {
                client.batch_bytes = bytes.min(DEFAULT_BATCH_BYTES);
            }
        }
        Ok(client)
    }

    /// The endpoint as passed to [`Client::connect`].
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The name of the instance that requests are for; it may be empty.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// The connection, for the bare clients of [`stubs`].
    pub fn service(&self) -> Service {
        self.service.clone()
    }

    /// The digest function of all requested blobs.
    pub fn digest_function(&self) -> DigestFunction {
        self.function
    }

    /// The same connection for digests of another function, which the server is known to support.
    #[must_use]
    pub fn with_digest_function(self, function: DigestFunction) -> Self {
        Self { function, ..self }
    }

    /// Requests the capabilities of the server.
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn capabilities(&self) -> Result<reapi::ServerCapabilities> {
        let request = reapi::GetCapabilitiesRequest { instance_name: self.instance.clone() };
        retrying(async || {
            let mut client = CapabilitiesClient::new(self.service.clone());
            let answer = client.get_capabilities(timed(request.clone())).await;
            answer.map(tonic::Response::into_inner).map_err(|status| {
                let error = from_status("GetCapabilities", &status);
                // A status with a cause was created locally.
                if std::error::Error::source(&status).is_some() {
                    not_grpc(error, &self.endpoint)
                } else {
                    error
                }
            })
        })
        .await
    }

    /// Returns the digests that the server does not have.
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn find_missing(&self, digests: impl IntoIterator<Item = Digest>) -> Result<Vec<Digest>> {
        let digests: Vec<_> = digests.into_iter().map(|digest| digest.to_wire()).collect();
        let mut missing = Vec::new();
        for chunk in digests.chunks(DIGESTS_PER_CALL) {
            let request = reapi::FindMissingBlobsRequest {
                instance_name: self.instance.clone(),
                blob_digests: chunk.to_vec(),
                digest_function: self.function.wire().into(),
            };
            let answer = retrying(async || {
                let answer = self.cas().find_missing_blobs(timed(request.clone())).await;
                answer.map_err(|status| from_status("FindMissingBlobs", &status))
            })
            .await?;
            for digest in answer.into_inner().missing_blob_digests {
                missing.push(Digest::from_wire(self.function, Some(&digest), "missing_blob_digests")?);
            }
        }
        Ok(missing)
    }

    /// The cached result of an action; `None` if there is none.
    ///
    /// # Errors
    /// Errors of the server, except NOT_FOUND.
    pub async fn action_result(&self, action: Digest) -> Result<Option<reapi::ActionResult>> {
        let request = reapi::GetActionResultRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_wire()),
            digest_function: self.function.wire().into(),
            ..Default::default()
        };
        let answer = retrying(async || {
            let mut client =
                ActionCacheClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
            let answer = client.get_action_result(timed(request.clone())).await;
            answer.map_err(|status| from_status("GetActionResult", &status))
        })
        .await;
        match answer {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks the server to cancel an operation (OPS-03).
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn cancel(&self, operation: &str) -> Result<()> {
        let request = longrunning::CancelOperationRequest { name: operation.to_owned() };
        let mut client = OperationsClient::new(self.service.clone());
        let answer = within_limit(async {
            let answer = client.cancel_operation(timed(request)).await;
            answer.map_err(|status| from_status("CancelOperation", &status))
        });
        answer.await.map(|_| ())
    }

    fn cas(&self) -> ContentAddressableStorageClient<Service> {
        ContentAddressableStorageClient::new(self.service.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn byte_stream(&self) -> ByteStreamClient<Service> {
        ByteStreamClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn execution(&self) -> ExecutionClient<Service> {
        ExecutionClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// A resource name in this instance (GEN-12).
    fn qualify(&self, rest: &str) -> String {
        if self.instance.is_empty() { rest.to_owned() } else { format!("{}/{rest}", self.instance) }
    }
}

/// Creates a request with the time limit [`CALL_TIMEOUT`].
fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Ends a call after [`CALL_TIMEOUT`]. The time limit of a request alone covers only the head of the answer.
async fn within_limit<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    within(CALL_TIMEOUT, call).await
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T>>) -> Result<T> {
    let silent = |_| Err(Error::DeadlineExceeded(format!("the server did not answer within {limit:?}")));
    tokio::time::timeout(limit, call).await.unwrap_or_else(silent)
}

/// Time limit of a call whose answer has this many bytes of blobs.
fn limit_of_answer(bytes: u64) -> Duration {
    CALL_TIMEOUT + Duration::from_secs(bytes / SLOWEST_LINK_BYTES)
}

/// Repeats a call until it succeeds, fails permanently, or [`MAX_TRIES`] is reached. Each attempt ends after
/// [`CALL_TIMEOUT`].
async fn retrying<T, F: Future<Output = Result<T>>>(mut call: impl FnMut() -> F) -> Result<T> {
    retrying_transfer(|| within_limit(call())).await
}

/// Like [`retrying`], for calls that have a time limit of their own, because their duration depends on the size of a
/// blob.
async fn retrying_transfer<T, F: Future<Output = Result<T>>>(mut call: impl FnMut() -> F) -> Result<T> {
    let mut tries = 0;
    loop {
        match call().await {
            Err(error) => {
                tries += 1;
                match backoff(&error, tries) {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => return Err(error),
                }
            }
            done => return done,
        }
    }
}

/// The delay after this many failed attempts; `None` if a retry is pointless.
fn backoff(error: &Error, tries: u32) -> Option<Duration> {
    let asked = match error {
        Error::Unavailable(_) => None,
        Error::Exhausted { retry_after: Some(wait), .. } => Some(*wait),
        _ => return None,
    };
    let growing = FIRST_BACKOFF.saturating_mul(1 << (tries - 1).min(16));
    (tries < MAX_TRIES).then(|| asked.unwrap_or(growing).clamp(FIRST_BACKOFF, MAX_BACKOFF))
}

/// Runs blocking work on the blocking pool.
///
/// # Errors
/// The error of the work, or `Internal` when it panics.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a client thread failed: {error}"))),
    }
}

/// The error of a failed operation on a local file; `doing` completes "could not ...".
fn local(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Error {
    Error::Invalid(format!("could not {doing} {}: {error}", path.display()))
}

/// The error of a first call that got no answer of gRPC, with the likeliest cause.
fn not_grpc(error: Error, endpoint: &str) -> Error {
    let explain = |text: String| {
        format!("{text} ({endpoint} may be the HTTP port of the server; its gRPC port is needed)")
    };
    match error {
        Error::Unavailable(text) => Error::Unavailable(explain(text)),
        Error::Cancelled(text) => Error::Cancelled(explain(text)),
        Error::Internal(text) => Error::Internal(explain(text)),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_that_may_pass_are_tried_again_and_not_for_ever() {
        let waits = |error: &Error| (1..).map_while(|tries| backoff(error, tries)).collect::<Vec<_>>();
        let gone = waits(&Error::Unavailable("gone".into()));
        assert_eq!(gone.len() as u32, MAX_TRIES - 1);
        assert!(gone.is_sorted() && gone[0] == FIRST_BACKOFF);
        let full = |retry_after| Error::Exhausted { message: "full".into(), retry_after };
        // The server may choose the delay within bounds: neither zero nor arbitrarily long.
        assert_eq!(waits(&full(Some(Duration::from_secs(3600)))), [MAX_BACKOFF; MAX_TRIES as usize - 1]);
        assert_eq!(waits(&full(Some(Duration::ZERO))), [FIRST_BACKOFF; MAX_TRIES as usize - 1]);
        assert!(waits(&full(None)).is_empty() && waits(&Error::Invalid("no".into())).is_empty());
    }
}
