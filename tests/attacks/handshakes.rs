//! Handshakes that do not end: many of them, slow, and from one address.

use crate::{
    harness::{BYSTANDER_LIMIT, assert_memory_is_bounded},
    raw,
    support::{
        PATIENCE, Server,
        certificates::{Authority, VALID},
        eventually,
    },
};
use gorego_client::stubs::CapabilitiesClient;
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

/// Connections of the attacker: more than there are places for handshakes.
const SLOW: usize = 1_000;
/// The beginning of a ClientHello: it says that 300 more bytes follow.
const OPENING: &[u8] = &[0x16, 3, 1, 1, 0x30, 1, 0, 1, 0x2c, 3, 3];

/// A slow client holds a place for ten seconds. All other clients get a place at once.
#[tokio::test(flavor = "multi_thread")]
async fn slow_handshakes_of_one_address_hold_nobody_else_up_and_end() {
    let (directory, ca) = (tempfile::tempdir().unwrap(), Authority::new("ca"));
    let (cert, key) = ca.server(VALID).write(directory.path(), "server");
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let server = Server::with(&[("TLS__CERT", cert), ("TLS__KEY", key)]).await;
    let address: SocketAddr = server.address().parse().unwrap();
    let slow = tokio::task::spawn_blocking(move || {
        let connect = |at: usize| {
            let mut socket = raw::connect_from("127.0.0.1", address);
            // Some connections send nothing, others send the beginning.
            socket.write_all(if at.is_multiple_of(4) { &[] } else { OPENING }).unwrap();
            socket
        };
        (0..SLOW).map(connect).collect::<Vec<_>>()
    });
    let mut slow = slow.await.unwrap();
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca.pem()));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", address.port())).unwrap();
    let from: IpAddr = "127.0.0.2".parse().unwrap();
    let endpoint = endpoint.tls_config(tls).unwrap().local_address(Some(from));
    let started = Instant::now();
    for _ in 0..20 {
        let begin = Instant::now();
        let mut client = CapabilitiesClient::new(endpoint.connect().await.unwrap());
        client.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
        assert!(begin.elapsed() < BYSTANDER_LIMIT, "a new connection waited {:?}", begin.elapsed());
    }
    assert!(started.elapsed() < Duration::from_secs(10), "no handshake was given up meanwhile");
    // One byte more does not extend the time.
    for socket in slow.iter_mut().enumerate().filter_map(|(at, socket)| (at % 4 != 0).then_some(socket)) {
        let _ = socket.write_all(&[0]);
    }
    eventually("slow handshakes are given up and counted", || {
        let ended = server.log().into_iter().filter(|event| event["event"] == "handshakes_failed");
        let ended = ended.filter(|event| event["reason"] == "slow" && event["peer"] == "127.0.0.1");
        ended.map(|event| event["connections"].as_u64().unwrap()).sum::<u64>() >= SLOW as u64
    })
    .await;
    assert!(started.elapsed() < PATIENCE);
    assert_memory_is_bounded(&server);
}
