//! Tests of a start that finds something else in the place of a directory or file of the store.

use super::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::{fs, os::unix::fs::symlink};

/// What another program may have put there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Odd {
    File,
    Directory,
    Link,
    Fifo,
}

impl Odd {
    const ALL: [Self; 4] = [Self::File, Self::Directory, Self::Link, Self::Fifo];

    /// The words for it in a message.
    fn name(self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Directory => "a directory",
            Self::Link => "a symbolic link",
            Self::Fifo => "a FIFO",
        }
    }

    fn make(self, path: &Path) {
        match self {
            Self::File => fs::write(path, "mine").unwrap(),
            Self::Directory => fs::create_dir(path).unwrap(),
            Self::Link => symlink("nowhere", path).unwrap(),
            Self::Fifo => mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap(),
        }
    }

    fn remove(self, path: &Path) {
        if self == Self::Directory { fs::remove_dir(path) } else { fs::remove_file(path) }.unwrap();
    }
}

fn open(root: &Path) -> Result<CasActor> {
    CasActor::open(settings_at(root.to_owned(), 1_000 * MB), &instances(), Handle::current())
}

/// The refusal names the path, what was found, what was expected and what to do. Doing that makes the start work.
#[actix::test]
async fn a_start_says_what_is_in_the_place_of_a_directory_or_file_and_what_to_do() {
    let directories =
        ["", "v1", "v1/trash", "v1/blobs", "v1/packed", "v1/results", "v1/zstd", "segments", "checksums"];
    let expected = directories.map(|name| (name, Odd::Directory));
    for (name, expected) in expected.into_iter().chain(["lock", "format"].map(|name| (name, Odd::File))) {
        for odd in Odd::ALL.into_iter().filter(|odd| *odd != expected) {
            let (directory, root) = store_with_blob().await;
            let path = if name.is_empty() { root.clone() } else { root.join(name) };
            fs::rename(&path, directory.path().join("before")).unwrap();
            odd.make(&path);
            let refused = open(&root).unwrap_err();
            assert!(matches!(refused, Error::Precondition(_)), "{refused}");
            let (refused, found, expected) = (refused.to_string(), odd.name(), expected.name());
            let problem = format!("{} is {found}, and the store has {expected} there", path.display());
            for part in [&*problem, "move it elsewhere and start again", "local_cache_dir"] {
                assert!(refused.contains(part), "{name:?} {odd:?}: {refused}");
            }
            odd.remove(&path);
            fs::rename(directory.path().join("before"), &path).unwrap();
            open(&root).unwrap();
        }
    }
}

/// What the server has made itself is thrown away if it has become something else.
#[actix::test]
async fn a_start_replaces_what_is_in_the_place_of_the_directory_of_an_instance() {
    for name in ["v1/blobs/=", "v1/results/=", "v1/tmp"] {
        for odd in Odd::ALL {
            let (directory, root) = store_with_blob().await;
            let _ = fs::remove_dir_all(root.join(name));
            odd.make(&root.join(name));
            let store = TestStore::over(directory, settings_at(root, 200 * MB)).await;
            let blob = store.put(noise(LARGE, 2)).await;
            assert_eq!(store.get(blob).await.unwrap(), noise(LARGE, 2), "{name} {odd:?}");
        }
    }
}

/// A stopped store with one blob, and its root.
async fn store_with_blob() -> (Rc<TempDir>, PathBuf) {
    let store = TestStore::new().await;
    store.put(noise(LARGE, 1)).await;
    store.cas.actor().send(CloseStore).await.unwrap();
    let directory = store.root.clone();
    drop(store);
    let root = directory.path().join("store");
    // The lock is released when the last job of the store has ended.
    eventually(|| async { open(&root).ok() }).await;
    (directory, root)
}
