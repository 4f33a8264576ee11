//! Request headers: many large ones of calls that do not continue, and headers that never end.

use crate::{
    decoding::FIND_MISSING,
    harness::{Bystander, assert_memory_is_bounded},
    raw::{self, END_HEADERS, HEADERS},
    support::{Server, eventually},
};
use gorego_reapi::proto::reapi::FindMissingBlobsRequest;
use std::{io::Write as _, net::TcpStream};

fn connect(server: &Server) -> TcpStream {
    let mut socket = raw::connect_from("127.0.0.1", server.address().parse().unwrap());
    socket.write_all(&raw::preface()).unwrap();
    socket
}

/// The start of a call with 1,850 fields of one byte each: references to a name that the first call has put into the
/// table.
fn large_head(stream: u32) -> Vec<u8> {
    const NAMES: u8 = 26;
    let mut block = raw::header_block(FIND_MISSING);
    if stream == 1 {
        (0..NAMES).for_each(|name| block.extend([0x40, 1, b'a' + name, 0]));
    } else {
        block.extend((0..NAMES).cycle().take(1_850).map(|name| 0x80 | (62 + name)));
    }
    raw::frame(HEADERS, END_HEADERS, stream, &block)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_with_large_heads_that_do_not_go_on_are_refused_when_they_take_too_much() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let mut socket = connect(&server);
    let socket = tokio::task::spawn_blocking(move || {
        let mut reader = socket.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        raw::streams().take(5_000).for_each(|stream| socket.write_all(&large_head(stream)).unwrap());
        socket
    });
    let socket = socket.await.unwrap();
    let is_refused = |line: &serde_json::Value| {
        line["grpc_code"] == "RESOURCE_EXHAUSTED"
            && line["error"].as_str().is_some_and(|error| error.contains("bytes of large headers"))
    };
    eventually("a call is refused", || server.log().iter().any(is_refused)).await;
    // Headers of the usual size are answered meanwhile, even on the same connection.
    let mut other = connect(&server);
    tokio::task::spawn_blocking(move || {
        raw::call_and_wait(&mut other, 1, FIND_MISSING, &FindMissingBlobsRequest::default());
    })
    .await
    .unwrap();
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    drop(socket);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_connection_ends_before_its_message_is_logged_as_cancelled() {
    let server = Server::start().await;
    let mut socket = connect(&server);
    tokio::task::spawn_blocking(move || {
        socket.write_all(&raw::headers(1, FIND_MISSING)).unwrap();
        raw::ping(&mut socket);
    })
    .await
    .unwrap();
    let line = || {
        server.log().into_iter().find(|line| line["method"] == "ContentAddressableStorage/FindMissingBlobs")
    };
    eventually("the call is logged", || line().is_some()).await;
    assert_eq!(line().unwrap()["grpc_code"], "CANCELLED", "{}", line().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_over_http_that_never_end_are_not_collected() {
    let server = Server::with(&[("HTTP__LISTEN_ADDR", "127.0.0.1:0")]).await;
    let bystander = Bystander::beside(&server).await;
    let address = server.http_address();
    let sockets = tokio::task::spawn_blocking(move || {
        let head = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX-A: {}", "a".repeat(390_000));
        let connect = |_| {
            let mut socket = raw::connect_from("127.0.0.1", address);
            // The server answers and closes before it has read all of it.
            let _ = socket.write_all(head.as_bytes());
            socket
        };
        (0..1_800).map(connect).collect::<Vec<_>>()
    });
    let sockets = sockets.await.unwrap();
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    drop(sockets);
}
