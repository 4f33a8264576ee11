//! The ByteStream service over the wire.

use crate::harness::{MAX_BLOB_BYTES, Server, absent, digest, path, query, read, write};
use crate::support::{PATIENCE, eventually_async};
use futures::future::join_all;
use gorego_client::stubs::ByteStreamClient;
use gorego_reapi::proto::{
    bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest},
    reapi,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use uuid::Uuid;

fn upload_name(instance: &str, digest: &reapi::Digest) -> String {
    format!("{instance}uploads/{}/{}", Uuid::new_v4(), path(digest))
}

fn message(name: &str, offset: usize, data: &[u8], finish: bool) -> WriteRequest {
    WriteRequest {
        resource_name: name.into(),
        write_offset: offset as i64,
        finish_write: finish,
        data: data.to_vec().into(),
    }
}

/// An upload of `data` in pieces, from an offset to the end.
fn pieces(name: &str, data: &[u8], from: usize, size: usize) -> Vec<WriteRequest> {
    let mut offset = from;
    let mut messages = Vec::new();
    loop {
        let end = (offset + size).min(data.len());
        messages.push(message(name, offset, &data[offset..end], end == data.len()));
        offset = end;
        if end == data.len() {
            return messages;
        }
    }
}

async fn is_missing(server: &Server, digest: &reapi::Digest) -> bool {
    !server.missing(std::slice::from_ref(digest)).await.is_empty()
}

fn blob(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n % 251) as u8).collect()
}

/// The answers wait for the client's window, which it can enlarge only if the server reads from it. The reads use two
/// connections, because windows cut frames into pieces, and the client's h2 ends a connection at about 100 small ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_small_window_gets_all_that_it_reads_at_once() {
    let server = Server::start().await;
    let data = blob(10_000);
    server.store(&[&data]).await;
    let address = format!("http://{}", server.endpoint.address);
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap();
    let channel = channel.initial_connection_window_size(65_535);
    let channels = [channel.connect().await.unwrap(), channel.connect().await.unwrap()];
    let reads = (0..100).map(|n| {
        let mut bytes = ByteStreamClient::new(channels[n % 2].clone());
        let name = path(&digest(&data));
        async move {
            let request = ReadRequest { resource_name: name, ..Default::default() };
            let mut stream = bytes.read(request).await.expect("the read begins").into_inner();
            let mut size = 0;
            while let Some(message) = stream.message().await.unwrap() {
                size += message.data.len();
            }
            size
        }
    });
    let sizes = tokio::time::timeout(PATIENCE, join_all(reads)).await.unwrap();
    assert!(sizes.iter().all(|size| *size == data.len()));
}

/// BS-02, BS-07, BS-14, BS-15, BS-23, BS-30, GEN-12.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_read_in_pieces_of_a_good_size() {
    let server = Server::start().await;
    for instance in ["", "a/b/c/"] {
        for (size, piece) in [(0, 1), (1, 1), (1000, 7), (16 * 1024 + 1, 4096), (5_000_000, 1_000_000)] {
            let data = blob(size);
            let digest = digest(&data);
            let name = format!("{}/some/file.o", upload_name(instance, &digest));
            assert_eq!(write(&server, pieces(&name, &data, 0, piece)).await.unwrap(), size as i64);
            let messages = read(&server, &format!("{instance}{}", path(&digest)), 0, 0).await.unwrap();
            assert_eq!(messages.concat(), data);
            for (at, message) in messages.iter().enumerate() {
                assert!(!message.is_empty() && message.len() <= 2 * 1024 * 1024);
                assert!(message.len() >= 16 * 1024 || at + 1 == messages.len());
            }
        }
    }
}

/// BS-07, BS-08, BS-09, BS-10, GEN-04, GEN-07.
#[tokio::test(flavor = "multi_thread")]
async fn reads_keep_to_their_range() {
    let server = Server::start().await;
    let data = blob(300_000);
    let name = path(&digest(&data));
    write(&server, pieces(&upload_name("", &digest(&data)), &data, 0, 100_000)).await.unwrap();
    for (offset, limit) in [(0, 1), (1, 0), (299_999, 5), (131_071, 131_073), (300_000, 0), (0, 300_000)] {
        let end = if limit == 0 { data.len() } else { data.len().min(offset + limit) };
        let messages = read(&server, &name, offset as i64, limit as i64).await.unwrap();
        assert_eq!(messages.concat(), data[offset..end], "{offset} {limit}");
    }
    for (offset, limit, code) in
        [(300_001, 0, Code::OutOfRange), (-1, 0, Code::OutOfRange), (0, -1, Code::InvalidArgument)]
    {
        assert_eq!(read(&server, &name, offset, limit).await.unwrap_err().code(), code);
    }
    let larger = reapi::Digest { size_bytes: 300_001, ..digest(&data) };
    let zero = reapi::Digest { hash: "0".repeat(64), size_bytes: 0 };
    for absent in [absent(0).to_wire(), larger, zero] {
        assert_eq!(read(&server, &path(&absent), 0, 0).await.unwrap_err().code(), Code::NotFound);
    }
}

/// GEN-12 requires no leading slash, but moon sends one if the instance name is empty (docs/clients.md).
#[tokio::test(flavor = "multi_thread")]
async fn a_slash_before_the_keyword_is_the_empty_instance_name() {
    let server = Server::start().await;
    let data = blob(300_000);
    let name = format!("/{}", upload_name("", &digest(&data)));
    write(&server, pieces(&name, &data, 0, 100_000)).await.unwrap();
    let messages = read(&server, &format!("/{}", path(&digest(&data))), 0, 0).await.unwrap();
    assert_eq!(messages.concat(), data);
}

/// BS-04, BS-05: no other form of name is mistaken for a missing blob.
#[tokio::test(flavor = "multi_thread")]
async fn names_of_any_other_shape_are_refused_by_all_three() {
    let server = Server::start().await;
    let hash = digest(b"x").hash;
    for tail in
        ["", "blobs", "blobs/x/1", &format!("blobs/{hash}/x"), &format!("compressed-blobs/lz4/{hash}/1")]
    {
        assert_eq!(read(&server, tail, 0, 0).await.unwrap_err().code(), Code::InvalidArgument, "{tail}");
        let name = format!("uploads/{}/{tail}", Uuid::new_v4());
        let status = write(&server, vec![message(&name, 0, b"x", true)]).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}");
        let request = QueryWriteStatusRequest { resource_name: name };
        let status = server.bytes.clone().query_write_status(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    assert_eq!(write(&server, vec![]).await.unwrap_err().code(), Code::InvalidArgument);
}

/// BS-20, BS-21, BS-31, BS-32: Bazel queries and resumes; other clients start again under the same name.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_upload_goes_on_where_it_stopped_or_starts_over() {
    let server = Server::start().await;
    for start_over in [false, true] {
        let data = blob(1_000_000 + usize::from(start_over));
        let digest = digest(&data);
        let name = upload_name("", &digest);
        assert_eq!(query(&server, &name).await, (0, false));
        let half = vec![message(&name, 0, &data[..500_000], false)];
        let status = write(&server, half).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "closed without finish_write");
        assert!(is_missing(&server, &digest).await);
        let (committed, complete) = query(&server, &name).await;
        assert!(!complete);
        assert_eq!(committed, 500_000);
        let from = if start_over { 0 } else { committed as usize };
        assert_eq!(write(&server, pieces(&name, &data, from, 300_000)).await.unwrap(), data.len() as i64);
        assert_eq!(query(&server, &name).await, (data.len() as i64, true));
        assert_eq!(read(&server, &path(&digest), 0, 0).await.unwrap().concat(), data);
    }
}

/// BS-18, BS-19, BS-21, BS-22, CAP-15: the upload is refused, and nothing of it is visible.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_do_not_keep_to_the_rules_store_nothing() {
    let server = Server::start().await;
    let data = blob(100_000);
    let digest = digest(&data);
    let name = upload_name("", &digest);
    let other = upload_name("", &absent(0).to_wire());
    let (half, rest) = data.split_at(50_000);
    let mut flipped = data.clone();
    flipped[70_000] ^= 1;
    for (case, messages) in [
        ("gap", vec![message(&name, 0, half, false), message(&name, 50_001, rest, true)]),
        ("overlap", vec![message(&name, 0, half, false), message(&name, 0, &data, true)]),
        ("changed name", vec![message(&name, 0, half, false), message(&other, 50_000, rest, true)]),
        ("no name", vec![message("", 0, &data, true)]),
        ("flipped bit", vec![message(&name, 0, &flipped, true)]),
        ("short", vec![message(&name, 0, half, true)]),
        ("long", vec![message(&name, 0, &data, false), message(&name, 100_000, b"x", true)]),
        ("after finish", vec![message(&name, 0, &data, true), message(&name, 100_000, b"", false)]),
        ("not where it stands", vec![message(&name, 70_000, &data[70_000..], true)]),
    ] {
        let status = write(&server, messages).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{case}: {status}");
        assert!(is_missing(&server, &digest).await, "{case}");
    }
    let huge = reapi::Digest { size_bytes: MAX_BLOB_BYTES as i64 + 1, ..digest };
    let status = write(&server, vec![message(&upload_name("", &huge), 0, b"x", false)]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("max_blob_size_gb"), "{status}");
}

/// BS-24: also while this upload sends nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_a_blob_that_is_stored_ends_early_and_well() {
    let server = Server::start().await;
    let data = blob(1_000_000);
    let digest = digest(&data);
    let (stalled, messages) = mpsc::channel(1);
    let name = upload_name("", &digest);
    stalled.send(message(&name, 0, &data[..10], false)).await.unwrap();
    let mut client = server.bytes.clone();
    let waiting = tokio::spawn(async move { client.write(ReceiverStream::new(messages)).await });
    // The first upload has begun now, so the store must end it early.
    eventually_async("the first upload has begun", || async { query(&server, &name).await.0 == 10 }).await;
    write(&server, pieces(&upload_name("", &digest), &data, 0, 100_000)).await.unwrap();
    let answer = waiting.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.committed_size, 1_000_000);
    drop(stalled);

    let early = vec![message(&upload_name("", &digest), 0, &data[..10], false)];
    assert_eq!(write(&server, early).await.unwrap(), 1_000_000);
}

/// BS-06, BS-28.
#[tokio::test(flavor = "multi_thread")]
async fn simultaneous_uploads_of_one_blob_all_succeed() {
    let server = Server::start().await;
    let data = blob(400_000);
    let digest = digest(&data);
    let uploads = (0..32).map(|n| {
        let messages = pieces(&upload_name("", &digest), &data, 0, 10_000 + n * 1000);
        write(&server, messages)
    });
    for answer in futures::future::join_all(uploads).await {
        assert_eq!(answer.unwrap(), 400_000);
    }
    assert_eq!(read(&server, &path(&digest), 0, 0).await.unwrap().concat(), data);

    let same_uuid = Uuid::new_v4();
    let (first, second) = (blob(1000), blob(1001));
    for data in [&first, &second] {
        let name = format!("uploads/{same_uuid}/{}", path(&crate::harness::digest(data)));
        assert_eq!(write(&server, pieces(&name, data, 0, 300)).await.unwrap(), data.len() as i64);
    }
}
