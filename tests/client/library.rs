//! The client library: executions that survive a bad server, transfers, and headers.

use crate::fake::*;
use gorego::grpc::services::capabilities_server as caps;
use gorego_client::{
    BlobSet, Client, ConnectOptions, Execution, ExecutionEvent, Finished, Identity, Job, Progress, scan,
};
use gorego_reapi::{
    digest::Digest,
    error::Error,
    proto::reapi::{self, execution_stage::Value as Stage},
};
use prost::Message;
use std::{
    collections::VecDeque,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::time::timeout;
use tonic::{Request, Status};

fn job() -> Job {
    Job { action: Digest::empty(SHA256), skip_cache_lookup: false, priority: 0 }
}

async fn follow(mut execution: Execution) -> Result<(Vec<Stage>, Finished), Error> {
    let mut stages = Vec::new();
    loop {
        match execution.next().await?.expect("an end") {
            ExecutionEvent::Stage(stage) => stages.push(stage),
            ExecutionEvent::Logs(names) => panic!("the server offers no streams: {names:?}"),
            ExecutionEvent::Waiting(status) => panic!("no script says why it waits: {status:?}"),
            ExecutionEvent::Finished(finished) => {
                assert_eq!(execution.next().await, Ok(None));
                return Ok((stages, *finished));
            }
        }
    }
}

/// EXE-10, EXE-12, EXE-13: broken streams are resumed, and a forgotten operation is run again.
#[tokio::test]
async fn an_execution_survives_broken_streams_and_a_server_that_forgot() {
    let fake = Fake::default();
    let client = fake.client().await;
    fake.state().scripts = VecDeque::from([
        (vec![stage(Stage::Queued), stage(Stage::Queued)], Some(Status::unavailable("going down"))),
        (vec![stage(Stage::Executing)], None),
        (vec![], Some(Status::not_found("unknown operation"))),
        (vec![stage(Stage::Queued), done(&success(3))], None),
    ]);
    let (stages, finished) = follow(client.execute(job())).await.unwrap();
    assert_eq!(stages, [Stage::Queued, Stage::Executing, Stage::Queued]);
    assert_eq!(finished.result.unwrap().exit_code, 3);
    assert_eq!(fake.state().calls, ["Execute", "WaitExecution", "WaitExecution", "Execute"]);
}

#[tokio::test]
async fn an_execution_gives_up_on_a_server_that_never_gets_on() {
    let fake = Fake::default();
    let client = fake.client().await;
    for ending in [None, Some(Status::unavailable("down")), Some(Status::not_found("unknown"))] {
        // Many more than will be requested.
        fake.state().scripts = vec![(vec![stage(Stage::Queued)], ending); 50].into();
        follow(client.execute(job())).await.unwrap_err();
        assert!(!fake.state().scripts.is_empty());
    }
    fake.state().calls.clear();
    fake.state().scripts = vec![(vec![], Some(Status::invalid_argument("no arguments")))].into();
    let error = follow(client.execute(job())).await.unwrap_err();
    assert_eq!(error, Error::Invalid("Execute: no arguments".into()));
    assert_eq!(fake.state().calls, ["Execute"], "a refusal is not tried again");
}

#[tokio::test]
async fn a_server_that_dies_during_a_run_is_named_with_the_reason() {
    let endpoint = dying_server().await;
    let client = Client::connect(&endpoint, "", &Identity::default()).await.unwrap();
    let error = follow(client.execute(job())).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    let error = error.to_string();
    for part in [&*endpoint, "does not answer any more", "refused"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
}

/// A server that begins to answer and falls silent, and reads nothing.
#[tokio::test]
async fn a_server_that_falls_silent_is_given_up() {
    const LONG: Duration = Duration::from_secs(3600);
    let mut blobs = BlobSet::default();
    let digest = blobs.add_bytes(vec![0; 20 << 20]);
    let endpoint = silent_server(digest).await;
    let client = Client::connect(&endpoint, "", &Identity::default()).await.unwrap();
    tokio::time::pause();
    let answer = timeout(LONG, client.action_result(digest)).await.expect("a limit for an answer");
    assert!(matches!(answer, Err(Error::DeadlineExceeded(_))), "{answer:?}");
    let end = timeout(LONG, follow(client.execute(job()))).await.expect("a limit for the first message");
    assert!(matches!(end, Err(Error::Unavailable(_))), "{end:?}");
    // A thread reads the blob, so the clock does not advance by itself.
    let progress = progress();
    let mut upload = pin!(client.upload(&blobs, &progress));
    let end = Instant::now() + Duration::from_secs(30);
    let uploaded = loop {
        tokio::select! {
            biased;
            uploaded = &mut upload => break uploaded,
            () = tokio::time::advance(Duration::from_millis(100)) => {}
        }
        assert!(Instant::now() < end, "there is a limit for an upload");
    };
    assert!(matches!(uploaded, Err(Error::Unavailable(_))), "{uploaded:?}");
}

fn progress() -> Arc<Progress> {
    Arc::default()
}

/// A result with everything below `dir` as the output directory "out", stored on the fake server.
fn as_output(fake: &Fake, dir: &std::path::Path) -> reapi::ActionResult {
    let mut blobs = BlobSet::default();
    let root = scan(dir, &mut blobs).unwrap();
    let directory = |digest: &Digest| match blobs.get(digest) {
        Some(gorego_client::Source::Bytes(bytes)) => Some(reapi::Directory::decode(bytes.clone()).unwrap()),
        _ => None,
    };
    let children = blobs.digests().filter(|digest| *digest != root).filter_map(|digest| directory(&digest));
    let tree = reapi::Tree { root: directory(&root), children: children.collect() };
    let tree_digest = Some(fake.store(&tree.encode_to_vec()));
    let output = reapi::OutputDirectory { path: "out".into(), tree_digest, ..Default::default() };
    reapi::ActionResult { output_directories: vec![output], ..Default::default() }
}

#[tokio::test]
async fn a_directory_goes_up_and_comes_back_as_it_was() {
    let (fake, dir, out) = (Fake::default(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let large: Vec<u8> = (0..600_000u32).map(|n| (n % 251) as u8).collect();
    fs::create_dir_all(dir.path().join("a/empty")).unwrap();
    fs::write(dir.path().join("a/large"), &large).unwrap();
    fs::write(dir.path().join("a/nothing"), "").unwrap();
    for n in 0..40 {
        fs::write(dir.path().join(format!("f{n}")), format!("{n}").repeat(1_000)).unwrap();
    }
    fs::set_permissions(dir.path().join("f7"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../elsewhere", dir.path().join("link")).unwrap();

    let client = fake.client().await;
    let mut blobs = BlobSet::default();
    scan(dir.path(), &mut blobs).unwrap();
    let up = progress();
    let (count, bytes) = client.upload(&blobs, &up).await.unwrap();
    assert_eq!(count, blobs.digests().filter(|digest| !digest.is_empty()).count());
    assert_eq!(up.bytes(), (bytes, bytes));
    let calls = std::mem::take(&mut fake.state().calls);
    assert_eq!(calls.iter().filter(|call| **call == "Write").count(), 1, "only the large one: {calls:?}");
    assert!(calls.len() < 20, "small blobs travel together: {calls:?}");
    assert_eq!(client.upload(&blobs, &progress()).await.unwrap(), (0, 0), "and only once");

    // The stream of the large file breaks and is resumed where it stopped.
    let result = as_output(&fake, dir.path());
    fake.state().break_read_after = Some(1);
    let down = progress();
    client.download_outputs(&result, out.path(), &down).await.unwrap();
    let copy = out.path().join("out");
    assert_eq!(fs::read(copy.join("a/large")).unwrap(), large);
    assert_eq!(down.bytes().0, down.bytes().1);
    let (mut before, mut after) = (BlobSet::default(), BlobSet::default());
    assert_eq!(scan(dir.path(), &mut before).unwrap(), scan(&copy, &mut after).unwrap());
}

#[tokio::test]
async fn equal_large_files_are_fetched_once() {
    let (fake, out) = (Fake::default(), tempfile::tempdir().unwrap());
    let client = fake.client().await;
    let content = vec![1; 100_000];
    let digest = Some(fake.store(&content));
    let file = |path: &str, is_executable| reapi::OutputFile {
        path: path.into(),
        digest: digest.clone(),
        is_executable,
        ..Default::default()
    };
    let output_files = vec![file("a", false), file("b", true), file("d/c", false)];
    let result = reapi::ActionResult { output_files, ..Default::default() };
    let progress = progress();
    client.download_outputs(&result, out.path(), &progress).await.unwrap();
    for path in ["a", "b", "d/c"] {
        assert_eq!(fs::read(out.path().join(path)).unwrap(), content);
    }
    let mode = |path: &str| fs::metadata(out.path().join(path)).unwrap().permissions().mode();
    assert_eq!([mode("a") & 0o100, mode("b") & 0o100], [0, 0o100]);
    assert_eq!(fake.state().calls, ["Read"]);
    assert_eq!(progress.bytes(), (100_000, 100_000));
}

#[tokio::test]
async fn a_small_blob_that_is_unavailable_for_a_moment_is_asked_for_again() {
    let (fake, out) = (Fake::default(), tempfile::tempdir().unwrap());
    let client = fake.client().await;
    let file =
        reapi::OutputFile { path: "f".into(), digest: Some(fake.store(b"small")), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
    fake.state().unavailable_blobs = 1;
    client.download_outputs(&result, out.path(), &progress()).await.unwrap();
    assert_eq!(fs::read(out.path().join("f")).unwrap(), b"small");
}

#[tokio::test]
async fn wrong_bytes_are_noticed_and_not_kept() {
    let (fake, out) = (Fake::default(), tempfile::tempdir().unwrap());
    let client = fake.client().await;
    let small = fake.store(b"small");
    let large = fake.store(&vec![1; 100_000]);
    fake.state().corrupt = true;
    fake.state().blobs.insert(digest(Some(&large)), vec![2; 100_000].into());
    for digest in [small, large] {
        let file = reapi::OutputFile { path: "f".into(), digest: Some(digest), ..Default::default() };
        let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
        let error = client.download_outputs(&result, out.path(), &progress()).await.unwrap_err();
        assert!(matches!(error, Error::DataLoss(_)), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn headers_and_those_of_a_credential_helper_are_sent_with_every_request() {
    let incoming = tonic::transport::server::TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let note = move |request: Request<()>| {
        let text = |name| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        noted.lock().unwrap().push((text("authorization"), text("x-helper")));
        Ok(request)
    };
    let server = tonic::transport::Server::builder()
        .add_service(caps::CapabilitiesServer::with_interceptor(Fake::default(), note));
    tokio::spawn(server.serve_with_incoming(incoming));
    let directory = tempfile::tempdir().unwrap();
    let helper = directory.path().join("helper");
    // Written by another process: see the unit tests of credentials.
    let answer = r#"{"headers": {"x-helper": ["h"], "authorization": ["of the helper"]}}"#;
    let script = format!("#!/bin/sh\necho '{answer}'\n");
    let mut write = std::process::Command::new("sh");
    write.args(["-c", r#"printf %s "$1" >"$0" && chmod 755 "$0""#]).arg(&helper).arg(script);
    assert!(write.status().unwrap().success());
    let mut options = ConnectOptions::from(format!("grpc://{address}"));
    options.add_header("Authorization", "Bearer t").unwrap();
    options.credential_helper = Some(helper);
    let client = Client::connect(options, "", &Identity::default()).await.unwrap();
    client.capabilities().await.unwrap();
    let expected = (Some("Bearer t".to_owned()), Some("h".to_owned()));
    assert_eq!(*seen.lock().unwrap(), [expected.clone(), expected]);
}
