//! TLS on both ports: versions, certificates of clients, reload, and what the commands say.

use crate::support::{
    PATIENCE, Server,
    certificates::{Authority, Pair, VALID, Valid},
    eventually, sh, shared_dir,
};
use gorego_client::ConnectOptions;
use gorego_reapi::proto::reapi::GetCapabilitiesRequest;
use serde_json::Value;
use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::SystemTime,
};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::transport::Channel;

/// A directory with `server.pem`, `server.key` and `ca.pem`, and the CA that has signed them.
struct Files {
    directory: TempDir,
    ca: Authority,
}

impl Files {
    fn new() -> Self {
        let (directory, ca) = (tempfile::tempdir().unwrap(), Authority::new("test CA"));
        ca.server(VALID).write(directory.path(), "server");
        fs::write(directory.path().join("ca.pem"), ca.pem()).unwrap();
        Self { directory, ca }
    }

    fn at(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// A certificate of a client, as NAME.pem and NAME.key.
    fn client(&self, name: &str) -> Pair {
        let pair = self.ca.client(name, VALID);
        pair.write(self.directory.path(), name);
        pair
    }

    /// A server with TLS on both ports, and more settings.
    async fn server(&self, more: &[(&str, &str)]) -> Server {
        let (cert, key) = (self.at("server.pem"), self.at("server.key"));
        let mut settings =
            vec![("TLS__CERT", &*cert), ("TLS__KEY", &*key), ("HTTP__LISTEN_ADDR", "127.0.0.1:0")];
        settings.extend(more);
        Server::with(&settings).await
    }

    /// The options to connect to a server by this name.
    fn options(&self, server: &Server, host: &str, client: Option<&str>) -> ConnectOptions {
        let port = server.address().rsplit_once(':').unwrap().1;
        let path = |name: String| PathBuf::from(self.at(&name));
        ConnectOptions {
            tls_ca: Some(path("ca.pem".into())),
            identity: client.map(|name| (path(format!("{name}.pem")), path(format!("{name}.key")))),
            ..format!("grpcs://{host}:{port}").into()
        }
    }

    async fn channel(&self, server: &Server, client: Option<&str>) -> Channel {
        self.options(server, "localhost", client).transport().unwrap().connect().await.unwrap()
    }
}

fn events(server: &Server, name: &str) -> Vec<Value> {
    server.log().into_iter().filter(|event| event["event"] == name).collect()
}

/// An HTTP client that trusts this CA and shows this certificate.
fn http_client(ca: &Authority, pair: Option<&Pair>, version: reqwest::tls::Version) -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ca = reqwest::Certificate::from_pem(ca.pem().as_bytes()).unwrap();
    let builder = reqwest::Client::builder().no_proxy().tls_certs_only([ca]);
    let builder = builder.tls_version_min(version).tls_version_max(version);
    match pair {
        Some(Pair { cert, key, .. }) => {
            builder.identity(reqwest::Identity::from_pem(format!("{cert}{key}").as_bytes()).unwrap())
        }
        None => builder,
    }
    .build()
    .unwrap()
}

/// GEN-01 and the rest of the protocol are the same with TLS.
#[tokio::test]
async fn both_ports_speak_tls_and_plaintext_is_told_so() {
    let files = Files::new();
    let server = files.server(&[]).await;
    let client = crate::support::Client::over(files.channel(&server, None).await);
    let result = client.run_command(sh("echo hello; head -c 3000000 /dev/zero >&2")).await;
    assert_eq!(client.stdout(&result).await, "hello\n");
    assert_eq!(client.stderr(&result).await.len(), 3_000_000);

    let http = server.http_address();
    for version in [reqwest::tls::Version::TLS_1_2, reqwest::tls::Version::TLS_1_3] {
        let client = http_client(&files.ca, None, version);
        let put =
            client.put(format!("https://{http}/cache/key")).body(vec![7; 1_000_000]).send().await.unwrap();
        assert!(put.status().is_success());
        let got = client.get(format!("https://{http}/cache/key")).send().await.unwrap();
        assert_eq!(got.version(), reqwest::Version::HTTP_11);
        let metrics =
            client.get(format!("https://{http}/metrics")).send().await.unwrap().text().await.unwrap();
        let expiry =
            metrics.lines().find_map(|line| line.strip_prefix("gorego_tls_certificate_expiry_seconds "));
        let expiry = expiry.unwrap().parse::<f64>().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((expiry - now - VALID.to as f64).abs() < 600.0, "{expiry}");
        assert_eq!(got.bytes().await.unwrap(), vec![7; 1_000_000]);
    }
    let mut plain = TcpStream::connect(http).unwrap();
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("use grpcs:// or https://"), "{answer}");
    eventually("the refusal is in the log", || {
        let refused = events(&server, "handshakes_failed");
        refused.iter().any(|event| event["reason"] == "plaintext" && event["peer"] == "127.0.0.1")
    })
    .await;
}

#[tokio::test]
async fn clients_prove_who_they_are_with_a_certificate_at_both_ports() {
    let files = Files::new();
    let alice = files.client("alice");
    let server = files.server(&[("TLS__CLIENT_CA", &files.at("ca.pem"))]).await;
    let http = format!("https://{}/healthz", server.http_address());
    for version in [reqwest::tls::Version::TLS_1_2, reqwest::tls::Version::TLS_1_3] {
        let known = http_client(&files.ca, Some(&alice), version).get(&http).send().await.unwrap();
        assert_eq!(known.text().await.unwrap().trim(), "ok");
        assert!(http_client(&files.ca, None, version).get(&http).send().await.is_err());
    }
    let mut client =
        gorego_client::stubs::CapabilitiesClient::new(files.channel(&server, Some("alice")).await);
    client.get_capabilities(GetCapabilitiesRequest::default()).await.unwrap();
    eventually("the refusal is in the log", || {
        let refused = events(&server, "handshakes_failed");
        refused.iter().any(|event| event["reason"] == "no_client_certificate")
    })
    .await;
}

#[tokio::test]
async fn a_new_certificate_is_used_for_new_connections_and_open_ones_go_on() {
    let files = Files::new();
    // This is how Kubernetes mounts a secret: the files are links through a directory that is a link too.
    let mount = files.directory.path().join("mount");
    let version = |name: &str, pair: &Pair| {
        fs::create_dir_all(mount.join(name)).unwrap();
        pair.write(&mount.join(name), "server");
    };
    version("..1", &files.ca.server(VALID));
    symlink("..1", mount.join("..data")).unwrap();
    for name in ["server.pem", "server.key"] {
        symlink(Path::new("..data").join(name), mount.join(name)).unwrap();
    }
    let path = |name: &str| mount.join(name).to_str().unwrap().to_owned();
    let server = files.server(&[("TLS__CERT", &path("server.pem")), ("TLS__KEY", &path("server.key"))]).await;
    let swap = |to: &str| {
        symlink(to, mount.join("..new")).unwrap();
        fs::rename(mount.join("..new"), mount.join("..data")).unwrap();
    };
    let shared = shared_dir();
    let end = shared.path().join("end");
    let client = crate::support::Client::over(files.channel(&server, None).await);
    let running = {
        let (client, end) = (client.clone(), end.display().to_string());
        tokio::spawn(async move {
            client.run_command(sh(&format!("until [ -e {end} ]; do sleep 0.01; done; echo done"))).await
        })
    };
    eventually("the command runs", || !events(&server, "operation_executing").is_empty()).await;

    // A key that belongs to another certificate changes nothing, and is reported once.
    version("..2", &Pair { key: files.ca.server(VALID).key, ..files.ca.server(VALID) });
    swap("..2");
    eventually("the bad pair is reported", || !events(&server, "tls_not_reloaded").is_empty()).await;
    files.channel(&server, None).await;

    // The new certificate is in its last quarter, so the server logs a warning.
    version("..3", &files.ca.server(Valid { from: -9 * 86_400, to: 86_400 }));
    swap("..3");
    eventually("the good pair is used", || !events(&server, "tls_reloaded").is_empty()).await;
    eventually("its end is warned about", || !events(&server, "tls_certificate_expires").is_empty()).await;
    assert_eq!(events(&server, "tls_not_reloaded").len(), 1);
    files.channel(&server, None).await;

    fs::write(&end, "").unwrap();
    let result = timeout(PATIENCE, running).await.unwrap().unwrap();
    assert_eq!(client.stdout(&result).await, "done\n", "over the connection from before");
}

#[tokio::test]
async fn a_revoked_client_loses_its_open_connection_and_others_keep_theirs() {
    let files = Files::new();
    let (alice, _bob) = (files.client("alice"), files.client("bob"));
    fs::write(files.at("crl.pem"), files.ca.revoked(&[])).unwrap();
    let server =
        files.server(&[("TLS__CLIENT_CA", &files.at("ca.pem")), ("TLS__CRL", &files.at("crl.pem"))]).await;
    let of = async |name| crate::support::Client::over(files.channel(&server, Some(name)).await);
    let (of_alice, of_bob) = (of("alice").await, of("bob").await);
    let action = of_alice.action(sh("sleep 1000"), crate::support::empty()).await;
    let mut run = of_alice.start(action).await;
    run.until(|_| true).await;
    fs::write(files.at("crl.pem"), files.ca.revoked(&[&alice])).unwrap();
    let end = async { while let Ok(Some(_)) = run.0.message().await {} };
    timeout(PATIENCE, end).await.expect("the stream of the revoked client ends");
    of_bob.missing(&[crate::support::sha256(b"x")]).await;
    let again = files.options(&server, "localhost", Some("alice"));
    let refused = gorego_client::Client::connect(again, "", &Default::default()).await.unwrap_err();
    assert!(refused.to_string().contains("it is revoked"), "{refused}");
}

/// `gorego` with these arguments, in a clean environment.
fn gorego(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.args(args).env_clear().env("PATH", "/usr/bin:/bin").output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_connect_with_tls_and_say_what_is_missing() {
    let files = Files::new();
    files.client("alice");
    let stranger = Authority::new("another CA");
    stranger.client("alice", VALID).write(files.directory.path(), "stranger");
    fs::write(files.at("other.pem"), stranger.pem()).unwrap();
    let secure = files.server(&[("TLS__CLIENT_CA", &files.at("ca.pem"))]).await;
    let plain = Server::with(&[]).await;
    let port = secure.address().rsplit_once(':').unwrap().1;
    let [ca, other] = ["ca.pem", "other.pem"].map(|name| files.at(name));
    let identity = |name: &str| [files.at(&format!("{name}.pem")), files.at(&format!("{name}.key"))];
    let ([cert, key], [wrong_cert, wrong_key]) = (identity("alice"), identity("stranger"));
    let endpoint = format!("grpcs://localhost:{port}");
    let run = |endpoint: &str, ca: &str, identity: &[&str]| {
        let mut args = vec!["exec", "--endpoint", endpoint, "--tls-ca", ca];
        args.extend(identity);
        args.extend(["--", "echo", "hello"]);
        gorego(&args)
    };
    let mine = ["--tls-cert", &cert, "--tls-key", &key];
    let done = run(&endpoint, &ca, &mine);
    assert!(done.status.success() && done.stdout == b"hello\n", "{done:?}");
    for (endpoint, ca, identity, hint) in [
        (&*endpoint, &other, &mine[..], "name the file of its CA with --tls-ca"),
        (&format!("grpcs://127.0.0.2:{port}"), &ca, &mine, "refused"),
        (&endpoint, &ca, &[], "give one with --tls-cert and --tls-key"),
        (&endpoint, &ca, &["--tls-cert", &wrong_cert, "--tls-key", &wrong_key], "does not know the CA"),
        (&format!("grpcs://{}", plain.address()), &ca, &mine, "write grpc:// instead of grpcs://"),
    ] {
        let failed = run(endpoint, ca, identity);
        let said = String::from_utf8_lossy(&failed.stderr);
        assert!(failed.status.code() == Some(125) && said.contains(hint), "{hint}: {said}");
    }
    let failed = gorego(&["exec", "--endpoint", &format!("grpc://localhost:{port}"), "--", "true"]);
    assert!(
        String::from_utf8_lossy(&failed.stderr).contains("write grpcs:// instead of grpc://"),
        "{failed:?}"
    );

    let verify = |more: &[&str]| {
        let mut args = vec!["verify", &endpoint, "--only", "GEN-01,CAP-01", "--tls-ca", &ca];
        args.extend(more);
        gorego(&args)
    };
    assert!(verify(&mine).status.success(), "{:?}", verify(&mine));
    let failed = verify(&[]);
    let said = String::from_utf8_lossy(&failed.stderr);
    assert!(failed.status.code() == Some(2) && said.contains("--tls-cert and --tls-key"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_is_refused_with_the_names_that_it_has() {
    let files = Files::new();
    let server = files.server(&[]).await;
    let port = server.address().rsplit_once(':').unwrap().1;
    // The endpoint names the same machine by a name that is not in the certificate.
    let options = ConnectOptions {
        tls_ca: Some(files.at("ca.pem").into()),
        ..format!("grpcs://[::ffff:127.0.0.1]:{port}").into()
    };
    let error = gorego_client::Client::connect(options, "", &Default::default()).await.unwrap_err();
    assert!(error.to_string().contains("is not valid for [::ffff:127.0.0.1]"), "{error}");
}

#[tokio::test]
async fn a_server_does_not_start_with_files_that_cannot_be_used() {
    let files = Files::new();
    let store = tempfile::tempdir().unwrap();
    let start = |settings: &[(&str, String)]| {
        let mut command = crate::support::command(store.path());
        command.envs(settings.iter().map(|(key, value)| (format!("GOREGO_TLS__{key}"), value)));
        let ended = command.output().unwrap();
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    let cert = ("CERT", files.at("server.pem"));
    let (code, said) = start(&[cert.clone(), ("KEY", files.at("absent.key"))]);
    assert!(code == Some(1) && said.contains("tls.key = ") && said.contains("absent.key"), "{said}");
    let (code, said) = start(&[cert]);
    assert!(code == Some(2) && said.contains("tls.key") && said.contains("is needed"), "{said}");
}
