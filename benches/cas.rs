//! The cost of the store without the network: `cargo bench --bench cas [-- BLOBS]`.
//!
//! Prints one line per measurement. Times are wall-clock times of one thread and its blocking threads. Compare them
//! with the lines about the bare file system in the same run.
#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use gorego::{
    actors::cas::{CloseStore, Upload, client::Provenance, resolve::Resolution},
    caller::Owner,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi,
};
use prost::Message as _;
use std::{
    fs,
    os::unix::fs::OpenOptionsExt as _,
    time::{Duration, Instant},
};

const SHA256: DigestFunction = DigestFunction::Sha256;

fn report(what: &str, times: u32, elapsed: Duration) {
    println!("{what:<55} {:>12.2} us", elapsed.as_secs_f64() * 1e6 / f64::from(times));
}

#[actix::main]
async fn main() {
    let blobs: u32 = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(20_000);
    let root = tempfile::tempdir().unwrap();
    let settings = support::settings(root.path().join("store"));
    let (cas, main) = support::open(&settings);

    let bare = root.path().join("bare");
    fs::create_dir(&bare).unwrap();
    let start = Instant::now();
    for n in 0..1_000u32 {
        let options = fs::OpenOptions::new().write(true).create_new(true).mode(0o444).to_owned();
        let mut file = options.open(bare.join(n.to_string())).unwrap();
        std::io::Write::write_all(&mut file, &[1; 1_000]).unwrap();
    }
    report("bare: create and write 1,000 bytes", 1_000, start.elapsed());

    let content = |n: u32| Bytes::from([&n.to_le_bytes()[..], &[0; 996]].concat());
    let digests: Vec<Digest> = (0..blobs).map(|n| SHA256.digest(&content(n))).collect();
    let start = Instant::now();
    for first in (0..blobs).step_by(1_000) {
        let batch = (first..blobs.min(first + 1_000)).map(|n| (digests[n as usize], content(n))).collect();
        assert!(cas.write_many(&main, batch).await.unwrap().iter().all(Result::is_ok));
    }
    report("write_many, 1,000 bytes each", blobs, start.elapsed());

    let start = Instant::now();
    for n in 0..1_000u32 {
        let bytes = content(u32::MAX - n);
        let digest = SHA256.digest(&bytes);
        let Upload::Writer(mut writer) = cas.begin_upload(&main, "u", digest, 0).await.unwrap() else {
            panic!()
        };
        writer.write(bytes).await.unwrap();
        writer.finish().await.unwrap();
    }
    report("upload of 1,000 bytes, one after another", 1_000, start.elapsed());

    let large: Vec<u8> = (0..64u32 << 20).map(|n| (n.wrapping_mul(0x9E37_79B9) >> 24) as u8).collect();
    let large = Bytes::from(large);
    let start = Instant::now();
    let digest = SHA256.digest(&large);
    report("bare: hash 64 MiB", 1, start.elapsed());
    let start = Instant::now();
    let Upload::Writer(mut writer) = cas.begin_upload(&main, "u", digest, 0).await.unwrap() else { panic!() };
    for at in (0..large.len()).step_by(1 << 17) {
        writer.write(large.slice(at..at + (1 << 17))).await.unwrap();
    }
    writer.finish().await.unwrap();
    report("upload of 64 MiB in 128 KiB pieces", 1, start.elapsed());
    let start = Instant::now();
    let reader = cas.open(&main, digest).await.unwrap();
    let mut at = 0;
    while at < reader.size() {
        at += reader.read_at(at, 1 << 17).await.unwrap().len() as u64;
    }
    report("read of 64 MiB in 128 KiB pieces", 1, start.elapsed());
    // A reader holds the store's lock.
    drop(reader);

    let start = Instant::now();
    for n in 0..1_000 {
        let digest = digests[n * 7 % digests.len()];
        assert_eq!(cas.open(&main, digest).await.unwrap().read_at(0, 2_000).await.unwrap().len(), 1_000);
    }
    report("open and read 1,000 bytes", 1_000, start.elapsed());

    for (what, known) in [("present", true), ("absent", false)] {
        let queries: Vec<Vec<Digest>> = (0..200usize)
            .map(|round| {
                let digest = |n: usize| match known {
                    // The blobs of one build among those of many.
                    true => digests[(round * 104_729 + n * 7_919) % (digests.len() / 5)],
                    false => SHA256.digest(&[round as u8, n as u8, (n >> 8) as u8, 1]),
                };
                (0..1_000).map(digest).collect()
            })
            .collect();
        let start = Instant::now();
        for query in queries {
            cas.find_missing(&main, &query).await.unwrap();
        }
        report(&format!("find_missing of 1,000 {what}, of {blobs} stored"), 200, start.elapsed());
    }

    let command = reapi::Command { arguments: vec!["true".into()], ..Default::default() }.encode_to_vec();
    let action = reapi::Action {
        command_digest: Some(SHA256.digest(&command).to_wire()),
        input_root_digest: Some(Digest::empty(SHA256).to_wire()),
        ..Default::default()
    }
    .encode_to_vec();
    let action_digest = SHA256.digest(&action);
    let batch = vec![(SHA256.digest(&command), Bytes::from(command)), (action_digest, Bytes::from(action))];
    cas.write_many(&main, batch).await.unwrap();
    let output =
        reapi::OutputFile { path: "o".into(), digest: Some(digests[0].to_wire()), ..Default::default() };
    let result = reapi::ActionResult { output_files: vec![output; 1], ..Default::default() };
    cas.put_result(&main, action_digest, result, Provenance::default()).await.unwrap();
    let resolve = || cas.resolve_action(&main, action_digest, false, "anonymous");
    resolve().await.unwrap();
    let start = Instant::now();
    for _ in 0..50_000 {
        assert!(matches!(resolve().await, Ok(Resolution::Cached(_))));
    }
    report("resolve_action, cached", 50_000, start.elapsed());

    let (names, files): (Vec<String>, Vec<_>) = (0..1_000u32)
        .map(|n| {
            let digest = Some(digests[n as usize % digests.len()].to_wire());
            let name = format!("f{n:04}");
            (name.clone(), reapi::FileNode { name, digest, ..Default::default() })
        })
        .unzip();
    let tree = reapi::Directory { files, ..Default::default() }.encode_to_vec();
    let tree_digest = SHA256.digest(&tree);
    cas.write_many(&main, vec![(tree_digest, Bytes::from(tree))]).await.unwrap();
    let (worker, instance, path) = (cas.clone(), main.clone(), root.path().to_owned());
    let large_digest = digest;
    let used = digests.clone();
    let work = move || {
        worker.open_inputs(&instance, tree_digest, Owner::default()).unwrap();
        let start = Instant::now();
        let mut staged = worker.open_inputs(&instance, tree_digest, Owner::default()).unwrap();
        report("open_inputs of 1,000 files, known", 1, start.elapsed());
        let start = Instant::now();
        staged.hold_all().unwrap();
        report("lease 1,000 files", 1, start.elapsed());
        fs::create_dir(path.join("exec")).unwrap();
        let parent = fs::File::open(path.join("exec")).unwrap();
        let start = Instant::now();
        for n in 0..1_000 {
            fs::write(path.join(format!("exec/bare{n}")), [1; 1_000]).unwrap();
        }
        report("bare: create and write 1,000 bytes, there and then", 1_000, start.elapsed());
        let start = Instant::now();
        for (n, name) in names.iter().enumerate() {
            staged.materialise(&used[n % used.len()], &parent, name, 0o644).unwrap();
        }
        report("materialise 1,000 bytes", 1_000, start.elapsed());
        let tree = reapi::Directory {
            files: vec![reapi::FileNode {
                name: "large".into(),
                digest: Some(large_digest.to_wire()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let mut batch = worker.begin_outputs(&instance, DigestFunction::Sha256, 0);
        let root = batch.bytes(tree.encode_to_vec()).unwrap();
        batch.commit().unwrap();
        let mut staged = worker.open_inputs(&instance, root, Owner::default()).unwrap();
        staged.hold_all().unwrap();
        let start = Instant::now();
        staged.materialise(&large_digest, &parent, "large", 0o644).unwrap();
        report("materialise 64 MiB", 1, start.elapsed());
        let start = Instant::now();
        let mut batch = worker.begin_outputs(&instance, DigestFunction::Sha256, 1_000 * 4_096);
        for n in 0..1_000 {
            let name = format!("out{n}");
            fs::write(path.join("exec").join(&name), format!("output {n}")).unwrap();
            let file = fs::File::open(path.join("exec").join(&name)).unwrap();
            batch.file(&parent, &name, file).unwrap();
        }
        batch.commit().unwrap();
        report("write a small file and store it", 1_000, start.elapsed());
    };
    tokio::task::spawn_blocking(work).await.unwrap();

    cas.actor().send(CloseStore).await.unwrap();
    drop(cas);
    let start = Instant::now();
    let reopened = support::reopen(&settings).await;
    report(&format!("open a store of {blobs} blobs"), 1, start.elapsed());
    drop(reopened);
}
