//! Attempts to get around permissions: an indirect request gives no more permissions, and a withdrawn permission ends
//! at once.

use crate::access::{Guarded, Owner, action, with};
use crate::support::{Client, PATIENCE, Server, empty, eventually, http_client, sh, shared_dir};
use gorego::access::tokens::file::update;
use gorego_client::stubs::{LogStreamServiceClient, PushClient};
use gorego_reapi::proto::{
    asset::PushBlobRequest,
    bytestream::WriteRequest,
    logstream::CreateLogStreamRequest,
    reapi::{
        ActionResult, GetActionResultRequest, GetCapabilitiesRequest, UpdateActionResultRequest,
        WaitExecutionRequest,
    },
};
use reqwest::Method;
use std::process::{Command, Output};
use tokio::time::timeout;
use tonic::Code;

/// A result may name any blob, so inlining would disclose it to every client that may write results.
#[tokio::test]
async fn results_inline_nothing_for_a_client_that_may_not_read_blobs() {
    let roles = r#"{ results = { permissions = ["ac.read", "ac.write"] } }"#;
    let guarded = Guarded::start(&[("ACCESS__ROLES", roles)]).await;
    let [ci, results] = [Owner::start(&guarded, "ci").await, Owner::start(&guarded, "results").await];
    // The Action stands for a secret as well, because it is a stored blob.
    let secret = action(&ci, "echo secret").await;
    let key = ci.client.function.digest(b"some action");
    let request = UpdateActionResultRequest {
        action_digest: Some(key.to_wire()),
        action_result: Some(ActionResult { stdout_digest: Some(secret.to_wire()), ..Default::default() }),
        ..Default::default()
    };
    let token = &results.token.text;
    results.client.action_cache.clone().update_action_result(with(token, request)).await.unwrap();
    for (owner, inlined) in [(&ci, true), (&results, false)] {
        let request = GetActionResultRequest {
            action_digest: Some(key.to_wire()),
            inline_stdout: true,
            ..Default::default()
        };
        let request = with(&owner.token.text, request);
        let result = owner.client.action_cache.clone().get_action_result(request).await.unwrap().into_inner();
        assert_eq!(!result.stdout_raw.is_empty(), inlined);
        assert_eq!(result.stdout_digest, Some(secret.to_wire()), "the result itself is complete");
    }
}

/// The value of a key is a blob, too, and a result written over gRPC could name any blob as the value.
#[tokio::test]
async fn values_of_keys_take_the_permissions_for_blobs_as_well() {
    let roles = r#"{ results = { permissions = ["ac.read", "ac.write"] } }"#;
    let guarded = Guarded::start(&[("ACCESS__ROLES", roles)]).await;
    let [ci, results] = [guarded.token("ci").await, guarded.token("results").await];
    let (url, client) = (format!("{}/cache/key", guarded.http()), http_client());
    for (method, code) in [(Method::PUT, 201), (Method::GET, 200), (Method::HEAD, 200)] {
        for (token, expected) in [(&ci, code), (&results, 403)] {
            let request = client.request(method.clone(), &url).bearer_auth(&token.text).body("value");
            assert_eq!(request.send().await.unwrap().status(), expected, "{method}");
        }
    }
}

#[tokio::test]
async fn assets_cannot_be_pushed_where_results_of_clients_are_for_themselves_or_refused() {
    let instances = r#"{ "own" = { client_results = "private" }, "none" = { client_results = "refused" } }"#;
    let server = Server::with(&[("INSTANCES", instances)]).await;
    for (instance, why) in [("own", "private"), ("none", "refused"), ("", "")] {
        let client = Client { instance: instance.into(), ..server.client().await };
        let request = PushBlobRequest {
            instance_name: instance.into(),
            uris: vec!["https://example.com/compiler".into()],
            blob_digest: Some(client.upload("x").await.to_wire()),
            ..Default::default()
        };
        let pushed = PushClient::connect(server.endpoint()).await.unwrap().push_blob(request).await;
        match pushed {
            Ok(_) => assert_eq!(why, ""),
            Err(status) => {
                assert_eq!(status.code(), Code::PermissionDenied, "{instance}: {status}");
                assert!(!why.is_empty() && status.message().contains(why), "{instance}: {status}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_about_the_operation_of_somebody_else_ends_with_the_permission_for_those() {
    let guarded = Guarded::start(&[]).await;
    let [owner, admin] = [Owner::start(&guarded, "ci").await, Owner::start(&guarded, "admin").await];
    let directory = shared_dir();
    let gate = directory.path().join("go");
    let action = action(&owner, &format!("until [ -e '{}' ]; do sleep 0.01; done", gate.display())).await;
    let mut run = owner.run(action).await;
    let name = run.next().await.unwrap().name;
    let request = with(&admin.token.text, WaitExecutionRequest { name });
    let mut watched = admin.client.execution.clone().wait_execution(request).await.unwrap().into_inner();
    watched.message().await.unwrap();
    // It may still see its own operations.
    update(&guarded.tokens, |list| {
        let own = list.tokens.iter_mut().find(|token| token.id == admin.token.id).unwrap();
        own.roles = vec!["developer".into()];
        Ok(())
    })
    .unwrap();
    let end = timeout(PATIENCE, async {
        loop {
            if let Err(status) = watched.message().await {
                return status;
            }
        }
    });
    let end = end.await.expect("an end in time");
    assert_eq!(end.code(), Code::PermissionDenied, "{end}");
    assert!(end.message().contains("operations.all"), "{end}");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(run.finish().await.result.unwrap().exit_code, 0);
}

/// Runs `gorego token revoke` with this token.
async fn revoke(server: &Server, token: &str, ids: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.env_clear().env("GOREGO_HEADERS", format!("authorization=Bearer {token}"));
    command.args(["token", "revoke", "--endpoint", &server.endpoint()]).args(ids);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[tokio::test]
async fn administrators_of_all_instances_revoke_tokens_and_the_server_refuses_them_at_once() {
    let roles = r#"{ team-admin = { like = "admin", instances = ["team/*"] } }"#;
    let guarded = Guarded::start(&[("ACCESS__ROLES", roles)]).await;
    let [admin, gone] = [guarded.token("admin").await, guarded.token("ci").await];
    for (role, why) in [("ci", "\"admin\""), ("team-admin", "lacks any permission for instance name \"\"")] {
        let token = guarded.token(role).await;
        let refused = revoke(&guarded.server, &token.text, &[&gone.id]).await;
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && told.contains(why), "{role}: {told}");
    }
    let unknown = revoke(&guarded.server, &admin.text, &[&gone.id, "0123456789abcdef"]).await;
    let told = String::from_utf8(unknown.stderr).unwrap();
    assert!(!unknown.status.success() && told.contains("0123456789abcdef"), "{told}");
    let client = guarded.server.client().await;
    let ask = async || {
        let request = with(&gone.text, GetCapabilitiesRequest::default());
        client.capabilities.clone().get_capabilities(request).await.map(drop).map_err(|status| status.code())
    };
    assert_eq!(ask().await, Ok(()), "all or none");
    let revoked = revoke(&guarded.server, &admin.text, &[&gone.id]).await;
    assert_eq!(String::from_utf8(revoked.stdout).unwrap(), format!("revoked {} (role ci)\n", gone.id));
    assert_eq!(ask().await, Err(Code::Unauthenticated));
    eventually("the revocation and the denial are audit events", || {
        let log = guarded.server.log();
        let mut events = log.iter();
        let is_denied =
            events.any(|line| line["event"] == "access_denied" && line["method"] == "Admin/RevokeTokens");
        is_denied
            && events.any(|line| {
                line["event"] == "admin_request" && line["details"] == *gone.id && line["grpc_code"] == "OK"
            })
    })
    .await;
}

#[tokio::test]
async fn what_is_written_to_log_streams_counts_as_uploaded() {
    let server = Server::with(&[("QUOTAS__UPLOAD_PER_HOUR_GB", "2 MB")]).await;
    let client = server.client().await;
    client.run(client.action(sh("true"), empty()).await).await;
    let mut logs = LogStreamServiceClient::connect(server.endpoint()).await.unwrap();
    let stream = logs.create_log_stream(CreateLogStreamRequest::default()).await.unwrap().into_inner();
    let messages = (0..10).map(move |number| WriteRequest {
        resource_name: stream.write_resource_name.clone(),
        write_offset: number * 300_000,
        finish_write: number == 9,
        data: vec![b'x'; 300_000].into(),
    });
    let refused = client.bytes.clone().write(tokio_stream::iter(messages)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("2000000 bytes an hour"), "{refused}");
}
