//! [`CertificateGrant`]: the roles that a client certificate gives. Pure.

use super::{
    certificate::{CertificateName, ClientCertificate},
    claim_pattern::ClaimPattern,
    policy::Policy,
    principal::{Principal, PrincipalKind},
    role::Role,
};
use gorego_reapi::error::Result;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// The part of a certificate that a grant examines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateField {
    /// The subject, as `openssl x509 -subject -nameopt RFC2253` prints it.
    Subject,
    /// One of the alternative names: a URI if the pattern has a colon, an e-mail address if it has an "@" and no colon,
    /// and a host name otherwise. An authority may check these kinds in different ways, so a name of one kind never
    /// matches a pattern of another kind.
    Name,
}

/// The kind of text that a pattern is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CertificatePart {
    Subject,
    Dns,
    Uri,
    Email,
}

impl CertificatePart {
    fn of(field: CertificateField, pattern: &str) -> Self {
        match field {
            CertificateField::Subject => Self::Subject,
            CertificateField::Name if pattern.contains(':') => Self::Uri,
            CertificateField::Name if pattern.contains('@') => Self::Email,
            CertificateField::Name => Self::Dns,
        }
    }
}

/// Roles for holders of certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateGrant {
    part: CertificatePart,
    pattern: ClaimPattern,
    /// The names of the roles.
    pub roles: Vec<String>,
}

impl CertificateGrant {
    /// Parses a grant.
    ///
    /// # Errors
    /// Why the pattern is not valid.
    pub fn parse(
        field: CertificateField,
        pattern: &str,
        roles: Vec<String>,
    ) -> std::result::Result<Self, String> {
        let part = CertificatePart::of(field, pattern);
        Ok(Self { part, pattern: ClaimPattern::parse(pattern)?, roles })
    }

    fn covers(&self, certificate: &ClientCertificate) -> bool {
        if self.part == CertificatePart::Subject {
            return self.pattern.matches(certificate.subject());
        }
        certificate.names().iter().any(|name| {
            let (part, _, text) = taken_apart(name);
            part == self.part && self.pattern.matches(text)
        })
    }
}

/// The kind of a name, the prefix of its principal's name, and its text.
fn taken_apart(name: &CertificateName) -> (CertificatePart, &'static str, &str) {
    match name {
        CertificateName::Dns(text) => (CertificatePart::Dns, "DNS", text),
        CertificateName::Uri(text) => (CertificatePart::Uri, "URI", text),
        CertificateName::Email(text) => (CertificatePart::Email, "email", text),
    }
}

/// The name of a certificate's holder in the name of its principal: the subject or, without one, the first alternative
/// name with its kind or, without one, the fingerprint. The text of an alternative name could equal a subject, but no
/// subject begins with the word of a kind and a colon.
fn holder(certificate: &ClientCertificate) -> String {
    match (certificate.subject(), certificate.names().first()) {
        ("", Some(name)) => {
            let (_, kind, text) = taken_apart(name);
            format!("{kind}:{text}")
        }
        ("", None) => format!("SHA256:{}", const_hex::encode(certificate.fingerprint())),
        (subject, _) => subject.to_owned(),
    }
}

/// The principal of a certificate's holder, with the roles of all matching grants.
///
/// # Errors
/// `Invalid` if a role does not exist.
pub(super) fn principal(
    certificate: &ClientCertificate,
    grants: &[CertificateGrant],
    policy: &Policy,
) -> Result<Principal> {
    let mut roles: Vec<Arc<Role>> = policy.everybody().to_vec();
    for grant in grants.iter().filter(|grant| grant.covers(certificate)) {
        roles.extend(policy.roles_named(&grant.roles)?);
    }
    let holder = holder(certificate);
    Ok(Principal::new(PrincipalKind::Certificate, &holder, roles, Some(end(certificate))))
}

/// The end of the validity of a certificate.
pub(super) fn end(certificate: &ClientCertificate) -> SystemTime {
    let seconds = u64::try_from(certificate.not_after()).unwrap_or_default();
    // An end that cannot be represented counts as the start of the epoch, so the certificate has expired.
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn certificate(subject: &[(DnType, &str)], uri: Option<&str>) -> ClientCertificate {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.subject_alt_names = uri.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.not_after = rcgen::date_time_ymd(2040, 1, 2);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        ClientCertificate::parse(&[certificate.der().clone()]).unwrap()
    }

    #[test]
    fn a_certificate_gives_the_roles_of_the_grants_that_cover_it() {
        let grant = |field, pattern: &str, role: &str| {
            CertificateGrant::parse(field, pattern, vec![role.to_owned()]).unwrap()
        };
        let grants = [
            grant(CertificateField::Subject, "CN=*,OU=Build,O=Example", "ci"),
            grant(CertificateField::Name, "spiffe://example.com/ci/*", "worker"),
            grant(CertificateField::Subject, "CN=root,O=Example", "admin"),
        ];
        let policy = Policy::with_roles([], &["reader"]);
        let roles = |certificate: &ClientCertificate| {
            let principal = principal(certificate, &grants, &policy).unwrap();
            let roles: Vec<_> = principal.roles().iter().map(|role| role.name.clone()).collect();
            (principal.name().to_owned(), roles.join(" "))
        };
        use DnType::{CommonName, OrganizationName, OrganizationalUnitName};
        let build = [(OrganizationName, "Example"), (OrganizationalUnitName, "Build"), (CommonName, "a")];
        let both = certificate(&build, Some("spiffe://example.com/ci/linux"));
        assert_eq!(roles(&both), ("cert:CN=a,OU=Build,O=Example".into(), "reader ci worker".into()));
        assert_eq!(end(&both), SystemTime::UNIX_EPOCH + Duration::from_secs(2_209_075_200));
        let named = certificate(&[], Some("spiffe://example.com/ci/linux/a"));
        assert_eq!(roles(&named), ("cert:URI:spiffe://example.com/ci/linux/a".into(), "reader".into()));
        let liar = certificate(&[(OrganizationName, "x"), (CommonName, "root,O=Example")], None);
        assert_eq!(roles(&liar).1, "reader");
        assert!(roles(&certificate(&[], None)).0.len() > "cert:".len());
        for pattern in ["*", "**", ""] {
            assert!(
                CertificateGrant::parse(CertificateField::Name, pattern, Vec::new()).is_err(),
                "{pattern}"
            );
        }
    }

    #[test]
    fn a_name_of_one_kind_stands_neither_for_another_kind_nor_for_a_subject() {
        let made = |name: SanType| {
            let mut params = CertificateParams::default();
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.subject_alt_names = vec![name];
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            ClientCertificate::parse(&[certificate.der().clone()]).unwrap()
        };
        let dns = |text: &str| made(SanType::DnsName(text.try_into().unwrap()));
        let uri = |text: &str| made(SanType::URI(text.try_into().unwrap()));
        let email = |text: &str| made(SanType::Rfc822Name(text.try_into().unwrap()));
        let covers = |pattern: &str, certificate: &ClientCertificate| {
            CertificateGrant::parse(CertificateField::Name, pattern, Vec::new()).unwrap().covers(certificate)
        };
        assert!(covers("*@example.com", &email("a@example.com")));
        assert!(covers("*.example.com", &dns("a.example.com")));
        assert!(covers("spiffe://**", &uri("spiffe://a/b")));
        for (pattern, liar) in [
            ("*@example.com", uri("x:eve@example.com")),
            ("*@example.com", dns("eve@example.com")),
            ("*.example.com", uri("x:eve.example.com")),
            ("*.example.com", email("eve@x.example.com")),
            ("spiffe://**", dns("spiffe://a/b")),
            ("spiffe://**", email("spiffe://a/b")),
        ] {
            assert!(!covers(pattern, &liar), "{pattern} {liar:?}");
        }
        let alice = certificate(&[(DnType::CommonName, "alice")], None);
        let hash = const_hex::encode(certificate(&[], None).fingerprint());
        let names: std::collections::BTreeSet<_> =
            [alice, dns("CN=alice"), uri("CN=alice"), email("CN=alice"), dns(&hash)]
                .iter()
                .map(holder)
                .collect();
        assert_eq!(names.len(), 5, "{names:?}");
    }
}
