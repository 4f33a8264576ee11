//! Runs an action and follows it until it finishes, across broken connections.

use super::{
    Client, backoff,
    options::innermost,
    status::{from_message, from_status},
};
use gorego_reapi::{
    auxiliary::queue_status,
    digest::Digest,
    error::{Error, Result},
    proto::{gorego, longrunning::Operation, reapi},
};
use prost::Message;
use reapi::execution_stage::Value as Stage;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

/// Time limit for opening a stream, and again for its first message (EXE-01, EXE-12).
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// A stream that has sent a message and lives this long resets the count of failed attempts.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// How often an action is submitted again because the server has forgotten its operation.
const MAX_RERUNS: u32 = 3;
/// Type names of the messages packed in `Any`.
pub(super) const METADATA_TYPE: &str = "build.bazel.remote.execution.v2.ExecuteOperationMetadata";
const RESPONSE_TYPE: &str = "build.bazel.remote.execution.v2.ExecuteResponse";

/// The action to run. Its blobs must have been uploaded.
#[derive(Debug, Clone)]
pub struct Job {
    /// Digest of the Action message.
    pub action: Digest,
    /// Run the action even if a result is cached (EXE-17).
    pub skip_cache_lookup: bool,
    /// Actions with a lower value run sooner.
    pub priority: i32,
}

/// A change of an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecutionEvent {
    /// The operation entered this stage (EXE-04).
    Stage(Stage),
    /// The names of the log streams of a run. They can be followed while it runs and for a while after (EXE-64). Each
    /// run of the action reports its own.
    Logs(LogNames),
    /// The operation is still waiting, and the server gives the reason.
    Waiting(Box<gorego::QueueStatus>),
    /// The operation is finished. No event follows.
    Finished(Box<Finished>),
}

/// Names of the log streams of a run. A name is empty if the server does not offer the stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogNames {
    /// Resource name of standard output.
    pub stdout: String,
    /// Resource name of standard error.
    pub stderr: String,
}

/// The end of an operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// The result of the command. After a timeout it contains the partial logs (EXE-45).
    pub result: Option<reapi::ActionResult>,
    /// Whether the result came from the action cache.
    pub cached: bool,
    /// The reason why the action did not run to completion.
    pub error: Option<Error>,
    /// A message for the user; usually empty.
    pub message: String,
}

/// A running operation that this client follows.
#[derive(Debug)]
pub struct Execution {
    client: Client,
    job: Job,
    stream: Option<Streaming<Operation>>,
    name: Option<String>,
    stage: Option<Stage>,
    logs: LogNames,
    /// A further event from the latest message, returned by the next call.
    more: Option<ExecutionEvent>,
    opened_at: Instant,
    /// Whether the stream has sent a message.
    has_begun: bool,
    failures: u32,
    reruns: u32,
    finished: bool,
}

impl Client {
    /// Creates an execution of an action. Nothing is sent before the first [`Execution::next`].
    pub fn execute(&self, job: Job) -> Execution {
        Execution {
            client: self.clone(),
            job,
            stream: None,
            name: None,
            stage: None,
            logs: LogNames::default(),
            more: None,
            opened_at: Instant::now(),
            has_begun: false,
            failures: 0,
            reruns: 0,
            finished: false,
        }
    }
}

impl Execution {
    /// The name of the operation for [`Client::cancel`], once it is known.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The next change, or `None` after [`ExecutionEvent::Finished`]. A broken stream is resumed with WaitExecution. If
    /// the server has forgotten the operation, the action is submitted again. Both happen a bounded number of times.
    ///
    /// # Errors
    /// The error of the server; `Unavailable` when it cannot be reached again.
    pub async fn next(&mut self) -> Result<Option<ExecutionEvent>> {
        if let Some(event) = self.more.take() {
            return Ok(Some(event));
        }
        while !self.finished {
            match self.message().await {
                Ok(operation) => {
                    if let Some(event) = self.take(operation)? {
                        return Ok(Some(event));
                    }
                }
                Err(error) => {
                    self.stream = None;
                    let stable =
                        std::mem::take(&mut self.has_begun) && self.opened_at.elapsed() >= STABLE_AFTER;
                    self.failures = if stable { 1 } else { self.failures + 1 };
                    match (&error, &self.name) {
                        // EXE-13: the server has forgotten the operation, for example after a restart. Submit the
                        // action again, a bounded number of times.
                        (Error::NotFound(_), Some(_)) if self.reruns < MAX_RERUNS => {
                            self.reruns += 1;
                            self.name = None;
                        }
                        _ => match backoff(&error, self.failures) {
                            Some(wait) => tokio::time::sleep(wait).await,
                            None => return Err(error),
                        },
                    }
                }
            }
        }
        Ok(None)
    }

    /// The next message of the stream. Opens the stream if necessary.
    async fn message(&mut self) -> Result<Operation> {
        let call = if self.name.is_some() { "WaitExecution" } else { "Execute" };
        let silent = |_| Error::Unavailable(format!("{call}: the server is silent"));
        if self.stream.is_none() {
            let opened = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, self.open()).await;
            self.opened_at = Instant::now();
            self.stream = Some(opened.map_err(silent)?.map_err(|status| self.explained(call, &status))?);
        }
        let broken = |why: &str| Error::Unavailable(format!("{call}: {why}"));
        let Some(stream) = &mut self.stream else { return Err(broken("the stream is closed")) };
        let message = if self.has_begun {
            stream.message().await
        } else {
            timeout_at(self.opened_at + FIRST_MESSAGE_TIMEOUT, stream.message()).await.map_err(silent)?
        };
        match message {
            Ok(Some(operation)) => {
                self.has_begun = true;
                Ok(operation)
            }
            // EXE-10: a stream that ends before the operation is done counts as broken.
            Ok(None) => Err(broken("the stream ended before the operation was done")),
            Err(status) if is_broken(&status) => Err(broken(status.message())),
            Err(status) => Err(from_status(call, &status)),
        }
    }

    /// The error of a call that opens a stream. If the connection has failed, it says so. Such a status was created
    /// here and has a cause.
    fn explained(&self, call: &str, status: &tonic::Status) -> Error {
        use std::error::Error as _;
        match (from_status(call, status), status.source()) {
            (Error::Unavailable(_), Some(cause)) => Error::Unavailable(format!(
                "{call}: the server at {} does not answer any more ({}); it was stopped, or the network has failed. Run the \
                 command again when it answers",
                self.client.endpoint,
                innermost(cause)
            )),
            (error, _) => error,
        }
    }

    async fn open(&self) -> std::result::Result<Streaming<Operation>, tonic::Status> {
        let mut client = self.client.execution();
        let answer = match &self.name {
            Some(name) => client.wait_execution(reapi::WaitExecutionRequest { name: name.clone() }).await?,
            None => {
                let priority = self.job.priority;
                let request = reapi::ExecuteRequest {
                    instance_name: self.client.instance.clone(),
                    skip_cache_lookup: self.job.skip_cache_lookup,
                    action_digest: Some(self.job.action.to_wire()),
                    execution_policy: (priority != 0).then_some(reapi::ExecutionPolicy { priority }),
                    digest_function: self.job.action.function().wire().into(),
                    inline_stdout: true,
                    inline_stderr: true,
                    ..Default::default()
                };
                client.execute(request).await?
            }
        };
        Ok(answer.into_inner())
    }

    /// The event for the new information in a message.
    fn take(&mut self, operation: Operation) -> Result<Option<ExecutionEvent>> {
        if !operation.name.is_empty() {
            self.name = Some(operation.name);
        }
        if operation.done {
            self.finished = true;
            return finished(operation.result)
                .map(|finished| Some(ExecutionEvent::Finished(Box::new(finished))));
        }
        let metadata =
            operation.metadata.and_then(|any| unpack::<reapi::ExecuteOperationMetadata>(&any, METADATA_TYPE));
        let Some(metadata) = metadata else { return Ok(None) };
        let stage = Some(metadata.stage());
        let changed = stage.filter(|stage| *stage != Stage::Unknown && self.stage != Some(*stage));
        self.stage = changed.or(self.stage);
        let known = metadata.partial_execution_metadata.as_ref();
        // Why the operation waits, if the server is goREgo.
        let status = known.and_then(|known| queue_status(&known.auxiliary_metadata));
        if let Some(status) = status.filter(|_| stage == Some(Stage::Queued)) {
            return Ok(Some(ExecutionEvent::Waiting(Box::new(status))));
        }
        let logs = LogNames { stdout: metadata.stdout_stream_name, stderr: metadata.stderr_stream_name };
        if logs != LogNames::default() && logs != self.logs {
            self.logs = logs.clone();
            self.more = Some(ExecutionEvent::Logs(logs));
        }
        Ok(changed.map(ExecutionEvent::Stage).or_else(|| self.more.take()))
    }
}

/// Whether a status means a broken connection, so that the operation may still be running.
fn is_broken(status: &tonic::Status) -> bool {
    use std::error::Error as _;
    matches!(status.code(), tonic::Code::Unavailable) || status.source().is_some()
}

pub(super) fn unpack<M: Message + Default>(any: &prost_types::Any, name: &str) -> Option<M> {
    (any.type_url.rsplit('/').next() == Some(name)).then(|| M::decode(any.value.as_slice()).ok())?
}

/// The end in a finished operation.
pub(super) fn finished(
    result: Option<gorego_reapi::proto::longrunning::operation::Result>,
) -> Result<Finished> {
    use gorego_reapi::proto::longrunning::operation::Result as Wire;
    let malformed = || Error::Internal("the server sent a finished operation without a response".into());
    match result {
        Some(Wire::Response(any)) => {
            let response: reapi::ExecuteResponse = unpack(&any, RESPONSE_TYPE).ok_or_else(malformed)?;
            Ok(Finished {
                error: from_message("Execute", response.status.as_ref()),
                result: response.result,
                cached: response.cached_result,
                message: response.message,
            })
        }
        // EXE-07 forbids this, but some servers do it.
        Some(Wire::Error(status)) => match from_message("Execute", Some(&status)) {
            Some(error) => {
                Ok(Finished { result: None, cached: false, error: Some(error), message: String::new() })
            }
            None => Err(malformed()),
        },
        None => Err(malformed()),
    }
}
