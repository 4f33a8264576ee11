//! A new configuration while the server runs: SIGHUP and `gorego config reload`.

use crate::{
    admin::gorego,
    support::{Client, Server, command, empty, eventually, metadata, sh, shared_dir},
};
use gorego_reapi::proto::reapi::{FindMissingBlobsRequest, Platform, platform::Property};
use serde_json::Value;
use std::{fs, path::PathBuf, sync::Arc};
use tempfile::TempDir;
use tonic::Code;

/// A server with a configuration file.
struct Configured {
    server: Server,
    file: PathBuf,
    _directory: TempDir,
}

impl Configured {
    fn start(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("gorego.toml");
        fs::write(&file, text).unwrap();
        let store = Arc::new(tempfile::tempdir().unwrap());
        let mut command = command(store.path());
        command.arg("--config").arg(&file);
        Self { server: Server::spawn(command, store), file, _directory: directory }
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).unwrap();
    }

    async fn reload(&self) -> Value {
        let output = gorego(&self.server, &["config", "reload", "--json"]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn keys(changes: &Value) -> Vec<&str> {
    changes.as_array().unwrap().iter().map(|change| change["key"].as_str().unwrap()).collect()
}

async fn asking(client: &Client, script: &str, arch: &str) -> gorego_reapi::digest::Digest {
    let property = Property { name: "Arch".into(), value: arch.into() };
    client
        .action_with(sh(script), empty(), |action| {
            action.platform = Some(Platform { properties: vec![property] });
        })
        .await
}

const POOLS: &str = "[execution.pools.one]\nslots = 1\nproperties = { Arch = \"one\" }\n";

/// Actions that run in a replaced or removed pool continue, and new actions go to the current pools.
#[tokio::test]
async fn pools_come_and_go_with_the_configuration_and_nothing_that_runs_is_lost() {
    let configured = Configured::start(&format!(
        "{POOLS}[execution.pools.old]\nslots = 1\nproperties = {{ Arch = \"old\" }}\n"
    ));
    let client = configured.server.client().await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let script = format!("until test -e {}; do sleep 0.02; done; echo whole", gate.display());
    let mut running = Vec::new();
    for arch in ["one", "old"] {
        let mut run = client.start(asking(&client, &script, arch).await).await;
        run.until(|operation| metadata(operation).stage == 3).await;
        running.push(run);
    }
    configured.write(
        "[execution.pools.one]\nslots = 2\nproperties = { Arch = \"one\" }\n\
         [execution.pools.new]\nslots = 1\nproperties = { Arch = \"new\" }\n",
    );
    let reloaded = configured.reload().await;
    assert_eq!(
        keys(&reloaded["applied"]),
        ["execution.pools.new", "execution.pools.one", "execution.pools.old"],
        "{reloaded}"
    );
    assert_eq!(reloaded["needs_restart"], Value::Array(vec![]));
    assert_eq!(reloaded["applied"][1]["description"], "replaced: slots 1 -> 2; its running actions continue");
    for arch in ["new", "one"] {
        let result = client.run(asking(&client, "echo here", arch).await).await.result.unwrap();
        let worker = result.execution_metadata.unwrap().worker;
        assert!(worker.contains(&format!("/{arch}/")), "{worker}");
    }
    fs::write(&gate, "").unwrap();
    for run in running {
        let result = run.finish().await.result.unwrap();
        assert_eq!(client.stdout(&result).await, "whole\n");
    }
    eventually("the old pools are gone", || {
        let log = configured.server.log();
        let gone = log.iter().filter(|line| line["event"] == "pool_removed");
        gone.map(|line| line["pool"].as_str().unwrap().to_owned()).collect::<std::collections::BTreeSet<_>>()
            == ["old".to_owned(), "one".to_owned()].into()
    })
    .await;
    let refused = client.start_request(client.request(asking(&client, "true", "old").await)).await;
    assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::FailedPrecondition));
    assert_eq!(keys(&configured.reload().await["applied"]), [""; 0], "a second reload changes nothing");
}

#[tokio::test]
async fn a_bad_file_changes_nothing_and_the_answer_names_key_and_value() {
    let configured = Configured::start(POOLS);
    configured
        .write("[execution.pools.one]\nslots = 3\n[cache]\nzstd_level = 99\n[log]\nfilter = \"debug\"\n");
    let output = gorego(&configured.server, &["config", "reload"]).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("cache.zstd_level = 99") && said.contains("between 1 and 19"), "{said}");
    assert!(said.contains("gorego.toml:4"), "the line is named: {said}");
    eventually("the refusal is logged", || {
        configured.server.log().iter().any(|line| line["event"] == "config_refused")
    })
    .await;
    let log = configured.server.log();
    assert!(log.iter().all(|line| line["event"] != "pool_added" && line["level"] != "DEBUG"));

    // A dry run shows a valid change, and the next reload makes it.
    configured.write(&format!("shutdown_grace = \"7s\"\n[log]\nfilter = \"gorego=debug\"\n{POOLS}"));
    let dry = gorego(&configured.server, &["config", "reload", "--dry-run"]).await;
    let said = String::from_utf8(dry.stdout).unwrap();
    assert!(
        said.contains("would change: log.filter") && said.contains("needs a restart: shutdown_grace"),
        "{said}"
    );
    let reloaded = configured.reload().await;
    assert_eq!(keys(&reloaded["applied"]), ["log.filter"]);
    assert_eq!(reloaded["needs_restart"][0]["description"], "\"30s\" -> \"7s\"");
    let client = configured.server.client().await;
    client.run_command(sh("true")).await;
    eventually("details are logged", || {
        configured.server.log().iter().any(|line| line["event"] == "action_finished")
    })
    .await;
}

/// A server without a terminal reloads its configuration on SIGHUP.
#[tokio::test]
async fn a_hangup_reloads_the_allow_lists_without_a_pause() {
    let configured = Configured::start("[assets]\nallowed_hosts = []\n");
    configured.write(
        "[assets]\nallowed_hosts = [\"127.0.0.1\"]\n[http]\nallowed_hosts = [\"cache.example.com\"]\n",
    );
    configured.server.signal("HUP");
    eventually("the configuration is reloaded", || {
        configured.server.log().iter().any(|line| {
            line["event"] == "config_reloaded"
                && line["applied"] == "http.allowed_hosts, assets.allowed_hosts"
                && line["needs_restart"] == ""
        })
    })
    .await;
    let client = configured.server.client().await;
    assert_eq!(client.run_command(sh("true")).await.exit_code, 0);
}

#[tokio::test]
async fn quotas_count_as_soon_as_they_are_configured_and_no_longer_than_that() {
    let configured = Configured::start("");
    let client = configured.server.client().await;
    let ask = async || {
        let request = FindMissingBlobsRequest::default();
        client.cas.clone().find_missing_blobs(request).await.map(|_| ()).map_err(|status| status.code())
    };
    for _ in 0..10 {
        ask().await.unwrap();
    }
    configured.write("[quotas]\nrequests_per_second = 1\n");
    assert_eq!(keys(&configured.reload().await["applied"]), ["quotas"]);
    let mut answers = Vec::new();
    // A slow machine may need more than the burst.
    while answers.len() < 1_000 && answers.last() != Some(&Err(Code::ResourceExhausted)) {
        answers.push(ask().await);
    }
    assert_eq!(answers.last(), Some(&Err(Code::ResourceExhausted)));
    configured.write("");
    assert_eq!(keys(&configured.reload().await["applied"]), ["quotas"]);
    for _ in 0..10 {
        ask().await.unwrap();
    }
}
