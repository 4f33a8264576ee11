//! Jobs: unique commands with small input roots.
//!
//! Programs are `/bin/sh` and standard coreutils. A server whose workers lack them cannot be verified beyond its
//! refusals. Each [`Job`] has its own salt, so the result of another run can never answer it. Messages are built by
//! hand and not validated, because some checks need invalid ones.
//!
//! Before the first action, the suite finds out whether the server runs actions at all ([`Session::runs_actions`]). If
//! it does not, checks that need a result are skipped with the reason.

use super::{
    actions::{OperationStream, response, result_of},
    blob::Blob,
    check::{Answer as _, Step as _, Verdict, ensure, fail, inline, show, show_inline, skipped},
    session::Session,
};
use bytes::Bytes;
use gorego_reapi::proto::{
    longrunning::{CancelOperationRequest, Operation},
    reapi::{
        Action, ActionResult, Command, Digest, Directory, DirectoryNode, ExecuteRequest, ExecuteResponse,
        FileNode, SymlinkNode, command::EnvironmentVariable,
    },
    rpc,
};
use prost::Message as _;
use std::time::Duration;
use tonic::{Code, Status};

/// PATH for the programs of checks.
pub(crate) const PATH: &str = "/usr/bin:/bin";
/// Time limit for the end of a stream after its last message (EXE-05); far more than a server needs.
pub(crate) const END_LIMIT: Duration = Duration::from_secs(5);
/// How long the first action may wait for a worker before the server counts as having none.
const FIRST_ACTION_LIMIT: Duration = Duration::from_secs(20);
/// Exit codes by which shells and servers report that a program cannot be started (EXE-42).
pub(crate) const NOT_STARTED: [i32; 2] = [126, 127];

/// An action under construction, with every blob that it needs.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    session: Session,
    /// The command. Changes to it change the digest of the Action.
    pub command: Command,
    /// The action without `command_digest`, which [`Job::blobs`] sets.
    pub action: Action,
    inputs: Vec<Blob>,
}

impl Job {
    /// Runs a shell script with an empty input root.
    pub(crate) fn sh(session: &Session, script: impl AsRef<str>) -> Self {
        Self::args(session, ["/bin/sh", "-c", script.as_ref()])
    }

    /// Runs a program with an empty input root.
    pub(crate) fn args<A: Into<String>>(session: &Session, arguments: impl IntoIterator<Item = A>) -> Self {
        let platform = session.platform();
        #[allow(deprecated)]
        let command = Command {
            arguments: arguments.into_iter().map(Into::into).collect(),
            environment_variables: vec![variable("PATH", PATH)],
            platform: platform.clone(),
            ..Default::default()
        };
        let action = Action {
            input_root_digest: Some(session.empty().digest),
            salt: session.word().into_bytes().into(),
            platform,
            ..Default::default()
        };
        Self { session: session.clone(), command, action, inputs: Vec::new() }
    }

    /// Sets the input root.
    pub(crate) fn over(self, root: &Folder) -> Self {
        let (digest, inputs) = root.blobs(&self.session);
        let mut job = self.over_blobs(inputs);
        job.action.input_root_digest = Some(digest);
        job
    }

    /// Adds blobs to upload, for input roots that are built by hand.
    pub(crate) fn over_blobs(mut self, blobs: impl IntoIterator<Item = Blob>) -> Self {
        self.inputs.extend(blobs);
        self
    }

    /// Sets the root Directory without checking it.
    pub(crate) fn over_root(self, root: &Directory, files: impl IntoIterator<Item = Blob>) -> Self {
        let blob = self.session.message(root);
        let digest = blob.digest.clone();
        let mut job = self.over_blobs(files).over_blobs([blob]);
        job.action.input_root_digest = Some(digest);
        job
    }

    pub(crate) fn outputs<P: Into<String>>(mut self, paths: impl IntoIterator<Item = P>) -> Self {
        self.command.output_paths = paths.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the working directory.
    pub(crate) fn within(mut self, working_directory: &str) -> Self {
        working_directory.clone_into(&mut self.command.working_directory);
        self
    }

    pub(crate) fn env(mut self, variables: &[(&str, &str)]) -> Self {
        let list = &mut self.command.environment_variables;
        list.extend(variables.iter().map(|(name, value)| variable(name, value)));
        list.sort_by(|a, b| a.name.cmp(&b.name));
        self
    }

    pub(crate) fn timeout(mut self, timeout: Duration) -> Self {
        self.action.timeout = timeout.try_into().ok();
        self
    }

    /// Keeps the result of the action out of the action cache (`do_not_cache`).
    pub(crate) fn uncached(mut self) -> Self {
        self.action.do_not_cache = true;
        self
    }

    pub(crate) fn command(mut self, change: impl FnOnce(&mut Command)) -> Self {
        change(&mut self.command);
        self
    }

    pub(crate) fn action(mut self, change: impl FnOnce(&mut Action)) -> Self {
        change(&mut self.action);
        self
    }

    /// The session in which the job runs.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn command_blob(&self) -> Blob {
        self.session.message(&self.command)
    }

    pub(crate) fn action_blob(&self) -> Blob {
        let command_digest = Some(self.command_blob().digest);
        self.session.message(&Action { command_digest, ..self.action.clone() })
    }

    /// The digest of the Action.
    pub(crate) fn digest(&self) -> Digest {
        self.action_blob().digest
    }

    /// All blobs that must be stored: inputs, Command, Action.
    pub(crate) fn blobs(&self) -> Vec<Blob> {
        let mut blobs = self.inputs.clone();
        blobs.extend([self.command_blob(), self.action_blob()]);
        blobs
    }

    /// Stores all blobs and returns the digest of the Action.
    ///
    /// # Errors
    /// Absent or skipped if the server does not run actions; the errors of [`Session::store`].
    pub(crate) async fn upload(&self) -> Verdict<Digest> {
        self.session.runs_actions().await?;
        self.session.store(&self.blobs().iter().collect::<Vec<_>>()).await?;
        Ok(self.digest())
    }

    /// Uploads and starts the job.
    ///
    /// # Errors
    /// See [`Job::upload`]; a failure when Execute is refused, because a trivial action has been accepted before.
    pub(crate) async fn start(&self) -> Verdict<OperationStream> {
        self.start_with(|_| {}).await
    }

    /// Like [`Job::start`], with a change to the request.
    ///
    /// # Errors
    /// See [`Job::start`].
    pub(crate) async fn start_with(
        &self,
        change: impl FnOnce(&mut ExecuteRequest),
    ) -> Verdict<OperationStream> {
        let mut request = self.session.execute_request(&self.upload().await?);
        change(&mut request);
        self.session.start(request).await.wanted("Execute is accepted")
    }

    /// Runs the job until its response.
    ///
    /// # Errors
    /// See [`Job::start`]; a failure when there is no response.
    pub(crate) async fn response(&self) -> Verdict<ExecuteResponse> {
        self.start().await?.finish().await
    }

    /// Runs the job until its result, with any exit code.
    ///
    /// # Errors
    /// See [`Job::response`]; a failure when the status is not OK.
    pub(crate) async fn result(&self) -> Verdict<ActionResult> {
        result_of(self.response().await?)
    }

    /// Runs the job, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// See [`Job::result`]; a failure for a non-zero exit code.
    pub(crate) async fn stdout(&self) -> Verdict<String> {
        let result = self.result().await?;
        let text = self.session.log_text(result.stdout_digest.as_ref(), &result.stdout_raw).await?;
        if result.exit_code != 0 {
            let stderr = self.session.log_text(result.stderr_digest.as_ref(), &result.stderr_raw).await?;
            let seen = format!("exit code {}: {stderr}{text}", result.exit_code);
            return Err(fail("the action of the check succeeds", seen));
        }
        Ok(text)
    }

    /// Runs the job and keeps all messages of the stream, which must end with OK soon after the last one.
    ///
    /// # Errors
    /// See [`Job::start`]; a failure when the stream ends differently.
    pub(crate) async fn story(&self) -> Verdict<Vec<Operation>> {
        story(self.start().await?).await
    }

    /// Executes the job, which must fail: by the status of the call or inside the response (EXE-09).
    ///
    /// # Errors
    /// See [`Job::upload`]; a failure when a command was run or the stream ends without an answer.
    pub(crate) async fn refusal(&self) -> Verdict<Refusal> {
        let action = self.upload().await?;
        self.session.refusal(&action).await
    }

    /// Executes the job, which must be refused with one of these codes; `what` names the fault in it.
    ///
    /// # Errors
    /// See [`Job::refusal`]; a failure for another code.
    pub(crate) async fn refused(&self, what: &str, codes: &[Code]) -> Verdict<Refusal> {
        let refusal = self.session.case(what, self.refusal()).await?;
        inline(what, Some(&refusal.status), codes)?;
        Ok(refusal)
    }
}

/// All messages of a stream.
///
/// # Errors
/// Unmet when it does not end with OK soon after `done` (EXE-05).
pub(crate) async fn story(mut run: OperationStream) -> Verdict<Vec<Operation>> {
    let mut messages = Vec::new();
    loop {
        let next = match messages.last() {
            Some(Operation { done: true, .. }) => {
                let end = tokio::time::timeout(END_LIMIT, run.next()).await;
                let open =
                    || fail(format!("the stream ends within {END_LIMIT:?} after done"), "it stays open");
                end.unwrap_or_else(|_| Err(open())).own().needs("EXE-05")
            }
            _ => run.next().await,
        };
        match next? {
            Some(operation) => messages.push(operation),
            None => return Ok(messages),
        }
    }
}

/// The reason why an action was not run.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The status with its details.
    pub status: rpc::Status,
    /// Whether it was inside an `ExecuteResponse`.
    pub inline: bool,
}

impl Refusal {
    /// The refusal of a call.
    pub fn of_call(status: &Status) -> Self {
        let details = rpc::Status::decode(status.details()).map(|status| status.details).unwrap_or_default();
        let status =
            rpc::Status { code: status.code() as i32, message: status.message().to_owned(), details };
        Self { status, inline: false }
    }
}

impl Session {
    /// Executes an action that must fail.
    ///
    /// # Errors
    /// See [`Job::refusal`].
    pub async fn refusal(&self, action: &Digest) -> Verdict<Refusal> {
        self.refusal_of(self.execute_request(action)).await
    }

    /// Like [`Session::refusal`], with the whole request.
    ///
    /// # Errors
    /// See [`Job::refusal`].
    pub async fn refusal_of(&self, request: ExecuteRequest) -> Verdict<Refusal> {
        self.refusal_after(request, |_| Ok(())).await
    }

    /// Like [`Session::refusal_of`], and passes each unfinished operation before the refusal to `see`.
    ///
    /// # Errors
    /// See [`Job::refusal`]; the errors of `see`.
    pub async fn refusal_after(
        &self,
        request: ExecuteRequest,
        mut see: impl FnMut(Operation) -> Verdict,
    ) -> Verdict<Refusal> {
        let mut run = match self.start(request).await {
            Ok(run) => run,
            Err(status) => return Ok(Refusal::of_call(&status)),
        };
        loop {
            match run.message().await {
                Ok(Some(operation)) if operation.done => {
                    let status = response(&operation)?.status.unwrap_or_default();
                    ensure(status.code != 0, "a refusal", "the action was run")?;
                    return Ok(Refusal { status, inline: true });
                }
                Ok(Some(operation)) => see(operation)?,
                Ok(None) => return Err(fail("a refusal", "the stream ended OK without an answer")),
                Err(status) => return Ok(Refusal::of_call(&status)),
            }
        }
    }

    /// Passes if the server runs a trivial action, which is tried once in a run.
    ///
    /// # Errors
    /// Absent when execution is not claimed; skipped when the action was refused or no worker ran it; needs CAP-08 when
    /// it failed. Malformed responses are left to the checks.
    pub async fn runs_actions(&self) -> Verdict {
        self.executes()?;
        self.first_action().get_or_init(|| self.try_first_action()).await.clone()
    }

    async fn try_first_action(&self) -> Verdict {
        const REFUSALS: [Code; 5] = [
            Code::InvalidArgument,
            Code::FailedPrecondition,
            Code::PermissionDenied,
            Code::Unauthenticated,
            Code::Unimplemented,
        ];
        let refused =
            |why: String| skipped(format!("the server does not run /bin/sh for us: {why}; see --platform"));
        // On a separate connection, because the result counts for all checks and not only for the first one.
        let s = self.reconnect().await.control()?;
        let job = Job::sh(&s, "exit 0");
        s.store(&job.blobs().iter().collect::<Vec<_>>()).await?;
        let ended = async {
            let run = s.start(s.execute_request(&job.digest())).await?;
            Ok::<_, Status>(run.finish().await)
        };
        match tokio::time::timeout(FIRST_ACTION_LIMIT, ended).await {
            Err(_) => Err(refused(format!("no worker took it within {FIRST_ACTION_LIMIT:?}"))),
            Ok(Err(status)) if REFUSALS.contains(&status.code()) => Err(refused(show(&status))),
            Ok(Err(status)) => Err(fail("a trivial action is run", show(&status))).needs("CAP-08"),
            Ok(Ok(Ok(response))) => {
                let status = response.status.unwrap_or_default();
                let code = response.result.unwrap_or_default().exit_code;
                if REFUSALS.iter().any(|refusal| *refusal as i32 == status.code) {
                    Err(refused(show_inline(&status)))
                } else if status.code != 0 {
                    Err(fail("a trivial action is run", show_inline(&status))).needs("CAP-08")
                } else if NOT_STARTED.contains(&code) {
                    Err(refused(format!("exit code {code}")))
                } else {
                    Ok(())
                }
            }
            Ok(_) => Ok(()),
        }
    }

    /// Cancels an operation of this run, so that it does not occupy a slot any longer.
    pub async fn give_up(&self, name: &str) {
        let request = CancelOperationRequest { name: name.to_owned() };
        if self.operations().cancel_operation(request).await.is_ok() {
            self.operation_ended(name);
        }
    }

    /// The content of a log in a result: the inlined bytes or the blob; empty if there is neither.
    ///
    /// # Errors
    /// A failure when the blob cannot be read.
    pub async fn log_bytes(&self, digest: Option<&Digest>, raw: &Bytes) -> Verdict<Bytes> {
        match digest {
            Some(digest) if raw.is_empty() && digest.size_bytes > 0 => {
                self.read(digest).await.needs("EXE-59", "a log of the action can be read")
            }
            _ => Ok(raw.clone()),
        }
    }

    /// Like [`Session::log_bytes`], as text.
    ///
    /// # Errors
    /// See [`Session::log_bytes`].
    pub async fn log_text(&self, digest: Option<&Digest>, raw: &Bytes) -> Verdict<String> {
        Ok(String::from_utf8_lossy(&self.log_bytes(digest, raw).await?).into_owned())
    }

    /// The standard output of an action.
    ///
    /// # Errors
    /// See [`Session::log_bytes`].
    pub async fn stdout_of(&self, result: &ActionResult) -> Verdict<String> {
        self.log_text(result.stdout_digest.as_ref(), &result.stdout_raw).await
    }
}

/// A directory of an input root.
#[derive(Debug, Clone, Default)]
pub(crate) struct Folder {
    files: Vec<(FileNode, Bytes)>,
    folders: Vec<(String, Folder)>,
    symlinks: Vec<SymlinkNode>,
}

impl Folder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn file(self, name: &str, data: impl Into<Bytes>) -> Self {
        self.node(FileNode { name: name.to_owned(), ..Default::default() }, data)
    }

    /// Adds an executable file.
    pub(crate) fn program(self, name: &str, data: impl Into<Bytes>) -> Self {
        self.node(FileNode { name: name.to_owned(), is_executable: true, ..Default::default() }, data)
    }

    /// Adds a file with this node. The digest is filled in.
    pub(crate) fn node(mut self, node: FileNode, data: impl Into<Bytes>) -> Self {
        self.files.push((node, data.into()));
        self
    }

    pub(crate) fn folder(mut self, name: &str, folder: Folder) -> Self {
        self.folders.push((name.to_owned(), folder));
        self
    }

    pub(crate) fn symlink(mut self, name: &str, target: &str) -> Self {
        let symlink = SymlinkNode { name: name.to_owned(), target: target.to_owned(), node_properties: None };
        self.symlinks.push(symlink);
        self
    }

    /// The Directory message in canonical order. Adds the blobs below it to `blobs`.
    fn directory(&self, session: &Session, blobs: &mut Vec<Blob>) -> Directory {
        let mut directory = Directory { symlinks: self.symlinks.clone(), ..Default::default() };
        for (node, data) in &self.files {
            let blob = session.blob_of(data.clone());
            directory.files.push(FileNode { digest: Some(blob.digest.clone()), ..node.clone() });
            blobs.push(blob);
        }
        for (name, folder) in &self.folders {
            let blob = session.message(&folder.directory(session, blobs));
            directory
                .directories
                .push(DirectoryNode { name: name.clone(), digest: Some(blob.digest.clone()) });
            blobs.push(blob);
        }
        directory.files.sort_by(|a, b| a.name.cmp(&b.name));
        directory.directories.sort_by(|a, b| a.name.cmp(&b.name));
        directory.symlinks.sort_by(|a, b| a.name.cmp(&b.name));
        directory
    }

    /// The digest of the root, and all blobs. Empty blobs are omitted, as clients do (GEN-06).
    pub(crate) fn blobs(&self, session: &Session) -> (Digest, Vec<Blob>) {
        let mut blobs = Vec::new();
        let root = session.message(&self.directory(session, &mut blobs));
        let digest = root.digest.clone();
        blobs.push(root);
        blobs.retain(|blob| !blob.data.is_empty());
        (digest, blobs)
    }
}

pub(crate) fn variable(name: &str, value: &str) -> EnvironmentVariable {
    EnvironmentVariable { name: name.to_owned(), value: value.to_owned() }
}
