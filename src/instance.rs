//! Instances: the separate namespaces of one endpoint.
//!
//! Blobs, action results and operations of one instance are invisible from another (GEN-15). An [`Instance`] in hand is
//! one that the configuration lists; an unknown name is an error that no client can take for a cache miss (GEN-14).

use crate::error::{Error, Result};
use std::{collections::HashMap, fmt, sync::Arc};

/// Segments that would make resource names ambiguous (GEN-13); the last one only in names of log streams.
pub const RESERVED_SEGMENTS: &[&str] = &[
    "blobs",
    "uploads",
    "actions",
    "actionResults",
    "operations",
    "capabilities",
    "compressed-blobs",
    "logstreams",
];

/// Checks the form of an instance name; the empty name is well formed.
///
/// # Errors
/// [`Error::Invalid`] for reserved words, empty segments and control characters (GEN-13).
pub fn check_instance_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    for segment in name.split('/') {
        if segment.is_empty() || segment.chars().any(char::is_control) || RESERVED_SEGMENTS.contains(&segment)
        {
            return Err(Error::Invalid(format!(
                "instance name \"{}\" is malformed: segment \"{}\" is not allowed",
                name.escape_debug(),
                segment.escape_debug()
            )));
        }
    }
    Ok(())
}

/// A small number that stands for an instance inside this process; not stable across restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub u16);

/// A configured instance.
#[derive(Clone)]
pub struct Instance {
    id: InstanceId,
    name: Arc<str>,
}

impl Instance {
    /// The number of this instance in this process.
    pub fn id(&self) -> InstanceId {
        self.id
    }

    /// The name as on the wire; empty for the default instance.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A resource name under this instance: `rest` alone for the empty name (GEN-12).
    pub fn qualify(&self, rest: &str) -> String {
        if self.name.is_empty() { rest.to_owned() } else { format!("{}/{rest}", self.name) }
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Instance({:?})", self.name)
    }
}

impl PartialEq for Instance {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
impl Eq for Instance {}

/// The instances of this endpoint; cheap to clone.
#[derive(Debug, Clone)]
pub struct Instances(Arc<HashMap<Arc<str>, Instance>>);

impl Instances {
    /// Instances with these names, in order of their ids.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or repeated name, or for none at all.
    pub fn new(names: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self> {
        let mut map = HashMap::new();
        for name in names {
            check_instance_name(name.as_ref())?;
            let name: Arc<str> = name.as_ref().into();
            let id = u16::try_from(map.len()).map_err(|_| Error::invalid("too many instance names"))?;
            if map.insert(name.clone(), Instance { id: InstanceId(id), name: name.clone() }).is_some() {
                return Err(Error::Invalid(format!("instance name \"{name}\" is listed twice")));
            }
        }
        if map.is_empty() {
            return Err(Error::invalid("no instance name is listed"));
        }
        Ok(Self(Arc::new(map)))
    }

    /// The instance of this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or unknown name.
    pub fn get(&self, name: &str) -> Result<Instance> {
        check_instance_name(name)?;
        self.0.get(name).cloned().ok_or_else(|| {
            Error::Invalid(format!("instance name \"{}\" is unknown to this server", name.escape_debug()))
        })
    }

    /// Every instance, in order of id.
    pub fn all(&self) -> Vec<Instance> {
        let mut all: Vec<_> = self.0.values().cloned().collect();
        all.sort_by_key(Instance::id);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GEN-12, GEN-13, GEN-14.
    #[test]
    fn instance_names_are_checked_and_unknown_ones_refused() {
        let instances = Instances::new(["", "a/b/c"]).unwrap();
        assert_eq!(instances.get("").unwrap().qualify("operations/1"), "operations/1");
        assert_eq!(instances.get("a/b/c").unwrap().qualify("operations/1"), "a/b/c/operations/1");
        for name in ["nope", "blobs", "x/uploads", "/x", "x/", "x//y", "a/b", "x\0"] {
            assert!(matches!(instances.get(name), Err(Error::Invalid(_))), "{name:?}");
        }
    }
}
