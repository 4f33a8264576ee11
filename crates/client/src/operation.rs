//! Looks up an operation by its name.

use super::{
    Client, Finished,
    execute::{METADATA_TYPE, finished, unpack},
    retrying,
    status::from_status,
    stubs::OperationsClient,
    timed,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    proto::{longrunning, reapi},
};

/// The state of an operation on a server.
#[derive(Debug, Clone, PartialEq)]
pub struct OperationRecord {
    /// The action that it runs or ran.
    pub action: Digest,
    /// The end of the operation, if it has ended.
    pub finished: Option<Finished>,
}

impl Client {
    /// Looks up an operation (OPS-01).
    ///
    /// # Errors
    /// `NotFound` if the server does not know it (any more); `Precondition` if the server does not report which action
    /// it is; other errors of the server.
    pub async fn operation(&self, name: &str) -> Result<OperationRecord> {
        let request = longrunning::GetOperationRequest { name: name.to_owned() };
        let answer = retrying(async || {
            let mut client = OperationsClient::new(self.service.clone())
                .max_decoding_message_size(super::MAX_MESSAGE_BYTES);
            let answer = client.get_operation(timed(request.clone())).await;
            answer.map_err(|status| from_status("GetOperation", &status))
        })
        .await?;
        let operation = answer.into_inner();
        let metadata = operation
            .metadata
            .and_then(|any| unpack::<reapi::ExecuteOperationMetadata>(&any, METADATA_TYPE))
            .filter(|metadata| metadata.action_digest.is_some())
            .ok_or_else(|| {
                Error::Precondition(format!("the server does not say which action operation {name} runs"))
            })?;
        // Servers that do not set the function use the default of all clients.
        let function = match metadata.digest_function {
            0 => DigestFunction::infer(
                DigestFunction::ALL,
                metadata.action_digest.as_ref().map_or(0, |digest| digest.hash.len()),
            )?,
            number => DigestFunction::from_wire(number)?,
        };
        Ok(OperationRecord {
            action: Digest::from_wire(function, metadata.action_digest.as_ref(), "action_digest")?,
            finished: if operation.done { Some(finished(operation.result)?) } else { None },
        })
    }
}
