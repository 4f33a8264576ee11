//! Faults of the cross-cutting rules: digests, instances, statuses, the connection.

use super::{
    Fault,
    change::{self, code, exchange, failure, request, response},
    fault,
    proxy::{Call, Transport},
};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use gorego_reapi::proto::{
    bytestream::ReadResponse,
    reapi::{
        BatchUpdateBlobsResponse, Digest, FindMissingBlobsRequest, FindMissingBlobsResponse,
        GetActionResultRequest, GetCapabilitiesRequest, GetTreeRequest,
    },
    rpc,
};
use prost::Message as _;
use std::{collections::HashSet, sync::Arc};
use tonic::{Code, Status};

/// Whether a digest has the form of SHA-256.
fn well_formed(digest: &Digest) -> bool {
    digest.size_bytes >= 0
        && digest.hash.len() == 64
        && digest.hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A status with this detail.
fn with_detail(status: &Status, type_url: &str, value: Vec<u8>) -> Status {
    let detail = prost_types::Any { type_url: type_url.into(), value };
    let details =
        rpc::Status { code: status.code() as i32, message: status.message().into(), details: vec![detail] };
    Status::with_details(status.code(), status.message(), details.encode_to_vec().into())
}

pub(crate) fn faults() -> Vec<Fault> {
    let find = "FindMissingBlobs";
    let mut faults = vec![
        fault(
            "upper-case hashes are folded",
            &["GEN-01"],
            request::<FindMissingBlobsRequest>(find, |asked| {
                for digest in &mut asked.blob_digests {
                    digest.hash.make_ascii_lowercase();
                }
            }),
        ),
        fault(
            "malformed digests count as present",
            &["GEN-01", "GEN-02", "GEN-03", "CAS-06"],
            request::<FindMissingBlobsRequest>(find, |asked| asked.blob_digests.retain(well_formed)),
        ),
        fault(
            "malformed digests are an internal error",
            &["GEN-02", "GEN-03", "GEN-20", "CAS-06"],
            code(find, Code::InvalidArgument, Code::Internal),
        ),
        fault("the size is no part of the key", &["GEN-04"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                let mut answer = answer?;
                let missing: HashSet<_> =
                    answer.missing_blob_digests.iter().map(|digest| digest.size_bytes).collect();
                if asked.blob_digests.len() == missing.len() {
                    answer.missing_blob_digests.clear();
                }
                Ok(answer)
            })
        }),
        fault(
            "a wrong credential is a lack of permission",
            &["GEN-23"],
            code(find, Code::Unauthenticated, Code::PermissionDenied),
        ),
        fault(
            "a wrong credential is an internal error",
            &["GEN-23"],
            code(find, Code::Unauthenticated, Code::Internal),
        ),
        fault(
            "an absent digest is a cache miss",
            &["GEN-05"],
            code("GetActionResult", Code::InvalidArgument, Code::NotFound),
        ),
        fault("an absent digest is the empty blob", &["GEN-05"], {
            request::<GetTreeRequest>("GetTree", |asked| {
                asked.root_digest.get_or_insert_with(|| {
                    gorego_reapi::digest::Digest::empty(gorego_reapi::digest::DigestFunction::Sha256)
                        .to_wire()
                });
            })
        }),
        fault("the empty blob has to be uploaded", &["GEN-06"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                let mut answer = answer?;
                let empty = asked.blob_digests.iter().filter(|digest| digest.size_bytes == 0).cloned();
                answer.missing_blob_digests.extend(empty);
                Ok(answer)
            })
        }),
        fault("whatever has no bytes is the empty blob", &["GEN-07"], {
            request::<FindMissingBlobsRequest>(find, |asked| {
                asked.blob_digests.retain(|digest| digest.size_bytes != 0);
            })
        }),
        fault("the digest function has to be said", &["GEN-08"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                match asked.digest_function {
                    0 => Err(Status::invalid_argument("digest_function is not set")),
                    _ => answer,
                }
            })
        }),
        fault("an unknown digest function is SHA-256", &["GEN-09"], {
            request::<FindMissingBlobsRequest>(find, |asked| asked.digest_function = 0)
        }),
        fault("what is of another digest function is skipped", &["GEN-10"], {
            request::<FindMissingBlobsRequest>(find, |asked| {
                asked.blob_digests.retain(|digest| digest.hash.len() == 64);
            })
        }),
        fault("instance names have one segment", &["GEN-12", "BS-01"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                match asked.instance_name.contains('/') {
                    true => Err(Status::invalid_argument("malformed instance name")),
                    false => answer,
                }
            })
        }),
        fault("any text is an instance name", &["GEN-13"], {
            request::<GetCapabilitiesRequest>("GetCapabilities", |asked| asked.instance_name.clear())
        }),
        fault("an unknown instance is a cache miss", &["GEN-14"], {
            request::<GetActionResultRequest>("GetActionResult", |asked| asked.instance_name.clear())
        }),
        fault("all instances are one", &["GEN-15"], {
            request::<FindMissingBlobsRequest>(find, |asked| asked.instance_name.clear())
        }),
        fault("what is not there is an unknown error", &["GEN-16"], {
            let unknown = |status: Status| match status.code() {
                Code::Unimplemented => Status::unknown(status.message()),
                _ => status,
            };
            Arc::new(move |call, upstream| {
                async move { upstream.forward(call).await.map_err(unknown) }.boxed()
            })
        }),
        fault(
            "an unsupported compressor is an internal error",
            &["GEN-16", "GEN-20", "BS-04"],
            code("Read", Code::InvalidArgument, Code::Internal),
        ),
        fault("packed types have another authority", &["GEN-18"], {
            change::operation(|operation| {
                if let Some(any) = &mut operation.metadata {
                    any.type_url = any.type_url.replace("googleapis", "example");
                }
            })
        }),
        fault("every error asks for another try", &["GEN-21"], {
            failure(find, |status| {
                Err(with_detail(&status, "type.googleapis.com/google.rpc.RetryInfo", Vec::new()))
            })
        }),
        fault("details contradict the status", &["GEN-17"], {
            change::every(
                |method| {
                    failure(method, |status| {
                        let details =
                            rpc::Status { code: 13, message: "something else".into(), details: vec![] };
                        let details = details.encode_to_vec().into();
                        Err(Status::with_details(status.code(), status.message(), details))
                    })
                },
                &["Execute", "FindMissingBlobs", "Read", "GetActionResult", "UpdateActionResult"],
            )
        }),
        fault("codes are numbers of our own", &["GEN-22"], {
            response::<BatchUpdateBlobsResponse>("BatchUpdateBlobs", |answer| {
                for status in answer.responses.iter_mut().filter_map(|response| response.status.as_mut()) {
                    status.code = if status.code == 0 { 0 } else { 99 };
                }
            })
        }),
        fault("a blob is read in one message", &["GEN-25"], {
            change::messages("Read", |messages| {
                let whole = messages.try_fold(Vec::new(), |mut whole, message| async move {
                    whole.extend_from_slice(&change::decode::<ReadResponse>(message)?.data);
                    Ok(whole)
                });
                let message = |data: Vec<u8>| Bytes::from(ReadResponse { data: data.into() }.encode_to_vec());
                futures::stream::once(async move { whole.await.map(message) }).boxed()
            })
        }),
        fault("clients without RequestMetadata are refused", &["GEN-28"], {
            change::instead(find, |call, upstream| async move {
                let header = "build.bazel.remote.execution.v2.requestmetadata-bin";
                let metadata = call.metadata.get_bin(header).and_then(|value| value.to_bytes().ok());
                let known = metadata
                    .and_then(|bytes| gorego_reapi::proto::reapi::RequestMetadata::decode(bytes).ok());
                if known.is_none() {
                    return Err(Status::invalid_argument("no RequestMetadata"));
                }
                upstream.forward(call).await
            })
        }),
        fault("unknown fields are refused", &["GEN-29"], {
            change::instead(find, |call, upstream| async move {
                let (asked, mut call) = change::read_request::<FindMissingBlobsRequest>(call).await?;
                let bytes = call.messages.next().await.unwrap_or_else(|| Ok(Bytes::new()))?;
                if asked.encoded_len() != bytes.len() {
                    return Err(Status::invalid_argument("unknown fields"));
                }
                upstream.forward(change::with_request(call, &asked)).await
            })
        }),
        fault("Directories have fields that nobody knows", &["GEN-30"], {
            change::trees(|mut tree, _| {
                // Field 15000 with the value 1, in the root.
                let mut root = tree.root.take().unwrap_or_default().encode_to_vec();
                prost::encoding::uint32::encode(15000, &1, &mut root);
                let mut bytes = Vec::new();
                prost::encoding::bytes::encode(1, &root, &mut bytes);
                bytes.extend_from_slice(&tree.encode_to_vec());
                bytes
            })
        }),
        fault("a list of missing blobs comes in the trailers", &["GEN-19"], {
            super::execution::inline_as_status(usize::MAX)
        }),
        fault("malformed requests are worth another try", &["GEN-20"], {
            code("GetActionResult", Code::InvalidArgument, Code::Unavailable)
        }),
        fault("blobs are reported under every digest function", &["GEN-11"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                let mut answer = answer?;
                if asked.digest_function > 1 {
                    answer.missing_blob_digests.clear();
                }
                Ok(answer)
            })
        }),
    ];
    let transport = Transport { max_streams: Some(8) };
    faults.push(Fault { transport, ..fault("a connection has few streams", &["GEN-27"], change::nothing()) });
    faults.push(fault("messages are as large as a batch and no larger", &["GEN-24"], {
        let limited = |method| {
            change::instead(method, |mut call, upstream| async move {
                let first = call.messages.next().await.unwrap_or_else(|| Ok(Bytes::new()))?;
                if first.len() > 4_000_000 {
                    return Err(Status::resource_exhausted("the message is too large"));
                }
                let messages = futures::stream::once(async { Ok(first) }).chain(call.messages).boxed();
                upstream.forward(Call { messages, ..call }).await
            })
        };
        change::every(limited, &["BatchUpdateBlobs", "Write"])
    }));
    faults.push(fault("answers to a long list are lost", &["CAS-07"], {
        response::<FindMissingBlobsResponse>(find, |answer| answer.missing_blob_digests.truncate(10_000))
    }));
    faults
}
