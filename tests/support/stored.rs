//! Finds the blobs of a server on its disk: in separate files, or as records of segments
//! (`src/actors/cas/volume/segments/record.rs` has the layout).

use super::{Server, files_below};
use gorego_reapi::digest::Digest;
use std::{
    fs::{self, OpenOptions, Permissions},
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::PathBuf,
};

/// The number of a kind of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Blob = 1,
    Zstd = 3,
}

/// The segment of a record, and the offset of its content, which is not empty.
pub(crate) fn record_of(server: &Server, digest: Digest, kind: Kind) -> Option<(PathBuf, u64)> {
    let segments = files_below(&server.store().join("segments"));
    segments.into_iter().find_map(|path| {
        let bytes = fs::read(&path).ok()?;
        let nonce = bytes.get(24..32)?.to_vec();
        let starts = (0..bytes.len()).step_by(16);
        let mut records = starts.filter(|start| bytes[*start..].starts_with(&nonce) && *start > 0);
        let is_it = |start: &usize| {
            bytes.get(start + 12) == Some(&(kind as u8)) && bytes[start + 40..].starts_with(digest.hash())
        };
        // A small record has one checksum of content.
        records.find(is_it).map(|start| (path, (start + 40 + digest.hash().len() + 4) as u64))
    })
}

/// Flips a bit of a stored blob, wherever it lies.
pub(crate) fn damage(server: &Server, digest: Digest) {
    let hash = digest.hash_hex();
    let named = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&hash));
    let file = files_below(server.store()).into_iter().find(named).map(|path| (path, 0));
    let place = file.or_else(|| record_of(server, digest, Kind::Blob));
    let (path, offset) = place.unwrap_or_else(|| panic!("{digest} is not stored"));
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}
