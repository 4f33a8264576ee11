//! The log lines of the scheduler: one for each [`Transition`]. All names of its events are here.

use super::{
    operation::Outcome,
    slots::SlotName,
    transition::{OperationEvent, Phases, Transition},
};
use crate::logging::{Event, Field};
use gorego_reapi::error::Error;
use log::Log;
use std::time::Duration;

/// The target of all log lines of the scheduler.
pub(crate) const TARGET: &str = "gorego::scheduler";

/// An operation was admitted and waits.
pub(crate) const OPERATION_QUEUED: &str = "operation_queued";
/// A worker runs the task of an operation.
pub(crate) const OPERATION_EXECUTING: &str = "operation_executing";
/// A worker failed, or its pool was removed; the operation waits again.
pub(crate) const OPERATION_REQUEUED: &str = "operation_requeued";
/// An operation ended. This is the only line about an operation that was finished when it was admitted.
pub(crate) const OPERATION_COMPLETED: &str = "operation_completed";
/// A run neither ends nor stops, so its slot is out of service.
pub(crate) const SLOT_STUCK: &str = "slot_stuck";
/// A pool was added while the server runs.
pub(crate) const POOL_ADDED: &str = "pool_added";
/// A pool takes no more tasks.
pub(crate) const POOL_DRAINING: &str = "pool_draining";
/// A pool was removed while the server runs.
pub(crate) const POOL_REMOVED: &str = "pool_removed";
/// The scheduler takes no more work.
pub(crate) const DRAINING: &str = "scheduler_draining";

pub(crate) fn transition(transition: &Transition) {
    log_to(log::logger(), transition);
}

fn log_to(logger: &dyn Log, Transition { info, priority, event: step }: &Transition) {
    let operation = info.name();
    let mut event = match step {
        OperationEvent::Queued { .. } => Event::info(TARGET, OPERATION_QUEUED),
        OperationEvent::Executing { .. } => Event::info(TARGET, OPERATION_EXECUTING),
        OperationEvent::Requeued { .. } => Event::warn(TARGET, OPERATION_REQUEUED),
        OperationEvent::Completed { .. } => Event::info(TARGET, OPERATION_COMPLETED),
    };
    event
        .with("operation", &operation)
        .with_shown("action_digest", &info.action)
        .with("instance", info.instance.name())
        .with_said("invocation_id", &info.client.tool_invocation_id)
        .with_said("target_id", &info.client.target_id)
        .with_said("mnemonic", &info.client.action_mnemonic)
        .with("priority", *priority);
    let message = match step {
        OperationEvent::Queued { joined } => {
            event.with("joined", *joined);
            "an operation waits for a worker"
        }
        OperationEvent::Executing { place, queued_for, attempt } => {
            with_place(&mut event, place);
            event.with("queue_ms", millis(*queued_for)).with("attempt", *attempt);
            "a worker has an operation's action"
        }
        OperationEvent::Requeued { reason, attempt } => {
            event.with("attempt", *attempt).with("grpc_code", reason.code_name()).with_shown("error", reason);
            "a worker failed, an operation waits again"
        }
        OperationEvent::Completed { outcome, place, queued_for } => {
            event.with("cached", outcome.cached);
            if let Some(place) = place {
                with_place(&mut event, place);
            }
            event.with_some("queue_ms", queued_for.map(millis));
            with_outcome(&mut event, outcome);
            "an operation ended"
        }
    };
    event.log_to(logger, format_args!("{message}"));
}

fn with_place<'a>(event: &mut Event<'a>, place: &'a SlotName) {
    event.with("pool", &*place.pool).with("slot", place.slot.0);
}

fn with_outcome<'a>(event: &mut Event<'a>, outcome: &'a Outcome) {
    // The metadata of a cached result describes the run that produced it, not this operation.
    let result = outcome.result.as_ref().filter(|_| !outcome.cached);
    let phases = result.map(|result| Phases::of(result)).unwrap_or_default();
    event
        .with_some("fetch_ms", phases.fetch.map(millis))
        .with_some("run_ms", phases.run.map(millis))
        .with_some("upload_ms", phases.upload.map(millis))
        .with_some("exit_code", outcome.result.as_ref().map(|result| result.exit_code))
        .with("grpc_code", outcome.error.as_ref().map_or("OK", Error::code_name))
        .with_some("error", outcome.error.as_ref().map(|error| Field::Shown(error)));
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::{
        scheduler::{
            ledger::fixtures::{submit, work},
            operation::{OperationId, OperationInfo},
        },
        worker::messages::SlotId,
    };
    use gorego_reapi::proto::reapi;
    use log::{Record, kv::Value};
    use prost_types::Timestamp;
    use serde_json::{Map, Value as Json, json};
    use std::sync::{Arc, Mutex};

    /// Keeps the fields of the last line.
    #[derive(Default)]
    struct Last(Mutex<Map<String, Json>>);

    impl Log for Last {
        fn enabled(&self, _: &log::Metadata) -> bool {
            true
        }

        fn log(&self, record: &Record) {
            struct Fields<'a>(&'a mut Map<String, Json>);
            impl<'kvs> log::kv::VisitSource<'kvs> for Fields<'_> {
                fn visit_pair(
                    &mut self,
                    key: log::kv::Key<'kvs>,
                    value: Value<'kvs>,
                ) -> Result<(), log::kv::Error> {
                    self.0.insert(key.to_string(), serde_json::to_value(value).unwrap());
                    Ok(())
                }
            }
            let mut fields = Map::new();
            record.key_values().visit(&mut Fields(&mut fields)).unwrap();
            *self.0.lock().unwrap() = fields;
        }

        fn flush(&self) {}
    }

    fn line(event: OperationEvent) -> Map<String, Json> {
        let submit = submit(&work(7));
        let mut client = submit.client;
        client.target_id = "//a:b".into();
        let id = OperationId::new(Default::default(), uuid::Uuid::from_u128(1));
        let (instance, action, inline) = (submit.instance, submit.action, submit.inline);
        let (peer, principal) = Default::default();
        let info = Arc::new(OperationInfo { id, instance, action, inline, client, peer, principal });
        let last = Last::default();
        log_to(&last, &Transition { info, priority: -3, event });
        last.0.into_inner().unwrap()
    }

    #[test]
    fn a_line_has_typed_fields_and_only_those_that_apply() {
        let at = |seconds, nanos| Some(Timestamp { seconds, nanos });
        let metadata = reapi::ExecutedActionMetadata {
            execution_start_timestamp: at(10, 900_000_000),
            execution_completed_timestamp: at(12, 100_000_000),
            ..Default::default()
        };
        let result =
            reapi::ActionResult { exit_code: 3, execution_metadata: Some(metadata), ..Default::default() };
        let outcome = Outcome {
            result: Some(result.into()),
            cached: false,
            error: None,
            message: String::new(),
            server_logs: Vec::new(),
        };
        let completed = |outcome: &Outcome, place, queued_for| {
            line(OperationEvent::Completed { outcome: Arc::new(outcome.clone()), place, queued_for })
        };
        let place = SlotName { pool: "local".into(), slot: SlotId(2), worker: "host/2".into() };
        let ran = completed(&outcome, Some(Arc::new(place)), Some(Duration::from_millis(15)));
        let common = json!({
            "event": "operation_completed",
            "operation": "operations/00000000-0000-0000-0000-000000000001",
            "action_digest": submit(&work(7)).action.to_string(),
            "instance": "", "target_id": "//a:b", "priority": -3, "exit_code": 3,
            "grpc_code": "OK",
        });
        let with = |more: Json| {
            let mut all = common.as_object().unwrap().clone();
            all.extend(more.as_object().unwrap().clone());
            all
        };
        let more = json!({"cached": false, "pool": "local", "slot": 2, "queue_ms": 15, "run_ms": 1200});
        assert_eq!(ran, with(more));
        let hit = completed(&Outcome { cached: true, ..outcome }, None, None);
        assert_eq!(hit, with(json!({"cached": true})), "a hit does not tell of somebody else's run");
    }
}
