//! Helpers that several test crates share: servers to test, and clients for them.
//!
//! - [`server`]: the real binary as a process. Most tests use it.
//! - [`stored`]: the positions of blobs on the disk of a server.
//! - [`endpoint`]: a gRPC endpoint in the process of the test, for tests that put something else behind it.
//! - [`images`]: container images.
//! - [`key_server`], [`tokens`]: the keys and the signed tokens of an issuer.
//! - [`worker`]: a worker alone, with an in-memory store.
//! - [`certificates`]: a CA and the certificates that it signs.
//! - [`client`]: clients of all services on one connection.
//!
//! Each test crate includes this directory as a module and uses a part of it.

#![allow(dead_code, unused_imports, clippy::unwrap_used, missing_docs)]

pub(crate) mod certificates;
pub(crate) mod client;
pub(crate) mod endpoint;
pub(crate) mod images;
pub(crate) mod key_server;
pub(crate) mod server;
pub(crate) mod stored;
pub(crate) mod tokens;
pub(crate) mod worker;

pub(crate) use client::*;
pub(crate) use server::{Server, command, files_below, shared_dir};
pub(crate) use stored::{Kind, damage, record_of};

use std::{
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

/// Time limit of each wait in a test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the condition holds; panics with `what` after the time limit.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    eventually_async(what, || std::future::ready(condition())).await;
}

/// Like [`eventually`], with an asynchronous condition.
pub(crate) async fn eventually_async<F: Future<Output = bool>>(what: &str, condition: impl FnMut() -> F) {
    eventually_every(Duration::from_millis(10), what, condition).await;
}

/// Like [`eventually_async`], with a longer interval between checks of the condition, because each check leaves a
/// trace.
pub(crate) async fn eventually_every<F: Future<Output = bool>>(
    interval: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(interval).await;
    }
}

/// Waits for the end of a process; panics with `what` after the time limit.
pub(crate) async fn exit_of(child: &mut Child, what: &str) -> ExitStatus {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > end {
            let _ = child.kill();
            panic!("never happened: {what}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
