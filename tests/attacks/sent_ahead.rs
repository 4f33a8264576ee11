//! Bytes that HTTP/2 lets clients send ahead to calls whose handlers do not read: 32 MiB on each of many connections.

use crate::{
    decoding::FIND_MISSING,
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    open_requests::hold_the_room_to_decode,
    raw::{self, ACK, DATA, RST_STREAM, SETTINGS, WINDOW_UPDATE},
    support::{Server, sha256},
};
use futures::{future::try_join_all, stream};
use gorego_client::stubs::ByteStreamClient;
use gorego_reapi::proto::bytestream::WriteRequest;
use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};
use tokio::time::timeout;
use tonic::transport::Channel;

const CONNECTIONS: usize = 32;
const FRAME: usize = 16 * 1024;
/// Most bytes that are written to one connection besides headers: two streams fill its window.
const FRAMES_PER_STREAM: usize = 1_000;

/// How long the server does not read until it counts as having stopped.
const STOPPED: Duration = Duration::from_secs(3);

/// Opens two calls that wait for their turn to be decoded, and sends as much behind their messages as the windows
/// allow. May cancel the second one then. Returns whether the server stopped reading before that.
fn send_ahead(server: SocketAddr, cancels: bool) -> (TcpStream, bool) {
    let mut socket = raw::connect_from("127.0.0.1", server);
    socket.write_all(&[raw::preface(), raw::frame(SETTINGS, ACK, 0, &[])].concat()).unwrap();
    raw::read_until(&mut socket, |kind, _, stream| kind == WINDOW_UPDATE && stream == 0);
    socket.set_write_timeout(Some(STOPPED)).unwrap();
    // A compressed message may become large, however small it is.
    let message = [vec![1, 0, 0, 4, 0], vec![7; 1_024]].concat();
    let mut send = || {
        for stream in [1, 3] {
            let beginning = [raw::headers(stream, FIND_MISSING), raw::frame(DATA, 0, stream, &message)];
            socket.write_all(&beginning.concat())?;
            let junk = raw::frame(DATA, 0, stream, &[0; FRAME]);
            (0..FRAMES_PER_STREAM).try_for_each(|_| socket.write_all(&junk))?;
        }
        if cancels {
            const CANCEL: [u8; 4] = [0, 0, 0, 8];
            socket.write_all(&raw::frame(RST_STREAM, 0, 3, &CANCEL))?;
            raw::ping_within(&mut socket, STOPPED)?;
        }
        Ok::<_, std::io::Error>(())
    };
    let was_stopped = match send() {
        Ok(()) => false,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
        Err(error) => panic!("the server closed the connection: {error}"),
    };
    (socket, was_stopped)
}

/// Uploads many blobs concurrently on one connection.
async fn upload_in_parallel(channel: Channel, seed: u8) {
    const UPLOADS: u8 = 48;
    const PIECE: usize = 256 * 1024;
    const PIECES: usize = 4;
    let uploads = (0..UPLOADS).map(|number| {
        let content = [seed, number].repeat(PIECE * PIECES / 2);
        let name = format!("uploads/c0ffee00-0000-4000-8000-{number:012x}/blobs/{}", sha256(&content));
        let pieces: Vec<_> = (0..PIECES)
            .map(|at| WriteRequest {
                resource_name: name.clone(),
                write_offset: (at * PIECE) as i64,
                finish_write: at + 1 == PIECES,
                data: content[at * PIECE..(at + 1) * PIECE].to_vec().into(),
            })
            .collect();
        let mut client = ByteStreamClient::new(channel.clone());
        async move { client.write(stream::iter(pieces)).await }
    });
    let uploads = timeout(Duration::from_secs(30), try_join_all(uploads)).await;
    uploads.expect("all uploads come through").unwrap();
}

/// The other clients are another peer, and another connection of the same peer. The latter has no share left, and
/// continues with what every connection may send ahead.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_ahead_of_slow_handlers_is_bounded_and_uploads_beside_it_come_through() {
    let server = Server::start().await;
    let address = server.address().parse().unwrap();
    let bystander = Bystander::beside(&server).await;
    let holding = hold_the_room_to_decode(&server).await;
    let senders = (0..CONNECTIONS).map(|_| tokio::task::spawn_blocking(move || send_ahead(address, false)));
    let sockets = futures::future::join_all(senders).await;
    let sockets: Vec<_> = sockets.into_iter().map(Result::unwrap).collect();
    assert_memory_is_bounded(&server);
    assert!(sockets.iter().any(|(_, was_stopped)| *was_stopped), "the server stopped reading");
    upload_in_parallel(connect_from("127.0.0.3", &server).await, 3).await;
    upload_in_parallel(connect_from("127.0.0.1", &server).await, 1).await;
    assert!(holding.iter().all(|call| !call.is_finished()), "the attack went on all the time");
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    drop(sockets);
    holding.iter().for_each(tokio::task::JoinHandle::abort);
}

/// The bytes that a call is ahead count fully, even if another call was ahead before.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_cancelled_do_not_hide_what_others_are_ahead() {
    let server = Server::start().await;
    let address = server.address().parse().unwrap();
    let holding = hold_the_room_to_decode(&server).await;
    let mut sockets = Vec::new();
    let mut was_stopped = false;
    while !was_stopped && sockets.len() < CONNECTIONS {
        let sent = tokio::task::spawn_blocking(move || send_ahead(address, true)).await;
        let socket;
        (socket, was_stopped) = sent.unwrap();
        sockets.push(socket);
    }
    assert!(was_stopped, "the server stopped reading");
    assert_memory_is_bounded(&server);
    drop(sockets);
    holding.iter().for_each(tokio::task::JoinHandle::abort);
}
