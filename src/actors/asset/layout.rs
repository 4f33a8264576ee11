//! [`Layout`]: the tree that an archive describes, and its canonical Directory messages. Pure.
//!
//! An archive is hostile until it is in here: paths are relative and without "..", no path appears twice, nothing lies below
//! what is not a directory, and no link leads out. Since real directories are all that a path passes through, and a link may
//! have ".." at its front only, no chain of links leads out either.

use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    path::{MAX_PATH_BYTES, check_node_name},
    proto::reapi,
};
use prost::Message as _;
use std::collections::BTreeMap;

/// Most nodes of one archive, directories that it only implies included.
pub const MAX_NODES: usize = 200_000;
/// Bytes of all names and link targets together; all of it is in memory, twice.
pub const MAX_TEXT_BYTES: usize = 64 * 1024 * 1024;
/// Deepest path of an archive, in names.
pub const MAX_DEPTH: usize = 256;

/// A tree under construction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    root: Names,
    size: Size,
}

/// What of a tree is bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Size {
    nodes: usize,
    text_bytes: usize,
}

impl Size {
    fn add(&mut self, nodes: usize, text_bytes: usize) -> Result<(), Refusal> {
        self.nodes = self.nodes.saturating_add(nodes);
        self.text_bytes = self.text_bytes.saturating_add(text_bytes);
        if self.nodes > MAX_NODES {
            return Err(format!("the archive has more than {MAX_NODES} entries"));
        }
        if self.text_bytes > MAX_TEXT_BYTES {
            return Err(format!("the names and links of the archive have more than {MAX_TEXT_BYTES} bytes"));
        }
        Ok(())
    }
}

type Names = BTreeMap<String, Node>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    File { digest: Digest, executable: bool },
    Symlink(String),
    Directory(Names),
}

/// What is wrong with an entry; its text names the path.
pub type Refusal = String;

impl Layout {
    /// Adds a directory. One that is there already is fine: archives name them again and again.
    ///
    /// # Errors
    /// As for every entry; see the module documentation.
    pub fn add_directory(&mut self, path: &str) -> Result<(), Refusal> {
        let names = split(path)?;
        self.descend(path, &names).map(drop)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// As for every entry.
    pub fn add_file(&mut self, path: &str, digest: Digest, executable: bool) -> Result<(), Refusal> {
        self.add(path, Node::File { digest, executable })
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As for every entry; and for a target that is absolute, leads out, or goes up again on its way.
    pub fn add_symlink(&mut self, path: &str, target: &str) -> Result<(), Refusal> {
        let refuse = |problem: &str| {
            format!("symbolic link \"{}\" to \"{}\" {problem}", path.escape_debug(), target.escape_debug())
        };
        if target.is_empty() || target.contains('\0') || target.len() > MAX_PATH_BYTES {
            return Err(refuse("has no usable target"));
        }
        if target.starts_with('/') {
            return Err(refuse("is absolute"));
        }
        let mut segments = target.split('/').filter(|segment| !matches!(*segment, "" | ".")).peekable();
        let mut up = 0;
        while segments.next_if_eq(&"..").is_some() {
            up += 1;
        }
        if segments.any(|segment| segment == "..") {
            return Err(refuse("goes down and up again"));
        }
        if up >= split(path)?.len() {
            return Err(refuse("leads out of the archive"));
        }
        self.add(path, Node::Symlink(target.to_owned()))
    }

    /// Adds another name for a file that was added before.
    ///
    /// # Errors
    /// As for every entry; and where there is no such file.
    pub fn add_hard_link(&mut self, path: &str, target: &str) -> Result<(), Refusal> {
        let missing = || {
            format!(
                "hard link \"{}\" is to \"{}\", which is no file of the archive so far",
                path.escape_debug(),
                target.escape_debug()
            )
        };
        let names = split(target)?;
        let (name, parents) = names.split_last().ok_or_else(missing)?;
        let directory = find(&self.root, parents).ok_or_else(missing)?;
        match directory.get(*name) {
            Some(file @ Node::File { .. }) => self.add(path, file.clone()),
            _ => Err(missing()),
        }
    }

    /// The tree below one of its directories.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn below(mut self, path: &str) -> Result<Self, Refusal> {
        let names = split(path)?;
        self.root = find(&self.root, &names)
            .ok_or_else(|| format!("the archive has no directory \"{}\"", path.escape_debug()))?
            .clone();
        Ok(self)
    }

    /// The digest of the root Directory, and every Directory as a blob: children sorted by name, nothing else said.
    pub fn directories(&self, function: DigestFunction) -> (Digest, Vec<(Digest, Bytes)>) {
        let mut blobs = Vec::new();
        let root = encode(&self.root, function, &mut blobs);
        (root, blobs)
    }

    fn add(&mut self, path: &str, node: Node) -> Result<(), Refusal> {
        let names = split(path)?;
        let Some((name, parents)) = names.split_last() else {
            return Err(format!("\"{}\" is no name of a file", path.escape_debug()));
        };
        let target = if let Node::Symlink(target) = &node { target.len() } else { 0 };
        if self.descend(path, parents)?.insert((*name).to_owned(), node).is_some() {
            return Err(format!("\"{}\" appears twice", path.escape_debug()));
        }
        self.size.add(1, name.len().saturating_add(target))
    }

    /// The directory at a path, made if need be.
    fn descend(&mut self, path: &str, names: &[&str]) -> Result<&mut Names, Refusal> {
        let (mut made, mut bytes) = (0, 0);
        let mut directory = &mut self.root;
        for name in names {
            let node = directory.entry((*name).to_owned()).or_insert_with(|| {
                made += 1;
                bytes += name.len();
                Node::Directory(Names::new())
            });
            let Node::Directory(inner) = node else {
                return Err(format!(
                    "\"{}\" lies below what is no directory, or replaces it",
                    path.escape_debug()
                ));
            };
            directory = inner;
        }
        self.size.add(made, bytes)?;
        Ok(directory)
    }
}

/// The names of a path in an archive; none for the root.
fn split(path: &str) -> Result<Vec<&str>, Refusal> {
    let refuse = |problem: &str| Err(format!("path \"{}\" {problem}", path.escape_debug()));
    if path.starts_with('/') {
        return refuse("is absolute");
    }
    if path.len() > MAX_PATH_BYTES {
        return refuse("is too long");
    }
    let mut names = Vec::new();
    for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
        check_node_name(name).map_err(|error| error.to_string())?;
        names.push(name);
    }
    if names.len() > MAX_DEPTH {
        return refuse("is too deep");
    }
    Ok(names)
}

fn find<'a>(root: &'a Names, names: &[&str]) -> Option<&'a Names> {
    names.iter().try_fold(root, |directory, name| match directory.get(*name)? {
        Node::Directory(inner) => Some(inner),
        _ => None,
    })
}

/// At most [`MAX_DEPTH`] deep.
fn encode(names: &Names, function: DigestFunction, blobs: &mut Vec<(Digest, Bytes)>) -> Digest {
    let mut message = reapi::Directory::default();
    for (name, node) in names {
        let name = name.clone();
        match node {
            Node::File { digest, executable } => message.files.push(reapi::FileNode {
                name,
                digest: Some(digest.to_wire()),
                is_executable: *executable,
                node_properties: None,
            }),
            Node::Symlink(target) => message.symlinks.push(reapi::SymlinkNode {
                name,
                target: target.clone(),
                node_properties: None,
            }),
            Node::Directory(inner) => {
                let digest = Some(encode(inner, function, blobs).to_wire());
                message.directories.push(reapi::DirectoryNode { name, digest });
            }
        }
    }
    let bytes = Bytes::from(message.encode_to_vec());
    let digest = function.digest(&bytes);
    blobs.push((digest, bytes));
    digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::tree::Directory;
    use proptest::prelude::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn content() -> Digest {
        SHA256.digest(b"content")
    }

    #[test]
    fn paths_that_leave_the_archive_are_refused() {
        for path in ["/etc/passwd", "../x", "a/../../x", "a/..", "a\0b", "", ".", "./", &"a/".repeat(300)] {
            assert!(Layout::default().add_file(path, content(), false).is_err(), "{path:?}");
        }
        for path in ["a", "./a", "a//b", "a/./b", "...", "a b"] {
            assert!(Layout::default().add_file(path, content(), false).is_ok(), "{path:?}");
        }
    }

    #[test]
    fn links_lead_to_places_within_the_archive_however_they_are_chained() {
        let link = |path: &str, target: &str| Layout::default().add_symlink(path, target);
        for (path, target) in [
            ("a", "/etc"),
            ("a", ".."),
            ("a/b", "../.."),
            ("a/b", "../../x"),
            ("a/b", "./../../x"),
            // Lexically within; but x may be a link upwards.
            ("a/b", "x/../.."),
            ("a/b", "x/.."),
            ("a", ""),
            ("a", "\0"),
        ] {
            assert!(link(path, target).is_err(), "{path} -> {target}");
        }
        for (path, target) in [("a", "b"), ("a/b", ".."), ("a/b", "../c/d"), ("a", "."), ("a/b/c", "../../d")]
        {
            assert!(link(path, target).is_ok(), "{path} -> {target}");
        }
    }

    #[test]
    fn nothing_appears_twice_or_below_what_is_no_directory() {
        let mut layout = Layout::default();
        layout.add_file("a/file", content(), false).unwrap();
        layout.add_symlink("a/link", "file").unwrap();
        layout.add_directory("a").unwrap();
        layout.add_directory("./a/").unwrap();
        assert!(layout.clone().add_file("a/file", content(), false).is_err());
        assert!(layout.clone().add_file("a/link", content(), false).is_err());
        assert!(layout.clone().add_file("a/link/x", content(), false).is_err());
        assert!(layout.clone().add_file("a/file/x", content(), false).is_err());
        assert!(layout.clone().add_file("a", content(), false).is_err());
        assert!(layout.clone().add_directory("a/file").is_err());
        assert!(layout.clone().add_hard_link("b", "a/link").is_err());
        assert!(layout.clone().add_hard_link("b", "a").is_err());
        assert!(layout.clone().add_hard_link("b", "../a").is_err());
        layout.add_hard_link("b", "a/file").unwrap();
    }

    #[test]
    fn implied_directories_count_as_entries_too() {
        let mut layout = Layout::default();
        let deep = |n: usize| (0..200).map(|level| format!("{n}-{level}/")).collect::<String>();
        let refused = (0..).find(|n| layout.add_file(&format!("{}f", deep(*n)), content(), false).is_err());
        assert_eq!(refused, Some(MAX_NODES / 201));
    }

    #[test]
    fn names_and_link_targets_are_bounded_together() {
        let mut layout = Layout::default();
        let target = "t".repeat(MAX_PATH_BYTES);
        let refused = (0..MAX_NODES).find(|n| layout.add_symlink(&n.to_string(), &target).is_err());
        assert!(refused.is_some_and(|links| links < MAX_TEXT_BYTES / MAX_PATH_BYTES));
    }

    proptest! {
        /// In whatever order an archive has its entries, the digests are the same, and each message is one that we accept.
        #[test]
        fn a_tree_has_one_digest(mut paths in proptest::collection::btree_set("[a-c]{1,2}(/[a-c]{1,2}){0,3}", 1..20), swap in any::<usize>()) {
            let mut order: Vec<String> = std::mem::take(&mut paths).into_iter().collect();
            let build = |order: &[String]| {
                let mut layout = Layout::default();
                for path in order {
                    // One that lies below another cannot be a file beside it.
                    if layout.add_file(&format!("{path}.f"), content(), true).is_err() {
                        return None;
                    }
                }
                Some(layout.directories(SHA256))
            };
            let Some((first, blobs)) = build(&order) else { return Ok(()) };
            let len = order.len();
            order.rotate_left(swap % len);
            prop_assert_eq!(build(&order).unwrap().0, first);
            for (digest, bytes) in &blobs {
                prop_assert_eq!(*digest, SHA256.digest(bytes));
                prop_assert!(Directory::decode(bytes, SHA256).is_ok());
            }
        }
    }
}
