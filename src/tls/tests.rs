//! Tests of handshakes over loopback, with certificates that the tests create.

#[allow(dead_code, missing_docs)]
#[path = "../../tests/support/certificates.rs"]
mod certificates;

use super::*;
use crate::{
    connections::{Admitted, HandshakeProblem},
    quick_ack::QuickAck,
};
use certificates::{Authority, Pair, VALID, Valid};
use futures::FutureExt as _;
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::{TLS12, TLS13},
};
use std::{fs, future::poll_fn, io};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const EXPIRED: Valid = Valid { from: -7_200, to: -3_600 };
const FUTURE: Valid = Valid { from: 3_600, to: 7_200 };

/// A server with TLS whose files are in a directory.
struct World {
    directory: TempDir,
    ca: Authority,
    tls: ServerTls,
    connections: Connections,
    listener: TcpListener,
}

impl World {
    /// A server with client certificates of the same CA.
    async fn new(required: bool, revoked: &[&Pair], ca: Authority) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = ca.server(VALID).write(directory.path(), "server");
        let [client_ca, crl] = ["ca.pem", "crl.pem"].map(|name| directory.path().join(name));
        fs::write(&client_ca, ca.pem()).unwrap();
        fs::write(&crl, ca.revoked(revoked)).unwrap();
        let files = TlsFiles {
            cert,
            key,
            client_ca: Some(client_ca),
            crl: Some(crl),
            client_certificate_required: required,
        };
        let tls = ServerTls::open(files).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { directory, ca, tls, connections: Connections::default(), listener }
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.directory.path().join(name), content).unwrap();
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.listener.local_addr().unwrap()).await.unwrap()
    }

    /// Accepts one connection and does its handshake.
    async fn accept(&self) -> Result<(Socket, Admitted), Option<HandshakeProblem>> {
        let (stream, peer) = self.listener.accept().await.unwrap();
        let admitted = self.connections.admit(peer).unwrap();
        let socket = self.tls.grpc_port().try_shake(QuickAck::new(stream), admitted.state()).await?;
        Ok((socket, admitted))
    }

    /// Both sides of a handshake.
    #[allow(clippy::type_complexity)]
    async fn shake(
        &self,
        client: ClientConfig,
    ) -> (io::Result<TlsStream<TcpStream>>, Result<(Socket, Admitted), Option<HandshakeProblem>>) {
        let connector = TlsConnector::from(Arc::new(client));
        let connect = connector.connect("localhost".try_into().unwrap(), self.connect().await);
        tokio::join!(connect, self.accept())
    }

    fn client(&self) -> ClientSide {
        ClientSide { roots: self.ca.pem(), pair: None, versions: vec![&TLS13, &TLS12], alpn: vec!["h2"] }
    }
}

/// The trusted CA, the certificate and the protocol of a client.
struct ClientSide {
    roots: String,
    pair: Option<Pair>,
    versions: Vec<&'static SupportedProtocolVersion>,
    alpn: Vec<&'static str>,
}

impl ClientSide {
    fn with(mut self, pair: Pair) -> Self {
        self.pair = Some(pair);
        self
    }

    fn config(self) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.roots.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_protocol_versions(&self.versions).unwrap();
        let builder = builder.with_root_certificates(roots);
        let mut config = match self.pair {
            Some(pair) => {
                let chain = vec![CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

#[tokio::test]
async fn each_certificate_of_a_client_is_accepted_or_refused_for_its_own_reason_in_both_versions() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let (alice, revoked) = (ca.client("alice", VALID), ca.client("mallory", VALID));
    let (expired, future) = (ca.client("late", EXPIRED), ca.client("early", FUTURE));
    let stranger = other.client("alice", VALID);
    let server = ca.server(VALID);
    let broken = ca.client("two\nlines", VALID);
    let world = World::new(true, &[&revoked], ca).await;
    for version in [&TLS13, &TLS12] {
        for (pair, expected) in [
            (Some(&alice), Ok("CN=alice")),
            (Some(&revoked), Err(HandshakeProblem::Revoked)),
            (Some(&expired), Err(HandshakeProblem::Expired)),
            (Some(&future), Err(HandshakeProblem::NotYetValid)),
            (Some(&stranger), Err(HandshakeProblem::UnknownCa)),
            (Some(&server), Err(HandshakeProblem::Unusable)),
            (Some(&broken), Err(HandshakeProblem::Unusable)),
            (None, Err(HandshakeProblem::NoCertificate)),
        ] {
            let client = ClientSide { pair: pair.cloned(), versions: vec![version], ..world.client() };
            let (_client, accepted) = world.shake(client.config()).await;
            let subject =
                accepted.map(|(_, admitted)| admitted.state().certificate().unwrap().subject().to_owned());
            assert_eq!(subject, expected.map(str::to_owned).map_err(Some), "{version:?}");
        }
    }
}

#[tokio::test]
async fn a_client_may_come_without_a_certificate_if_it_is_optional_but_not_with_a_bad_one() {
    let ca = Authority::new("ca");
    let expired = ca.client("late", EXPIRED);
    let world = World::new(false, &[], ca).await;
    let (client, accepted) = world.shake(world.client().config()).await;
    let (client, (_socket, admitted)) = (client.unwrap(), accepted.unwrap());
    assert!(admitted.state().certificate().is_none());
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (_client, accepted) = world.shake(world.client().with(expired).config()).await;
    assert_eq!(accepted.err(), Some(Some(HandshakeProblem::Expired)));
}

#[tokio::test]
async fn a_handshake_problem_is_named() {
    let world = World::new(false, &[], Authority::new("ca")).await;
    let other = ClientSide { alpn: vec!["http/1.1"], ..world.client() };
    let (client, accepted) = world.shake(other.config()).await;
    assert!(client.is_err());
    assert_eq!(accepted.err(), Some(Some(HandshakeProblem::Protocol)));
    let distrusting = ClientSide { roots: Authority::new("other").pem(), ..world.client() };
    let (_, accepted) = world.shake(distrusting.config()).await;
    assert_eq!(accepted.err(), Some(Some(HandshakeProblem::Distrusted)));
}

/// The answer of the server to these bytes, and its verdict.
async fn after(world: &World, bytes: &[u8]) -> (Vec<u8>, Option<HandshakeProblem>) {
    let exchange = async {
        let mut stream = world.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let (answer, accepted) = tokio::join!(exchange, world.accept());
    (answer, accepted.err().unwrap())
}

/// A ClientHello that offers no version above this one.
fn client_hello(version: u16) -> Vec<u8> {
    let mut hello = version.to_be_bytes().to_vec();
    hello.extend([7; 32]);
    // No session, two ciphers of TLS 1.0 (AES with CBC), no compression.
    hello.extend([0, 0, 4, 0xc0, 0x14, 0, 0x35, 1, 0]);
    let mut message = vec![1, 0, 0, u8::try_from(hello.len()).unwrap()];
    message.extend(hello);
    let mut record = vec![0x16, 3, 1, 0, u8::try_from(message.len()).unwrap()];
    record.extend(message);
    record
}

#[tokio::test]
async fn earlier_versions_are_refused_with_an_alert_and_plaintext_with_an_answer() {
    let world = World::new(false, &[], Authority::new("ca")).await;
    for version in [0x0300, 0x0301, 0x0302] {
        let (answer, problem) = after(&world, &client_hello(version)).await;
        // A fatal alert (2): protocol_version (70), or handshake_failure (40) if there is no common cipher.
        assert!(matches!(answer[..], [0x15, 3, _, 0, 2, 2, 70 | 40]), "{answer:?}");
        assert_eq!(problem, Some(HandshakeProblem::Incompatible));
    }
    let (answer, problem) = after(&world, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(answer.starts_with(b"HTTP/1.1 400 ") && problem == Some(HandshakeProblem::Plaintext));
    let (answer, problem) = after(&world, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(answer.ends_with(b"http://") && problem == Some(HandshakeProblem::Plaintext));
    let (_, problem) = after(&world, &[0x16, 3, 1, 0, 5, 9, 9, 9, 9, 9]).await;
    assert_eq!(problem, Some(HandshakeProblem::Malformed));
    assert_eq!(after(&world, b"").await, (Vec::new(), None), "a look whether the port is open is no problem");
    assert_eq!(after(&world, &client_hello(0x0303)[..20]).await.1, Some(HandshakeProblem::Broken));
}

#[tokio::test]
async fn a_resumed_session_is_refused_once_its_certificate_is_revoked() {
    for version in [&TLS13, &TLS12] {
        let ca = Authority::new("ca");
        let alice = ca.client("alice", VALID);
        let world = World::new(true, &[], ca).await;
        let client = ClientSide { versions: vec![version], ..world.client() }.with(alice.clone()).config();
        let resumed = async || {
            let (client, accepted) = world.shake(client.clone()).await;
            let (mut socket, admitted) = accepted?;
            // The tickets of TLS 1.3 follow the handshake.
            socket.write_all(b"x").await.unwrap();
            let mut client = client.unwrap();
            client.read_exact(&mut [0]).await.unwrap();
            assert_eq!(admitted.state().certificate().unwrap().subject(), "CN=alice");
            Ok::<_, Option<HandshakeProblem>>(client.get_ref().1.handshake_kind().unwrap())
        };
        assert_eq!(resumed().await, Ok(HandshakeKind::Full));
        assert_eq!(resumed().await, Ok(HandshakeKind::Resumed), "{version:?}");
        // Only the verifier is replaced, as if the list had arrived in between. A reload would also replace the ticket
        // keys.
        let mut material = Material::read(world.tls.material().files().clone()).unwrap();
        world.write("crl.pem", &world.ca.revoked(&[&alice]));
        let now = Material::read(world.tls.material().files().clone()).unwrap();
        material.keep_sessions_of(&world.tls.material(), &now);
        world.tls.0.material.store(Arc::new(material));
        assert_eq!(resumed().await, Err(Some(HandshakeProblem::Revoked)), "{version:?}");
    }
}

#[tokio::test]
async fn an_open_connection_is_closed_when_its_certificate_expires_or_is_revoked() {
    let ca = Authority::new("ca");
    let short = ca.client("short", Valid { from: -60, to: 2 });
    let (alice, bob) = (ca.client("alice", VALID), ca.client("bob", VALID));
    let world = World::new(true, &[], ca).await;
    let mut open = Vec::new();
    for pair in [&short, &alice, &bob] {
        let (client, accepted) = world.shake(world.client().with(pair.clone()).config()).await;
        open.push((client.unwrap(), accepted.unwrap()));
    }
    let closing = |at: usize| {
        let (_, (_, admitted)) = &open[at];
        let state = admitted.state().clone();
        poll_fn(move |context| state.poll_closing(context)).now_or_never()
    };
    world.tls.check(&world.connections);
    assert!((0..3).all(|at| closing(at).is_none()));
    world.write("crl.pem", &world.ca.revoked(&[&alice]));
    world.tls.reload().unwrap();
    // The certificate expires in real time, after two seconds.
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while closing(0).is_none() {
        assert!(std::time::Instant::now() < end, "an expired certificate keeps its connection");
        world.tls.check(&world.connections);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!([0, 1, 2].map(closing), [Some(Reason::Certificate), Some(Reason::Certificate), None]);
}

#[tokio::test]
async fn files_that_cannot_be_used_change_nothing_and_are_named() {
    let (ca, other) = (Authority::new("ca"), Authority::new("other"));
    let world = World::new(true, &[], ca).await;
    let good = ["server.pem", "server.key", "ca.pem", "crl.pem"]
        .map(|name| (name, fs::read_to_string(world.directory.path().join(name)).unwrap()));
    let before = world.tls.certificate_expiry();
    let two_cas = world.ca.pem() + &other.pem();
    for (name, content, hint) in [
        ("server.key", other.server(VALID).key.as_str(), "belongs to another certificate"),
        (
            "server.key",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "openssl pkey",
        ),
        ("server.key", "", "no private key"),
        ("server.pem", "", "no certificate"),
        ("server.pem", "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n", "malformed"),
        ("ca.pem", "", "no certificate"),
        ("ca.pem", &two_cas, "the CA \"CN=other\""),
        ("crl.pem", "", "no list"),
        ("crl.pem", "hello", "no list of revoked certificates in PEM or DER"),
    ] {
        world.write(name, content);
        let error = world.tls.reload().unwrap_err().to_string();
        assert!(error.starts_with("tls.") && error.contains(name) && error.contains(hint), "{name}: {error}");
        for (name, content) in &good {
            world.write(name, content);
        }
    }
    let expired = world.ca.server(EXPIRED);
    expired.write(world.directory.path(), "server");
    assert!(world.tls.reload().unwrap_err().to_string().contains("has expired"));
    assert_eq!(world.tls.certificate_expiry(), before);
    let next = world.ca.server(Valid { to: VALID.to + 60, ..VALID });
    next.write(world.directory.path(), "server");
    world.tls.reload().unwrap();
    assert!(world.tls.certificate_expiry() >= before + 60);
}

#[test]
fn a_certificate_is_warned_about_in_its_last_quarter_and_at_most_two_weeks_ahead() {
    const DAY: i64 = 86_400;
    let ca = Authority::new("ca");
    let warning = |from, to| {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = ca.server(Valid { from, to }).write(directory.path(), "server");
        let files = TlsFiles { cert, key, client_ca: None, crl: None, client_certificate_required: false };
        Material::read(files).unwrap().ends_soon(UnixTime::now().as_secs())
    };
    assert_eq!(warning(-DAY / 2, DAY / 2), None, "one of a day");
    assert_eq!(warning(-4 * DAY / 5, DAY / 5), Some("expires soon"));
    assert_eq!(warning(-360 * DAY, 15 * DAY), None);
    assert_eq!(warning(-360 * DAY, 13 * DAY), Some("expires soon"));
    assert!(warning(-2 * DAY, -DAY).is_some_and(|text| text.contains("has expired")));
    assert!(warning(DAY, 2 * DAY).is_some_and(|text| text.contains("not valid yet")));
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_takes_too_long_is_given_up_and_places_are_shared() {
    let world = World::new(false, &[], Authority::new("ca")).await;
    let mut stream = world.connect().await;
    stream.write_all(&client_hello(0x0303)[..20]).await.unwrap();
    let (accepted, peer) = world.listener.accept().await.unwrap();
    let admitted = world.connections.admit(peer).unwrap();
    let port = world.tls.grpc_port();
    assert!(port.shake_hands(QuickAck::new(accepted), &admitted).await.is_none());
    assert_eq!(world.tls.0.handshakes.held(), 0);
}
