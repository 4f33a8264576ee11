//! The client and `gorego exec` with a small server that misbehaves on purpose.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use gorego::grpc::services::{
    byte_stream_server as bs, capabilities_server as caps, content_addressable_storage_server as cas,
    execution_server as exec, operations_server as ops,
};
use gorego_client::{
    BlobSet, Client, ConnectOptions, Execution, ExecutionEvent, Finished, Identity, Job, Progress, scan,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Error,
    find_missing::{FindMissingBlobsRequest, FindMissingBlobsResponse},
    proto::{
        bytestream,
        longrunning::{self, Operation, operation},
        reapi::{self, execution_stage::Value as Stage},
        rpc,
    },
};
use prost::Message;
use std::{
    collections::{HashMap, VecDeque},
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    sync::{Arc, Mutex},
};
use tonic::{Code, Request, Response, Status, Streaming};

const SHA256: DigestFunction = DigestFunction::Sha256;
const NAME: &str = "operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
/// A small limit, so that even a modest file is transferred by ByteStream.
const BATCH_BYTES: u64 = 20_000;

/// The script for the next call of Execute or WaitExecution: messages, and how the stream ends.
type Script = (Vec<Operation>, Option<Status>);

#[derive(Default)]
struct State {
    blobs: HashMap<Digest, Bytes>,
    calls: Vec<&'static str>,
    scripts: VecDeque<Script>,
    /// Reads end once with UNAVAILABLE after this many bytes.
    break_read_after: Option<usize>,
    /// Blobs for which wrong bytes are returned.
    corrupt: bool,
    /// Whether streams stay open after their script.
    hang: bool,
    /// Log streams by name: their bytes, and the error with which they end, if any.
    logs: HashMap<String, (Bytes, Option<Status>)>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn store(&self, bytes: &[u8]) -> reapi::Digest {
        let digest = SHA256.digest(bytes);
        self.state().blobs.insert(digest, Bytes::copy_from_slice(bytes));
        digest.to_wire()
    }

    fn follow(&self, call: &'static str) -> Response<BoxStream<'static, Result<Operation, Status>>> {
        let mut state = self.state();
        state.calls.push(call);
        let (messages, end) = state.scripts.pop_front().expect("no script for this call");
        let script = stream::iter(messages.into_iter().map(Ok).chain(end.map(Err)));
        Response::new(if state.hang { script.chain(stream::pending()).boxed() } else { script.boxed() })
    }

    /// Serves on a free port and returns its endpoint.
    async fn serve(&self) -> String {
        let incoming = tonic::transport::server::TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let endpoint = format!("grpc://{}", incoming.local_addr().unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(caps::CapabilitiesServer::new(self.clone()))
            .add_service(cas::ContentAddressableStorageServer::new(self.clone()))
            .add_service(bs::ByteStreamServer::new(self.clone()))
            .add_service(ops::OperationsServer::new(self.clone()))
            .add_service(exec::ExecutionServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        endpoint
    }

    async fn client(&self) -> Client {
        Client::connect(&self.serve().await, "", &Identity::default()).await.unwrap()
    }
}

fn digest(wire: Option<&reapi::Digest>) -> Digest {
    Digest::from_wire(SHA256, wire, "digest").unwrap()
}

#[tonic::async_trait]
impl caps::Capabilities for Fake {
    async fn get_capabilities(
        &self,
        _: Request<reapi::GetCapabilitiesRequest>,
    ) -> Result<Response<reapi::ServerCapabilities>, Status> {
        let cache = reapi::CacheCapabilities {
            digest_functions: vec![1],
            max_batch_total_size_bytes: BATCH_BYTES as i64,
            ..Default::default()
        };
        Ok(Response::new(reapi::ServerCapabilities { cache_capabilities: Some(cache), ..Default::default() }))
    }
}

#[tonic::async_trait]
impl cas::ContentAddressableStorage for Fake {
    type GetTreeStream = BoxStream<'static, Result<reapi::GetTreeResponse, Status>>;

    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let state = self.state();
        let asked = request.into_inner().blob_digests;
        let mut missing_blob_digests = asked.resolve(DigestFunction::Sha256, "blob_digests").unwrap();
        missing_blob_digests.retain(|digest| !digest.is_empty() && !state.blobs.contains_key(digest));
        Ok(Response::new(FindMissingBlobsResponse { missing_blob_digests }))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<reapi::BatchUpdateBlobsRequest>,
    ) -> Result<Response<reapi::BatchUpdateBlobsResponse>, Status> {
        let mut state = self.state();
        state.calls.push("BatchUpdateBlobs");
        let requests = request.into_inner().requests;
        assert!(requests.iter().map(|r| r.data.len() as u64).sum::<u64>() <= BATCH_BYTES);
        let responses = requests.into_iter().map(|request| {
            assert_eq!(SHA256.digest(&request.data), digest(request.digest.as_ref()));
            state.blobs.insert(digest(request.digest.as_ref()), request.data);
            reapi::batch_update_blobs_response::Response { digest: request.digest, status: None }
        });
        Ok(Response::new(reapi::BatchUpdateBlobsResponse { responses: responses.collect() }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<reapi::BatchReadBlobsRequest>,
    ) -> Result<Response<reapi::BatchReadBlobsResponse>, Status> {
        let state = self.state();
        let responses = request.into_inner().digests.into_iter().map(|wire| {
            let mut data = state.blobs.get(&digest(Some(&wire))).cloned();
            if state.corrupt {
                data = data.map(|data| [&data[1..], b"!"].concat().into());
            }
            let code = if data.is_some() { Code::Ok } else { Code::NotFound };
            reapi::batch_read_blobs_response::Response {
                digest: Some(wire),
                data: data.unwrap_or_default(),
                status: Some(rpc::Status { code: code as i32, ..Default::default() }),
                compressor: 0,
            }
        });
        Ok(Response::new(reapi::BatchReadBlobsResponse { responses: responses.collect() }))
    }

    async fn get_tree(
        &self,
        _: Request<reapi::GetTreeRequest>,
    ) -> Result<Response<Self::GetTreeStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn split_blob(
        &self,
        _: Request<reapi::SplitBlobRequest>,
    ) -> Result<Response<reapi::SplitBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn splice_blob(
        &self,
        _: Request<reapi::SpliceBlobRequest>,
    ) -> Result<Response<reapi::SpliceBlobResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl bs::ByteStream for Fake {
    type ReadStream = BoxStream<'static, Result<bytestream::ReadResponse, Status>>;

    async fn read(
        &self,
        request: Request<bytestream::ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.calls.push("Read");
        if request.resource_name.contains("logstreams") {
            let (bytes, end) = state.logs.get(&request.resource_name).cloned().unwrap_or_default();
            let rest = bytes.slice(usize::try_from(request.read_offset).unwrap()..);
            let pieces: Vec<_> = rest.chunks(2).map(Bytes::copy_from_slice).collect();
            let pieces = pieces.into_iter().map(|data| Ok(bytestream::ReadResponse { data }));
            return Ok(Response::new(stream::iter(pieces.chain(end.map(Err))).boxed()));
        }
        let name = gorego_reapi::resource_name::ResourceName::parse_read(&request.resource_name).unwrap();
        let blob = state.blobs.get(&name.digest).cloned().ok_or_else(|| Status::not_found("no blob"))?;
        let mut rest = blob.slice(usize::try_from(request.read_offset).unwrap()..);
        let end = state.break_read_after.take().map(|after| {
            rest.truncate(after);
            Status::unavailable("broken")
        });
        let chunks: Vec<_> = rest.chunks(7_000).map(Bytes::copy_from_slice).collect();
        let messages = chunks.into_iter().map(|data| Ok(bytestream::ReadResponse { data }));
        Ok(Response::new(stream::iter(messages.chain(end.map(Err))).boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<bytestream::WriteRequest>>,
    ) -> Result<Response<bytestream::WriteResponse>, Status> {
        let mut stream = request.into_inner();
        let (mut name, mut data, mut finished) = (String::new(), Vec::new(), false);
        while let Some(message) = stream.message().await? {
            assert!(!finished && message.write_offset == data.len() as i64);
            name.push_str(&message.resource_name);
            data.extend_from_slice(&message.data);
            finished = message.finish_write;
        }
        let name = gorego_reapi::resource_name::ResourceName::parse_write(&name).unwrap();
        assert!(finished && SHA256.digest(&data) == name.digest);
        let mut state = self.state();
        state.calls.push("Write");
        state.blobs.insert(name.digest, data.into());
        Ok(Response::new(bytestream::WriteResponse { committed_size: name.digest.size() as i64 }))
    }

    async fn query_write_status(
        &self,
        _: Request<bytestream::QueryWriteStatusRequest>,
    ) -> Result<Response<bytestream::QueryWriteStatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl exec::Execution for Fake {
    type ExecuteStream = BoxStream<'static, Result<Operation, Status>>;
    type WaitExecutionStream = BoxStream<'static, Result<Operation, Status>>;

    async fn execute(
        &self,
        _: Request<reapi::ExecuteRequest>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        Ok(self.follow("Execute"))
    }

    async fn wait_execution(
        &self,
        request: Request<reapi::WaitExecutionRequest>,
    ) -> Result<Response<Self::WaitExecutionStream>, Status> {
        assert_eq!(request.into_inner().name, NAME);
        Ok(self.follow("WaitExecution"))
    }
}

#[tonic::async_trait]
impl ops::Operations for Fake {
    async fn cancel_operation(
        &self,
        request: Request<longrunning::CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        assert_eq!(request.into_inner().name, NAME);
        self.state().calls.push("CancelOperation");
        Ok(Response::new(()))
    }

    async fn list_operations(
        &self,
        _: Request<longrunning::ListOperationsRequest>,
    ) -> Result<Response<longrunning::ListOperationsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_operation(
        &self,
        _: Request<longrunning::GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_operation(
        &self,
        _: Request<longrunning::DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn wait_operation(
        &self,
        _: Request<longrunning::WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn any(name: &str, message: &impl Message) -> prost_types::Any {
    let type_url = format!("type.googleapis.com/build.bazel.remote.execution.v2.{name}");
    prost_types::Any { type_url, value: message.encode_to_vec() }
}

fn stage(stage: Stage) -> Operation {
    let metadata = reapi::ExecuteOperationMetadata { stage: stage as i32, ..Default::default() };
    let metadata = Some(any("ExecuteOperationMetadata", &metadata));
    longrunning::Operation { name: NAME.into(), metadata, ..Default::default() }
}

/// A message with the names of the log streams.
fn followable() -> Operation {
    let metadata = reapi::ExecuteOperationMetadata {
        stage: Stage::Executing.into(),
        stdout_stream_name: "logstreams/out".into(),
        stderr_stream_name: "logstreams/err".into(),
        ..Default::default()
    };
    Operation { metadata: Some(any("ExecuteOperationMetadata", &metadata)), ..stage(Stage::Executing) }
}

fn done(response: &reapi::ExecuteResponse) -> Operation {
    let result = Some(operation::Result::Response(any("ExecuteResponse", response)));
    Operation { done: true, result, ..stage(Stage::Completed) }
}

fn success(exit_code: i32) -> reapi::ExecuteResponse {
    let result = reapi::ActionResult { exit_code, ..Default::default() };
    reapi::ExecuteResponse { result: Some(result), ..Default::default() }
}

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

/// Runs the real binary with the fake server.
async fn exec(endpoint: &str, args: &[&str]) -> (i32, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.args(["exec", "--endpoint", endpoint]).args(args);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_prints_what_the_command_printed_and_exits_as_it_did() {
    let (fake, out) = (Fake::default(), tempfile::tempdir().unwrap());
    let endpoint = fake.serve().await;
    let long = "x".repeat(50_000);
    let result = reapi::ActionResult {
        exit_code: 7,
        stdout_raw: Bytes::from_static(b"hello\n"),
        stderr_digest: Some(fake.store(long.as_bytes())),
        output_files: vec![reapi::OutputFile {
            path: "o".into(),
            digest: Some(fake.store(b"made")),
            ..Default::default()
        }],
        ..Default::default()
    };
    let response = reapi::ExecuteResponse { result: Some(result), ..Default::default() };
    fake.state().scripts = vec![(vec![stage(Stage::Executing), done(&response)], None)].into();
    let dir = out.path().to_str().unwrap();
    let args = ["--output", "o", "--output", "p", "--output-dir", dir, "--", "sh", "-c", "exit 7"];
    let (code, stdout, stderr) = exec(&endpoint, &args).await;
    assert_eq!((code, stdout.as_str()), (7, "hello\n"));
    assert_eq!(
        stderr,
        format!("{long}gorego: the command did not create p\n"),
        "silent in a pipe but for this"
    );
    assert_eq!(fs::read(out.path().join("o")).unwrap(), b"made");

    // The uploaded Action can be run and is canonical.
    let blobs = fake.state().blobs.clone();
    let mut commands = blobs.values().filter_map(|blob| reapi::Command::decode(blob.clone()).ok());
    let command = commands.find(|command| command.arguments == ["sh", "-c", "exit 7"]).unwrap();
    assert_eq!(command.output_paths, ["o", "p"]);
    assert_eq!(command.environment_variables[0].value, "/usr/local/bin:/usr/bin:/bin");
}

/// The live part of the output is everything, the beginning, nothing, or something else.
#[tokio::test(flavor = "multi_thread")]
async fn exec_prints_each_byte_once_however_much_of_it_came_live() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let broken = || Some(Status::not_found("the stream was forgotten"));
    let long = "x".repeat(50_000);
    for (raw, live, end, printed) in [
        ("hello\n", "hello\n", None, "hello\n"),
        ("hello\n", "hel", broken(), "hello\n"),
        ("hello\n", "", broken(), "hello\n"),
        ("", "", None, ""),
        (&*long, &long[..20_001], broken(), &*long),
        (&*long, &*long, None, &*long),
        ("hello\n", "help", broken(), "helphello\n"),
        ("hi", "hello\n", None, "hello\nhi"),
        (&*long, "xxy", broken(), &*format!("xxy{long}")),
    ] {
        let mut result = reapi::ActionResult { exit_code: 7, ..Default::default() };
        match raw.len() {
            50_000 => result.stdout_digest = Some(fake.store(raw.as_bytes())),
            _ => result.stdout_raw = Bytes::copy_from_slice(raw.as_bytes()),
        }
        let response = reapi::ExecuteResponse { result: Some(result), ..Default::default() };
        let live = Bytes::copy_from_slice(live.as_bytes());
        fake.state().logs.insert("logstreams/out".into(), (live.clone(), end));
        fake.state().scripts = vec![(vec![followable(), followable(), done(&response)], None)].into();
        let (code, stdout, stderr) = exec(&endpoint, &["sh"]).await;
        assert_eq!((code, stdout.as_str()), (7, printed), "{live:?}");
        assert_eq!(stderr.contains("run again"), stdout != raw, "{stderr}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_tells_infrastructure_failures_from_those_of_the_command() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let failure = |code: Code, message: &str| {
        let status = Some(rpc::Status { code: code as i32, message: message.into(), ..Default::default() });
        reapi::ExecuteResponse { status, ..success(0) }
    };
    let mut late = failure(Code::DeadlineExceeded, "ran longer than 1 s");
    late.result.as_mut().unwrap().stdout_raw = Bytes::from_static(b"so far");
    for (response, code, stdout, stderr) in [
        (success(0), 0, "", ""),
        (success(256), 1, "", ""),
        (success(-1), 255, "", ""),
        (late, 124, "so far", "ran longer than 1 s"),
        (failure(Code::Internal, "disk on fire"), 125, "", "disk on fire"),
    ] {
        fake.state().scripts = vec![(vec![done(&response)], None)].into();
        let got = exec(&endpoint, &["true"]).await;
        assert_eq!((got.0, got.1.as_str()), (code, stdout));
        assert!(got.2.contains(stderr) && got.2.is_empty() == stderr.is_empty(), "{}", got.2);
    }
    assert_eq!(exec("grpc://127.0.0.1:1", &["true"]).await.0, 125);
    assert_eq!(exec(&endpoint, &["--timeout", "soon", "true"]).await.0, 2);
}

/// EXE-22: a blob that was evicted between upload and start is uploaded again, once.
#[tokio::test(flavor = "multi_thread")]
async fn exec_uploads_again_what_the_server_lost_but_not_for_ever() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let lost = SHA256.digest(b"lost");
    let violation = rpc::precondition_failure::Violation {
        r#type: "MISSING".into(),
        subject: lost.blob_name(),
        ..Default::default()
    };
    let details = rpc::PreconditionFailure { violations: vec![violation] };
    let detail = prost_types::Any {
        type_url: "type.googleapis.com/google.rpc.PreconditionFailure".into(),
        value: details.encode_to_vec(),
    };
    let status =
        rpc::Status { code: Code::FailedPrecondition as i32, message: "".into(), details: vec![detail] };
    let missing = done(&reapi::ExecuteResponse { status: Some(status), ..Default::default() });
    fake.state().scripts = vec![(vec![missing.clone()], None), (vec![done(&success(0))], None)].into();
    assert_eq!(exec(&endpoint, &["true"]).await.0, 0);
    fake.state().scripts = vec![(vec![missing.clone()], None), (vec![missing.clone()], None)].into();
    let (code, _, stderr) = exec(&endpoint, &["true"]).await;
    assert!(code == 125 && stderr.contains(&lost.to_string()), "{stderr}");
}

/// OPS-03: Ctrl-C, a service manager, and a closed terminal.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_cancels_the_operation_before_exec_leaves() {
    use rustix::process::{Pid, Signal, kill_process};
    for (signal, code) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
        let fake = Fake::default();
        let endpoint = fake.serve().await;
        let child =
            hanging_exec(&fake, std::process::Command::new(env!("CARGO_BIN_EXE_gorego")), &endpoint).await;
        // The name of the operation may not have arrived yet.
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(exit_code(child).await, Some(code));
        assert_eq!(fake.state().calls.last(), Some(&"CancelOperation"), "{signal:?}");
    }
}

/// As with any other program, `nohup` makes it ignore SIGHUP.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_is_ignored_from_the_start_stops_nothing() {
    use rustix::process::{Pid, Signal, kill_process};
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_gorego")]);
    let child = hanging_exec(&fake, command, &endpoint).await;
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(exit_code(child).await, Some(143));
}

/// `gorego exec` with an operation that does not end, after the operation was started.
async fn hanging_exec(
    fake: &Fake,
    mut command: std::process::Command,
    endpoint: &str,
) -> std::process::Child {
    fake.state().hang = true;
    fake.state().scripts = vec![(vec![stage(Stage::Queued)], None)].into();
    let child = command.args(["exec", "--endpoint", endpoint, "sleep", "1000"]).spawn().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !fake.state().calls.contains(&"Execute") {
        assert!(std::time::Instant::now() < deadline, "exec does not come to the point");
        tokio::task::yield_now().await;
    }
    child
}

async fn exit_code(mut child: std::process::Child) -> Option<i32> {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap().code()
}

/// The server's message about a timeout repeats the error.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_is_told_in_one_line() {
    let fake = Fake::default();
    let endpoint = fake.serve().await;
    let status =
        rpc::Status { code: Code::DeadlineExceeded as i32, message: "ran for 1s".into(), details: vec![] };
    let late = reapi::ExecuteResponse {
        status: Some(status),
        result: Some(reapi::ActionResult::default()),
        message: "it was stopped after 1s".into(),
        ..Default::default()
    };
    fake.state().scripts = vec![(vec![done(&late)], None)].into();
    let (code, _, stderr) = exec(&endpoint, &["true"]).await;
    assert!(code == 124 && stderr.contains("ran for 1s") && stderr.lines().count() == 1, "{stderr}");
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
