//! `gorego verify` as a user runs it: the real suite against the real server.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "wire/support.rs"]
mod support;

use serde_json::Value;
use std::{
    collections::BTreeMap,
    process::{Command, Output},
    time::{Duration, Instant},
};
use support::Server;

/// Runs `gorego verify` with these arguments; whatever it does, it does in a minute.
async fn verify(args: &[&str]) -> Output {
    let begin = Instant::now();
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let run = move || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
        command.arg("verify").args(args).env_clear().output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_server_passes() {
    let server = Server::start().await;
    let output = verify(&[&server.endpoint(), "--json"]).await;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let bad: Vec<&Value> = checks
        .iter()
        .filter(|check| ["fail", "warn"].contains(&check["outcome"].as_str().unwrap()))
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(output.status.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_is_listed_with_its_checks() {
    let output = verify(&["--list"]).await;
    let text = stdout(&output);
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with(' ')) {
        *counts.entry(line.split('-').next().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(counts.values().sum::<i32>(), 220, "{counts:?}");
    assert_eq!((counts["GEN"], counts["EXE"], counts["LOG"]), (30, 64, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_and_nonsense_are_told_apart_from_a_bad_server() {
    for args in [&["grpc://127.0.0.1:1"][..], &["nonsense"], &["--only", "XYZ-99"], &["--jobs", "0"]] {
        let output = verify(args).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stdout(&output));
        assert!(!output.stderr.is_empty());
    }
}
