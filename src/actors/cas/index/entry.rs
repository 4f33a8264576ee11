//! [`Hot`] and [`Cold`]: the two parts of an entry of the index, which stands for one stored file.
//!
//! A look-up reads only the hot part, which is one cache line. The cold part is needed when an entry is read, moved in
//! the order of use, or removed. Together they take 88 bytes.
//!
//! A key fits into the hot part if its hash has at most [`HEAD_BYTES`] and its size is below [`WIDE_SIZE`], like the
//! key of a SHA-256 blob. Any other key is *wide*: the rest of it is in a [`KeyTail`].

use super::{EntryKind, Key, Seal};
use crate::instance::InstanceId;
use gorego_reapi::digest::{Digest, DigestFunction, MAX_HASH_BYTES};
use std::{
    ops::Range,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// Bytes of a hash that fit into the hot part.
pub(super) const HEAD_BYTES: usize = 32;
/// Sizes of at least this many bytes are kept in a [`KeyTail`].
pub(super) const WIDE_SIZE: u64 = 1 << 40;

/// Look-ups no longer find the entry: its file is damaged or gone.
pub(super) const CONDEMNED: u8 = 1;
/// The entry was used since it was put at the head of the list.
pub(super) const USED: u8 = 2;
/// An eviction has taken it out of the list because it was held. Only the owner of the index changes this.
pub(super) const ASIDE: u8 = 4;

/// The blob does not get smaller by compression.
pub(super) const INCOMPRESSIBLE: u8 = 8;

/// The kind byte of a key in a [`KeyTail`].
const WIDE: u8 = 1 << 5;

/// The part of an entry that look-ups read.
#[repr(C, align(64))]
pub(super) struct Hot {
    /// The first bytes of the hash. A shorter hash is padded with zeros.
    head: [u8; HEAD_BYTES],
    /// 0 for a free slot.
    pub(super) generation: u64,
    /// The low half is the number of holders, the high half the name of its row of leases. Both keep the entry from
    /// eviction.
    pub(super) pin: AtomicU64,
    /// The low bits of the size, or the number of the [`KeyTail`].
    size_low: u32,
    /// Seconds since 1970 of the last use that is recorded on disk.
    pub(super) touched: AtomicU32,
    instance: u16,
    /// The epoch in which it was last put at the head of the list.
    pub(super) linked_in: u16,
    size_high: u8,
    /// The kind of the entry, and the digest function of its key.
    kind: u8,
    pub(super) flags: AtomicU8,
}

/// The other part of an entry.
pub(super) struct Cold {
    /// Bytes that its file takes on disk.
    pub(super) bytes: u64,
    /// The stamp at which the content of its file was last verified.
    pub(super) seal: Seal,
    /// The next newer entry. For an entry that is aside, the next one on the stack of released entries.
    pub(super) prev: AtomicU32,
    /// The next older entry; the next free slot if this one is free.
    pub(super) next: u32,
}

/// The part of a wide key that does not fit into the hot part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeyTail {
    /// The rest of the hash, padded with zeros.
    rest: [u8; MAX_HASH_BYTES - HEAD_BYTES],
    size: u64,
}

/// The [`KeyTail`]s in use. Free places are used again.
#[derive(Debug, Default)]
pub(super) struct KeyTails {
    all: Vec<KeyTail>,
    free: Vec<u32>,
}

impl KeyTails {
    fn add(&mut self, tail: KeyTail) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.all[number as usize] = tail;
                number
            }
            None => {
                self.all.push(tail);
                (self.all.len() - 1) as u32
            }
        }
    }

    /// Takes over the tails of another slab. Returns their numbers.
    pub(super) fn append(&mut self, mut other: Self) -> Range<u32> {
        let first = self.all.len() as u32;
        self.all.append(&mut other.all);
        first..self.all.len() as u32
    }

    fn get(&self, number: u32) -> KeyTail {
        self.all[number as usize]
    }

    /// Memory that they take, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.all.capacity() * size_of::<KeyTail>() + self.free.capacity() * size_of::<u32>()
    }
}

/// The number of holders in a pin.
pub(super) fn holds_of(pin: u64) -> u32 {
    pin as u32
}

/// The name of the row of leases in a pin.
pub(super) fn lease_of(pin: u64) -> u32 {
    (pin >> 32) as u32
}

/// The same pin with another row of leases.
pub(super) fn with_lease(pin: u64, lease: u32) -> u64 {
    u64::from(lease) << 32 | pin & u64::from(u32::MAX)
}

/// Whether the hot part has no room for the whole key.
fn is_wide(key: &Key) -> bool {
    key.digest.hash().len() > HEAD_BYTES || key.digest.size() >= WIDE_SIZE
}

/// The kind of an entry and the digest function of its key, in one byte.
fn kind_byte(key: &Key) -> u8 {
    key.digest.function() as u8 | (key.kind as u8) << 3
}

/// The parts of a key, apart from the size of its digest: the hash, and a number that combines the instance, the kind
/// and the digest function.
pub(super) fn parts_of(key: &Key) -> (&[u8], u32) {
    (key.digest.hash(), u32::from(key.instance.0) << 16 | u32::from(kind_byte(key)))
}

impl Hot {
    /// An entry that is not in the list yet.
    pub(super) fn new(key: &Key, generation: u64, touched: u32, tails: &mut KeyTails) -> Self {
        let hash = key.digest.hash();
        let (head_of, rest_of) = hash.split_at(hash.len().min(HEAD_BYTES));
        let mut head = [0; HEAD_BYTES];
        head[..head_of.len()].copy_from_slice(head_of);
        let (mut kind, mut size) = (kind_byte(key), key.digest.size());
        if is_wide(key) {
            let mut rest = [0; MAX_HASH_BYTES - HEAD_BYTES];
            rest[..rest_of.len()].copy_from_slice(rest_of);
            kind |= WIDE;
            size = tails.add(KeyTail { rest, size }).into();
        }
        Self {
            head,
            generation,
            pin: AtomicU64::new(0),
            size_low: size as u32,
            touched: AtomicU32::new(touched),
            instance: key.instance.0,
            linked_in: 0,
            size_high: (size >> 32) as u8,
            kind,
            flags: AtomicU8::new(0),
        }
    }

    /// Frees the slot and its tail, if it has one.
    pub(super) fn free(&mut self, tails: &mut KeyTails) {
        if let Some(number) = self.tail() {
            tails.free.push(number);
        }
        (self.generation, self.kind) = (0, 0);
    }

    /// Adds `by` to the number of its tail, if it has one.
    pub(super) fn renumber_tail(&mut self, by: u32) {
        if self.kind & WIDE != 0 {
            self.size_low += by;
        }
    }

    fn tail(&self) -> Option<u32> {
        (self.kind & WIDE != 0).then_some(self.size_low)
    }

    fn size(&self, tails: &KeyTails) -> u64 {
        match self.tail() {
            Some(number) => tails.get(number).size,
            None => u64::from(self.size_low) | u64::from(self.size_high) << 32,
        }
    }

    pub(super) fn kind(&self) -> EntryKind {
        EntryKind::ALL.get(usize::from(self.kind >> 3 & 3)).copied().unwrap_or(EntryKind::Blob)
    }

    /// The namespace of the entry.
    pub(super) fn instance(&self) -> InstanceId {
        InstanceId(self.instance)
    }

    /// Whether it is stored under this key.
    pub(super) fn is(&self, key: &Key, tails: &KeyTails) -> bool {
        self.is_like(key, tails) && self.size(tails) == key.digest.size()
    }

    /// Whether it is stored under this key, or one that differs only in the size of the digest.
    pub(super) fn is_like(&self, key: &Key, tails: &KeyTails) -> bool {
        let hash = key.digest.hash();
        let (head, rest) = hash.split_at(hash.len().min(HEAD_BYTES));
        let is_same = match <&[u8; HEAD_BYTES]>::try_from(head) {
            Ok(head) => self.head == *head,
            Err(_) => self.head.starts_with(head),
        };
        is_same
            && self.kind & !WIDE == kind_byte(key)
            && self.instance == key.instance.0
            && (rest.is_empty()
                || self.tail().is_some_and(|number| tails.get(number).rest[..rest.len()] == *rest))
    }

    /// Whether it is stored under the same key as another entry, or one that differs only in the size of the digest.
    pub(super) fn is_like_entry(&self, other: &Self, tails: &KeyTails) -> bool {
        let rest = |entry: &Self| entry.tail().map(|number| tails.get(number).rest).unwrap_or_default();
        self.head == other.head
            && self.kind & !WIDE == other.kind & !WIDE
            && self.instance == other.instance
            && ((self.kind | other.kind) & WIDE == 0 || rest(self) == rest(other))
    }

    /// Calls `see` with the parts of the entry's key, as [`parts_of`] returns them.
    pub(super) fn with_parts<T>(&self, tails: &KeyTails, see: impl FnOnce(&[u8], u32) -> T) -> T {
        let names = u32::from(self.instance) << 16 | u32::from(self.kind & !WIDE);
        match self.head.get(..self.function().hash_bytes()) {
            Some(hash) => see(hash, names),
            None => see(self.key(tails).digest.hash(), names),
        }
    }

    fn function(&self) -> DigestFunction {
        DigestFunction::ALL.get(usize::from(self.kind & 7)).copied().unwrap_or(DigestFunction::Sha256)
    }

    /// The complete key. `tails` has the rest of hashes that are too long for an entry.
    pub(super) fn key(&self, tails: &KeyTails) -> Key {
        let mut hash = [0; MAX_HASH_BYTES];
        hash[..HEAD_BYTES].copy_from_slice(&self.head);
        if let Some(number) = self.tail() {
            hash[HEAD_BYTES..].copy_from_slice(&tails.get(number).rest);
        }
        let digest = Digest::from_array(self.function(), hash, self.size(tails));
        Key { digest, instance: self.instance(), kind: self.kind() }
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags.load(Relaxed) & flag != 0
    }

    /// Sets a flag; readers may do this. Returns whether it was not set before.
    pub(super) fn set(&self, flag: u8) -> bool {
        !self.has(flag) && self.flags.fetch_or(flag, Relaxed) & flag == 0
    }

    pub(super) fn clear(&mut self, flag: u8) {
        *self.flags.get_mut() &= !flag;
    }

    /// The name of its row of leases, which may be gone.
    pub(super) fn lease(&self) -> u32 {
        lease_of(self.pin.load(Relaxed))
    }

    pub(super) fn is_held(&self) -> bool {
        holds_of(self.pin.load(Relaxed)) > 0
    }
}
