//! Compression at rest with the real binary: both kinds of clients, what the server reports, and kills at any moment.

use crate::{
    admin::gorego,
    support::{Client, Server, eventually, files_below, sha256},
};
use gorego_reapi::{digest::Digest, proto::bytestream::ReadRequest};
use std::time::{Duration, Instant};

const AT_ONCE: &[(&str, &str)] = &[("CACHE__COMPRESS_AFTER", "0s"), ("CACHE__COMPRESS_CPU_PERCENT", "100")];

fn text(size: usize, seed: usize) -> Vec<u8> {
    (0..size).map(|n| b"some words and some more"[(n * n / 7 + n / 100 * seed) % 24]).collect()
}

/// Reads a part of a blob, with or without zstd.
async fn read(client: &Client, blob: Digest, zstd: bool, offset: usize) -> Vec<u8> {
    let name =
        if zstd { blob.blob_name().replace("blobs/", "compressed-blobs/zstd/") } else { blob.blob_name() };
    let request = ReadRequest { resource_name: name, read_offset: offset as i64, read_limit: 0 };
    let bytes = client.read_request(request).await.unwrap();
    if zstd { zstd::decode_all(&bytes[..]).unwrap() } else { bytes }
}

async fn check(client: &Client, plain: &[u8]) {
    for zstd in [false, true] {
        for offset in [0, 1, 262_144, plain.len() - 10] {
            assert!(read(client, sha256(plain), zstd, offset).await == plain[offset..], "{zstd} {offset}");
        }
    }
    let limited =
        ReadRequest { resource_name: sha256(plain).blob_name(), read_offset: 300_000, read_limit: 5_000 };
    assert_eq!(client.read_request(limited).await.unwrap(), plain[300_000..305_000]);
}

fn is_packed(server: &Server, blob: Digest) -> bool {
    let hash = blob.hash_hex();
    let of_blob = |path: &&std::path::PathBuf| path.to_string_lossy().contains(&hash);
    let files = files_below(server.store());
    let files: Vec<_> = files.iter().filter(of_blob).collect();
    files.len() == 1 && files[0].to_string_lossy().contains("/v1/packed/")
}

/// CAS-22, BS-12. This holds before and after a crash, and in a server that does not compress.
#[tokio::test]
async fn every_client_reads_what_is_kept_compressed_and_the_server_says_what_it_saves() {
    let server = Server::with(AT_ONCE).await;
    let client = server.client().await;
    let plain = text(2_000_000, 1);
    let blob = client.upload(plain.clone()).await;
    eventually("it is compressed", || is_packed(&server, blob)).await;
    check(&client, &plain).await;
    eventually("it is logged", || server.log().iter().any(|line| line["event"] == "blobs_compressed")).await;
    let stats = gorego(&server, &["store", "stats"]).await;
    let said = String::from_utf8(stats.stdout).unwrap();
    assert!(said.contains("compressed     1 blobs of 2 MB"), "{said}");
    drop(client);
    let server = Server::on(server.kill().await, &[("CACHE__COMPRESS", "off")]).await;
    let client = server.client().await;
    assert!(client.missing(&[blob]).await.is_empty());
    check(&client, &plain).await;
    assert!(is_packed(&server, blob));
}

/// The CPU time that the compressing thread has used so far.
fn cpu_time(server: &Server) -> Option<Duration> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let mut packer = tasks.filter(|task| read(task.path().join("comm")).trim() == "store-packer");
    let times = read(packer.next()?.path().join("schedstat"));
    Some(Duration::from_nanos(times.split(' ').next()?.parse().ok()?))
}

#[tokio::test]
async fn compression_takes_no_more_than_its_share_of_a_core() {
    let share = [("CACHE__COMPRESS_AFTER", "0s"), ("CACHE__COMPRESS_CPU_PERCENT", "5")];
    let server = Server::with(&share).await;
    let client = server.client().await;
    let blobs: Vec<_> = (0..30).map(|seed| text(1_500_000, seed)).collect();
    for blob in &blobs {
        client.upload(blob.clone()).await;
    }
    // In its first second the thread finds an empty index.
    eventually("it works", || cpu_time(&server).is_some_and(|time| time > Duration::from_millis(20))).await;
    let (before, start) = (cpu_time(&server).unwrap(), Instant::now());
    eventually("some time passes", || start.elapsed() > Duration::from_secs(3)).await;
    let (used, passed) = (cpu_time(&server).unwrap() - before, start.elapsed());
    assert!(used < passed / 20 + Duration::from_millis(100), "{used:?} of {passed:?}");
    assert!(!blobs.iter().all(|blob| is_packed(&server, sha256(blob))), "there was more to do");
}

/// Every acknowledged blob is stored and intact after each kill, whether the kill came before, during or after its
/// compression.
#[tokio::test]
async fn a_kill_at_any_moment_loses_nothing() {
    let mut server = Server::with(AT_ONCE).await;
    let mut stored: Vec<Vec<u8>> = vec![];
    for round in 0..10u64 {
        let client = server.client().await;
        for number in 0..4 {
            let plain = text(1_500_000, 1 + stored.len() * 7 + number);
            client.upload(plain.clone()).await;
            stored.push(plain);
        }
        // Passes start a second apart, and compressing all blobs takes less than that.
        tokio::time::sleep(Duration::from_millis(137 * round)).await;
        drop(client);
        server = Server::on(server.kill().await, AT_ONCE).await;
        let client = server.client().await;
        let digests: Vec<Digest> = stored.iter().map(|plain| sha256(plain)).collect();
        assert!(client.missing(&digests).await.is_empty(), "round {round}");
        for (number, plain) in stored.iter().enumerate() {
            assert!(
                read(&client, sha256(plain), number % 2 == 0, 0).await == *plain,
                "round {round}, {number}"
            );
        }
    }
    let is_there = |plain: &Vec<u8>| is_packed(&server, sha256(plain));
    eventually("all of it is compressed", || stored.iter().all(is_there)).await;
}
