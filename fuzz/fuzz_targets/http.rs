//! The HTTP cache: paths and the `Range` header. The first byte selects one of them.

#![no_main]

use gorego::http::{
    cache::{
        ROUTES,
        range::{self, Asked},
        resource::{MAX_KEY_BYTES, Resource},
    },
    router::Router,
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
    let mut router = Router::default();
    router.mount(ROUTES, ());
    // Of these methods, each route supports at least one.
    let find = |path| router.find("MKCOL", path).or_else(|_| router.find("GET", path)).ok();
    let Some(((), place)) = find(path) else { return };
    let resource = match Resource::parse(place.keyword, place.rest) {
        Ok(resource) => resource,
        Err(error) => return assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    };
    let rest = match &resource {
        Resource::Blob(hash) | Resource::Result(hash) => {
            let hex = hash.like.hash_hex();
            assert!(path.ends_with(hex.as_str()));
            let function = hash.like.function().name();
            if hash.function_is_named { format!("{function}/{hex}") } else { hex.to_string() }
        }
        Resource::Value(key) => {
            assert!(key.len() <= MAX_KEY_BYTES && path.ends_with(key));
            (*key).to_owned()
        }
    };
    let shortest = format!("/{}/{}/{rest}", place.instance_name, place.keyword);
    let ((), again) = find(&shortest).expect("it has a route");
    assert_eq!((again.instance_name, again.keyword), (place.instance_name, place.keyword));
    assert_eq!(Resource::parse(again.keyword, again.rest), Ok(resource));
}

/// A part is never empty and never outside the body.
fn part(header: &str, length: u64) {
    match range::parse(Some(header), length) {
        Asked::Whole => {}
        Asked::Part(part) => assert!(part.start < part.end && part.end <= length),
        Asked::Unsatisfiable => assert!(header.starts_with("bytes=")),
    }
}
