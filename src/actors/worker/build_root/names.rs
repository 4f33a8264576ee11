//! The names of the entries of a build root.

use gorego_reapi::digest::Digest;
use rustix::{
    fs::{self as rfs, Mode},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

/// How many names are tried for a new directory. Only leftovers of a crash can have taken many names.
const NAME_ATTEMPTS: u64 = 10_000;
/// How many digits of an action's hash are in the name of its directory. Different actions with the same digits still
/// get separate directories, like an action that runs twice.
const HASH_DIGITS: usize = 8;
/// The prefix of the names of directories for actions.
const ACTION_PREFIX: &str = "a-";
/// The prefix of the names of directories for staged trees.
pub(super) const TREE_PREFIX: &str = "t-";

/// Creates a directory in the build root `root` whose name is derived from the action. Returns the name.
pub(super) fn make_for_action(root: &File, action: &Digest) -> io::Result<OsString> {
    let hash = action.hash_hex();
    let first = format!("{ACTION_PREFIX}{}", hash.get(..HASH_DIGITS).unwrap_or(&hash));
    for number in 1..NAME_ATTEMPTS {
        let name = OsString::from(if number == 1 { first.clone() } else { format!("{first}-{number}") });
        match rfs::mkdirat(root, &*name, Mode::RWXU) {
            Ok(()) => return Ok(name),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

/// Tries numbered names with this prefix until `take` accepts one.
pub(super) fn numbered(
    prefix: &str,
    next: &AtomicU64,
    mut take: impl FnMut(&OsStr) -> io::Result<()>,
) -> io::Result<OsString> {
    for _ in 0..NAME_ATTEMPTS {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let name = OsString::from(format!("{prefix}{number}"));
        match take(&name) {
            Ok(()) => return Ok(name),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST.into())
}

/// The kind of an entry of the build root.
pub(super) enum EntryOwner {
    /// A run: its own directory.
    Run,
    /// A run: the directory with the input root, named after the action.
    Action,
    /// A staged tree, which may be shared by several actions.
    Tree,
}

/// The kind of an entry of the build root by its name; `None` for foreign entries.
pub(super) fn owner(name: &OsStr) -> Option<EntryOwner> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let name = name.to_str()?;
    if let Some(rest) = name.strip_prefix(ACTION_PREFIX) {
        let (hash, number) = rest.split_once('-').unwrap_or((rest, "2"));
        let is_hash = hash.len() == HASH_DIGITS && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        return (is_hash && is_number(number)).then_some(EntryOwner::Action);
    }
    if let Some(number) = name.strip_prefix(TREE_PREFIX) {
        return is_number(number).then_some(EntryOwner::Tree);
    }
    let (slot, number) = name.split_once('-')?;
    (is_number(slot) && is_number(number)).then_some(EntryOwner::Run)
}
