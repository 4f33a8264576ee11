//! Tests of the cost measurement, compared with actual decoding.

use super::*;
use crate::proto::{asset, bytestream, gorego, longrunning, reapi};
use proptest::prelude::*;

/// Builds a message from random choices: random fields of the type, nested at random. Most of the results parse.
fn message(layout: &Layout, choices: &mut impl Iterator<Item = u8>, depth: u32, out: &mut Vec<u8>) {
    for _ in 0..choices.next().unwrap_or(0) % 8 {
        let Some(choice) = choices.next() else { return };
        let number = u64::from(choice % 16) + 1;
        let mut content = Vec::new();
        let wire_type = match layout.field(number).map(|field| field.kind) {
            Some(Kind::Message(at) | Kind::Boxed(at) | Kind::Entry(at)) => {
                if depth < 6 {
                    message(LAYOUTS.at(at).unwrap(), choices, depth + 1, &mut content);
                }
                2
            }
            Some(Kind::Text | Kind::Bytes) => {
                content.resize(usize::from(choices.next().unwrap_or(0) % 70), b'0');
                2
            }
            Some(Kind::Number(4)) => 5,
            Some(Kind::Number(8)) => 1,
            Some(Kind::Number(_)) if choice > 128 && layout.field(number).unwrap().repeated => {
                content.resize(usize::from(choice), 1);
                2
            }
            Some(Kind::Number(_)) | None => 0,
        };
        out.push(u8::try_from(number << 3 & 0x7f).unwrap() | wire_type | if number > 15 { 0x80 } else { 0 });
        if number > 15 {
            out.push(1);
        }
        match wire_type {
            0 => out.push(1),
            1 => out.extend([0; 8]),
            5 => out.extend([0; 4]),
            _ => {
                prost::encode_length_delimiter(content.len(), out).unwrap();
                out.extend(content);
            }
        }
    }
}

const ANY: Limits = Limits::memory(u64::MAX);

fn agrees<M: Message + Name + Default>(choices: &[u8]) -> std::result::Result<(), TestCaseError> {
    let mut bytes = Vec::new();
    message(LAYOUTS.by_name(&M::full_name()).unwrap(), &mut choices.iter().copied(), 0, &mut bytes);
    if M::decode(bytes.as_slice()).is_ok() {
        let cost = cost::<M>(&bytes, ANY).map_err(|refusal| TestCaseError::fail(refusal.to_string()))?;
        let worst = size_of::<M>() as u64 + 64 + EXPANSION_MAX * bytes.len() as u64;
        prop_assert!(cost.memory <= worst, "{} of {} bytes", cost.memory, bytes.len());
    }
    Ok(())
}

proptest! {
    #[test]
    fn decoding_memory_is_measured_within_the_expansion(
        choices in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        agrees::<reapi::Directory>(&choices)?;
        agrees::<reapi::Tree>(&choices)?;
        agrees::<reapi::Command>(&choices)?;
        agrees::<reapi::Action>(&choices)?;
        agrees::<reapi::ActionResult>(&choices)?;
        agrees::<reapi::BatchUpdateBlobsRequest>(&choices)?;
        agrees::<reapi::ExecuteResponse>(&choices)?;
        agrees::<gorego::StoredBindings>(&choices)?;
    }

    #[test]
    fn noise_is_refused_or_measured_and_what_was_refused_does_not_decode(
        bytes in proptest::collection::vec(prop_oneof![0u8..32, any::<u8>()], 0..60),
    ) {
        let measured = cost::<reapi::ActionResult>(&bytes, ANY);
        let decoded = reapi::ActionResult::decode(bytes.as_slice());
        let has_group = measured == Err(Refusal::Malformed("it has a group"));
        prop_assert!(measured.is_ok() || has_group || decoded.is_err(), "{measured:?} {decoded:?}");
    }
}

#[test]
fn sizes_are_those_of_the_structs() {
    macro_rules! check {
        ($($message:ty),* $(,)?) => {$(
            let layout = LAYOUTS.by_name(&<$message>::full_name()).unwrap();
            let (is, says) = (size_of::<$message>(), layout.size as usize);
            assert!(says >= is && says <= is + is / 3 + 16, "{}: {is}, not {says}", stringify!($message));
        )*};
    }
    check!(
        reapi::Action,
        reapi::Command,
        reapi::Platform,
        reapi::Directory,
        reapi::FileNode,
        reapi::DirectoryNode,
        reapi::SymlinkNode,
        reapi::NodeProperties,
        reapi::NodeProperty,
        reapi::Tree,
        reapi::Digest,
        reapi::ActionResult,
        reapi::OutputFile,
        reapi::OutputDirectory,
        reapi::OutputSymlink,
        reapi::ExecutedActionMetadata,
        reapi::ExecuteResponse,
        reapi::batch_update_blobs_request::Request,
        reapi::BatchReadBlobsRequest,
        reapi::FindMissingBlobsRequest,
        asset::Qualifier,
        asset::PushBlobRequest,
        bytestream::WriteRequest,
        longrunning::Operation,
        gorego::StoredResult,
        gorego::StoredBinding,
        prost_types::Any,
        prost_types::Timestamp,
    );
}

#[test]
fn nested_empty_entries_count_at_every_depth() {
    let properties = |count| b"\x0a\x00".repeat(count);
    let wrap = |field: u8, inner: &[u8]| {
        let mut message = vec![field << 3 | 2];
        prost::encode_length_delimiter(inner.len(), &mut message).unwrap();
        [&message[..], inner].concat()
    };
    let node_properties = wrap(5, &properties(100_000));
    let entry = size_of::<reapi::NodeProperty>() as u64;
    let memory = cost::<reapi::Directory>(&node_properties, ANY).unwrap().memory;
    assert!(memory >= entry * 100_000, "{memory}");
    assert!(cost::<reapi::Tree>(&wrap(2, &node_properties), ANY).unwrap().memory >= memory);
    let refusal = decode::<reapi::Tree>(wrap(2, &node_properties).as_slice(), 1_000_000, "Tree").unwrap_err();
    assert!(
        refusal
            .to_string()
            .contains("the Tree is refused: decoded it would take more than the 1000000 bytes")
    );
    // The same bytes in a text field are just text.
    let text = reapi::Command { arguments: vec!["\n\0".repeat(100_000)], ..Default::default() };
    assert!(cost::<reapi::Command>(&text.encode_to_vec(), ANY).unwrap().memory < 201_000);
}

#[test]
fn groups_are_refused() {
    let group = Refusal::Malformed("it has a group");
    assert_eq!(cost::<reapi::Directory>(b"\x7b\x7c", ANY), Err(group));
}

#[test]
fn requests_with_lists_are_told_from_others() {
    assert!(request_has_lists("/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs"));
    assert!(request_has_lists("/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult"));
    assert!(!request_has_lists("/google.bytestream.ByteStream/Write"));
    assert!(request_has_lists("/of.another/Method"));
}

#[test]
fn messages_with_bytes_at_any_depth_are_known() {
    assert!(has_bytes::<reapi::BatchUpdateBlobsRequest>());
    assert!(has_bytes::<reapi::UpdateActionResultRequest>());
    assert!(has_bytes::<bytestream::WriteRequest>());
    assert!(!has_bytes::<reapi::FindMissingBlobsRequest>());
    assert!(!has_bytes::<reapi::BatchReadBlobsRequest>());
}
