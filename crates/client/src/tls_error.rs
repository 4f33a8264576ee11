//! Explains why a TLS connection failed, and what the user can change. Pure.

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use std::{error::Error, io};

/// The alerts of a server that refuses a client.
const CLIENT_ALERTS: [AlertDescription; 10] = [
    AlertDescription::CertificateRequired,
    AlertDescription::NoCertificate,
    AlertDescription::UnknownCA,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateRevoked,
    AlertDescription::BadCertificate,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
];

/// Explains the error if its cause is TLS.
pub(crate) fn explain(error: &(dyn Error + 'static), host: &str) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = tls_cause(error) {
            return Some(of_tls(found, host));
        }
        if let Some(alert) = alert_in(error) {
            return Some(of_alert(alert));
        }
        next = error.source();
    }
    None
}

/// The TLS library's error inside of this one. The source of an I/O error is not the error that it wraps.
fn tls_cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let inside = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    let inside = inside.and_then(|inside| inside.downcast_ref());
    error.downcast_ref().or(inside)
}

/// The alert in an I/O error of an open connection. The HTTP/2 library preserves only its text.
fn alert_in(error: &(dyn Error + 'static)) -> Option<AlertDescription> {
    let text = error.downcast_ref::<io::Error>()?.to_string();
    let is_it = |alert: &AlertDescription| text == rustls::Error::AlertReceived(*alert).to_string();
    CLIENT_ALERTS.iter().copied().find(is_it)
}

fn of_tls(error: &rustls::Error, host: &str) -> String {
    use rustls::Error;
    match error {
        Error::InvalidCertificate(error) => {
            format!("the certificate of the server {}", of_certificate(error, host))
        }
        Error::AlertReceived(alert) => of_alert(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the server there does not speak TLS; write grpc:// instead of grpcs://".into()
        }
        Error::NoApplicationProtocol => "the server there speaks TLS, but no HTTP/2, which gRPC needs".into(),
        other => format!("TLS failed: {other}"),
    }
}

fn of_certificate(error: &CertificateError, host: &str) -> String {
    match error {
        CertificateError::UnknownIssuer => {
            "is signed by a CA that is not trusted here; name the file of its CA with --tls-ca".into()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let names = match error {
                CertificateError::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
                    let names: Vec<_> = presented.iter().map(|name| plain_name(name)).collect();
                    format!(" (only for {})", names.join(", "))
                }
                _ => String::new(),
            };
            format!("is not valid for {host}{names}; connect with a name that is in it")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet; is the clock of this machine right?".into()
        }
        other => {
            let text = other.to_string();
            if text.contains("CaUsedAsEndEntity") {
                "is a CA certificate; the server needs a certificate that the CA has signed, without CA:TRUE"
                    .into()
            } else {
                format!("cannot be used: {text}")
            }
        }
    }
}

/// A name of a certificate without its type. rustls formats names as `DnsName("a.example.com")` and
/// `IpAddress(10.0.0.1)`.
fn plain_name(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn of_alert(alert: AlertDescription) -> String {
    let certificate = match alert {
        AlertDescription::CertificateRequired | AlertDescription::NoCertificate => {
            return "the server requires a certificate of the client; give one with --tls-cert and --tls-key"
                .into();
        }
        AlertDescription::UnknownCA => "it does not know the CA that has signed it",
        AlertDescription::CertificateExpired => "it has expired or is not valid yet",
        AlertDescription::CertificateRevoked => "it is revoked",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError => "it cannot be used there",
        AlertDescription::NoApplicationProtocol => {
            return "the server there speaks TLS, but no HTTP/2, which gRPC needs; is it the HTTP port?"
                .into();
        }
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            return "the server has no TLS version (1.2, 1.3) or cipher in common with this client".into();
        }
        other => return format!("the server ended the TLS connection ({other:?})"),
    };
    format!("the server refuses the certificate of this client (--tls-cert): {certificate}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_certificate_are_listed_plainly() {
        for (presented, plain) in [
            ("DnsName(\"build.example.com\")", "build.example.com"),
            ("IpAddress(127.0.0.1)", "127.0.0.1"),
            ("other", "other"),
        ] {
            assert_eq!(plain_name(presented), plain);
        }
    }

    #[test]
    fn the_cause_is_found_where_libraries_put_it_and_named_with_its_remedy() {
        let io = |error: rustls::Error| io::Error::new(io::ErrorKind::InvalidData, error);
        for (error, hint) in [
            (rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer), "--tls-ca"),
            (rustls::Error::InvalidCertificate(CertificateError::NotValidForName), "not valid for build"),
            (rustls::Error::AlertReceived(AlertDescription::CertificateRequired), "--tls-cert and --tls-key"),
            (rustls::Error::AlertReceived(AlertDescription::CertificateRevoked), "it is revoked"),
            (rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType), "grpc://"),
        ] {
            assert!(explain(&error, "build").is_some_and(|text| text.contains(hint)));
            let text = explain(&io(error), "build").unwrap();
            assert!(text.contains(hint), "{text}");
        }
        let as_text = io::Error::new(io::ErrorKind::InvalidData, "received fatal alert: CertificateRequired");
        assert!(explain(&as_text, "build").unwrap().contains("--tls-cert and --tls-key"));
        assert_eq!(explain(&io::Error::from(io::ErrorKind::ConnectionReset), "build"), None);
    }
}
