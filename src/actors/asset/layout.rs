//! [`Layout`]: the tree that an archive describes, and its canonical Directory messages. Pure.
//!
//! A layout accepts only safe entries of an untrusted archive: paths are relative and without "..", no path appears
//! twice, only directories have children, and no link leads out of the archive. Paths pass only through real
//! directories, and a link may have ".." only at its front, so no chain of links leads out either.

use bytes::Bytes;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    path::{MAX_PATH_BYTES, check_node_name},
    proto::reapi,
};
use prost::Message as _;
use std::collections::{BTreeMap, btree_map::Entry};

/// Maximum number of nodes of one archive, including implied directories.
pub const MAX_NODES: usize = 200_000;
/// Maximum memory in bytes of one layout and of its Directory messages, as estimated by [`TreeSize`].
pub(crate) const LAYOUT_BYTES: usize = 96 * 1024 * 1024;
/// Memory in bytes of a file or a link besides its texts: its node in a map that may be half empty, its message, and
/// the encoding of that.
const LEAF_BYTES: usize = 450;
/// Memory in bytes of a directory besides its name. The map of a directory has room for eleven nodes.
const DIRECTORY_BYTES: usize = 1_000;
/// How often a text is held in memory: in the layout, in a message, and in the encoding of that.
const COPIES_OF_TEXT: usize = 3;
/// Maximum depth of a path of an archive, in names.
pub const MAX_DEPTH: usize = 256;

/// A tree under construction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    root: Names,
    size: TreeSize,
}

/// The bounded quantities of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct TreeSize {
    nodes: usize,
    memory: usize,
}

impl TreeSize {
    /// Adds a node that takes `bytes` of memory besides its texts.
    fn add(&mut self, bytes: usize, text_bytes: usize) -> Result<(), EntryProblem> {
        self.nodes = self.nodes.saturating_add(1);
        let text = text_bytes.saturating_mul(COPIES_OF_TEXT);
        self.memory = self.memory.saturating_add(bytes).saturating_add(text);
        if self.nodes > MAX_NODES {
            return Err(format!("the archive has more than {MAX_NODES} entries"));
        }
        if self.memory > LAYOUT_BYTES {
            return Err(format!("the entries of the archive need more than {LAYOUT_BYTES} bytes of memory"));
        }
        Ok(())
    }
}

type Names = BTreeMap<String, Node>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    /// The content is in a box because a map has room for eleven nodes, even if it has only one.
    File(Box<FileContent>),
    Symlink(String),
    Directory(Names),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FileContent {
    digest: Digest,
    executable: bool,
}

/// What is wrong with an entry. The text names the path.
pub type EntryProblem = String;

impl Layout {
    /// Adds a directory. It may already exist: archives often name a directory more than once.
    ///
    /// # Errors
    /// When the entry is not safe; see the module documentation.
    pub fn add_directory(&mut self, path: &str) -> Result<(), EntryProblem> {
        let names = split(path)?;
        self.descend(path, &names).map(drop)
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The errors of [`Layout::add_directory`].
    pub fn add_file(&mut self, path: &str, digest: Digest, executable: bool) -> Result<(), EntryProblem> {
        self.add(path, Node::File(Box::new(FileContent { digest, executable })))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// The errors of [`Layout::add_directory`]; and for a target that is absolute, leads out, or has ".." after a name.
    pub fn add_symlink(&mut self, path: &str, target: &str) -> Result<(), EntryProblem> {
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
    /// The errors of [`Layout::add_directory`]; and when there is no such file.
    pub fn add_hard_link(&mut self, path: &str, target: &str) -> Result<(), EntryProblem> {
        let missing = || {
            format!(
                "hard link \"{}\" is to \"{}\", which is not an earlier file of the archive",
                path.escape_debug(),
                target.escape_debug()
            )
        };
        let names = split(target)?;
        let (name, parents) = names.split_last().ok_or_else(missing)?;
        let directory = find(&self.root, parents).ok_or_else(missing)?;
        match directory.get(*name) {
            Some(file @ Node::File(_)) => self.add(path, file.clone()),
            _ => Err(missing()),
        }
    }

    /// Returns the tree below one of its directories.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn below(mut self, path: &str) -> Result<Self, EntryProblem> {
        for name in split(path)? {
            let Some(Node::Directory(inner)) = self.root.remove(name) else {
                return Err(format!("the archive has no directory \"{}\"", path.escape_debug()));
            };
            self.root = inner;
        }
        Ok(self)
    }

    /// The digest of the root Directory, and every Directory as a canonical blob, with sorted children and no
    /// properties.
    pub fn directories(&self, function: DigestFunction) -> (Digest, Vec<(Digest, Bytes)>) {
        let mut blobs = Vec::new();
        let root = encode(&self.root, function, &mut blobs);
        (root, blobs)
    }

    fn add(&mut self, path: &str, node: Node) -> Result<(), EntryProblem> {
        let names = split(path)?;
        let Some((name, parents)) = names.split_last() else {
            return Err(format!("\"{}\" is not the name of a file", path.escape_debug()));
        };
        let target = if let Node::Symlink(target) = &node { target.len() } else { 0 };
        if self.descend(path, parents)?.insert((*name).to_owned(), node).is_some() {
            return Err(format!("\"{}\" appears twice", path.escape_debug()));
        }
        self.size.add(LEAF_BYTES, name.len().saturating_add(target))
    }

    /// The directory at a path, which is created if necessary.
    fn descend(&mut self, path: &str, names: &[&str]) -> Result<&mut Names, EntryProblem> {
        let mut directory = &mut self.root;
        for name in names {
            let node = match directory.entry((*name).to_owned()) {
                Entry::Occupied(node) => node.into_mut(),
                Entry::Vacant(vacant) => {
                    self.size.add(DIRECTORY_BYTES, name.len())?;
                    vacant.insert(Node::Directory(Names::new()))
                }
            };
            let Node::Directory(inner) = node else {
                return Err(format!(
                    "\"{}\" is below something that is no directory, or replaces it",
                    path.escape_debug()
                ));
            };
            directory = inner;
        }
        Ok(directory)
    }
}

/// The names of a path in an archive; none for the root.
fn split(path: &str) -> Result<Vec<&str>, EntryProblem> {
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

/// The recursion is at most [`MAX_DEPTH`] deep.
fn encode(names: &Names, function: DigestFunction, blobs: &mut Vec<(Digest, Bytes)>) -> Digest {
    let mut message = reapi::Directory::default();
    for (name, node) in names {
        let name = name.clone();
        match node {
            Node::File(content) => message.files.push(reapi::FileNode {
                name,
                digest: Some(content.digest.to_wire()),
                is_executable: content.executable,
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
    fn links_stay_within_the_archive_however_they_are_chained() {
        let link = |path: &str, target: &str| Layout::default().add_symlink(path, target);
        for (path, target) in [
            ("a", "/etc"),
            ("a", ".."),
            ("a/b", "../.."),
            ("a/b", "../../x"),
            ("a/b", "./../../x"),
            // Lexically within the archive, but x may be a link upwards.
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
    fn nothing_appears_twice_or_below_something_that_is_no_directory() {
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
    fn a_directory_of_an_archive_is_a_tree_of_its_own() {
        let mut layout = Layout::default();
        layout.add_file("a/b/file", content(), true).unwrap();
        layout.add_file("a/other", content(), false).unwrap();
        let mut alone = Layout::default();
        alone.add_file("file", content(), true).unwrap();
        let below = |path| layout.clone().below(path).map(|layout| layout.directories(SHA256).0);
        assert_eq!(below("a/b"), Ok(alone.directories(SHA256).0));
        assert_eq!(below("."), Ok(layout.directories(SHA256).0));
        for path in ["b", "a/b/file", "a/b/file/x", "../a", "/a"] {
            assert!(below(path).is_err(), "{path}");
        }
    }

    #[test]
    fn implied_directories_count_as_entries_too() {
        let mut layout = Layout::default();
        let deep = |n: usize| (0..200).map(|level| format!("{n}-{level}/")).collect::<String>();
        let refused = (0..).find(|n| layout.add_file(&format!("{}f", deep(*n)), content(), false).is_err());
        assert!(refused.is_some_and(|paths| paths * 200 * DIRECTORY_BYTES < LAYOUT_BYTES), "{refused:?}");
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut layout = Layout::default();
        let refused = (0..).find(|n| layout.add_file(&n.to_string(), content(), false).is_err());
        assert_eq!(refused, Some(MAX_NODES));
    }

    #[test]
    fn names_and_link_targets_are_bounded_together() {
        let mut layout = Layout::default();
        let target = "t".repeat(MAX_PATH_BYTES);
        let refused = (0..MAX_NODES).find(|n| layout.add_symlink(&n.to_string(), &target).is_err());
        assert!(refused.is_some_and(|links| links * COPIES_OF_TEXT * MAX_PATH_BYTES < LAYOUT_BYTES));
    }

    proptest! {
        /// The digests do not depend on the order of the entries, and this server accepts each message.
        #[test]
        fn a_tree_has_one_digest(mut paths in proptest::collection::btree_set("[a-c]{1,2}(/[a-c]{1,2}){0,3}", 1..20), swap in any::<usize>()) {
            let mut order: Vec<String> = std::mem::take(&mut paths).into_iter().collect();
            let build = |order: &[String]| {
                let mut layout = Layout::default();
                for path in order {
                    // A path below another one cannot also be a file next to it.
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
