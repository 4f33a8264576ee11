//! Faults of Remote Asset.

use super::{
    Fault,
    change::{self, code, exchange, request, response},
    fault,
};
use gorego_reapi::proto::{
    asset::{FetchBlobRequest, FetchBlobResponse, PushBlobRequest, PushBlobResponse},
    rpc,
};
use tonic::{Code, Status};

pub(crate) fn faults() -> Vec<Fault> {
    let fetch = "FetchBlob";
    vec![
        fault("a fetch of nothing is a miss", &["AST-01"], {
            code(fetch, Code::InvalidArgument, Code::NotFound)
        }),
        fault("unknown qualifiers are ignored", &["AST-02"], {
            request::<FetchBlobRequest>(fetch, |asked| {
                asked.qualifiers.retain(|qualifier| {
                    let name = qualifier.name.as_str();
                    name.starts_with("http_header") || matches!(name, "checksum.sri" | "bazel.canonical_id")
                });
            })
        }),
        fault("headers are not sent", &["AST-03"], {
            request::<FetchBlobRequest>(fetch, |asked| {
                asked.qualifiers.retain(|qualifier| !qualifier.name.starts_with("http_header"));
            })
        }),
        fault("a checksum is not looked at", &["AST-04"], {
            request::<FetchBlobRequest>(fetch, |asked| {
                asked.qualifiers.retain(|qualifier| qualifier.name != "checksum.sri");
            })
        }),
        fault("the first checksum has to match", &["AST-04"], {
            request::<FetchBlobRequest>(fetch, |asked| {
                for qualifier in asked.qualifiers.iter_mut().filter(|one| one.name == "checksum.sri") {
                    qualifier.value = qualifier.value.split(' ').next().unwrap_or_default().to_owned();
                }
            })
        }),
        fault("trouble at the origin fails the call", &["AST-04", "AST-05"], {
            exchange::<FetchBlobRequest, FetchBlobResponse>(fetch, |_, answer| {
                let answer = answer?;
                match &answer.status {
                    Some(status) if status.code != 0 => {
                        Err(Status::new(Code::from(status.code), &*status.message))
                    }
                    _ => Ok(answer),
                }
            })
        }),
        fault("the answer does not say which URI", &["AST-05", "AST-06"], {
            response::<FetchBlobResponse>(fetch, |answer| answer.uri.clear())
        }),
        fault("what was fetched is not stored", &["AST-06"], {
            response::<FetchBlobResponse>(fetch, |answer| {
                for digest in answer.blob_digest.iter_mut() {
                    digest.hash = digest.hash.chars().rev().collect();
                }
            })
        }),
        fault("the answer does not say which function", &["AST-07"], {
            response::<FetchBlobResponse>(fetch, |answer| answer.digest_function = 0)
        }),
        fault("old content is good enough", &["AST-08"], {
            request::<FetchBlobRequest>(fetch, |asked| asked.oldest_content_accepted = None)
        }),
        fault("a time to come is an error", &["AST-08"], {
            exchange::<FetchBlobRequest, FetchBlobResponse>(fetch, |asked, answer| {
                match asked.oldest_content_accepted {
                    Some(_) => Err(Status::invalid_argument("oldest_content_accepted is in the future")),
                    None => answer,
                }
            })
        }),
        fault("one URI is tried", &["AST-09"], {
            request::<FetchBlobRequest>(fetch, |asked| asked.uris.truncate(1))
        }),
        fault("forbidden hosts are just not found", &["AST-10"], {
            response::<FetchBlobResponse>(fetch, |answer| {
                if let Some(status) = answer.status.as_mut().filter(|status| status.code == 7) {
                    status.code = 5;
                }
            })
        }),
        fault("every host can be reached", &["AST-10"], {
            response::<FetchBlobResponse>(fetch, |answer| {
                if answer.status.as_ref().is_some_and(|status| status.code == 7) {
                    answer.status = Some(rpc::Status::default());
                }
            })
        }),
        fault("pushes are taken and forgotten", &["AST-11"], {
            change::answer("PushBlob", PushBlobResponse {})
        }),
        fault("a push binds one URI", &["AST-11"], {
            request::<PushBlobRequest>("PushBlob", |asked| asked.uris.truncate(1))
        }),
        fault("a push lasts for ever", &["AST-11"], {
            request::<PushBlobRequest>("PushBlob", |asked| asked.expire_at = None)
        }),
    ]
}
