//! Abandoned work: when it continues, and when it gives up its slot.

use crate::execution::running;
use crate::support::{Client, PATIENCE, Run, Server, empty, eventually, metadata, response, sh, shared_dir};
use gorego_reapi::proto::reapi::WaitExecutionRequest;
use std::time::{Duration, Instant};
use tonic::Code;

/// Waits until an action has a slot and returns the name of its operation.
async fn begin(client: &Client, script: &str) -> (Run, String) {
    let mut run = client.start(client.action(sh(script), empty()).await).await;
    let name = run.until(|operation| metadata(operation).stage == 3).await.name;
    (run, name)
}

async fn wait_execution(client: &Client, name: &str) -> Run {
    let request = WaitExecutionRequest { name: name.into() };
    Run(client.execution.clone().wait_execution(request).await.unwrap().into_inner())
}

/// Ctrl-C: two interrupted actions occupy two slots when the next build starts one tiny action.
#[tokio::test]
async fn an_interrupted_build_does_not_block_the_next_one() {
    let server = Server::with(&[("EXECUTION__CONCURRENCY", "2")]).await;
    let client = server.client().await;
    let mut names = Vec::new();
    for script in ["sleep 7461", "sleep 7462"] {
        names.push(begin(&client, script).await.1);
    }
    let next = server.client().await;
    let asked = Instant::now();
    let result = next.run_command(sh("echo tiny")).await;
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert_eq!(next.stdout(&result).await, "tiny\n");
    let (mut goes_on, mut made_way) = (0, 0);
    for name in names {
        let first = wait_execution(&client, &name).await.next().await.unwrap();
        if first.done {
            assert_eq!(
                response(&first).status.unwrap().code,
                Code::Unavailable as i32,
                "to be executed again"
            );
            made_way += 1;
        } else {
            goes_on += 1;
        }
    }
    assert_eq!((goes_on, made_way), (1, 1), "one slot was needed");
    eventually("the one that made way is gone", || {
        ["sleep 7461", "sleep 7462"].into_iter().filter(|marker| running(marker)).count() == 1
    })
    .await;
}

/// EXE-12, EXE-14: a broken connection, while other work waits for its slot.
#[tokio::test]
async fn a_client_that_comes_back_at_once_finds_its_work() {
    // Enough time to reconnect, even on a slow machine.
    let settings = [("EXECUTION__CONCURRENCY", "1"), ("EXECUTION__CONTENDED_ABANDON_GRACE", "6s")];
    let server = Server::with(&settings).await;
    let dir = shared_dir();
    let gate = dir.path().join("gate");
    let client = server.client().await;
    let script = format!("until test -e {}; do sleep 0.02; done; echo mine", gate.display());
    let (run, name) = begin(&client, &script).await;
    let other = server.client().await;
    let waiting = other.start(other.action(sh("echo other"), empty()).await).await;
    drop(run);
    drop(client);
    let client = server.client().await;
    let mut back = wait_execution(&client, &name).await;
    assert_eq!(metadata(&back.next().await.unwrap()).stage, 3);
    // Longer than the grace period of abandoned work.
    tokio::time::sleep(Duration::from_secs(9)).await;
    std::fs::write(&gate, "").unwrap();
    let result = back.finish().await.result.unwrap();
    assert_eq!(client.stdout(&result).await, "mine\n");
    let result = tokio::time::timeout(PATIENCE, waiting.finish()).await.unwrap().result.unwrap();
    assert_eq!(other.stdout(&result).await, "other\n");
}
