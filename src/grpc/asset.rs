//! The Fetch and Push services of the Remote Asset API (AST-01..11).
//!
//! A failure of an origin is reported as a status inside the answer. Errors of this server and of the request are the
//! status of the RPC (AST-05).

use super::{Edge, request_memory::RequestMemory};
use crate::{
    actors::asset::{
        bindings::References,
        client::Assets,
        outcome::{FailureKind, Fetched, OriginFailure as Failure, Problem},
        request::{AssetKind as Kind, AssetRequest, Qualifiers},
    },
    call::Call,
    grpc::services::{fetch_server::Fetch, push_server::Push},
};
use gorego_reapi::{
    digest::Digest,
    duration,
    error::{Error, Result},
    proto::{
        asset::{
            FetchBlobRequest, FetchBlobResponse, FetchDirectoryRequest, FetchDirectoryResponse,
            PushBlobRequest, PushBlobResponse, PushDirectoryRequest, PushDirectoryResponse, Qualifier,
        },
        reapi, rpc,
    },
    status,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tonic::{Code, Request, Response, Status};

/// The Fetch and the Push service.
#[derive(Debug, Clone)]
pub(crate) struct AssetService(pub Arc<Edge>);

/// The fields that both kinds of fetch have.
struct FetchFields {
    instance_name: String,
    timeout: Option<prost_types::Duration>,
    oldest_content_accepted: Option<prost_types::Timestamp>,
    uris: Vec<String>,
    qualifiers: Vec<Qualifier>,
    digest_function: i32,
}

/// The fields that both kinds of push have.
struct PushFields {
    instance_name: String,
    uris: Vec<String>,
    qualifiers: Vec<Qualifier>,
    expire_at: Option<prost_types::Timestamp>,
    digest: Option<reapi::Digest>,
    digest_field: &'static str,
    references_blobs: Vec<reapi::Digest>,
    references_directories: Vec<reapi::Digest>,
    digest_function: i32,
}

/// The fields that both kinds of answer to a fetch have.
struct FetchAnswer {
    status: rpc::Status,
    uri: String,
    qualifiers: Vec<Qualifier>,
    expires_at: Option<prost_types::Timestamp>,
    digest: Option<reapi::Digest>,
    digest_function: i32,
}

/// The [`FetchFields`] of a request of either kind.
macro_rules! fetch_fields {
    ($request:expr, $message:ident) => {{
        let $message { instance_name, timeout, oldest_content_accepted, uris, qualifiers, digest_function } =
            $request;
        FetchFields { instance_name, timeout, oldest_content_accepted, uris, qualifiers, digest_function }
    }};
}

/// The [`PushFields`] of a request of either kind.
macro_rules! push_fields {
    ($request:expr, $digest:ident) => {{
        let request = $request;
        PushFields {
            instance_name: request.instance_name,
            uris: request.uris,
            qualifiers: request.qualifiers,
            expire_at: request.expire_at,
            digest: request.$digest,
            digest_field: stringify!($digest),
            references_blobs: request.references_blobs,
            references_directories: request.references_directories,
            digest_function: request.digest_function,
        }
    }};
}

/// The response of either kind with a [`FetchAnswer`].
macro_rules! fetch_response {
    ($answer:expr, $message:ident, $digest:ident) => {{
        let FetchAnswer { status, uri, qualifiers, expires_at, digest, digest_function } = $answer;
        let status = Some(status);
        $message { status, uri, qualifiers, expires_at, $digest: digest, digest_function }
    }};
}

#[tonic::async_trait]
impl Fetch for AssetService {
    async fn fetch_blob(
        &self,
        request: Request<FetchBlobRequest>,
    ) -> Result<Response<FetchBlobResponse>, Status> {
        let call = Call::of(request.extensions());
        let answer =
            self.fetch(&call, Kind::Blob, fetch_fields!(request.into_inner(), FetchBlobRequest)).await?;
        Ok(Response::new(fetch_response!(answer, FetchBlobResponse, blob_digest)))
    }

    async fn fetch_directory(
        &self,
        request: Request<FetchDirectoryRequest>,
    ) -> Result<Response<FetchDirectoryResponse>, Status> {
        let call = Call::of(request.extensions());
        let answer = self
            .fetch(&call, Kind::Directory, fetch_fields!(request.into_inner(), FetchDirectoryRequest))
            .await?;
        Ok(Response::new(fetch_response!(answer, FetchDirectoryResponse, root_directory_digest)))
    }
}

#[tonic::async_trait]
impl Push for AssetService {
    async fn push_blob(
        &self,
        request: Request<PushBlobRequest>,
    ) -> Result<Response<PushBlobResponse>, Status> {
        let call = Call::of(request.extensions());
        self.push(&call, Kind::Blob, push_fields!(request.into_inner(), blob_digest)).await?;
        Ok(Response::new(PushBlobResponse {}))
    }

    async fn push_directory(
        &self,
        request: Request<PushDirectoryRequest>,
    ) -> Result<Response<PushDirectoryResponse>, Status> {
        let call = Call::of(request.extensions());
        self.push(&call, Kind::Directory, push_fields!(request.into_inner(), root_directory_digest)).await?;
        Ok(Response::new(PushDirectoryResponse {}))
    }
}

impl AssetService {
    fn assets(&self, call: &Call) -> Result<Assets> {
        let absent = || Error::Unimplemented("this server has no asset service".into());
        Ok(self.0.assets.as_ref().ok_or_else(absent)?.on_behalf_of(call.caller()))
    }

    async fn fetch(&self, call: &Call, kind: Kind, wanted: FetchFields) -> Result<FetchAnswer, Status> {
        let assets = self.assets(call)?;
        let instance = self.0.gate.enter(call, &wanted.instance_name)?;
        // Without a hash to infer it from, the default is the preferred function (AST-07).
        let function = instance.digest_function(wanted.digest_function, [])?;
        let oldest =
            wanted.oldest_content_accepted.map(|at| time(at, "oldest_content_accepted")).transpose()?;
        let wait = wanted.timeout.map(wait).transpose()?.filter(|wait| !wait.is_zero());
        let request =
            AssetRequest::new(instance, function, kind, wanted.uris, qualifiers(wanted.qualifiers)?)?;
        let shown = request.qualifiers.shown();
        let shown = shown.map(|(name, value)| Qualifier { name: name.into(), value: value.into() }).collect();
        let first = request.uris.first().cloned().unwrap_or_default();
        // The download may be slow, and its client may control the origin. The factor is two because the answer repeats
        // the qualifiers.
        RequestMemory::settle(2 * request.size() as u64);
        let outcome = assets.fetch(request, oldest, wait).await;
        let digest_function = function.wire() as i32;
        match outcome {
            Ok(Fetched { uri, digest, expires_at }) => {
                call.note_blob(digest);
                Ok(FetchAnswer {
                    status: status::inline_ok(),
                    uri,
                    qualifiers: shown,
                    expires_at: expires_at.map(Into::into),
                    digest: Some(digest.to_wire()),
                    digest_function,
                })
            }
            Err(Problem::Origin(failure)) => {
                call.note_inner_error(&failure.message);
                let status = inline(&failure);
                let uri = if failure.uri.is_empty() { first } else { failure.uri };
                Ok(FetchAnswer {
                    status,
                    uri,
                    qualifiers: shown,
                    expires_at: None,
                    digest: None,
                    digest_function,
                })
            }
            Err(Problem::Unsupported(names)) => Err(status::unsupported_qualifiers(&names)),
            Err(Problem::Server(error)) => Err(error.into()),
        }
    }

    async fn push(&self, call: &Call, kind: Kind, offered: PushFields) -> Result<(), Status> {
        let assets = self.assets(call)?;
        let instance = self.0.gate.enter(call, &offered.instance_name)?;
        // Other clients are served pushed assets, just like action results.
        self.0.gate.require_to_publish(call, &instance)?;
        if !assets.push_enabled() {
            let message = "clients may not push assets to this server (assets.push = false)";
            return Err(Error::Unimplemented(message.into()).into());
        }
        let all =
            offered.digest.iter().chain(&offered.references_blobs).chain(&offered.references_directories);
        let lengths = all.map(|digest| digest.hash.len());
        let function = instance.digest_function(offered.digest_function, lengths)?;
        let digest = Digest::from_wire(function, offered.digest.as_ref(), offered.digest_field)?;
        call.note_blob(digest);
        let list = |digests: &[reapi::Digest], field| -> Result<Vec<Digest>> {
            digests.iter().map(|digest| Digest::from_wire(function, Some(digest), field)).collect()
        };
        let references = References {
            blobs: list(&offered.references_blobs, "references_blobs")?,
            directories: list(&offered.references_directories, "references_directories")?,
        };
        let expires_at = offered.expire_at.map(|at| time(at, "expire_at")).transpose()?;
        let request =
            AssetRequest::new(instance, function, kind, offered.uris, qualifiers(offered.qualifiers)?)?;
        Ok(assets.push(request, digest, references, expires_at).await?)
    }
}

/// The status inside an answer for a failure of an origin.
fn inline(failure: &Failure) -> rpc::Status {
    let code = match failure.kind {
        FailureKind::NotFound => Code::NotFound,
        FailureKind::Denied => Code::PermissionDenied,
        FailureKind::TimedOut => Code::DeadlineExceeded,
        FailureKind::Unusable => Code::Aborted,
        FailureKind::TooMuch => Code::ResourceExhausted,
    };
    let message = status::shorten(failure.message.clone(), status::MESSAGE_MAX_BYTES);
    rpc::Status { code: code.into(), message, details: Vec::new() }
}

fn qualifiers(list: Vec<Qualifier>) -> Result<Qualifiers> {
    Qualifiers::parse(list.into_iter().map(|Qualifier { name, value }| (name, value)))
}

fn time(wire: prost_types::Timestamp, field: &str) -> Result<SystemTime> {
    wire.try_into().map_err(|_| Error::Invalid(format!("{field} is not a valid time")))
}

fn wait(wire: prost_types::Duration) -> Result<Duration> {
    duration::from_wire(&wire).ok_or_else(|| Error::invalid("timeout is negative or not a valid duration"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_news_has_the_code_in_answers_that_it_has_in_logs() {
        for kind in [
            FailureKind::NotFound,
            FailureKind::Denied,
            FailureKind::TimedOut,
            FailureKind::Unusable,
            FailureKind::TooMuch,
        ] {
            let status = inline(&Failure { kind, uri: String::new(), message: String::new() });
            assert_eq!(rpc::Code::try_from(status.code).unwrap().as_str_name(), kind.code_name());
        }
    }
}
