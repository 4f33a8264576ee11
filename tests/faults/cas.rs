//! Faults of ContentAddressableStorage.

use super::{
    Fault,
    change::{code, exchange, failure, messages, request, response},
    fault,
    proxy::{Behaviour, Messages},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::proto::{
    reapi::{
        BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest, BatchUpdateBlobsResponse,
        Digest, FindMissingBlobsRequest, FindMissingBlobsResponse, GetTreeRequest, GetTreeResponse,
        SpliceBlobRequest, SpliceBlobResponse, SplitBlobRequest, SplitBlobResponse,
    },
    rpc,
};
use prost::Message as _;
use std::{collections::HashSet, sync::Mutex};
use tonic::{Code, Status};

/// Turns one wrong response of a batch into an error of the whole call.
fn whole_call_fails(statuses: impl IntoIterator<Item = Option<rpc::Status>>) -> Result<(), Status> {
    for status in statuses.into_iter().flatten() {
        if status.code != 0 {
            return Err(Status::new(Code::from(status.code), status.message));
        }
    }
    Ok(())
}

/// Decodes a page, changes it, and encodes it.
fn pages(change: impl Fn(&mut GetTreeResponse) + Send + Sync + 'static) -> Behaviour {
    response("GetTree", change)
}

pub(crate) fn faults() -> Vec<Fault> {
    let mut faults = find_missing();
    faults.extend(batch_update());
    faults.extend(batch_read());
    faults.extend(get_tree());
    faults.extend(chunks());
    faults
}

fn find_missing() -> Vec<Fault> {
    let find = "FindMissingBlobs";
    vec![
        fault("FindMissing forgets one", &["CAS-01", "CAS-02"], {
            response::<FindMissingBlobsResponse>(find, |answer| drop(answer.missing_blob_digests.pop()))
        }),
        fault("FindMissing lists all that was asked for", &["CAS-01", "CAS-13"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                answer?;
                Ok(FindMissingBlobsResponse { missing_blob_digests: asked.blob_digests.clone() })
            })
        }),
        fault("FindMissing answers in upper case", &["CAS-01"], {
            response::<FindMissingBlobsResponse>(find, |answer| {
                for digest in &mut answer.missing_blob_digests {
                    digest.hash.make_ascii_uppercase();
                }
            })
        }),
        fault("FindMissing repeats what was asked twice", &["CAS-02"], {
            response::<FindMissingBlobsResponse>(find, |answer| {
                let again = answer.missing_blob_digests.clone();
                answer.missing_blob_digests.extend(again);
            })
        }),
        fault("FindMissing claims that all is there", &["CAS-01", "CAS-05", "BS-21", "BS-29"], {
            response::<FindMissingBlobsResponse>(find, |answer| answer.missing_blob_digests.clear())
        }),
        fault("FindMissing takes few digests", &["CAS-07"], {
            exchange::<FindMissingBlobsRequest, FindMissingBlobsResponse>(find, |asked, answer| {
                match asked.blob_digests.len() {
                    0..=10_000 => answer,
                    _ => Err(Status::resource_exhausted("too many digests")),
                }
            })
        }),
        fault("FindMissing skips a malformed digest", &["CAS-06"], {
            request::<FindMissingBlobsRequest>(find, |asked| {
                asked.blob_digests.retain(|digest| digest.hash.len() == 64);
            })
        }),
    ]
}

fn batch_update() -> Vec<Fault> {
    let update = "BatchUpdateBlobs";
    vec![
        fault("BatchUpdate has no answer for the last blob", &["CAS-09"], {
            response::<BatchUpdateBlobsResponse>(update, |answer| drop(answer.responses.pop()))
        }),
        fault("BatchUpdate answers without digests", &["CAS-09"], {
            response::<BatchUpdateBlobsResponse>(update, |answer| {
                answer.responses.iter_mut().for_each(|response| response.digest = None);
            })
        }),
        fault("BatchUpdate fails as a whole", &["CAS-10", "CAS-11"], {
            exchange::<BatchUpdateBlobsRequest, BatchUpdateBlobsResponse>(update, |_, answer| {
                let answer = answer?;
                whole_call_fails(answer.responses.iter().map(|response| response.status.clone()))?;
                Ok(answer)
            })
        }),
        fault("BatchUpdate says OK to everything", &["CAS-10", "CAS-11", "CAS-14", "CAP-13", "GEN-04"], {
            response::<BatchUpdateBlobsResponse>(update, |answer| {
                answer.responses.iter_mut().for_each(|response| response.status = Some(Default::default()));
            })
        }),
        fault("BatchUpdate has ALREADY_EXISTS for what is stored", &["CAS-12"], {
            let seen = Mutex::new(HashSet::new());
            response::<BatchUpdateBlobsResponse>(update, move |answer| {
                for response in &mut answer.responses {
                    let hash = response.digest.as_ref().map(|digest| digest.hash.clone());
                    if !seen.lock().unwrap().insert(hash) {
                        response.status = Some(rpc::Status { code: 6, ..Default::default() });
                    }
                }
            })
        }),
        fault("BatchUpdate forgets what it stored", &["CAS-13"], {
            request::<BatchUpdateBlobsRequest>(update, |asked| {
                for request in &mut asked.requests {
                    request.data.clear();
                    request.digest =
                        Some(gorego_reapi::digest::DigestFunction::Sha256.digest(&request.data).to_wire());
                }
            })
        }),
        fault("BatchUpdate has no limit", &["CAS-15"], {
            exchange::<BatchUpdateBlobsRequest, BatchUpdateBlobsResponse>(update, |asked, answer| {
                let stored = |request: &gorego_reapi::proto::reapi::batch_update_blobs_request::Request| {
                    gorego_reapi::proto::reapi::batch_update_blobs_response::Response {
                        digest: request.digest.clone(),
                        status: Some(Default::default()),
                    }
                };
                answer.or_else(|_| {
                    Ok(BatchUpdateBlobsResponse { responses: asked.requests.iter().map(stored).collect() })
                })
            })
        }),
        fault("BatchUpdate takes half of what it promises", &["CAS-15", "CAP-10"], {
            exchange::<BatchUpdateBlobsRequest, BatchUpdateBlobsResponse>(update, |asked, answer| {
                let bytes: usize = asked.requests.iter().map(|request| request.data.len()).sum();
                match bytes {
                    0..=2_000_000 => answer,
                    _ => Err(Status::invalid_argument("too much")),
                }
            })
        }),
    ]
}

fn batch_read() -> Vec<Fault> {
    let read = "BatchReadBlobs";
    vec![
        fault("BatchRead leaves out what is absent", &["CAS-17"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                answer.responses.retain(|response| response.status.as_ref().is_none_or(|s| s.code == 0));
            })
        }),
        fault("BatchRead fails as a whole", &["CAS-17"], {
            exchange::<BatchReadBlobsRequest, BatchReadBlobsResponse>(read, |_, answer| {
                let answer = answer?;
                whole_call_fails(answer.responses.iter().map(|response| response.status.clone()))?;
                Ok(answer)
            })
        }),
        fault("a missing blob is an internal error", &["CAS-17"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                for status in answer.responses.iter_mut().filter_map(|response| response.status.as_mut()) {
                    status.code = if status.code == 5 { 13 } else { status.code };
                }
            })
        }),
        fault("BatchRead answers without digests", &["CAS-18"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                answer.responses.iter_mut().for_each(|response| response.digest = None);
            })
        }),
        fault("BatchRead leaves out the status of what is there", &["CAS-19"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                for response in &mut answer.responses {
                    response.status = response.status.take().filter(|status| status.code != 0);
                }
            })
        }),
        fault("BatchRead calls plain data compressed", &["CAS-20"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                answer.responses.iter_mut().for_each(|response| response.compressor = 3);
            })
        }),
        fault("BatchRead has no limit", &["CAS-21"], {
            exchange::<BatchReadBlobsRequest, BatchReadBlobsResponse>(read, |asked, answer| {
                let absent =
                    |digest: &Digest| gorego_reapi::proto::reapi::batch_read_blobs_response::Response {
                        digest: Some(digest.clone()),
                        status: Some(rpc::Status { code: 5, ..Default::default() }),
                        ..Default::default()
                    };
                answer.or_else(|_| {
                    Ok(BatchReadBlobsResponse { responses: asked.digests.iter().map(absent).collect() })
                })
            })
        }),
        fault("BatchRead gives less than half of what it promises", &["CAS-21"], {
            exchange::<BatchReadBlobsRequest, BatchReadBlobsResponse>(read, |asked, answer| {
                let bytes: i64 = asked.digests.iter().map(|digest| digest.size_bytes).sum();
                if bytes > 1_500_000 { Err(Status::invalid_argument("too much")) } else { answer }
            })
        }),
        fault("BatchRead flips a byte", &["CAS-22"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                for response in &mut answer.responses {
                    let mut data = response.data.to_vec();
                    if let Some(byte) = data.first_mut() {
                        *byte ^= 1;
                    }
                    response.data = data.into();
                }
            })
        }),
        fault("BatchRead takes malformed digests for absent ones", &["CAS-23"], {
            response::<BatchReadBlobsResponse>(read, |answer| {
                for status in answer.responses.iter_mut().filter_map(|response| response.status.as_mut()) {
                    status.code = if status.code == 3 { 5 } else { status.code };
                }
            })
        }),
    ]
}

fn get_tree() -> Vec<Fault> {
    let only_first = |messages: Messages| messages.take(1).boxed();
    vec![
        fault("GetTree leaves out the last Directory", &["CAS-24"], {
            pages(|page| {
                if page.next_page_token.is_empty() {
                    page.directories.pop();
                }
            })
        }),
        fault("GetTree gives children first", &["CAS-25"], pages(|page| page.directories.reverse())),
        fault("GetTree knows no absent root", &["CAS-26"], {
            failure("GetTree", |status| match status.code() {
                Code::NotFound => Ok(Some(GetTreeResponse::default().encode_to_vec().into())),
                _ => Err(status),
            })
        }),
        fault("GetTree fails when a Directory is missing", &["CAS-26"], {
            // A missing directory is found only by following the references.
            messages("GetTree", |messages| {
                let checked = messages.try_collect::<Vec<_>>();
                let whole = stream::once(async move {
                    let pages = checked.await?;
                    let mut present = HashSet::new();
                    let mut named = Vec::new();
                    for page in &pages {
                        for directory in super::change::decode::<GetTreeResponse>(page.clone())?.directories {
                            let digest = gorego_reapi::digest::DigestFunction::Sha256
                                .digest(&directory.encode_to_vec());
                            present.insert(digest.to_wire().hash);
                            named.extend(directory.directories.into_iter().filter_map(|node| node.digest));
                        }
                    }
                    if named.iter().any(|digest| !present.contains(&digest.hash)) {
                        return Err(Status::not_found("a Directory is missing"));
                    }
                    Ok(stream::iter(pages.into_iter().map(Ok)))
                });
                whole.try_flatten().boxed()
            })
        }),
        fault("GetTree stops after a page", &["CAS-27", "CAS-24"], messages("GetTree", only_first)),
        fault("GetTree pays no heed to page_size", &["CAS-27"], {
            request::<GetTreeRequest>("GetTree", |asked| asked.page_size = 0)
        }),
        fault("GetTree starts again for every token", &["CAS-28"], {
            request::<GetTreeRequest>("GetTree", |asked| asked.page_token.clear())
        }),
        fault("GetTree takes a negative page for a default one", &["CAS-28"], {
            request::<GetTreeRequest>("GetTree", |asked| asked.page_size = asked.page_size.max(0))
        }),
        fault("GetTree takes what is no Directory for an internal error", &["CAS-29"], {
            code("GetTree", Code::InvalidArgument, Code::Internal)
        }),
    ]
}

fn chunks() -> Vec<Fault> {
    let (split, splice) = ("SplitBlob", "SpliceBlob");
    vec![
        fault("SplitBlob leaves out the last chunk", &["CAS-30"], {
            response::<SplitBlobResponse>(split, |answer| drop(answer.chunk_digests.pop()))
        }),
        fault("SplitBlob gives chunks in another order", &["CAS-30"], {
            response::<SplitBlobResponse>(split, |answer| answer.chunk_digests.reverse())
        }),
        fault("SplitBlob does not cut at all", &["CAS-34"], {
            exchange::<SplitBlobRequest, SplitBlobResponse>(split, |asked, answer| {
                let chunk_digests = asked.blob_digest.iter().cloned().collect();
                Ok(SplitBlobResponse { chunk_digests, ..answer? })
            })
        }),
        fault("SplitBlob names chunks that are not there", &["CAS-31"], {
            response::<SplitBlobResponse>(split, |answer| {
                for digest in &mut answer.chunk_digests {
                    digest.hash = digest.hash.chars().rev().collect();
                }
            })
        }),
        fault("SplitBlob fails on an unknown blob as on a bug", &["CAS-32"], {
            code(split, Code::NotFound, Code::Internal)
        }),
        fault("SplitBlob does not say how it cut", &["CAS-33"], {
            response::<SplitBlobResponse>(split, |answer| answer.chunking_function = 0)
        }),
        fault("SplitBlob wants to be told how to cut", &["CAS-33"], {
            exchange::<SplitBlobRequest, SplitBlobResponse>(split, |asked, answer| {
                match asked.chunking_function {
                    0 => Err(Status::invalid_argument("chunking_function is not set")),
                    _ => answer,
                }
            })
        }),
        fault("SpliceBlob believes what it is told", &["CAS-35", "CAS-36"], {
            exchange::<SpliceBlobRequest, SpliceBlobResponse>(splice, |asked, _| {
                Ok(SpliceBlobResponse { blob_digest: asked.blob_digest.clone() })
            })
        }),
        fault("SpliceBlob fails on a missing chunk as on a bug", &["CAS-36"], {
            code(splice, Code::NotFound, Code::Internal)
        }),
        fault("SpliceBlob does not name the blob", &["CAS-37"], {
            response::<SpliceBlobResponse>(splice, |answer| answer.blob_digest = None)
        }),
        fault("SpliceBlob refuses what exists", &["CAS-38"], {
            let seen = Mutex::new(HashSet::new());
            exchange::<SpliceBlobRequest, SpliceBlobResponse>(splice, move |asked, answer| {
                let hash = asked.blob_digest.as_ref().map(|digest| digest.hash.clone());
                match answer {
                    Ok(_) if !seen.lock().unwrap().insert(hash) => Err(Status::already_exists("stored")),
                    answer => answer,
                }
            })
        }),
    ]
}
