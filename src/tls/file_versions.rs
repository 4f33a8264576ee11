//! [`FileVersions`]: the metadata of the files of `[tls]`, to notice that they were replaced, and [`Looks`] at them.

use super::TlsFiles;
use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

/// The attributes that change when a file is written, replaced, made readable, or reached by another symbolic link. The
/// time is the change time of the inode (ctime), which no program can set. The time alone would be too coarse.
type FileAttributes = (u64, u64, u64, i64, i64);

/// The versions of all files; `None` for one that is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct FileVersions(Vec<Option<FileAttributes>>);

impl FileVersions {
    /// Reads the current versions of the files. Symbolic links in their paths are followed.
    pub(super) fn of(files: &TlsFiles) -> Self {
        let TlsFiles { cert, key, client_ca, crl, client_certificate_required: _ } = files;
        let paths = [Some(cert), Some(key), client_ca.as_ref(), crl.as_ref()];
        Self(paths.into_iter().flatten().map(|path| version(path)).collect())
    }
}

/// Decides at each look at the files whether they are read again, and whether a failure is logged. Pure.
#[derive(Debug, Default)]
pub(super) struct Looks {
    /// The versions at the last look.
    seen: Option<FileVersions>,
    /// The versions whose failure was logged, and the failure.
    refused: Option<(FileVersions, String)>,
}

impl Looks {
    /// Whether the files that were `found` by this look have to be read: if they differ from those in force, and have
    /// not changed since the last look.
    pub(super) fn is_due(&mut self, found: &FileVersions, in_force: &FileVersions) -> bool {
        let is_steady = self.seen.replace(found.clone()).as_ref() == Some(found);
        if found == in_force {
            self.refused = None;
        }
        is_steady && found != in_force
    }

    /// Whether these files have failed in this way for the first time.
    pub(super) fn is_new_failure(&mut self, found: &FileVersions, failure: &str) -> bool {
        let refused = Some((found.clone(), failure.to_owned()));
        let is_new = self.refused != refused;
        self.refused = refused;
        is_new
    }
}

fn version(path: &Path) -> Option<FileAttributes> {
    let found = fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::unix::fs::{PermissionsExt as _, symlink},
        path::PathBuf,
    };

    /// A file may be unreadable for a moment although it stays the same.
    #[test]
    fn a_change_that_failed_is_tried_at_each_look_and_each_failure_is_told_once() {
        let [old, new, next] = [1, 2, 3].map(|inode| FileVersions(vec![Some((1, inode, 1, 1, 1))]));
        let mut looks = Looks::default();
        assert!(!looks.is_due(&old, &old) && !looks.is_due(&old, &old));
        assert!(!looks.is_due(&new, &old), "it may still be changing");
        for is_first in [true, false, false] {
            assert!(looks.is_due(&new, &old));
            assert_eq!(looks.is_new_failure(&new, "unreadable"), is_first);
        }
        assert!(looks.is_new_failure(&new, "the key is for another certificate"));
        assert!(!looks.is_due(&next, &old) && looks.is_due(&next, &old));
        assert!(looks.is_new_failure(&next, "unreadable"));
        // The earlier files are back, and later those that failed.
        assert!(!looks.is_due(&old, &old));
        assert!(!looks.is_due(&next, &old) && looks.is_due(&next, &old));
        assert!(looks.is_new_failure(&next, "unreadable"));
        assert!(!looks.is_due(&next, &next), "they are in force");
    }

    #[test]
    fn a_replaced_file_and_a_replaced_link_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        // The layout of a secret in Kubernetes: cert -> ..data/cert, ..data -> ..1.
        for version in ["..1", "..2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("cert"), "same length").unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/cert", at("cert")).unwrap();
        let files = TlsFiles {
            cert: at("cert"),
            key: at("key"),
            client_ca: None,
            crl: Some(PathBuf::from("/nowhere")),
            client_certificate_required: false,
        };
        let first = FileVersions::of(&files);
        assert_eq!(first, FileVersions::of(&files));
        symlink("..2", at("..new")).unwrap();
        fs::rename(at("..new"), at("..data")).unwrap();
        let second = FileVersions::of(&files);
        assert_ne!(first, second);
        fs::write(at("key"), "k").unwrap();
        let third = FileVersions::of(&files);
        assert_ne!(second, third);
        fs::write(at("new"), "k").unwrap();
        fs::rename(at("new"), at("key")).unwrap();
        let fourth = FileVersions::of(&files);
        assert_ne!(third, fourth);
        // The server could not read the key before, and now it can.
        fs::set_permissions(at("key"), fs::Permissions::from_mode(0o640)).unwrap();
        assert_ne!(fourth, FileVersions::of(&files));
    }
}
