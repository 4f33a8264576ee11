//! Finds every value that has the wrong type or form, and says in words what it is and what it has to be.

use super::{Config, suggestion::suggestion};
use serde::Deserialize as _;
use std::ops::Range;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, Error, ValueDeserializer},
};

/// The segments of a key, with their places in the text. An element of a list has no name.
type Path = Vec<(Option<String>, Range<usize>)>;

/// A problem, and its place in the text.
pub(super) type LocatedProblem = (Option<Range<usize>>, String);

/// All problems of the value of a key; none if it can be used.
pub(super) fn problems(key: &str, value: &Spanned<DeValue<'_>>) -> Vec<LocatedProblem> {
    let mut found = Vec::new();
    let mut path = key.split('.').map(|name| (Some(name.to_owned()), value.span())).collect();
    collect(&mut path, value, false, &mut found);
    found
}

/// Collects the problems of a value. If it consists of several values, each is checked alone, because serde stops at
/// the first error.
fn collect(path: &mut Path, value: &Spanned<DeValue<'_>>, is_entry: bool, found: &mut Vec<LocatedProblem>) {
    let Err(error) = alone(path, value) else { return };
    // An entry of a table, and an element of a list in it, lack the entries beside it.
    if is_entry && error.message().starts_with("missing field") {
        return;
    }
    let before = found.len();
    match value.get_ref() {
        DeValue::Table(entries) => {
            let mut entries: Vec<_> = entries.iter().collect();
            entries.sort_by_key(|(name, _)| name.span().start);
            for (name, entry) in entries {
                path.push((Some(name.get_ref().to_string()), name.span()));
                collect(path, entry, true, found);
                path.pop();
            }
        }
        DeValue::Array(elements) => {
            for element in elements.iter() {
                path.push((None, element.span()));
                collect(path, element, is_entry, found);
                path.pop();
            }
        }
        _ => {}
    }
    if found.len() == before {
        let key = path.iter().filter_map(|(name, _)| name.as_deref()).collect::<Vec<_>>().join(".");
        found.push((error.span(), in_words(&key, error.message())));
    }
}

/// Whether a configuration with this value alone can be read.
fn alone(path: &Path, value: &Spanned<DeValue<'_>>) -> Result<(), Error> {
    let tree = path.iter().rev().fold(value.clone(), |inner, (name, place)| {
        let outer = match name {
            Some(name) => {
                let mut table = DeTable::new();
                table.insert(Spanned::new(place.clone(), name.clone().into()), inner);
                DeValue::Table(table)
            }
            None => {
                let mut list = DeArray::new();
                list.push(inner);
                DeValue::Array(list)
            }
        };
        Spanned::new(value.span(), outer)
    });
    Config::deserialize(ValueDeserializer::from(tree)).map(|_| ())
}

/// The message of serde about the value of a key, without the names of Rust's types.
pub(super) fn in_words(key: &str, message: &str) -> String {
    let message = message.trim();
    let mismatch = ["invalid type: ", "invalid value: "].iter().find_map(|start| message.strip_prefix(start));
    if let Some((found, expected)) = mismatch.and_then(|rest| rest.rsplit_once(", expected ")) {
        let unit = unit_of(key);
        let (is, must_be, hint) = (found_in_words(found), expected_in_words(expected), hint(found, expected));
        return format!("{key} has to be {must_be}{unit}, and {is} is not{hint}");
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let mut names = quoted(rest);
        let choices: Vec<_> =
            names.split_off(names.len().min(1)).iter().map(|name| format!("\"{name}\"")).collect();
        return format!(
            "{key} has to be one of {}, and {} is not",
            choices.join(", "),
            text_in_words(&names.concat())
        );
    }
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let mut names = quoted(rest);
        let known = names.split_off(names.len().min(1));
        let unknown = names.concat();
        let section = key.strip_suffix(&unknown).unwrap_or(key).trim_end_matches('.');
        let known: Vec<_> = known.iter().map(|name| format!("{section}.{name}")).collect();
        let hint = match suggestion(&format!("{section}.{unknown}"), known.iter()) {
            none if none.is_empty() => format!("; the keys are {}", known.join(", ")),
            hint => hint,
        };
        return format!("unknown key \"{section}.{}\"{hint}", unknown.escape_debug());
    }
    if let Some(rest) = message.strip_prefix("missing field ") {
        return format!("{key} needs the key \"{}\"", quoted(rest).concat());
    }
    format!("{key}: {message}")
}

/// The words between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn text_in_words(text: &str) -> String {
    format!("the text \"{}\"", text.escape_debug())
}

/// The value, which serde describes in this way.
fn found_in_words(found: &str) -> String {
    if let Some(text) = found.strip_prefix("string ") {
        return format!("the text {text}");
    }
    match (found, quoted(found).first()) {
        ("map", _) => "a table".into(),
        ("sequence", _) => "a list".into(),
        (_, Some(number)) => number.clone(),
        _ => found.to_owned(),
    }
}

/// The type or form, which serde describes in this way.
fn expected_in_words(expected: &str) -> String {
    let words = match expected {
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "u128" | "usize" => "a whole number of 0 or more",
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "a borrowed string" | "a character" | "path string" | "string only" => "text in quotes",
        "a sequence" => "a list, such as [\"a\", \"b\"]",
        "a duration" => "a time with a unit, such as \"30s\", \"10m\" or \"12h\"",
        "a map" | "map" => "a table of keys and values",
        _ if expected.starts_with("struct ") => "a table of keys and values",
        // serde says this about a choice between words.
        _ if expected.starts_with("enum ") || expected.starts_with("string or ") => "one word in quotes",
        other => other,
    };
    words.to_owned()
}

/// The unit of a number, which the name of its key ends with.
fn unit_of(key: &str) -> &'static str {
    match key {
        _ if key.ends_with("_mb_per_second") => " (MB per second)",
        _ if key.ends_with("_percent") => " (percent)",
        _ if key.ends_with("_per_second") => " (per second)",
        _ => "",
    }
}

/// What to write instead, if that is clear.
fn hint(found: &str, expected: &str) -> String {
    let text = found.strip_prefix("string \"").and_then(|rest| rest.strip_suffix('"'));
    let other = quoted(found).concat();
    match (expected_in_words(expected).as_str(), text) {
        (words, Some(text)) if words.starts_with("a whole number") && text.parse::<u64>().is_ok() => {
            format!("; write {text} without quotes")
        }
        ("true or false", Some(text)) if matches!(text, "true" | "false") => {
            format!("; write {text} without quotes")
        }
        (words, Some(text)) if words.starts_with("a list") => format!("; write [\"{text}\"]"),
        (words, None) if words.starts_with("a time") && other.parse::<u64>().is_ok() => {
            format!("; write \"{other}s\" for seconds")
        }
        ("text in quotes", None) if !other.is_empty() => format!("; write \"{other}\""),
        _ => String::new(),
    }
}
