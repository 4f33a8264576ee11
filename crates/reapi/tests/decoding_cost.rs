//! Compares the memory that decoding allocates with what [`gorego_reapi::wire::cost`] predicts.

#![allow(clippy::unwrap_used)]

use gorego_reapi::{
    find_missing,
    proto::{self, asset, gorego as stored, reapi},
    wire::{self, Limits},
};
use proptest::prelude::*;
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, Kind, MessageDescriptor};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::LazyLock,
};

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| DescriptorPool::decode(proto::DESCRIPTORS).unwrap());

thread_local! {
    /// Bytes that this thread has allocated and not freed, and their maximum.
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

struct Counting;

fn count(change: i64) {
    let live = LIVE.get() + change;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: all calls are forwarded to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Builds a message of this type with random fields.
fn message(of: &MessageDescriptor, choices: &mut impl Iterator<Item = u8>, depth: u32) -> Vec<u8> {
    let fields: Vec<_> = of.fields().collect();
    let mut bytes = Vec::new();
    for _ in 0..choices.next().unwrap_or(0) % 12 {
        let Some(field) = fields.get(usize::from(choices.next().unwrap_or(0)) % fields.len().max(1)) else {
            break;
        };
        let (wire_type, content) = match field.kind() {
            Kind::Message(inner) if depth < 8 => (2, message(&inner, choices, depth + 1)),
            Kind::Message(_) => (2, Vec::new()),
            Kind::String | Kind::Bytes => (2, vec![b'0'; usize::from(choices.next().unwrap_or(0) % 70)]),
            Kind::Fixed32 | Kind::Sfixed32 | Kind::Float => (5, vec![0; 4]),
            Kind::Fixed64 | Kind::Sfixed64 | Kind::Double => (1, vec![0; 8]),
            _ if field.is_list() => (2, vec![1; usize::from(choices.next().unwrap_or(0))]),
            _ => (0, vec![1]),
        };
        // Lists are occasionally long.
        let again =
            choices.next().filter(|choice| *choice > 200 && content.len() < 20).map_or(0, usize::from);
        for _ in 0..=again {
            prost::encoding::encode_varint(u64::from(field.number()) << 3 | wire_type, &mut bytes);
            if wire_type == 2 {
                prost::encode_length_delimiter(content.len(), &mut bytes).unwrap();
            }
            bytes.extend(&content);
        }
    }
    bytes
}

fn is_covered<M: Message + Name + Default>(choices: &[u8]) -> Result<(), TestCaseError> {
    let descriptor = POOL.get_message_by_name(&M::full_name()).unwrap();
    let bytes = message(&descriptor, &mut choices.iter().copied(), 0);
    let cost = wire::cost::<M>(&bytes, Limits::memory(u64::MAX)).unwrap();
    let before = LIVE.get();
    PEAK.set(before);
    let decoded = M::decode(bytes.as_slice());
    let peak = PEAK.get() - before;
    prop_assert!(decoded.is_ok(), "{:?}", decoded.err());
    prop_assert!(peak <= cost.memory as i64, "{peak} of {cost:?}, {} bytes of {}", bytes.len(), M::NAME);
    Ok(())
}

proptest! {
    #[test]
    fn no_message_takes_more_memory_than_was_measured(
        choices in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        is_covered::<reapi::Directory>(&choices)?;
        is_covered::<reapi::Tree>(&choices)?;
        is_covered::<reapi::Command>(&choices)?;
        is_covered::<reapi::Action>(&choices)?;
        is_covered::<reapi::ActionResult>(&choices)?;
        is_covered::<reapi::BatchUpdateBlobsRequest>(&choices)?;
        is_covered::<reapi::BatchReadBlobsRequest>(&choices)?;
        is_covered::<reapi::FindMissingBlobsRequest>(&choices)?;
        is_covered::<find_missing::FindMissingBlobsRequest>(&choices)?;
        is_covered::<asset::PushDirectoryRequest>(&choices)?;
        is_covered::<stored::StoredResult>(&choices)?;
    }
}
