//! Finds the inputs that are also named as outputs of the command. Pure.
//!
//! Staged inputs are not read from the store, with one exception. If the command leaves an input at an output path
//! unchanged, the result refers to this input. So it must not be evicted while the command runs.

use crate::action::Command;
use gorego_reapi::{digest::Digest, path::RootPath, tree::InputTree};
use std::collections::HashSet;

/// The files of an input root at and below the output paths, each once. Files behind a symbolic link are not found.
/// Each directory is read once, because a command can name it by any number of paths.
pub(crate) fn inputs_named_by(command: &Command, tree: &InputTree) -> HashSet<Digest> {
    let (mut named, mut seen) = (HashSet::new(), HashSet::new());
    for output in &command.outputs {
        add_named(tree, &output.path, &mut named, &mut seen);
    }
    named
}

/// Adds what one path names. `seen` contains the directories whose files are all in `named`.
fn add_named(tree: &InputTree, path: &RootPath, named: &mut HashSet<Digest>, seen: &mut HashSet<Digest>) {
    let mut at = tree.digest();
    let mut segments = path.segments().peekable();
    while let Some(name) = segments.next() {
        let Some(directory) = tree.find(&at) else { return };
        let Some(child) = directory.subdirectory(name) else {
            let is_last = segments.peek().is_none();
            named.extend(directory.file(name).filter(|_| is_last).map(|file| file.digest));
            return;
        };
        at = child.digest;
    }
    let mut left = vec![at];
    while let Some(next) = left.pop() {
        if let Some(directory) = tree.find(&next)
            && seen.insert(next)
        {
            named.extend(directory.files.iter().map(|file| file.digest));
            left.extend(directory.directories.iter().map(|child| child.digest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::worker::tree_model::{self, Shown};

    /// So the memory is bounded by the size of the tree.
    #[test]
    fn a_directory_that_many_outputs_name_is_read_once() {
        let mut files = tree_model::Tree::new();
        for directory in 0..10 {
            files.insert(format!("/d{directory}"), Shown::Directory);
            for file in 0..10 {
                files.insert(format!("/d{directory}/f{file}"), Shown::File(directory * 10 + file, false));
            }
        }
        let tree = tree_model::input_tree(&files);
        let path = |text: &str| RootPath::root().join(text).unwrap();
        let (mut named, mut seen) = (HashSet::new(), HashSet::new());
        for text in ["", ".", "d1", "d1/.", "d1/f1"] {
            add_named(&tree, &path(text), &mut named, &mut seen);
            assert_eq!((named.len(), seen.len()), (100, 11), "{text}");
        }
        let (mut named, mut seen) = (HashSet::new(), HashSet::new());
        for (text, count) in [("d1/f1", 1), ("d1/f1/x", 1), ("d2", 11), ("none", 11)] {
            add_named(&tree, &path(text), &mut named, &mut seen);
            assert_eq!(named.len(), count, "{text}");
        }
    }
}
