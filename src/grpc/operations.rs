//! The google.longrunning Operations service: Get, List, Cancel, Delete, Wait.

use super::{Edge, convert, filter, inline, operation_stream, page_token, request_log::Call};
use crate::{
    actors::scheduler::{
        messages::{Cancel, Forget, ListOperations, OperationFilter, Watch},
        operation::Subscription,
    },
    error::{Error, Result},
    instance::Instance,
    proto::longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        ListOperationsResponse, Operation, WaitOperationRequest, operations_server::Operations,
    },
};
use prost::Message as _;
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status};

/// Operations in a page when the client does not say.
pub const DEFAULT_PAGE_SIZE: usize = 100;
/// Most operations in a page, whatever the client says.
pub const MAX_PAGE_SIZE: usize = 1_000;
/// How long WaitOperation waits when the client does not say; below the idle time-outs of common proxies.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest wait, whatever the client says.
pub const MAX_WAIT: Duration = Duration::from_secs(10 * 60);
/// Bytes of a response around its operations: page token and framing, rounded up.
const RESPONSE_ENVELOPE_BYTES: usize = 1024;

/// The service.
#[derive(Debug)]
pub struct OperationsService(pub Arc<Edge>);

#[tonic::async_trait]
impl Operations for OperationsService {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let call = Call::of(&request);
        let listing =
            Listing::decode(self.0.instances.get(collection(&request.get_ref().name)?)?, request.get_ref())?;
        call.instance(&listing.instance);
        let mut limit = listing.limit;
        loop {
            let page = self.0.scheduler()?.list(listing.message(limit)).await?;
            let operations: Vec<Operation> = page
                .operations
                .iter()
                .map(|(info, snapshot)| {
                    let result = snapshot.outcome.as_ref().and_then(|outcome| outcome.result.as_deref());
                    convert::operation(info, snapshot, result.cloned())
                })
                .collect();
            let bytes: usize = operations.iter().map(|operation| operation.encoded_len() + 8).sum();
            // Results can be long; a page that does not fit into a message is asked for again, half as long (GEN-25).
            if bytes > inline::MESSAGE_MAX_BYTES - RESPONSE_ENVELOPE_BYTES && operations.len() > 1 {
                limit = operations.len() / 2;
                continue;
            }
            let next_page_token = page.next.map(|after| page_token::seal(&listing.binding, after));
            return Ok(Response::new(ListOperationsResponse {
                operations,
                next_page_token: next_page_token.unwrap_or_default(),
                unreachable: Vec::new(),
            }));
        }
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let subscription = self.watch(&Call::of(&request), &request.get_ref().name).await?;
        let (info, snapshot) = operation_stream::current(&subscription);
        Ok(Response::new(operation_stream::encode(&self.0.cas, &info, &snapshot).await))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let (instance, id) = convert::operation_name(&self.0.instances, &request.get_ref().name)?;
        Call::of(&request).operation(&instance, id);
        Ok(Response::new(self.0.scheduler()?.forget(Forget { instance, id }).await?))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let (instance, id) = convert::operation_name(&self.0.instances, &request.get_ref().name)?;
        Call::of(&request).operation(&instance, id);
        Ok(Response::new(self.0.scheduler()?.cancel(Cancel { instance, id }).await?))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let limit = wait_limit(request.get_ref().timeout.as_ref())?;
        let mut subscription = self.watch(&Call::of(&request), &request.get_ref().name).await?;
        let snapshot = operation_stream::settle(&mut subscription, limit).await?;
        Ok(Response::new(operation_stream::encode(&self.0.cas, &subscription.info, &snapshot).await))
    }
}

impl OperationsService {
    async fn watch(&self, call: &Call, name: &str) -> Result<Subscription> {
        let (instance, id) = convert::operation_name(&self.0.instances, name)?;
        call.operation(&instance, id);
        let subscription = self.0.scheduler()?.watch(Watch { instance, id }).await?;
        call.action(subscription.info.action);
        Ok(subscription)
    }
}

/// The instance name in `""`, `operations` or `{instance}/operations`.
fn collection(name: &str) -> Result<&str> {
    if name.is_empty() {
        return Ok("");
    }
    convert::operations_of(name).ok_or_else(|| {
        Error::Invalid(format!(
            "name \"{}\" is malformed; the form is [instance/]operations",
            name.escape_debug()
        ))
    })
}

/// A ListOperations request, checked.
struct Listing {
    instance: Instance,
    filter: OperationFilter,
    after: u64,
    limit: usize,
    /// What page tokens of this listing are bound to.
    binding: String,
}

impl Listing {
    fn decode(instance: Instance, request: &ListOperationsRequest) -> Result<Self> {
        let filter = filter::parse(&request.filter)?;
        let binding = format!("operations of {:?} with {filter:?}", instance.name());
        let after = match request.page_token.as_str() {
            "" => 0,
            token => page_token::open(&binding, token)?,
        };
        let limit = match usize::try_from(request.page_size) {
            Ok(0) => DEFAULT_PAGE_SIZE,
            Ok(size) => size.min(MAX_PAGE_SIZE),
            Err(_) => return Err(Error::invalid("page_size is negative")),
        };
        Ok(Self { instance, filter, after, limit, binding })
    }

    fn message(&self, limit: usize) -> ListOperations {
        ListOperations {
            instance: self.instance.clone(),
            filter: self.filter.clone(),
            after: self.after,
            limit,
        }
    }
}

fn wait_limit(timeout: Option<&prost_types::Duration>) -> Result<Duration> {
    let Some(timeout) = timeout else { return Ok(DEFAULT_WAIT) };
    let limit = Duration::try_from(*timeout).map_err(|_| Error::invalid("timeout is negative"))?;
    Ok(limit.min(MAX_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instances;

    fn decode(request: ListOperationsRequest) -> Result<Listing> {
        let instances = Instances::new(["", "a/b"]).unwrap();
        Listing::decode(instances.get(collection(&request.name)?)?, &request)
    }

    #[test]
    fn a_collection_is_named_by_its_instance() {
        for (name, instance) in [("", ""), ("operations", ""), ("a/b/operations", "a/b")] {
            let listing = decode(ListOperationsRequest { name: name.into(), ..Default::default() }).unwrap();
            assert_eq!(listing.instance.name(), instance);
        }
        for name in ["a/b", "nope/operations", "/operations", "operations/1"] {
            assert!(
                decode(ListOperationsRequest { name: name.into(), ..Default::default() }).is_err(),
                "{name}"
            );
        }
    }

    #[test]
    fn page_sizes_have_a_default_and_a_bound() {
        let limit = |page_size| {
            decode(ListOperationsRequest { page_size, ..Default::default() }).map(|listing| listing.limit)
        };
        assert_eq!(limit(0), Ok(DEFAULT_PAGE_SIZE));
        assert_eq!(limit(7), Ok(7));
        assert_eq!(limit(i32::MAX), Ok(MAX_PAGE_SIZE));
        assert!(limit(-1).is_err());
    }

    #[test]
    fn a_page_token_goes_on_with_the_same_listing_only() {
        let first =
            decode(ListOperationsRequest { filter: "done=true".into(), ..Default::default() }).unwrap();
        let token = page_token::seal(&first.binding, 42);
        let next = |filter: &str, name: &str| {
            decode(ListOperationsRequest {
                filter: filter.into(),
                name: name.into(),
                page_token: token.clone(),
                ..Default::default()
            })
            .map(|listing| listing.after)
        };
        assert_eq!(next("done=true", ""), Ok(42));
        assert_eq!(next(" done=true ", "operations"), Ok(42));
        assert!(next("done=false", "").is_err());
        assert!(next("done=true", "a/b/operations").is_err());
    }

    /// OPS-05.
    #[test]
    fn waiting_is_bounded() {
        let wire = |seconds| prost_types::Duration { seconds, nanos: 0 };
        assert_eq!(wait_limit(None), Ok(DEFAULT_WAIT));
        assert_eq!(wait_limit(Some(&wire(1))), Ok(Duration::from_secs(1)));
        assert_eq!(wait_limit(Some(&wire(i64::MAX))), Ok(MAX_WAIT));
        assert!(wait_limit(Some(&wire(-1))).is_err());
    }
}
