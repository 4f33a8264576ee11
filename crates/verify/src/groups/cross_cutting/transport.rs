//! GEN-24 to GEN-30: messages, connections, headers, encodings.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, ensure, equal, fail, inline, only, skipped},
    checks,
    connection::METADATA_HEADER,
    raw,
    session::Session,
    store::{partial_upload, pieces, stalled},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD},
};
use gorego_reapi::proto::reapi::{
    self, BatchUpdateBlobsRequest, Directory, DirectoryNode, FindMissingBlobsRequest, GetCapabilitiesRequest,
    RequestMetadata, ToolDetails, Tree,
};
use http::{HeaderName, HeaderValue};
use prost::Message as _;
use std::time::Duration;
use tonic::{Code, Request, metadata::MetadataMap};

pub(crate) const CHECKS: &[Check] = checks![
    a_batch_of_one_blob_may_have_the_full_size => "GEN-24", "CAP-10", "CAS-15";
    a_batch_of_4000_blobs_may_have_the_full_size => "GEN-24", "CAP-10", "CAS-15";
    one_write_message_may_have_the_full_size => "GEN-24";
    large_blobs_come_in_messages_of_default_size => "GEN-25", "BS-14";
    large_trees_come_in_messages_of_default_size => "GEN-25", "CAS-27";
    pings_on_an_idle_connection_are_tolerated => "GEN-26";
    a_hundred_streams_leave_room_for_a_call => "GEN-27";
    request_metadata_of_any_kind_is_harmless => "GEN-28";
    unknown_fields_are_ignored => "GEN-29";
    directories_made_by_the_server_are_canonical => "GEN-30", "EXE-55";
];

/// Larger batches are sent only with `--large`.
const MODEST_BATCH_BYTES: usize = 16 * 1024 * 1024;
/// Number of concurrent streams that clients expect (GEN-27).
const STREAMS: usize = 100;
/// The time after which they are certainly open.
const STREAMS_OPEN: Duration = Duration::from_millis(500);
/// Time limit of a call while they are open.
const STREAM_PATIENCE: Duration = Duration::from_secs(5);
/// Interval of the pings that a server must tolerate (GEN-26), and how long they are sent. A server with the default of
/// grpc-go, one ping in five minutes, closes the connection at the third.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_WATCH: Duration = Duration::from_secs(35);

fn full_batch(s: &Session) -> Verdict<usize> {
    s.cache()?;
    match s.batch_limit() {
        limit if limit > MODEST_BATCH_BYTES && !s.options().large => {
            Err(skipped(format!("a full batch has {limit} bytes: run with --large")))
        }
        limit => Ok(limit),
    }
}

async fn a_batch_of_one_blob_may_have_the_full_size(s: Session) -> Verdict {
    let blob = s.blob(full_batch(&s)?);
    let answer = s.update(&[&blob]).await.wanted("a batch of exactly the advertised size is accepted")?;
    inline("its only item", only("the batch", answer.responses)?.status.as_ref(), &[Code::Ok])?;
    let read = s.read(&blob.digest).await.needs("BS-07", "it is read back")?;
    ensure(read == blob.data, "the bytes that were uploaded", "others")
}

async fn a_batch_of_4000_blobs_may_have_the_full_size(s: Session) -> Verdict {
    let (limit, count) = (full_batch(&s)?, 4000);
    let mut blobs: Vec<Blob> = (1..count).map(|_| s.blob(limit / count)).collect();
    blobs.push(s.blob(limit - (count - 1) * (limit / count)));
    let all: Vec<&Blob> = blobs.iter().collect();
    let answer = s.update(&all).await.wanted("a batch of 4000 blobs of the advertised size is accepted")?;
    equal("responses", &answer.responses.len(), &count)?;
    for (at, response) in answer.responses.iter().enumerate() {
        inline(&format!("response {at}"), response.status.as_ref(), &[Code::Ok])?;
    }
    Ok(())
}

async fn one_write_message_may_have_the_full_size(s: Session) -> Verdict {
    let blob = s.blob(full_batch(&s)?);
    let messages = pieces(&s.write_name(&blob), &blob.data, 0, blob.data.len());
    let committed = s.write_messages(messages).await;
    let committed = committed.wanted("a WriteRequest with as much data as a batch is accepted")?;
    equal("committed_size", &committed, &blob.digest.size_bytes)
}

async fn large_blobs_come_in_messages_of_default_size(s: Session) -> Verdict {
    let blob = s.blob(10_000_000);
    s.store(&[&blob]).await?;
    // The connection refuses messages above 4 MiB, as clients do.
    let pieces = s.read_pieces(&s.read_name(&blob.digest), 0, 0).await.wanted("10 MB are read")?;
    let largest = pieces.iter().map(bytes::Bytes::len).max().unwrap_or(0);
    ensure(pieces.concat() == blob.data, "the bytes that were uploaded", "others")?;
    ensure(largest < 4 * 1024 * 1024, "messages below 4 MiB", format!("{largest} bytes of data in one"))
}

async fn large_trees_come_in_messages_of_default_size(s: Session) -> Verdict {
    // 250 directories of 20 kB, which would be 5 MB in one message.
    let leaf = |at: usize| {
        let name = |entry: usize| format!("{at:03}-{entry:03}-{}", "n".repeat(120));
        let node = |entry: usize| DirectoryNode { name: name(entry), digest: Some(s.empty().digest) };
        Directory { directories: (0..100).map(node).collect(), ..Default::default() }
    };
    let leaves: Vec<Blob> = (0..250).map(|at| s.message(&leaf(at))).collect();
    let node = |(at, blob): (usize, &Blob)| DirectoryNode {
        name: format!("d{at:03}-{}", s.word()),
        digest: Some(blob.digest.clone()),
    };
    let root = Directory { directories: leaves.iter().enumerate().map(node).collect(), ..Default::default() };
    let root = s.message(&root);
    let mut all: Vec<&Blob> = leaves.iter().collect();
    all.push(&root);
    s.store(&all).await?;
    let pages = s.tree(&root.digest, 0).await.offered("a tree of 5 MB is sent in one call")?;
    let sent: usize = pages.iter().map(|page| page.directories.len()).sum();
    // The root, the leaves and the empty directory.
    ensure(sent >= 252, "252 directories", format!("{sent} directories"))
}

async fn pings_on_an_idle_connection_are_tolerated(s: Session) -> Verdict {
    if !s.options().large {
        return Err(skipped(format!("watches a connection for {PING_WATCH:?}: run with --large")));
    }
    let s = s.reconnect_pinging(PING_INTERVAL).await?;
    s.missing(&[]).await.needs("CAS-02", "FindMissingBlobs answers")?;
    tokio::time::sleep(PING_WATCH).await;
    s.missing(&[]).await.wanted("the connection lives after three pings")?;
    Ok(())
}

async fn a_hundred_streams_leave_room_for_a_call(s: Session) -> Verdict {
    let s = s.reconnect().await?;
    let upload = |_| {
        let (s, blob) = (s.clone(), s.blob(1000));
        let messages = partial_upload(&s.write_name(&blob), &blob.data, 500);
        tokio::spawn(async move { s.byte_stream().write(stalled(messages)).await.map(drop) })
    };
    let uploads: Vec<_> = (0..STREAMS - 1).map(upload).collect();
    let blob = s.blob(100);
    // The uploads start first: the call should be made while their streams are open.
    tokio::time::sleep(STREAMS_OPEN).await;
    let work = async {
        let missing = s.missing(std::slice::from_ref(&blob.digest)).await;
        missing.wanted(&format!("FindMissingBlobs answers beside {} uploads", STREAMS - 1))
    };
    let answer = tokio::time::timeout(STREAM_PATIENCE, work).await;
    let refused = uploads.iter().filter(|upload| upload.is_finished()).count();
    uploads.iter().for_each(tokio::task::JoinHandle::abort);
    match answer {
        Ok(answer) => drop(answer?),
        Err(_) => {
            let expected = format!("an answer within {STREAM_PATIENCE:?} beside {} uploads", STREAMS - 1);
            return Err(fail(expected, "none"));
        }
    }
    ensure(refused == 0, format!("{} uploads go on", STREAMS - 1), format!("{refused} ended"))
}

async fn request_metadata_of_any_kind_is_harmless(s: Session) -> Verdict {
    let tool = ToolDetails { tool_name: "gorego verify".into(), tool_version: "1".into() };
    let valid =
        RequestMetadata { tool_details: Some(tool), tool_invocation_id: s.word(), ..Default::default() };
    let mut newer = valid.encode_to_vec();
    newer.extend_from_slice(&unknown_field());
    // 7 bytes, whose base64 may or may not be padded.
    let noise = [0xff, 0xfe, 0xfd, 0x00, 0x7f, 0x80, 0x81];
    let request = FindMissingBlobsRequest { instance_name: s.instance(), ..Default::default() };
    for (what, value) in [
        ("no metadata", None),
        ("valid metadata", Some(STANDARD_NO_PAD.encode(valid.encode_to_vec()))),
        ("metadata with unknown fields", Some(STANDARD.encode(newer))),
        ("padded noise", Some(STANDARD.encode(noise))),
        ("unpadded noise", Some(STANDARD_NO_PAD.encode(noise))),
        ("empty metadata", Some(String::new())),
    ] {
        let mut headers = http::HeaderMap::new();
        if let Some(value) = value {
            let value = HeaderValue::from_str(&value).map_err(|error| fail("a header", error))?;
            headers.insert(HeaderName::from_static(METADATA_HEADER), value);
        }
        let mut raw = Request::new(request.encode_to_vec().into());
        *raw.metadata_mut() = MetadataMap::from_headers(headers);
        raw.set_timeout(s.options().check_limit());
        let answer = raw::call_on(s.channel(), raw::path::FIND_MISSING, raw).await;
        answer.wanted(&format!("FindMissingBlobs answers with {what}"))?;
    }
    Ok(())
}

/// An unknown field: number 15000, a string.
fn unknown_field() -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::string::encode(15_000, &"from the future".to_owned(), &mut bytes);
    bytes
}

async fn unknown_fields_are_ignored(s: Session) -> Verdict {
    let blob = s.blob(100);
    let asked = vec![blob.digest.clone()];
    let update = BatchUpdateBlobsRequest {
        instance_name: s.instance(),
        requests: vec![s.item(&blob)],
        digest_function: s.function_number(),
    };
    let find = FindMissingBlobsRequest {
        instance_name: s.instance(),
        blob_digests: asked.clone(),
        digest_function: s.function_number(),
    };
    let read = reapi::BatchReadBlobsRequest {
        instance_name: s.instance(),
        digests: asked,
        digest_function: s.function_number(),
        ..Default::default()
    };
    let capabilities = GetCapabilitiesRequest { instance_name: s.instance() };
    for (path, request) in [
        (raw::path::GET_CAPABILITIES, capabilities.encode_to_vec()),
        (raw::path::BATCH_UPDATE, update.encode_to_vec()),
        (raw::path::FIND_MISSING, find.encode_to_vec()),
        (raw::path::BATCH_READ, read.encode_to_vec()),
    ] {
        let mut newer = request;
        newer.extend_from_slice(&unknown_field());
        let answer = raw::call(s.service(), path, Request::new(newer.into())).await;
        answer.wanted(&format!("{path} answers a request with an unknown field"))?;
    }
    let mut newer = s.result_of(&s.unknown()).encode_to_vec();
    newer.extend_from_slice(&unknown_field());
    let answer = raw::call(s.service(), raw::path::GET_ACTION_RESULT, Request::new(newer.into())).await;
    answer.refused("a miss, with an unknown field", &[Code::NotFound])?;
    let read = s.read(&blob.digest).await.wanted("the blob that came with an unknown field is stored")?;
    ensure(read == blob.data, "its bytes", "others")
}

async fn directories_made_by_the_server_are_canonical(s: Session) -> Verdict {
    s.runs_actions().await?;
    let script = "mkdir -p d/b d/a/z && echo 1 > d/b/x && echo 2 > d/a/z/y && ln -s b d/l && chmod +x d/b/x";
    let result = s.run_command(&s.shell(script, &["d"])).await?;
    let digest = result.output_directories.first().and_then(|directory| directory.tree_digest.as_ref());
    let digest =
        digest.ok_or_else(|| fail("an output directory with a tree_digest", format!("{result:?}")))?;
    let bytes = s.read(digest).await.needs("EXE-54", "the Tree is read")?;
    let tree = Tree::decode(bytes.clone()).map_err(|error| fail("the Tree is a Tree", error))?;
    // This library writes fields in the order of their numbers, omits defaults, and drops unknown fields.
    let again = tree.encode_to_vec();
    ensure(
        bytes == again,
        "the same bytes when encoded again",
        format!("{} and {} bytes", bytes.len(), again.len()),
    )?;
    equal("children", &tree.children.len(), &3)
}
