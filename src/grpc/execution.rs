//! The Execution service: Execute and WaitExecution.

use super::{Edge, OperationStream, ask::Scheduler, convert, operation_stream};
use crate::{
    actors::{
        cas::resolve::Resolution,
        scheduler::{
            messages::{Admit, Submit},
            operation::{Inline, Subscription},
        },
    },
    call::Call,
    gate::Gate,
    grpc::services::execution_server::Execution,
};
use futures::StreamExt as _;
use gorego_reapi::{
    error::Error,
    proto::reapi::{ExecuteRequest, WaitExecutionRequest},
};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Memory limit of the list of files to inline, in bytes. An operation keeps its list until the operation is forgotten.
/// Clients name one or two files. Inlining is optional, so names beyond the limit are dropped.
const INLINE_LIST_MAX_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub(crate) struct ExecutionService(pub Arc<Edge>);

#[tonic::async_trait]
impl Execution for ExecutionService {
    type ExecuteStream = OperationStream;
    type WaitExecutionStream = OperationStream;

    async fn execute(&self, request: Request<ExecuteRequest>) -> Result<Response<OperationStream>, Status> {
        let call = Call::of(request.extensions());
        let scheduler = self.0.scheduler()?;
        let submit = submission(&self.0.gate, &call, request.into_inner())?;
        call.note_action(submit.action);
        let Submit { instance, action, skip_cache_lookup, caller, principal, .. } = &submit;
        // A missing or malformed action is not an error of the call. It is reported inside a final Operation, where
        // every client finds the list of missing blobs. One client drops the details of a call's status (EXE-25).
        let cas = self.0.cas.working_for(*caller).for_build(call.build());
        let resolution = cas.resolve_action(instance, *action, *skip_cache_lookup, principal.name()).await?;
        match &resolution {
            Resolution::Cached(_) => call.note_cached(true),
            Resolution::Run(_) if !skip_cache_lookup => call.note_cached(false),
            Resolution::Run(_) | Resolution::Unusable(_) => {}
        }
        let subscription = match resolution {
            Resolution::Cached(mut result) => {
                // The scheduler accounts for the memory of the operation. This request keeps the room of the result
                // until it has reserved room for its answer.
                call.hold(result.take_room());
                scheduler.record(submit, result).await?
            }
            resolution => scheduler.admit(Admit { submit, resolution }).await?,
        };
        call.note_operation(subscription.info.id);
        Ok(self.stream(scheduler, subscription, call))
    }

    async fn wait_execution(
        &self,
        request: Request<WaitExecutionRequest>,
    ) -> Result<Response<OperationStream>, Status> {
        let call = Call::of(request.extensions());
        let scheduler = self.0.scheduler()?;
        let subscription = self.0.watch(&call, &request.get_ref().name).await?;
        call.note_action(subscription.info.action);
        Ok(self.stream(scheduler, subscription, call))
    }
}

impl ExecutionService {
    fn stream(
        &self,
        scheduler: &Scheduler,
        subscription: Subscription,
        call: Call,
    ) -> Response<OperationStream> {
        let stream = operation_stream::follow(self.0.clone(), scheduler.clone(), subscription, call);
        Response::new(stream.boxed())
    }
}

/// Converts an Execute request to a message for the scheduler.
fn submission(gate: &Gate, call: &Call, request: ExecuteRequest) -> Result<Submit, Error> {
    let instance = gate.enter(call, &request.instance_name)?;
    let (function, action) = (request.digest_function, request.action_digest.as_ref());
    Ok(Submit {
        action: convert::digest(&instance, function, action, "action_digest")?,
        instance,
        skip_cache_lookup: request.skip_cache_lookup,
        priority: request.execution_policy.map_or(0, |policy| policy.priority),
        inline: Inline {
            stdout: request.inline_stdout,
            stderr: request.inline_stderr,
            output_files: within_bounds(request.inline_output_files),
        },
        client: call.client().clone(),
        caller: call.caller(),
        principal: call.principal().clone(),
        limits: gate.operation_limits(call),
    })
}

/// The first files of a list, up to the memory limit.
fn within_bounds(mut files: Vec<String>) -> Vec<String> {
    let mut left = INLINE_LIST_MAX_BYTES;
    let fits = files.iter().position(|file| {
        let rest = left.checked_sub(file.len().saturating_add(size_of::<String>()));
        rest.is_none_or(|rest| {
            left = rest;
            false
        })
    });
    files.truncate(fits.unwrap_or(files.len()));
    files.shrink_to_fit();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_keeps_a_bounded_list_of_files_to_inline() {
        let usual: Vec<_> = (0..100).map(|n| format!("bazel-out/bin/pkg/file-{n}.d")).collect();
        assert_eq!(within_bounds(usual.clone()), usual);
        for text in ["", "path", &"p".repeat(4096)] {
            let kept = within_bounds(vec![text.to_owned(); 100_000]);
            let bytes = kept.capacity() * size_of::<String>() + kept.len() * text.len();
            assert!(!kept.is_empty() && bytes <= INLINE_LIST_MAX_BYTES, "{} of {}", kept.len(), text.len());
        }
    }
}
