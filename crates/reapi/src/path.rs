//! Paths from the wire. They are hostile until checked.
//!
//! A [`RootPath`] is normalised and lexically stays below the input root. Symbolic links can still lead elsewhere; the
//! code that opens the path must prevent that. Nothing here accesses a disk.

use crate::escape::shown;
use std::{fmt, path::Path};

/// Longest path below an input root, in bytes. It leaves room for the build root within the kernel's limit of 4,096.
pub const MAX_PATH_BYTES: usize = 3_072;
/// Longest name of one node, in bytes. This is the limit of Linux file systems.
pub const MAX_NAME_BYTES: usize = 255;

/// The message says what is wrong with a path or name, and quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PathError(String);

/// Checks the name of a node of a Directory (EXE-28).
///
/// # Errors
/// When the name is empty, ".", "..", too long, or contains "/" or NUL.
pub fn check_node_name(name: &str) -> Result<(), PathError> {
    let problem = match name {
        "" => "is empty",
        "." | ".." => "is reserved",
        _ if name.contains('/') => "contains a slash",
        _ if name.contains('\0') => "contains a NUL",
        _ if name.len() > MAX_NAME_BYTES => "is longer than 255 bytes",
        _ => return Ok(()),
    };
    Err(PathError(format!("node name \"{}\" {problem}", shown(name))))
}

/// A path below an input root: relative, without ".", ".." or repeated slashes. The root itself is the empty path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RootPath(String);

impl RootPath {
    /// The input root itself.
    pub const fn root() -> Self {
        Self(String::new())
    }

    /// Appends `path`, which may contain ".." as long as every step stays within the root (EXE-29).
    ///
    /// # Errors
    /// When `path` is absolute, contains NUL, is too long, or leaves the root at any step.
    pub fn join(&self, path: &str) -> Result<Self, PathError> {
        let refuse = |problem: &str| Err(PathError(format!("path \"{}\" {problem}", shown(path))));
        if path.starts_with('/') {
            return refuse("is absolute");
        }
        if path.contains('\0') {
            return refuse("contains a NUL");
        }
        let mut joined = self.0.clone();
        for segment in path.split('/') {
            match segment {
                "" | "." => {}
                ".." => match joined.rfind('/') {
                    _ if joined.is_empty() => return refuse("leaves the input root"),
                    Some(slash) => joined.truncate(slash),
                    None => joined.clear(),
                },
                _ if segment.len() > MAX_NAME_BYTES => return refuse("has a name longer than 255 bytes"),
                _ => {
                    if !joined.is_empty() {
                        joined.push('/');
                    }
                    joined.push_str(segment);
                }
            }
        }
        if joined.len() > MAX_PATH_BYTES {
            return refuse("is too long");
        }
        Ok(Self(joined))
    }

    /// Whether this is the input root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The parent directory; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        (!self.is_root()).then(|| Self(self.0.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned()))
    }

    /// The last segment; `None` for the root.
    pub fn name(&self) -> Option<&str> {
        (!self.is_root()).then(|| self.0.rsplit('/').next().unwrap_or_default())
    }

    /// The segments, from the root down.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|segment| !segment.is_empty())
    }

    /// The path as text; empty for the root.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The relative path for system calls; "." for the root.
    pub fn as_path(&self) -> &Path {
        Path::new(if self.is_root() { "." } else { &self.0 })
    }
}

impl fmt::Display for RootPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_root() { "." } else { &self.0 })
    }
}

impl fmt::Debug for RootPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// EXE-29. BuildStream's output paths have the second form (clients.md).
    #[test]
    fn dot_dot_may_be_used_but_never_leaves_the_root() {
        let base = RootPath::root().join("w/d").unwrap();
        let join = |path: &str| base.join(path).map(|path| path.as_str().to_owned());
        assert_eq!(join("a/./b//c/"), Ok("w/d/a/b/c".into()));
        assert_eq!(join("../../x"), Ok("x".into()));
        assert_eq!(join("."), Ok("w/d".into()));
        assert_eq!(join("../.."), Ok(String::new()));
        for path in ["/etc", "../../..", "../../../w/d", "a\0b", &"x".repeat(256), &"a/".repeat(2000)] {
            assert!(join(path).is_err(), "{path}");
        }
    }

    /// EXE-28.
    #[test]
    fn node_names_are_single_segments() {
        for name in ["", ".", "..", "a/b", "../escape", "a\0", &"x".repeat(256)] {
            assert!(check_node_name(name).is_err(), "{name:?}");
        }
        for name in ["a", "...", "a b", "é", "-rf"] {
            assert!(check_node_name(name).is_ok(), "{name:?}");
        }
    }
}
