//! Faults of the storage that show on the wire and that no other file tests: few descriptors, slow links, streams that
//! break, and restarts with too much in the store. `docs/faults.md` lists all faults with their tests.

use crate::lifecycle::upload;
use crate::support::{Client, Server, directory, file, sh, sh_with, sha256};
use futures::future::join_all;
use gorego_reapi::{
    digest::Digest,
    proto::{
        bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest},
        reapi::ExecuteResponse,
    },
};
use std::time::{Duration, Instant};
use tonic::{Code, Request};

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let block = |n: u64| sha256(&[seed.to_le_bytes(), n.to_le_bytes()].concat()).hash().to_vec();
    (0..).flat_map(block).take(bytes).collect()
}

/// An action with many inputs that no other action has, and with many outputs. Returns the text that it must print.
async fn action_of_many_files(client: &Client, number: usize, files: usize) -> (Digest, String) {
    let inputs = (0..files).map(|at| format!("input {number} {at}").into_bytes());
    let digests = client.upload_all(inputs).await;
    let nodes = digests.iter().enumerate().map(|(at, digest)| file(&format!("i{at:05}"), *digest)).collect();
    let root = client.upload(directory(nodes, vec![], vec![])).await;
    let script =
        format!("mkdir -p o; for i in i*; do cp $i o/$i; cp $i p-$i; done; ls p-* | wc -l; echo {number}");
    let paths: Vec<String> = (0..files).map(|at| format!("p-i{at:05}")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).chain(["o"]).collect();
    (client.action(sh_with(&script, &paths), root).await, format!("{files}\n{number}\n"))
}

/// With 256 descriptors, actions with more inputs and outputs than that run side by side, and none waits for another.
#[tokio::test(flavor = "multi_thread")]
async fn actions_with_more_files_than_descriptors_run_side_by_side() {
    const ACTIONS: usize = 6;
    const FILES: usize = 600;
    let server = Server::after("ulimit -n 256; export GOREGO_EXECUTION__CONCURRENCY=4").await;
    let client = server.client().await;
    let mut actions = Vec::new();
    for number in 0..ACTIONS {
        actions.push(action_of_many_files(&client, number, FILES).await);
    }
    let responses: Vec<ExecuteResponse> =
        join_all(actions.iter().map(|(action, _)| client.run(*action))).await;
    for ((_, printed), response) in actions.iter().zip(responses) {
        let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
        assert_eq!(result.exit_code, 0, "{}", client.stderr(&result).await);
        assert_eq!(client.stdout(&result).await, *printed);
        assert_eq!((result.output_files.len(), result.output_directories.len()), (FILES, 1));
        assert_eq!(
            client.output(&result, "p-i00599").await,
            format!("input {} 599", printed.lines().nth(1).unwrap())
        );
    }
}

/// The inputs contain one file so often that they are larger than the whole disk. The error is returned once, with both
/// sizes, and other actions run.
#[tokio::test]
async fn an_action_whose_inputs_no_disk_can_hold_is_refused_with_both_sizes() {
    let server = Server::on_a_disk_of(48 << 20).await;
    let client = server.client().await;
    let content = vec![7; 4 << 20];
    upload(&client, &content).await.unwrap();
    let content = sha256(&content);
    let nodes = (0..25).map(|at| file(&format!("f{at}"), content)).collect();
    let root = client.upload(directory(nodes, vec![], vec![])).await;
    let status = client.run(client.action(sh("true"), root).await).await.status.unwrap();
    assert_eq!(status.code, Code::FailedPrecondition as i32, "{}", status.message);
    for part in ["104 MB", "50.3 MB", "execution.build_root"] {
        assert!(status.message.contains(part), "{}", status.message);
    }
    let requeued = server.log().iter().filter(|line| line["event"] == "operation_requeued").count();
    assert_eq!(requeued, 0, "it can never fit");
    let result = client.run_command(sh("echo well")).await;
    assert_eq!(client.stdout(&result).await, "well\n");
}

/// BS-20: a blob over a link that is too slow for the deadline of a call. Each attempt continues where the last one
/// ended.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_over_a_slow_link_whose_calls_time_out_is_resumed_to_its_end() {
    const PIECE: usize = 64 << 10;
    let server = Server::start().await;
    let client = server.client().await;
    let blob = noise(4 << 20, 1);
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", sha256(&blob).blob_name());
    let (mut tries, mut sent) = (0, 0);
    loop {
        let query = QueryWriteStatusRequest { resource_name: name.clone() };
        let status = client.bytes.clone().query_write_status(query).await.unwrap().into_inner();
        if status.complete {
            break;
        }
        tries += 1;
        assert!(tries < 100, "it never ends");
        let (sender, messages) = tokio::sync::mpsc::channel(1);
        let (mut request, start) =
            (Request::new(tokio_stream::wrappers::ReceiverStream::new(messages)), status.committed_size);
        request.set_timeout(Duration::from_millis(400));
        let mut bytes = client.bytes.clone();
        let call = tokio::spawn(async move { bytes.write(request).await });
        let mut at = start as usize;
        for data in blob[at..].chunks(PIECE) {
            let message = WriteRequest {
                resource_name: name.clone(),
                write_offset: at as i64,
                finish_write: at + data.len() == blob.len(),
                data: data.to_vec().into(),
            };
            // This limits the bytes per second of the link.
            tokio::time::sleep(Duration::from_millis(20)).await;
            if sender.send(message).await.is_err() {
                break;
            }
            at += data.len();
            sent += data.len();
        }
        drop(sender);
        if let Err(status) = call.await.unwrap() {
            let is_late = [Code::DeadlineExceeded, Code::Cancelled].contains(&status.code());
            assert!(is_late, "{status}");
        }
    }
    assert!(tries > 2, "one try was enough: {tries}");
    assert!(sent < 2 * blob.len(), "{sent} bytes were sent in {tries} tries");
    assert_eq!(client.read(sha256(&blob)).await.unwrap(), blob);
}

/// BS-07, BS-08: clients continue where a stream has ended; no byte is missing or doubled.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_breaks_off_goes_on_at_its_offset() {
    let server = Server::start().await;
    let client = server.client().await;
    for blob in [noise(5_000_001, 1), vec![7; 5_000_001]] {
        upload(&client, &blob).await.unwrap();
        let (mut read, mut tries) = (Vec::new(), 0);
        while read.len() < blob.len() {
            tries += 1;
            let request = ReadRequest {
                resource_name: sha256(&blob).blob_name(),
                read_offset: read.len() as i64,
                read_limit: 0,
            };
            let mut stream = client.bytes.clone().read(request).await.unwrap().into_inner();
            // The connection breaks after the second message.
            for _ in 0..2 {
                if let Some(message) = stream.message().await.unwrap() {
                    read.extend_from_slice(&message.data);
                }
            }
        }
        assert!(tries > 1);
        assert!(read == blob, "{} bytes in {tries} tries", read.len());
    }
}

/// A store that is far beyond its limit after a restart answers at once, and is brought within its limit meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_most_of_the_store_to_evict_answers_at_once() {
    const BLOBS: u64 = 6_000;
    let blob = |n: u64| [&n.to_le_bytes()[..], &[1; 4_000]].concat();
    let leases = [("CACHE__BUILD_LEASE", "0s"), ("CACHE__UNNAMED_BUILD_LEASE", "0s")];
    // The first store has segments, and the second has a file for each blob.
    for (large, small) in [("400 MB", "12 MB"), ("200 MB", "12 MB")] {
        let server = Server::with(&[("MAX_SIZE_GB", large), leases[0], leases[1]]).await;
        let client = server.client().await;
        for first in (0..BLOBS).step_by(500) {
            client.upload_all((first..first + 500).map(blob)).await;
        }
        let store = server.kill().await;
        let started = Instant::now();
        let server = Server::on(store, &[("MAX_SIZE_GB", small), leases[0], leases[1]]).await;
        let client = server.client().await;
        let all: Vec<Digest> = (0..BLOBS).map(|n| sha256(&blob(n))).collect();
        let missing = client.missing(&all).await;
        println!("{large} to {small}: answered after {:?}", started.elapsed());
        assert!(missing.len() as u64 > BLOBS / 2, "{} are missing", missing.len());
        // All blobs were stored within a second or two, and uses are recorded in seconds, so any of them may have been
        // evicted.
        let kept = (0..BLOBS).find(|n| !missing.contains(&all[*n as usize])).unwrap();
        assert_eq!(client.read(all[kept as usize]).await.unwrap(), blob(kept));
        client.upload(vec![3; 100_000]).await;
    }
}
