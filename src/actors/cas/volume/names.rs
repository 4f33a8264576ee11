//! The names of the directories and files below `v1`. Pure.

use crate::actors::cas::index::{EntryKind, FileId};
use gorego_reapi::digest::{Digest, DigestFunction};
use std::fmt::Write as _;

/// The digest and generation in the name of a stored file; `None` for a name that the store does not use.
pub(super) fn parse_file_name(function: DigestFunction, name: &str) -> Option<(Digest, u64)> {
    let mut parts = name.split('-');
    let (hash, size, generation) = (parts.next()?, parts.next()?, parts.next()?);
    let digest = Digest::parse(function, hash, size.parse().ok()?).ok()?;
    let generation =
        u64::from_str_radix(generation, 16).ok().filter(|number| FileId::SEQUENCES.contains(number))?;
    (format!("{digest:?}-{generation:x}").replace('/', "-") == name).then_some((digest, generation))
}

/// The properties that all files in a directory share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileClass {
    pub(super) kind: EntryKind,
    /// Whether the files are kept compressed.
    pub(super) is_packed: bool,
}

impl FileClass {
    pub(super) const ALL: [Self; 4] = [
        Self { kind: EntryKind::Blob, is_packed: false },
        Self { kind: EntryKind::Blob, is_packed: true },
        Self { kind: EntryKind::Result, is_packed: false },
        Self { kind: EntryKind::Zstd, is_packed: false },
    ];

    pub(super) fn directory(self) -> &'static str {
        match self.kind {
            _ if self.is_packed => "packed",
            EntryKind::Blob => "blobs",
            EntryKind::Result => "results",
            EntryKind::Zstd => "zstd",
        }
    }
}

/// A readable directory name for an instance: distinct for each, without a slash or a leading dot.
pub(super) fn encode(instance: &str) -> String {
    let mut name = String::from("=");
    for byte in instance.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => name.push(char::from(byte)),
            _ => {
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_parsed_and_foreign_names_are_not() {
        let function = DigestFunction::Sha256;
        let digest = function.digest(b"x");
        let hash = digest.hash_hex();
        assert_eq!(parse_file_name(function, &format!("{hash}-1-ff")), Some((digest, 255)));
        for name in ["".into(), "x".into(), hash.clone(), format!("{hash}-1"), format!("{hash}-01-ff")] {
            assert_eq!(parse_file_name(function, &name), None, "{name}");
        }
        for tail in ["-1-FF", "-1-0", "--1-ff", "-1-ff-", "-1-g", "-+1-ff", "-1-4000000000000000"] {
            assert_eq!(parse_file_name(function, &format!("{hash}{tail}")), None, "{tail}");
        }
    }

    #[test]
    fn every_instance_has_a_directory_name_of_its_own() {
        let names = ["", "a", "a/b", "a%2fb", "..", "ä", "A"];
        let encoded: std::collections::HashSet<String> = names.iter().map(|name| encode(name)).collect();
        assert_eq!(encoded.len(), names.len());
        assert!(encoded.iter().all(|name| name.starts_with('=') && !name.contains('/')));
    }
}
