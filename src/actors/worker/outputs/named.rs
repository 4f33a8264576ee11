//! Finds the inputs that are also named as outputs of the command. Pure.
//!
//! Staged inputs are not read from the store, with one exception. If the command leaves an input at an output path
//! unchanged, the result refers to this input. So it must not be evicted while the command runs.

use crate::action::Command;
use gorego_reapi::{digest::Digest, tree::InputTree};

/// The files of an input root at and below the output paths. Files behind a symbolic link are not found.
pub(crate) fn inputs_named_by(command: &Command, tree: &InputTree) -> Vec<Digest> {
    let mut named = Vec::new();
    for output in &command.outputs {
        let segments: Vec<_> = output.path.segments().collect();
        let (mut at, mut left) = (tree.digest(), segments.as_slice());
        loop {
            let [name, below @ ..] = left else {
                tree.each_file_below(&at, |file| named.push(file.digest));
                break;
            };
            let Some(directory) = tree.find(&at) else { break };
            let Some(child) = directory.subdirectory(name) else {
                named.extend(directory.file(name).filter(|_| below.is_empty()).map(|file| file.digest));
                break;
            };
            (at, left) = (child.digest, below);
        }
    }
    named
}
