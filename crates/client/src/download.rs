//! Downloads the outputs of an action.
//!
//! The result comes from the server and may be hostile: paths are checked, Trees are bounded before they are walked, and
//! [`Destination`] keeps every write below the given directory.

use super::{Client, Progress, blocking, destination::Destination};
use crate::codec::ANSWER_MAX_MEMORY;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    path::RootPath,
    proto::reapi,
    tree::{Directory, InputTree, MAX_DIRECTORY_BYTES, MAX_TREE_NODES},
    wire,
};
use prost::Message as _;
use std::{collections::HashMap, io::Write as _, path::Path, sync::Arc};

/// Number of concurrent transfers.
const CALLS_AT_A_TIME: usize = 8;

/// The entries to write, with checked paths.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    files: Vec<PlannedFile>,
    directories: Vec<RootPath>,
    symlinks: Vec<(RootPath, String)>,
}

#[derive(Debug, Clone, PartialEq)]
struct PlannedFile {
    path: RootPath,
    digest: Digest,
    executable: bool,
}

impl Client {
    /// Downloads every output of a result to `directory`, at the path under which it was requested. Existing files are
    /// replaced one by one; other files in output directories stay.
    ///
    /// # Errors
    /// `Invalid` for a path that would leave `directory` or pass through a symbolic link, and when a file cannot be
    /// written; `DataLoss` for wrong bytes; errors of the server.
    pub async fn download_outputs(
        &self,
        result: &reapi::ActionResult,
        directory: &Path,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        let mut plan = Plan::default();
        plan.add_files(&result.output_files)?;
        plan.add_symlinks(result)?;
        for output in &result.output_directories {
            let path = output_path(&output.path)?;
            let tree = Digest::from_wire(DigestFunction::Sha256, output.tree_digest.as_ref(), "tree_digest")?;
            let bytes = self.read_bytes(tree, MAX_DIRECTORY_BYTES, &Arc::default()).await?;
            plan.add_tree(&path, &bytes)?;
        }
        let directory = directory.to_owned();
        let Plan { files, directories, symlinks } = plan;
        let destination = blocking(move || {
            let destination = Destination::open(&directory)?;
            directories.iter().try_for_each(|path| destination.directory(path))?;
            Ok(destination)
        })
        .await?;
        self.download_files(files, &destination, progress).await?;
        // Symlinks are created last, so that they do not block files of the same result.
        blocking(move || symlinks.iter().try_for_each(|(path, target)| destination.symlink(path, target)))
            .await
    }

    async fn download_files(
        &self,
        files: Vec<PlannedFile>,
        destination: &Destination,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        // Equal files are fetched once.
        let mut wanted: HashMap<Digest, Vec<PlannedFile>> = HashMap::new();
        for file in files {
            wanted.entry(file.digest).or_default().push(file);
        }
        progress.expect(wanted.keys().map(Digest::size).sum());
        let (small, large): (Vec<_>, Vec<_>) = wanted.keys().copied().partition(|d| self.fits_batch(d));
        let wanted = Arc::new(wanted);
        let calls = self.batches(small).into_iter().chain(large.into_iter().map(|digest| vec![digest]));
        stream::iter(calls)
            .map(|digests| {
                let (client, destination) = (self.clone(), destination.clone());
                let (wanted, progress) = (wanted.clone(), progress.clone());
                async move { client.download_some(digests, wanted, destination, &progress).await }
            })
            .buffer_unordered(CALLS_AT_A_TIME)
            .try_collect()
            .await
    }

    async fn download_some(
        &self,
        digests: Vec<Digest>,
        wanted: Arc<HashMap<Digest, Vec<PlannedFile>>>,
        destination: Destination,
        progress: &Arc<Progress>,
    ) -> Result<()> {
        if let [digest] = digests[..]
            && !self.fits_batch(&digest)
        {
            for file in wanted.get(&digest).into_iter().flatten().cloned() {
                let destination = destination.clone();
                let pending = blocking(move || destination.create(&file.path, file.executable)).await?;
                let pending = self.read_into(digest, pending, progress).await?;
                blocking(move || pending.commit()).await?;
            }
            return Ok(());
        }
        // The empty blob is never fetched (GEN-06).
        let asked: Vec<_> = digests.iter().copied().filter(|digest| !digest.is_empty()).collect();
        let blobs = if asked.is_empty() { HashMap::new() } else { self.read_batch(&asked).await? };
        let progress = progress.clone();
        blocking(move || {
            for digest in digests {
                let bytes = match blobs.get(&digest) {
                    Some(bytes) => bytes.clone(),
                    None if digest.is_empty() => Bytes::new(),
                    None => return Err(Error::NotFound(format!("the server did not send blob {digest}"))),
                };
                for file in wanted.get(&digest).into_iter().flatten() {
                    let mut pending = destination.create(&file.path, file.executable)?;
                    pending.write_all(&bytes).map_err(|error| {
                        Error::Invalid(format!("could not write output {}: {error}", file.path))
                    })?;
                    pending.commit()?;
                }
                progress.advance(digest.size());
            }
            Ok(())
        })
        .await
    }
}

impl Plan {
    fn add_files(&mut self, files: &[reapi::OutputFile]) -> Result<()> {
        for file in files {
            self.files.push(PlannedFile {
                path: output_path(&file.path)?,
                digest: Digest::from_wire(DigestFunction::Sha256, file.digest.as_ref(), &file.path)?,
                executable: file.is_executable,
            });
        }
        Ok(())
    }

    /// EXE-53: uses `output_symlinks` if the server fills it, otherwise the two deprecated lists.
    #[allow(deprecated)]
    fn add_symlinks(&mut self, result: &reapi::ActionResult) -> Result<()> {
        let old = || result.output_file_symlinks.iter().chain(&result.output_directory_symlinks);
        let links: Vec<_> = match &result.output_symlinks {
            links if links.is_empty() => old().collect(),
            links => links.iter().collect(),
        };
        for link in links {
            self.symlinks.push((output_path(&link.path)?, link.target.clone()));
        }
        Ok(())
    }

    /// Adds the contents of an encoded Tree below `path`.
    fn add_tree(&mut self, path: &RootPath, tree: &[u8]) -> Result<()> {
        let malformed = |problem: &dyn std::fmt::Display| {
            Error::Invalid(format!("output directory {path}: the server sent a malformed Tree: {problem}"))
        };
        let tree: reapi::Tree =
            wire::decode(tree, ANSWER_MAX_MEMORY, "Tree").map_err(|error| malformed(&error))?;
        let root = tree.root.unwrap_or_default();
        let mut directories = HashMap::new();
        for message in std::iter::once(&root).chain(&tree.children) {
            let directory =
                Directory::from_wire(message, DigestFunction::Sha256).map_err(|error| malformed(&error))?;
            directories.insert(DigestFunction::Sha256.digest(&message.encode_to_vec()), Arc::new(directory));
        }
        // Servers may omit the empty directory (GEN-06).
        directories.entry(Digest::empty(DigestFunction::Sha256)).or_default();
        let root = DigestFunction::Sha256.digest(&root.encode_to_vec());
        let tree = InputTree::new(root, directories).map_err(|error| malformed(&error))?;
        let planned = self.files.len() + self.directories.len() + self.symlinks.len();
        if tree.nodes().saturating_add(planned as u64) > MAX_TREE_NODES {
            return Err(malformed(&"the outputs have too many files"));
        }
        let below = |base: &RootPath, name: &str| base.join(name).map_err(|error| malformed(&error));
        let mut stack = vec![(path.clone(), tree.root())];
        while let Some((path, directory)) = stack.pop() {
            for file in &directory.files {
                let path = below(&path, &file.name)?;
                self.files.push(PlannedFile { path, digest: file.digest, executable: file.executable });
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

fn output_path(path: &str) -> Result<RootPath> {
    RootPath::root()
        .join(path)
        .map_err(|error| Error::Invalid(format!("the server sent an output that is not downloaded: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn node(name: &str, digest: Digest) -> reapi::DirectoryNode {
        reapi::DirectoryNode { name: name.into(), digest: Some(digest.to_wire()) }
    }

    #[test]
    fn outputs_that_would_land_elsewhere_are_refused() {
        let digest = Some(Digest::empty(SHA256).to_wire());
        for path in ["/etc/passwd", "../x", "a/../../x", "a\0b"] {
            let file = reapi::OutputFile { path: path.into(), digest: digest.clone(), ..Default::default() };
            assert!(Plan::default().add_files(&[file]).is_err(), "{path:?}");
            let output_symlinks = vec![reapi::OutputSymlink { path: path.into(), ..Default::default() }];
            let result = reapi::ActionResult { output_symlinks, ..Default::default() };
            assert!(Plan::default().add_symlinks(&result).is_err(), "{path:?}");
        }
        for name in ["..", "../x", "a/b", ""] {
            let file = reapi::FileNode { name: name.into(), digest: digest.clone(), ..Default::default() };
            let root = Some(reapi::Directory { files: vec![file], ..Default::default() });
            let tree = reapi::Tree { root, children: vec![] };
            assert!(Plan::default().add_tree(&RootPath::root(), &tree.encode_to_vec()).is_err(), "{name:?}");
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
        let tree = reapi::Tree { root: Some(root), children: vec![leaf] };
        let mut plan = Plan::default();
        plan.add_tree(&RootPath::root().join("out").unwrap(), &tree.encode_to_vec()).unwrap();
        let mut paths: Vec<_> = plan.files.iter().map(|file| file.path.to_string()).collect();
        paths.extend(plan.directories.iter().map(ToString::to_string));
        paths.extend(plan.symlinks.iter().map(|(path, target)| format!("{path}>{target}")));
        paths.sort_unstable();
        let wanted = ["out", "out/a", "out/a/f", "out/a/l>/x", "out/b", "out/b/f", "out/b/l>/x", "out/e"];
        assert_eq!(paths, wanted);
        assert!(plan.files.iter().all(|file| file.executable && file.digest == SHA256.digest(b"f")));
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
        let tree = reapi::Tree { root: children.pop(), children };
        let error = Plan::default().add_tree(&RootPath::root(), &tree.encode_to_vec()).unwrap_err();
        assert!(error.to_string().contains("expands"), "{error}");
        let tree = reapi::Tree {
            root: Some(reapi::Directory {
                directories: vec![node("absent", SHA256.digest(b"absent"))],
                ..Default::default()
            }),
            children: vec![],
        };
        assert!(Plan::default().add_tree(&RootPath::root(), &tree.encode_to_vec()).is_err());
    }
}
