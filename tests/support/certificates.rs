//! [`Authority`]: a CA for tests, and the certificates and lists of revoked ones that it signs.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

/// A certificate with its key, in PEM.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) cert: String,
    pub(crate) key: String,
    pub(crate) serial: u64,
}

impl Pair {
    /// Writes `NAME.pem` and `NAME.key`, and returns their paths.
    pub(crate) fn write(&self, directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        let paths = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
        std::fs::write(&paths.0, &self.cert).unwrap();
        std::fs::write(&paths.1, &self.key).unwrap();
        paths
    }
}

/// How long a certificate is valid, from now; negative for the past.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Valid {
    pub(crate) from: i64,
    pub(crate) to: i64,
}

/// A certificate that is valid now and for years.
pub(crate) const VALID: Valid = Valid { from: -86_400, to: 10 * 365 * 86_400 };

/// A CA for tests.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = named(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2099, 1, 1));
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Its own certificate.
    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate of a server on this machine.
    pub(crate) fn server(&self, valid: Valid) -> Pair {
        self.issue(named("server"), valid, |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.subject_alt_names = vec![
                SanType::DnsName("localhost".try_into().unwrap()),
                SanType::IpAddress([127, 0, 0, 1].into()),
            ];
        })
    }

    /// A certificate of a client with this common name.
    pub(crate) fn client(&self, name: &str, valid: Valid) -> Pair {
        self.issue(named(name), valid, |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        valid: Valid,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Pair {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let epoch = date_time_ymd(1970, 1, 1);
        params.serial_number = Some(SerialNumber::from(serial));
        (params.not_before, params.not_after) =
            (epoch + in_seconds(valid.from), epoch + in_seconds(valid.to));
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap().pem();
        Pair { cert, key: key.serialize_pem(), serial }
    }

    /// The list of these revoked certificates.
    pub(crate) fn revoked(&self, pairs: &[&Pair]) -> String {
        let epoch = date_time_ymd(1970, 1, 1);
        let revoked = pairs.iter().map(|pair| RevokedCertParams {
            serial_number: SerialNumber::from(pair.serial),
            revocation_time: epoch + in_seconds(-60),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: epoch + in_seconds(-60),
            next_update: epoch + in_seconds(86_400),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// The time that is this many seconds from now, in seconds since 1970.
fn in_seconds(seconds: i64) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    Duration::from_secs(now.checked_add_signed(seconds).unwrap())
}
