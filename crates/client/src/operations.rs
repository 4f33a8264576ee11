//! Lists operations of a server, looks them up, and waits for them.

use super::{
    Client, Finished, MAX_MESSAGE_BYTES,
    execute::{LogNames, METADATA_TYPE, finished, unpack},
    retrying,
    status::from_status,
    stubs::OperationsClient,
    timed,
};
use gorego_reapi::{
    auxiliary,
    error::{Error, Result},
    proto::{gorego, longrunning, reapi},
};
use std::time::Duration;

pub use reapi::execution_stage::Value as Stage;

/// One page of the operations of an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct OperationPage {
    /// The operations in the order of submission.
    pub operations: Vec<OperationState>,
    /// The token of the next page; empty on the last page.
    pub next_page_token: String,
}

/// An operation as a server describes it. Values that the server does not report are empty.
#[derive(Debug, Clone, PartialEq)]
pub struct OperationState {
    /// The complete name, with the instance if there is one.
    pub name: String,
    /// The stage at the time of the answer.
    pub stage: Stage,
    /// The action that it runs or ran.
    pub action: Option<reapi::Digest>,
    /// Times, worker and other metadata, as far as they are known.
    pub metadata: reapi::ExecutedActionMetadata,
    /// The request that created the operation. Only goREgo reports it, and only in lists: see
    /// [`Client::described_operation`].
    pub request: gorego::OperationRequest,
    /// Why it waits. Only goREgo reports this, and not in lists.
    pub queue: Option<gorego::QueueStatus>,
    /// The streams of the latest run.
    pub logs: LogNames,
    /// The end of the operation, if it has ended.
    pub finished: Option<Finished>,
}

impl Client {
    /// A page of the operations that match a filter, in the syntax of the server.
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn list_operations(
        &self,
        filter: &str,
        page_size: i32,
        page_token: &str,
    ) -> Result<OperationPage> {
        let request = longrunning::ListOperationsRequest {
            name: self.qualify("operations"),
            filter: filter.to_owned(),
            page_size,
            page_token: page_token.to_owned(),
            ..Default::default()
        };
        let page = retrying(async || {
            let answer = self.operations().list_operations(timed(request.clone())).await;
            answer.map_err(|status| from_status("ListOperations", &status))
        });
        let longrunning::ListOperationsResponse { operations, next_page_token, .. } =
            page.await?.into_inner();
        let operations = operations.into_iter().map(state).collect::<Result<_>>()?;
        Ok(OperationPage { operations, next_page_token })
    }

    /// Looks up an operation (OPS-01).
    ///
    /// # Errors
    /// `NotFound` if the server does not know it (any more); other errors of the server.
    pub async fn operation_state(&self, name: &str) -> Result<OperationState> {
        let request = longrunning::GetOperationRequest { name: name.to_owned() };
        let answer = retrying(async || {
            let answer = self.operations().get_operation(timed(request.clone())).await;
            answer.map_err(|status| from_status("GetOperation", &status))
        });
        state(answer.await?.into_inner())
    }

    /// Looks up an operation with the request that created it, if the server reports that.
    ///
    /// # Errors
    /// As [`Client::operation_state`].
    pub async fn described_operation(&self, name: &str) -> Result<OperationState> {
        let mut state = self.operation_state(name).await?;
        let id = name.rsplit('/').next().unwrap_or(name);
        // Other servers do not support this filter.
        if let Ok(page) = self.list_operations(&format!("operation={id}"), 1, "").await
            && let Some(listed) = page.operations.into_iter().find(|listed| listed.name == name)
        {
            state.request = listed.request;
        }
        Ok(state)
    }

    /// The state of an operation when it ends or after `limit`, whichever comes first (OPS-05).
    ///
    /// # Errors
    /// As [`Client::operation_state`].
    pub async fn wait_for_operation(&self, name: &str, limit: Duration) -> Result<OperationState> {
        let timeout = prost_types::Duration::try_from(limit).ok();
        let request = longrunning::WaitOperationRequest { name: name.to_owned(), timeout };
        let answer = retrying(async || {
            let answer = self.operations().wait_operation(timed(request.clone())).await;
            answer.map_err(|status| from_status("WaitOperation", &status))
        });
        state(answer.await?.into_inner())
    }

    /// The name of the operation with this id.
    pub fn operation_name(&self, id: &str) -> String {
        self.qualify(&format!("operations/{id}"))
    }

    fn operations(&self) -> OperationsClient<super::Service> {
        OperationsClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

fn state(operation: longrunning::Operation) -> Result<OperationState> {
    let longrunning::Operation { name, metadata, done, result } = operation;
    let metadata = metadata.and_then(|any| unpack::<reapi::ExecuteOperationMetadata>(&any, METADATA_TYPE));
    let metadata = metadata.ok_or_else(|| {
        Error::Precondition(format!("the server does not say anything about operation {name}"))
    })?;
    let stage = Stage::try_from(metadata.stage).unwrap_or_default();
    let partial = metadata.partial_execution_metadata.unwrap_or_default();
    Ok(OperationState {
        name,
        stage,
        action: metadata.action_digest,
        request: auxiliary::request(&partial.auxiliary_metadata).unwrap_or_default(),
        queue: auxiliary::queue_status(&partial.auxiliary_metadata),
        metadata: partial,
        logs: LogNames { stdout: metadata.stdout_stream_name, stderr: metadata.stderr_stream_name },
        finished: if done { Some(finished(result)?) } else { None },
    })
}
