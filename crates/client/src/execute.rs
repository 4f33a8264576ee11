//! Running an action and following it to its end, also across broken connections.

use super::{
    Client, backoff,
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
use tokio::time::Instant;
use tonic::Streaming;

/// How long a server may take to send the first message of a stream (EXE-01, EXE-12).
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// A stream that lived this long was a good one: the tries of the next trouble are counted from 0.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// How often an action is run anew because the server has forgotten it.
const MAX_RERUNS: u32 = 3;
/// Names of the packed messages.
const METADATA_TYPE: &str = "build.bazel.remote.execution.v2.ExecuteOperationMetadata";
const RESPONSE_TYPE: &str = "build.bazel.remote.execution.v2.ExecuteResponse";

/// What is to be run. Its blobs must be uploaded.
#[derive(Debug, Clone)]
pub struct Job {
    /// Digest of the Action.
    pub action: Digest,
    /// Run even if a result is cached (EXE-17).
    pub skip_cache_lookup: bool,
    /// Lower runs sooner.
    pub priority: i32,
}

/// Something happened to an operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// It has entered this stage (EXE-04).
    Stage(Stage),
    /// What it prints can be followed here, while it runs and for a while after (EXE-64); comes again for another run.
    Logs(LogNames),
    /// It still waits, and the server says why.
    Waiting(Box<gorego::QueueStatus>),
    /// It is over; nothing follows.
    Finished(Box<Finished>),
}

/// Names of the log streams of a run; empty for those that the server does not offer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogNames {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// What the command left behind; also the partial logs of one that timed out (EXE-45).
    pub result: Option<reapi::ActionResult>,
    /// The result came from the action cache.
    pub cached: bool,
    /// Why the action could not be run to its end.
    pub error: Option<Error>,
    /// A word for people; usually empty.
    pub message: String,
}

/// An operation that is being followed.
#[derive(Debug)]
pub struct Execution {
    client: Client,
    job: Job,
    stream: Option<Streaming<Operation>>,
    name: Option<String>,
    stage: Option<Stage>,
    logs: LogNames,
    /// What the latest message said besides its first news.
    more: Option<Event>,
    opened_at: Instant,
    failures: u32,
    reruns: u32,
    finished: bool,
}

impl Client {
    /// Runs an action; nothing is sent before the first [`Execution::next`].
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
            failures: 0,
            reruns: 0,
            finished: false,
        }
    }
}

impl Execution {
    /// The operation's name, once known; for [`Client::cancel`].
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The next change, or `None` after [`Event::Finished`]. A stream that breaks is joined again with WaitExecution; one
    /// that the server has forgotten is run anew. Both happen a bounded number of times.
    ///
    /// # Errors
    /// The server's refusal; `Unavailable` when it cannot be reached again.
    pub async fn next(&mut self) -> Result<Option<Event>> {
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
                    let stable = self.stream.take().is_some() && self.opened_at.elapsed() >= STABLE_AFTER;
                    self.failures = if stable { 1 } else { self.failures + 1 };
                    match (&error, &self.name) {
                        // EXE-13: it was forgotten, for example by a restart. Run it again, but not for ever.
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

    /// The next message of the stream, which is opened if need be.
    async fn message(&mut self) -> Result<Operation> {
        let call = if self.name.is_some() { "WaitExecution" } else { "Execute" };
        if self.stream.is_none() {
            let opened = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, self.open()).await;
            let silent = |_| Error::Unavailable(format!("{call}: the server is silent"));
            self.opened_at = Instant::now();
            self.stream = Some(opened.map_err(silent)?.map_err(|status| from_status(call, &status))?);
        }
        let broken = |why: &str| Error::Unavailable(format!("{call}: {why}"));
        let Some(stream) = &mut self.stream else { return Err(broken("the stream is closed")) };
        match stream.message().await {
            Ok(Some(operation)) => Ok(operation),
            // EXE-10: whatever ends a stream before the operation is done is a broken stream.
            Ok(None) => Err(broken("the stream ended before the operation was done")),
            Err(status) if is_broken(&status) => Err(broken(status.message())),
            Err(status) => Err(from_status(call, &status)),
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
                    inline_stdout: true,
                    inline_stderr: true,
                    ..Default::default()
                };
                client.execute(request).await?
            }
        };
        Ok(answer.into_inner())
    }

    /// What a message says that was not known before.
    fn take(&mut self, operation: Operation) -> Result<Option<Event>> {
        if !operation.name.is_empty() {
            self.name = Some(operation.name);
        }
        if operation.done {
            self.finished = true;
            return finished(operation.result).map(|finished| Some(Event::Finished(Box::new(finished))));
        }
        let metadata =
            operation.metadata.and_then(|any| unpack::<reapi::ExecuteOperationMetadata>(&any, METADATA_TYPE));
        let Some(metadata) = metadata else { return Ok(None) };
        let stage = Some(metadata.stage());
        let changed = stage.filter(|stage| *stage != Stage::Unknown && self.stage != Some(*stage));
        self.stage = changed.or(self.stage);
        let known = metadata.partial_execution_metadata.as_ref();
        // Why the operation waits, from a server that says so in our way.
        let status = known.and_then(|known| queue_status(&known.auxiliary_metadata));
        if let Some(status) = status.filter(|_| stage == Some(Stage::Queued)) {
            return Ok(Some(Event::Waiting(Box::new(status))));
        }
        let logs = LogNames { stdout: metadata.stdout_stream_name, stderr: metadata.stderr_stream_name };
        if logs != LogNames::default() && logs != self.logs {
            self.logs = logs.clone();
            self.more = Some(Event::Logs(logs));
        }
        Ok(changed.map(Event::Stage).or_else(|| self.more.take()))
    }
}

/// Whether a status comes from the connection and not from the server's mind: then the operation may well go on.
fn is_broken(status: &tonic::Status) -> bool {
    use std::error::Error as _;
    matches!(status.code(), tonic::Code::Unavailable) || status.source().is_some()
}

fn unpack<M: Message + Default>(any: &prost_types::Any, name: &str) -> Option<M> {
    (any.type_url.rsplit('/').next() == Some(name)).then(|| M::decode(any.value.as_slice()).ok())?
}

fn finished(result: Option<gorego_reapi::proto::longrunning::operation::Result>) -> Result<Finished> {
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
