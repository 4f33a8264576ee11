//! What can happen to a file, and how it is done.

use crate::regular_file;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// What happens to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A bit differs, so many eighths into the file.
    Flip(u64),
    /// Only so many eighths are left.
    Truncate(u64),
    /// A sector is zero, as after a power cut.
    Zeros,
    /// Other bytes follow its end.
    Extend,
    Delete,
    /// It trades places with another file of its kind.
    Swap,
    /// Nobody may read it any more.
    Unreadable,
    /// Everybody may write and execute it.
    Open,
}

impl Fault {
    pub(super) const ALL: [Self; 11] = [
        Self::Flip(0),
        Self::Flip(3),
        Self::Flip(8),
        Self::Truncate(0),
        Self::Truncate(4),
        Self::Zeros,
        Self::Extend,
        Self::Delete,
        Self::Swap,
        Self::Unreadable,
        Self::Open,
    ];

    /// Damages a file of a store.
    pub(super) fn damage(self, store: &Path, file: &Path) {
        let path = &store.join(file);
        let before = fs::metadata(path).unwrap();
        let size = before.len();
        let in_place = |change: &dyn Fn(&fs::File)| {
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
            change(&fs::OpenOptions::new().read(true).write(true).open(path).unwrap());
            fs::set_permissions(path, before.permissions()).unwrap();
        };
        let mode = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        match self {
            Self::Flip(eighths) => in_place(&|file| {
                let (mut byte, at) = ([0], (size * eighths / 8).min(size.saturating_sub(1)));
                if file.read_exact_at(&mut byte, at).is_ok() {
                    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
                }
            }),
            Self::Truncate(eighths) => in_place(&|file| file.set_len(size * eighths / 8).unwrap()),
            Self::Zeros => in_place(&|file| {
                file.write_all_at(&[0; 512][..(size / 2).min(512) as usize], size / 4).unwrap();
            }),
            Self::Extend => in_place(&|file| file.write_all_at(&[7; 700], size).unwrap()),
            Self::Delete => fs::remove_file(path).unwrap(),
            Self::Swap => {
                let others = files_below(store).into_iter().filter(|other| other != file);
                let is_top = |path: &Path| path.components().count() == 1;
                let other = others
                    .filter(|other| kind_of(other) == kind_of(file) || is_top(file) && is_top(other))
                    .min();
                if let Some(other) = other {
                    renameat_with(CWD, path, CWD, store.join(other), RenameFlags::EXCHANGE).unwrap();
                }
            }
            Self::Unreadable => mode(0),
            Self::Open => mode(0o777),
        }
    }
}

/// Which kind of file this is, by its path below the store.
pub(super) fn kind_of(file: &Path) -> String {
    let text = file.to_string_lossy().into_owned();
    let top: Vec<&str> = text.split('/').take(2).collect();
    let extension = file.extension().map(|kind| kind.to_string_lossy().into_owned()).unwrap_or_default();
    match top[..] {
        ["segments", _] => extension,
        ["checksums", _] => "checksums".into(),
        ["v1", "results"] if text.contains("+private/") => "v1/private".into(),
        _ => top.join("/"),
    }
}

/// The files below a directory, by their paths in it, sorted.
pub(super) fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Copies a store.
pub(super) fn copy_store(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(&file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), target).unwrap();
    }
}

/// Runs a test that obeys the permissions of files even if its user is root.
pub(super) fn obeying_permissions<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    regular_file::obeying_permissions(move || actix::System::new().block_on(test()));
}
