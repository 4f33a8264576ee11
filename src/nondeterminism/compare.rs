//! [`compare`]: the outputs in which two results of one action differ. Pure.
//!
//! The comparison covers files with their contents and executable bits, directories, symlinks and the exit code. It
//! omits execution metadata, and also standard output and error, because many tools print times there and no later
//! action sees them.

use gorego_reapi::{
    proto::{gorego::OutputDifference, reapi},
    status::shorten,
};
use std::collections::BTreeMap;

/// Most outputs in one report.
pub(super) const MAX_OUTPUTS: usize = 10;
/// Longest path in a report, in bytes.
const MAX_PATH_BYTES: usize = 256;
/// Longest description of an output, in bytes. A digest is shorter.
const MAX_SHOWN_BYTES: usize = 192;
/// The name of the exit code among the outputs. No output has an empty path component like this one.
const EXIT_CODE: &str = "(exit code)";

/// The outputs that differ.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct OutputDifferences {
    /// The first ones, by path.
    pub(crate) outputs: Vec<OutputDifference>,
    /// How many there are.
    pub(crate) count: usize,
}

/// What a result says about one output.
#[derive(Debug, Clone, PartialEq, Eq)]
enum OutputShape<'a> {
    File { digest: Option<&'a reapi::Digest>, is_executable: bool },
    Directory { tree: Option<&'a reapi::Digest>, root: Option<&'a reapi::Digest> },
    Symlink(&'a str),
}

/// Compares two results of one action. `None` if they agree.
pub(crate) fn compare(
    earlier: &reapi::ActionResult,
    later: &reapi::ActionResult,
) -> Option<OutputDifferences> {
    let (before, after) = (outputs(earlier), outputs(later));
    let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let differs = |path: &&&str| match (before.get(**path), after.get(**path)) {
        (Some(before), Some(after)) => !agree(before, after),
        _ => true,
    };
    let mut paths: Vec<&str> = paths.filter(differs).copied().collect();
    paths.sort_unstable();
    let mut differences = OutputDifferences { outputs: Vec::new(), count: paths.len() };
    if earlier.exit_code != later.exit_code {
        differences.count += 1;
        differences.outputs.push(OutputDifference {
            path: EXIT_CODE.into(),
            earlier: earlier.exit_code.to_string(),
            later: later.exit_code.to_string(),
        });
    }
    let left = MAX_OUTPUTS - differences.outputs.len();
    differences.outputs.extend(paths.into_iter().take(left).map(|path| OutputDifference {
        path: shorten(path.to_owned(), MAX_PATH_BYTES),
        earlier: before.get(path).map(shown).unwrap_or_default(),
        later: after.get(path).map(shown).unwrap_or_default(),
    }));
    (differences.count > 0).then_some(differences)
}

#[allow(deprecated)]
fn outputs(result: &reapi::ActionResult) -> BTreeMap<&str, OutputShape<'_>> {
    let files = result.output_files.iter().map(|file| {
        let shown = OutputShape::File { digest: file.digest.as_ref(), is_executable: file.is_executable };
        (&*file.path, shown)
    });
    let directories = result.output_directories.iter().map(|directory| {
        let tree = directory.tree_digest.as_ref();
        (&*directory.path, OutputShape::Directory { tree, root: directory.root_directory_digest.as_ref() })
    });
    // If the new list is filled, the deprecated lists repeat it (EXE-53).
    let links = result.output_symlinks.iter();
    let links = links.chain(&result.output_file_symlinks).chain(&result.output_directory_symlinks);
    let links = links.map(|link| (&*link.path, OutputShape::Symlink(&link.target)));
    files.chain(directories).chain(links).collect()
}

/// Whether two descriptions of an output agree. Directories are described in two ways, and clients may use either.
fn agree(before: &OutputShape<'_>, after: &OutputShape<'_>) -> bool {
    match (before, after) {
        (
            OutputShape::Directory { tree: tree_1, root: root_1 },
            OutputShape::Directory { tree: tree_2, root: root_2 },
        ) => match (root_1.zip(*root_2), tree_1.zip(*tree_2)) {
            (Some((before, after)), _) | (None, Some((before, after))) => before == after,
            (None, None) => true,
        },
        _ => before == after,
    }
}

fn shown(output: &OutputShape<'_>) -> String {
    let digest = |digest: &Option<&reapi::Digest>| {
        digest.map(|digest| format!("{}/{}", digest.hash, digest.size_bytes)).unwrap_or_default()
    };
    let text = match output {
        OutputShape::File { digest: content, is_executable: true } => {
            format!("{} executable", digest(content))
        }
        OutputShape::File { digest: content, is_executable: false } => digest(content),
        OutputShape::Directory { tree, root } => format!("directory {}", digest(&tree.or(*root))),
        OutputShape::Symlink(target) => format!("-> {target}"),
    };
    shorten(text, MAX_SHOWN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::digest::DigestFunction;

    fn file(path: &str, content: &str) -> reapi::OutputFile {
        reapi::OutputFile {
            path: path.into(),
            digest: Some(DigestFunction::Sha256.digest(content.as_bytes()).to_wire()),
            ..Default::default()
        }
    }

    fn with(output_files: Vec<reapi::OutputFile>) -> reapi::ActionResult {
        reapi::ActionResult { output_files, ..Default::default() }
    }

    #[test]
    fn results_that_differ_only_in_what_no_later_action_sees_agree() {
        let mut one = with(vec![file("a", "1"), file("b", "2")]);
        let mut other = with(vec![file("b", "2"), file("a", "1")]);
        one.stdout_digest = Some(DigestFunction::Sha256.digest(b"0.1 s").to_wire());
        other.execution_metadata = Some(Default::default());
        assert_eq!(compare(&one, &other), None);
        let tree = |content: &[u8]| Some(DigestFunction::Sha256.digest(content).to_wire());
        let directory = |tree_digest, root_directory_digest| reapi::OutputDirectory {
            path: "d".into(),
            tree_digest,
            root_directory_digest,
            ..Default::default()
        };
        one.output_directories = vec![directory(tree(b"t"), None)];
        other.output_directories = vec![directory(tree(b"t"), tree(b"r"))];
        assert_eq!(compare(&one, &other), None);
        other.output_directories = vec![directory(tree(b"u"), tree(b"r"))];
        assert_eq!(compare(&one, &other).unwrap().count, 1);
    }

    #[test]
    fn contents_modes_links_and_missing_outputs_are_named() {
        let earlier = with(vec![file("a", "1"), file("gone", "x"), file("same", "s"), file("tool", "t")]);
        let mut later = with(vec![file("a", "2"), file("same", "s")]);
        later.output_files.push(reapi::OutputFile { is_executable: true, ..file("tool", "t") });
        later.output_symlinks.push(reapi::OutputSymlink {
            path: "link".into(),
            target: "a".into(),
            ..Default::default()
        });
        later.exit_code = 1;
        let found = compare(&earlier, &later).unwrap();
        let paths: Vec<_> = found.outputs.iter().map(|output| output.path.as_str()).collect();
        assert_eq!(paths, [EXIT_CODE, "a", "gone", "link", "tool"]);
        assert_eq!(found.count, 5);
        assert_eq!((&*found.outputs[2].later, &*found.outputs[3].later), ("", "-> a"));
        assert!(found.outputs[4].later.ends_with(" executable"));
    }

    #[test]
    fn a_report_is_bounded() {
        let long = "x".repeat(10_000);
        let files = |content: &str| {
            (0..100).map(|number| file(&format!("{number:03}{long}"), content)).collect::<Vec<_>>()
        };
        let found = compare(&with(files("1")), &with(files("2"))).unwrap();
        assert_eq!((found.count, found.outputs.len()), (100, MAX_OUTPUTS));
        assert!(found.outputs.iter().all(|output| output.path.len() <= MAX_PATH_BYTES));
    }
}
