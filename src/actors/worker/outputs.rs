//! Finds the outputs that a command produced, stores them, and reports them in the result (EXE-47 to EXE-58).
//!
//! First all outputs are scanned, then the files are stored, each once even if it is part of several outputs. The kind
//! of an output is the kind of the node itself: a symbolic link is reported and never followed. The path to an output
//! may only use links that stay in the input root. The kind of a link target outside of the input root is not examined.

pub(super) mod encode;
pub(super) mod named;
pub(super) mod scan;

use super::{
    checkpoint::Checkpoint,
    dir::{self, FileIdentity, is_absence},
    exec_root::{Dir, ExecNode, ExecRoot, LayerWalk},
    store::Outputs,
};
use crate::{
    action::{Action, OutputKind, OutputRequest},
    actors::cas::results::check_result_bytes,
};
use encode::Encoded;
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    path::RootPath,
    proto::reapi,
};
use rustix::{
    fs::{self as rfs, FileType, Mode},
    io::Errno,
};
use scan::{Content, NodeBudget, OutputScan};
use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io,
};

/// Maximum length of the target of an output link, in bytes, as in Linux.
const MAX_TARGET_BYTES: usize = 4_096;

/// Mode and time of a node when it was scanned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// The modification time, as in `st_mtim`.
    pub mtime: prost_types::Timestamp,
}

impl Seen {
    /// Whether its owner may execute it (EXE-54).
    pub(super) fn is_executable(&self) -> bool {
        self.mode & Mode::XUSR.bits() != 0
    }
}

/// The properties that the command requests for its outputs (EXE-63).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reported {
    /// Whether modification times are reported.
    pub mtime: bool,
    /// Whether permission bits are reported.
    pub unix_mode: bool,
}

impl Reported {
    /// The properties of a file or directory; `None` if none are requested.
    pub(super) fn of(self, seen: &Seen) -> Option<reapi::NodeProperties> {
        (self.mtime || self.unix_mode).then(|| reapi::NodeProperties {
            properties: Vec::new(),
            mtime: self.mtime.then_some(seen.mtime),
            unix_mode: self.unix_mode.then_some(seen.mode & 0o7777),
        })
    }

    /// Properties of a link, which has no permission bits of its own.
    pub(super) fn of_link(self, seen: &Seen) -> Option<reapi::NodeProperties> {
        Self { unix_mode: false, ..self }.of(seen)
    }
}

/// The node at one output path.
enum OutputNode {
    File {
        name: String,
        id: FileIdentity,
        seen: Seen,
    },
    /// An input that the command left unchanged.
    Input {
        digest: Digest,
        seen: Seen,
    },
    Link {
        target: String,
        to_directory: bool,
        seen: Seen,
    },
    Directory(OutputScan),
}

impl OutputNode {
    /// The target of a link.
    fn target(&self) -> Option<&str> {
        match self {
            Self::Link { target, .. } => Some(target),
            Self::File { .. } | Self::Input { .. } | Self::Directory(_) => None,
        }
    }

    /// The unchanged inputs that it consists of.
    fn inputs(&self) -> Vec<Digest> {
        match self {
            Self::File { .. } | Self::Link { .. } => Vec::new(),
            Self::Input { digest, .. } => vec![*digest],
            Self::Directory(scan) => scan.inputs().collect(),
        }
    }
}

/// Collects the outputs of `action` in `root` into `result`. No process may be left that could change them. The caller
/// commits what is stored in the batch. Inputs that the command left unchanged are stored already, and the batch keeps
/// them from being evicted.
///
/// # Errors
/// `Precondition` with the name of an output that cannot be stored; `Invalid` if the result would not fit into a
/// message; the errors of the store; the errors of the checkpoint, which is checked before each file.
pub(super) fn collect(
    root: ExecRoot<'_>,
    action: &Action,
    batch: &mut dyn Outputs,
    checkpoint: &Checkpoint,
    result: &mut reapi::ActionResult,
) -> Result<()> {
    let mut budget = NodeBudget::new();
    let (mut found, mut result_bytes) = (Vec::new(), 0);
    let root_seen = restore_permissions(root.own())?;
    for output in &action.command.outputs {
        checkpoint.check()?;
        if let Some(node) = look(root, root_seen, output, checkpoint, &mut budget)? {
            // A command can name one file by any number of paths, and each is a part of the result.
            result_bytes += output.requested.len() + node.target().map_or(0, str::len);
            check_result_bytes(result_bytes)?;
            found.push((output, node));
        }
    }
    batch.hold(found.iter().flat_map(|(_, node)| node.inputs()).collect())?;
    batch.expect(budget.bytes_on_disk());
    let mut writer = OutputWriter {
        root,
        action,
        batch,
        checkpoint,
        stored: HashMap::new(),
        reported: Reported { mtime: action.command.report_mtime, unix_mode: action.command.report_unix_mode },
    };
    found.into_iter().try_for_each(|(output, node)| writer.report(output, node, result))
}

/// Restores the owner's permissions on an exec directory, in case the command removed them. Returns its previous mode
/// and time.
///
/// # Errors
/// None in practice.
pub(super) fn restore_permissions(directory: &File) -> Result<Seen> {
    let failed = |error: Errno| Error::io("open up the exec directory", &error.into());
    let stat = rfs::fstat(directory).map_err(failed)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    if !mode.contains(Mode::RWXU) {
        rfs::fchmod(directory, mode | Mode::RWXU).map_err(failed)?;
    }
    Ok(Seen::from(&stat))
}

/// Examines an output path; `None` if nothing is there (EXE-50).
fn look(
    root: ExecRoot<'_>,
    root_seen: Seen,
    output: &OutputRequest,
    checkpoint: &Checkpoint,
    budget: &mut NodeBudget,
) -> Result<Option<OutputNode>> {
    let path = &output.requested;
    let Some((parent_path, name)) = output.path.parent().zip(output.path.name()) else {
        return expect(output, FileType::Directory)
            .and_then(|()| OutputScan::of(open_directory(root, output)?, root_seen, path, checkpoint, budget))
            .map(|scan| Some(OutputNode::Directory(scan)));
    };
    let Some(parent) = open_parent(root, &parent_path, path)? else { return Ok(None) };
    let stat = match parent.look(OsStr::new(name)) {
        Ok(ExecNode::Own(stat)) => stat,
        Ok(input) => return examine_input(root, output, input, checkpoint, budget).map(Some),
        Err(error) if is_absence(&error) => return Ok(None),
        Err(error) => return Err(path_error(path, &error)),
    };
    let (kind, seen) = (dir::file_type(&stat), Seen::from(&stat));
    expect(output, kind)?;
    Ok(Some(match kind {
        FileType::RegularFile => {
            budget.count_file(&stat);
            OutputNode::File { name: name.to_owned(), id: dir::file_id(&stat), seen }
        }
        FileType::Directory => OutputNode::Directory(OutputScan::of(
            open_directory(root, output)?,
            seen,
            path,
            checkpoint,
            budget,
        )?),
        FileType::Symlink => {
            let target =
                parent.read_link(OsStr::new(name)).map_err(|error| cannot_read(name, path, &error))?;
            OutputNode::Link {
                target: checked_target(target, name, path)?,
                to_directory: leads_to_directory(root, output),
                seen,
            }
        }
        other => return Err(not_storable(path, other)),
    }))
}

/// Examines an output path that still holds an unchanged input.
fn examine_input(
    root: ExecRoot<'_>,
    output: &OutputRequest,
    input: ExecNode<'_>,
    checkpoint: &Checkpoint,
    budget: &mut NodeBudget,
) -> Result<OutputNode> {
    match input {
        ExecNode::File(file) => {
            expect(output, FileType::RegularFile)?;
            Ok(OutputNode::Input { digest: file.digest, seen: Seen::of_file(file) })
        }
        ExecNode::Link(link) => Ok(OutputNode::Link {
            target: link.target.clone(),
            to_directory: leads_to_directory(root, output),
            seen: Seen::of_link(link),
        }),
        ExecNode::Directory(directory) => {
            expect(output, FileType::Directory)?;
            let (top, seen) = (open_directory(root, output)?, Seen::of_directory(directory));
            OutputScan::of(top, seen, &output.requested, checkpoint, budget).map(OutputNode::Directory)
        }
        ExecNode::Own(_) => Err(Error::internal("a node of the own layer was taken for an input")),
    }
}

fn leads_to_directory(root: ExecRoot<'_>, output: &OutputRequest) -> bool {
    root.resolve(output.path.as_path()).is_ok()
}

/// EXE-51: the deprecated lists say what kind an output must have. A link may be in both lists.
fn expect(output: &OutputRequest, kind: FileType) -> Result<()> {
    match (output.kind, kind) {
        (OutputKind::File, FileType::Directory) => Err(Error::Precondition(format!(
            "output \"{}\" is a directory; Command.output_files asks for a file",
            output.requested
        ))),
        (OutputKind::Directory, FileType::RegularFile) => Err(Error::Precondition(format!(
            "output \"{}\" is a file; Command.output_directories asks for a directory",
            output.requested
        ))),
        _ => Ok(()),
    }
}

/// Stores outputs and adds them to the result.
struct OutputWriter<'a> {
    root: ExecRoot<'a>,
    action: &'a Action,
    batch: &'a mut dyn Outputs,
    checkpoint: &'a Checkpoint<'a>,
    /// Files that are already stored. The store may have moved them away.
    stored: HashMap<FileIdentity, Digest>,
    reported: Reported,
}

impl OutputWriter<'_> {
    #[allow(deprecated)]
    fn report(
        &mut self,
        output: &OutputRequest,
        node: OutputNode,
        result: &mut reapi::ActionResult,
    ) -> Result<()> {
        let path = output.requested.clone();
        match node {
            OutputNode::File { name, id, seen } => {
                let digest = self.file_at(output, &name, id)?;
                result.output_files.push(self.output_file(path, digest, seen));
            }
            OutputNode::Input { digest, seen } => {
                result.output_files.push(self.output_file(path, digest, seen));
            }
            OutputNode::Link { target, to_directory, seen } => {
                let link =
                    reapi::OutputSymlink { path, target, node_properties: self.reported.of_link(&seen) };
                // EXE-53: older and newer clients read different lists.
                result.output_symlinks.push(link.clone());
                if to_directory {
                    result.output_directory_symlinks.push(link);
                } else {
                    result.output_file_symlinks.push(link);
                }
            }
            OutputNode::Directory(mut scan) => {
                let checkpoint = self.checkpoint;
                scan.revisit(open_directory(self.root, output)?, &path, checkpoint, |directory, here| {
                    for file in &mut directory.files {
                        if let (Some(here), Content::Own(id)) = (here, file.content) {
                            let digest = self.file(here, &file.name, id, &output.requested)?;
                            file.content = Content::Stored(digest);
                        }
                    }
                    Ok(())
                })?;
                result.output_directories.push(self.directory(path, &scan)?);
            }
        }
        Ok(())
    }

    fn output_file(&self, path: String, digest: Digest, seen: Seen) -> reapi::OutputFile {
        reapi::OutputFile {
            path,
            digest: Some(digest.to_wire()),
            is_executable: seen.is_executable(),
            node_properties: self.reported.of(&seen),
            ..Default::default()
        }
    }

    fn file_at(&mut self, output: &OutputRequest, name: &str, id: FileIdentity) -> Result<Digest> {
        if let Some(digest) = self.stored.get(&id) {
            return Ok(*digest);
        }
        let parent_path = output.path.parent().unwrap_or_default();
        let parent = open_parent(self.root, &parent_path, &output.requested)?;
        let own = parent.as_ref().and_then(Dir::own);
        let own = own.ok_or_else(|| Error::Internal(format!("output \"{}\" is gone", output.requested)))?;
        self.file(own, name, id, &output.requested)
    }

    /// Stores one file, unless it is already stored under another name.
    fn file(&mut self, parent: &File, name: &str, id: FileIdentity, path: &str) -> Result<Digest> {
        self.checkpoint.check()?;
        if let Some(digest) = self.stored.get(&id) {
            return Ok(*digest);
        }
        let file = open_regular(parent, name, path)?;
        let digest = self.batch.file(parent, name, file)?;
        self.stored.insert(id, digest);
        Ok(digest)
    }

    fn directory(&mut self, path: String, scan: &OutputScan) -> Result<reapi::OutputDirectory> {
        let encoded = Encoded::new(scan, self.action.digest.function(), self.reported)?;
        let format = self.action.command.directory_format;
        let mut output = reapi::OutputDirectory { path, ..Default::default() };
        if format.tree {
            let tree = self.batch.bytes(encoded.tree())?;
            output.tree_digest = Some(tree.to_wire());
            output.is_topologically_sorted = true;
        }
        if format.directories {
            output.root_directory_digest = encoded.root().map(Digest::to_wire);
            for (_, bytes) in encoded.directories {
                self.checkpoint.check()?;
                self.batch.bytes(bytes)?;
            }
        }
        Ok(output)
    }
}

/// Opens a regular file for the store. A file that its owner may not read is made readable.
///
/// # Errors
/// `Precondition` if it is not a regular file. Opening does not block on a FIFO and follows no link.
pub(super) fn open_regular(parent: &File, name: &str, path: &str) -> Result<File> {
    let failed = |error: io::Error| Error::io(&format!("read output \"{path}\""), &error);
    let file = match dir::open_file(parent, OsStr::new(name)) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => {
            return Err(not_storable(path, FileType::Symlink));
        }
        opened => opened.map_err(failed)?,
    };
    match dir::file_type(&rfs::fstat(&file).map_err(|error| failed(error.into()))?) {
        FileType::RegularFile => Ok(file),
        other => Err(not_storable(path, other)),
    }
}

fn open_parent<'a>(root: ExecRoot<'a>, parent: &RootPath, path: &str) -> Result<Option<Dir<'a>>> {
    match root.resolve(parent.as_path()) {
        Ok(parent) => Ok(Some(parent)),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(path_error(path, &error)),
    }
}

/// Classifies an error on the path to an output: either the command is at fault, or this server.
fn path_error(path: &str, error: &io::Error) -> Error {
    let fault = match Errno::from_io_error(error) {
        Some(Errno::XDEV) => "a symbolic link in its path leaves the input root",
        Some(Errno::ACCESS) => "the command left a directory in its path without permissions",
        _ => return Error::io(&format!("look for output \"{path}\""), error),
    };
    Error::Precondition(format!("output \"{path}\" cannot be collected: {fault}"))
}

/// Opens an output that is a directory, for listing.
fn open_directory<'a>(root: ExecRoot<'a>, output: &OutputRequest) -> Result<LayerWalk<'a>> {
    let failed = |error: io::Error| Error::io(&format!("open output \"{}\"", output.requested), &error);
    let Some((parent_path, name)) = output.path.parent().zip(output.path.name()) else {
        return LayerWalk::at_top(root).map_err(failed);
    };
    let parent = root.resolve(parent_path.as_path()).map_err(failed)?;
    LayerWalk::at(&parent, OsStr::new(name)).map_err(failed)
}

fn cannot_read(name: &str, path: &str, error: &io::Error) -> Error {
    Error::io(&format!("read symbolic link \"{name}\" of output \"{path}\""), error)
}

fn checked_target(target: OsString, name: &str, path: &str) -> Result<String> {
    let refused = |fault: &str| {
        let link = format!("the target of symbolic link \"{name}\" of output \"{path}\"");
        Error::Precondition(format!("{link} {fault}"))
    };
    let target = target.into_string().map_err(|_| refused("is not UTF-8"))?;
    if target.len() > MAX_TARGET_BYTES {
        return Err(refused(&format!("has more than {MAX_TARGET_BYTES} bytes")));
    }
    Ok(target)
}

fn name_of(name: &OsStr, path: &str) -> Result<String> {
    name.to_str().map(str::to_owned).ok_or_else(|| {
        Error::Precondition(format!("output \"{path}\" holds {name:?}; names must be UTF-8 to be reported"))
    })
}

fn not_storable(path: &str, kind: FileType) -> Error {
    let kind = match kind {
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Symlink => "a symbolic link where only a file can be",
        FileType::Directory => "a directory where only a file can be",
        _ => "neither file, directory nor symbolic link",
    };
    Error::Precondition(format!("output \"{path}\" is {kind} and cannot be stored"))
}
