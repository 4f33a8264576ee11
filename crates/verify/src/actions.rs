//! The actions that checks run, and the operation streams that answer them.

use super::{
    blob::Blob,
    check::{Answer as _, Step as _, Verdict, fail, inline},
    session::Session,
};
use gorego_reapi::proto::{
    longrunning::{Operation, operation},
    reapi::{
        Action, ActionResult, Command, Digest, ExecuteOperationMetadata, ExecuteRequest, ExecuteResponse,
        OutputFile, Platform, WaitExecutionRequest, command::EnvironmentVariable,
        execution_stage::Value as Stage, platform::Property,
    },
};
use prost::Message as _;
use tonic::{Code, Status, Streaming};

impl Session {
    /// A shell command with a standard PATH and the platform of the run. A unique comment at the end of the script
    /// makes sure that no two checks share an action.
    pub fn shell(&self, script: &str, output_paths: &[&str]) -> Command {
        let platform = self.platform();
        #[allow(deprecated)]
        Command {
            arguments: vec![
                "/bin/sh".into(),
                "-c".into(),
                format!("{script}\n# gorego verify {}", self.word()),
            ],
            environment_variables: vec![EnvironmentVariable {
                name: "PATH".into(),
                value: "/usr/local/bin:/usr/bin:/bin".into(),
            }],
            output_paths: output_paths.iter().map(|path| (*path).to_owned()).collect(),
            platform,
            ..Default::default()
        }
    }

    /// The platform of `--platform`.
    pub fn platform(&self) -> Option<Platform> {
        let mut properties = self.options().platform.clone();
        properties.sort_unstable();
        (!properties.is_empty()).then(|| Platform {
            properties: properties.into_iter().map(|(name, value)| Property { name, value }).collect(),
        })
    }

    /// An Action for this command and input root. Nothing is stored.
    pub fn action_of(&self, command: &Blob, root: &Digest) -> Action {
        Action {
            command_digest: Some(command.digest.clone()),
            input_root_digest: Some(root.clone()),
            platform: self.platform(),
            ..Default::default()
        }
    }

    /// Stores an Action for this command and input root.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn action(&self, command: &Command, root: &Digest) -> Verdict<Digest> {
        self.action_with(command, root, |_| {}).await
    }

    /// Like [`Session::action`], with a change to the Action.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn action_with(
        &self,
        command: &Command,
        root: &Digest,
        change: impl FnOnce(&mut Action),
    ) -> Verdict<Digest> {
        let command = self.message(command);
        let mut action = self.action_of(&command, root);
        change(&mut action);
        let action = self.message(&action);
        self.store(&[&command, &action]).await?;
        Ok(action.digest)
    }

    /// Stores a unique Action that is never run, for checks of the action cache.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn fresh_action(&self) -> Verdict<Digest> {
        self.action(&self.shell("true", &[]), &self.empty().digest).await
    }

    /// A result with one output file, which is stored.
    ///
    /// # Errors
    /// See [`Session::store`].
    pub async fn a_result(&self) -> Verdict<ActionResult> {
        let output = self.stored(100).await?;
        let file = OutputFile { path: "out".into(), digest: Some(output.digest), ..Default::default() };
        Ok(ActionResult { output_files: vec![file], ..Default::default() })
    }

    /// An Execute request for this action.
    pub fn execute_request(&self, action: &Digest) -> ExecuteRequest {
        ExecuteRequest {
            instance_name: self.instance(),
            action_digest: Some(action.clone()),
            digest_function: self.function_number(),
            ..Default::default()
        }
    }

    /// Sends an Execute request. If the end of the operation was not seen, it is cancelled after the run.
    ///
    /// # Errors
    /// The status of the server.
    pub async fn start(&self, request: ExecuteRequest) -> Result<OperationStream, Status> {
        let stream = self.execution().execute(request).await?.into_inner();
        Ok(OperationStream { stream, session: self.clone() })
    }

    /// Sends a WaitExecution request.
    ///
    /// # Errors
    /// The status of the server.
    pub async fn wait(&self, name: &str) -> Result<OperationStream, Status> {
        let request = WaitExecutionRequest { name: name.to_owned() };
        let stream = self.execution().wait_execution(request).await?.into_inner();
        Ok(OperationStream { stream, session: self.clone() })
    }

    /// Executes an action and waits for its response.
    ///
    /// # Errors
    /// A failure when there is no response.
    pub async fn execute(&self, action: &Digest) -> Verdict<ExecuteResponse> {
        let run = self.start(self.execute_request(action)).await.wanted("Execute is accepted")?;
        run.finish().await
    }

    /// Executes a command with an empty input root. It must have run, with any exit code.
    ///
    /// # Errors
    /// A failure when it could not be run.
    pub async fn run_command(&self, command: &Command) -> Verdict<ActionResult> {
        let action = self.action(command, &self.empty().digest).await?;
        result_of(self.execute(&action).await?)
    }
}

/// The result in a response that must be OK.
///
/// # Errors
/// A failure when the status is not OK. Needs EXE-08 when there is no result.
pub(crate) fn result_of(response: ExecuteResponse) -> Verdict<ActionResult> {
    inline("ExecuteResponse.status", response.status.as_ref(), &[Code::Ok])?;
    response.result.ok_or_else(|| fail("ExecuteResponse.result is set", "it is not set")).needs("EXE-08")
}

/// A stream of operations.
#[derive(Debug)]
pub struct OperationStream {
    stream: Streaming<Operation>,
    session: Session,
}

impl OperationStream {
    /// The next message; `None` when the stream ends with OK.
    ///
    /// # Errors
    /// A failure when the stream ends with an error.
    pub async fn next(&mut self) -> Verdict<Option<Operation>> {
        self.message().await.control("the operation stream goes on")
    }

    /// Like [`OperationStream::next`], with the status of the server.
    ///
    /// # Errors
    /// The status of the server.
    pub async fn message(&mut self) -> Result<Option<Operation>, Status> {
        let operation = self.stream.message().await?;
        if let Some(operation) = &operation {
            match operation.done {
                true => self.session.operation_ended(&operation.name),
                false => self.session.operation_started(&operation.name),
            }
        }
        Ok(operation)
    }

    /// The status with which the stream ends, if it is an error that comes before any message.
    pub async fn next_status(&mut self) -> Option<Status> {
        self.stream.message().await.err()
    }

    /// Reads until a message satisfies the condition; `what` names it.
    ///
    /// # Errors
    /// A failure when the stream ends before that.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&Operation) -> bool) -> Verdict<Operation> {
        while let Some(operation) = self.next().await? {
            if condition(&operation) {
                return Ok(operation);
            }
        }
        let stop = fail(format!("a message that is {what}"), "the stream ended OK without one");
        Err(stop).needs("EXE-10")
    }

    /// Reads until the stage EXECUTING.
    ///
    /// # Errors
    /// Needs EXE-03 for a message without metadata, and EXE-04 when this stage never comes.
    pub async fn until_executing(&mut self) -> Verdict<Operation> {
        while let Some(operation) = self.next().await? {
            let stage = metadata(&operation)?.stage();
            if stage == Stage::Executing {
                return Ok(operation);
            }
            if operation.done {
                break;
            }
        }
        Err(fail("a message of the stage EXECUTING", "the operation ended without one")).needs("EXE-04")
    }

    /// Reads until the response.
    ///
    /// # Errors
    /// A failure when there is none.
    pub async fn finish(mut self) -> Verdict<ExecuteResponse> {
        let last = self.until("done", |operation| operation.done).await?;
        response(&last)
    }
}

/// The metadata of an operation.
///
/// # Errors
/// Needs EXE-03 when it is absent or of another type.
pub(crate) fn metadata(operation: &Operation) -> Verdict<ExecuteOperationMetadata> {
    let what = "Operation.metadata is a packed ExecuteOperationMetadata";
    let any = operation.metadata.as_ref().ok_or_else(|| fail(what, "no metadata")).needs("EXE-03")?;
    if !any.type_url.ends_with("/build.bazel.remote.execution.v2.ExecuteOperationMetadata") {
        return Err(fail(what, &any.type_url)).needs("EXE-03");
    }
    ExecuteOperationMetadata::decode(&*any.value).map_err(|error| fail(what, error)).needs("EXE-03")
}

/// The response of a finished operation.
///
/// # Errors
/// Needs EXE-07 when there is none.
pub(crate) fn response(operation: &Operation) -> Verdict<ExecuteResponse> {
    let what = "the last Operation carries a packed ExecuteResponse";
    match &operation.result {
        Some(operation::Result::Response(any))
            if any.type_url.ends_with("/build.bazel.remote.execution.v2.ExecuteResponse") =>
        {
            ExecuteResponse::decode(&*any.value).map_err(|error| fail(what, error)).needs("EXE-07")
        }
        other => Err(fail(what, format!("{other:?}"))).needs("EXE-07"),
    }
}
