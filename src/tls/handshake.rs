//! [`TlsPort`]: the TLS handshake of an accepted connection.
//!
//! It runs in the task of the connection, which is counted as a connection from the beginning. It has a time limit, and
//! the number of concurrent handshakes is bounded: a connection that has sent its first bytes waits for one of
//! [`HANDSHAKES`] places, which addresses share. Connections that send nothing hold no place.
//!
//! A client that speaks without TLS gets an answer in its own protocol. The certificate of a resumed session is
//! verified again.

use super::{
    ServerTls, Socket,
    material::{Material, Protocol},
    plaintext,
    read_ahead::ReadAhead,
};
use crate::{
    access::certificate::ClientCertificate,
    budget::Bounds,
    connections::{Admitted, ConnectionState, HandshakeProblem},
    quick_ack::QuickAck,
};
use rustls::{AlertDescription, CertificateError, HandshakeKind, pki_types::UnixTime};
use std::{future::poll_fn, io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    select,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Maximum number of concurrent handshakes at both ports. Each takes a tenth of a millisecond to some milliseconds of
/// CPU, depending on the keys, and waits for the network once or twice. So all of them together delay others by less
/// than a second.
pub(super) const HANDSHAKES: Bounds = Bounds { what: "TLS handshakes at a time", total: 256, connection: 1 };
/// Time limit of a handshake, from the accepted connection to its end. It is long enough for two retransmissions of a
/// packet.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may take to read why it is refused.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);

/// TLS for the connections of a port. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct TlsPort {
    tls: ServerTls,
    protocol: Protocol,
}

impl TlsPort {
    pub(super) fn new(tls: ServerTls, protocol: Protocol) -> Self {
        Self { tls, protocol }
    }

    /// Does the handshake of a connection. `None` if it failed, which is counted for the log, or if the connection was
    /// asked to close.
    pub(crate) async fn shake_hands(&self, stream: QuickAck, admitted: &Admitted) -> Option<Socket> {
        let state = admitted.state();
        let shaken = select! {
            shaken = timeout(HANDSHAKE_LIMIT, self.try_shake(stream, state)) => shaken,
            _ = poll_fn(|context| state.poll_closing(context)) => return None,
        };
        match shaken.unwrap_or(Err(Some(HandshakeProblem::Slow))) {
            Ok(socket) => Some(socket),
            Err(problem) => {
                if let Some(problem) = problem {
                    admitted.connections().note_handshake(state.caller.peer, problem);
                }
                None
            }
        }
    }

    /// The error is `None` for a connection that sent nothing, such as a load balancer that checks whether the port is
    /// open.
    pub(super) async fn try_shake(
        &self,
        stream: QuickAck,
        state: &ConnectionState,
    ) -> Result<Socket, Option<HandshakeProblem>> {
        let mut opening = [0; plaintext::OPENING_BYTES];
        let read = stream.get_ref().peek(&mut opening).await.map_err(|_| None)?;
        let opening = opening.get(..read).filter(|opening| !opening.is_empty()).ok_or(None)?;
        if let Some(answer) = plaintext::answer(opening) {
            refuse(stream, &answer).await;
            return Err(Some(HandshakeProblem::Plaintext));
        }
        let place = self.tls.0.handshakes.wait_for(state.caller, 1).await;
        let place = place.map_err(|_| Some(HandshakeProblem::Slow))?;
        let material = self.tls.0.material.load_full();
        let acceptor = TlsAcceptor::from(material.config(self.protocol).clone());
        let shaken = acceptor.accept(ReadAhead::new(stream)).into_fallible().await;
        drop(place);
        let stream = match shaken {
            Ok(stream) => stream,
            Err((error, stream)) => {
                linger(stream).await;
                return Err(Some(problem_of(&error)));
            }
        };
        if let Some(certificate) = certificate(&stream, &material).map_err(Some)? {
            state.set_certificate(Arc::new(certificate));
        }
        Ok(Socket::Tls(Box::new(stream)))
    }
}

/// The client's certificate, if it has presented one.
fn certificate(
    stream: &TlsStream<ReadAhead>,
    material: &Material,
) -> Result<Option<ClientCertificate>, HandshakeProblem> {
    let (_, session) = stream.get_ref();
    let Some(chain) = session.peer_certificates() else { return Ok(None) };
    if session.handshake_kind() == Some(HandshakeKind::Resumed) {
        // The TLS library does not verify the chain of a resumed session again.
        material.accepts(chain, UnixTime::now()).map_err(|error| problem(&error))?;
    }
    ClientCertificate::parse(chain).map(Some).map_err(|_| HandshakeProblem::Unusable)
}

/// Sends the answer to a client that speaks without TLS, and waits until it has arrived.
async fn refuse(mut stream: QuickAck, answer: &[u8]) {
    if matches!(timeout(REFUSAL_LIMIT, stream.write_all(answer)).await, Ok(Ok(()))) {
        linger(stream).await;
    }
}

/// Waits for the client to close. An immediate close with unread bytes would reset the connection, and the client would
/// not learn why it was refused.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let exchange = async {
        stream.shutdown().await?;
        let mut discarded = [0; 4096];
        while stream.read(&mut discarded).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    let _ = timeout(REFUSAL_LIMIT, exchange).await;
}

fn problem_of(error: &io::Error) -> HandshakeProblem {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(error) => problem(error),
        None => HandshakeProblem::Broken,
    }
}

fn problem(error: &rustls::Error) -> HandshakeProblem {
    use rustls::Error;
    match error {
        Error::NoCertificatesPresented => HandshakeProblem::NoCertificate,
        Error::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer => HandshakeProblem::UnknownCa,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => HandshakeProblem::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                HandshakeProblem::NotYetValid
            }
            CertificateError::Revoked => HandshakeProblem::Revoked,
            _ => HandshakeProblem::Unusable,
        },
        Error::NoApplicationProtocol => HandshakeProblem::Protocol,
        Error::PeerIncompatible(_) => HandshakeProblem::Incompatible,
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::UnsupportedCertificate => HandshakeProblem::Distrusted,
            AlertDescription::ProtocolVersion
            | AlertDescription::HandshakeFailure
            | AlertDescription::InsufficientSecurity => HandshakeProblem::Incompatible,
            _ => HandshakeProblem::Broken,
        },
        _ => HandshakeProblem::Malformed,
    }
}
