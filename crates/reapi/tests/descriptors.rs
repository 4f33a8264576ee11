//! The proto definitions in this repository are wire-identical to the public API: the compiled descriptors contain
//! exactly the messages, fields, numbers, types, labels, enum values and RPCs of the tables in `proto/reapi-fields.md`.

use gorego_reapi::proto::DESCRIPTORS;
use prost_reflect::{
    Cardinality, DescriptorPool, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
};
use std::collections::BTreeSet;

const TABLES: &str = include_str!("../../../proto/reapi-fields.md");

/// The facts of a table row or a descriptor, as canonical lines.
type Facts = BTreeSet<String>;

#[test]
fn the_compiled_descriptors_equal_the_published_field_tables() {
    let expected = facts_of_tables();
    let compiled = facts_of_descriptors();
    assert!(expected.len() > 400, "the tables were not read: {} facts", expected.len());
    let missing: Vec<_> = expected.difference(&compiled).collect();
    let surplus: Vec<_> = compiled.difference(&expected).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nsurplus: {surplus:#?}");
}

fn facts_of_tables() -> Facts {
    let mut facts = Facts::new();
    let (mut package, mut message) = (String::new(), String::new());
    for line in TABLES.lines() {
        if line.starts_with("## Well-known types") {
            break;
        }
        if let Some(heading) = line.strip_prefix("### ") {
            package = heading.split(' ').next().unwrap_or_default().to_owned();
        }
        let Some(row) = line.strip_prefix("| ").and_then(|row| row.strip_suffix('|')) else { continue };
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        match cells[..] {
            ["Message" | "Service (full name)" | "Enum", ..] => {}
            // A row of an RPC table: full service name, method, request, response, HTTP mapping.
            [service, method, request, response, _] if service.starts_with(&package) => {
                let (request, response) = (qualify(&package, request), qualify(&package, response));
                facts.insert(format!("rpc {service}/{method}({request}) -> {response}"));
            }
            [name, number, field, kind, label] => {
                if name != "〃" {
                    message = format!("{package}.{name}");
                    facts.insert(format!("message {message}"));
                }
                if number.is_empty() || field == "*reserved*" {
                    continue;
                }
                facts.insert(format!(
                    "field {message}.{field} = {number}: {}{}",
                    qualify(&package, kind),
                    cardinality(label)
                ));
            }
            [name, values] => {
                for value in values.split(", ") {
                    facts.insert(format!("enum {package}.{name}.{value}"));
                }
            }
            _ => {}
        }
    }
    facts
}

/// Reduces the label column to what the wire distinguishes.
fn cardinality(label: &str) -> String {
    let mut shown = String::new();
    for word in ["repeated", "map", "optional", "deprecated"] {
        if label.split(' ').any(|part| part == word) {
            shown.push(' ');
            shown.push_str(word);
        }
    }
    if let Some(oneof) = label.strip_prefix("oneof ") {
        shown.push_str(&format!(" oneof {oneof}"));
    }
    shown
}

/// Adds the package to a type name. The tables omit the package of their section.
fn qualify(package: &str, cell: &str) -> String {
    let (stream, cell) = match cell.strip_prefix("stream ") {
        Some(rest) => ("stream ", rest),
        None => ("", cell),
    };
    let name = cell.trim_end_matches(" (enum)");
    if let Some(inner) = name.strip_prefix("map<").and_then(|inner| inner.strip_suffix('>')) {
        let (key, value) = inner.split_once(", ").expect("a map has two types");
        return format!("map<{}, {}>", qualify(package, key), qualify(package, value));
    }
    let scalar = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let absolute = ["google.protobuf.", "google.rpc.", "google.longrunning.", "build.bazel."]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    if scalar || absolute { format!("{stream}{name}") } else { format!("{stream}{package}.{name}") }
}

fn facts_of_descriptors() -> Facts {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("the descriptor set decodes");
    let ours = |name: &str| !name.starts_with("google.protobuf.") && !name.starts_with("gorego.");
    let mut facts = Facts::new();
    for message in pool.all_messages().filter(|m| ours(m.full_name()) && !m.is_map_entry()) {
        facts.insert(format!("message {}", message.full_name()));
        facts.extend(message.fields().map(|field| fact_of_field(&message, &field)));
    }
    for descriptor in pool.all_enums().filter(|e| ours(e.full_name())) {
        for value in descriptor.values() {
            facts.insert(format!("enum {}.{} = {}", descriptor.full_name(), value.name(), value.number()));
        }
    }
    for service in pool.services().filter(|service| ours(service.full_name())) {
        facts.extend(service.methods().map(|method| fact_of_method(service.full_name(), &method)));
    }
    facts
}

fn fact_of_field(message: &MessageDescriptor, field: &FieldDescriptor) -> String {
    let mut label = String::new();
    let kind = match field.kind() {
        Kind::Message(entry) if field.is_map() => {
            label.push_str(" map");
            format!(
                "map<{}, {}>",
                kind_name(&entry.map_entry_key_field().kind()),
                kind_name(&entry.map_entry_value_field().kind())
            )
        }
        kind => {
            if field.cardinality() == Cardinality::Repeated {
                label.push_str(" repeated");
            }
            kind_name(&kind)
        }
    };
    if field.field_descriptor_proto().proto3_optional() {
        label.push_str(" optional");
    }
    if field.field_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated()) {
        label.push_str(" deprecated");
    }
    if let Some(oneof) = field.containing_oneof().filter(|oneof| !oneof.is_synthetic()) {
        label.push_str(&format!(" oneof {}", oneof.name()));
    }
    format!("field {}.{} = {}: {kind}{label}", message.full_name(), field.name(), field.number())
}

fn kind_name(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(descriptor) => descriptor.full_name().to_owned(),
        scalar => format!("{scalar:?}").to_lowercase(),
    }
}

fn fact_of_method(service: &str, method: &MethodDescriptor) -> String {
    let stream = |streaming: bool| if streaming { "stream " } else { "" };
    format!(
        "rpc {service}/{}({}{}) -> {}{}",
        method.name(),
        stream(method.is_client_streaming()),
        method.input().full_name(),
        stream(method.is_server_streaming()),
        method.output().full_name()
    )
}
