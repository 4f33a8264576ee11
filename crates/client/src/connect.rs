//! Connects to a server, says what is wrong when that fails, and adds the header that identifies the client.

use crate::{
    credentials::AuthorizedChannel,
    options::{CONNECT_TIMEOUT, ConnectOptions, innermost},
    tls_error,
};
use gorego_reapi::{
    error::{Error, Result},
    proto::reapi,
};
use prost::Message as _;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
};

/// Flow-control windows: the bytes that the server may send ahead on the connection and on one stream. They are large and
/// fixed. The HTTP/2 library derives from the connection window how many small messages may wait, and closes the connection
/// when hundreds of streams exceed that at once.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Interval between probes of an idle connection, and time limit for the answer (GEN-26).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// The start of an HTTP/2 connection: the preface and an empty SETTINGS frame.
const HTTP2_OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The request metadata header (GEN-28).
const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// The end of an HTTP/2 connection that should have been TLS: GOAWAY with the code INADEQUATE_SECURITY.
const INADEQUATE_SECURITY: [u8; 4] = [0, 0, 0, 0xc];
/// How much of an answer tells its protocol: SETTINGS and GOAWAY of HTTP/2, without their contents.
const ANSWER_BYTES: usize = 26;

/// A connection whose requests carry credentials and the [`Identity`] header.
pub(super) type Service = InterceptedService<AuthorizedChannel, Header>;

/// The client's identity, sent with every request (GEN-28).
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Name of the program (`tool_name`).
    pub tool: String,
    /// Id of one run of the program (`tool_invocation_id`).
    pub invocation_id: String,
    /// The target that is being built (`target_id`).
    pub target_id: String,
    /// The kind of action (`action_mnemonic`).
    pub mnemonic: String,
}

/// An interceptor that adds the encoded identity to each request.
#[derive(Debug, Clone)]
pub(super) struct Header(BinaryMetadataValue);

impl Interceptor for Header {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert_bin(METADATA_HEADER, self.0.clone());
        Ok(request)
    }
}

impl Identity {
    fn header(&self) -> Header {
        let metadata = reapi::RequestMetadata {
            tool_details: Some(reapi::ToolDetails {
                tool_name: self.tool.clone(),
                tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            tool_invocation_id: self.invocation_id.clone(),
            target_id: self.target_id.clone(),
            action_mnemonic: self.mnemonic.clone(),
            ..Default::default()
        };
        Header(MetadataValue::from_bytes(&metadata.encode_to_vec()))
    }
}

pub(super) async fn connect(options: &ConnectOptions, identity: &Identity) -> Result<Service> {
    let transport = options
        .transport()?
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true);
    let credentials = options.credentials()?;
    credentials.prepare().await?;
    // The limit of the endpoint covers only the TCP connection, not a peer that accepts it and never answers.
    match tokio::time::timeout(CONNECT_TIMEOUT, transport.connect()).await {
        Ok(Ok(channel)) => {
            Ok(InterceptedService::new(AuthorizedChannel::new(channel, credentials), identity.header()))
        }
        Ok(Err(error)) => match explain(options, &error).await {
            Some(why) => Err(Error::Precondition(format!("{}: {why}", options.endpoint))),
            None => Err(unreachable(&options.endpoint, &innermost(&error))),
        },
        Err(_) => {
            Err(unreachable(&options.endpoint, &format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())))
        }
    }
}

/// What the user can do about a connection that could not be made; `None` if nothing more is known.
pub async fn explain(options: &ConnectOptions, error: &tonic::transport::Error) -> Option<String> {
    let server = options.server().ok()?;
    let tls = tls_error::explain(error, server.host().unwrap_or_default());
    match tls {
        Some(why) => Some(why),
        None => foreign_protocol(options).await.map(str::to_owned),
    }
}

fn unreachable(endpoint: &str, why: &str) -> Error {
    Error::Unavailable(format!(
        "no server answers at {endpoint} ({why}); start one with `gorego`, or name another with --endpoint"
    ))
}

/// Detects the protocol of a server that does not speak the one of the endpoint, by connecting once more without TLS. Returns
/// the end of an error message; `None` if the protocol is the expected one or unknown.
pub async fn foreign_protocol(options: &ConnectOptions) -> Option<&'static str> {
    let server = options.server().ok()?;
    let answer = async {
        let mut stream = TcpStream::connect(server.authority()?).await.ok()?;
        stream.write_all(HTTP2_OPENING).await.ok()?;
        let mut answer = Vec::new();
        while answer.len() < ANSWER_BYTES && stream.read_buf(&mut answer).await.ok()? > 0 {
            if protocol(&answer, server.has_tls()).is_some() {
                break;
            }
        }
        protocol(&answer, server.has_tls())
    };
    tokio::time::timeout(CONNECT_TIMEOUT, answer).await.ok()?
}

/// The protocol in which an HTTP/2 client was answered that speaks without TLS.
fn protocol(answer: &[u8], expects_tls: bool) -> Option<&'static str> {
    const NO_TLS: &str = "the server there does not speak TLS; write grpc:// instead of grpcs://";
    const TLS: &str = "the server there speaks TLS; write grpcs:// instead of grpc://";
    const HTTP1: &str = "the server there speaks HTTP/1 and not gRPC; name the port at which it serves gRPC";
    let is_tls = match answer {
        [b'H', b'T', b'T', b'P', b'/', ..] => return Some(HTTP1),
        // An alert or handshake record of TLS 1.x.
        [0x15 | 0x16, 3, ..] => true,
        // SETTINGS of HTTP/2, and what goREgo sends at a TLS port.
        [0, 0, 0, 4, _, 0, 0, 0, 0, rest @ ..] => match rest {
            [_, _, _, 7, _, 0, 0, 0, 0, _, _, _, _, code @ ..] => code.starts_with(&INADEQUATE_SECURITY),
            _ => false,
        },
        [_, _, _, 4, _, 0, 0, 0, 0, ..] => false,
        _ => return None,
    };
    match (is_tls, expects_tls) {
        (true, false) => Some(TLS),
        (false, true) => Some(NO_TLS),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_speaks_another_protocol_is_named() {
        let cases: [(&str, &[u8], Option<&str>); 8] = [
            ("grpc", b"HTTP/1.1 400 Bad Request\r\n\r\n", Some("HTTP/1")),
            ("grpc", &[0x15, 3, 1, 0, 2, 2, 70], Some("write grpcs://")),
            ("grpcs", &[0x15, 3, 1, 0, 2, 2, 70], None),
            ("grpc", b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0c", Some("write grpcs://")),
            ("grpc", b"\0\0\0\x04\0\0\0\0\0", None),
            ("grpcs", b"\0\0\0\x04\0\0\0\0\0", Some("write grpc://")),
            ("grpcs", b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64", Some("write grpc://")),
            ("grpc", b"", None),
        ];
        for (scheme, bytes, named) in cases {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = format!("{scheme}://{}", listener.local_addr().unwrap());
            let answering = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut opening = [0; HTTP2_OPENING.len()];
                stream.read_exact(&mut opening).await.unwrap();
                stream.write_all(bytes).await.unwrap();
            });
            let found = foreign_protocol(&endpoint.into()).await;
            answering.await.unwrap();
            assert_eq!(found.is_some(), named.is_some(), "{bytes:?}: {found:?}");
            assert!(named.is_none_or(|named| found.unwrap().contains(named)), "{bytes:?}: {found:?}");
        }
    }

    #[tokio::test]
    async fn nobody_listening_is_said_plainly_with_what_to_do() {
        // A port that has just been released.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error =
            connect(&format!("grpc://127.0.0.1:{port}").into(), &Identity::default()).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable(_)));
        assert!(text.contains("refused") && text.contains("--endpoint"), "{text}");
    }
}
