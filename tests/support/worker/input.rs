//! Input roots that are described by paths and [`Node`]s.

use super::{Bench, MemoryStore};
use gorego_reapi::{digest::Digest, proto::reapi};
use prost::Message as _;
use std::collections::BTreeMap;

/// A node of an input root.
#[derive(Clone)]
pub(crate) enum Node {
    File(String),
    Program(String),
    /// A program that belongs to a persistent worker.
    Tool(String),
    Link(String),
    Dir,
}

pub(crate) fn file(content: &str) -> Node {
    Node::File(content.into())
}

pub(crate) fn program(content: &str) -> Node {
    Node::Program(content.into())
}

pub(crate) fn tool(content: &str) -> Node {
    Node::Tool(content.into())
}

pub(crate) fn link(target: &str) -> Node {
    Node::Link(target.into())
}

impl Bench {
    /// Stores an input root. Each entry is a path and a node.
    pub(crate) fn input(&self, entries: &[(&str, Node)]) -> Digest {
        #[derive(Default)]
        struct Building {
            nodes: Vec<(String, Node)>,
            children: BTreeMap<String, Building>,
        }
        let mut top = Building::default();
        for (path, node) in entries {
            let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
            let mut at = &mut top;
            for segment in parents.split('/').filter(|s| !s.is_empty()) {
                at = at.children.entry(segment.into()).or_default();
            }
            match node {
                Node::Dir => drop(at.children.entry(name.into()).or_default()),
                node => at.nodes.push((name.into(), node.clone())),
            }
        }
        fn write(store: &MemoryStore, building: &Building) -> Digest {
            let mut directory = reapi::Directory::default();
            for (name, node) in &building.nodes {
                match node {
                    Node::File(content) | Node::Program(content) | Node::Tool(content) => {
                        directory.files.push(reapi::FileNode {
                            name: name.clone(),
                            digest: Some(store.put(content.as_bytes()).to_wire()),
                            is_executable: !matches!(node, Node::File(_)),
                            node_properties: matches!(node, Node::Tool(_)).then(|| reapi::NodeProperties {
                                properties: vec![reapi::NodeProperty {
                                    name: "bazel_tool_input".into(),
                                    value: String::new(),
                                }],
                                ..Default::default()
                            }),
                        });
                    }
                    Node::Link(target) => directory.symlinks.push(reapi::SymlinkNode {
                        name: name.clone(),
                        target: target.clone(),
                        ..Default::default()
                    }),
                    Node::Dir => {}
                }
            }
            for (name, child) in &building.children {
                let digest = Some(write(store, child).to_wire());
                directory.directories.push(reapi::DirectoryNode { name: name.clone(), digest });
            }
            store.put(directory.encode_to_vec())
        }
        write(&self.store, &top)
    }
}
