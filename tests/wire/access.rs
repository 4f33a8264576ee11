//! Permissions on both ports: the matrix of all requests, and the owners of operations and results.

mod matrix;

use crate::support::{
    Client, PATIENCE, Run, Server, empty, eventually, eventually_every, http_client, metadata, sh, shared_dir,
};
use bytes::Bytes;
use gorego::access::tokens::{NewToken, TokenRecord, file::update};
use gorego_client::Raw;
use gorego_reapi::proto::{
    bytestream::ReadRequest,
    longrunning::{CancelOperationRequest, GetOperationRequest, ListOperationsRequest},
    reapi::{GetCapabilitiesRequest, WaitExecutionRequest},
};
use prost::Message as _;
use reqwest::StatusCode;
use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::Command,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};

/// A server with static tokens.
pub(crate) struct Guarded {
    pub(crate) server: Server,
    pub(crate) tokens: PathBuf,
    _directory: TempDir,
}

impl Guarded {
    pub(crate) async fn start(overrides: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tokens = directory.path().join("tokens");
        let roles = r#"{ team = { like = "ci", instances = ["team/*"] } }"#;
        let mut all = vec![
            ("ACCESS__TOKENS", tokens.to_str().unwrap()),
            ("ACCESS__ROLES", roles),
            ("INSTANCE_NAMES", r#"["", "team/a"]"#),
            ("HTTP__LISTEN_ADDR", "127.0.0.1:0"),
        ];
        all.extend(overrides);
        let server = Server::with(&all).await;
        Self { server, tokens, _directory: directory }
    }

    /// Makes a token with a role. The server has read it when this returns.
    pub(crate) async fn token(&self, role: &str) -> NewToken {
        let token = NewToken::random().unwrap();
        let record = TokenRecord {
            id: token.id.clone(),
            sha256: token.sha256,
            roles: vec![role.into()],
            created: SystemTime::UNIX_EPOCH,
            expires: None,
            note: String::new(),
        };
        update(&self.tokens, |list| list.add(record)).unwrap();
        // The server would notice the change by itself, but seconds later.
        self.server.signal("HUP");
        let channel = self.channel().await;
        // Only so many denials of a client are logged, and tests look for them.
        let interval = Duration::from_millis(200);
        let is_known = async || is_known(&channel, &token).await;
        eventually_every(interval, "the server knows the token", is_known).await;
        token
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(self.server.endpoint()).unwrap().connect().await.unwrap()
    }

    pub(crate) fn http(&self) -> String {
        format!("http://{}", self.server.http_address())
    }
}

/// Whether the server accepts a token.
async fn is_known(channel: &Channel, token: &NewToken) -> bool {
    let path = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
    let instance = GetCapabilitiesRequest { instance_name: "team/a".into() };
    let answer = call(channel, path, instance.encode_to_vec().into(), Some(&token.text)).await;
    answer.map_err(|status| status.code()) != Err(Code::Unauthenticated)
}

/// A request with a token.
pub(crate) fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// The first message of the answer to a call, or its status.
async fn call(channel: &Channel, path: &str, message: Bytes, token: Option<&str>) -> Result<(), Status> {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let once = tokio_stream::once(message);
    let request = match token {
        Some(token) => with(token, once),
        None => Request::new(once),
    };
    let answer = client.streaming(request, path.parse().unwrap(), Raw).await?;
    answer.into_inner().message().await.map(drop)
}

/// A client with a token, and its run of a command.
pub(crate) struct Owner {
    pub(crate) token: NewToken,
    pub(crate) client: Client,
}

impl Owner {
    pub(crate) async fn start(guarded: &Guarded, role: &str) -> Self {
        Self { token: guarded.token(role).await, client: guarded.server.client().await }
    }

    pub(crate) async fn run(&self, action: gorego_reapi::digest::Digest) -> Run {
        let request = with(&self.token.text, self.client.request(action));
        Run(self.client.execution.clone().execute(request).await.unwrap().into_inner())
    }

    async fn get(&self, name: &str) -> Result<(), Code> {
        let request = with(&self.token.text, GetOperationRequest { name: name.into() });
        self.client.operations.clone().get_operation(request).await.map(drop).map_err(|status| status.code())
    }

    async fn cancel(&self, name: &str) -> Result<(), Code> {
        let request = with(&self.token.text, CancelOperationRequest { name: name.into() });
        self.client
            .operations
            .clone()
            .cancel_operation(request)
            .await
            .map(drop)
            .map_err(|status| status.code())
    }

    async fn wait(&self, name: &str) -> Result<(), Code> {
        let request = with(&self.token.text, WaitExecutionRequest { name: name.into() });
        self.client.execution.clone().wait_execution(request).await.map(drop).map_err(|status| status.code())
    }

    async fn listed(&self) -> usize {
        let request = with(&self.token.text, ListOperationsRequest::default());
        self.client.operations.clone().list_operations(request).await.unwrap().into_inner().operations.len()
    }

    async fn read(&self, name: &str) -> Result<(), Code> {
        let request =
            with(&self.token.text, ReadRequest { resource_name: name.into(), ..Default::default() });
        let mut stream =
            self.client.bytes.clone().read(request).await.map_err(|status| status.code())?.into_inner();
        stream.message().await.map(drop).map_err(|status| status.code())
    }
}

/// Stores the action of a script with the owner's token.
pub(crate) async fn action(owner: &Owner, script: &str) -> gorego_reapi::digest::Digest {
    use gorego_reapi::proto::reapi::{Action, BatchUpdateBlobsRequest, batch_update_blobs_request};
    let command = sh(script).encode_to_vec();
    let function = owner.client.function;
    let action = Action {
        command_digest: Some(function.digest(&command).to_wire()),
        input_root_digest: Some(empty().to_wire()),
        ..Default::default()
    };
    let blobs = [command, action.encode_to_vec(), Vec::new()];
    let requests = blobs.iter().map(|blob| batch_update_blobs_request::Request {
        digest: Some(function.digest(blob).to_wire()),
        data: blob.clone().into(),
        compressor: 0,
    });
    let request = BatchUpdateBlobsRequest { requests: requests.collect(), ..Default::default() };
    let stored = owner.client.cas.clone().batch_update_blobs(with(&owner.token.text, request)).await.unwrap();
    assert!(stored.into_inner().responses.iter().all(|blob| blob.status.as_ref().unwrap().code == 0));
    function.digest(&blobs[1])
}

#[tokio::test]
async fn operations_and_their_output_belong_to_whom_began_them_and_administrators_see_all() {
    let guarded = Guarded::start(&[]).await;
    let [one, other] = [Owner::start(&guarded, "developer").await, Owner::start(&guarded, "developer").await];
    let admin = Owner::start(&guarded, "admin").await;
    let directory = shared_dir();
    let gate = directory.path().join("go");
    let action =
        action(&one, &format!("echo out; until [ -e '{}' ]; do sleep 0.01; done", gate.display())).await;
    let mut run = one.run(action).await;
    let operation = run.until(|operation| !metadata(operation).stdout_stream_name.is_empty()).await;
    let (name, stream) = (operation.name.clone(), metadata(&operation).stdout_stream_name);
    for (owner, expected, listed) in
        [(&one, Ok(()), 1), (&other, Err(Code::PermissionDenied), 0), (&admin, Ok(()), 1)]
    {
        assert_eq!(owner.get(&name).await, expected);
        assert_eq!(owner.wait(&name).await, expected);
        assert_eq!(owner.read(&stream).await, expected);
        assert_eq!(owner.listed().await, listed);
    }
    assert_eq!(other.cancel(&name).await, Err(Code::PermissionDenied));
    // Another client that runs the same action has its own operation, and reads the output of the shared run.
    let mut joined = other.run(action).await;
    let own = joined.until(|operation| !metadata(operation).stdout_stream_name.is_empty()).await;
    assert_ne!(own.name, name);
    assert_eq!(metadata(&own).stdout_stream_name, stream);
    assert_eq!(other.read(&stream).await, Ok(()));
    assert_eq!((other.listed().await, admin.listed().await), (1, 2));
    assert_eq!(other.cancel(&own.name).await, Ok(()));
    let third = other.run(action).await.next().await.unwrap().name;
    assert_eq!(admin.cancel(&third).await, Ok(()));
    std::fs::write(&gate, "").unwrap();
    assert_eq!(
        run.finish().await.result.unwrap().exit_code,
        0,
        "the cancellation of another one is not its own"
    );
    let changes = || {
        guarded
            .server
            .log()
            .into_iter()
            .filter(|event| event["event"] == "operation_administered")
            .collect::<Vec<_>>()
    };
    eventually("what an administrator did is an audit event", || !changes().is_empty()).await;
    let changes = changes();
    assert_eq!(changes.len(), 1, "one's own operations are not in the audit: {changes:?}");
    for (field, value) in [
        ("target", "gorego::audit".to_owned()),
        ("method", "CancelOperation".into()),
        ("principal", format!("token:{}", admin.token.id)),
        ("owner", format!("token:{}", other.token.id)),
        ("operation", third),
    ] {
        assert_eq!(changes[0][field], value.as_str(), "{field}");
    }
    let finished = guarded.server.log().into_iter().filter(|event| event["event"] == "rpc_finished");
    let names: BTreeSet<_> =
        finished.filter_map(|event| Some(event["principal"].as_str()?.to_owned())).collect();
    assert!(names.contains(&format!("token:{}", one.token.id)), "{names:?}");
}

#[tokio::test]
async fn a_stream_ends_when_its_token_is_revoked_and_no_secret_is_logged() {
    let guarded = Guarded::start(&[]).await;
    let [revoked, kept] = [Owner::start(&guarded, "ci").await, Owner::start(&guarded, "ci").await];
    let directory = shared_dir();
    let gate = directory.path().join("go");
    let action = action(&kept, &format!("until [ -e '{}' ]; do sleep 0.01; done", gate.display())).await;
    let (mut first, second) = (revoked.run(action).await, kept.run(action).await);
    first.next().await;
    update(&guarded.tokens, |list| list.revoke(std::slice::from_ref(&revoked.token.id))).unwrap();
    let end = loop {
        match tokio::time::timeout(PATIENCE, first.0.message()).await.expect("an end in time") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended with OK"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unauthenticated, "{end}");
    assert!(end.message().contains("revoked"), "{end}");
    let request = with(&revoked.token.text, GetCapabilitiesRequest::default());
    let refused = revoked.client.capabilities.clone().get_capabilities(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    std::fs::write(&gate, "").unwrap();
    assert_eq!(second.finish().await.status.unwrap_or_default().code, 0, "the other client's run went on");
    eventually("the denial is an audit event", || {
        guarded.server.log().iter().any(|event| {
            event["event"] == "access_denied"
                && event["target"] == "gorego::audit"
                && event["denial"] == "wrong_credential"
        })
    })
    .await;
    let log = format!("{:?}", guarded.server.log());
    for token in [&revoked.token, &kept.token] {
        assert!(log.contains(&token.id) && !log.contains(token.text.rsplit('_').next().unwrap()));
    }
}

#[tokio::test]
async fn capabilities_tell_what_a_client_may_do_and_anonymous_clients_may_do_what_they_are_given() {
    let guarded = Guarded::start(&[("ACCESS__ANONYMOUS", r#"["reader"]"#)]).await;
    let client = guarded.server.client().await;
    let mut tokens = vec![(None, false, false)];
    for (role, writes, executes) in [("developer", false, true), ("ci", true, true), ("worker", true, false)]
    {
        tokens.push((Some(guarded.token(role).await), writes, executes));
    }
    for (token, writes, executes) in &tokens {
        let request = match token {
            Some(token) => with(&token.text, GetCapabilitiesRequest::default()),
            None => Request::new(GetCapabilitiesRequest::default()),
        };
        let told = client.capabilities.clone().get_capabilities(request).await.unwrap().into_inner();
        let updates = told.cache_capabilities.unwrap().action_cache_update_capabilities.unwrap();
        assert_eq!((updates.update_enabled, told.execution_capabilities.is_some()), (*writes, *executes));
    }
    assert!(client.cached(empty()).await.is_none(), "a reader may look");
    let refused = client.execution.clone().execute(client.request(empty())).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // A wrong credential is refused even if the method needs none.
    let request = with("gorego_x", GetCapabilitiesRequest::default());
    assert_eq!(
        client.capabilities.clone().get_capabilities(request).await.unwrap_err().code(),
        Code::Unauthenticated
    );
}

#[tokio::test]
async fn a_password_is_checked_once_for_many_requests_and_wrong_ones_are_limited() {
    let directory = tempfile::tempdir().unwrap();
    let passwords = directory.path().join("htpasswd");
    std::fs::write(&passwords, format!("alice:{}\n", bcrypt::hash("correct horse", 8).unwrap())).unwrap();
    let passwords = passwords.to_str().unwrap();
    let guarded =
        Guarded::start(&[("ACCESS__PASSWORDS", passwords), ("ACCESS__USERS", r#"{ alice = ["ci"] }"#)]).await;
    let (url, client) = (format!("{}/cache/key", guarded.http()), http_client());
    let put = async |user: &str, password: &str| {
        client.put(&url).basic_auth(user, Some(password)).body("x").send().await.unwrap()
    };
    let all = futures::future::join_all((0..200).map(|_| put("alice", "correct horse"))).await;
    assert!(all.iter().all(|answer| answer.status() == StatusCode::CREATED));
    let mut wrong = Vec::new();
    for number in 0..30 {
        wrong.push(put("alice", &number.to_string()).await.status());
    }
    assert_eq!(wrong[0], StatusCode::UNAUTHORIZED);
    assert!(wrong.contains(&StatusCode::TOO_MANY_REQUESTS), "{wrong:?}");
    assert_eq!(put("alice", "correct horse").await.status(), StatusCode::CREATED, "it was checked before");
}

#[test]
fn the_command_line_makes_lists_and_revokes_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens");
    let gorego = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
        let output = command.arg("token").args(args).arg("--file").arg(&file).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let (code, token, told) = gorego(&["create", "--role", "ci", "--expires", "90d", "--note", "machine 3"]);
    assert_eq!((code, token.lines().count()), (0, 1), "{told}");
    let token = token.trim();
    let id = gorego::access::tokens::id_of(token).unwrap().to_owned();
    assert!(told.contains(&id) && !told.contains(token), "{told}");
    let (_, list, _) = gorego(&["list"]);
    assert!(list.contains(&id) && list.contains("machine 3") && !list.contains(token), "{list}");
    let (_, json, _) = gorego(&["list", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json[0]["id"].as_str(), json[0]["roles"][0].as_str()), (Some(&*id), Some("ci")));
    let (code, _, told) = gorego(&["create", "--role", "cl"]);
    assert!(code == 2 && told.contains("\"cl\"") && told.contains("developer"), "{told}");
    let (code, _, told) = gorego(&["revoke", "0000000000000000"]);
    assert!(code == 2 && told.contains("gorego token list"), "{told}");
    assert_eq!(gorego(&["revoke", &id]).0, 0);
    assert!(gorego(&["list"]).1.contains("no tokens"));
}
