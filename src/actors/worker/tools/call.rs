//! [`ToolCall`]: what an action asks of a tool, and which tool may answer it. Pure.
//!
//! Bazel says in two platform properties that an action can be done by a tool that stays, and marks the inputs that belong to
//! the tool. The arguments that name files with further arguments become part of each request; all others start the tool.

use super::codec::{Encoding, MAX_REQUEST_BYTES, WorkInput, WorkRequest};
use crate::{
    action::Action,
    actors::worker::dir::FileId,
    platform::{WORKER_KEY, WORKER_PROTOCOL},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    path::RootPath,
    tree::{self, Directory, InputTree},
};

/// The node property of files that belong to the tool.
const TOOL_INPUT: &str = "bazel_tool_input";
/// What makes a tool stay.
const STAY: &str = "--persistent_worker";
/// How deep files with arguments may name further such files.
const MAX_FLAGFILE_DEPTH: usize = 8;
/// What reading a file with arguments counts for besides its text, so that files that name each other end soon.
const FLAGFILE_BYTES: usize = 4096;

/// Which tool may answer: two calls have the same key only if their tools are started in the same way, from the same files, for
/// the same instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ToolKey(pub(super) Digest);

/// What an action asks of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ToolCall {
    /// Which tool may answer.
    pub key: ToolKey,
    /// How messages are encoded.
    pub encoding: Encoding,
    /// The arguments of the tool's process.
    pub start: Vec<String>,
    /// The arguments of the action that belong into the request, in order.
    flagfiles: Vec<String>,
}

impl ToolCall {
    /// The call of an action; `None` when it does not ask for a tool. `root` identifies the directory whose files replace the
    /// machine's, if there is one: a tool that was started in another directory at the same path finds other files.
    ///
    /// # Errors
    /// Why only a process of its own can run it.
    pub(super) fn of(
        action: &Action,
        tree: &InputTree,
        root: Option<FileId>,
    ) -> Result<Option<Self>, &'static str> {
        let property = |wanted: &str| {
            action.platform.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
        };
        if property(WORKER_KEY).is_none() {
            return Ok(None);
        }
        let encoding = match property(WORKER_PROTOCOL) {
            None | Some("" | "proto" | "protobuf") => Encoding::Proto,
            Some("json") => Encoding::Json,
            Some(_) => return Err("persistentWorkerProtocol is neither \"proto\" nor \"json\""),
        };
        let command = &action.command;
        if command.outputs.iter().any(|output| output.path.is_root()) {
            return Err("an output is the whole input root, in which the tool's files are");
        }
        if tree.has_directory_modes() {
            return Err("directories have modes, which are not exchanged");
        }
        if !is_plain_way(tree, &command.working_directory) {
            return Err("the way to the working directory is not made of directories");
        }
        let (flagfiles, mut start): (Vec<_>, Vec<_>) =
            command.arguments.iter().cloned().partition(|argument| is_flagfile(argument));
        start.push(STAY.to_owned());
        if flagfiles.is_empty() || command.arguments.first().is_none_or(|program| is_flagfile(program)) {
            return Err("no argument names a file with arguments (@file)");
        }
        let mut identity = Identity::default();
        if !identity.tool_inputs(tree) {
            return Err("no input is marked as one of the tool (bazel_tool_input)");
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

    /// The request of this call. `read` gives the text of an input; `None` when there is no such text.
    ///
    /// # Errors
    /// Why there can be none: an argument names a file that is no input, or the request would be too large.
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
        for_each_file(tree, &mut |path, file| {
            let input = WorkInput {
                path: relative_to(path, working_directory),
                digest: file.digest.hash_hex().into_bytes(),
            };
            bytes += input.path.len() + input.digest.len();
            request.inputs.push(input);
            bytes <= MAX_REQUEST_BYTES
        });
        let too_large = || format!("the request would have more than {MAX_REQUEST_BYTES} bytes");
        if bytes > MAX_REQUEST_BYTES {
            return Err(too_large());
        }
        request.encode_as(self.encoding).ok_or_else(too_large)
    }
}

/// Whether a path leads only through directories, as far as there is anything.
fn is_plain_way(tree: &InputTree, path: &RootPath) -> bool {
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

/// Whether an argument names a file with arguments: `@file`, `-flagfile=file` or `--flagfile=file`.
fn is_flagfile(argument: &str) -> bool {
    ["@", "-flagfile=", "--flagfile="]
        .iter()
        .any(|prefix| argument.strip_prefix(prefix).is_some_and(|file| !file.is_empty()))
}

/// The file whose lines replace an argument. `@@` and the names of Bazel's external targets (`@repository//target`) mean no
/// file.
fn file_of(argument: &str) -> Option<&str> {
    let file = argument.strip_prefix('@')?;
    (!file.is_empty() && !file.starts_with('@') && !file.contains("//")).then_some(file)
}

/// Replaces arguments by the lines of files.
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
        let shown = file.escape_debug();
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

/// Collects what distinguishes one tool from another. Each part has its length before it, so no two lists are the same bytes.
#[derive(Default)]
struct Identity(Vec<u8>);

impl Identity {
    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn texts<'a>(&mut self, texts: impl Iterator<Item = &'a String>) {
        let texts: Vec<_> = texts.collect();
        self.number(texts.len() as u64);
        texts.into_iter().for_each(|text| self.text(text));
    }

    /// The files of the tool; false when there are none.
    fn tool_inputs(&mut self, tree: &InputTree) -> bool {
        let mut count = 0;
        for_each_file(tree, &mut |path, file| {
            if is_tool_input(file) {
                count += 1;
                self.text(path);
                self.0.extend_from_slice(file.digest.hash());
                self.number(u64::from(file.executable));
                self.number(file.properties.unix_mode.map_or(u64::MAX, u64::from));
            }
            true
        });
        self.number(count);
        count > 0
    }

    fn key(self) -> ToolKey {
        ToolKey(DigestFunction::Sha256.digest(&self.0))
    }
}

/// Visits the files of a tree with their paths, directory by directory, until `visit` gives false.
fn for_each_file(tree: &InputTree, visit: &mut dyn FnMut(&str, &tree::File) -> bool) {
    let mut open: Vec<(String, &Directory)> = vec![(String::new(), tree.root())];
    while let Some((above, directory)) = open.pop() {
        let path = |name: &str| if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") };
        for file in &directory.files {
            if !visit(&path(&file.name), file) {
                return;
            }
        }
        let below = directory.directories.iter().rev();
        open.extend(below.map(|child| (path(&child.name), tree.directory(&child.digest))));
    }
}

/// A path in the input root as a process in the working directory writes it.
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
