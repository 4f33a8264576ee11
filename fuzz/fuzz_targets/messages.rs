//! Stored messages: Action with Command, Directory, Tree, ActionResult, and the file of a result. The first byte
//! selects one of them. Each message is measured before it is decoded. Every message that can be decoded must have been
//! accepted by the measurement, and takes at most the memory that its size allows.

#![no_main]

use bytes::Bytes;
use gorego::{
    action::{Action, TimeoutPolicy},
    actors::cas::results::{self, DirectReferences, Uploader},
    instance::Instances,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Error,
    path::check_node_name,
    proto::reapi,
    tree::Directory,
    wire::{self, Limits, Refusal},
};
use libfuzzer_sys::fuzz_target;
use prost::{Message, Name};
use std::time::{Duration, SystemTime};

const FUNCTION: DigestFunction = DigestFunction::Sha256;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 4 {
        0 => action(data),
        1 => directory(data),
        2 => {
            decode::<reapi::Tree>(data);
            drop(results::files_of_tree(Bytes::copy_from_slice(data), FUNCTION));
        }
        _ => result(data),
    }
});

fn decode<M: Message + Name + Default>(data: &[u8]) -> Option<M> {
    let cost = wire::cost::<M>(data, Limits::memory(u64::MAX));
    let message = M::decode(data).ok();
    match (cost, &message) {
        (Ok(cost), _) => {
            let most = wire::EXPANSION_MAX * data.len() as u64 + 2 * size_of::<M>() as u64;
            assert!(cost.memory <= most, "{cost:?} of {} bytes", data.len());
        }
        (Err(Refusal::Malformed("it has a group")), _) => {}
        (Err(refusal), decoded) => assert!(decoded.is_none(), "{refusal}"),
    }
    message
}

/// A length byte separates the two messages.
fn action(data: &[u8]) {
    let Some((length, data)) = data.split_first() else { return };
    let (first, second) = data.split_at(data.len().min(usize::from(*length)));
    let (Some(action), Some(command)) = (decode::<reapi::Action>(first), decode::<reapi::Command>(second))
    else {
        return;
    };
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
    decode::<reapi::Directory>(data);
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
    let Some(mut result) = decode::<reapi::ActionResult>(data) else { return };
    match results::normalise(&mut result, FUNCTION, Uploader::Client) {
        Ok((contents, _)) => {
            assert!(contents.iter().all(|(digest, bytes)| FUNCTION.digest(bytes) == *digest));
            DirectReferences::of(&result, FUNCTION).expect("what was accepted has digests");
            let origin = results::origin("", action, Default::default(), SystemTime::UNIX_EPOCH);
            let stored = results::encode(&origin, &result);
            assert_eq!(results::decode(&stored, "", action), Ok(result));
        }
        Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    }
}
