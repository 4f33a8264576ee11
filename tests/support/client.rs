//! [`Client`]: the clients of all services on one connection, and builders for what they send.

use super::PATIENCE;
use gorego_client::stubs::{
    ActionCacheClient, ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient,
    ExecutionClient, OperationsClient,
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
use tonic::{Code, Status, transport::Channel};

/// An HTTP client without a proxy.
pub(crate) fn http_client() -> reqwest::Client {
    // The library asks for a provider even where no TLS is spoken. An error means that there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// The clients of all services on one connection.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
    pub(crate) cas: ContentAddressableStorageClient<Channel>,
    pub(crate) bytes: ByteStreamClient<Channel>,
    pub(crate) action_cache: ActionCacheClient<Channel>,
    pub(crate) execution: ExecutionClient<Channel>,
    pub(crate) operations: OperationsClient<Channel>,
    pub(crate) capabilities: CapabilitiesClient<Channel>,
    /// The instance name in all requests of the helpers.
    pub(crate) instance: String,
    /// The digest function of the helpers.
    pub(crate) function: DigestFunction,
}

impl Client {
    /// Opens a new connection.
    pub(crate) async fn connect(endpoint: String) -> Self {
        Self::over(Channel::from_shared(endpoint).unwrap().connect().await.unwrap())
    }

    /// Uses an existing connection.
    pub(crate) fn over(channel: Channel) -> Self {
        Self {
            cas: ContentAddressableStorageClient::new(channel.clone()),
            bytes: ByteStreamClient::new(channel.clone()),
            action_cache: ActionCacheClient::new(channel.clone()),
            execution: ExecutionClient::new(channel.clone()),
            operations: OperationsClient::new(channel.clone()),
            capabilities: CapabilitiesClient::new(channel.clone()),
            channel,
            instance: String::new(),
            function: DigestFunction::Sha256,
        }
    }

    /// A resource name below the instance.
    pub(crate) fn name(&self, rest: &str) -> String {
        if self.instance.is_empty() { rest.into() } else { format!("{}/{rest}", self.instance) }
    }

    /// The value of `digest_function` in the helpers' requests: 0 if all clients omit it (GEN-08).
    pub(crate) fn wire_function(&self) -> i32 {
        if self.function == DigestFunction::Sha256 { 0 } else { self.function.wire().into() }
    }

    /// Parses a digest that the server sent.
    pub(crate) fn digest(&self, digest: Option<&gorego_reapi::proto::reapi::Digest>) -> Digest {
        Digest::from_wire(self.function, digest, "digest").unwrap()
    }

    pub(crate) async fn upload(&self, data: impl Into<Vec<u8>>) -> Digest {
        self.upload_all([data]).await[0]
    }

    /// Stores blobs in one call.
    pub(crate) async fn upload_all<D: Into<Vec<u8>>>(
        &self,
        blobs: impl IntoIterator<Item = D>,
    ) -> Vec<Digest> {
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
    pub(crate) async fn missing(&self, digests: &[Digest]) -> Vec<Digest> {
        let request = FindMissingBlobsRequest {
            instance_name: self.instance.clone(),
            blob_digests: digests.iter().map(|d| d.to_wire()).collect(),
            digest_function: self.wire_function(),
        };
        let reply = self.cas.clone().find_missing_blobs(request).await.unwrap().into_inner();
        reply.missing_blob_digests.iter().map(|digest| self.digest(Some(digest))).collect()
    }

    /// Reads a blob with ByteStream.
    pub(crate) async fn read(&self, digest: Digest) -> Result<Vec<u8>, Status> {
        let resource_name = self.name(&digest.blob_name());
        self.read_request(ReadRequest { resource_name, ..Default::default() }).await
    }

    /// Reads with ByteStream to the end.
    pub(crate) async fn read_request(&self, request: ReadRequest) -> Result<Vec<u8>, Status> {
        let mut stream = self.bytes.clone().read(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            assert!(!message.data.is_empty(), "BS-15: an empty message in a stream");
            bytes.extend_from_slice(&message.data);
        }
        Ok(bytes)
    }

    /// Stores an Action for this command and input root.
    pub(crate) async fn action(&self, command: ReapiCommand, root: Digest) -> Digest {
        self.action_with(command, root, |_| {}).await
    }

    /// Stores an Action for this command and input root, after `change` has changed it.
    pub(crate) async fn action_with(
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

    pub(crate) async fn start(&self, action: Digest) -> Run {
        self.start_request(self.request(action)).await.unwrap()
    }

    /// An Execute request for this action.
    pub(crate) fn request(&self, action: Digest) -> ExecuteRequest {
        ExecuteRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_wire()),
            digest_function: self.wire_function(),
            ..Default::default()
        }
    }

    /// Starts an Execute with the whole request.
    pub(crate) async fn start_request(&self, request: ExecuteRequest) -> Result<Run, Status> {
        Ok(Run(self.execution.clone().execute(request).await?.into_inner()))
    }

    pub(crate) async fn run(&self, action: Digest) -> ExecuteResponse {
        self.start(action).await.finish().await
    }

    /// Executes a command with an empty input root. It must run.
    pub(crate) async fn run_command(&self, command: ReapiCommand) -> ActionResult {
        let action = self.action(command, empty()).await;
        let response = self.run(action).await;
        assert_eq!(response.status.clone().unwrap_or_default().code, 0, "{response:?}");
        response.result.unwrap()
    }

    /// The cached result of an action, if there is one.
    pub(crate) async fn cached(&self, action: Digest) -> Option<ActionResult> {
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
    pub(crate) async fn stdout(&self, result: &ActionResult) -> String {
        self.text(result.stdout_digest.as_ref()).await
    }

    /// The standard error in a result.
    pub(crate) async fn stderr(&self, result: &ActionResult) -> String {
        self.text(result.stderr_digest.as_ref()).await
    }

    async fn text(&self, digest: Option<&gorego_reapi::proto::reapi::Digest>) -> String {
        let Some(digest) = digest else { return String::new() };
        String::from_utf8(self.read(self.digest(Some(digest))).await.unwrap()).unwrap()
    }

    /// The content of an output file.
    pub(crate) async fn output(&self, result: &ActionResult, path: &str) -> String {
        let file = result.output_files.iter().find(|f| f.path == path);
        self.text(file.unwrap_or_else(|| panic!("no output {path}: {result:?}")).digest.as_ref()).await
    }
}

/// An Execute or WaitExecution stream.
pub(crate) struct Run(pub tonic::Streaming<Operation>);

impl Run {
    /// The next message; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Operation> {
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
    pub(crate) async fn until(&mut self, condition: impl Fn(&Operation) -> bool) -> Operation {
        loop {
            let operation = self.next().await.expect("the stream went on");
            if condition(&operation) {
                return operation;
            }
        }
    }

    /// Reads to the end, which must be clean.
    pub(crate) async fn finish(mut self) -> ExecuteResponse {
        let last = self.until(|operation| operation.done).await;
        assert!(self.next().await.is_none(), "EXE-05: the stream ends after done");
        response(&last)
    }
}

/// The metadata of an operation.
pub(crate) fn metadata(operation: &Operation) -> ExecuteOperationMetadata {
    let any = operation.metadata.as_ref().expect("EXE-03: metadata is on every message");
    assert_eq!(any.type_url, "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteOperationMetadata");
    ExecuteOperationMetadata::decode(&*any.value).unwrap()
}

/// The response of a finished operation.
pub(crate) fn response(operation: &Operation) -> ExecuteResponse {
    let Some(operation::Result::Response(any)) = &operation.result else {
        panic!("EXE-07: no response in {operation:?}");
    };
    assert_eq!(any.type_url, "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse");
    ExecuteResponse::decode(&*any.value).unwrap()
}

/// The MISSING subjects of a status; checks that they are its only detail (EXE-22..24).
pub(crate) fn missing_subjects(status: &rpc::Status) -> Vec<String> {
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
pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    DigestFunction::Sha256.digest(bytes)
}

/// The digest of the empty blob, which is also an empty directory.
pub(crate) fn empty() -> Digest {
    Digest::empty(DigestFunction::Sha256)
}

/// A shell command with a standard PATH.
pub(crate) fn sh(script: &str) -> ReapiCommand {
    ReapiCommand {
        arguments: vec!["/bin/sh".into(), "-c".into(), script.into()],
        environment_variables: vec![EnvironmentVariable {
            name: "PATH".into(),
            value: "/usr/bin:/bin".into(),
        }],
        ..Default::default()
    }
}

/// A shell command with a standard PATH and these output paths.
pub(crate) fn sh_with(script: &str, output_paths: &[&str]) -> ReapiCommand {
    ReapiCommand { output_paths: output_paths.iter().map(|p| (*p).into()).collect(), ..sh(script) }
}

/// A file node.
pub(crate) fn file(name: &str, digest: Digest) -> FileNode {
    FileNode { name: name.into(), digest: Some(digest.to_wire()), ..Default::default() }
}

/// A directory node.
pub(crate) fn subdirectory(name: &str, digest: Digest) -> DirectoryNode {
    DirectoryNode { name: name.into(), digest: Some(digest.to_wire()) }
}

/// A symlink node.
pub(crate) fn symlink(name: &str, target: &str) -> SymlinkNode {
    SymlinkNode { name: name.into(), target: target.into(), ..Default::default() }
}

/// The bytes of a Directory.
pub(crate) fn directory(
    files: Vec<FileNode>,
    directories: Vec<DirectoryNode>,
    symlinks: Vec<SymlinkNode>,
) -> Vec<u8> {
    Directory { files, directories, symlinks, ..Default::default() }.encode_to_vec()
}
