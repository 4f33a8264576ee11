//! Large blobs over TLS, compared with the same blobs without it.

use super::{
    groups::{incompressible, read, runtime, write},
    report::Report,
    target::{Client, Target},
};
use bytes::Bytes;
use gorego_reapi::{digest::DigestFunction, proto::bytestream::ReadRequest};
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer};
use std::sync::Arc;
use tonic::transport::{Certificate, ClientTlsConfig};

const SIZE: usize = 256 << 20;
const CHUNK: usize = 128 << 10;
const ROUNDS: usize = 5;
/// At least this part of the speed without TLS.
const GOAL: f64 = 0.65;

/// Uploads and downloads with and without TLS in turns, and the best of each.
pub(crate) fn transfers(report: &mut Report) {
    let directory = tempfile::tempdir().expect("a directory");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    let certificate = params.self_signed(&key).expect("a certificate");
    let [cert_path, key_path] = ["cert", "key"].map(|name| directory.path().join(name));
    std::fs::write(&cert_path, certificate.pem()).expect("a file");
    std::fs::write(&key_path, key.serialize_pem()).expect("a file");
    let plain = Target::start();
    let store = tempfile::tempdir().expect("a directory");
    let (cert_path, key_path) = (cert_path.display().to_string(), key_path.display().to_string());
    let secure =
        Target::start_on(store, &[("GOREGO_TLS__CERT", &*cert_path), ("GOREGO_TLS__KEY", &*key_path)]);
    let address = secure.endpoint.trim_start_matches("http://").to_owned();
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(certificate.pem()));
    let config = config.domain_name("localhost");
    runtime().block_on(async {
        let cipher = cipher(&address, certificate.der().clone()).await;
        let with = Client::connect_with(&format!("https://{address}"), Some(config)).await.bytes;
        let without = Client::connect(&plain.endpoint).await.bytes;
        let [mut up, mut plain_up, mut down, mut plain_down] = [0f64; 4];
        let mut blob = incompressible(SIZE);
        for round in 0..ROUNDS {
            blob[..8].copy_from_slice(&(round as u64).to_le_bytes());
            let bytes = Bytes::from(blob.clone());
            let digest = DigestFunction::Sha256.digest(&bytes);
            let named = ReadRequest { resource_name: digest.blob_name(), ..Default::default() };
            plain_up = plain_up.max(write(&without, digest, &bytes, CHUNK).await);
            up = up.max(write(&with, digest, &bytes, CHUNK).await);
            plain_down = plain_down.max(read(&without, named.clone(), SIZE).await);
            down = down.max(read(&with, named, SIZE).await);
        }
        for (what, with, without) in [("upload", up, plain_up), ("download", down, plain_down)] {
            report.add(
                &format!("ByteStream {what} of 256 MiB over TLS ({cipher})"),
                format!("{:.0} MB/s ({:.0} %)", with / 1e6, 100.0 * with / without),
                format!("without TLS {:.0} MB/s", without / 1e6),
                &format!("{:.0} %", GOAL * 100.0),
                with >= without * GOAL,
            );
        }
    });
}

/// The cipher suite that the server and the library of the client agree on.
async fn cipher(address: &str, trusted: CertificateDer<'static>) -> String {
    let mut roots = RootCertStore::empty();
    roots.add(trusted).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect("localhost".try_into().expect("a name"), stream).await.expect("TLS");
    let suite = stream.get_ref().1.negotiated_cipher_suite().expect("a cipher suite");
    format!("{:?}", suite.suite())
}
