//! Faults of google.longrunning.Operations.

use super::{
    Fault,
    change::{self, answer, change_response, code, exchange, failure, instead, response},
    fault,
    proxy::Upstream,
};
use gorego_client::stubs::OperationsClient;
use gorego_reapi::proto::{
    longrunning::{
        CancelOperationRequest, GetOperationRequest, ListOperationsRequest, Operation, WaitOperationRequest,
        operation,
    },
    rpc,
};
use prost::Message as _;
use tonic::{Code, Status};

pub(crate) fn faults() -> Vec<Fault> {
    vec![
        fault("GetOperation has another name", &["OPS-01"], {
            response::<Operation>("GetOperation", |operation| operation.name.push('x'))
        }),
        fault("GetOperation never sees the end", &["OPS-01"], {
            response::<Operation>("GetOperation", |operation| {
                operation.done = false;
                operation.result = None;
            })
        }),
        fault("GetOperation has no metadata", &["OPS-01"], {
            response::<Operation>("GetOperation", |operation| operation.metadata = None)
        }),
        fault("GetOperation knows every name", &["OPS-01"], {
            failure("GetOperation", |status| match status.code() {
                Code::NotFound => Ok(Some(Operation::default().encode_to_vec().into())),
                _ => Err(status),
            })
        }),
        fault("ListOperations is an internal error", &["OPS-02"], {
            instead("ListOperations", |_, _| async { Err(Status::internal("not today")) })
        }),
        fault("DeleteOperation is an unknown error", &["OPS-02"], {
            instead("DeleteOperation", |_, _| async { Err(Status::unknown("not today")) })
        }),
        fault("CancelOperation does nothing", &["OPS-03"], answer("CancelOperation", ())),
        fault("a cancelled operation has an error", &["OPS-03"], {
            change::operation(|operation| {
                let mut cancelled = None;
                change_response(operation, |response| {
                    cancelled = response.status.clone().filter(|status| status.code == 1);
                });
                if let Some(status) = cancelled {
                    operation.result = Some(operation::Result::Error(status));
                }
            })
        }),
        fault("a cancelled operation has succeeded", &["OPS-03"], {
            change::execute_response(|response| {
                if response.status.as_ref().is_some_and(|status| status.code == 1) {
                    response.status = Some(rpc::Status::default());
                    response.result.get_or_insert_default();
                }
            })
        }),
        fault("any name can be cancelled", &["OPS-03"], {
            failure("CancelOperation", |_| Ok(Some(().encode_to_vec().into())))
        }),
        fault("cancelling what has ended is an error", &["OPS-03"], {
            instead("CancelOperation", |call, upstream| async move {
                let (asked, call) = change::read_request::<CancelOperationRequest>(call).await?;
                let mut client = OperationsClient::new(upstream.0.clone());
                let request = GetOperationRequest { name: asked.name };
                if client.get_operation(request).await?.into_inner().done {
                    return Err(Status::failed_precondition("it has ended"));
                }
                upstream.forward(call).await
            })
        }),
        fault("WaitOperation does not wait", &["OPS-05"], {
            change::request::<WaitOperationRequest>("WaitOperation", |asked| {
                asked.timeout = Some(prost_types::Duration { seconds: 0, nanos: 1 });
            })
        }),
        fault("WaitOperation waits for the end, whatever the timeout", &["OPS-05"], {
            change::request::<WaitOperationRequest>("WaitOperation", |asked| {
                asked.timeout = Some(prost_types::Duration { seconds: 60, nanos: 0 });
            })
        }),
        fault("WaitOperation fails when time is up", &["OPS-05"], {
            exchange::<WaitOperationRequest, Operation>("WaitOperation", |_, answer| {
                let operation = answer?;
                match operation.done {
                    true => Ok(operation),
                    false => Err(Status::deadline_exceeded("it goes on")),
                }
            })
        }),
        fault("a merged run ends with the first cancel", &["OPS-04"], {
            instead("CancelOperation", |call, upstream| async move {
                let (asked, call) = change::read_request::<CancelOperationRequest>(call).await?;
                cancel_all_of_its_action(&upstream, &asked.name).await;
                upstream.forward(call).await
            })
        }),
        fault("an unknown operation is an internal error", &["OPS-01"], {
            code("GetOperation", Code::NotFound, Code::Internal)
        }),
    ]
}

/// Cancels every operation of the same action, like a server that does not count waiting clients.
pub(crate) async fn cancel_all_of_its_action(upstream: &Upstream, name: &str) {
    let mut client = OperationsClient::new(upstream.0.clone());
    let action = |mut operation: Operation| {
        let mut digest = None;
        change::change_metadata(&mut operation, |metadata| digest = metadata.action_digest.clone());
        digest
    };
    let Ok(its) = client.get_operation(GetOperationRequest { name: name.to_owned() }).await else { return };
    let its = action(its.into_inner());
    let running =
        ListOperationsRequest { filter: "done=false".into(), page_size: 1000, ..Default::default() };
    let Ok(running) = client.list_operations(running).await else { return };
    for kin in running.into_inner().operations {
        if action(kin.clone()) == its {
            let _ = client.cancel_operation(CancelOperationRequest { name: kin.name }).await;
        }
    }
}
