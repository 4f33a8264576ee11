//! A real server on a free port, a client for each service, and builders for test blobs.

use gorego_client::stubs::{
    ActionCacheClient, ByteStreamClient, ContentAddressableStorageClient, ExecutionClient, OperationsClient,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        bytestream::ReadRequest,
        longrunning::{Operation, operation},
        reapi::{
            Action, ActionResult, BatchUpdateBlobsRequest, Command as ReapiCommand, Directory, DirectoryNode,
            ExecuteOperationMetadata, ExecuteRequest, ExecuteResponse, FileNode, FindMissingBlobsRequest,
            GetActionResultRequest, SymlinkNode, batch_update_blobs_request, command::EnvironmentVariable,
        },
        rpc,
    },
};
use prost::Message as _;
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tonic::{Code, Status, transport::Channel};

/// Time limit of anything in a test.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the condition holds; panics with `what` after the time limit.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A server process.
pub struct Server {
    child: Child,
    address: String,
    store: Arc<TempDir>,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    /// Starts a server with defaults on an empty store.
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// Starts a server on an empty store, with environment overrides such as `("EXECUTION__CONCURRENCY", "1")`.
    pub async fn with(overrides: &[(&str, &str)]) -> Self {
        Self::on(Arc::new(tempfile::tempdir().unwrap()), overrides).await
    }

    /// Starts a server on this store.
    pub async fn on(store: Arc<TempDir>, overrides: &[(&str, &str)]) -> Self {
        let mut command = command(store.path());
        command.envs(overrides.iter().map(|(key, value)| (format!("GOREGO_{key}"), value)));
        Self::spawn(command, store)
    }

    /// Starts a server whose store is on a separate disk of this many bytes; see [`Server::on_a_disk`].
    pub async fn on_a_disk_of(bytes: usize) -> Self {
        Self::on_a_disk(&format!("size={bytes}")).await
    }

    /// Starts a server whose store is on a tmpfs with these mount options, in its own mount namespace; see
    /// [`Server::inside`].
    pub async fn on_a_disk(options: &str) -> Self {
        let store = Arc::new(tempfile::tempdir().unwrap());
        let mut unshare = Command::new("unshare");
        unshare.args(mount_namespace()).arg("sh");
        let mount = format!("mount -t tmpfs -o {options} none {}", store.path().display());
        Self::spawn(in_shell(unshare, &mount, store.path()), store)
    }

    /// Starts a server from a shell that has run this script.
    pub async fn after(script: &str) -> Self {
        let store = Arc::new(tempfile::tempdir().unwrap());
        Self::spawn(in_shell(Command::new("sh"), script, store.path()), store)
    }

    /// The path of a file in the store as the server sees it, including its mounts.
    pub fn inside(&self, name: &str) -> PathBuf {
        let store = self.store.path().join(name);
        PathBuf::from(format!("/proc/{}/root{}", self.pid(), store.display()))
    }

    /// Starts a server with this command, which comes from [`command`].
    pub fn spawn(mut command: Command, store: Arc<TempDir>) -> Self {
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (started, listening) = std::sync::mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Anything but JSON, such as a panic message, is kept as text for tests that fail.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if event["event"] == "server_started" {
                    let _ = started.send(event["listen_addr"].as_str().unwrap_or_default().to_owned());
                }
                lines.lock().unwrap().push(event);
            }
        });
        let Ok(address) = listening.recv_timeout(PATIENCE) else {
            let _ = child.kill();
            panic!("the server did not start: {:#?}", log.lock().unwrap());
        };
        Self { child, address, store, log }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Opens a new connection.
    pub async fn client(&self) -> Client {
        Client::connect(self.endpoint()).await
    }

    /// The directory of blobs and results.
    pub fn store(&self) -> &Path {
        self.store.path()
    }

    /// The store, for another server after this one has ended.
    pub fn shared_store(&self) -> Arc<TempDir> {
        self.store.clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> Vec<Value> {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end of the process.
    pub async fn exit(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the server does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills the server with SIGKILL and returns its store.
    pub async fn kill(mut self) -> Arc<TempDir> {
        self.signal("KILL");
        assert_eq!(self.exit().await.signal(), Some(9));
        self.store.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for line in self.log().iter().rev().take(20).rev() {
                eprintln!("server log: {line}");
            }
        }
    }
}

/// Where tests and actions find the same files, in spite of the sandbox.
fn shared() -> PathBuf {
    let path = std::env::temp_dir().join("gorego-tests-shared");
    std::fs::create_dir_all(&path).unwrap();
    // Not if another user made it.
    let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o1777));
    path
}

/// A directory that actions see at the same path and can change.
pub fn shared_dir() -> TempDir {
    let directory = tempfile::tempdir_in(shared()).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    directory
}

/// `gorego serve` on this store and a free port, in a clean environment.
pub fn command(store: &Path) -> Command {
    let writable = format!("[\"{}\"]", shared().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command
        .args(["serve", "--listen-addr", "127.0.0.1:0", "--local-cache-dir"])
        .arg(store)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("GOREGO_EXECUTION__SANDBOX__WRITABLE", writable)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// The unshare(1) command that makes a mount namespace: without privileges if user namespaces are enabled, otherwise as
/// root.
fn mount_namespace() -> &'static [&'static str] {
    let ways: [&[&str]; 2] = [&["--user", "--map-root-user", "--mount"], &["--mount"]];
    let works = |way: &&&[&str]| {
        let tried = Command::new("unshare").args(**way).arg("true").stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    ways.iter().find(works).expect(
        "this test mounts a small disk in a mount namespace of its own; that takes unshare(1) and either user namespaces \
         (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns) \
         or root",
    )
}

/// The same from a shell, after a script in it has succeeded.
fn in_shell(mut shell: Command, script: &str, store: &Path) -> Command {
    let serve = command(store);
    shell
        .arg("-c")
        .arg(format!("{script} && exec \"$0\" \"$@\""))
        .arg(serve.get_program())
        .args(serve.get_args())
        .env_clear()
        .envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    shell
}

/// The clients of all services on one connection.
#[derive(Clone)]
pub struct Client {
    pub cas: ContentAddressableStorageClient<Channel>,
    pub bytes: ByteStreamClient<Channel>,
    pub action_cache: ActionCacheClient<Channel>,
    pub execution: ExecutionClient<Channel>,
    pub operations: OperationsClient<Channel>,
    /// The instance name in all requests of the helpers.
    pub instance: String,
    /// The digest function of the helpers.
    pub function: DigestFunction,
}

impl Client {
    /// Opens a new connection.
    pub async fn connect(endpoint: String) -> Self {
        Self::over(Channel::from_shared(endpoint).unwrap().connect().await.unwrap())
    }

    /// Uses an existing connection.
    pub fn over(channel: Channel) -> Self {
        Self {
            cas: ContentAddressableStorageClient::new(channel.clone()),
            bytes: ByteStreamClient::new(channel.clone()),
            action_cache: ActionCacheClient::new(channel.clone()),
            execution: ExecutionClient::new(channel.clone()),
            operations: OperationsClient::new(channel),
            instance: String::new(),
            function: DigestFunction::Sha256,
        }
    }

    /// A resource name below the instance.
    pub fn name(&self, rest: &str) -> String {
        if self.instance.is_empty() { rest.into() } else { format!("{}/{rest}", self.instance) }
    }

    /// The value of `digest_function` in the helpers' requests: 0 if all clients omit it (GEN-08).
    pub fn wire_function(&self) -> i32 {
        if self.function == DigestFunction::Sha256 { 0 } else { self.function.wire().into() }
    }

    /// Parses a digest that the server sent.
    pub fn digest(&self, digest: Option<&gorego_reapi::proto::reapi::Digest>) -> Digest {
        Digest::from_wire(self.function, digest, "digest").unwrap()
    }

    pub async fn upload(&self, data: impl Into<Vec<u8>>) -> Digest {
        self.upload_all([data]).await[0]
    }

    /// Stores blobs in one call.
    pub async fn upload_all<D: Into<Vec<u8>>>(&self, blobs: impl IntoIterator<Item = D>) -> Vec<Digest> {
        let mut digests = Vec::new();
        let mut requests = Vec::new();
        for blob in blobs {
            let data: Vec<u8> = blob.into();
            digests.push(self.function.digest(&data));
            let digest = Some(self.function.digest(&data).to_wire());
            requests.push(batch_update_blobs_request::Request { digest, data: data.into(), compressor: 0 });
        }
        let request = BatchUpdateBlobsRequest {
            instance_name: self.instance.clone(),
            requests,
            digest_function: self.wire_function(),
        };
        let reply = self.cas.clone().batch_update_blobs(request).await.unwrap().into_inner();
        for response in reply.responses {
            let status = response.status.unwrap();
            assert_eq!(status.code, 0, "{}", status.message);
        }
        digests
    }

    /// The digests that are not stored.
    pub async fn missing(&self, digests: &[Digest]) -> Vec<Digest> {
        let request = FindMissingBlobsRequest {
            instance_name: self.instance.clone(),
            blob_digests: digests.iter().map(|d| d.to_wire()).collect(),
            digest_function: self.wire_function(),
        };
        let reply = self.cas.clone().find_missing_blobs(request).await.unwrap().into_inner();
        reply.missing_blob_digests.iter().map(|digest| self.digest(Some(digest))).collect()
    }

    /// Reads a blob with ByteStream.
    pub async fn read(&self, digest: Digest) -> Result<Vec<u8>, Status> {
        let resource_name = self.name(&digest.blob_name());
        self.read_request(ReadRequest { resource_name, ..Default::default() }).await
    }

    /// Reads with ByteStream to the end.
    pub async fn read_request(&self, request: ReadRequest) -> Result<Vec<u8>, Status> {
        let mut stream = self.bytes.clone().read(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            assert!(!message.data.is_empty(), "BS-15: an empty message in a stream");
            bytes.extend_from_slice(&message.data);
        }
        Ok(bytes)
    }

    /// Stores an Action for this command and input root.
    pub async fn action(&self, command: ReapiCommand, root: Digest) -> Digest {
        self.action_with(command, root, |_| {}).await
    }

    /// The same with a change to the Action.
    pub async fn action_with(
        &self,
        command: ReapiCommand,
        root: Digest,
        change: impl FnOnce(&mut Action),
    ) -> Digest {
        let command = command.encode_to_vec();
        let mut action = Action {
            command_digest: Some(self.function.digest(&command).to_wire()),
            input_root_digest: Some(root.to_wire()),
            ..Default::default()
        };
        change(&mut action);
        self.upload_all([command, action.encode_to_vec()]).await[1]
    }

    pub async fn start(&self, action: Digest) -> Run {
        self.start_request(self.request(action)).await.unwrap()
    }

    /// An Execute request for this action.
    pub fn request(&self, action: Digest) -> ExecuteRequest {
        ExecuteRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_wire()),
            digest_function: self.wire_function(),
            ..Default::default()
        }
    }

    /// Starts an Execute with the whole request.
    pub async fn start_request(&self, request: ExecuteRequest) -> Result<Run, Status> {
        Ok(Run(self.execution.clone().execute(request).await?.into_inner()))
    }

    pub async fn run(&self, action: Digest) -> ExecuteResponse {
        self.start(action).await.finish().await
    }

    /// Executes a command with an empty input root. It must run.
    pub async fn run_command(&self, command: ReapiCommand) -> ActionResult {
        let action = self.action(command, empty()).await;
        let response = self.run(action).await;
        assert_eq!(response.status.clone().unwrap_or_default().code, 0, "{response:?}");
        response.result.unwrap()
    }

    /// The cached result of an action, if there is one.
    pub async fn cached(&self, action: Digest) -> Option<ActionResult> {
        let request = GetActionResultRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_wire()),
            digest_function: self.wire_function(),
            ..Default::default()
        };
        match self.action_cache.clone().get_action_result(request).await {
            Ok(result) => Some(result.into_inner()),
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound, "AC-01: {status}");
                None
            }
        }
    }

    /// The standard output in a result.
    pub async fn stdout(&self, result: &ActionResult) -> String {
        self.text(result.stdout_digest.as_ref()).await
    }

    /// The standard error in a result.
    pub async fn stderr(&self, result: &ActionResult) -> String {
        self.text(result.stderr_digest.as_ref()).await
    }

    async fn text(&self, digest: Option<&gorego_reapi::proto::reapi::Digest>) -> String {
        let Some(digest) = digest else { return String::new() };
        String::from_utf8(self.read(self.digest(Some(digest))).await.unwrap()).unwrap()
    }

    /// The content of an output file.
    pub async fn output(&self, result: &ActionResult, path: &str) -> String {
        let file = result.output_files.iter().find(|f| f.path == path);
        self.text(file.unwrap_or_else(|| panic!("no output {path}: {result:?}")).digest.as_ref()).await
    }
}

/// An Execute or WaitExecution stream.
pub struct Run(pub tonic::Streaming<Operation>);

impl Run {
    /// The next message; `None` at the end.
    pub async fn next(&mut self) -> Option<Operation> {
        let message = tokio::time::timeout(PATIENCE, self.0.message()).await.expect("a message in time");
        let operation = message.unwrap()?;
        // EXE-02, EXE-03, EXE-05, EXE-07 on every message of every test.
        assert!(operation.name.contains("operations/"), "{operation:?}");
        let stage = metadata(&operation).stage;
        assert!((1..=4).contains(&stage), "EXE-04: {operation:?}");
        assert_eq!(stage == 4, operation.done, "EXE-05: {operation:?}");
        assert_eq!(operation.done, operation.result.is_some(), "EXE-07: {operation:?}");
        Some(operation)
    }

    /// Reads until a message satisfies the condition.
    pub async fn until(&mut self, condition: impl Fn(&Operation) -> bool) -> Operation {
        loop {
            let operation = self.next().await.expect("the stream went on");
            if condition(&operation) {
                return operation;
            }
        }
    }

    /// Reads to the end, which must be clean.
    pub async fn finish(mut self) -> ExecuteResponse {
        let last = self.until(|operation| operation.done).await;
        assert!(self.next().await.is_none(), "EXE-05: the stream ends after done");
        response(&last)
    }
}

/// The metadata of an operation.
pub fn metadata(operation: &Operation) -> ExecuteOperationMetadata {
    let any = operation.metadata.as_ref().expect("EXE-03: metadata is on every message");
    assert_eq!(any.type_url, "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata");
    ExecuteOperationMetadata::decode(&*any.value).unwrap()
}

/// The response of a finished operation.
pub fn response(operation: &Operation) -> ExecuteResponse {
    let Some(operation::Result::Response(any)) = &operation.result else {
        panic!("EXE-07: no response in {operation:?}");
    };
    assert_eq!(any.type_url, "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse");
    ExecuteResponse::decode(&*any.value).unwrap()
}

/// The MISSING subjects of a status; checks that they are its only detail (EXE-22..24).
pub fn missing_subjects(status: &rpc::Status) -> Vec<String> {
    assert_eq!(status.code, Code::FailedPrecondition as i32, "{status:?}");
    assert_eq!(status.details.len(), 1, "EXE-24");
    assert_eq!(status.details[0].type_url, "type.googleapis.com/google.rpc.PreconditionFailure");
    let failure = rpc::PreconditionFailure::decode(&*status.details[0].value).unwrap();
    let subject = |violation: rpc::precondition_failure::Violation| {
        assert_eq!(violation.r#type, "MISSING");
        violation.subject
    };
    failure.violations.into_iter().map(subject).collect()
}

/// The SHA-256 digest of bytes.
pub fn sha256(bytes: &[u8]) -> Digest {
    DigestFunction::Sha256.digest(bytes)
}

/// The digest of the empty blob, which is also an empty directory.
pub fn empty() -> Digest {
    Digest::empty(DigestFunction::Sha256)
}

/// A shell command with a standard PATH.
pub fn sh(script: &str) -> ReapiCommand {
    ReapiCommand {
        arguments: vec!["/bin/sh".into(), "-c".into(), script.into()],
        environment_variables: vec![EnvironmentVariable {
            name: "PATH".into(),
            value: "/usr/bin:/bin".into(),
        }],
        ..Default::default()
    }
}

/// The same with output paths.
pub fn sh_with(script: &str, output_paths: &[&str]) -> ReapiCommand {
    ReapiCommand { output_paths: output_paths.iter().map(|p| (*p).into()).collect(), ..sh(script) }
}

/// A file node.
pub fn file(name: &str, digest: Digest) -> FileNode {
    FileNode { name: name.into(), digest: Some(digest.to_wire()), ..Default::default() }
}

/// A directory node.
pub fn subdirectory(name: &str, digest: Digest) -> DirectoryNode {
    DirectoryNode { name: name.into(), digest: Some(digest.to_wire()) }
}

/// A symlink node.
pub fn symlink(name: &str, target: &str) -> SymlinkNode {
    SymlinkNode { name: name.into(), target: target.into(), ..Default::default() }
}

/// The bytes of a Directory.
pub fn directory(
    files: Vec<FileNode>,
    directories: Vec<DirectoryNode>,
    symlinks: Vec<SymlinkNode>,
) -> Vec<u8> {
    Directory { files, directories, symlinks, ..Default::default() }.encode_to_vec()
}

/// Every regular file below a directory.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}
