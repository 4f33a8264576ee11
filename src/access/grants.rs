//! [`CertificateGrant`]: which roles a client certificate gives. Pure.

use super::{
    certificate::{CertificateName, ClientCertificate},
    jwt::ClaimPattern,
    policy::Policy,
    principal::{Principal, PrincipalKind},
    role::Role,
};
use gorego_reapi::error::Result;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// The part of a certificate that a grant is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateField {
    /// The subject, as `openssl x509 -subject -nameopt RFC2253` prints it.
    Subject,
    /// One of the alternative names: a host, a URI or an e-mail address.
    Name,
}

/// Roles for the holders of certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateGrant {
    field: CertificateField,
    pattern: ClaimPattern,
    /// The names of the roles.
    pub roles: Vec<String>,
}

impl CertificateGrant {
    /// Parses a grant.
    ///
    /// # Errors
    /// Why the pattern is none.
    pub fn parse(
        field: CertificateField,
        pattern: &str,
        roles: Vec<String>,
    ) -> std::result::Result<Self, String> {
        Ok(Self { field, pattern: ClaimPattern::parse(pattern)?, roles })
    }

    fn covers(&self, certificate: &ClientCertificate) -> bool {
        match self.field {
            CertificateField::Subject => self.pattern.matches(certificate.subject()),
            CertificateField::Name => certificate.names().iter().any(|name| self.pattern.matches(text(name))),
        }
    }
}

fn text(name: &CertificateName) -> &str {
    let (CertificateName::Dns(text) | CertificateName::Uri(text) | CertificateName::Email(text)) = name;
    text
}

/// The principal of the holder of a certificate, with the roles of all grants that cover it. It is known by the subject, or else by
/// the first alternative name, or else by the fingerprint.
///
/// # Errors
/// `Invalid` for a role that does not exist.
pub(super) fn principal(
    certificate: &ClientCertificate,
    grants: &[CertificateGrant],
    policy: &Policy,
) -> Result<Principal> {
    let mut roles: Vec<Arc<Role>> = policy.everybody().to_vec();
    for grant in grants.iter().filter(|grant| grant.covers(certificate)) {
        roles.extend(policy.roles_named(&grant.roles)?);
    }
    let fingerprint;
    let holder = match (certificate.subject(), certificate.names().first()) {
        ("", None) => {
            fingerprint = const_hex::encode(certificate.fingerprint());
            &fingerprint
        }
        ("", Some(name)) => text(name),
        (subject, _) => subject,
    };
    Ok(Principal::new(PrincipalKind::Certificate, holder, roles, Some(end(certificate))))
}

/// The end of the validity of a certificate.
pub(super) fn end(certificate: &ClientCertificate) -> SystemTime {
    let seconds = u64::try_from(certificate.not_after()).unwrap_or_default();
    // A certificate without an end in this calendar ends with it.
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
        assert_eq!(roles(&named), ("cert:spiffe://example.com/ci/linux/a".into(), "reader".into()));
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
}
