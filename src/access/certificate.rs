//! [`ClientCertificate`]: the identity in a verified client certificate. It is parsed once for each connection.
//!
//! The chain was verified before ([`crate::tls`]), so its issuer is trusted. The names that the issuer allowed are not:
//! they may be long, contain control characters, or imitate the notation in which they are compared. So the subject is
//! written as in RFC 4514, which escapes special characters. A certificate is refused as a whole if its names are too
//! long or contain characters that cannot be printed. Names are never shortened, because two of them could become
//! equal. Pure.

use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use std::{fmt, fmt::Write as _, sync::Arc};
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::FromDer as _,
    x509::{AttributeTypeAndValue, X509Name},
};

/// Maximum length of a subject in bytes. With a prefix, it still fits into the name of a principal.
pub(crate) const SUBJECT_MAX_BYTES: usize = 240;
/// Maximum length of an alternative name in bytes: SPIFFE ids have up to 2,048, and DNS names at most 253.
pub(crate) const NAME_MAX_BYTES: usize = 2_048;
/// Maximum number of alternative names of a certificate.
pub(crate) const NAMES_MAX: usize = 64;
/// Maximum number of certificates in a client's chain, including its own.
pub(crate) const CHAIN_MAX: usize = 8;
/// Maximum size of a chain in bytes. It is kept as long as the connection.
pub(crate) const CHAIN_MAX_BYTES: usize = 32 * 1024;

/// Attributes of subjects with the short names of RFC 4514, and those that OpenSSL gives to other common ones.
const ATTRIBUTES: &[(&str, &str)] = &[
    ("2.5.4.3", "CN"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "STREET"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

/// A verified client certificate; see the top of this file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    subject: String,
    names: Vec<CertificateName>,
    fingerprint: [u8; 32],
    not_after: i64,
    chain: Arc<[CertificateDer<'static>]>,
}

/// An alternative name of the holder of a certificate (`subjectAltName`).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CertificateName {
    /// A host name (`dNSName`).
    Dns(String),
    /// A URI, such as a SPIFFE id.
    Uri(String),
    /// An e-mail address (`rfc822Name`).
    Email(String),
}

/// Why a certificate cannot identify a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnusableCertificate(&'static str);

impl fmt::Display for UnusableCertificate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

impl ClientCertificate {
    /// Parses the chain that a client has presented. Its own certificate comes first.
    ///
    /// # Errors
    /// If it is malformed, exceeds a bound, or has a name that cannot be printed.
    pub fn parse(chain: &[CertificateDer<'_>]) -> Result<Self, UnusableCertificate> {
        let total: usize = chain.iter().map(|certificate| certificate.len()).sum();
        let first = chain.first().ok_or(UnusableCertificate("there is no certificate"))?;
        if chain.len() > CHAIN_MAX || total > CHAIN_MAX_BYTES {
            return Err(UnusableCertificate("the chain of certificates is too long"));
        }
        let (rest, parsed) = X509Certificate::from_der(first).map_err(|_| MALFORMED)?;
        if !rest.is_empty() {
            return Err(MALFORMED);
        }
        Ok(Self {
            subject: subject(parsed.subject())?,
            names: names(&parsed)?,
            fingerprint: Sha256::digest(first).into(),
            not_after: parsed.validity().not_after.timestamp(),
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
        })
    }

    /// The subject as in RFC 4514, the most specific attribute first, as `openssl x509 -subject -nameopt RFC2253`
    /// prints it: `CN=alice,OU=Build,O=Example`. Empty for a certificate that has only alternative names.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The alternative names in the order of the certificate.
    pub fn names(&self) -> &[CertificateName] {
        &self.names
    }

    /// The SHA-256 of the certificate.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// The end of its validity, in seconds since 1970.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The chain as it was presented, for verifying it again.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
}

const MALFORMED: UnusableCertificate = UnusableCertificate("the certificate is malformed");

/// Writes a subject as in RFC 4514.
fn subject(name: &X509Name<'_>) -> Result<String, UnusableCertificate> {
    let mut text = String::new();
    let relative_names: Vec<_> = name.iter_rdn().collect();
    for (at, relative_name) in relative_names.iter().rev().enumerate() {
        for (of_these, attribute) in relative_name.iter().enumerate() {
            text.push_str(match (at, of_these) {
                (0, 0) => "",
                (_, 0) => ",",
                _ => "+",
            });
            push_attribute(&mut text, attribute)?;
            if text.len() > SUBJECT_MAX_BYTES {
                return Err(UnusableCertificate("the subject is longer than 240 bytes"));
            }
        }
    }
    Ok(text)
}

fn push_attribute(
    text: &mut String,
    attribute: &AttributeTypeAndValue<'_>,
) -> Result<(), UnusableCertificate> {
    let id = attribute.attr_type().to_id_string();
    let short = ATTRIBUTES.iter().find(|(known, _)| *known == id).map(|(_, short)| *short);
    text.push_str(short.unwrap_or(&id));
    text.push('=');
    let Ok(value) = attribute.as_str() else {
        // RFC 4514 requires this form for values that are not text.
        text.push('#');
        for byte in attribute.as_slice().iter().take(SUBJECT_MAX_BYTES) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        return Ok(());
    };
    if value.chars().any(char::is_control) {
        return Err(UnusableCertificate("the subject has control characters"));
    }
    let last = value.chars().count().saturating_sub(1);
    for (at, character) in value.chars().enumerate() {
        let is_special = matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=');
        let is_edge = character == ' ' && (at == 0 || at == last) || character == '#' && at == 0;
        if is_special || is_edge {
            text.push('\\');
        }
        text.push(character);
    }
    Ok(())
}

fn names(certificate: &X509Certificate<'_>) -> Result<Vec<CertificateName>, UnusableCertificate> {
    let extension = certificate.subject_alternative_name().map_err(|_| MALFORMED)?;
    let Some(extension) = extension else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for name in &extension.value.general_names {
        let (text, kind): (&str, fn(String) -> CertificateName) = match name {
            GeneralName::DNSName(text) => (text, CertificateName::Dns),
            GeneralName::URI(text) => (text, CertificateName::Uri),
            GeneralName::RFC822Name(text) => (text, CertificateName::Email),
            GeneralName::Invalid(..) => return Err(MALFORMED),
            // The other kinds of names do not identify clients.
            _ => continue,
        };
        if text.is_empty() || text.len() > NAME_MAX_BYTES || !text.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(UnusableCertificate("an alternative name is empty, too long or not printable"));
        }
        if names.len() == NAMES_MAX {
            return Err(UnusableCertificate("there are more than 64 alternative names"));
        }
        names.push(kind(text.to_owned()));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType};

    fn made(change: impl FnOnce(&mut CertificateParams)) -> Result<ClientCertificate, UnusableCertificate> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        ClientCertificate::parse(&[certificate.der().clone()])
    }

    fn with_common_name(name: &str) -> Result<ClientCertificate, UnusableCertificate> {
        made(|params| params.distinguished_name.push(DnType::CommonName, name))
    }

    #[test]
    fn the_subject_and_the_names_are_those_of_the_certificate() {
        let certificate = made(|params| {
            params.distinguished_name.push(DnType::OrganizationName, "Example");
            params.distinguished_name.push(DnType::CommonName, "alice");
            params.not_after = rcgen::date_time_ymd(2040, 1, 2);
            params.subject_alt_names = vec![
                SanType::DnsName("alice.example.com".try_into().unwrap()),
                SanType::IpAddress([127, 0, 0, 1].into()),
                SanType::URI("spiffe://example.com/ci".try_into().unwrap()),
                SanType::Rfc822Name("alice@example.com".try_into().unwrap()),
            ];
        })
        .unwrap();
        assert_eq!(certificate.subject(), "CN=alice,O=Example");
        assert_eq!(
            certificate.names(),
            [
                CertificateName::Dns("alice.example.com".into()),
                CertificateName::Uri("spiffe://example.com/ci".into()),
                CertificateName::Email("alice@example.com".into()),
            ]
        );
        assert_eq!(certificate.not_after(), 2_209_075_200);
        assert_eq!(certificate.fingerprint()[..], Sha256::digest(&certificate.chain()[0])[..]);
    }

    #[test]
    fn a_name_cannot_imitate_another_attribute() {
        assert_eq!(
            with_common_name("eve,O=admin+OU=\"x\"").unwrap().subject(),
            "CN=eve\\,O\\=admin\\+OU\\=\\\"x\\\""
        );
        assert_eq!(with_common_name(" #a ").unwrap().subject(), "CN=\\ #a\\ ");
        assert_eq!(with_common_name("#61").unwrap().subject(), "CN=\\#61");
        let hex = made(|params| {
            params.distinguished_name.push(DnType::CommonName, DnValue::BmpString("a".try_into().unwrap()));
        });
        assert_eq!(hex.unwrap().subject(), "CN=#0061");
        assert_eq!(made(|_| {}).unwrap().subject(), "");
    }

    #[test]
    fn names_that_are_too_long_or_cannot_be_printed_are_refused() {
        for name in ["a\nb", "a\0", "a\u{7f}", "a\u{85}b", &"a".repeat(SUBJECT_MAX_BYTES)] {
            assert!(with_common_name(name).is_err(), "{name:?}");
        }
        let with_uri = |uri: String| {
            made(|params| params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())])
        };
        assert!(with_uri(format!("x:{}", "a".repeat(NAME_MAX_BYTES - 2))).is_ok());
        for uri in ["", "x:\n", "x: y", &"a".repeat(NAME_MAX_BYTES + 1)] {
            assert!(with_uri(uri.to_owned()).is_err(), "{uri:?}");
        }
        let many = made(|params| {
            let name = SanType::DnsName("a.example".try_into().unwrap());
            params.subject_alt_names = vec![name; NAMES_MAX + 1];
        });
        assert!(many.is_err());
    }

    #[test]
    fn chains_are_bounded_and_their_first_certificate_is_well_formed() {
        let one = with_common_name("a").unwrap().chain()[0].clone();
        assert!(ClientCertificate::parse(&vec![one.clone(); CHAIN_MAX]).is_ok());
        assert!(ClientCertificate::parse(&vec![one.clone(); CHAIN_MAX + 1]).is_err());
        assert!(ClientCertificate::parse(&[]).is_err());
        let large = CertificateDer::from(vec![0; CHAIN_MAX_BYTES]);
        assert!(ClientCertificate::parse(&[one.clone(), large]).is_err());
        let mut longer = one.to_vec();
        longer.push(0);
        for bytes in [longer, one[..one.len() - 1].to_vec(), vec![0x30, 0x80], Vec::new()] {
            assert!(ClientCertificate::parse(&[bytes.into()]).is_err());
        }
    }

    #[test]
    fn a_certificate_with_any_changed_bit_has_printable_names_or_is_refused() {
        let certificate = made(|params| {
            params.distinguished_name.push(DnType::CommonName, "alice");
            params.subject_alt_names = vec![
                SanType::DnsName("alice.example.com".try_into().unwrap()),
                SanType::URI("spiffe://example.com/ci".try_into().unwrap()),
            ];
        });
        let bytes = certificate.unwrap().chain()[0].to_vec();
        let mut accepted = 0;
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let Ok(parsed) = ClientCertificate::parse(&[changed.into()]) else { continue };
            accepted += 1;
            assert!(
                parsed.subject().len() <= SUBJECT_MAX_BYTES && !parsed.subject().contains(char::is_control)
            );
            let printable = |name: &CertificateName| {
                let (CertificateName::Dns(text) | CertificateName::Uri(text) | CertificateName::Email(text)) =
                    name;
                !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
            };
            assert!(parsed.names().iter().all(printable));
        }
        assert!(accepted > 100, "a change of the signature is not noticed here");
    }
}
