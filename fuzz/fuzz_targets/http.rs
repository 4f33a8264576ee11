//! The HTTP cache: paths and the `Range` header. The first byte selects one of them.

#![no_main]

use gorego::http_cache::{
    range::{self, Asked},
    resource::{MAX_KEY_BYTES, Resource},
};
use gorego_reapi::error::Error;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match (kind % 2, std::str::from_utf8(data)) {
        (0, Ok(path)) => resource(path),
        (1, _) => {
            let Some((length, header)) = data.split_first_chunk() else { return };
            let Ok(header) = std::str::from_utf8(header) else { return };
            part(header, u64::from_le_bytes(*length));
        }
        _ => {}
    }
});

/// A resource is found again under its shortest path.
fn resource(path: &str) {
    let resource = match Resource::parse(path) {
        Ok(resource) => resource,
        Err(error) => return assert!(matches!(error, Error::Invalid(_) | Error::NotFound(_)), "{error:?}"),
    };
    let (keyword, rest) = match &resource {
        Resource::Root | Resource::Health => return assert_eq!(resource.instance_name(), None),
        Resource::Blob { hash, .. } | Resource::Result { hash, .. } => {
            let is_blob = matches!(resource, Resource::Blob { .. });
            let hex = hash.like.hash_hex();
            assert!(path.ends_with(hex.as_str()));
            let function = hash.like.function().name();
            let rest = if hash.function_is_named { format!("{function}/{hex}") } else { hex.to_string() };
            (if is_blob { "cas" } else { "ac" }, rest)
        }
        Resource::Value { key, .. } => {
            assert!(key.len() <= MAX_KEY_BYTES && path.ends_with(key));
            ("cache", key.clone())
        }
    };
    let instance = resource.instance_name().expect("it is in one");
    assert_eq!(Resource::parse(&format!("/{instance}/{keyword}/{rest}")), Ok(resource.clone()));
}

/// A part is never empty and never outside the body.
fn part(header: &str, length: u64) {
    match range::parse(Some(header), length) {
        Asked::Whole => {}
        Asked::Part(part) => assert!(part.start < part.end && part.end <= length),
        Asked::Unsatisfiable => assert!(header.starts_with("bytes=")),
    }
}
