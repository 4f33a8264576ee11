//! The metadata that goREgo adds to operations and results: [`gorego::ResourceUsage`], [`gorego::QueueStatus`] and
//! [`gorego::OperationRequest`].
//!
//! On the wire each is an `Any` that holds a `google.protobuf.Struct`, a type that every protobuf runtime can print.
//! Clients that show metadata as JSON fail on an `Any` of an unknown type. The Struct has one field, named after the
//! kind of metadata. Its value is a Struct whose field names include their units. Results that earlier versions stored
//! contain the message itself; [`modernise`] converts them. Pure.

use crate::{duration, proto::gorego};
use prost::Message as _;
use prost_types::{Any, ListValue, Struct, Value, value::Kind};
use std::{collections::BTreeMap, time::Duration};

/// The type URL of a Struct, with the only authority that clients accept (GEN-18).
const STRUCT_URL: &str = "type.googleapis.com/google.protobuf.Struct";
/// The type URL under which earlier versions packed a [`gorego::ResourceUsage`].
const OLD_USAGE_URL: &str = "type.googleapis.com/gorego.v1.ResourceUsage";
/// Names of the outer field, one for each kind of metadata.
const RESOURCE_USAGE: &str = "resource_usage";
const QUEUE_STATUS: &str = "queue_status";
const REQUEST: &str = "request";
/// The unit in which getrusage(2) counts block input and output.
const BLOCK_BYTES: i64 = 512;

/// Packs the resource usage of an action.
pub fn pack_resource_usage(usage: &gorego::ResourceUsage) -> Any {
    let seconds = |time: Option<prost_types::Duration>| {
        let time = time.as_ref().and_then(duration::from_wire);
        number(time.unwrap_or_default().as_secs_f64())
    };
    pack(
        RESOURCE_USAGE,
        [
            ("user_seconds", seconds(usage.user_time)),
            ("system_seconds", seconds(usage.system_time)),
            ("max_resident_bytes", count(usage.max_resident_bytes)),
            ("minor_page_faults", count(usage.minor_page_faults)),
            ("major_page_faults", count(usage.major_page_faults)),
            ("read_bytes", count(usage.blocks_read.saturating_mul(BLOCK_BYTES))),
            ("written_bytes", count(usage.blocks_written.saturating_mul(BLOCK_BYTES))),
            ("voluntary_context_switches", count(usage.voluntary_context_switches)),
            ("involuntary_context_switches", count(usage.involuntary_context_switches)),
        ],
    )
}

/// The resource usage of an action, if `auxiliary` contains it in either format.
pub fn resource_usage(auxiliary: &[Any]) -> Option<gorego::ResourceUsage> {
    let fields = find(auxiliary, RESOURCE_USAGE)?;
    let time = |name| Duration::try_from_secs_f64(fields.float(name)).ok()?.try_into().ok();
    Some(gorego::ResourceUsage {
        user_time: time("user_seconds"),
        system_time: time("system_seconds"),
        max_resident_bytes: fields.count("max_resident_bytes"),
        minor_page_faults: fields.count("minor_page_faults"),
        major_page_faults: fields.count("major_page_faults"),
        blocks_read: fields.count("read_bytes") / BLOCK_BYTES,
        blocks_written: fields.count("written_bytes") / BLOCK_BYTES,
        voluntary_context_switches: fields.count("voluntary_context_switches"),
        involuntary_context_switches: fields.count("involuntary_context_switches"),
    })
}

/// Packs the reason why an operation waits.
pub fn pack_queue_status(status: &gorego::QueueStatus) -> Any {
    let others = status.other_pools.iter().map(|pool| text(pool)).collect();
    pack(
        QUEUE_STATUS,
        [
            ("pool", text(&status.pool)),
            ("position", count(status.position)),
            ("waiting", count(status.waiting)),
            ("busy_slots", count(status.busy_slots)),
            ("slots", count(status.slots)),
            ("reason", text(&status.reason)),
            ("other_pools", Value { kind: Some(Kind::ListValue(ListValue { values: others })) }),
        ],
    )
}

/// The reason why an operation waits, if `auxiliary` contains it.
pub fn queue_status(auxiliary: &[Any]) -> Option<gorego::QueueStatus> {
    let fields = find(auxiliary, QUEUE_STATUS)?;
    Some(gorego::QueueStatus {
        pool: fields.text("pool"),
        position: fields.count("position"),
        waiting: fields.count("waiting"),
        busy_slots: fields.count("busy_slots"),
        slots: fields.count("slots"),
        reason: fields.text("reason"),
        other_pools: fields.texts("other_pools"),
    })
}

/// Packs the request of an operation.
pub fn pack_request(request: &gorego::OperationRequest) -> Any {
    pack(
        REQUEST,
        [
            ("action_mnemonic", text(&request.action_mnemonic)),
            ("target_id", text(&request.target_id)),
            ("tool_invocation_id", text(&request.tool_invocation_id)),
            ("principal", text(&request.principal)),
            ("peer", text(&request.peer)),
            ("pool", text(&request.pool)),
        ],
    )
}

/// The request of an operation, if `auxiliary` contains it.
pub fn request(auxiliary: &[Any]) -> Option<gorego::OperationRequest> {
    let fields = find(auxiliary, REQUEST)?;
    Some(gorego::OperationRequest {
        action_mnemonic: fields.text("action_mnemonic"),
        target_id: fields.text("target_id"),
        tool_invocation_id: fields.text("tool_invocation_id"),
        principal: fields.text("principal"),
        peer: fields.text("peer"),
        pool: fields.text("pool"),
    })
}

/// Converts the entries that earlier versions packed to the current format.
pub fn modernise(auxiliary: &mut [Any]) {
    for any in auxiliary.iter_mut().filter(|any| any.type_url == OLD_USAGE_URL) {
        if let Ok(usage) = gorego::ResourceUsage::decode(any.value.as_slice()) {
            *any = pack_resource_usage(&usage);
        }
    }
}

fn pack<'a>(name: &str, fields: impl IntoIterator<Item = (&'a str, Value)>) -> Any {
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let inner = Value { kind: Some(Kind::StructValue(Struct { fields })) };
    let outer = Struct { fields: [(name.to_owned(), inner)].into() };
    Any { type_url: STRUCT_URL.into(), value: outer.encode_to_vec() }
}

fn number(number: f64) -> Value {
    Value { kind: Some(Kind::NumberValue(number)) }
}

/// Converts a whole number. It is exact up to 2^53, which none of these counters reaches.
fn count(count: i64) -> Value {
    number(count as f64)
}

fn text(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

/// The fields of a Struct that another server may have made. Absent fields and fields of another kind count as empty.
struct Fields(BTreeMap<String, Value>);

fn find(auxiliary: &[Any], name: &str) -> Option<Fields> {
    let structs = auxiliary.iter().filter(|any| any.type_url.ends_with("/google.protobuf.Struct"));
    let mut decoded = structs.filter_map(|any| Struct::decode(any.value.as_slice()).ok());
    decoded.find_map(|mut outer| match outer.fields.remove(name)?.kind? {
        Kind::StructValue(inner) => Some(Fields(inner.fields)),
        _ => None,
    })
}

impl Fields {
    fn kind(&self, name: &str) -> Option<&Kind> {
        self.0.get(name)?.kind.as_ref()
    }

    fn float(&self, name: &str) -> f64 {
        match self.kind(name) {
            Some(Kind::NumberValue(number)) => *number,
            _ => 0.0,
        }
    }

    fn count(&self, name: &str) -> i64 {
        // The cast saturates, and NaN becomes 0.
        self.float(name) as i64
    }

    fn text(&self, name: &str) -> String {
        match self.kind(name) {
            Some(Kind::StringValue(text)) => text.clone(),
            _ => String::new(),
        }
    }

    fn texts(&self, name: &str) -> Vec<String> {
        let Some(Kind::ListValue(list)) = self.kind(name) else { return Vec::new() };
        let texts = list.values.iter().filter_map(|value| match &value.kind {
            Some(Kind::StringValue(text)) => Some(text.clone()),
            _ => None,
        });
        texts.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage() -> gorego::ResourceUsage {
        gorego::ResourceUsage {
            user_time: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
            system_time: Some(prost_types::Duration { seconds: 0, nanos: 250_000_000 }),
            max_resident_bytes: 12_345_678,
            minor_page_faults: 5,
            major_page_faults: 6,
            blocks_read: 7,
            blocks_written: 8,
            voluntary_context_switches: 9,
            involuntary_context_switches: 10,
        }
    }

    #[test]
    fn each_is_read_as_it_was_packed_wherever_it_stands() {
        let status = gorego::QueueStatus {
            pool: "linux".into(),
            position: 3,
            waiting: 4,
            busy_slots: 2,
            slots: 2,
            reason: "busy".into(),
            other_pools: vec!["gpu".into(), "any".into()],
        };
        let other = Any { type_url: "type.googleapis.com/x.Y".into(), value: vec![0xff] };
        let request_of = gorego::OperationRequest {
            action_mnemonic: "CppCompile".into(),
            target_id: "//a:b".into(),
            tool_invocation_id: "1".into(),
            principal: "token:ci".into(),
            peer: "192.0.2.7".into(),
            pool: "linux".into(),
        };
        let all =
            [other, pack_queue_status(&status), pack_resource_usage(&usage()), pack_request(&request_of)];
        assert_eq!(request(&all), Some(request_of));
        assert_eq!(queue_status(&all), Some(status));
        assert_eq!(resource_usage(&all), Some(usage()));
        assert_eq!(queue_status(&all[..1]), None);
    }

    #[test]
    fn a_stored_message_of_an_earlier_version_becomes_a_struct_and_others_stay() {
        let old = Any { type_url: OLD_USAGE_URL.into(), value: usage().encode_to_vec() };
        let other = Any { type_url: "type.googleapis.com/x.Y".into(), value: vec![1] };
        let mut list = vec![other.clone(), old];
        modernise(&mut list);
        assert_eq!(list, [other, pack_resource_usage(&usage())]);
    }

    #[test]
    fn units_are_those_of_the_names() {
        let any = pack_resource_usage(&usage());
        let fields = find(&[any], RESOURCE_USAGE).unwrap();
        assert_eq!(fields.float("user_seconds"), 1.5);
        assert_eq!(fields.count("read_bytes"), 7 * 512);
    }
}
