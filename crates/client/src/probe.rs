//! Finds out why a server cannot be used, after a connection or a call has failed.

use crate::{
    endpoint::ServerUri,
    options::{CONNECT_TIMEOUT, ConnectOptions},
    tls_error,
};
use rustls::pki_types::ServerName;
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// The start of an HTTP/2 connection: the preface and an empty SETTINGS frame.
const HTTP2_OPENING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The error code INADEQUATE_SECURITY of a GOAWAY frame: the server expects TLS.
const INADEQUATE_SECURITY: [u8; 4] = [0, 0, 0, 0xc];
/// How many bytes of an answer are needed to recognise its protocol: SETTINGS and GOAWAY of HTTP/2, without their
/// contents.
const ANSWER_BYTES: usize = 26;

/// Time limit for a server to refuse the client. A server that accepts it sends nothing.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// What the user can do about a failed connection; `None` if nothing more is known.
pub async fn explain(options: &ConnectOptions, error: &tonic::transport::Error) -> Option<String> {
    let server = options.server().ok()?;
    let tls = tls_error::explain(error, server.host().unwrap_or_default());
    match tls {
        Some(why) => Some(why),
        None => diagnose(options).await,
    }
}

/// Finds out why a server that accepts connections answers no calls: it uses another protocol than the endpoint says,
/// or it refuses the client. Connects once more. Returns the end of an error message; `None` if no reason is found.
pub async fn diagnose(options: &ConnectOptions) -> Option<String> {
    if let Ok(Some(why)) = tokio::time::timeout(REFUSAL_TIMEOUT, refusal(options)).await {
        return Some(why);
    }
    foreign_protocol(options).await.map(str::to_owned)
}

/// The alert of a TLS server after the handshake. With TLS 1.3, a server checks the client's certificate only then, and
/// the library that makes the calls may lose the alert.
async fn refusal(options: &ConnectOptions) -> Option<String> {
    let server = options.server().ok().filter(ServerUri::has_tls)?;
    let host = server.host()?;
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).ok()?;
    let connector = TlsConnector::from(Arc::new(options.rustls_config().ok()?));
    let stream = TcpStream::connect(server.authority()?).await.ok()?;
    // Nothing is sent: if the connection ended with unread bytes, a reset would replace the alert.
    let exchange = async { connector.connect(name, stream).await?.read_u8().await };
    exchange.await.err().and_then(|error| tls_error::explain(&error, host))
}

/// The protocol of a server that does not use the protocol of the endpoint.
async fn foreign_protocol(options: &ConnectOptions) -> Option<&'static str> {
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

/// The protocol of the answer to an HTTP/2 client without TLS.
fn protocol(answer: &[u8], expects_tls: bool) -> Option<&'static str> {
    const NO_TLS: &str = "the server there does not speak TLS; write grpc:// instead of grpcs://";
    const TLS: &str = "the server there speaks TLS; write grpcs:// instead of grpc://";
    const HTTP1: &str = "the server there speaks HTTP/1 and not gRPC; name the port at which it serves gRPC";
    let is_tls = match answer {
        // A TLS server may answer in HTTP/1 that it requires TLS.
        [b'H', b'T', b'T', b'P', b'/', ..] => return (!expects_tls).then_some(HTTP1),
        // An alert or handshake record of TLS 1.x.
        [0x15 | 0x16, 3, ..] => true,
        // SETTINGS of HTTP/2, and the answer of goREgo at a TLS port.
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
    async fn an_endpoint_with_another_protocol_is_named() {
        let cases: [(&str, &[u8], Option<&str>); 9] = [
            ("grpc", b"HTTP/1.1 400 Bad Request\r\n\r\n", Some("HTTP/1")),
            ("grpcs", b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
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
}
