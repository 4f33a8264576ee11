//! The ActionCache service. The key is any digest: it need not name an Action, because one client stores results under
//! digests of other blobs. `GetActionResult` must not decode them.

use super::{Edge, convert, inline};
use crate::{
    actors::scheduler::operation::Inline, call::Call, grpc::services::action_cache_server::ActionCache,
};
use gorego_reapi::{
    error::Error,
    proto::reapi::{ActionResult, GetActionResultRequest, UpdateActionResultRequest},
};
use prost::Message as _;
use std::sync::Arc;
use tonic::{Request, Response, Status};

#[derive(Debug)]
pub(crate) struct ActionCacheService(pub Arc<Edge>);

#[tonic::async_trait]
impl ActionCache for ActionCacheService {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let call = Call::of(request.extensions());
        let request = request.into_inner();
        let instance = self.0.gate.enter(&call, &request.instance_name)?;
        let action = convert::digest(
            &instance,
            request.digest_function,
            request.action_digest.as_ref(),
            "action_digest",
        )?;
        call.note_action(action);
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let found = cas.get_result_for(&instance, action, call.principal().name()).await?;
        call.note_cached(found.is_some());
        let result =
            found.ok_or_else(|| Error::NotFound(format!("there is no result for action {action}")))?;
        let want = Inline {
            stdout: request.inline_stdout,
            stderr: request.inline_stderr,
            output_files: request.inline_output_files,
        };
        let result = inline::prepare(&cas, &instance, action.function(), &want, &result, &call).await?;
        Ok(Response::new(result))
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let call = Call::of(request.extensions());
        let request = request.into_inner();
        let instance = self.0.gate.enter(&call, &request.instance_name)?;
        let action = convert::digest(
            &instance,
            request.digest_function,
            request.action_digest.as_ref(),
            "action_digest",
        )?;
        call.note_action(action);
        let result = request.action_result.ok_or_else(|| Error::invalid("action_result is not set"))?;
        // The answer is the stored result.
        call.reserve_soon(result.encoded_len()).await?;
        let cas = self.0.cas.on_behalf_of(call.caller()).for_build(call.build());
        let stored = cas.put_result(&instance, action, result, call.provenance()).await?;
        Ok(Response::new(stored.into_inner()))
    }
}
