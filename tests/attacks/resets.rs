//! Frames that cost their sender nothing: streams that are opened and cancelled (CVE-2023-44487) or reset, frames of
//! streams that are not open, pings, empty frames, and headers without an end. A connection that sends too many is
//! closed with ENHANCE_YOUR_CALM.

use crate::{
    harness::{Bystander, assert_memory_is_bounded},
    raw::{self, CONTINUATION, DATA, ENHANCE_YOUR_CALM, HEADERS, PING, RST_STREAM, SETTINGS},
    support::{Server, eventually},
};
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use std::{io::Write as _, net::TcpStream, time::Duration};

const CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
const WRITE: &str = "/google.bytestream.ByteStream/Write";
const CANCEL: [u8; 4] = 8u32.to_be_bytes();

fn connect(server: &Server) -> TcpStream {
    let mut socket = raw::connect_from("127.0.0.1", server.address().parse().unwrap());
    socket.write_all(&raw::preface()).unwrap();
    socket
}

/// A stream that is opened and cancelled at once.
fn opened_and_cancelled(stream: u32) -> Vec<u8> {
    let mut bytes = raw::headers(stream, CAPABILITIES);
    bytes.extend(raw::frame(RST_STREAM, 0, stream, &CANCEL));
    bytes
}

/// A stream that the server has to reset, because trailers must end it (CVE-2025-8671, "MadeYouReset").
fn opened_and_malformed(stream: u32) -> Vec<u8> {
    raw::headers(stream, CAPABILITIES).repeat(2)
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_cancel_what_they_open_are_closed() {
    let mut server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    for flood in [opened_and_cancelled, opened_and_malformed] {
        for _ in 0..2 {
            let mut socket = connect(&server);
            tokio::task::spawn_blocking(move || {
                let floods = raw::streams().take(50_000).map(flood).collect::<Vec<_>>();
                raw::write_until_closed(&mut socket, floods.chunks(100).map(<[_]>::concat));
            })
            .await
            .unwrap();
        }
    }
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    let log = log_to_the_end(&mut server).await;
    let closed = log.iter().filter(|line| line["event"] == "connections_closed");
    let resets = closed.filter(|line| line["reason"] == "too_many_resets" && line["peer"] == "127.0.0.1");
    assert_eq!(resets.map(|line| line["connections"].as_u64().unwrap()).sum::<u64>(), 4);
}

/// The HTTP/2 library takes every stream below the highest one for a stream that it has forgotten, and queues a reset
/// for each frame of one.
#[tokio::test(flavor = "multi_thread")]
async fn frames_of_streams_that_were_never_opened_are_not_answered_without_end() {
    const HIGHEST: u32 = (1 << 31) - 3;
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    for frame_bytes in [1, 1_024] {
        let mut socket = connect(&server);
        socket.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        tokio::task::spawn_blocking(move || {
            socket.write_all(&raw::headers(HIGHEST, WRITE)).unwrap();
            let data = vec![0; frame_bytes];
            let mut frames = raw::streams().take(1_000_000).map(|stream| raw::frame(DATA, 0, stream, &data));
            let pieces = std::iter::from_fn(|| {
                let piece: Vec<_> = frames.by_ref().take(1_000).collect();
                (!piece.is_empty()).then(|| piece.concat())
            });
            // The server closes the connection, or does not read it either.
            raw::write_until_closed(&mut socket, pieces);
        })
        .await
        .unwrap();
        assert_memory_is_bounded(&server);
    }
    bystander.leave().await;
}

/// A build tool that cancels thousands of actions is served, and the log reports them without a line for each.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_calls_are_counted_where_there_are_too_many_to_list() {
    const CALLS: u64 = 4_000;
    let server = Server::start().await;
    let mut socket = connect(&server);
    tokio::task::spawn_blocking(move || {
        let mut streams = raw::streams();
        for stream in streams.by_ref().take(CALLS as usize) {
            socket.write_all(&raw::headers(stream, WRITE)).unwrap();
        }
        // A stream that is cancelled before it was accepted costs nothing and is not counted.
        let next = streams.next().unwrap();
        raw::call_and_wait(&mut socket, next, CAPABILITIES, &GetCapabilitiesRequest::default());
        for stream in raw::streams().take(CALLS as usize) {
            socket.write_all(&raw::frame(RST_STREAM, 0, stream, &CANCEL)).unwrap();
        }
        raw::ping(&mut socket);
    })
    .await
    .unwrap();
    let told = || {
        let log = server.log();
        let events = |name: &'static str| log.iter().filter(move |line| line["event"] == name);
        let cancelled = |line: &&serde_json::Value| line["method"] == "ByteStream/Write";
        let listed = events("rpc_finished").filter(cancelled).count() as u64;
        let counted = events("rpcs_not_listed").map(|line| line["rpcs"].as_u64().unwrap()).sum::<u64>();
        (listed, counted)
    };
    // Before the shutdown, which does not wait until the last call has noticed its cancellation.
    eventually("the log tells of every call", || told().0 + told().1 >= CALLS).await;
    let (listed, counted) = told();
    assert!((100..1_000).contains(&listed), "{listed} were listed, {counted} were counted");
    assert_eq!(listed + counted, CALLS, "{listed} were listed, {counted} were counted");
}

async fn log_to_the_end(server: &mut Server) -> Vec<serde_json::Value> {
    server.signal("TERM");
    server.exit().await;
    let is_last = |event: &serde_json::Value| event["event"] == "server_stopped";
    eventually("the last line is read", || server.log().iter().any(is_last)).await;
    server.log()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_floods_is_told_to_be_calm() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let floods: [(&str, Vec<u8>); 4] = [
        ("pings", raw::frame(PING, 1, 0, &[0; 8])),
        ("settings", raw::frame(SETTINGS, 0, 0, &[])),
        ("unknown frames", raw::frame(0x77, 0, 0, &[])),
        ("empty data", raw::frame(DATA, 0, 1, &[])),
    ];
    for (what, flood) in floods {
        let mut socket = connect(&server);
        let code = tokio::task::spawn_blocking(move || {
            socket.write_all(&raw::headers(1, WRITE)).unwrap();
            for _ in 0..200 {
                if socket.write_all(&flood.repeat(1_000)).is_err() {
                    break;
                }
            }
            raw::goodbye(&mut socket)
        })
        .await
        .unwrap();
        // The connection is reset when unread bytes are left, and the GOAWAY may be lost with it.
        assert!(code.is_none_or(|code| code == ENHANCE_YOUR_CALM), "{what}: {code:?}");
    }
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_without_an_end_is_not_collected() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let mut socket = connect(&server);
    tokio::task::spawn_blocking(move || {
        socket.write_all(&raw::frame(HEADERS, 0, 1, &raw::header_block(CAPABILITIES))).unwrap();
        // Each frame adds another header.
        let more = raw::frame(CONTINUATION, 0, 1, &[0, 1, b'a', 1, b'b'].repeat(100));
        raw::write_until_closed(&mut socket, (0..200_000).map(|_| more.clone()));
    })
    .await
    .unwrap();
    bystander.leave().await;
    assert_memory_is_bounded(&server);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_calls_that_are_begun_and_never_made_leave_others_alone() {
    let server = Server::start().await;
    let bystander = Bystander::beside(&server).await;
    let mut sockets: Vec<TcpStream> = (0..3).map(|_| connect(&server)).collect();
    let sockets = tokio::task::spawn_blocking(move || {
        for socket in &mut sockets {
            let mut streams = raw::streams();
            for stream in streams.by_ref().take(7_000) {
                socket.write_all(&raw::headers(stream, WRITE)).unwrap();
            }
            let next = streams.next().unwrap();
            raw::call_and_wait(socket, next, CAPABILITIES, &GetCapabilitiesRequest::default());
        }
        sockets
    })
    .await
    .unwrap();
    bystander.leave().await;
    drop(sockets);
    assert_memory_is_bounded(&server);
}
