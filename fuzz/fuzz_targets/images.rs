//! Container images: references, documents, and layers on a real directory. The first byte selects one of them.

#![no_main]

use gorego::images::{
    apply_layers,
    manifest::{Document, ImageConfig, Platform},
    reference::ImageReference,
};
use gorego_reapi::error::Error;
use libfuzzer_sys::fuzz_target;
use std::fs::{self, File};

/// Limit on the disk space of layers in this test.
const MAX_BYTES: u64 = 1024 * 1024;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match (kind % 4, std::str::from_utf8(data)) {
        (0, Ok(text)) => reference(text),
        (1, _) => documents(data),
        (2 | 3, _) => layers(data),
        _ => {}
    }
});

/// The text of an accepted reference has the same meaning as the reference.
fn reference(text: &str) {
    match ImageReference::parse(text) {
        Ok(reference) => assert_eq!(ImageReference::parse(&reference.to_string()), Ok(reference)),
        Err(problem) => assert!(problem.len() < 10_000),
    }
}

fn documents(bytes: &[u8]) {
    let machine = Platform::linux("x86_64");
    if let Ok(Document::Index(index)) = Document::decode(bytes) {
        let _ = (index.choose(&machine), index.tagged(Some("v1")), index.tags());
    }
    if let Ok(config) = ImageConfig::decode(bytes, &machine) {
        assert!(config.environment.iter().all(|(name, _)| !name.is_empty() && !name.contains(['=', '\0'])));
    }
}

/// Two layers, separated by a line with a dash. Layers never change anything outside their directory, and their errors
/// are never reported as faults of the server.
fn layers(bytes: &[u8]) {
    let separator = b"\n-\n";
    let at = bytes.windows(separator.len()).position(|window| window == separator);
    let (lower, upper) = at.map_or((bytes, None), |at| (&bytes[..at], Some(&bytes[at + separator.len()..])));
    let layers: Vec<_> = [lower].into_iter().chain(upper).collect();
    let site = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    fs::create_dir(site.path().join("root")).expect("a directory");
    fs::write(site.path().join("victim"), "untouched").expect("a file");
    let root = File::open(site.path().join("root")).expect("the directory");
    match apply_layers(&root, &layers, MAX_BYTES) {
        Ok(()) | Err(Error::Precondition(_)) => {}
        Err(other) => panic!("{other:?}"),
    }
    assert_eq!(fs::read(site.path().join("victim")).expect("the file"), b"untouched");
    assert_eq!(fs::read_dir(site.path()).expect("the directory").count(), 2);
}
