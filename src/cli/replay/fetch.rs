//! Reads an action from a server: its messages, its input root, and its recorded result.

use super::scratch::Scratch;
use crate::{
    action::{Action, TimeoutPolicy},
    cli::{ReplayArgs, ops::names, progress::ProgressLine},
    instance::Instances,
};
use gorego_client::{Client, Identity, OperationRecord, Progress};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::reapi,
    tree::InputTree,
};
use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

/// Maximum number of missing blobs that are listed.
const NAMED_MISSING: usize = 10;
/// The remedy if blobs of an action are missing.
const MISSING_REMEDY: &str = "they were evicted. Run the action again without the cache, so that its client uploads them \
                              (Bazel: --noremote_accept_cached). A larger store keeps blobs longer (max_size_gb)";

/// An action with its inputs and its recorded result.
pub(super) struct FetchedAction {
    /// The server of the action.
    pub client: Client,
    /// The action. Its output directories are requested as Trees.
    pub action: Action,
    /// Its input root. The files are in the directory of blobs.
    pub tree: Arc<InputTree>,
    /// The recorded result, or why there is none.
    pub recorded: Result<Recorded, String>,
}

/// A result that the server has recorded.
pub(super) struct Recorded {
    pub result: reapi::ActionResult,
    /// A description of its origin.
    pub source: &'static str,
}

/// The thing to replay.
#[derive(Debug, PartialEq)]
pub(super) enum Subject {
    Action(Digest),
    Operation(String),
}

/// Reads the action of the subject. `default_timeout` applies if it sets none.
///
/// # Errors
/// `Precondition` if something is missing on the server; other errors of the
/// server.
pub(super) async fn fetch(
    args: &ReplayArgs,
    subject: Subject,
    default_timeout: Duration,
    scratch: &Scratch,
    line: &ProgressLine,
) -> Result<FetchedAction> {
    let identity = Identity {
        tool: "gorego".into(),
        invocation_id: uuid::Uuid::new_v4().to_string(),
        mnemonic: "Replay".into(),
        target_id: String::new(),
    };
    line.say(&format!("connecting to {}", args.endpoint));
    let function = match &subject {
        Subject::Action(digest) => digest.function(),
        Subject::Operation(_) => args.digest_function.unwrap_or(DigestFunction::Sha256),
    };
    let client =
        Client::connect_for(args.connect.options(&args.endpoint)?, &args.instance, &identity, function)
            .await?;
    line.say("reading the action");
    let (client, digest, record) = match subject {
        Subject::Action(digest) => (client, digest, None),
        Subject::Operation(name) => {
            let name = names::resolve(&client, &name).await?;
            let record = client.operation(&name).await.map_err(|error| unknown_operation(&name, error))?;
            (client.with_digest_function(record.action.function()), record.action, Some(record))
        }
    };
    let recorded = recorded(&client, digest, record).await?;
    let instance = Instances::new([&args.instance])?.get(&args.instance)?;
    let wire: reapi::Action =
        client.read_message(digest, "Action").await.map_err(|error| unknown_action(digest, error))?;
    let command =
        Digest::from_wire(client.digest_function(), wire.command_digest.as_ref(), "command_digest")?;
    let command: reapi::Command = client
        .read_message(command, "Command")
        .await
        .map_err(|error| explain_missing(error, "the Command", None))?;
    let timeouts = TimeoutPolicy { default: default_timeout, max: Duration::MAX };
    let mut action = Action::from_wire(instance, digest, &wire, &command, timeouts)?;
    // Output directories are compared file by file, which requires Trees.
    action.command.directory_format.tree = true;
    line.say("reading the input root");
    let tree = client
        .input_tree(action.input_root)
        .await
        .map_err(|error| explain_missing(error, "a directory of the input root", None))?;
    download(&client, &tree, scratch, line).await?;
    Ok(FetchedAction { client, action, tree: Arc::new(tree), recorded })
}

async fn download(client: &Client, tree: &InputTree, scratch: &Scratch, line: &ProgressLine) -> Result<()> {
    let digests = tree.blobs().to_vec();
    let missing = client.find_missing(digests.iter().copied()).await?;
    if !missing.is_empty() {
        return Err(explain_missing(Error::MissingBlobs(missing), "an input file", Some(tree)));
    }
    let (progress, directory) = (Arc::new(Progress::default()), scratch.blobs());
    let downloading = client.download_blobs(digests, &directory, &progress);
    line.during("downloading", &progress, downloading).await
}

/// The result that the operation reports or, if it reports none, the result in the action cache.
async fn recorded(
    client: &Client,
    action: Digest,
    record: Option<OperationRecord>,
) -> Result<Result<Recorded, String>> {
    if let Some(finished) = record.and_then(|record| record.finished) {
        return Ok(match (finished.error, finished.result) {
            (Some(error), _) => Err(format!("the operation ended with an error: {error}")),
            (None, Some(result)) => Ok(Recorded { result, source: "the result of the operation" }),
            (None, None) => Err("the operation ended without a result".into()),
        });
    }
    Ok(match client.action_result(action).await? {
        Some(result) => Ok(Recorded { result, source: "the result in the action cache" }),
        None => Err("the action cache has no result of this action. It only keeps results of successful actions. The \
                     result of a failed action is kept as long as its operation: replay it by the name of the operation"
            .into()),
    })
}

impl Subject {
    /// `HASH/SIZE` is a digest; anything else is the name of an operation.
    ///
    /// # Errors
    /// `Invalid` if it can be neither.
    pub(super) fn parse(text: &str, function: Option<DigestFunction>) -> Result<Self> {
        let Some((hash, size)) = text.rsplit_once('/') else { return Self::operation(text) };
        let is_hash = !hash.is_empty() && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        let Ok(size) = size.parse::<i64>() else { return Self::operation(text) };
        if !is_hash {
            return Self::operation(text);
        }
        let function = match function {
            Some(function) => function,
            None => DigestFunction::infer(DigestFunction::ALL, hash.len())?,
        };
        Digest::parse(function, hash, size).map(Self::Action)
    }

    fn operation(name: &str) -> Result<Self> {
        if name.len() >= 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::Invalid(format!(
                "{name} is a hash without a size; the digest of an action is HASH/SIZE, as in the log of the server and of \
                 Bazel (--execution_log_json_file)"
            )));
        }
        names::check(name)?;
        Ok(Self::Operation(name.to_owned()))
    }
}

fn unknown_operation(name: &str, error: Error) -> Error {
    match error {
        Error::NotFound(text) => Error::NotFound(format!(
            "{text}. Servers forget operations some time after their end; replay {name} by the digest of its action, which is \
             in the server's log (action_digest)"
        )),
        error => error,
    }
}

fn unknown_action(digest: Digest, error: Error) -> Error {
    match error {
        Error::MissingBlobs(_) => Error::NotFound(format!(
            "the server does not have the action {digest}: it was evicted, or it belongs to another instance (--instance), or \
             it is not the digest of an action"
        )),
        Error::Invalid(problem) => Error::Invalid(format!(
            "{problem}. The digest of an action is needed, not the digest of an output or input"
        )),
        error => error,
    }
}

/// Lists missing blobs, with their paths if `tree` has them, and the remedy.
fn explain_missing(error: Error, what: &str, tree: Option<&InputTree>) -> Error {
    let Error::MissingBlobs(missing) = error else { return error };
    let paths = tree.map(|tree| paths_of(tree, &missing)).unwrap_or_default();
    let mut text = match missing.len() {
        1 => format!("the action cannot be replayed, because the server lacks {what}:"),
        count => format!("the action cannot be replayed, because the server lacks {count} of its blobs:"),
    };
    for digest in missing.iter().take(NAMED_MISSING) {
        let path = paths.get(digest).map_or(String::new(), |path| format!(" ({})", path.escape_debug()));
        let _ = write!(text, "\n  {digest}{path}");
    }
    if missing.len() > NAMED_MISSING {
        let _ = write!(text, "\n  and {} more", missing.len() - NAMED_MISSING);
    }
    Error::Precondition(format!("{text}\n{MISSING_REMEDY}"))
}

/// A path for each of the first of these files.
fn paths_of(tree: &InputTree, missing: &[Digest]) -> HashMap<Digest, String> {
    let mut wanted: HashSet<_> = missing.iter().take(NAMED_MISSING).copied().collect();
    let mut paths = HashMap::new();
    let mut open = vec![(String::new(), tree.root())];
    while let Some((path, directory)) = open.pop() {
        for file in &directory.files {
            if wanted.remove(&file.digest) {
                paths.insert(file.digest, format!("{path}{}", file.name));
            }
        }
        if wanted.is_empty() {
            break;
        }
        let children = directory.directories.iter();
        open.extend(children.map(|child| (format!("{path}{}/", child.name), tree.directory(&child.digest))));
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_with_a_size_is_a_digest_and_anything_else_an_operation() {
        let hash = DigestFunction::Sha256.digest(b"x").hash_hex();
        let parse = |text: &str| Subject::parse(text, None);
        let digest = Digest::parse(DigestFunction::Sha256, &hash, 7).unwrap();
        assert_eq!(parse(&format!("{hash}/7")), Ok(Subject::Action(digest)));
        let blake3 = Digest::parse(DigestFunction::Blake3, &hash, 7).unwrap();
        let parsed = Subject::parse(&format!("{hash}/7"), Some(DigestFunction::Blake3));
        assert_eq!(parsed, Ok(Subject::Action(blake3)));
        let name = "main/operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        assert_eq!(parse(name), Ok(Subject::Operation(name.into())));
        assert_eq!(parse("operations/17"), Ok(Subject::Operation("operations/17".into())));
        assert!(matches!(parse(&hash), Err(Error::Invalid(text)) if text.contains("HASH/SIZE")));
        assert!(matches!(parse("abc"), Err(Error::Invalid(text)) if text.contains("too short")));
        assert!(matches!(parse("abc/7"), Err(Error::Invalid(text)) if text.contains("3 characters")));
    }
}
