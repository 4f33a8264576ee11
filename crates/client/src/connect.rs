//! Connects to a server: endpoint, connection, and the header that identifies the client.

use gorego_reapi::{
    error::{Error, Result},
    proto::reapi,
};
use prost::Message as _;
use std::{error::Error as _, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Request, Status,
    metadata::{BinaryMetadataValue, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

/// Flow-control windows: the bytes that the server may send ahead on the connection and on one stream. They are large and
/// fixed. The HTTP/2 library derives from the connection window how many small messages may wait, and closes the connection
/// when hundreds of streams exceed that at once.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Time limit for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between probes of an idle connection, and time limit for the answer (GEN-26).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// The start of an HTTP/2 connection: the preface and an empty SETTINGS frame.
const HTTP2_OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The request metadata header (GEN-28).
const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A connection whose requests carry the [`Identity`] header.
pub type Service = InterceptedService<Channel, Header>;

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
pub struct Header(BinaryMetadataValue);

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

/// Converts `grpc://host:port`, `http://host:port`, `unix:///path` or `host:port` to a URI.
///
/// # Errors
/// `Invalid` for any other form, for TLS, and for a missing port.
pub fn parse_endpoint(endpoint: &str) -> Result<String> {
    let refuse = |problem: &str| {
        Err(Error::Invalid(format!(
            "endpoint \"{}\" {problem}; it should look like grpc://127.0.0.1:50051",
            endpoint.escape_debug()
        )))
    };
    let authority = match endpoint.split_once("://") {
        Some(("unix", _)) => return Ok(endpoint.to_owned()),
        Some(("grpc" | "http", rest)) => rest,
        Some(("grpcs" | "https", _)) => return refuse("asks for TLS, which this client does not speak yet"),
        Some(_) => return refuse("has an unknown scheme"),
        None => endpoint,
    };
    let authority = authority.trim_end_matches('/');
    let Ok(parsed) = authority.parse::<http::uri::Authority>() else { return refuse("is malformed") };
    if parsed.host().is_empty() || authority.contains('@') {
        return refuse("is malformed");
    }
    match parsed.port_u16() {
        Some(_) => Ok(format!("http://{authority}")),
        None => refuse("has no port"),
    }
}

pub(super) async fn connect(endpoint: &str, identity: &Identity) -> Result<Service> {
    let uri = parse_endpoint(endpoint)?;
    let malformed = |error: &dyn std::fmt::Display| Error::Invalid(format!("endpoint {endpoint}: {error}"));
    let transport = Endpoint::from_shared(uri)
        .map_err(|error| malformed(&error))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .keep_alive_while_idle(true);
    // The limit of the endpoint covers only the TCP connection, not a peer that accepts it and never answers.
    match tokio::time::timeout(CONNECT_TIMEOUT, transport.connect()).await {
        Ok(Ok(channel)) => Ok(InterceptedService::new(channel, identity.header())),
        Ok(Err(error)) => Err(unreachable(endpoint, &innermost(&error))),
        Err(_) => Err(unreachable(endpoint, &format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
    }
}

fn unreachable(endpoint: &str, why: &str) -> Error {
    Error::Unavailable(format!(
        "no server answers at {endpoint} ({why}); start one with `gorego`, or name another with --endpoint"
    ))
}

/// Detects the protocol of an endpoint that does not speak HTTP/2, by connecting once more. Returns the end of an error
/// message; `None` if the protocol is not recognised.
pub async fn foreign_protocol(endpoint: &str) -> Option<&'static str> {
    let uri = parse_endpoint(endpoint).ok()?;
    let answer = async {
        let mut stream = TcpStream::connect(uri.strip_prefix("http://")?).await.ok()?;
        stream.write_all(HTTP2_OPENING).await.ok()?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await.ok()?;
        Some(answer)
    };
    let answer = tokio::time::timeout(CONNECT_TIMEOUT, answer).await.ok()??;
    match &answer {
        b"HTTP/" => {
            Some("the server there speaks HTTP/1 and not gRPC; name the port at which it serves gRPC")
        }
        // An alert or handshake record of TLS 1.x.
        [0x15 | 0x16, 3, ..] => Some("the server there expects TLS, which this client does not speak yet"),
        _ => None,
    }
}

/// The innermost cause. The outer errors only say "transport error".
fn innermost(error: &tonic::transport::Error) -> String {
    let mut cause = error.source();
    while let Some(next) = cause.and_then(|cause| cause.source()) {
        cause = Some(next);
    }
    cause.map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_people_write_them() {
        for (written, meant) in [
            ("grpc://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://build:80/", "http://build:80"),
            ("localhost:50051", "http://localhost:50051"),
            ("grpc://[::1]:9092", "http://[::1]:9092"),
            ("unix:///run/gorego.sock", "unix:///run/gorego.sock"),
        ] {
            assert_eq!(parse_endpoint(written).as_deref(), Ok(meant));
        }
        for (wrong, hint) in [
            ("grpcs://a:1", "TLS"),
            ("ftp://a:1", "scheme"),
            ("grpc://a", "port"),
            ("", "malformed"),
            ("grpc://a b:1", "malformed"),
            ("grpc://u:p@a:1", "malformed"),
        ] {
            let error = parse_endpoint(wrong).unwrap_err().to_string();
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }

    #[tokio::test]
    async fn what_speaks_another_protocol_is_named() {
        let cases: [(&[u8], Option<&str>); 4] = [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", Some("HTTP/1")),
            (&[0x15, 3, 1, 0, 2, 2, 70], Some("TLS")),
            (b"\0\0\0\x04\0\0\0\0\0", None),
            (b"", None),
        ];
        for (bytes, named) in cases {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
            let answering = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut opening = [0; HTTP2_OPENING.len()];
                stream.read_exact(&mut opening).await.unwrap();
                stream.write_all(bytes).await.unwrap();
            });
            let found = foreign_protocol(&endpoint).await;
            answering.await.unwrap();
            assert_eq!(found.is_some(), named.is_some(), "{bytes:?}: {found:?}");
            assert!(named.is_none_or(|named| found.unwrap().contains(named)), "{bytes:?}: {found:?}");
        }
    }

    #[tokio::test]
    async fn nobody_listening_is_said_plainly_with_what_to_do() {
        // A port that has just been released.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let error = connect(&format!("grpc://127.0.0.1:{port}"), &Identity::default()).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unavailable(_)));
        assert!(text.contains("refused") && text.contains("--endpoint"), "{text}");
    }
}
