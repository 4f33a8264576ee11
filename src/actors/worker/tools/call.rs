//! [`ToolCall`]: the request of an action to a tool, and the key of the tools that can serve it. Pure.
//!
//! In two platform properties, Bazel says that an action can be done by a persistent worker. It marks the inputs that
//! belong to the tool. Arguments that name files with further arguments (flag files) become part of each request; all
//! other arguments start the tool.

use super::codec::{Encoding, MAX_REQUEST_BYTES, WorkInput, WorkRequest};
use crate::{
    action::Action,
    actors::worker::dir::FileIdentity,
    platform::{WORKER_KEY, WORKER_PROTOCOL},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction, Hasher},
    escape::shown,
    path::RootPath,
    tree::{self, Directory, InputTree},
};

/// The node property of files that belong to the tool.
const TOOL_INPUT: &str = "bazel_tool_input";
/// The argument that makes a tool run as a persistent worker.
const PERSISTENT_WORKER_FLAG: &str = "--persistent_worker";
/// Maximum nesting depth of flag files.
const MAX_FLAGFILE_DEPTH: usize = 8;
/// Charged per flag file in addition to its text, so that files that include each other reach the limit quickly.
const FLAGFILE_BYTES: usize = 4096;

/// Identifies the tools that can serve a call. Two calls have the same key only if their tools are started in the same
/// way, from the same files, for the same instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ToolKey(pub(super) Digest);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ToolCall {
    /// Identifies the tools that can serve this call.
    pub key: ToolKey,
    /// How messages are encoded.
    pub encoding: Encoding,
    /// The arguments with which the tool is started.
    pub start: Vec<String>,
    /// The flag file arguments of the action, which become part of the request, in order.
    flagfiles: Vec<String>,
}

impl ToolCall {
    /// The call of an action; `None` if the action does not ask for a tool. `root` identifies the root file system's
    /// directory, if there is one, because a tool that was started in another directory at the same path uses other
    /// files. All paths of the inputs of a call together have at most [`MAX_REQUEST_BYTES`].
    ///
    /// # Errors
    /// The reason why the action can only run in a process of its own.
    pub(super) fn of(
        action: &Action,
        tree: &InputTree,
        root: Option<FileIdentity>,
    ) -> Result<Option<Self>, &'static str> {
        if !wants_tool(action) {
            return Ok(None);
        }
        let encoding = match property(action, WORKER_PROTOCOL) {
            None | Some("" | "proto" | "protobuf") => Encoding::Proto,
            Some("json") => Encoding::Json,
            Some(_) => return Err("persistentWorkerProtocol is neither \"proto\" nor \"json\""),
        };
        let command = &action.command;
        if command.outputs.iter().any(|output| output.path.is_root()) {
            return Err("an output is the whole input root, which contains the tool's files");
        }
        if tree.has_directory_modes() {
            return Err("directories have modes, which are not exchanged");
        }
        if !has_only_directories(tree, &command.working_directory) {
            return Err("a component of the path of the working directory is not a directory");
        }
        let (flagfiles, mut start): (Vec<_>, Vec<_>) =
            command.arguments.iter().cloned().partition(|argument| is_flagfile(argument));
        start.push(PERSISTENT_WORKER_FLAG.to_owned());
        if flagfiles.is_empty() || command.arguments.first().is_none_or(|program| is_flagfile(program)) {
            return Err("no argument names a file with arguments (@file)");
        }
        let mut identity = Identity::new();
        let has_tool_inputs = identity
            .tool_inputs(tree)
            .map_err(|TooLarge| "the paths of its inputs are longer than a request may be")?;
        if !has_tool_inputs {
            return Err("no input is marked as an input of the tool (bazel_tool_input)");
        }
        identity.number(action.instance.id().0.into());
        identity.text(&format!("{root:?}"));
        identity.text(&format!("{encoding:?} {:?}", action.digest.function()));
        identity.text(command.working_directory.as_str());
        identity.texts(start.iter());
        identity.texts(command.environment.iter().flat_map(|(name, value)| [name, value]));
        let mut platform: Vec<_> = action.platform.iter().collect();
        platform.sort_unstable();
        identity.texts(platform.into_iter().flat_map(|(name, value)| [name, value]));
        Ok(Some(Self { key: identity.key(), encoding, start, flagfiles }))
    }

    /// The encoded request of this call. `read` returns the text of an input, or `None` if it is not a text file among
    /// the inputs.
    ///
    /// # Errors
    /// An argument names a file that is not an input, or the request would be too large.
    pub(super) fn request(
        &self,
        tree: &InputTree,
        working_directory: &RootPath,
        read: &mut dyn FnMut(&str) -> Option<String>,
    ) -> Result<Vec<u8>, String> {
        let mut expansion = Expansion { arguments: Vec::new(), bytes: 0, read };
        for flagfile in &self.flagfiles {
            expansion.add(flagfile, 0)?;
        }
        let mut request = WorkRequest { arguments: expansion.arguments, inputs: Vec::new(), request_id: 0 };
        let mut bytes = 0;
        let too_large = || format!("the request would have more than {MAX_REQUEST_BYTES} bytes");
        for_each_file(tree, &mut |path, file| {
            let input = WorkInput {
                path: relative_to(path, working_directory),
                digest: file.digest.hash_hex().into_bytes(),
            };
            bytes += input.path.len() + input.digest.len();
            request.inputs.push(input);
            if bytes > MAX_REQUEST_BYTES { Err(TooLarge) } else { Ok(()) }
        })
        .map_err(|TooLarge| too_large())?;
        request.encode_as(self.encoding).ok_or_else(too_large)
    }
}

/// Whether an action asks for a tool.
pub(crate) fn wants_tool(action: &Action) -> bool {
    property(action, WORKER_KEY).is_some()
}

/// The first value of a platform property.
fn property<'a>(action: &'a Action, wanted: &str) -> Option<&'a str> {
    action.platform.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
}

/// Whether all existing components of a path are directories.
fn has_only_directories(tree: &InputTree, path: &RootPath) -> bool {
    let mut here = tree.root();
    for segment in path.segments() {
        if let Some(child) = here.directories.iter().find(|child| child.name == segment) {
            here = tree.directory(&child.digest);
        } else {
            let is_named = |name: &String| name == segment;
            return !here.files.iter().any(|file| is_named(&file.name))
                && !here.symlinks.iter().any(|link| is_named(&link.name));
        }
    }
    true
}

/// Whether an input belongs to the tool.
pub(super) fn is_tool_input(file: &tree::File) -> bool {
    file.properties.named.get(TOOL_INPUT).is_some()
}

/// Whether an argument names a flag file: `@file`, `-flagfile=file` or `--flagfile=file`.
fn is_flagfile(argument: &str) -> bool {
    ["@", "-flagfile=", "--flagfile="]
        .iter()
        .any(|prefix| argument.strip_prefix(prefix).is_some_and(|file| !file.is_empty()))
}

/// The file whose lines replace an argument. Arguments that start with two at signs and labels of Bazel's external
/// repositories (`@repository//target`) do not name files.
fn file_of(argument: &str) -> Option<&str> {
    let file = argument.strip_prefix('@')?;
    (!file.is_empty() && !file.starts_with('@') && !file.contains("//")).then_some(file)
}

/// Replaces flag file arguments by the lines of the files.
struct Expansion<'a> {
    arguments: Vec<String>,
    bytes: usize,
    read: &'a mut dyn FnMut(&str) -> Option<String>,
}

impl Expansion<'_> {
    fn add(&mut self, argument: &str, depth: usize) -> Result<(), String> {
        let Some(file) = file_of(argument) else {
            self.count(argument.len() + 1)?;
            self.arguments.push(argument.to_owned());
            return Ok(());
        };
        let shown = shown(file);
        if depth >= MAX_FLAGFILE_DEPTH {
            return Err(format!(
                "the file of arguments \"{shown}\" is more than {MAX_FLAGFILE_DEPTH} files deep"
            ));
        }
        let text = (self.read)(file)
            .ok_or_else(|| format!("the file of arguments \"{shown}\" is no text among the inputs"))?;
        self.count(FLAGFILE_BYTES + text.len())?;
        text.lines().try_for_each(|line| self.add(line, depth + 1))
    }

    fn count(&mut self, bytes: usize) -> Result<(), String> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > MAX_REQUEST_BYTES {
            return Err(format!("the arguments would have more than {MAX_REQUEST_BYTES} bytes"));
        }
        Ok(())
    }
}

/// Hashes everything that distinguishes one tool from another. Each part is preceded by its length, so different lists
/// have different bytes.
struct Identity(Hasher);

impl Identity {
    fn new() -> Self {
        // Only the hashes of git blobs depend on the size.
        Self(DigestFunction::Sha256.hasher(0))
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn texts<'a>(&mut self, texts: impl Iterator<Item = &'a String>) {
        let texts: Vec<_> = texts.collect();
        self.number(texts.len() as u64);
        texts.into_iter().for_each(|text| self.text(text));
    }

    /// Adds the files of the tool. Returns false if there are none.
    fn tool_inputs(&mut self, tree: &InputTree) -> Result<bool, TooLarge> {
        let mut count = 0;
        for_each_file(tree, &mut |path, file| {
            if is_tool_input(file) {
                count += 1;
                self.text(path);
                self.0.update(file.digest.hash());
                self.number(u64::from(file.executable));
                self.number(file.properties.unix_mode.map_or(u64::MAX, u64::from));
            }
            Ok(())
        })?;
        self.number(count);
        Ok(count > 0)
    }

    fn key(self) -> ToolKey {
        ToolKey(self.0.finish())
    }
}

/// The paths or the request have more than [`MAX_REQUEST_BYTES`].
struct TooLarge;

/// Visits the files of a tree with their paths, directory by directory.
///
/// # Errors
/// An error of `visit`; [`TooLarge`] if the paths of all files and directories together are too long. A tree within its
/// own limits can have paths of many gigabytes, because each path repeats the names of all directories above it.
fn for_each_file(
    tree: &InputTree,
    visit: &mut dyn FnMut(&str, &tree::File) -> Result<(), TooLarge>,
) -> Result<(), TooLarge> {
    let mut left = MAX_REQUEST_BYTES;
    let mut open: Vec<(String, &Directory)> = vec![(String::new(), tree.root())];
    while let Some((above, directory)) = open.pop() {
        let mut path = |name: &str| {
            left = left.checked_sub(above.len() + 1 + name.len()).ok_or(TooLarge)?;
            Ok(if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") })
        };
        for file in &directory.files {
            visit(&path(&file.name)?, file)?;
        }
        for child in directory.directories.iter().rev() {
            open.push((path(&child.name)?, tree.directory(&child.digest)));
        }
    }
    Ok(())
}

/// Converts a path in the input root to a path relative to the working directory.
fn relative_to(path: &str, working_directory: &RootPath) -> String {
    if working_directory.is_root() {
        return path.to_owned();
    }
    let (mut rest, mut above) = (path, working_directory.segments().peekable());
    while let Some(segment) = above.peek()
        && let Some(deeper) = rest.strip_prefix(segment).and_then(|deeper| deeper.strip_prefix('/'))
    {
        rest = deeper;
        above.next();
    }
    "../".repeat(above.count()) + rest
}

#[cfg(test)]
mod tests;
