//! The server under test: the real binary with an empty store, and a client for the calls of the groups.

use gorego_client::stubs::{ByteStreamClient, ContentAddressableStorageClient, ExecutionClient};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{
        longrunning::{Operation, operation},
        reapi::{
            Action, BatchUpdateBlobsRequest, Command as ReapiCommand, ExecuteRequest, ExecuteResponse,
            Platform, batch_update_blobs_request,
        },
    },
};
use prost::Message as _;
use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tonic::{
    Streaming,
    transport::{Channel, ClientTlsConfig},
};

/// A command under which the server is started, such as `valgrind --tool=callgrind`.
const UNDER: &str = "BENCH_UNDER";

/// A running goREgo. It is stopped when dropped.
pub(crate) struct Target {
    child: Child,
    store: TempDir,
    /// `http://host:port` for clients.
    pub(crate) endpoint: String,
    /// The time from spawn to the line that says it listens.
    pub(crate) startup: Duration,
}

impl Target {
    /// Starts a server with an empty store.
    pub(crate) fn start() -> Self {
        Self::start_on(tempfile::tempdir().expect("a directory"), &[])
    }

    /// Starts a server with this store and additional environment variables.
    pub(crate) fn start_on(store: TempDir, environment: &[(&str, &str)]) -> Self {
        let start = Instant::now();
        let mut words = std::env::var(UNDER).unwrap_or_default();
        words = format!("{words} {}", env!("CARGO_BIN_EXE_gorego"));
        let mut words = words.split_whitespace();
        let mut child = Command::new(words.next().expect("a program"))
            .args(words)
            .args(["serve", "--listen-addr", "127.0.0.1:0", "--local-cache-dir"])
            .arg(store.path())
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .expect("gorego starts");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| {
                let event: serde_json::Value = serde_json::from_str(&line).ok()?;
                (event["event"] == "server_started")
                    .then(|| event["listen_addr"].as_str().map(String::from))?
            })
            .expect("gorego says where it listens");
        let startup = start.elapsed();
        // The log must be read as long as the server runs.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, store, endpoint: format!("http://{address}"), startup }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops the server and returns its store.
    pub(crate) fn into_store(mut self) -> TempDir {
        self.stop();
        std::mem::replace(&mut self.store, tempfile::tempdir().expect("a directory"))
    }

    fn stop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if std::env::var_os(UNDER).is_some() {
            // A profiler writes down what it found when the server ends by itself.
            return self.stop();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CONNECTION_WINDOW: u32 = 32 << 20;
const STREAM_WINDOW: u32 = 16 << 20;

/// A connection with the calls that the groups make.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) cas: ContentAddressableStorageClient<Channel>,
    pub(crate) bytes: ByteStreamClient<Channel>,
    execution: ExecutionClient<Channel>,
}

impl Client {
    pub(crate) async fn connect(endpoint: &str) -> Self {
        Self::connect_with(endpoint, None).await
    }

    /// The same with TLS, if there is a configuration for it.
    pub(crate) async fn connect_with(endpoint: &str, tls: Option<ClientTlsConfig>) -> Self {
        let endpoint = Channel::from_shared(endpoint.to_owned())
            .expect("an endpoint")
            // Large and fixed: the HTTP/2 library derives from it how many small messages may wait, and closes the
            // connection of a client that falls behind by more.
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW);
        let endpoint = match tls {
            Some(tls) => endpoint.tls_config(tls).expect("a TLS configuration"),
            None => endpoint,
        };
        let channel = endpoint.connect().await.expect("it listens");
        Self {
            cas: ContentAddressableStorageClient::new(channel.clone()),
            bytes: ByteStreamClient::new(channel.clone()).max_decoding_message_size(16 << 20),
            execution: ExecutionClient::new(channel),
        }
    }

    /// Uploads an action that runs `arguments` in an empty root. The salt makes it unique.
    pub(crate) async fn upload_action(&self, arguments: &[&str], salt: &str) -> Digest {
        self.upload_action_in(Digest::empty(DigestFunction::Sha256), arguments, &[], salt).await
    }

    /// Uploads an action that runs `arguments` in this root and makes these outputs. The salt makes it unique.
    pub(crate) async fn upload_action_in(
        &self,
        root: Digest,
        arguments: &[&str],
        outputs: &[&str],
        salt: &str,
    ) -> Digest {
        self.upload_action_on(None, root, arguments, outputs, salt).await
    }

    /// The same with platform properties.
    pub(crate) async fn upload_action_on(
        &self,
        platform: Option<Platform>,
        root: Digest,
        arguments: &[&str],
        outputs: &[&str],
        salt: &str,
    ) -> Digest {
        let function = DigestFunction::Sha256;
        let command = ReapiCommand {
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            output_paths: outputs.iter().map(|path| (*path).to_owned()).collect(),
            ..Default::default()
        }
        .encode_to_vec();
        let action = Action {
            command_digest: Some(function.digest(&command).to_wire()),
            input_root_digest: Some(root.to_wire()),
            salt: salt.to_owned().into(),
            platform,
            ..Default::default()
        }
        .encode_to_vec();
        let digest = function.digest(&action);
        self.upload([command, action]).await;
        digest
    }

    /// Uploads blobs that fit into one batch.
    pub(crate) async fn upload(&self, blobs: impl IntoIterator<Item = Vec<u8>>) {
        let requests = blobs
            .into_iter()
            .map(|data| batch_update_blobs_request::Request {
                digest: Some(DigestFunction::Sha256.digest(&data).to_wire()),
                data: data.into(),
                ..Default::default()
            })
            .collect();
        let request = BatchUpdateBlobsRequest { requests, ..Default::default() };
        let reply = self.cas.clone().batch_update_blobs(request).await.expect("an answer").into_inner();
        for response in reply.responses {
            let status = response.status.unwrap_or_default();
            assert_eq!(status.code, 0, "{}", status.message);
        }
    }

    pub(crate) async fn execute(&self, action: Digest) -> Streaming<Operation> {
        let request = ExecuteRequest { action_digest: Some(action.to_wire()), ..Default::default() };
        self.execution.clone().execute(request).await.expect("it is accepted").into_inner()
    }

    pub(crate) async fn run(&self, action: Digest) -> Operation {
        let mut stream = self.execute(action).await;
        let mut last = None;
        while let Some(operation) = stream.message().await.expect("the stream goes on") {
            last = Some(operation);
        }
        last.filter(|operation| operation.done).expect("the last message is done")
    }

    /// Runs an action that has to end with exit code 0.
    pub(crate) async fn run_well(&self, action: Digest) {
        let operation = self.run(action).await;
        let Some(operation::Result::Response(response)) = operation.result else { panic!("{operation:?}") };
        let response = ExecuteResponse::decode(response.value.as_ref()).expect("a response");
        let code = response.result.as_ref().map(|result| result.exit_code);
        assert_eq!(code, Some(0), "{response:?}");
    }
}
