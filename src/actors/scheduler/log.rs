//! One log line per [`Transition`]. The only place where the scheduler's events and fields get their names.

use super::transition::{Event, Phases, RunPlace, Transition};
use gorego_reapi::error::Error;
use log::{
    Level, Log, Record,
    kv::{ToValue, Value},
};
use std::time::Duration;

/// The target of every line of this room.
pub const TARGET: &str = "gorego::scheduler";

/// An operation was admitted and waits.
pub const OPERATION_QUEUED: &str = "operation_queued";
/// A worker has an operation's task.
pub const OPERATION_EXECUTING: &str = "operation_executing";
/// A worker failed; the operation waits again.
pub const OPERATION_REQUEUED: &str = "operation_requeued";
/// An operation ended; the only line of a cache hit.
pub const OPERATION_COMPLETED: &str = "operation_completed";
/// A run neither ends nor stops; its slot is out of service.
pub const SLOT_STUCK: &str = "slot_stuck";
/// The scheduler takes no more work.
pub const DRAINING: &str = "scheduler_draining";

/// Logs a transition.
pub fn transition(transition: &Transition) {
    let level = match &transition.event {
        Event::Requeued { .. } => Level::Warn,
        _ => Level::Info,
    };
    if log::log_enabled!(target: TARGET, level) {
        write(transition, level, log::logger());
    }
}

fn write(transition: &Transition, level: Level, logger: &dyn Log) {
    let Transition { info, priority, event } = transition;
    let (operation, action) = (info.name(), info.action.to_string());
    let mut line = Line::default();
    line.set("operation", &operation);
    line.set("action_digest", &action);
    line.set("instance", info.instance.name());
    line.set_text("invocation_id", &info.client.tool_invocation_id);
    line.set_text("target_id", &info.client.target_id);
    line.set_text("mnemonic", &info.client.action_mnemonic);
    line.set("priority", priority);
    match event {
        Event::Queued { joined } => {
            line.set("joined", joined);
            line.write(logger, level, OPERATION_QUEUED, "an operation waits for a worker");
        }
        Event::Executing { place, queued_for, attempt } => {
            let queue_ms = millis(*queued_for);
            line.set_place(place);
            line.set("queue_ms", &queue_ms);
            line.set("attempt", attempt);
            line.write(logger, level, OPERATION_EXECUTING, "a worker has an operation's action");
        }
        Event::Requeued { reason, attempt } => {
            let error = reason.to_string();
            line.set("attempt", attempt);
            line.set("grpc_code", reason.code_name());
            line.set("error", &error);
            line.write(logger, level, OPERATION_REQUEUED, "a worker failed, an operation waits again");
        }
        Event::Completed { outcome, place, queued_for } => {
            // A cached result tells of the run that made it, which is not this operation's.
            let result = outcome.result.as_ref().filter(|_| !outcome.cached);
            let phases = result.map(|result| Phases::of(result)).unwrap_or_default();
            let [queue_ms, fetch_ms, run_ms, upload_ms] =
                [*queued_for, phases.fetch, phases.run, phases.upload].map(|time| time.map(millis));
            let error = outcome.error.as_ref().map(Error::to_string);
            line.set("cached", &outcome.cached);
            if let Some(place) = place {
                line.set_place(place);
            }
            line.set_some("queue_ms", &queue_ms);
            line.set_some("fetch_ms", &fetch_ms);
            line.set_some("run_ms", &run_ms);
            line.set_some("upload_ms", &upload_ms);
            let exit_code = outcome.result.as_ref().map(|result| result.exit_code);
            line.set_some("exit_code", &exit_code);
            line.set("grpc_code", outcome.error.as_ref().map_or("OK", Error::code_name));
            line.set_some("error", &error);
            line.write(logger, level, OPERATION_COMPLETED, "an operation ended");
        }
    }
}

/// Fields of one line. What does not apply is left out instead of being written as nothing.
#[derive(Default)]
struct Line<'a>(Vec<(&'static str, Value<'a>)>);

impl<'a> Line<'a> {
    fn set<T: ToValue + ?Sized>(&mut self, name: &'static str, value: &'a T) {
        self.0.push((name, value.to_value()));
    }

    fn set_some<T: ToValue>(&mut self, name: &'static str, value: &'a Option<T>) {
        if let Some(value) = value {
            self.set(name, value);
        }
    }

    fn set_text(&mut self, name: &'static str, text: &'a str) {
        if !text.is_empty() {
            self.set(name, text);
        }
    }

    fn set_place(&mut self, place: &'a RunPlace) {
        self.set("pool", &*place.pool);
        self.set("slot", &place.slot.0);
    }

    fn write(mut self, logger: &dyn Log, level: Level, event: &'static str, message: &str) {
        self.0.insert(0, ("event", Value::from(event)));
        logger.log(
            &Record::builder()
                .target(TARGET)
                .level(level)
                .key_values(&self.0)
                .args(format_args!("{message}"))
                .build(),
        );
    }
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
            operation::{OperationId, OperationInfo, Outcome},
        },
        worker::messages::SlotId,
    };
    use gorego_reapi::proto::reapi;
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

    fn line(event: Event) -> Map<String, Json> {
        let submit = submit(&work(7));
        let mut client = submit.client;
        client.target_id = "//a:b".into();
        let id = OperationId(uuid::Uuid::from_u128(1));
        let (instance, action, inline) = (submit.instance, submit.action, submit.inline);
        let info = Arc::new(OperationInfo { id, instance, action, inline, client, peer: Default::default() });
        let last = Last::default();
        write(&Transition { info, priority: -3, event }, Level::Info, &last);
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
            result: Some(Arc::new(result)),
            cached: false,
            error: None,
            message: String::new(),
            server_logs: Vec::new(),
        };
        let completed = |outcome: &Outcome, place, queued_for| {
            line(Event::Completed { outcome: Arc::new(outcome.clone()), place, queued_for })
        };
        let place = RunPlace { pool: "local".into(), slot: SlotId(2), worker: "host/2".into() };
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
