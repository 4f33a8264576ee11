//! Start, shutdown and crash of the process.

use crate::execution::running;
use crate::support::{
    Client, PATIENCE, Server, command, empty, eventually, eventually_async, metadata, sh, sh_with, sha256,
    shared_dir,
};
use gorego_client::stubs::LogStreamServiceClient;
use gorego_reapi::proto::{
    bytestream::{ReadRequest, WriteRequest, WriteResponse},
    logstream::CreateLogStreamRequest,
};
use std::{
    process::Command,
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::mpsc::Sender, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Running work is finished, new work is refused with a code that clients retry, and the exit is clean.
#[tokio::test]
async fn sigterm_finishes_what_runs_and_exits_zero() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; echo finished", gate.display());
    let action = client.action(sh(&script), empty()).await;
    let mut run = client.start(action).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    server.signal("TERM");
    eventually("stopping is logged", || server.log().iter().any(|e| e["event"] == "server_stopping")).await;
    std::fs::write(&gate, "").unwrap();
    let result = run.finish().await.result.unwrap();
    assert_eq!(result.exit_code, 0);
    drop(client);
    assert_eq!(server.exit().await.code(), Some(0));
    // The result was stored before the exit.
    let server = Server::on(server.shared_store(), &[]).await;
    assert!(server.client().await.cached(action).await.is_some());
}

/// The shutdown waits for a running upload, however slow. It does not wait for idle connections and streams.
#[tokio::test]
async fn sigterm_lets_an_upload_finish_and_waits_for_nothing_else() {
    let names = ("INSTANCE_NAMES", r#"["", "main"]"#);
    let mut server = Server::with(&[("SHUTDOWN_GRACE", "25s"), names]).await;
    let client = server.client().await;
    let channel = Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    let watcher = HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await.unwrap();
    let silent = TcpStream::connect(server.address()).await.unwrap();
    let parent = CreateLogStreamRequest { parent: "main".into() };
    let log = LogStreamServiceClient::new(channel).create_log_stream(parent).await.unwrap().into_inner();
    let line =
        WriteRequest { resource_name: log.write_resource_name, data: "a line".into(), ..Default::default() };
    let (logging, logged) = begin_write(&client, line).await;
    let request = ReadRequest { resource_name: log.name, ..Default::default() };
    let mut reader = client.bytes.clone().read(request).await.unwrap().into_inner();
    reader.message().await.unwrap().unwrap();

    let blob = vec![7u8; 3_000_000];
    let mut messages = messages(&blob, 1 << 18).into_iter();
    let (sender, upload) = begin_write(&client, messages.next().unwrap()).await;
    // The second message is accepted once the first is being processed.
    sender.send(messages.next().unwrap()).await.unwrap();
    server.signal("TERM");
    eventually("stopping is logged", || server.log().iter().any(|e| e["event"] == "server_stopping")).await;
    // The upload takes much longer than idle connections are kept.
    for message in messages {
        tokio::time::sleep(Duration::from_millis(500)).await;
        sender.send(message).await.unwrap();
    }
    assert_eq!(upload.await.unwrap().unwrap().into_inner().committed_size, 3_000_000);
    let finished = Instant::now();
    assert_eq!(server.exit().await.code(), Some(0));
    assert!(finished.elapsed() < Duration::from_secs(10), "{:?}", finished.elapsed());
    assert_eq!(reader.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(logged.await.unwrap().unwrap_err().code(), Code::Unavailable);
    drop((watcher, silent, logging));
    let server = Server::on(server.shared_store(), &[]).await;
    assert_eq!(server.client().await.missing(&[sha256(&blob)]).await, []);
}

type Write = JoinHandle<Result<Response<WriteResponse>, Status>>;

/// A Write that has sent its first message, and a channel for more.
async fn begin_write(client: &Client, first: WriteRequest) -> (Sender<WriteRequest>, Write) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut bytes = client.bytes.clone();
    let write = tokio::spawn(async move { bytes.write(ReceiverStream::new(receiver)).await });
    sender.send(first).await.unwrap();
    (sender, write)
}

#[tokio::test]
async fn a_write_to_a_log_stream_may_be_silent_for_as_long_as_the_stream_is_kept() {
    let server = Server::with(&[("LOG_STREAMS__RETENTION", "3s")]).await;
    let client = server.client().await;
    let channel = Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    let parent = CreateLogStreamRequest::default();
    let log = LogStreamServiceClient::new(channel).create_log_stream(parent).await.unwrap().into_inner();
    let line =
        WriteRequest { resource_name: log.write_resource_name, data: "a line".into(), ..Default::default() };
    let (_logging, logged) = begin_write(&client, line).await;
    let ended = timeout(PATIENCE, logged).await.expect("it ends").unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::DeadlineExceeded);
    assert!(ended.message().contains("nothing for 3s"), "{ended}");
}

/// After the time limit the rest is cancelled. Every stream ends with a status that clients retry.
#[tokio::test]
async fn sigterm_cancels_what_does_not_finish_in_time() {
    let mut server = Server::with(&[("SHUTDOWN_GRACE", "300ms"), ("EXECUTION__CONCURRENCY", "1")]).await;
    let client = server.client().await;
    let mut running_one = client.start(client.action(sh("sleep 7451"), empty()).await).await;
    running_one.until(|operation| metadata(operation).stage == 3).await;
    let queued = client.start(client.action(sh("sleep 7452"), empty()).await).await;
    server.signal("TERM");
    for run in [running_one, queued] {
        let code = retryable_end(run).await;
        assert_eq!(code, Code::Unavailable as i32);
    }
    drop(client);
    assert_eq!(server.exit().await.code(), Some(0));
    eventually("nothing is left running", || !running("sleep 7451")).await;
}

/// Sends SIGTERM and waits for the exit, which must be clean.
async fn exit_time(server: &mut Server) -> Duration {
    server.signal("TERM");
    let asked = Instant::now();
    assert_eq!(server.exit().await.code(), Some(0));
    asked.elapsed()
}

/// The grace period is the default of half a minute.
#[tokio::test]
async fn sigterm_does_not_wait_for_an_action_that_nobody_follows() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let mut run = client.start(client.action(sh("sleep 7455"), empty()).await).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    drop((run, client));
    let took = exit_time(&mut server).await;
    assert!(took < Duration::from_secs(15), "{took:?}");
    eventually("nothing is left running", || !running("sleep 7455")).await;
}

/// A download of which only the first message is read.
async fn stalled_read(client: &Client) -> tonic::Streaming<gorego_reapi::proto::bytestream::ReadResponse> {
    let big: Vec<u8> = (0..16_000_000u32).map(|n| (n % 251) as u8).collect();
    upload(client, &big).await.unwrap();
    let request = ReadRequest { resource_name: sha256(&big).blob_name(), ..Default::default() };
    let mut reader = client.bytes.clone().read(request).await.unwrap().into_inner();
    reader.message().await.unwrap().unwrap();
    reader
}

/// Only progress counts: a download that is not read, and an upload that does not continue, are not waited for.
#[tokio::test]
async fn sigterm_does_not_wait_for_clients_that_do_nothing() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let _reader = stalled_read(&client).await;
    let first = messages(&[7; 3_000_000], 1 << 18).swap_remove(0);
    let (_sender, _upload) = begin_write(&client, first).await;
    let took = exit_time(&mut server).await;
    assert!(took < Duration::from_secs(15), "{took:?}");
}

/// Everything that can delay an exit happens at once.
#[tokio::test]
async fn an_exit_takes_no_longer_than_its_grace() {
    let mut server = Server::with(&[("SHUTDOWN_GRACE", "6s")]).await;
    let client = server.client().await;
    let _reader = stalled_read(&client).await;
    let _silent = TcpStream::connect(server.address()).await.unwrap();
    let mut run =
        client.start(client.action(sh("trap '' TERM; sleep 7456; sleep 7456"), empty()).await).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    let mut messages = messages(&[7; 3_000_000], 1 << 14).into_iter();
    let (sender, _upload) = begin_write(&client, messages.next().unwrap()).await;
    let moving = tokio::spawn(async move {
        for message in messages {
            // The upload is slow, but goes on during the grace period.
            tokio::time::sleep(Duration::from_millis(300)).await;
            if sender.send(message).await.is_err() {
                return;
            }
        }
    });
    let took = exit_time(&mut server).await;
    moving.abort();
    assert!(took < Duration::from_secs(9), "{took:?}");
    assert!(took > Duration::from_secs(4), "the upload that goes on is waited for: {took:?}");
    eventually("nothing is left running", || !running("sleep 7456")).await;
}

/// The code with which a stream ended, in the trailers or inside the last message.
async fn retryable_end(run: crate::support::Run) -> i32 {
    let mut stream = run.0;
    loop {
        match stream.message().await {
            Err(status) => return status.code() as i32,
            Ok(Some(operation)) if operation.done => {
                return crate::support::response(&operation).status.unwrap_or_default().code;
            }
            Ok(Some(_)) => {}
            Ok(None) => panic!("EXE-10: the stream ended OK before done"),
        }
    }
}

/// Programs that replace certificates or log files send SIGHUP at any time.
#[tokio::test]
async fn a_hangup_during_a_shutdown_cuts_nothing_short() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; echo finished", gate.display());
    let mut run = client.start(client.action(sh(&script), empty()).await).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    server.signal("TERM");
    eventually("stopping is logged", || server.log().iter().any(|e| e["event"] == "server_stopping")).await;
    server.signal("HUP");
    eventually("it was heard", || server.log().iter().any(|e| e["event"] == "reload_ignored")).await;
    std::fs::write(&gate, "").unwrap();
    assert_eq!(run.finish().await.result.unwrap().exit_code, 0);
    drop(client);
    assert_eq!(server.exit().await.code(), Some(0));
}

/// The second SIGINT exits immediately.
#[tokio::test]
async fn two_interrupts_end_the_server_at_once() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let mut run = client.start(client.action(sh("sleep 7453"), empty()).await).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    server.signal("INT");
    eventually("stopping is logged", || server.log().iter().any(|e| e["event"] == "server_stopping")).await;
    server.signal("INT");
    assert!(!server.exit().await.success());
    eventually("nothing is left running", || !running("sleep 7453")).await;
}

/// kill -9 during an upload and an action: acknowledged data is there and correct, other data is not visible, the
/// command is gone, the exec directories are removed, and the space of the broken upload is free again.
#[tokio::test]
async fn after_kill_nine_the_store_is_whole() {
    let server = Server::start().await;
    let client = server.client().await;
    let kept: Vec<_> = (0..200).map(|i| format!("blob {i} {}", "x".repeat(i * 37)).into_bytes()).collect();
    let digests = client.upload_all(kept.clone()).await;
    let action = client.action(sh_with("echo kept > f", &["f"]), empty()).await;
    client.run(action).await;
    let mut running_one = client.start(client.action(sh("sleep 7454"), empty()).await).await;
    running_one.until(|operation| metadata(operation).stage == 3).await;
    eventually("the command runs", || running("sleep 7454")).await;
    let big = vec![7u8; 3_000_000];
    let half = WriteRequest {
        resource_name: format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", sha256(&big).blob_name()),
        data: big[..1_500_000].to_vec().into(),
        ..Default::default()
    };
    let (sender, upload) = begin_write(&client, half).await;
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", sha256(&big).blob_name());
    eventually_async("the upload arrives", || async {
        let request =
            gorego_reapi::proto::bytestream::QueryWriteStatusRequest { resource_name: name.clone() };
        let status = client.bytes.clone().query_write_status(request).await.unwrap().into_inner();
        assert!(!status.complete);
        status.committed_size > 0
    })
    .await;
    let store = server.kill().await;
    let _ = upload.await;
    drop(sender);
    eventually("the command died with the server", || !running("sleep 7454")).await;

    let server = Server::on(store, &[]).await;
    let client = server.client().await;
    assert_eq!(client.missing(&digests).await, []);
    for (blob, digest) in kept.iter().zip(&digests) {
        assert_eq!(client.read(*digest).await.unwrap(), *blob);
    }
    assert_eq!(client.missing(&[sha256(&big)]).await, [sha256(&big)], "CAS-05");
    assert!(client.cached(action).await.is_some());
    let left: Vec<_> = crate::support::files_below(server.store())
        .into_iter()
        .filter(|path| path.metadata().is_ok_and(|m| m.len() >= 1_500_000))
        .collect();
    assert_eq!(left, Vec::<std::path::PathBuf>::new(), "half an upload is not kept across a crash");
}

/// Two servers with one directory would remove each other's files.
#[tokio::test]
async fn a_second_server_on_the_same_store_is_refused() {
    let server = Server::start().await;
    let output = command(server.store()).output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains(server.store().to_str().unwrap()), "{message}");
}

/// The error names an invalid directory, or a port that is in use.
#[tokio::test]
async fn a_store_that_cannot_be_written_and_a_port_that_is_taken_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = command(&file.join("store")).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(file.to_str().unwrap()));

    let server = Server::start().await;
    let other = dir.path().join("other");
    let output = Command::new(env!("CARGO_BIN_EXE_gorego"))
        .args(["serve", "--listen-addr", server.address(), "--local-cache-dir"])
        .arg(&other)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains(server.address()));
    assert!(!other.exists(), "a start that fails makes no store");
}

/// Unauthenticated remote execution requires an explicit flag.
#[tokio::test]
async fn a_public_address_is_refused_unless_it_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gorego"))
        .args(["serve", "--listen-addr", "0.0.0.0:0", "--local-cache-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("allow_unauthenticated"));
}

/// Another process fills the disk. Reads succeed, writes fail with a clear error, partial data is never visible, and
/// everything works again when there is space.
#[tokio::test]
async fn a_full_disk_refuses_writes_serves_reads_and_recovers_by_itself() {
    let server = Server::on_a_disk_of(24 << 20).await;
    let client = server.client().await;
    let kept = client.upload("kept").await;
    let cached = client.action(sh_with("echo cached > f", &["f"]), empty()).await;
    client.run(cached).await;
    let big: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n as u8).to_le_bytes()).collect();
    let writes_too_much = client.action(sh_with("head -c 9000000 /dev/zero > f", &["f"]), empty()).await;
    let ballast = server.inside("ballast");
    // As much as fits; the write is supposed to fail.
    let filled = std::fs::write(&ballast, vec![1; 40 << 20]);
    assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);

    let status = upload(&client, &big).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("full"), "{status}");
    assert_eq!(client.missing(&[sha256(&big)]).await, [sha256(&big)]);
    assert_eq!(client.read(kept).await.unwrap(), b"kept");
    let response = client.run(cached).await;
    assert!(response.cached_result, "{response:?}");
    // Whether the command or the server hit the full disk first, the action did not succeed and is not cached.
    let response = client.run(writes_too_much).await;
    let succeeded = response.status.unwrap_or_default().code == 0
        && response.result.is_some_and(|result| result.exit_code == 0);
    assert!(!succeeded);
    assert_eq!(client.cached(writes_too_much).await, None);

    std::fs::remove_file(&ballast).unwrap();
    upload(&client, &big).await.unwrap();
    assert_eq!(client.read(sha256(&big)).await.unwrap(), big);
    assert_eq!(client.run(writes_too_much).await.result.unwrap().exit_code, 0);
}

/// BS-29: the kept bytes of broken uploads hold files open, and must leave descriptors for others. The default limit of
/// a process is 1,024.
#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_broken_uploads_leaves_the_server_reachable() {
    let server = Server::after("ulimit -n 1024").await;
    let client = server.client().await;
    for n in 0..1_200u32 {
        let hash = sha256(&n.to_le_bytes()).hash_hex();
        let resource_name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/blobs/{hash}/4");
        let half = WriteRequest { resource_name, data: vec![0; 2].into(), ..Default::default() };
        let broken = client.bytes.clone().write(tokio_stream::iter([half])).await.unwrap_err();
        assert_eq!(broken.code(), Code::InvalidArgument, "{broken}");
    }
    let another = server.client().await;
    another.upload("still there").await;
}

/// Stores a blob with ByteStream.
pub(crate) async fn upload(client: &Client, blob: &[u8]) -> Result<i64, Status> {
    let reply = client.bytes.clone().write(tokio_stream::iter(messages(blob, 1 << 20))).await?;
    Ok(reply.into_inner().committed_size)
}

/// The messages of one Write.
fn messages(blob: &[u8], chunk: usize) -> Vec<WriteRequest> {
    let name = format!("uploads/6ba7b810-9dad-11d1-80b4-00c04fd430c8/{}", sha256(blob).blob_name());
    blob.chunks(chunk)
        .enumerate()
        .map(|(n, data)| WriteRequest {
            resource_name: name.clone(),
            write_offset: (n * chunk) as i64,
            finish_write: (n + 1) * chunk >= blob.len(),
            data: data.to_vec().into(),
        })
        .collect()
}

/// Each connection is an open file. Commands inherit the limit that was set before the server raised it.
#[tokio::test]
async fn the_server_takes_all_the_open_files_it_may_and_leaves_commands_their_limit() {
    let server = Server::after("ulimit -Sn 300").await;
    let client = server.client().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let [soft, hard] = [3, 4].map(|at| line.split_whitespace().nth(at).unwrap());
    assert_eq!(soft, hard);
    let result = client.run_command(sh("ulimit -Sn; ulimit -Hn")).await;
    assert_eq!(client.stdout(&result).await, format!("300\n{hard}\n"));
}
