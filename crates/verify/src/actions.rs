//! Actions that checks run, and the streams that answer.

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
    /// A shell command with a usual PATH and the platform of the run. The script ends with a comment of its own, so that no
    /// two checks share an action.
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

    /// The platform that `--platform` asks for.
    pub fn platform(&self) -> Option<Platform> {
        let mut properties = self.options().platform.clone();
        properties.sort_unstable();
        (!properties.is_empty()).then(|| Platform {
            properties: properties.into_iter().map(|(name, value)| Property { name, value }).collect(),
        })
    }

    /// An Action of this command over this input root, nothing stored.
    pub fn action_of(&self, command: &Blob, root: &Digest) -> Action {
        Action {
            command_digest: Some(command.digest.clone()),
            input_root_digest: Some(root.clone()),
            platform: self.platform(),
            ..Default::default()
        }
    }

    /// A stored Action that runs this command over this input root.
    ///
    /// # Errors
    /// As [`Session::store`].
    pub async fn action(&self, command: &Command, root: &Digest) -> Verdict<Digest> {
        self.action_with(command, root, |_| {}).await
    }

    /// The same with a change to the Action.
    ///
    /// # Errors
    /// As [`Session::store`].
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

    /// A stored Action that nobody else has and nobody runs, for checks of the action cache.
    ///
    /// # Errors
    /// As [`Session::store`].
    pub async fn fresh_action(&self) -> Verdict<Digest> {
        self.action(&self.shell("true", &[]), &self.empty().digest).await
    }

    /// A result with one output file, stored.
    ///
    /// # Errors
    /// As [`Session::store`].
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

    /// Execute with everything said; the operation is cancelled after the run if its end was not seen.
    ///
    /// # Errors
    /// As the server answers.
    pub async fn start(&self, request: ExecuteRequest) -> Result<Run, Status> {
        let stream = self.execution().execute(request).await?.into_inner();
        Ok(Run { stream, session: self.clone() })
    }

    /// WaitExecution.
    ///
    /// # Errors
    /// As the server answers.
    pub async fn wait(&self, name: &str) -> Result<Run, Status> {
        let request = WaitExecutionRequest { name: name.to_owned() };
        let stream = self.execution().wait_execution(request).await?.into_inner();
        Ok(Run { stream, session: self.clone() })
    }

    /// Executes to the end.
    ///
    /// # Errors
    /// A failure when there is no response.
    pub async fn execute(&self, action: &Digest) -> Verdict<ExecuteResponse> {
        let run = self.start(self.execute_request(action)).await.wanted("Execute is accepted")?;
        run.finish().await
    }

    /// Executes a command over an empty root; it has to have run, with whatever exit code.
    ///
    /// # Errors
    /// A failure when it could not be run.
    pub async fn run_command(&self, command: &Command) -> Verdict<ActionResult> {
        let action = self.action(command, &self.empty().digest).await?;
        result_of(self.execute(&action).await?)
    }
}

/// The result in a response that has to be OK.
///
/// # Errors
/// A failure when the status is not OK; needs EXE-08 when the result is not there.
pub fn result_of(response: ExecuteResponse) -> Verdict<ActionResult> {
    inline("ExecuteResponse.status", response.status.as_ref(), &[Code::Ok])?;
    response.result.ok_or_else(|| fail("ExecuteResponse.result is set", "it is not set")).needs("EXE-08")
}

/// A stream of operations.
#[derive(Debug)]
pub struct Run {
    stream: Streaming<Operation>,
    session: Session,
}

impl Run {
    /// The next message; `None` at an end with OK.
    ///
    /// # Errors
    /// A failure when the stream ends otherwise.
    pub async fn next(&mut self) -> Verdict<Option<Operation>> {
        self.message().await.control("the operation stream goes on")
    }

    /// The same with the status as it came.
    ///
    /// # Errors
    /// As the server answers.
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

    /// The status with which the stream ends, if that is an error and comes before any message.
    pub async fn next_status(&mut self) -> Option<Status> {
        self.stream.message().await.err()
    }

    /// Reads to the first message that satisfies the condition; `what` names it.
    ///
    /// # Errors
    /// A failure when the stream ends before.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&Operation) -> bool) -> Verdict<Operation> {
        while let Some(operation) = self.next().await? {
            if condition(&operation) {
                return Ok(operation);
            }
        }
        let stop = fail(format!("a message that is {what}"), "the stream ended OK without one");
        Err(stop).needs("EXE-10")
    }

    /// Reads to the first message of the stage EXECUTING.
    ///
    /// # Errors
    /// Needs EXE-03 for a message without metadata, EXE-04 when that stage never comes.
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

    /// Reads to the response.
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
/// Needs EXE-03 when it is absent or something else.
pub fn metadata(operation: &Operation) -> Verdict<ExecuteOperationMetadata> {
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
pub fn response(operation: &Operation) -> Verdict<ExecuteResponse> {
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
