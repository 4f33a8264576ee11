//! Long work has places that peers and their connections share: if one of them wants more than its share, only its own
//! work waits.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    support::{PATIENCE, Server, eventually},
};
use axum::{Router, routing::get};
use gorego_client::stubs::FetchClient;
use gorego_reapi::proto::asset::{FetchBlobRequest, FetchBlobResponse};
use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{net::TcpListener, time::timeout};
use tonic::{Code, transport::Channel};

/// Number of concurrent downloads of the server, and of one connection.
const CONCURRENCY: usize = 8;
const SHARE: usize = 6;
/// Number of downloads that the hostile client starts.
const FETCHES: usize = 100;

/// Fetches the content at this path of an origin.
async fn fetch(channel: &Channel, origin: &str, path: &str) -> FetchBlobResponse {
    let uris = vec![format!("http://{origin}{path}")];
    let request = FetchBlobRequest { uris, ..Default::default() };
    FetchClient::new(channel.clone()).fetch_blob(request).await.unwrap().into_inner()
}

fn is_ok(response: &FetchBlobResponse) -> bool {
    response.status.as_ref().is_some_and(|status| status.code == Code::Ok as i32)
}

/// AST-09: this also holds for a download that the first connection has requested, and that waits behind all other
/// downloads of that connection. The other clients are another connection of the same peer, and another peer.
#[tokio::test]
async fn downloads_that_hang_hold_up_nobody_but_their_own_client() {
    let hanging = Arc::new(AtomicUsize::new(0));
    let count = hanging.clone();
    let hang = move || {
        count.fetch_add(1, Ordering::SeqCst);
        pending::<String>()
    };
    let router = Router::new().route("/hang/{n}", get(hang)).fallback(async || "content");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

    let concurrency = CONCURRENCY.to_string();
    let settings =
        [("ASSETS__ALLOWED_HOSTS", r#"["127.0.0.1"]"#), ("ASSETS__CONCURRENCY", concurrency.as_str())];
    let server = Server::with(&settings).await;
    let bystander = Bystander::beside(&server).await;
    let hostile = connect_from("127.0.0.1", &server).await;
    let start = |path: String| {
        let (hostile, origin) = (hostile.clone(), origin.clone());
        tokio::spawn(async move { fetch(&hostile, &origin, &path).await })
    };
    let hung: Vec<_> = (0..FETCHES).map(|n| start(format!("/hang/{n}"))).collect();
    eventually("the hostile client has its share", || hanging.load(Ordering::SeqCst) == SHARE).await;
    for address in ["127.0.0.1", "127.0.0.2"] {
        let popular = start(format!("/popular/{address}"));
        let other = connect_from(address, &server).await;
        for path in ["/other/", "/popular/", "/another/"].map(|path| format!("{path}{address}")) {
            let response =
                timeout(PATIENCE, fetch(&other, &origin, &path)).await.expect("another one is served");
            assert!(is_ok(&response), "{response:?}");
        }
        assert!(is_ok(&timeout(PATIENCE, popular).await.expect("it was fetched for both").unwrap()));
    }
    assert_eq!(hanging.load(Ordering::SeqCst), SHARE, "the attack went on all the time, and got no more");
    for fetch in hung {
        fetch.abort();
    }
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}
