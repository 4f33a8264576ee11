//! Node properties: the metadata of a file, directory or symbolic link besides its name and content.
//!
//! goREgo applies the mode and the mtime (EXE-37). It keeps all other properties as the client sent them, because a
//! worker may need them: Bazel marks the tools of persistent workers with `bazel_tool_input`. A node may have at most
//! [`MAX_PROPERTIES`] of them, and the memory that they take counts in [`Directory::memory`](super::Directory::memory).

use crate::{
    error::{Error, Result},
    proto::reapi,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Most named properties of one node. Known clients send one or two.
pub const MAX_PROPERTIES: usize = 64;
/// Longest text of the named properties of one node, names and values together, in bytes.
pub const MAX_PROPERTY_BYTES: usize = 16 * 1024;

/// The properties of one node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeProperties {
    /// Permission bits, within 0o7777.
    pub unix_mode: Option<u32>,
    /// Time of the last modification of the content.
    pub mtime: Option<SystemTime>,
    /// All properties that have a name and a text as their value.
    pub named: NamedProperties,
}

/// Properties by name, in wire order. Cloning is cheap, and most nodes have none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamedProperties(Option<Arc<[NamedProperty]>>);

/// A node property with a name, besides the mode and the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedProperty {
    /// The name, exactly as the client sent it.
    pub name: String,
    /// The value. It is often empty, because the name is sufficient.
    pub value: String,
}

impl NamedProperties {
    /// The value of the first property with this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|property| property.name == name).map(|property| property.value.as_str())
    }

    /// All properties, in wire order.
    pub fn iter(&self) -> impl Iterator<Item = &NamedProperty> {
        self.0.iter().flat_map(|properties| properties.iter())
    }

    fn from_wire(properties: &[reapi::NodeProperty], node: &str) -> Result<Self> {
        if properties.is_empty() {
            return Ok(Self::default());
        }
        let bytes: usize = properties.iter().map(|property| property.name.len() + property.value.len()).sum();
        if properties.len() > MAX_PROPERTIES || bytes > MAX_PROPERTY_BYTES {
            return Err(Error::Invalid(format!(
                "\"{}\" has {} node properties with {bytes} bytes of text; at most {MAX_PROPERTIES} with \
                 {MAX_PROPERTY_BYTES} bytes are possible",
                node.escape_debug(),
                properties.len(),
            )));
        }
        let keep = |property: &reapi::NodeProperty| NamedProperty {
            name: property.name.clone(),
            value: property.value.clone(),
        };
        Ok(Self(Some(properties.iter().map(keep).collect())))
    }

    fn is_same(&self, wire: &[reapi::NodeProperty]) -> bool {
        let own = self.0.as_deref().unwrap_or_default();
        own.len() == wire.len()
            && own.iter().zip(wire).all(|(own, wire)| own.name == wire.name && own.value == wire.value)
    }

    /// Approximate memory in bytes, as if it were not shared.
    pub(super) fn memory(&self) -> usize {
        self.iter().map(|p| size_of::<NamedProperty>() + p.name.len() + p.value.len()).sum()
    }
}

impl NodeProperties {
    /// The names of the properties that goREgo applies and reports (`output_node_properties`, EXE-63).
    pub const NAMES: &[&str] = &["mtime", "unix_mode"];
}

/// Parses the properties of the nodes of one directory. Neighbours mostly have equal ones, and then share them.
#[derive(Debug, Default)]
pub(super) struct Parser {
    last: NamedProperties,
}

impl Parser {
    /// Parses the properties of a node. `name` is the name of the node, for errors.
    pub(super) fn parse(
        &mut self,
        wire: Option<&reapi::NodeProperties>,
        name: &str,
    ) -> Result<NodeProperties> {
        let Some(wire) = wire else { return Ok(NodeProperties::default()) };
        let mtime = wire.mtime.map(|time| {
            system_time(time).ok_or_else(|| {
                Error::Invalid(format!(
                    "the mtime of \"{}\" is not a valid time: {time}",
                    name.escape_debug()
                ))
            })
        });
        if !wire.properties.is_empty() && !self.last.is_same(&wire.properties) {
            self.last = NamedProperties::from_wire(&wire.properties, name)?;
        }
        Ok(NodeProperties {
            unix_mode: wire.unix_mode.map(|mode| mode & 0o7777),
            mtime: mtime.transpose()?,
            named: if wire.properties.is_empty() { NamedProperties::default() } else { self.last.clone() },
        })
    }
}

/// The exact time of a timestamp, also before 1970; `None` if it is malformed.
fn system_time(time: prost_types::Timestamp) -> Option<SystemTime> {
    let nanos = u32::try_from(time.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let second =
        if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds)? } else { UNIX_EPOCH.checked_add(seconds)? };
    second.checked_add(Duration::from_nanos(nanos.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::{Digest, DigestFunction},
        tree::Directory,
    };

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn properties(named: &[(&str, &str)]) -> Option<reapi::NodeProperties> {
        let property = |(name, value): &(&str, &str)| reapi::NodeProperty {
            name: (*name).into(),
            value: (*value).into(),
        };
        Some(reapi::NodeProperties { properties: named.iter().map(property).collect(), ..Default::default() })
    }

    fn file(name: &str, node_properties: Option<reapi::NodeProperties>) -> reapi::FileNode {
        let digest = Some(Digest::empty(SHA256).to_wire());
        reapi::FileNode { name: name.into(), digest, is_executable: false, node_properties }
    }

    /// EXE-37.
    #[test]
    fn named_properties_of_every_kind_of_node_are_kept_in_order() {
        let tool = [("bazel_tool_input", ""), ("owner", "build"), ("", "nameless"), ("owner", "again")];
        let message = reapi::Directory {
            files: vec![
                file("tool", properties(&tool)),
                file("plain", None),
                file("tool 2", properties(&tool)),
                file("other", properties(&[("owner", "else")])),
            ],
            symlinks: vec![reapi::SymlinkNode {
                name: "link".into(),
                target: "tool".into(),
                node_properties: properties(&tool),
            }],
            node_properties: properties(&[("of", "the directory")]),
            ..Default::default()
        };
        let directory = Directory::from_wire(&message, SHA256).unwrap();
        let [other, plain, first, second] = &*directory.files else { panic!("{directory:?}") };
        let pairs = |named: &NamedProperties| -> Vec<(String, String)> {
            named.iter().map(|property| (property.name.clone(), property.value.clone())).collect()
        };
        let expected = tool.map(|(name, value)| (name.to_owned(), value.to_owned()));
        for kept in [&first.properties, &second.properties, &directory.symlinks[0].properties] {
            assert_eq!(pairs(&kept.named), expected);
        }
        assert_eq!(plain.properties, NodeProperties::default());
        assert_eq!(other.properties.named.get("owner"), Some("else"));
        assert_eq!(first.properties.named.get("owner"), Some("build"));
        assert_eq!(first.properties.named.get("bazel_tool_input"), Some(""));
        assert_eq!(first.properties.named.get("absent"), None);
        assert_eq!(directory.properties.named.get("of"), Some("the directory"));
    }

    #[test]
    fn neighbours_with_equal_properties_share_them() {
        let files = ["a", "b"].map(|name| file(name, properties(&[("bazel_tool_input", "")])));
        let message = reapi::Directory { files: files.into(), ..Default::default() };
        let directory = Directory::from_wire(&message, SHA256).unwrap();
        let [first, second] =
            [0, 1].map(|at| directory.files[at].properties.named.0.clone().expect("it has properties"));
        assert!(Arc::ptr_eq(&first, &second));
    }

    #[test]
    fn a_node_with_too_many_properties_is_refused_by_name_and_the_most_are_accepted() {
        let parse = |named: &[(&str, &str)]| {
            let message =
                reapi::Directory { files: vec![file("crowded", properties(named))], ..Default::default() };
            Directory::from_wire(&message, SHA256)
        };
        let long = "x".repeat(MAX_PROPERTY_BYTES);
        for refused in [&[("a", ""); MAX_PROPERTIES + 1][..], &[("a", &long)]] {
            let error = parse(refused).unwrap_err().to_string();
            assert!(error.contains("\"crowded\"") && error.contains("node properties"), "{error}");
        }
        assert!(parse(&[("a", ""); MAX_PROPERTIES]).is_ok());
        assert!(parse(&[("", &long)]).is_ok());
    }

    #[test]
    fn the_memory_of_a_directory_includes_its_properties() {
        let value = "x".repeat(1000);
        let with = |named: &[(&str, &str)]| {
            let files = (0..50).map(|at| file(&format!("{at:03}"), properties(named))).collect();
            let link = reapi::SymlinkNode {
                name: "link".into(),
                target: "t".into(),
                node_properties: properties(named),
            };
            let message = reapi::Directory {
                files,
                symlinks: vec![link],
                node_properties: properties(named),
                ..Default::default()
            };
            Directory::from_wire(&message, SHA256).unwrap().memory()
        };
        let (without, with) = (with(&[]), with(&[("a", &value), ("b", &value)]));
        assert!(with >= without + 52 * 2 * 1000, "{without} {with}");
    }
}
