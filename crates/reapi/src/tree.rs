//! Directories and trees: the contents of an input root, checked, and the wire form of output directories.
//!
//! A [`Directory`] has safe, unique names and well-formed digests (EXE-28); this is checked before anything is written.
//! An [`InputTree`] is a whole input root that holds each distinct directory once.

mod properties;

use crate::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    path::{MAX_PATH_BYTES, check_node_name},
    proto::reapi,
    wire,
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

pub use properties::{MAX_PROPERTIES, MAX_PROPERTY_BYTES, NamedProperties, NamedProperty, NodeProperties};

/// Deepest input root, in directory levels below the root.
pub const MAX_TREE_DEPTH: usize = 1_000;
/// Most nodes of an input root, counting shared directories as often as they occur.
pub const MAX_TREE_NODES: u64 = 2_000_000;
/// Largest Directory message that is read, in bytes.
pub const MAX_DIRECTORY_BYTES: u64 = 64 * 1024 * 1024;
/// Most memory that a decoded Directory or Tree message may take: half a million files with all their properties.
pub const MAX_MESSAGE_MEMORY: u64 = 192 * 1024 * 1024;

/// A file in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Single path segment within the directory (EXE-28).
    pub name: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Whether the file has the executable bit.
    pub executable: bool,
    /// Mode, mtime and other properties, if the client set them.
    pub properties: NodeProperties,
}

/// A directory entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subdirectory {
    /// Single path segment within the directory (EXE-28).
    pub name: String,
    /// Digest of its Directory message.
    pub digest: Digest,
}

/// A symbolic link in a directory; the target is any text without NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symlink {
    /// Single path segment within the directory (EXE-28).
    pub name: String,
    /// Target, exactly as the client sent it (EXE-35).
    pub target: String,
    /// The mtime and other properties, if the client set them. The mode is not used, since a symbolic link has none.
    pub properties: NodeProperties,
}

/// One directory whose names and digests are checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Directory {
    /// Regular files, sorted by name.
    pub files: Vec<File>,
    /// Subdirectories, sorted by name.
    pub directories: Vec<Subdirectory>,
    /// Symbolic links, sorted by name.
    pub symlinks: Vec<Symlink>,
    /// Properties of the directory itself.
    pub properties: NodeProperties,
}

impl Directory {
    /// Decodes and checks a Directory blob with digests of `function`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it does not parse, or contains an invalid name, digest or target (EXE-27, EXE-28).
    pub fn decode(bytes: &[u8], function: DigestFunction) -> Result<Self> {
        let message: reapi::Directory = wire::decode(bytes, MAX_MESSAGE_MEMORY, "Directory")?;
        Self::from_wire(&message, function)
    }

    /// Checks a Directory message with digests of `function`.
    ///
    /// # Errors
    /// [`Error::Invalid`] as in [`Directory::decode`].
    pub fn from_wire(message: &reapi::Directory, function: DigestFunction) -> Result<Self> {
        let mut names = HashSet::new();
        let mut check = |name: &String| -> Result<String> {
            check_node_name(name).map_err(Error::invalid)?;
            if names.insert(name.clone()) {
                Ok(name.clone())
            } else {
                Err(Error::Invalid(format!("the name \"{}\" appears twice", name.escape_debug())))
            }
        };
        let mut properties = properties::Parser::default();
        let mut directory =
            Self { properties: properties.parse(message.node_properties.as_ref(), ".")?, ..Self::default() };
        for node in &message.files {
            directory.files.push(File {
                name: check(&node.name)?,
                digest: Digest::from_wire(function, node.digest.as_ref(), &node.name)?,
                executable: node.is_executable,
                properties: properties.parse(node.node_properties.as_ref(), &node.name)?,
            });
        }
        for node in &message.directories {
            directory.directories.push(Subdirectory {
                name: check(&node.name)?,
                digest: Digest::from_wire(function, node.digest.as_ref(), &node.name)?,
            });
        }
        for node in &message.symlinks {
            let name = check(&node.name)?;
            if node.target.is_empty() || node.target.contains('\0') || node.target.len() > MAX_PATH_BYTES {
                return Err(Error::Invalid(format!("the target of symlink \"{name}\" is not usable")));
            }
            let properties = properties.parse(node.node_properties.as_ref(), &name)?;
            directory.symlinks.push(Symlink { name, target: node.target.clone(), properties });
        }
        // Clients have to send them in this order, but nothing else depends on it, so other orders are not refused.
        directory.files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        directory.directories.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        directory.symlinks.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(directory)
    }

    /// The file of this name.
    pub fn file(&self, name: &str) -> Option<&File> {
        let at = self.files.binary_search_by(|file| (*file.name).cmp(name)).ok()?;
        self.files.get(at)
    }

    /// The subdirectory of this name.
    pub fn subdirectory(&self, name: &str) -> Option<&Subdirectory> {
        let at = self.directories.binary_search_by(|child| (*child.name).cmp(name)).ok()?;
        self.directories.get(at)
    }

    /// The symbolic link of this name.
    pub fn symlink(&self, name: &str) -> Option<&Symlink> {
        let at = self.symlinks.binary_search_by(|link| (*link.name).cmp(name)).ok()?;
        self.symlinks.get(at)
    }

    /// Number of files, subdirectories and symbolic links.
    pub fn entries(&self) -> usize {
        self.files.len() + self.directories.len() + self.symlinks.len()
    }

    /// Approximate memory in bytes, for caches with a size limit.
    pub fn memory(&self) -> usize {
        let names = self.files.iter().map(|f| f.name.len()).sum::<usize>()
            + self.directories.iter().map(|d| d.name.len()).sum::<usize>()
            + self.symlinks.iter().map(|s| s.name.len() + s.target.len()).sum::<usize>();
        let properties = self.files.iter().map(|f| f.properties.named.memory()).sum::<usize>()
            + self.symlinks.iter().map(|s| s.properties.named.memory()).sum::<usize>()
            + self.properties.named.memory();
        size_of::<Self>()
            + names
            + properties
            + self.files.len() * size_of::<File>()
            + self.directories.len() * size_of::<Subdirectory>()
            + self.symlinks.len() * size_of::<Symlink>()
    }
}

/// A whole input root: each distinct directory once, all present, bounded in depth and size.
#[derive(Debug, Clone)]
pub struct InputTree {
    root: Digest,
    directories: HashMap<Digest, Arc<Directory>>,
    /// Every distinct blob of the tree except the empty one, sorted: files and Directories.
    blobs: Vec<Digest>,
    extent: Extent,
    has_modes: bool,
    largest_file: u64,
    memory: usize,
}

/// How much a tree expands to; shared directories count as often as they occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Extent {
    nodes: u64,
    bytes: u64,
}

impl InputTree {
    /// Creates a tree from its root and all directories below it.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the tree is deeper than [`MAX_TREE_DEPTH`] or expands to more than [`MAX_TREE_NODES`]
    /// nodes; [`Error::MissingBlobs`] when `directories` lacks a directory.
    pub fn new(root: Digest, directories: HashMap<Digest, Arc<Directory>>) -> Result<Self> {
        let extent = measure(root, &directories)?;
        let blobs = distinct_blobs(&directories);
        let has_modes = directories.values().any(|directory| directory.properties.unix_mode.is_some());
        let files = directories.values().flat_map(|directory| &directory.files);
        let largest_file = files.map(|file| file.digest.size()).max().unwrap_or(0);
        let memory = directories.values().map(|directory| directory.memory()).sum::<usize>()
            + blobs.len() * size_of::<Digest>();
        Ok(Self { root, directories, blobs, extent, has_modes, largest_file, memory })
    }

    /// The digest of the directory at the top.
    pub fn digest(&self) -> Digest {
        self.root
    }

    /// The directory at the top of the tree.
    pub fn root(&self) -> &Directory {
        &self.directories[&self.root]
    }

    /// The directory with this digest.
    ///
    /// # Panics
    /// When the digest does not occur in this tree. The constructor has checked all digests that do.
    pub fn directory(&self, digest: &Digest) -> &Directory {
        &self.directories[digest]
    }

    /// The directory with this digest, if the tree has it.
    pub fn find(&self, digest: &Digest) -> Option<&Directory> {
        self.directories.get(digest).map(|directory| &**directory)
    }

    /// Visits all files below the directory with this digest. A directory that occurs several times is visited once.
    pub fn each_file_below(&self, directory: &Digest, mut visit: impl FnMut(&File)) {
        let mut seen = HashSet::from([*directory]);
        let mut left: Vec<_> = self.find(directory).into_iter().collect();
        while let Some(directory) = left.pop() {
            directory.files.iter().for_each(&mut visit);
            let children = directory.directories.iter().map(|child| child.digest);
            left.extend(children.filter(|child| seen.insert(*child)).filter_map(|child| self.find(&child)));
        }
    }

    /// Whether the permission bits of any directory are set.
    pub fn has_directory_modes(&self) -> bool {
        self.has_modes
    }

    /// Every blob that the tree consists of, each once and sorted: its files and Directories, without the empty blob.
    pub fn blobs(&self) -> &[Digest] {
        &self.blobs
    }

    /// Size of the largest file in bytes.
    pub fn largest_file(&self) -> u64 {
        self.largest_file
    }

    /// Approximate memory in bytes. Directories that other trees share are counted in each.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Number of files, directories and symlinks, counting shared directories as often as they occur.
    pub fn nodes(&self) -> u64 {
        self.extent.nodes
    }

    /// Sum of the sizes of all files, counting each as often as it occurs.
    pub fn bytes(&self) -> u64 {
        self.extent.bytes
    }
}

/// The distinct digests of Directories and their files, sorted, without the empty blob.
pub fn distinct_blobs(directories: &HashMap<Digest, Arc<Directory>>) -> Vec<Digest> {
    let files = directories.values().flat_map(|directory| directory.files.iter().map(|file| file.digest));
    let mut blobs: Vec<_> =
        directories.keys().copied().chain(files).filter(|digest| !digest.is_empty()).collect();
    blobs.sort_unstable();
    blobs.dedup();
    // Trees are kept in memory, where the unused capacity of the vector would double it.
    blobs.shrink_to_fit();
    blobs
}

/// What is below `root`. Not recursive, and linear in the number of distinct directories.
fn measure(root: Digest, directories: &HashMap<Digest, Arc<Directory>>) -> Result<Extent> {
    // Each directory is pushed twice: to be entered, and to be summed up. The second visit yields (extent, height).
    let mut known: HashMap<Digest, (Extent, usize)> = HashMap::new();
    let mut stack = vec![(root, false)];
    while let Some((digest, leaving)) = stack.pop() {
        if known.contains_key(&digest) {
            continue;
        }
        let directory = directories.get(&digest).ok_or_else(|| Error::MissingBlobs(vec![digest]))?;
        if leaving {
            let (mut nodes, mut height) = (directory.entries() as u64, 0);
            let mut bytes =
                directory.files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.digest.size()));
            for child in &directory.directories {
                // A child that is still open would have to contain its own hash.
                let (extent, child_height) = known.get(&child.digest).copied().unwrap_or_default();
                nodes = nodes.saturating_add(extent.nodes);
                bytes = bytes.saturating_add(extent.bytes);
                height = height.max(child_height + 1);
            }
            if height > MAX_TREE_DEPTH {
                return Err(Error::Invalid(format!(
                    "the input root is deeper than {MAX_TREE_DEPTH} directories"
                )));
            }
            if nodes > MAX_TREE_NODES {
                return Err(Error::Invalid(format!(
                    "the input root expands to more than {MAX_TREE_NODES} nodes"
                )));
            }
            known.insert(digest, (Extent { nodes, bytes }, height));
        } else {
            stack.push((digest, true));
            stack.extend(
                directory
                    .directories
                    .iter()
                    .filter(|child| !known.contains_key(&child.digest))
                    .map(|child| (child.digest, false)),
            );
        }
    }
    Ok(known.get(&root).map_or(Extent::default(), |(extent, _)| *extent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn directory(names: &[&str], child: Option<Digest>) -> (Digest, Arc<Directory>) {
        let digest = child.unwrap_or(Digest::empty(SHA256));
        let message = reapi::Directory {
            directories: names
                .iter()
                .map(|name| reapi::DirectoryNode { name: (*name).into(), digest: Some(digest.to_wire()) })
                .collect(),
            ..Default::default()
        };
        let bytes = message.encode_to_vec();
        (SHA256.digest(&bytes), Arc::new(Directory::decode(&bytes, SHA256).unwrap()))
    }

    fn chain(levels: usize, names: &[&str]) -> Result<InputTree> {
        let (mut root, leaf) = directory(&[], None);
        let mut directories = HashMap::from([(root, leaf)]);
        for _ in 0..levels {
            let (digest, level) = directory(names, Some(root));
            directories.insert(digest, level);
            root = digest;
        }
        InputTree::new(root, directories)
    }

    #[test]
    fn a_tree_that_doubles_at_every_level_is_measured_without_walking_it() {
        assert_eq!(chain(3, &["a", "b"]).unwrap().nodes(), 2 + 4 + 8);
        assert!(matches!(chain(60, &["a", "b"]), Err(Error::Invalid(m)) if m.contains("expands")));
    }

    #[test]
    fn a_tree_ten_thousand_directories_deep_is_refused() {
        assert!(chain(MAX_TREE_DEPTH, &["d"]).is_ok());
        assert!(matches!(chain(10_000, &["d"]), Err(Error::Invalid(m)) if m.contains("deeper")));
    }

    #[test]
    fn a_directory_with_millions_of_empty_entries_is_refused_before_it_takes_memory() {
        let refusal = Directory::decode(&b"\x0a\x00".repeat(2_000_000), SHA256).unwrap_err();
        assert!(refusal.to_string().contains("the Directory is refused"), "{refusal}");
    }

    /// A directory may have hundreds of thousands of nodes, each of which is looked up.
    #[test]
    fn nodes_are_found_by_name_in_whatever_order_a_client_sent_them() {
        let digest = Some(Digest::empty(SHA256).to_wire());
        let name = |number: usize| format!("{}", number * 7_919 % 1_000);
        let message = reapi::Directory {
            files: (0..300)
                .map(|at| reapi::FileNode { name: name(at), digest: digest.clone(), ..Default::default() })
                .collect(),
            directories: (300..600)
                .map(|at| reapi::DirectoryNode { name: name(at), digest: digest.clone() })
                .collect(),
            symlinks: (600..900)
                .map(|at| reapi::SymlinkNode { name: name(at), target: "t".into(), ..Default::default() })
                .collect(),
            ..Default::default()
        };
        let directory = Directory::from_wire(&message, SHA256).unwrap();
        for at in 0..1_000 {
            let name = name(at);
            let found = (
                directory.file(&name).map(|file| &file.name),
                directory.subdirectory(&name).map(|child| &child.name),
                directory.symlink(&name).map(|link| &link.name),
            );
            let is = |range: std::ops::Range<usize>| range.contains(&at).then_some(&name);
            assert_eq!(found, (is(0..300), is(300..600), is(600..900)), "{at}");
        }
    }

    /// EXE-28.
    #[test]
    fn a_directory_with_a_bad_name_or_a_name_twice_is_refused() {
        let digest = Some(Digest::empty(SHA256).to_wire());
        let file =
            |name: &str| reapi::FileNode { name: name.into(), digest: digest.clone(), ..Default::default() };
        for name in ["../escape", "a/b", "", ".", "..", "x\0"] {
            let message = reapi::Directory { files: vec![file(name)], ..Default::default() };
            assert!(Directory::from_wire(&message, SHA256).is_err(), "{name:?}");
        }
        let twice = reapi::Directory {
            files: vec![file("x")],
            symlinks: vec![reapi::SymlinkNode { name: "x".into(), target: "y".into(), ..Default::default() }],
            ..Default::default()
        };
        assert!(
            matches!(Directory::from_wire(&twice, SHA256), Err(Error::Invalid(m)) if m.contains("twice"))
        );
    }
}
