//! Action results: validation, file format, and references.
//!
//! A stored result is one file: the SHA-256 of the rest, then a [`gorego::StoredResult`]. A file with a wrong checksum
//! or key is a miss. Results never carry inlined contents on disk or in memory: contents become blobs before a result
//! is stored, and are read back on request when it is served (AC-05).

mod action_cache;
mod lookup;
mod prepared;
mod purge;
mod replaced;

pub(super) use lookup::ResultLookup;
pub(super) use prepared::PreparedResult;
pub(crate) use purge::ResultCondition;

use super::linking::NeedsBlobs;
use crate::{budget::Bounds, result::SharedResult};
use bytes::Bytes;
use gorego_reapi::{
    auxiliary::modernise,
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    escape::shown,
    path::RootPath,
    proto::{gorego, reapi},
    tree::MAX_MESSAGE_MEMORY,
    wire,
};
use prost::Message as _;
use std::{
    collections::HashSet,
    fmt::{self, Display},
    sync::atomic::AtomicBool,
    time::SystemTime,
};

/// The largest file of an action result that is read. A result has at most 4 MiB, and its provenance adds little.
pub(super) const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// The memory that the largest stored result takes while it is read and decoded: its file and the message.
pub(super) const LARGEST_RESULT: u64 = MAX_FILE_BYTES + MAX_MESSAGE_MEMORY;

/// Memory for the results of requests, except for small ones. It is reserved before a result is read, when its size is
/// not known, and held until there is room for the answer. It is enough for two of the largest results, like the memory
/// for decoded messages.
pub(super) const LARGE_RESULTS: Bounds =
    Bounds { what: "bytes of large results", total: 2 * LARGEST_RESULT, connection: LARGEST_RESULT };

/// Length of the checksum at the start of a stored result.
const CHECKSUM_BYTES: usize = 32;

/// A result in memory, with every blob that it references. Immutable.
#[derive(Debug)]
pub struct LoadedResult {
    /// The generation of the file that it was read from.
    pub generation: u64,
    /// The result that is served.
    pub result: SharedResult,
    /// Output files, Trees, files inside Trees, Directories and logs (AC-03), each once. The empty blob is left out.
    pub references: Vec<Digest>,
    /// The total size of these blobs.
    pub bytes: u64,
    /// Whether the index has links to these blobs.
    pub is_linked: AtomicBool,
    /// Whether it may be served. Results of failed commands are stored if a client uploads them, but are never hits
    /// (AC-13).
    pub is_hit: bool,
}

impl LoadedResult {
    /// Combines a result and the references found in it.
    pub fn new(generation: u64, result: SharedResult, references: impl IntoIterator<Item = Digest>) -> Self {
        let mut references: Vec<Digest> =
            references.into_iter().filter(|digest| !digest.is_empty()).collect();
        references.sort_unstable();
        references.dedup();
        let bytes = references.iter().map(Digest::size).fold(0, u64::saturating_add);
        Self {
            generation,
            is_hit: result.exit_code == 0,
            result,
            references,
            bytes,
            is_linked: AtomicBool::new(false),
        }
    }

    /// The approximate memory that it takes, in bytes.
    pub fn memory(&self) -> usize {
        let references = self.references.len() * size_of::<Digest>();
        self.result.memory().saturating_add(size_of::<Self>() + references)
    }
}

impl NeedsBlobs for LoadedResult {
    fn needed(&self) -> &[Digest] {
        &self.references
    }

    fn is_linked(&self) -> &AtomicBool {
        &self.is_linked
    }
}

/// The digests that a result names directly. Trees and Directories have to be read to find the rest.
#[derive(Debug, Default)]
pub struct DirectReferences {
    /// Output files and logs.
    pub blobs: Vec<Digest>,
    /// Blobs of Tree messages.
    pub trees: Vec<Digest>,
    /// Blobs of root Directories.
    pub roots: Vec<Digest>,
}

impl DirectReferences {
    /// Whether nothing else is referenced, because there are no Trees and Directories.
    pub(super) fn is_complete(&self) -> bool {
        self.trees.is_empty() && self.roots.is_empty()
    }

    /// The references of a result whose digests are of `function`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or absent digest.
    pub fn of(result: &reapi::ActionResult, function: DigestFunction) -> Result<Self> {
        let mut references = Self::default();
        for file in &result.output_files {
            let field = OutputField("output_files", &file.path);
            references.blobs.push(Digest::from_wire(function, file.digest.as_ref(), field)?);
        }
        for (log, field) in
            [(&result.stdout_digest, "stdout_digest"), (&result.stderr_digest, "stderr_digest")]
        {
            if log.is_some() {
                references.blobs.push(Digest::from_wire(function, log.as_ref(), field)?);
            }
        }
        for directory in &result.output_directories {
            let field = OutputField("output_directories", &directory.path);
            let (tree, root) = (&directory.tree_digest, &directory.root_directory_digest);
            if tree.is_some() || root.is_none() {
                references.trees.push(Digest::from_wire(function, tree.as_ref(), field)?);
            }
            if root.is_some() {
                references.roots.push(Digest::from_wire(function, root.as_ref(), field)?);
            }
        }
        Ok(references)
    }
}

/// The Directories of a Tree as they are encoded, because their digests are those of these bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct EncodedTree {
    #[prost(bytes = "bytes", repeated, tag = "2")]
    children: Vec<Bytes>,
}

/// The digests of all files in a Tree blob.
///
/// # Errors
/// [`Error::Invalid`] when the blob is not a Tree, or when it lacks a Directory that it names (AC-03).
pub fn files_of_tree(bytes: Bytes, function: DigestFunction) -> Result<Vec<Digest>> {
    let tree: reapi::Tree = wire::decode(bytes.clone(), MAX_MESSAGE_MEMORY, "Tree")?;
    let (mut files, mut named) = (Vec::new(), HashSet::new());
    for directory in tree.root.iter().chain(&tree.children) {
        for file in &directory.files {
            files.push(Digest::from_wire(function, file.digest.as_ref(), &file.name)?);
        }
        for below in &directory.directories {
            named.insert(Digest::from_wire(function, below.digest.as_ref(), &below.name)?);
        }
    }
    drop(tree);
    if !named.is_empty() {
        let encoded = EncodedTree::decode(bytes)
            .map_err(|error| Error::Invalid(format!("it does not parse as Tree: {error}")))?;
        for child in &encoded.children {
            named.remove(&function.digest(child));
        }
        // The empty Directory is always there.
        if let Some(absent) = named.iter().find(|digest| !digest.is_empty()) {
            return Err(Error::Invalid(format!("Directory {absent} is not among its children")));
        }
    }
    Ok(files)
}

/// The origin of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uploader {
    /// A client. Nothing in its result is trusted.
    Client,
    /// A worker of this server. Its output paths may leave the working directory, within the input root.
    Worker,
}

/// The largest result, without contents that are inlined on request. With the Operation around it, it fits the 4 MiB
/// message that clients accept by default (GEN-25).
pub const RESULT_MAX_BYTES: usize = (4 * 1024 - 64) * 1024;

/// Checks that a result fits into a message to clients.
///
/// # Errors
/// [`Error::Invalid`] when it is larger than [`RESULT_MAX_BYTES`].
pub fn check_size(result: &reapi::ActionResult) -> Result<()> {
    check_result_bytes(result.encoded_len())
}

/// Checks that a result of at least this many bytes fits into a message to clients.
///
/// # Errors
/// As [`check_size`].
pub(crate) fn check_result_bytes(bytes: usize) -> Result<()> {
    if bytes <= RESULT_MAX_BYTES {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the action's result has {bytes} bytes or more, and at most {RESULT_MAX_BYTES} fit into a message; declare a directory as \
         output instead of its many files"
    )))
}

/// Checks a result and normalises it for storage: execution metadata is always present (AC-09), a digest is never an
/// empty message (AC-06), and inlined contents are removed. Returns the contents as blobs, and what the result names.
///
/// # Errors
/// [`Error::Invalid`] for digests or paths that are malformed, absolute, escaping or duplicate (AC-10), for contents
/// that do not match their digest, and for a result that is too large.
pub fn normalise(
    result: &mut reapi::ActionResult,
    function: DigestFunction,
    uploader: Uploader,
) -> Result<(Vec<(Digest, Bytes)>, DirectReferences)> {
    check_paths(result, uploader)?;
    let mut blobs = Vec::new();
    for (raw, digest, field) in [
        (&mut result.stdout_raw, &mut result.stdout_digest, "stdout_raw"),
        (&mut result.stderr_raw, &mut result.stderr_digest, "stderr_raw"),
    ] {
        if digest.as_ref().is_some_and(|digest| *digest == reapi::Digest::default()) {
            *digest = None;
        }
        extract(raw, digest, function, field, &mut blobs)?;
    }
    for file in &mut result.output_files {
        let field = OutputField("output_files", &file.path);
        extract(&mut file.contents, &mut file.digest, function, field, &mut blobs)?;
    }
    check_size(result)?;
    let direct = DirectReferences::of(result, function)?;
    result.execution_metadata.get_or_insert_default();
    Ok((blobs, direct))
}

fn extract(
    raw: &mut Bytes,
    digest: &mut Option<reapi::Digest>,
    function: DigestFunction,
    field: impl Display,
    blobs: &mut Vec<(Digest, Bytes)>,
) -> Result<()> {
    if raw.is_empty() {
        return Ok(());
    }
    let actual = function.digest(raw);
    if digest.is_some() {
        let claimed = Digest::from_wire(function, digest.as_ref(), &field)?;
        if claimed != actual {
            return Err(Error::Invalid(format!(
                "{field}: the contents have the digest {actual}, not {claimed}"
            )));
        }
    }
    *digest = Some(actual.to_wire());
    blobs.push((actual, std::mem::take(raw)));
    Ok(())
}

#[allow(deprecated)]
fn check_paths(result: &reapi::ActionResult, uploader: Uploader) -> Result<()> {
    let mut seen = HashSet::new();
    // If the new list is filled, the deprecated lists repeat it (EXE-53).
    let old = result.output_symlinks.is_empty();
    let old_links =
        result.output_file_symlinks.iter().chain(&result.output_directory_symlinks).filter(|_| old);
    let paths = (result.output_files.iter().map(|file| ("output_files", &file.path, false)))
        .chain(
            result.output_directories.iter().map(|directory| ("output_directories", &directory.path, true)),
        )
        .chain(
            result.output_symlinks.iter().chain(old_links).map(|link| ("output_symlinks", &link.path, false)),
        );
    for (field, path, may_be_root) in paths {
        let refuse = |problem: &str| Err(Error::Invalid(format!("{} {problem}", OutputField(field, path))));
        if path.is_empty() && !may_be_root {
            return refuse("is an empty path");
        }
        let escapes = match uploader {
            Uploader::Client => RootPath::root().join(path).is_err(),
            Uploader::Worker => path.starts_with('/') || path.contains('\0'),
        };
        if escapes {
            return refuse("is absolute, malformed or leaves the working directory");
        }
        if !seen.insert(path) {
            return refuse("is listed twice");
        }
    }
    Ok(())
}

/// The name of an element of a list of outputs in errors: the field and the path.
#[derive(Clone, Copy)]
struct OutputField<'a>(&'static str, &'a str);

impl Display for OutputField<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(field, path) = self;
        write!(f, "{field} \"{}\"", shown(path))
    }
}

/// The origin that is stored with a result.
pub fn origin(
    instance: &str,
    action: Digest,
    provenance: super::client::Provenance,
    now: SystemTime,
) -> gorego::StoredOrigin {
    gorego::StoredOrigin {
        instance_name: instance.to_owned(),
        digest_function: action.function().wire() as i32,
        action_digest: Some(action.to_wire()),
        stored_at: Some(now.into()),
        worker: provenance.worker,
        tool_invocation_id: provenance.tool_invocation_id,
        peer: provenance.peer,
        principal: provenance.principal,
        private_action_digest: None,
    }
}

/// The file content of a stored result.
pub fn encode(origin: &gorego::StoredOrigin, result: &reapi::ActionResult) -> Bytes {
    let origin = origin.clone();
    let message = gorego::StoredResult {
        instance_name: origin.instance_name,
        digest_function: origin.digest_function,
        action_digest: origin.action_digest,
        result: Some(result.clone()),
        stored_at: origin.stored_at,
        worker: origin.worker,
        tool_invocation_id: origin.tool_invocation_id,
        peer: origin.peer,
        principal: origin.principal,
        private_action_digest: origin.private_action_digest,
    };
    let mut bytes = vec![0; CHECKSUM_BYTES];
    bytes.reserve_exact(message.encoded_len());
    message.encode_raw(&mut bytes);
    let (checksum, body) = bytes.split_at_mut(CHECKSUM_BYTES);
    checksum.copy_from_slice(DigestFunction::Sha256.digest(body).hash());
    bytes.into()
}

/// Decodes the file content of a stored result. The error describes what is wrong with it.
pub fn decode(
    bytes: &[u8],
    instance: &str,
    action: Digest,
) -> std::result::Result<reapi::ActionResult, &'static str> {
    let message: gorego::StoredResult = wire::decode(body(bytes)?, MAX_MESSAGE_MEMORY, "result")
        .map_err(|_| "it does not parse, or not within a bound of memory")?;
    let same_function = message.digest_function == action.function().wire() as i32;
    if message.instance_name != instance || !same_function || message.action_digest != Some(action.to_wire())
    {
        return Err("it is the result of another action");
    }
    let mut result = message.result.ok_or("it is empty")?;
    if let Some(metadata) = &mut result.execution_metadata {
        modernise(&mut metadata.auxiliary_metadata);
    }
    Ok(result)
}

/// Decodes the origin in the file content of a stored result and skips the result itself. The error describes what is
/// wrong with it.
pub fn decode_origin(
    bytes: &[u8],
    instance: &str,
    action: Digest,
) -> std::result::Result<gorego::StoredOrigin, &'static str> {
    let origin: gorego::StoredOrigin = wire::decode(body(bytes)?, MAX_MESSAGE_MEMORY, "result")
        .map_err(|_| "it does not parse, or not within a bound of memory")?;
    let is_it = origin.instance_name == instance
        && origin.digest_function == action.function().wire() as i32
        && origin.action_digest == Some(action.to_wire());
    is_it.then_some(origin).ok_or("it is the result of another action")
}

/// Whether the file content of a stored result is complete.
pub fn is_whole(bytes: &[u8]) -> bool {
    body(bytes).is_ok()
}

fn body(bytes: &[u8]) -> std::result::Result<&[u8], &'static str> {
    let (checksum, body) = bytes.split_at_checked(CHECKSUM_BYTES).ok_or("it is too short")?;
    if DigestFunction::Sha256.digest(body).hash() == checksum {
        Ok(body)
    } else {
        Err("its checksum is wrong")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn file(path: &str) -> reapi::OutputFile {
        reapi::OutputFile {
            path: path.into(),
            digest: Some(SHA256.digest(b"x").to_wire()),
            ..Default::default()
        }
    }

    fn directory(path: &str) -> reapi::OutputDirectory {
        let tree_digest = Some(SHA256.digest(b"t").to_wire());
        reapi::OutputDirectory { path: path.into(), tree_digest, ..Default::default() }
    }

    /// AC-10.
    #[test]
    fn results_with_bad_paths_or_digests_are_refused() {
        let with = |output_files, output_directories| {
            let mut result = reapi::ActionResult { output_files, output_directories, ..Default::default() };
            normalise(&mut result, SHA256, Uploader::Client)
        };
        assert!(with(vec![file("a/b"), file("c")], vec![directory("d"), directory("")]).is_ok());
        for path in ["/etc/passwd", "../x", "a/../../x", "", "x\0"] {
            assert!(with(vec![file(path)], vec![]).is_err(), "{path:?}");
        }
        assert!(with(vec![file("a"), file("a")], vec![]).is_err());
        assert!(with(vec![file("a")], vec![directory("a")]).is_err());
        for digest in [None, Some(reapi::Digest { hash: "zz".into(), size_bytes: 1 })] {
            assert!(with(vec![reapi::OutputFile { digest, ..file("a") }], vec![]).is_err());
        }
        let bare = reapi::OutputDirectory { tree_digest: None, ..directory("d") };
        assert!(with(vec![], vec![bare]).is_err());
    }

    #[test]
    fn a_worker_may_report_outputs_beside_its_working_directory() {
        let mut result = reapi::ActionResult { output_files: vec![file("../x")], ..Default::default() };
        assert!(normalise(&mut result.clone(), SHA256, Uploader::Client).is_err());
        assert!(normalise(&mut result, SHA256, Uploader::Worker).is_ok());
    }

    /// AC-05, AC-06, AC-09.
    #[test]
    fn contents_become_blobs_and_metadata_is_always_present() {
        let mut result = reapi::ActionResult {
            stdout_raw: Bytes::from_static(b"out"),
            stderr_digest: Some(reapi::Digest::default()),
            output_files: vec![reapi::OutputFile { contents: Bytes::from_static(b"x"), ..file("a") }],
            ..Default::default()
        };
        let mut lie = result.clone();
        lie.output_files[0].contents = Bytes::from_static(b"y");
        assert!(normalise(&mut lie, SHA256, Uploader::Client).is_err());
        let (blobs, _) = normalise(&mut result, SHA256, Uploader::Client).unwrap();
        assert_eq!(
            blobs.iter().map(|(digest, _)| *digest).collect::<Vec<_>>(),
            [SHA256.digest(b"out"), SHA256.digest(b"x")]
        );
        assert_eq!(result.stdout_digest, Some(SHA256.digest(b"out").to_wire()));
        assert!(result.stdout_raw.is_empty() && result.output_files[0].contents.is_empty());
        assert_eq!(result.stderr_digest, None);
        assert!(result.execution_metadata.is_some());
    }

    #[test]
    fn a_tree_of_millions_of_empty_messages_is_not_decoded() {
        let empty_children = b"\x12\x00";
        assert_eq!(files_of_tree(empty_children.repeat(10).into(), SHA256), Ok(vec![]));
        assert!(files_of_tree(empty_children.repeat(2_000_001).into(), SHA256).is_err());
        // The Tree has one child with as many empty files.
        let files = b"\x0a\x00".repeat(2_000_001);
        let mut nested = vec![0x12];
        prost::encode_length_delimiter(files.len(), &mut nested).unwrap();
        nested.extend(files);
        let refusal = files_of_tree(nested.into(), SHA256).unwrap_err();
        assert!(refusal.to_string().contains("the Tree is refused"), "{refusal}");
    }

    #[test]
    fn a_stored_result_with_any_bit_flipped_is_rejected() {
        let action = SHA256.digest(b"action");
        let result = reapi::ActionResult { output_files: vec![file("a")], ..Default::default() };
        let origin = origin("i", action, Default::default(), SystemTime::UNIX_EPOCH);
        let bytes = encode(&origin, &result);
        assert_eq!(decode_origin(&bytes, "i", action), Ok(origin));
        assert!(decode_origin(&bytes, "j", action).is_err());
        assert_eq!(decode(&bytes, "i", action), Ok(result));
        assert!(decode(&bytes, "j", action).is_err());
        assert!(decode(&bytes, "i", SHA256.digest(b"other")).is_err());
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1;
            assert!(decode(&flipped, "i", action).is_err(), "bit of byte {at}");
            assert!(decode(&bytes[..at], "i", action).is_err(), "cut at {at}");
        }
    }
}
