//! [`HandshakeProblem`]: why a connection to a TLS port was closed before its first request. They are counted for each
//! peer and logged once a second ([`super::Connections::note_handshake`]).

/// The reason why a connection to a TLS port was closed before its first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum HandshakeProblem {
    /// The client speaks without TLS.
    Plaintext,
    /// The handshake took too long.
    Slow,
    /// The connection broke in the middle of the handshake.
    Broken,
    /// The client sent something that is not a handshake.
    Malformed,
    /// The client has no protocol version, cipher or signature in common with the server.
    Incompatible,
    /// The client speaks none of the application protocols of the port.
    Protocol,
    /// The client presented no certificate, and one is required.
    NoCertificate,
    /// The certificate of the client is not signed by a CA of `tls.client_ca`.
    UnknownCa,
    /// The certificate of the client has expired.
    Expired,
    /// The certificate of the client is not valid yet.
    NotYetValid,
    /// The certificate of the client is on the list of revoked ones.
    Revoked,
    /// The certificate of the client cannot be used: its purpose, signature, names or form.
    Unusable,
    /// The client does not accept the certificate of this server.
    Distrusted,
}

impl HandshakeProblem {
    /// The value in the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Slow => "slow",
            Self::Broken => "broken_off",
            Self::Malformed => "malformed",
            Self::Incompatible => "incompatible",
            Self::Protocol => "no_common_protocol",
            Self::NoCertificate => "no_client_certificate",
            Self::UnknownCa => "unknown_client_ca",
            Self::Expired => "client_certificate_expired",
            Self::NotYetValid => "client_certificate_not_yet_valid",
            Self::Revoked => "client_certificate_revoked",
            Self::Unusable => "client_certificate_unusable",
            Self::Distrusted => "server_certificate_not_accepted",
        }
    }

    /// The meaning of the problem, and how to solve it.
    pub(crate) fn explanation(self) -> &'static str {
        match self {
            Self::Plaintext => "it speaks without TLS; it should use grpcs:// or https://",
            Self::Slow => "the TLS handshake took too long",
            Self::Broken => "the connection ended during the TLS handshake",
            Self::Malformed => "it sent something that is not a TLS handshake",
            Self::Incompatible => "it has no TLS version (1.2, 1.3) or cipher in common with this server",
            Self::Protocol => "it speaks another protocol than the port (gRPC: h2; HTTP: http/1.1)",
            Self::NoCertificate => "it has no client certificate, and tls.client_auth requires one",
            Self::UnknownCa => "its certificate is not signed by a CA of tls.client_ca",
            Self::Expired => "its certificate has expired",
            Self::NotYetValid => "its certificate is not valid yet; are the clocks right?",
            Self::Revoked => "its certificate is revoked (tls.crl)",
            Self::Unusable => "its certificate cannot be used: its purpose, signature, names or form",
            Self::Distrusted => {
                "it does not trust the certificate of this server (tls.cert); it needs the CA that signed it"
            }
        }
    }
}
