//! Many connections: silent ones, incomplete ones, and more than the server has places for.

use crate::{
    harness::{Bystander, assert_memory_is_bounded, connect_from},
    raw,
    support::{Server, sh},
};
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    time::Duration,
};
use tokio::time::timeout;

/// Connections of one peer: silent ones, ones with half a preface, and ones that only send the preface.
fn connect_many(address: SocketAddr) -> Vec<TcpStream> {
    let connect = |n: usize| {
        let mut socket = raw::connect_from("127.0.0.1", address);
        let _ = match n % 3 {
            0 => Ok(()),
            1 => socket.write_all(&raw::preface()[..10]),
            _ => socket.write_all(&raw::preface()),
        };
        socket
    };
    (0..1_500).map(connect).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_peer_cannot_take_all_connections_nor_the_descriptors_of_files_and_commands() {
    // 4,096 descriptors leave 512 for connections.
    let server = Server::after("ulimit -n 4096").await;
    let bystander = Bystander::beside(&server).await;
    let address: SocketAddr = server.address().parse().unwrap();
    let sockets = tokio::task::spawn_blocking(move || connect_many(address)).await.unwrap();
    let fresh = async {
        let mut client = CapabilitiesClient::new(connect_from("127.0.0.3", &server).await);
        client.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
        // The same address is served too, because idle connections are closed to make room.
        let mut client = CapabilitiesClient::new(connect_from("127.0.0.1", &server).await);
        client.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
    };
    timeout(Duration::from_secs(5), fresh).await.expect("new connections are served");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    assert!(descriptors < 700, "{descriptors} descriptors are open");
    // Commands and files work meanwhile.
    let client = server.client().await;
    let ran = timeout(Duration::from_secs(20), client.run_command(sh("echo hello"))).await.expect("it ends");
    assert_eq!(client.stdout(&ran).await, "hello\n");
    bystander.leave().await;
    assert_memory_is_bounded(&server);
    drop(sockets);
}
