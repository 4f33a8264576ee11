//! The list of static tokens on disk. The server reads it; `gorego token` and the Admin service change it.
//!
//! A change is made under a lock. It takes effect as a whole, because a new file is renamed into place. Only the owner
//! can read the file. A file that others may read or change is refused.

use super::TokenFile;
use gorego_reapi::error::{Error, Result};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Maximum size of the file in bytes.
const FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// How long a change waits for another one. A change takes milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
/// How often the lock is tried. `flock` has no time limit, so a waiting change cannot sleep until the lock is free.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// Reads the list. A file that does not exist is an empty list.
///
/// # Errors
/// `Invalid` that names the file and what is wrong with it.
pub fn read(path: &Path) -> Result<TokenFile> {
    let refuse = |problem: String| Error::Invalid(format!("token file {}: {problem}", path.display()));
    let mut text = String::new();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(TokenFile::default()),
        Err(error) => return Err(refuse(format!("cannot be read: {error}"))),
    };
    let mode = file.metadata().map_err(|error| refuse(format!("cannot be read: {error}")))?.mode();
    if mode & 0o077 != 0 {
        let mode = mode & 0o777;
        return Err(refuse(format!("its mode is {mode:o}, so that others can use it; run chmod 600 on it")));
    }
    let read = file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text);
    read.map_err(|error| refuse(format!("cannot be read: {error}")))?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(refuse("is larger than 16 MiB".into()));
    }
    TokenFile::parse(&text).map_err(|error| refuse(error.to_string()))
}

/// Changes the list, and returns the result of `change`. If a step fails, the file stays unchanged.
///
/// # Errors
/// The errors of [`read`] and of `change`; `Precondition` if the file cannot be written.
pub fn update<T>(path: &Path, change: impl FnOnce(&mut TokenFile) -> Result<T>) -> Result<T> {
    let failed = |doing: &str, error: &io::Error| {
        Error::Precondition(format!("could not {doing} token file {}: {error}", path.display()))
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let lock = File::open(&directory).map_err(|error| failed("open the directory of", &error))?;
    // The lock is released when the directory is closed.
    wait_for_lock(&lock, LOCK_LIMIT).map_err(|error| failed("lock", &error))?;
    let mut list = read(path)?;
    let changed = change(&mut list)?;
    write(path, &directory, &list.render()?).map_err(|error| failed("write", &error))?;
    Ok(changed)
}

/// Locks a directory. Any user who may read the directory can hold a lock, so the wait is limited.
fn wait_for_lock(directory: &File, limit: Duration) -> io::Result<()> {
    let end = Instant::now() + limit;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(LOCK_INTERVAL),
            Err(Errno::WOULDBLOCK) => {
                let problem = format!("another process has held the lock of its directory for {limit:?}");
                return Err(io::Error::new(ErrorKind::TimedOut, problem));
            }
            locked => return Ok(locked?),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a token that was revoked stays revoked after a power cut")]
fn write(path: &Path, directory: &Path, text: &str) -> io::Result<()> {
    // A temporary file has the mode 600.
    let mut file = tempfile::Builder::new().prefix(".tokens-").tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    // If root changes the file, it stays readable for the user of the server.
    if rustix::process::geteuid().is_root() {
        let owner = fs::metadata(path).or_else(|_| fs::metadata(directory))?;
        fchown(file.as_file(), Some(owner.uid()), Some(owner.gid()))?;
    }
    file.as_file().set_permissions(fs::Permissions::from_mode(0o600))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::super::{NewToken, TokenRecord};
    use super::*;
    use std::time::SystemTime;

    fn record() -> TokenRecord {
        let NewToken { id, sha256, .. } = NewToken::random().unwrap();
        let (roles, note) = (vec!["ci".into()], String::new());
        TokenRecord { id, sha256, roles, created: SystemTime::UNIX_EPOCH, expires: None, note }
    }

    #[test]
    fn changes_at_the_same_time_are_all_made_and_the_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        assert_eq!(read(&path).unwrap(), TokenFile::default());
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| update(&path, |list| list.add(record())).unwrap());
            }
        });
        assert_eq!(read(&path).unwrap().tokens.len(), 8);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left behind");
        let refused = update(&path, |list| list.revoke(&["x".into()]));
        assert!(matches!(refused, Err(Error::NotFound(_))));
        assert_eq!(read(&path).unwrap().tokens.len(), 8);
    }

    #[test]
    fn a_file_that_others_may_use_or_that_is_malformed_is_refused_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        for (text, mode, part) in
            [("", 0o640, "chmod 600"), ("[[token]]", 0o600, "id"), ("\u{0}", 0o600, "tokens")]
        {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(&*path.to_string_lossy()), "{error}");
            assert!(update(&path, |list| list.add(record())).is_err(), "it is not replaced");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_lock_that_another_process_holds_is_not_waited_for_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let [holder, waiter] = [(); 2].map(|()| File::open(directory.path()).unwrap());
        wait_for_lock(&holder, Duration::ZERO).unwrap();
        let refused = wait_for_lock(&waiter, Duration::from_millis(50)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
        drop(holder);
        wait_for_lock(&waiter, Duration::ZERO).unwrap();
    }
}
