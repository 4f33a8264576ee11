//! The google.longrunning Operations service: Get, List, Cancel, Delete, Wait.

use super::{
    Edge,
    convert::{self, Detail},
    filter::{self, Filter},
    inline, operation_stream, page_token,
};
use crate::{
    access::{audit::TARGET, permission::Permission, principal::Principal},
    actors::scheduler::{
        messages::{Cancel, Forget, ListOperations, OperationFilter},
        operation::{OperationInfo, Snapshot, Subscription},
    },
    call::Call,
    grpc::services::operations_server::Operations,
    instance::Instance,
    logging::Event,
};
use gorego_reapi::{
    duration,
    error::{Error, Result},
    escape::shown,
    proto::longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        ListOperationsResponse, Operation, WaitOperationRequest,
    },
};
use prost::Message as _;
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status};

/// Default number of operations in a page.
pub(crate) const DEFAULT_PAGE_SIZE: usize = 100;
/// Largest number of operations in a page.
pub(crate) const MAX_PAGE_SIZE: usize = 1_000;
/// Default time limit of WaitOperation, below the idle timeouts of common proxies.
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Largest time limit of WaitOperation.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(10 * 60);
/// The audit event of a change to an operation of another principal.
const OPERATION_ADMINISTERED: &str = "operation_administered";
/// Size of a response without its operations: page token and framing, rounded up.
const RESPONSE_ENVELOPE_BYTES: usize = 1024;

#[derive(Debug)]
pub(crate) struct OperationsService(pub Arc<Edge>);

#[tonic::async_trait]
impl Operations for OperationsService {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let call = Call::of(request.extensions());
        let enter = |name: &str| {
            let instance = self.0.gate.enter(&call, name)?;
            let sees_all = call.principal().may(name, Permission::OperationsAll);
            Ok((instance, (!sees_all).then(|| call.principal().clone())))
        };
        let listing = Listing::decode(enter, request.get_ref())?;
        call.reserve(inline::MESSAGE_MAX_BYTES).await?;
        let mut limit = listing.limit;
        loop {
            let page = self.0.scheduler()?.list(listing.message(limit)).await?;
            let mut operations: Vec<Operation> = Vec::new();
            let mut left = inline::MESSAGE_MAX_BYTES - RESPONSE_ENVELOPE_BYTES;
            for (info, snapshot) in &page.operations {
                self.0.tell_logs(&call, info, snapshot);
                let result = snapshot.outcome.as_ref().and_then(|outcome| outcome.result.as_deref());
                let operation = convert::operation(info, snapshot, result.cloned(), Detail::Full);
                let rest = left.checked_sub(operation.encoded_len() + 8);
                if rest.is_none() && !operations.is_empty() {
                    break;
                }
                left = rest.unwrap_or(0);
                operations.push(operation);
            }
            // Results can be long. If a page does not fit into a message, it is requested again with as many operations
            // as fit (GEN-25). This avoids a thousand copies of long results.
            if operations.len() < page.operations.len() {
                limit = operations.len();
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
        let call = Call::of(request.extensions());
        let subscription = self.watch(&call, &request.get_ref().name).await?;
        let (info, snapshot) = operation_stream::current(&subscription);
        Ok(Response::new(self.answer(&info, snapshot, &call).await?))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let call = Call::of(request.extensions());
        let info = self.0.watch(&call, &request.get_ref().name).await?.info.clone();
        self.0.scheduler()?.forget(Forget { instance: info.instance.clone(), id: info.id }).await?;
        audit(&call, "DeleteOperation", &info);
        Ok(Response::new(()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let call = Call::of(request.extensions());
        let info = self.0.watch(&call, &request.get_ref().name).await?.info.clone();
        self.0.scheduler()?.cancel(Cancel { instance: info.instance.clone(), id: info.id }).await?;
        audit(&call, "CancelOperation", &info);
        Ok(Response::new(()))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let limit = wait_limit(request.get_ref().timeout.as_ref())?;
        let call = Call::of(request.extensions());
        let mut subscription = self.watch(&call, &request.get_ref().name).await?;
        let snapshot = operation_stream::settle(&mut subscription, limit).await?;
        Ok(Response::new(self.answer(&subscription.info, snapshot, &call).await?))
    }
}

/// Logs that a request has changed an operation of another principal. Changes to one's own operations are not logged.
fn audit(call: &Call, method: &str, info: &OperationInfo) {
    let (principal, owner) = (call.principal(), &info.principal);
    if owner.is_same(principal) {
        return;
    }
    let peer = call.peer().map(|peer| peer.to_string());
    Event::info(TARGET, OPERATION_ADMINISTERED)
        .with("method", method)
        .with("principal", principal.name())
        .with("owner", owner.name())
        .with("operation", &*info.name())
        .with_some("peer", peer.as_deref())
        .log(format_args!("{principal} called {method} on an operation of {owner}"));
}

impl OperationsService {
    async fn watch(&self, call: &Call, name: &str) -> Result<Subscription> {
        let subscription = self.0.watch(call, name).await?;
        call.note_action(subscription.info.action);
        Ok(subscription)
    }

    async fn answer(&self, info: &OperationInfo, mut snapshot: Snapshot, call: &Call) -> Result<Operation> {
        operation_stream::explain(self.0.scheduler()?, info, &mut snapshot).await;
        operation_stream::encode(&self.0, info, &snapshot, Detail::Short, call).await
    }
}

/// The instance whose operations are listed: `[instance/]operations`, or the instance name alone, which BuildGrid's
/// `bgd` sends, also with a slash at the end. `None` for the empty name.
fn collection(name: &str) -> Option<&str> {
    let name = name.strip_suffix('/').unwrap_or(name);
    (!name.is_empty()).then(|| convert::operations_of(name).unwrap_or(name))
}

/// An instance, and the owner whose operations are listed; `None` for all owners.
type ListedOperations = (Instance, Option<Principal>);

/// A checked ListOperations request.
struct Listing {
    instance: Instance,
    filter: OperationFilter,
    after: u64,
    limit: usize,
    /// The binding of the page tokens of this listing.
    binding: String,
}

impl Listing {
    /// A listing covers one instance (GEN-15): the one in the name of the collection, otherwise the one in the filter,
    /// otherwise the default one.
    fn decode(
        enter: impl FnOnce(&str) -> Result<ListedOperations>,
        request: &ListOperationsRequest,
    ) -> Result<Self> {
        let Filter { instance, operations: mut filter } = filter::parse(&request.filter)?;
        let (instance, owner) = match (collection(&request.name), &instance) {
            (Some(named), Some(wanted)) if named != wanted => {
                return Err(Error::Invalid(format!(
                    "the name has instance \"{}\", but the filter has instance \"{}\"; a listing covers one instance",
                    shown(named),
                    shown(wanted)
                )));
            }
            (Some(named), _) => enter(named).map_err(|error| match error {
                Error::Invalid(problem) => Error::Invalid(format!(
                    "name: {problem}; the forms are [instance/]operations and instance"
                )),
                other => other,
            })?,
            (None, wanted) => enter(wanted.as_deref().unwrap_or_default())?,
        };
        filter.owner = owner;
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
    let limit = duration::from_wire(timeout);
    let limit = limit.ok_or_else(|| Error::invalid("timeout is negative or not a valid duration"))?;
    Ok(limit.min(MAX_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instances;

    fn decode(request: ListOperationsRequest) -> Result<Listing> {
        let instances = Instances::new(["", "a/b"]).unwrap();
        Listing::decode(|name| Ok((instances.get(name)?, None)), &request)
    }

    #[test]
    fn a_collection_is_named_by_its_instance_or_in_the_filter() {
        let decode = |name: &str, filter: &str| {
            decode(ListOperationsRequest { name: name.into(), filter: filter.into(), ..Default::default() })
        };
        for (name, filter, instance) in [
            ("", "", ""),
            ("operations", "", ""),
            ("operations", "instance=\"\"", ""),
            ("a/b/operations", "", "a/b"),
            ("a/b/operations", "instance=a/b", "a/b"),
            ("a/b", "", "a/b"),
            ("a/b/", "", "a/b"),
            ("a/b", "instance=a/b", "a/b"),
            ("", "done=true instance=\"a/b\"", "a/b"),
        ] {
            assert_eq!(decode(name, filter).unwrap().instance.name(), instance);
        }
        for (name, filter) in [
            ("a", ""),
            ("a/b//", ""),
            ("a/b", "instance=\"\""),
            ("nope/operations", ""),
            ("/operations", ""),
            ("operations/1", ""),
            ("operations", "instance=a/b"),
            ("a/b/operations", "instance=\"\""),
            ("", "instance=nope"),
        ] {
            assert!(decode(name, filter).is_err(), "{name} {filter}");
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
