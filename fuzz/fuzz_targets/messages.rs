//! Stored messages: Action with Command, Directory, Tree, ActionResult, and a result's file. The first byte says which.

#![no_main]

use bytes::Bytes;
use gorego::{
    action::{Action, TimeoutPolicy},
    actors::cas::results::{self, DirectReferences, Uploader},
    digest::{Digest, DigestFunction},
    error::Error,
    instance::Instances,
    path::check_node_name,
    proto::reapi,
    tree::Directory,
};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use std::time::{Duration, SystemTime};

const FUNCTION: DigestFunction = DigestFunction::Sha256;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 4 {
        0 => action(data),
        1 => directory(data),
        2 => drop(results::files_of_tree(Bytes::copy_from_slice(data), FUNCTION)),
        _ => result(data),
    }
});

/// A length byte parts the two messages.
fn action(data: &[u8]) {
    let Some((length, data)) = data.split_first() else { return };
    let (first, second) = data.split_at(data.len().min(usize::from(*length)));
    let (Ok(action), Ok(command)) = (reapi::Action::decode(first), reapi::Command::decode(second)) else { return };
    let instance = Instances::new([""]).and_then(|instances| instances.get("")).expect("the default");
    let timeouts = TimeoutPolicy { default: Duration::from_secs(1), max: Duration::from_secs(60) };
    match Action::from_wire(instance, Digest::empty(FUNCTION), &action, &command, timeouts) {
        Ok(action) => {
            assert!(!action.command.arguments.is_empty() && action.timeout <= timeouts.max);
            for output in &action.command.outputs {
                assert!(output.path.segments().all(|segment| check_node_name(segment).is_ok()));
            }
        }
        Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    }
}

fn directory(data: &[u8]) {
    match Directory::decode(data, FUNCTION) {
        Ok(directory) => {
            let names = directory.files.iter().map(|node| &node.name);
            let names = names.chain(directory.directories.iter().map(|node| &node.name));
            let mut names: Vec<_> = names.chain(directory.symlinks.iter().map(|node| &node.name)).collect();
            assert!(names.iter().all(|name| check_node_name(name).is_ok()));
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "a name twice");
        }
        Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    }
}

fn result(data: &[u8]) {
    let action = Digest::empty(FUNCTION);
    let _ = results::decode(data, "", action);
    let Ok(mut result) = reapi::ActionResult::decode(data) else { return };
    match results::normalise(&mut result, FUNCTION, Uploader::Client) {
        Ok(blobs) => {
            assert!(blobs.iter().all(|(digest, bytes)| FUNCTION.digest(bytes) == *digest));
            DirectReferences::of(&result, FUNCTION).expect("what was accepted has digests");
            let stored = results::encode("", action, &result, Default::default(), SystemTime::UNIX_EPOCH);
            assert_eq!(results::decode(&stored, "", action), Ok(result));
        }
        Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    }
}
