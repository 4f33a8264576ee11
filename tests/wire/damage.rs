//! Stored files that another process has changed: wrong bytes are never served, and everything recovers (CAS-22).

use crate::support::{Client, Server, damage, directory, empty, file, files_below, sh, sh_with, sha256};
use gorego_reapi::{
    digest::Digest,
    proto::{
        bytestream::ReadRequest,
        reapi::{BatchReadBlobsRequest, GetTreeRequest},
    },
};
use prost::Message as _;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, mknodat, utimensat};
use std::{
    fs,
    os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::Duration,
};
use tonic::Code;

/// The size of a blob that is not hashed at every read.
const LARGE: usize = 300_000;

fn stored_file(server: &Server, digest: Digest) -> PathBuf {
    let hash = digest.hash_hex();
    let files = files_below(server.store());
    let named =
        |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&hash));
    files.iter().find(named).unwrap_or_else(|| panic!("{digest} is not among {files:?}")).clone()
}

/// Flips a bit of a stored file in place, and restores its size, mode and times.
fn tamper(server: &Server, digest: Digest) {
    // This is longer than a tick of the kernel's clock. Within one tick, a second change would not be visible in the
    // change time.
    std::thread::sleep(Duration::from_millis(40));
    let path = stored_file(server, digest);
    let before = fs::metadata(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let stored = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    stored.read_exact_at(&mut byte, 200_000).unwrap();
    stored.write_all_at(&[byte[0] ^ 1], 200_000).unwrap();
    fs::set_permissions(&path, before.permissions()).unwrap();
    let at = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: at(before.atime(), before.atime_nsec()),
        last_modification: at(before.mtime(), before.mtime_nsec()),
    };
    utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
}

fn content(seed: usize) -> Vec<u8> {
    format!("{seed:08}").into_bytes().repeat(LARGE / 8)
}

async fn read_end(client: &Client, blob: Digest) -> Result<Vec<u8>, tonic::Status> {
    let resource_name = client.name(&blob.blob_name());
    client.read_request(ReadRequest { resource_name, read_offset: LARGE as i64 - 10, read_limit: 0 }).await
}

async fn batch_code(client: &Client, blob: Digest) -> i32 {
    let request = BatchReadBlobsRequest {
        instance_name: client.instance.clone(),
        digests: vec![blob.to_wire()],
        ..Default::default()
    };
    let answer = client.cas.clone().batch_read_blobs(request).await.unwrap().into_inner();
    answer.responses[0].status.as_ref().map_or(0, |status| status.code)
}

async fn get_tree(client: &Client, root: Digest) -> Result<(), tonic::Status> {
    let request = GetTreeRequest {
        instance_name: client.instance.clone(),
        root_digest: Some(root.to_wire()),
        ..Default::default()
    };
    let mut pages = client.cas.clone().get_tree(request).await?.into_inner();
    while pages.message().await?.is_some() {}
    Ok(())
}

/// The content of twenty-five blobs changes while size and modification time stay: each kind of read misses, and a new
/// upload repairs the blob.
#[tokio::test]
async fn changed_blobs_are_misses_by_every_way_and_heal() {
    let server = Server::start().await;
    let client = server.client().await;
    for seed in 0..25 {
        let bytes = content(seed);
        let blob = client.upload(bytes.clone()).await;
        assert_eq!(client.read(blob).await.unwrap(), bytes);
        tamper(&server, blob);
        match seed % 5 {
            0 => assert_eq!(client.read(blob).await.unwrap_err().code(), Code::NotFound),
            1 => assert_eq!(read_end(&client, blob).await.unwrap_err().code(), Code::NotFound),
            2 => assert_eq!(batch_code(&client, blob).await, Code::NotFound as i32),
            3 => {
                let root = client.upload(directory(vec![file("in", blob)], vec![], vec![])).await;
                let action = client.action(sh("cat in"), root).await;
                let response = client.run(action).await;
                let status = response.status.unwrap();
                assert_eq!(status.code, Code::FailedPrecondition as i32, "{}", status.message);
                assert_eq!(client.cached(action).await, None);
            }
            // It is not read before it is uploaded again.
            _ => {}
        }
        if seed % 5 < 4 {
            assert_eq!(client.missing(&[blob]).await, [blob], "{seed}");
        }
        client.upload(bytes.clone()).await;
        assert_eq!(client.read(blob).await.unwrap(), bytes, "{seed}");
    }
    let names = (0..3_000).map(|n| file(&format!("{n:05}"), sha256(b""))).collect();
    let large = directory(names, vec![], vec![]).encode_to_vec();
    let root = client.upload(large).await;
    tamper(&server, root);
    assert_eq!(get_tree(&client, root).await.unwrap_err().code(), Code::NotFound);
}

/// Until a damaged file is read, its blob counts as present. `gorego exec` runs the action again if an output is gone.
#[tokio::test(flavor = "multi_thread")]
async fn exec_runs_an_action_again_whose_cached_output_is_gone() {
    let server = Server::start().await;
    let home = tempfile::tempdir().unwrap();
    let exec = || {
        let mut exec = std::process::Command::new(env!("CARGO_BIN_EXE_gorego"));
        exec.args(["exec", "--endpoint", &format!("grpc://{}", server.address()), "--output", "o"]);
        exec.arg("--output-dir").arg(home.path()).args(["--", "sh", "-c", "echo ran; seq 100000 > o"]);
        tokio::task::block_in_place(|| exec.output()).unwrap()
    };
    assert_eq!(exec().stdout, b"ran\n");
    let output = fs::read(home.path().join("o")).unwrap();
    fs::remove_file(stored_file(&server, sha256(&output))).unwrap();
    fs::remove_file(home.path().join("o")).unwrap();
    let again = exec();
    assert_eq!((again.status.code(), again.stdout), (Some(0), b"ran\n".to_vec()), "{:?}", again.stderr);
    assert_eq!(fs::read(home.path().join("o")).unwrap(), output);
}

/// AC-03: an output that was damaged while the server was down invalidates the result, even if it was not read before.
#[tokio::test]
async fn a_result_is_gone_after_a_restart_when_its_output_went_bad() {
    let server = Server::start().await;
    let client = server.client().await;
    let script = "head -c 300000 /dev/zero > o";
    let action = client.action(sh_with(script, &["o"]), empty()).await;
    client.run(action).await;
    let output = sha256(&vec![0; LARGE]);
    tamper(&server, output);
    let server = Server::on(server.kill().await, &[]).await;
    let client = server.client().await;
    assert_eq!(client.cached(action).await, None);
    assert_eq!(client.missing(&[output]).await, [output]);
    let again = client.run(action).await;
    assert!(!again.cached_result);
    assert!(client.cached(action).await.is_some() && client.read(output).await.is_ok());
}

/// CAS-22: a small blob that went bad is a miss, whether it was read before, after a restart or never, and heals.
#[tokio::test]
async fn a_small_blob_that_went_bad_is_a_miss_and_heals() {
    let mut server = Server::start().await;
    for restarted in [false, true] {
        for way in 0..3 {
            let client = server.client().await;
            let bytes = format!("{restarted} {way} ").repeat(1_000).into_bytes();
            let blob = client.upload(bytes.clone()).await;
            if restarted {
                server = Server::on(server.kill().await, &[]).await;
            }
            let client = server.client().await;
            assert_eq!(client.read(blob).await.unwrap(), bytes);
            damage(&server, blob);
            match way {
                0 => assert_eq!(client.read(blob).await.unwrap_err().code(), Code::NotFound),
                1 => assert_eq!(batch_code(&client, blob).await, Code::NotFound as i32),
                // It is not read before it is uploaded again.
                _ => {}
            }
            client.upload(bytes.clone()).await;
            assert_eq!(client.read(blob).await.unwrap(), bytes);
            assert_eq!(client.missing(&[blob]).await, []);
        }
    }
}

#[tokio::test]
async fn a_fifo_in_the_place_of_a_stored_file_holds_up_neither_readers_nor_the_end() {
    let mut server = Server::start().await;
    let client = server.client().await;
    for seed in 1..3 {
        let blob = client.upload(content(seed)).await;
        let path = stored_file(&server, blob);
        fs::remove_file(&path).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(client.read(blob).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(client.missing(&[blob]).await, [blob]);
    }
    server.signal("TERM");
    assert!(server.exit().await.success());
}
