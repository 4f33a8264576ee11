//! [`Listing`]: the content of a result, with one entry for each file, directory and symbolic link.
//!
//! The result and its Trees come from a server and may be hostile: paths are checked, and Trees are bounded before they
//! are walked. The same outputs give the same listing for any encoding of their Trees.

use super::{Client, codec::ANSWER_MAX_MEMORY};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    path::RootPath,
    proto::reapi,
    tree::{Directory, InputTree, MAX_DIRECTORY_BYTES, MAX_TREE_NODES},
    wire,
};
use prost::Message as _;
use std::{collections::HashMap, sync::Arc};

/// The entries of a result, with checked paths.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Listing {
    /// Files, including those in output directories.
    pub files: Vec<ListedFile>,
    /// Output directories, and all directories in them.
    pub directories: Vec<RootPath>,
    /// Symbolic links with their targets, including those in output directories.
    pub symlinks: Vec<(RootPath, String)>,
}

/// One file of a result.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedFile {
    /// The path relative to the input root.
    pub path: RootPath,
    /// The digest of its content.
    pub digest: Digest,
    /// Whether it has the executable bit.
    pub executable: bool,
}

impl Client {
    /// Lists a result. Its output directories are read from the server. The paths of the result are relative to `base`.
    ///
    /// # Errors
    /// `Invalid` if a path leaves the input root or a Tree is malformed; errors of the server.
    pub async fn listing(&self, result: &reapi::ActionResult, base: &RootPath) -> Result<Listing> {
        let mut listing = Listing::new(result, self.function, base)?;
        for output in &result.output_directories {
            let has_tree = output.tree_digest.as_ref().is_some_and(|digest| !digest.hash.is_empty());
            let tree = if has_tree {
                let tree = Digest::from_wire(self.function, output.tree_digest.as_ref(), "tree_digest")?;
                let bytes = self.read_bytes(tree, MAX_DIRECTORY_BYTES, &Arc::default()).await?;
                decode_tree(&bytes, self.function)
            } else {
                let root = output.root_directory_digest.as_ref();
                self.input_tree(Digest::from_wire(self.function, root, "root_directory_digest")?).await
            };
            let malformed = |error: Error| match error {
                Error::Invalid(problem) => {
                    Error::Invalid(format!("output directory {}: {problem}", output.path.escape_debug()))
                }
                error => error,
            };
            listing.add_directory(&output.path, base, &tree.map_err(malformed)?)?;
        }
        Ok(listing)
    }
}

impl Listing {
    /// The files and links of a result, without its output directories. The paths of the result are relative to `base`.
    ///
    /// # Errors
    /// `Invalid` if a path leaves the input root.
    pub fn new(result: &reapi::ActionResult, function: DigestFunction, base: &RootPath) -> Result<Self> {
        let mut listing = Self::default();
        for file in &result.output_files {
            listing.files.push(ListedFile {
                path: output_path(base, &file.path)?,
                digest: Digest::from_wire(function, file.digest.as_ref(), &file.path)?,
                executable: file.is_executable,
            });
        }
        for link in symlinks(result) {
            listing.symlinks.push((output_path(base, &link.path)?, link.target.clone()));
        }
        Ok(listing)
    }

    /// Adds an output directory of a result; `path` is relative to `base`.
    ///
    /// # Errors
    /// `Invalid` if a path leaves the input root, or if there are too many entries.
    pub fn add_directory(&mut self, path: &str, base: &RootPath, tree: &InputTree) -> Result<()> {
        let path = output_path(base, path)?;
        let malformed = |problem: &dyn std::fmt::Display| {
            Error::Invalid(format!("output directory {path}: the server sent a malformed Tree: {problem}"))
        };
        let listed = self.files.len() + self.directories.len() + self.symlinks.len();
        if tree.nodes().saturating_add(listed as u64) > MAX_TREE_NODES {
            return Err(malformed(&"the outputs have too many files"));
        }
        let below = |base: &RootPath, name: &str| base.join(name).map_err(|error| malformed(&error));
        let mut stack = vec![(path.clone(), tree.root())];
        while let Some((path, directory)) = stack.pop() {
            for file in &directory.files {
                let path = below(&path, &file.name)?;
                self.files.push(ListedFile { path, digest: file.digest, executable: file.executable });
            }
            for link in &directory.symlinks {
                self.symlinks.push((below(&path, &link.name)?, link.target.clone()));
            }
            for child in &directory.directories {
                stack.push((below(&path, &child.name)?, tree.directory(&child.digest)));
            }
            self.directories.push(path);
        }
        Ok(())
    }
}

/// EXE-53: uses `output_symlinks` if the server fills it, otherwise the two deprecated lists.
#[allow(deprecated)]
fn symlinks(result: &reapi::ActionResult) -> Vec<&reapi::OutputSymlink> {
    match &result.output_symlinks {
        links if links.is_empty() => {
            result.output_file_symlinks.iter().chain(&result.output_directory_symlinks).collect()
        }
        links => links.iter().collect(),
    }
}

/// The directories of an encoded Tree.
///
/// # Errors
/// `Invalid` when it is malformed or too large.
pub fn decode_tree(tree: &[u8], function: DigestFunction) -> Result<InputTree> {
    let malformed = |problem: Error| Error::Invalid(format!("the server sent a malformed Tree: {problem}"));
    let tree: reapi::Tree = wire::decode(tree, ANSWER_MAX_MEMORY, "Tree").map_err(malformed)?;
    let root = tree.root.unwrap_or_default();
    let mut directories = HashMap::new();
    for message in std::iter::once(&root).chain(&tree.children) {
        let directory = Directory::from_wire(message, function).map_err(malformed)?;
        directories.insert(function.digest(&message.encode_to_vec()), Arc::new(directory));
    }
    // Servers may omit the empty directory (GEN-06).
    directories.entry(Digest::empty(function)).or_default();
    InputTree::new(function.digest(&root.encode_to_vec()), directories).map_err(malformed)
}

fn output_path(base: &RootPath, path: &str) -> Result<RootPath> {
    base.join(path)
        .map_err(|error| Error::Invalid(format!("the server sent an output that is not accepted: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn node(name: &str, digest: Digest) -> reapi::DirectoryNode {
        reapi::DirectoryNode { name: name.into(), digest: Some(digest.to_wire()) }
    }

    fn listed(path: &str, tree: &reapi::Tree) -> Result<Listing> {
        let mut listing = Listing::default();
        let tree = decode_tree(&tree.encode_to_vec(), SHA256)?;
        listing.add_directory(path, &RootPath::root(), &tree).map(|()| listing)
    }

    #[test]
    fn outputs_that_would_land_elsewhere_are_refused() {
        let base = RootPath::root().join("work").unwrap();
        let digest = Some(Digest::empty(SHA256).to_wire());
        for path in ["/etc/passwd", "../../x", "a/../../../x", "a\0b"] {
            let file = reapi::OutputFile { path: path.into(), digest: digest.clone(), ..Default::default() };
            let result = reapi::ActionResult { output_files: vec![file], ..Default::default() };
            assert!(Listing::new(&result, SHA256, &base).is_err(), "{path:?}");
            let output_symlinks = vec![reapi::OutputSymlink { path: path.into(), ..Default::default() }];
            let result = reapi::ActionResult { output_symlinks, ..Default::default() };
            assert!(Listing::new(&result, SHA256, &base).is_err(), "{path:?}");
        }
        for name in ["..", "../x", "a/b", ""] {
            let file = reapi::FileNode { name: name.into(), digest: digest.clone(), ..Default::default() };
            let root = Some(reapi::Directory { files: vec![file], ..Default::default() });
            assert!(listed("", &reapi::Tree { root, children: vec![] }).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_tree_becomes_the_directories_files_and_symlinks_it_describes() {
        let leaf = reapi::Directory {
            files: vec![reapi::FileNode {
                name: "f".into(),
                digest: Some(SHA256.digest(b"f").to_wire()),
                is_executable: true,
                ..Default::default()
            }],
            symlinks: vec![reapi::SymlinkNode {
                name: "l".into(),
                target: "/x".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let digest = SHA256.digest(&leaf.encode_to_vec());
        let root = reapi::Directory {
            directories: vec![node("a", digest), node("b", digest), node("e", Digest::empty(SHA256))],
            ..Default::default()
        };
        let listing = listed("out", &reapi::Tree { root: Some(root), children: vec![leaf] }).unwrap();
        let mut paths: Vec<_> = listing.files.iter().map(|file| file.path.to_string()).collect();
        paths.extend(listing.directories.iter().map(ToString::to_string));
        paths.extend(listing.symlinks.iter().map(|(path, target)| format!("{path}>{target}")));
        paths.sort_unstable();
        let wanted = ["out", "out/a", "out/a/f", "out/a/l>/x", "out/b", "out/b/f", "out/b/l>/x", "out/e"];
        assert_eq!(paths, wanted);
        assert!(listing.files.iter().all(|file| file.executable && file.digest == SHA256.digest(b"f")));
    }

    #[test]
    fn a_tree_bomb_is_refused_before_it_is_unfolded() {
        let (mut children, mut digest) = (vec![], Digest::empty(SHA256));
        for _ in 0..40 {
            let level = reapi::Directory {
                directories: vec![node("a", digest), node("b", digest)],
                ..Default::default()
            };
            digest = SHA256.digest(&level.encode_to_vec());
            children.push(level);
        }
        let error = listed("", &reapi::Tree { root: children.pop(), children }).unwrap_err();
        assert!(error.to_string().contains("expands"), "{error}");
        let tree = reapi::Tree {
            root: Some(reapi::Directory {
                directories: vec![node("absent", SHA256.digest(b"absent"))],
                ..Default::default()
            }),
            children: vec![],
        };
        assert!(listed("", &tree).is_err());
    }
}
