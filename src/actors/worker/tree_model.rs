//! Random trees for tests, as a map of paths and as Directories.

use crate::actors::worker::store::Inputs;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
    tree::{Directory, File, InputTree, Symlink},
};
use proptest::prelude::*;
use prost::Message as _;
use rustix::fs::{Mode, OFlags};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write as _,
    sync::Arc,
};

const SHA256: DigestFunction = DigestFunction::Sha256;

/// The content of a tree by path. Every path begins with a slash, and every parent is an entry too.
pub(crate) type Tree = BTreeMap<String, Shown>;

/// The content at a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Shown {
    /// A file whose content is this number, and whether it is executable.
    File(u64, bool),
    /// A link whose target is this number.
    Link(u64),
    /// A directory, whatever it contains.
    Directory,
}

impl Shown {
    /// Converts a file of a Directory.
    pub(crate) fn file(file: &File) -> Self {
        Self::File(content(&file.digest), file.executable)
    }

    /// Converts a link of a Directory.
    pub(crate) fn link(link: &Symlink) -> Self {
        Self::Link(link.target.parse().unwrap())
    }
}

/// Generates trees in which names and contents recur, so that two trees have much in common.
pub(crate) fn tree() -> impl Strategy<Value = Tree> {
    let path = proptest::collection::vec("[abc]", 1..5);
    let leaf = prop_oneof![
        (0..3u64, any::<bool>()).prop_map(|(content, executable)| Shown::File(content, executable)),
        (0..2u64).prop_map(Shown::Link),
        Just(Shown::Directory),
    ];
    proptest::collection::vec((path, leaf), 0..20).prop_map(|leaves| {
        let mut tree = Tree::new();
        'leaves: for (path, leaf) in leaves {
            let mut at = String::new();
            for segment in &path[..path.len() - 1] {
                at = format!("{at}/{segment}");
                if tree.entry(at.clone()).or_insert(Shown::Directory) != &Shown::Directory {
                    continue 'leaves;
                }
            }
            tree.entry(format!("{at}/{}", path[path.len() - 1])).or_insert(leaf);
        }
        tree
    })
}

/// Converts a tree to Directories.
pub(crate) fn input_tree(tree: &Tree) -> InputTree {
    let mut directories = HashMap::new();
    let root = directory(tree, "", &mut directories);
    InputTree::new(root, directories).unwrap()
}

fn directory(tree: &Tree, path: &str, directories: &mut HashMap<Digest, Arc<Directory>>) -> Digest {
    let mut message = reapi::Directory::default();
    let prefix = format!("{path}/");
    for (child, shown) in tree.range(prefix.clone()..) {
        let Some(name) = child.strip_prefix(&prefix) else { break };
        let name = name.to_owned();
        match shown {
            _ if name.contains('/') => {}
            Shown::File(number, is_executable) => message.files.push(reapi::FileNode {
                name,
                digest: Some(SHA256.digest(number.to_string().as_bytes()).to_wire()),
                is_executable: *is_executable,
                ..Default::default()
            }),
            Shown::Link(number) => {
                let target = number.to_string();
                message.symlinks.push(reapi::SymlinkNode { name, target, ..Default::default() });
            }
            Shown::Directory => {
                let digest = Some(directory(tree, child, directories).to_wire());
                message.directories.push(reapi::DirectoryNode { name, digest });
            }
        }
    }
    let bytes = message.encode_to_vec();
    let digest = SHA256.digest(&bytes);
    directories.insert(digest, Arc::new(Directory::decode(&bytes, SHA256).unwrap()));
    digest
}

/// The blobs of a tree.
pub(crate) struct Contents(pub Arc<InputTree>);

impl Inputs for Contents {
    fn tree(&self) -> &Arc<InputTree> {
        &self.0
    }

    fn hold_all(&mut self) -> Result<()> {
        Ok(())
    }

    fn hold(&mut self, _: Vec<Digest>) -> Result<()> {
        Ok(())
    }

    fn materialise(&self, digest: &Digest, parent: &fs::File, name: &str, mode: u32) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mut file = fs::File::from(rustix::fs::openat(parent, name, flags, Mode::RUSR).unwrap());
        file.write_all(content(digest).to_string().as_bytes()).unwrap();
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).unwrap();
        Ok(())
    }
}

/// The number that is the content of a blob.
pub(crate) fn content(digest: &Digest) -> u64 {
    (0..100).find(|number| SHA256.digest(number.to_string().as_bytes()) == *digest).unwrap()
}
