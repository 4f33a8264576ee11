//! Encodes a scanned directory as Directory and Tree messages (EXE-55 to EXE-57). Pure.
//!
//! The encoding is canonical: entries are sorted, each distinct Directory appears once, and the order of the
//! Directories depends only on the content.

use super::{
    Reported,
    scan::{FoundDirectory, OutputScan},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};
use std::collections::HashMap;

/// The distinct Directories of a tree in encoded form: the root first, every parent before its children.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// Digest and bytes of each.
    pub directories: Vec<(Digest, Vec<u8>)>,
}

impl Encoded {
    /// Encodes a scan whose files are all stored.
    ///
    /// # Errors
    /// `Internal` if a file has no digest.
    pub(crate) fn new(scan: &OutputScan, function: DigestFunction, reported: Reported) -> Result<Self> {
        let mut digests: Vec<Option<Digest>> = vec![None; scan.directories.len()];
        let mut position: HashMap<Digest, usize> = HashMap::new();
        let mut directories = Vec::new();
        // Children have larger positions than their parents, so the backward iteration visits them first. A Directory
        // is appended when it is first visited, thus after all its children. The reverse of that order has all parents
        // first.
        for (at, found) in scan.directories.iter().enumerate().rev() {
            let bytes = directory(found, scan, &digests, reported)?.encode_to_vec();
            let digest = function.digest(&bytes);
            digests[at] = Some(digest);
            position.entry(digest).or_insert_with(|| {
                directories.push((digest, bytes));
                directories.len()
            });
        }
        directories.reverse();
        Ok(Self { directories })
    }

    /// Digest of the root Directory.
    pub(crate) fn root(&self) -> Option<Digest> {
        self.directories.first().map(|(digest, _)| *digest)
    }

    /// The Tree: the root with tag 1, then each further Directory with tag 2. An empty directory is `0a 00` (EXE-56).
    pub(crate) fn tree(&self) -> Vec<u8> {
        const ROOT: u32 = 1;
        const CHILDREN: u32 = 2;
        let mut tree = Vec::with_capacity(self.directories.iter().map(|(_, bytes)| bytes.len() + 8).sum());
        for (at, (_, bytes)) in self.directories.iter().enumerate() {
            encode_key(if at == 0 { ROOT } else { CHILDREN }, WireType::LengthDelimited, &mut tree);
            encode_varint(bytes.len() as u64, &mut tree);
            tree.extend_from_slice(bytes);
        }
        tree
    }
}

fn directory(
    found: &FoundDirectory,
    scan: &OutputScan,
    digests: &[Option<Digest>],
    reported: Reported,
) -> Result<reapi::Directory> {
    let stored = |digest: Option<Digest>, name: &str| {
        digest
            .map(Digest::to_wire)
            .ok_or_else(|| Error::Internal(format!("output \"{name}\" was not stored")))
    };
    let files = found.files.iter().map(|file| {
        Ok(reapi::FileNode {
            name: file.name.clone(),
            digest: Some(stored(file.content.digest(), &file.name)?),
            is_executable: file.seen.is_executable(),
            node_properties: reported.of(&file.seen),
        })
    });
    let directories = found.children.iter().map(|&child| {
        let name = &scan.directories[child].name;
        Ok(reapi::DirectoryNode { name: name.clone(), digest: Some(stored(digests[child], name)?) })
    });
    let symlinks = found.links.iter().map(|link| reapi::SymlinkNode {
        name: link.name.clone(),
        target: link.target.clone(),
        node_properties: reported.of_link(&link.seen),
    });
    Ok(reapi::Directory {
        files: files.collect::<Result<_>>()?,
        directories: directories.collect::<Result<_>>()?,
        symlinks: symlinks.collect(),
        node_properties: reported.of(&found.seen),
    })
}
