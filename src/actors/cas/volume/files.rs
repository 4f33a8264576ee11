//! [`Files`]: where stored things lie on disk, and who may put them there.
//!
//! ```text
//! <root>/lock                                              held while a server runs on it
//! <root>/format                                            which layout this is
//! <root>/v1/blobs/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/results/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/zstd/<instance>/<function>/<ab>/<hash>-<size>-<generation>
//! <root>/v1/tmp/<generation>                               uploads in progress; emptied at start
//! <root>/v1/trash/                                         what start threw away; emptied in the background
//! ```
//!
//! Invariants: a generation is used once, so deleting an old file can never hit a newer one of the same blob. A blob's file
//! that has its full length under its final name has its right content: it got the name after its hash was checked, or its
//! bytes were checked before the first was written. A result's name does not tell its length; its file has a checksum. Nor
//! does that of a zstd form, which carries the name of its blob: it is decoded and hashed before it is first served, unless
//! this process made it. What this process knows to be right it knows again by its [`Stamp`]. Nothing is fsynced: the death of
//! the process loses nothing, a power cut may lose or damage what was written last, and the hash check at first read turns that
//! into misses.

use crate::actors::cas::{
    index::{FileId, Key, Kind, Stamp},
    volume::stamps::{change_unobserved, has_fine_change_times, settled, stamp_of},
};
use crate::{
    disk::Space,
    instance::{InstanceId, Instances},
    regular_file,
    spread::spread_subdirectories,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
};
use rustix::fs::{FlockOperation, flock};
use std::{
    fmt::Write as _,
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};
use uuid::Uuid;

/// The content of `<root>/format`.
const FORMAT: &str = "gorego store 1\n";
/// More than any format has.
const MAX_FORMAT_BYTES: u64 = 4_096;
/// Permission bits of stored files: nobody writes them again.
pub const STORED_MODE: u32 = 0o444;

/// The files of one store; holds its lock.
#[derive(Debug)]
pub struct Files {
    base: PathBuf,
    /// Directory names by [`InstanceId`].
    instances: Vec<String>,
    block: u64,
    generation: AtomicU64,
    /// See [`has_fine_change_times`].
    has_fine_times: bool,
    _lock: File,
}

impl Files {
    /// Takes possession of a store directory, making it if need be, and throws leftovers out of the way.
    ///
    /// # Errors
    /// `Precondition` when the directory cannot be used: not writable, held by another server, or of an unknown format.
    pub fn open(root: &Path, instances: &Instances) -> Result<Self> {
        let refuse = |what: &str, error: &dyn std::fmt::Display| {
            Error::Precondition(format!(
                "cannot use {} as the store: {what}: {error} (local_cache_dir chooses another directory)",
                root.display()
            ))
        };
        fs::create_dir_all(root).map_err(|error| refuse("the directory cannot be made", &error))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            // Whatever was put in its place must not hold up the start.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(root.join("lock"))
            .map_err(|error| refuse("it is not writable", &error))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => refuse("it is in use", &"another gorego server runs on it"),
            error => refuse("it cannot be locked", &error),
        })?;
        let format = root.join("format");
        match regular_file::read(&format, MAX_FORMAT_BYTES) {
            Ok(text) if text == FORMAT.as_bytes() => {}
            Ok(text) => {
                let text = String::from_utf8_lossy(&text);
                let text = text.chars().take(40).collect::<String>();
                return Err(refuse(
                    "it is of a format that this version does not know",
                    &text.escape_debug(),
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                regular_file::write(&format, FORMAT.as_bytes())
                    .map_err(|error| refuse("it is not writable", &error))?;
            }
            Err(error) => return Err(refuse("its format cannot be read", &error)),
        }
        let base = root.join("v1");
        let names: Vec<String> = instances.all().iter().map(|instance| encode(instance.name())).collect();
        prepare(&base, &names).map_err(|error| refuse("its directories cannot be made", &error))?;
        let block =
            rustix::fs::statvfs(&base).map_err(|error| refuse("it cannot be examined", &error))?.f_frsize;
        let has_fine_times = has_fine_change_times(&base.join("tmp"))
            .map_err(|error| refuse("a file in it cannot be written", &error))?;
        let (block, generation) = (block.max(512), AtomicU64::new(1));
        Ok(Self { base, instances: names, block, generation, has_fine_times, _lock: lock })
    }

    /// Where a stored file lies.
    pub fn path(&self, file: &FileId) -> PathBuf {
        let Key { digest, instance, kind } = &file.key;
        let mut path = self.shard(*kind, *instance, digest.function(), digest.hash()[0]);
        path.push(format!("{}-{}-{:x}", digest.hash_hex(), digest.size(), file.generation));
        path
    }

    /// The directory of all files whose hash starts with `first`.
    pub fn shard(&self, kind: Kind, instance: InstanceId, function: DigestFunction, first: u8) -> PathBuf {
        let name = self.instances.get(usize::from(instance.0)).map_or("", String::as_str);
        self.base.join(format!("{}/{name}/{}/{first:02x}", directory(kind), function.name()))
    }

    /// Where an upload in progress lies.
    pub fn temporary_path(&self, generation: u64) -> PathBuf {
        self.base.join(format!("tmp/{generation:x}"))
    }

    /// Where start puts what it throws away.
    pub fn trash(&self) -> PathBuf {
        self.base.join("trash")
    }

    /// A number that no file of this store has or had.
    pub fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    /// Says that a file of this number exists.
    pub fn saw_generation(&self, generation: u64) {
        self.generation.fetch_max(generation.saturating_add(1), Ordering::Relaxed);
    }

    /// What a file is to be known by whose content is right and whose metadata were just read.
    pub fn stamp(&self, metadata: &Metadata) -> Stamp {
        self.settled(stamp_of(metadata))
    }

    /// Whether change times tell changes within one tick of the clock apart.
    pub fn has_fine_times(&self) -> bool {
        self.has_fine_times
    }

    fn settled(&self, stamp: Stamp) -> Stamp {
        settled(stamp, self.has_fine_times, SystemTime::now())
    }

    /// Gives a temporary file, whose content is right, the name of a stored one. Returns what it is known by.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn keep(&self, mut file: TemporaryFile, path: &Path) -> io::Result<Stamp> {
        let written = stamp_of(&file.file.metadata()?);
        // A file that is open for writing, by ourselves too, gets no lease.
        file.file = file.reopen()?;
        let moved =
            change_unobserved(&file.file, written, || in_shard(path, || fs::rename(&file.path, path)))?;
        file.kept = true;
        Ok(moved.map_or(Stamp::UNTRUSTED, |stamp| self.settled(stamp)))
    }

    /// Deletes a stored file, or whatever was put in its place.
    ///
    /// # Errors
    /// Those of unlink(2) and rename(2); a file that is gone is none.
    pub fn delete(&self, file: &FileId) -> io::Result<()> {
        let path = self.path(file);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => self.throw_away(&path),
            outcome => outcome,
        }
    }

    /// Moves something that is not ours out of the way; the next start deletes it.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn throw_away(&self, path: &Path) -> io::Result<()> {
        fs::rename(path, self.trash().join(Uuid::new_v4().to_string()))
    }

    /// Bytes that a file of this size takes on disk.
    pub fn charge(&self, size: u64) -> u64 {
        size.max(1).checked_next_multiple_of(self.block).unwrap_or(u64::MAX)
    }

    /// The room on the disk of the store. Blocks.
    ///
    /// # Errors
    /// Those of statfs(2).
    pub fn space(&self) -> io::Result<Space> {
        Space::of(&self.base)
    }

    /// How many instances have directories.
    pub fn instances(&self) -> impl Iterator<Item = InstanceId> + use<> {
        (0..self.instances.len() as u16).map(InstanceId)
    }
}

/// Makes a file that did not exist, for writing once.
///
/// # Errors
/// Those of open(2).
pub fn create(path: &Path) -> io::Result<File> {
    in_shard(path, || OpenOptions::new().write(true).create_new(true).mode(STORED_MODE).open(path))
}

/// Does something that needs the directory of `path` and makes that if it is not there. Directories are made when they are
/// first needed: an empty store starts at once.
///
/// # Errors
/// Those of `put`, and of mkdir(2).
pub fn in_shard<T>(path: &Path, mut put: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match (put(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(shards) = parent.parent() {
                fs::create_dir_all(shards)?;
                spread_subdirectories(File::open(shards)?);
            }
            fs::create_dir_all(parent)?;
            put()
        }
        (outcome, _) => outcome,
    }
}

/// A file under a temporary name, deleted when dropped.
#[derive(Debug)]
pub struct TemporaryFile {
    path: PathBuf,
    /// Open for writing, until it is kept.
    pub file: File,
    kept: bool,
}

impl TemporaryFile {
    /// Makes one.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn create(path: PathBuf) -> io::Result<Self> {
        Ok(Self { file: create(&path)?, path, kept: false })
    }

    /// Opens it once more, for reading.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn reopen(&self) -> io::Result<File> {
        regular_file::open(&self.path)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.kept {
            // Whatever stays is thrown out at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The digest and generation in the name of a stored file; `None` for a name that this store does not give.
pub fn parse_file_name(function: DigestFunction, name: &str) -> Option<(Digest, u64)> {
    let mut parts = name.split('-');
    let (hash, size, generation) = (parts.next()?, parts.next()?, parts.next()?);
    let digest = Digest::parse(function, hash, size.parse().ok()?).ok()?;
    let generation = u64::from_str_radix(generation, 16).ok().filter(|generation| *generation > 0)?;
    (format!("{digest:?}-{generation:x}").replace('/', "-") == name).then_some((digest, generation))
}

fn directory(kind: Kind) -> &'static str {
    match kind {
        Kind::Blob => "blobs",
        Kind::Result => "results",
        Kind::Zstd => "zstd",
    }
}

/// A directory name for an instance: one name each, no slash, no dot in front, readable.
fn encode(instance: &str) -> String {
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

/// Makes the directories that always exist, and moves aside temporary files and instances that are not served any
/// more: their bytes would count for nobody.
fn prepare(base: &Path, instances: &[String]) -> io::Result<()> {
    let trash = base.join("trash");
    fs::create_dir_all(&trash)?;
    let mut thrown = 0u64;
    let mut throw = |path: &Path| -> io::Result<()> {
        loop {
            thrown += 1;
            let target = trash.join(thrown.to_string());
            if !target.try_exists()? {
                return fs::rename(path, target);
            }
        }
    };
    let tmp = base.join("tmp");
    if tmp.try_exists()? {
        throw(&tmp)?;
    }
    fs::create_dir(&tmp)?;
    for kind in Kind::ALL {
        let parent = base.join(directory(kind));
        fs::create_dir_all(&parent)?;
        for entry in fs::read_dir(&parent)? {
            let entry = entry?;
            if !instances.iter().any(|name| entry.file_name() == **name) {
                throw(&entry.path())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_read_back_and_others_are_not_ours() {
        let function = DigestFunction::Sha256;
        let digest = function.digest(b"x");
        let hash = digest.hash_hex();
        assert_eq!(parse_file_name(function, &format!("{hash}-1-ff")), Some((digest, 255)));
        for name in ["".into(), "x".into(), hash.clone(), format!("{hash}-1"), format!("{hash}-01-ff")] {
            assert_eq!(parse_file_name(function, &name), None, "{name}");
        }
        for tail in ["-1-FF", "-1-0", "--1-ff", "-1-ff-", "-1-g", "-+1-ff"] {
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

    #[test]
    fn a_directory_in_use_or_of_another_format_is_refused_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let instances = Instances::new([""]).unwrap();
        let first = Files::open(root.path(), &instances).unwrap();
        let error = Files::open(root.path(), &instances).unwrap_err();
        assert!(error.to_string().contains("another gorego server runs on it"), "{error}");
        drop(first);
        Files::open(root.path(), &instances).unwrap();
        fs::write(root.path().join("format"), "gorego store 2\n").unwrap();
        let error = Files::open(root.path(), &instances).unwrap_err();
        assert!(error.to_string().contains("gorego store 2"), "{error}");
        fs::write(root.path().join("plain"), "").unwrap();
        let error = Files::open(&root.path().join("plain"), &instances).unwrap_err();
        assert!(matches!(error, Error::Precondition(_)), "{error}");
    }
}
