//! Converts a local directory to an input root: canonical Directory messages (GEN-30) and the files that they name.
//!
//! Symbolic links are kept and never followed. A file is executable if its owner may execute it. Anything that cannot
//! be an input (a socket, a name that is not UTF-8) is an error that names it, because an action with a missing input
//! fails in ways that are hard to understand.

use super::{blobs::BlobSet, local};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
    tree::{MAX_TREE_DEPTH, MAX_TREE_NODES},
};
use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Number of bytes that are read and hashed at a time.
const READ_BYTES: usize = 256 * 1024;

/// A directory that is being read. Its parent is below it on the stack.
struct Open {
    path: PathBuf,
    name: String,
    entries: fs::ReadDir,
    message: reapi::Directory,
}

/// Adds everything below `root` to `blobs` and returns the digest of the root Directory. Reads every file once. Blocks.
///
/// # Errors
/// `Invalid` that names the path that cannot be read or cannot be an input, or the limit that is exceeded.
pub fn scan(root: &Path, blobs: &mut BlobSet) -> Result<Digest> {
    let mut nodes = 0u64;
    let mut stack = vec![open(root.to_owned(), String::new())?];
    while let Some(directory) = stack.last_mut() {
        let Some(entry) = directory.entries.next() else {
            if let Some(digest) = leave(&mut stack, blobs) {
                return Ok(digest);
            }
            continue;
        };
        nodes += 1;
        if nodes > MAX_TREE_NODES {
            return Err(Error::Invalid(format!(
                "{} has more than {MAX_TREE_NODES} files and directories",
                root.display()
            )));
        }
        let entry = entry.map_err(|error| local("read the directory", &directory.path, &error))?;
        if let Some(below) = directory.add(&entry, blobs)? {
            if stack.len() > MAX_TREE_DEPTH {
                return Err(Error::Invalid(format!(
                    "{} is more than {MAX_TREE_DEPTH} directories deep",
                    below.path.display()
                )));
            }
            stack.push(below);
        }
    }
    Err(Error::internal("a directory was left twice"))
}

/// Adds the topmost directory, which was read to its end, to `blobs` and to its parent. Returns its digest if it is the
/// root.
fn leave(stack: &mut Vec<Open>, blobs: &mut BlobSet) -> Option<Digest> {
    let Open { name, mut message, .. } = stack.pop()?;
    sort(&mut message);
    let digest = blobs.add_message(&message);
    let Some(parent) = stack.last_mut() else { return Some(digest) };
    parent.message.directories.push(reapi::DirectoryNode { name, digest: Some(digest.to_wire()) });
    None
}

impl Open {
    /// Adds a file or symlink to the message, and the content of a file to `blobs`. A directory is returned, to be read
    /// next.
    fn add(&mut self, entry: &fs::DirEntry, blobs: &mut BlobSet) -> Result<Option<Self>> {
        let path = entry.path();
        let kind = entry.file_type().map_err(|error| local("look at", &path, &error))?;
        let name = text(entry.file_name(), &path)?;
        if kind.is_dir() {
            return Ok(Some(open(path, name)?));
        }
        if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(|error| local("read the symlink", &path, &error))?;
            let target = text(target.into_os_string(), &path)?;
            self.message.symlinks.push(reapi::SymlinkNode { name, target, ..Default::default() });
        } else if kind.is_file() {
            let (digest, is_executable) = hash(&path)?;
            blobs.add_file(digest, path);
            let digest = Some(digest.to_wire());
            self.message.files.push(reapi::FileNode { name, digest, is_executable, ..Default::default() });
        } else {
            return Err(Error::Invalid(format!(
                "{} is neither a file, a directory nor a symlink and cannot be an input",
                path.display()
            )));
        }
        Ok(None)
    }
}

fn open(path: PathBuf, name: String) -> Result<Open> {
    let entries = fs::read_dir(&path).map_err(|error| local("read the directory", &path, &error))?;
    Ok(Open { path, name, entries, message: reapi::Directory::default() })
}

/// Sorts the entries by name, in byte order.
fn sort(directory: &mut reapi::Directory) {
    directory.files.sort_by(|a, b| a.name.cmp(&b.name));
    directory.directories.sort_by(|a, b| a.name.cmp(&b.name));
    directory.symlinks.sort_by(|a, b| a.name.cmp(&b.name));
}

fn text(name: std::ffi::OsString, path: &Path) -> Result<String> {
    name.into_string()
        .map_err(|_| Error::Invalid(format!("{}: the name or target is not UTF-8 text", path.display())))
}

fn hash(path: &Path) -> Result<(Digest, bool)> {
    let failed = |error: &std::io::Error| local("read", path, error);
    let mut file = File::open(path).map_err(|error| failed(&error))?;
    let metadata = file.metadata().map_err(|error| failed(&error))?;
    let executable = metadata.permissions().mode() & 0o100 != 0;
    let mut hasher = DigestFunction::Sha256.hasher(metadata.len());
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((hasher.finish(), executable)),
            Ok(count) => hasher.update(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Source;
    use gorego_reapi::tree::Directory;
    use std::os::unix::{fs::symlink, net::UnixListener};

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn decode(blobs: &BlobSet, digest: &Digest) -> Directory {
        let Some(Source::Bytes(bytes)) = blobs.get(digest) else { panic!("{digest} is not a directory") };
        Directory::decode(bytes, SHA256).unwrap()
    }

    /// GEN-30.
    #[test]
    fn a_directory_becomes_canonical_messages_whatever_order_it_is_listed_in() {
        let names = ["b", "a", "é", "B", "a-", "z10", "z9"];
        let make = |order: &mut dyn Iterator<Item = &&str>| {
            let dir = tempfile::tempdir().unwrap();
            for name in order {
                fs::write(dir.path().join(name), name).unwrap();
                fs::create_dir_all(dir.path().join(format!("d{name}/empty"))).unwrap();
                symlink("../nowhere", dir.path().join(format!("l{name}"))).unwrap();
            }
            fs::set_permissions(dir.path().join("a"), fs::Permissions::from_mode(0o755)).unwrap();
            let mut blobs = BlobSet::default();
            (scan(dir.path(), &mut blobs).unwrap(), blobs)
        };
        let (root, blobs) = make(&mut names.iter());
        assert_eq!(root, make(&mut names.iter().rev()).0);
        let root = decode(&blobs, &root);
        let mut sorted = names;
        sorted.sort_unstable();
        assert_eq!(root.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), sorted);
        assert!(root.directories.is_sorted_by(|a, b| a.name < b.name));
        assert!(root.symlinks.is_sorted_by(|a, b| a.name < b.name));
        assert!(root.files.iter().all(|file| file.executable == (file.name == "a")));
        assert!(root.symlinks.iter().all(|link| link.target == "../nowhere"));
        assert_eq!(root.files[0].digest, SHA256.digest(root.files[0].name.as_bytes()));
        // Seven equal directories are one blob, and the empty directory below each is the empty blob.
        let sub = decode(&blobs, &root.directories[0].digest);
        assert_eq!(sub.directories[0].digest, Digest::empty(SHA256));
        assert_eq!(blobs.len(), 1 + names.len() + 1 + 1);
    }

    #[test]
    fn a_path_that_cannot_be_an_input_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = UnixListener::bind(dir.path().join("sock")).unwrap();
        let error = scan(dir.path(), &mut BlobSet::default()).unwrap_err().to_string();
        assert!(error.contains("/sock is neither"), "{error}");
        let error = scan(&dir.path().join("absent"), &mut BlobSet::default()).unwrap_err().to_string();
        assert!(error.contains("/absent"), "{error}");
    }

    #[test]
    fn a_deep_directory_needs_no_deep_stack_and_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("d/".repeat(MAX_TREE_DEPTH))).unwrap();
        let mut blobs = BlobSet::default();
        assert!(scan(dir.path(), &mut blobs).is_ok());
        fs::create_dir(dir.path().join("d/".repeat(MAX_TREE_DEPTH)).join("d")).unwrap();
        assert!(scan(dir.path(), &mut blobs).is_err());
    }
}
