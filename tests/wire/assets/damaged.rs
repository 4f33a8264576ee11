//! Damage to the files in which bindings of assets, and reports of different outputs, survive a restart.

use super::{code, content, fetch, push, wanted};
use crate::{
    admin::gorego,
    support::{Server, empty, sh_with},
};
use gorego_reapi::{
    digest::Digest,
    proto::{asset::PushBlobRequest, reapi::ExecuteRequest},
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::{fs, os::unix::fs::symlink, path::Path, process::Command, sync::Arc};
use tempfile::TempDir;
use tonic::Code;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Flip,
    Truncate,
    Empty,
    Extend,
    Delete,
    /// The other file is copied to its place.
    Other,
    Fifo,
    Link,
    Directory,
}

const HARMS: [Harm; 9] = [
    Harm::Flip,
    Harm::Truncate,
    Harm::Empty,
    Harm::Extend,
    Harm::Delete,
    Harm::Other,
    Harm::Fifo,
    Harm::Link,
    Harm::Directory,
];

impl Harm {
    fn inflict(self, file: &Path, other: &Path) {
        let mut bytes = fs::read(file).unwrap();
        let middle = bytes.len() / 2;
        match self {
            Self::Flip => bytes[middle] ^= 1,
            Self::Truncate => bytes.truncate(middle),
            Self::Empty => bytes.clear(),
            Self::Extend => bytes.extend([7; 700]),
            Self::Other => bytes = fs::read(other).unwrap(),
            Self::Delete | Self::Fifo | Self::Link | Self::Directory => {
                fs::remove_file(file).unwrap();
                match self {
                    Self::Fifo => mknodat(CWD, file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap(),
                    Self::Link => symlink("/etc/passwd", file).unwrap(),
                    Self::Directory => fs::create_dir(file).unwrap(),
                    _ => {}
                }
                return;
            }
        }
        fs::write(file, bytes).unwrap();
    }
}

fn offer(pushed: Digest) -> PushBlobRequest {
    PushBlobRequest { uris: vec!["urn:x".into()], blob_digest: Some(pushed.to_wire()), ..Default::default() }
}

/// The reports of a server as JSON.
async fn reports(server: &Server) -> String {
    let output = gorego(server, &["store", "nondeterminism", "--json"]).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

async fn stop(mut server: Server) -> Arc<TempDir> {
    server.signal("TERM");
    assert!(server.exit().await.success());
    server.shared_store()
}

/// Whatever happens to these files, between two runs or while the server runs, the server starts, an asset stands for
/// the right content or for nothing, and a report is right or gone. What is bound afterwards survives the next restart.
#[tokio::test]
async fn what_assets_stand_for_and_reports_are_right_or_forgotten() {
    let server = Server::start().await;
    let client = server.client().await;
    let pushed = client.upload("pushed").await;
    push(&server, offer(pushed)).await.unwrap();
    let action = client.action(sh_with("date +%N > now", &["now"]), empty()).await;
    client.run(action).await;
    let again = ExecuteRequest { skip_cache_lookup: true, ..client.request(action) };
    client.start_request(again).await.unwrap().finish().await;
    let reported = reports(&server).await;
    assert!(reported.contains("now"), "{reported}");
    drop(client);
    let template = stop(server).await;
    for harm in HARMS {
        for is_running in [false, true] {
            println!("{harm:?}, {}", if is_running { "running" } else { "stopped" });
            let store = Arc::new(tempfile::tempdir().unwrap());
            let mut copy = Command::new("cp");
            copy.arg("-a").arg(template.path().join(".")).arg(store.path());
            assert!(copy.status().unwrap().success());
            let [bindings, list] =
                ["assets", "nondeterminism"].map(|name| store.path().join("v1").join(name));
            let of_bindings = fs::read(&bindings).unwrap();
            let damage = || {
                harm.inflict(&bindings, &list);
                // The other one is whole.
                let whole = store.path().join("whole");
                fs::write(&whole, &of_bindings).unwrap();
                harm.inflict(&list, &whole);
                fs::remove_file(whole).unwrap();
            };
            if !is_running {
                damage();
            }
            let mut server = Server::on(store.clone(), &[]).await;
            if is_running {
                damage();
                assert_eq!(reports(&server).await, reported);
                assert_eq!(content(&server, wanted(&["urn:x"], &[])).await, b"pushed");
                server = Server::on(stop(server).await, &[]).await;
            }
            let found = fetch(&server, wanted(&["urn:x"], &[])).await.unwrap();
            match code(&found) {
                Code::Ok => assert_eq!(content(&server, wanted(&["urn:x"], &[])).await, b"pushed"),
                other => assert_eq!(other, Code::NotFound),
            }
            let listed = reports(&server).await;
            assert!(listed == reported || !listed.contains("now"), "{listed}");
            push(&server, offer(pushed)).await.unwrap();
            if harm != Harm::Directory {
                let server = Server::on(stop(server).await, &[]).await;
                assert_eq!(content(&server, wanted(&["urn:x"], &[])).await, b"pushed");
            }
        }
    }
}
