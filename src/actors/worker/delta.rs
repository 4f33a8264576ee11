//! [`Delta`]: the overlay layer that makes one tree look like another. Pure.
//!
//! Directories with equal digests are equal and are not compared, so the work is proportional to the number of
//! directories that differ. The steps are in the order in which a layer is written: a directory comes before its
//! content.

use gorego_reapi::{
    digest::Digest,
    tree::{Directory, File, InputTree, Subdirectory, Symlink},
};
use std::collections::HashMap;

/// One step of writing a layer. At the start, the layer consists of the root directory, which is the current directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeltaStep<'a> {
    /// Create a directory that both trees have, and make it the current directory.
    Enter(&'a Subdirectory),
    /// Make the parent of the current directory the current directory.
    Leave,
    /// Write a file that is missing or different in the base.
    File(&'a File),
    /// Write a symbolic link that is missing or different in the base.
    Link(&'a Symlink),
    /// Write a directory with everything below it.
    Tree {
        /// Name and digest of the directory.
        node: &'a Subdirectory,
        /// Whether the base has something with this name, which must be hidden.
        hides: bool,
    },
    /// Hide an entry of the base that is not wanted.
    Hide(Box<str>),
}

/// The size of a delta, or the limit of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Number of files, links, directories and whiteouts.
    pub entries: u64,
    /// Number of bytes in files.
    pub bytes: u64,
}

/// The steps that make one tree look like another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delta<'a> {
    /// The steps in order.
    pub steps: Vec<DeltaStep<'a>>,
    /// The total cost of the steps.
    pub cost: Cost,
}

impl<'a> Delta<'a> {
    /// The delta that makes `base` look like `wanted`; `None` if it costs more than `limit`.
    pub fn between(wanted: &'a InputTree, base: &InputTree, limit: Cost) -> Option<Self> {
        let mut delta = Self::default();
        if wanted.digest() == base.digest() {
            return Some(delta);
        }
        let differing = delta.compare(wanted, wanted.root(), base.root(), limit)?;
        let mut open = vec![differing.into_iter()];
        while let Some(remaining) = open.last_mut() {
            let Some((node, of_base)) = remaining.next() else {
                open.pop();
                if !open.is_empty() {
                    delta.steps.push(DeltaStep::Leave);
                }
                continue;
            };
            delta.add(DeltaStep::Enter(node), Cost { entries: 1, bytes: 0 }, limit)?;
            let below = wanted.directory(&node.digest);
            let differing = delta.compare(wanted, below, base.directory(&of_base.digest), limit)?;
            open.push(differing.into_iter());
        }
        Some(delta)
    }

    /// The blobs that the delta needs; `wanted` is the tree for which it was made.
    pub fn blobs(&self, wanted: &InputTree) -> Vec<Digest> {
        let mut blobs = Vec::new();
        for step in &self.steps {
            match step {
                DeltaStep::File(file) => blobs.push(file.digest),
                DeltaStep::Tree { node, .. } => {
                    wanted.each_file_below(&node.digest, |file| blobs.push(file.digest))
                }
                DeltaStep::Enter(_) | DeltaStep::Leave | DeltaStep::Link(_) | DeltaStep::Hide(_) => {}
            }
        }
        blobs
    }

    fn add(&mut self, step: DeltaStep<'a>, cost: Cost, limit: Cost) -> Option<()> {
        self.steps.push(step);
        self.cost.entries = self.cost.entries.saturating_add(cost.entries);
        self.cost.bytes = self.cost.bytes.saturating_add(cost.bytes);
        (self.cost.entries <= limit.entries && self.cost.bytes <= limit.bytes).then_some(())
    }

    /// Adds the steps for one directory that differs. Returns the subdirectories that both trees have and that differ.
    fn compare<'b>(
        &mut self,
        tree: &'a InputTree,
        wanted: &'a Directory,
        base: &'b Directory,
        limit: Cost,
    ) -> Option<Vec<(&'a Subdirectory, &'b Subdirectory)>> {
        let mut unwanted = nodes(base);
        let mut differing = Vec::new();
        for file in &wanted.files {
            if unwanted.remove(&*file.name) != Some(TreeNode::File(file)) {
                self.add(DeltaStep::File(file), Cost { entries: 1, bytes: file.digest.size() }, limit)?;
            }
        }
        for link in &wanted.symlinks {
            if unwanted.remove(&*link.name) != Some(TreeNode::Link(link)) {
                self.add(DeltaStep::Link(link), Cost { entries: 1, bytes: 0 }, limit)?;
            }
        }
        for node in &wanted.directories {
            match unwanted.remove(&*node.name) {
                Some(TreeNode::Directory(same)) if same.digest == node.digest => {}
                Some(TreeNode::Directory(other)) => differing.push((node, other)),
                found => {
                    let cost = cost_of(tree, node, limit)?;
                    self.add(DeltaStep::Tree { node, hides: found.is_some() }, cost, limit)?;
                }
            }
        }
        // The order of the base makes the steps deterministic.
        let names = base.files.iter().map(|file| &file.name);
        let names = names.chain(base.symlinks.iter().map(|link| &link.name));
        for name in names.chain(base.directories.iter().map(|node| &node.name)) {
            if unwanted.contains_key(&**name) {
                self.add(DeltaStep::Hide(name.as_str().into()), Cost { entries: 1, bytes: 0 }, limit)?;
            }
        }
        Some(differing)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum TreeNode<'a> {
    File(&'a File),
    Link(&'a Symlink),
    Directory(&'a Subdirectory),
}

fn nodes(directory: &Directory) -> HashMap<&str, TreeNode<'_>> {
    let files = directory.files.iter().map(|file| (&*file.name, TreeNode::File(file)));
    let links = directory.symlinks.iter().map(|link| (&*link.name, TreeNode::Link(link)));
    let directories = directory.directories.iter().map(|node| (&*node.name, TreeNode::Directory(node)));
    files.chain(links).chain(directories).collect()
}

/// The cost of writing a whole directory; `None` if it is more than `limit`.
fn cost_of(tree: &InputTree, node: &Subdirectory, limit: Cost) -> Option<Cost> {
    let mut cost = Cost { entries: 1, bytes: 0 };
    let mut left = vec![tree.directory(&node.digest)];
    while let Some(directory) = left.pop() {
        cost.entries = cost.entries.saturating_add(directory.entries() as u64);
        for file in &directory.files {
            cost.bytes = cost.bytes.saturating_add(file.digest.size());
        }
        if cost.entries > limit.entries || cost.bytes > limit.bytes {
            return None;
        }
        left.extend(directory.directories.iter().map(|child| tree.directory(&child.digest)));
    }
    Some(cost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::worker::tree_model::{self, Shown};
    use gorego_reapi::digest::DigestFunction;
    use proptest::prelude::*;

    const NO_LIMIT: Cost = Cost { entries: u64::MAX, bytes: u64::MAX };

    /// A layer of an overlay as it would be on disk.
    #[derive(Debug, Default)]
    struct Layer<'a> {
        /// Entries by name. `None` is a whiteout.
        entries: std::collections::BTreeMap<&'a str, Option<LayerEntry<'a>>>,
        is_opaque: bool,
    }

    #[derive(Debug)]
    enum LayerEntry<'a> {
        Leaf(Shown),
        Directory(Layer<'a>),
    }

    fn whole<'a>(tree: &'a InputTree, directory: &'a Directory, is_opaque: bool) -> Layer<'a> {
        let files = directory.files.iter().map(|file| (&*file.name, LayerEntry::Leaf(Shown::file(file))));
        let links = directory.symlinks.iter().map(|link| (&*link.name, LayerEntry::Leaf(Shown::link(link))));
        let directories = directory.directories.iter().map(|node| {
            (&*node.name, LayerEntry::Directory(whole(tree, tree.directory(&node.digest), false)))
        });
        let entries = files.chain(links).chain(directories).map(|(name, entry)| (name, Some(entry)));
        Layer { entries: entries.collect(), is_opaque }
    }

    fn write<'a>(tree: &'a InputTree, steps: &'a [DeltaStep<'a>]) -> Layer<'a> {
        let mut open = vec![("", Layer::default())];
        for step in steps {
            let (_, here) = open.last_mut().unwrap();
            let (name, entry) = match step {
                DeltaStep::Enter(node) => {
                    open.push((&node.name, Layer::default()));
                    continue;
                }
                DeltaStep::Leave => {
                    let (name, left) = open.pop().unwrap();
                    let (_, here) = open.last_mut().unwrap();
                    assert!(here.entries.insert(name, Some(LayerEntry::Directory(left))).is_none());
                    continue;
                }
                DeltaStep::File(file) => (&*file.name, Some(LayerEntry::Leaf(Shown::file(file)))),
                DeltaStep::Link(link) => (&*link.name, Some(LayerEntry::Leaf(Shown::link(link)))),
                DeltaStep::Tree { node, hides } => {
                    let layer = whole(tree, tree.directory(&node.digest), *hides);
                    (&*node.name, Some(LayerEntry::Directory(layer)))
                }
                DeltaStep::Hide(name) => (&**name, None),
            };
            assert!(here.entries.insert(name, entry).is_none(), "{name} is written twice");
        }
        assert_eq!(open.len(), 1, "as many directories are left as entered");
        open.pop().unwrap().1
    }

    /// The tree that an overlay shows, by the rules of overlayfs.
    fn show(
        layer: &Layer<'_>,
        below: Option<(&InputTree, &Directory)>,
        path: &str,
        shown: &mut tree_model::Tree,
    ) {
        let below = below.filter(|_| !layer.is_opaque);
        if let Some((tree, directory)) = below {
            for (name, node) in nodes(directory) {
                let path = format!("{path}/{name}");
                match node {
                    _ if layer.entries.contains_key(name) => {}
                    TreeNode::File(file) => drop(shown.insert(path, Shown::file(file))),
                    TreeNode::Link(link) => drop(shown.insert(path, Shown::link(link))),
                    TreeNode::Directory(node) => {
                        let below = Some((tree, tree.directory(&node.digest)));
                        shown.insert(path.clone(), Shown::Directory);
                        show(&Layer::default(), below, &path, shown);
                    }
                }
            }
        }
        for (name, entry) in &layer.entries {
            let path = format!("{path}/{name}");
            match entry {
                None => {}
                Some(LayerEntry::Leaf(leaf)) => drop(shown.insert(path, leaf.clone())),
                Some(LayerEntry::Directory(layer)) => {
                    let below = below.and_then(|(tree, directory)| {
                        let node = directory.directories.iter().find(|node| node.name == **name)?;
                        Some((tree, tree.directory(&node.digest)))
                    });
                    shown.insert(path.clone(), Shown::Directory);
                    show(layer, below, &path, shown);
                }
            }
        }
    }

    proptest! {
        /// This property makes staging correct.
        #[test]
        fn a_base_below_its_delta_looks_like_the_wanted_tree(
            base in tree_model::tree(),
            wanted in tree_model::tree(),
        ) {
            let [base_tree, wanted_tree] = [&base, &wanted].map(tree_model::input_tree);
            let delta = Delta::between(&wanted_tree, &base_tree, NO_LIMIT).unwrap();
            let layer = write(&wanted_tree, &delta.steps);
            let mut shown = tree_model::Tree::new();
            show(&layer, Some((&base_tree, base_tree.root())), "", &mut shown);
            prop_assert_eq!(shown, wanted);
        }

        #[test]
        fn a_delta_is_found_exactly_if_its_cost_is_within_the_limit(base in tree_model::tree(), wanted in tree_model::tree()) {
            let [base, wanted] = [&base, &wanted].map(tree_model::input_tree);
            let delta = Delta::between(&wanted, &base, NO_LIMIT).unwrap();
            prop_assert_eq!(Delta::between(&wanted, &base, delta.cost), Some(delta.clone()));
            if let Some(entries) = delta.cost.entries.checked_sub(1) {
                prop_assert_eq!(Delta::between(&wanted, &base, Cost { entries, ..delta.cost }), None);
            }
        }
    }

    #[test]
    fn a_change_in_one_directory_costs_the_file_and_its_parent_directories() {
        let mut base = tree_model::Tree::new();
        for directory in 0..50 {
            base.insert(format!("/d{directory}"), Shown::Directory);
            for file in 0..20 {
                base.insert(format!("/d{directory}/f{file}"), Shown::File(file, false));
            }
        }
        let mut wanted = base.clone();
        wanted.insert("/d7/f3".into(), Shown::File(99, false));
        let [base, wanted] = [&base, &wanted].map(tree_model::input_tree);
        let delta = Delta::between(&wanted, &base, NO_LIMIT).unwrap();
        assert_eq!(delta.cost, Cost { entries: 2, bytes: "99".len() as u64 });
        assert_eq!(delta.steps.len(), 3);
        assert_eq!(wanted.digest().function(), DigestFunction::Sha256);
    }
}
