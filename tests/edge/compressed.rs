//! zstd on the wire: ByteStream, batches, and gRPC's own message compression.

use crate::harness::{Server, digest, query, read, write};
use crate::support::eventually_async;
use gorego_reapi::proto::{
    bytestream::WriteRequest,
    reapi::{
        self, BatchReadBlobsRequest, BatchUpdateBlobsRequest, FindMissingBlobsRequest,
        batch_update_blobs_request, compressor::Value as Compressor,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, codec::CompressionEncoding};
use uuid::Uuid;

fn text(size: usize) -> Vec<u8> {
    let mut state = size as u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b"a build tool"[(state >> 24) as usize % 12]
    };
    std::iter::repeat_with(next).take(size).collect()
}

fn pack(plain: &[u8]) -> Vec<u8> {
    zstd::encode_all(plain, 3).unwrap()
}

fn path(digest: &reapi::Digest) -> String {
    format!("compressed-blobs/zstd/{}/{}", digest.hash, digest.size_bytes)
}

fn upload_name(digest: &reapi::Digest) -> String {
    format!("uploads/{}/{}", Uuid::new_v4(), path(digest))
}

/// A compressed upload in pieces; `from` is the offset in the blob at which it starts (BS-27).
fn pieces(name: &str, stream: &[u8], from: usize, size: usize) -> Vec<WriteRequest> {
    let chunks = stream.chunks(size).enumerate();
    chunks
        .map(|(n, data)| WriteRequest {
            resource_name: if n == 0 { name.into() } else { String::new() },
            write_offset: (from + n * size) as i64,
            finish_write: (n + 1) * size >= stream.len(),
            data: data.to_vec().into(),
        })
        .collect()
}

/// BS-07, BS-11 to BS-15, BS-25, BS-27, CAP-12: blobs are written and read in both encodings.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_compressed_or_not_is_read_compressed_or_not() {
    let server = Server::start().await;
    for (size, piece) in [(1usize, 1), (70_000, 1), (70_001, 9_000), (5_000_000, 300_000)] {
        let plain = text(size);
        let digest = digest(&plain);
        let mut stream = pack(&plain[..size / 2]);
        stream.extend(pack(&plain[size / 2..]));
        let piece = piece.max(stream.len() / 20_000);
        let committed = write(&server, pieces(&upload_name(&digest), &stream, 0, piece)).await.unwrap();
        assert_eq!(committed, stream.len() as i64);
        assert_eq!(read(&server, &crate::harness::path(&digest), 0, 0).await.unwrap().concat(), plain);
        for _ in 0..3 {
            for offset in [0, size / 3, size] {
                let messages = read(&server, &path(&digest), offset as i64, 0).await.unwrap();
                assert_eq!(zstd::decode_all(&messages.concat()[..]).unwrap(), plain[offset..]);
                for (at, message) in messages.iter().enumerate() {
                    assert!(!message.is_empty() && message.len() <= 2 << 20);
                    assert!(message.len() >= 16 << 10 || at + 1 == messages.len());
                }
            }
        }
        for (offset, limit, code) in [
            (0, 1, Code::InvalidArgument),
            (0, -1, Code::InvalidArgument),
            (size as i64 + 1, 0, Code::OutOfRange),
            (-1, 0, Code::OutOfRange),
        ] {
            assert_eq!(read(&server, &path(&digest), offset, limit).await.unwrap_err().code(), code);
        }
    }
    let absent = read(&server, &path(&digest(b"absent")), 0, 0).await.unwrap_err();
    assert_eq!(absent.code(), Code::NotFound);
}

/// BS-24, BS-30: a blob that was stored before, one that is stored meanwhile, and the empty blob.
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_upload_that_ends_early_answers_minus_one() {
    let server = Server::start().await;
    let plain = text(4_000_000);
    let (digest, stream) = (digest(&plain), pack(&plain));
    let name = upload_name(&digest);
    let (stalled, messages) = mpsc::channel(1);
    stalled.send(pieces(&name, &stream, 0, stream.len() / 2 + 1).remove(0)).await.unwrap();
    let mut client = server.bytes.clone();
    let waiting = tokio::spawn(async move { client.write(ReceiverStream::new(messages)).await });
    eventually_async("the first upload has begun", || async { query(&server, &name).await.0 > 0 }).await;
    write(&server, pieces(&upload_name(&digest), &stream, 0, 100_000)).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().into_inner().committed_size, -1);
    drop(stalled);
    assert_eq!(write(&server, pieces(&name, &stream, 0, 100)).await.unwrap(), -1);
    let empty = crate::harness::digest(b"");
    assert_eq!(write(&server, pieces(&upload_name(&empty), &pack(b""), 0, 100)).await.unwrap(), -1);
    assert_eq!(read(&server, &path(&empty), 0, 0).await.unwrap().len(), 1);
}

/// BS-20, BS-31, BS-33: the behaviour of Bazel after a broken upload.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_compressed_upload_is_resumed_at_an_offset_of_the_blob() {
    let server = Server::start().await;
    let plain: Vec<u8> = text(2_000_000);
    let (digest, stream) = (digest(&plain), pack(&plain));
    let name = upload_name(&digest);
    assert_eq!(query(&server, &name).await, (0, false));
    let mut half = pieces(&name, &stream, 0, stream.len() / 2 + 1);
    half.truncate(1);
    assert_eq!(write(&server, half).await.unwrap_err().code(), Code::InvalidArgument);
    eventually_async("the rest is put away", || async { query(&server, &name).await.0 > 0 }).await;
    let (committed, complete) = query(&server, &name).await;
    assert!(!complete && committed < 2_000_000);
    let rest = pack(&plain[committed as usize..]);
    let answer = write(&server, pieces(&name, &rest, committed as usize, 50_000)).await.unwrap();
    assert_eq!(answer, committed + rest.len() as i64);
    assert_eq!(query(&server, &name).await, (2_000_000, true));
    assert_eq!(read(&server, &crate::harness::path(&digest), 0, 0).await.unwrap().concat(), plain);
}

/// BS-04, BS-26.
#[tokio::test(flavor = "multi_thread")]
async fn broken_streams_and_other_compressors_are_refused_and_never_look_like_a_miss() {
    let server = Server::start().await;
    let plain = text(300_000);
    let (digest, stream) = (digest(&plain), pack(&plain));
    let mut trailing = stream.clone();
    trailing.extend(b"trailing");
    for (case, stream) in [
        ("plain", plain.clone()),
        ("cut", stream[..stream.len() - 3].to_vec()),
        ("trailing", trailing),
        ("bomb", pack(&vec![0; 100_000_000])),
        ("another blob", pack(&text(300_001))),
    ] {
        let status = write(&server, pieces(&upload_name(&digest), &stream, 0, 65_536)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status}");
        assert_eq!(server.missing(std::slice::from_ref(&digest)).await.len(), 1, "{case}");
    }
    server.store(&[&plain]).await;
    for other in ["deflate", "brotli", "identity", "lzma", "ZSTD"] {
        let name = path(&digest).replace("zstd", other);
        assert_eq!(read(&server, &name, 0, 0).await.unwrap_err().code(), Code::InvalidArgument, "{other}");
        let name = format!("uploads/{}/{name}", Uuid::new_v4());
        let status = write(&server, pieces(&name, &stream, 0, 100_000)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{other}");
    }
}

/// CAS-14, CAS-15, CAS-20, CAP-13: the requests of the Go SDK and moon.
#[tokio::test(flavor = "multi_thread")]
async fn batches_are_compressed_for_those_who_ask_for_it() {
    let server = Server::start().await;
    let plains: Vec<Vec<u8>> = (0..3).map(|n| text(2_000_000 + n)).collect();
    let item = |plain: &Vec<u8>, data: Vec<u8>, compressor| batch_update_blobs_request::Request {
        digest: Some(digest(plain)),
        data: data.into(),
        compressor,
    };
    let zstd = Compressor::Zstd as i32;
    let mut requests: Vec<_> = plains.iter().map(|plain| item(plain, pack(plain), zstd)).collect();
    requests.push(item(&text(10), pack(&text(11)), zstd));
    requests.push(item(&text(12), pack(&text(12)), Compressor::Deflate as i32));
    let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
    let answer = server.cas.clone().batch_update_blobs(request).await.unwrap().into_inner();
    let codes: Vec<_> = answer.responses.iter().map(|r| r.status.as_ref().unwrap().code).collect();
    let invalid = Code::InvalidArgument as i32;
    assert_eq!(
        codes,
        [0, 0, 0, invalid, invalid],
        "the blobs come to more than a batch may have, the wire does not"
    );

    for (acceptable, expected) in [(vec![], 0), (vec![zstd], zstd), (vec![Compressor::Brotli as i32], 0)] {
        let digests = vec![digest(&plains[0]), digest(b"absent")];
        let request =
            BatchReadBlobsRequest { digests, acceptable_compressors: acceptable, ..Default::default() };
        let answer = server.cas.clone().batch_read_blobs(request).await.unwrap().into_inner();
        let [read, absent] = &answer.responses[..] else { panic!("{answer:?}") };
        assert_eq!(read.compressor, expected);
        let data =
            if expected == zstd { zstd::decode_all(&read.data[..]).unwrap() } else { read.data.to_vec() };
        assert_eq!(data, plains[0]);
        assert_eq!(absent.status.as_ref().unwrap().code, Code::NotFound as i32);
    }
}

/// GEN-24 and similar rules for messages that gRPC itself has compressed.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_grpc_has_compressed_are_understood() {
    let server = Server::start().await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        let request =
            FindMissingBlobsRequest { blob_digests: vec![digest(b"x"); 1_000], ..Default::default() };
        let mut client = server.cas.clone().send_compressed(encoding).accept_compressed(encoding);
        let answer = client.find_missing_blobs(request).await.unwrap().into_inner();
        assert_eq!(answer.missing_blob_digests, [digest(b"x")]);
        let plain = text(100_000);
        let name = format!("uploads/{}/{}", Uuid::new_v4(), crate::harness::path(&digest(&plain)));
        let mut client = server.bytes.clone().send_compressed(encoding);
        let answer = client.write(tokio_stream::iter(pieces(&name, &plain, 0, 30_000))).await.unwrap();
        assert_eq!(answer.into_inner().committed_size, 100_000);
    }
}
