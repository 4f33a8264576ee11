//! Unique blobs: each starts with the salt of its run and a number.

use bytes::Bytes;
use gorego_reapi::{
    digest::DigestFunction,
    proto::reapi::{self, digest_function},
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes and their digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    pub data: Bytes,
    pub digest: reapi::Digest,
    pub function: DigestFunction,
}

impl Blob {
    /// Computes the digest of these bytes.
    pub fn new(function: DigestFunction, data: impl Into<Bytes>) -> Self {
        let data = data.into();
        Self { digest: function.digest(&data).to_wire(), data, function }
    }

    /// `blobs/[function/]hash/size`, the end of a read name.
    pub fn name(&self) -> String {
        format!("blobs/{}", tail(self.function, &self.digest))
    }

    /// `compressed-blobs/{compressor}/[function/]hash/size`, the end of a compressed read name.
    pub fn compressed_name(&self, compressor: &str) -> String {
        format!("compressed-blobs/{compressor}/{}", tail(self.function, &self.digest))
    }
}

/// `[function/]hash/size`, as in resource names (BS-03).
pub(crate) fn tail(function: DigestFunction, digest: &reapi::Digest) -> String {
    use digest_function::Value;
    // By number, so that functions that this build adds later have their segment too.
    let segment = match function.wire() {
        Value::Sha256tree => "sha256tree/",
        Value::Blake3 => "blake3/",
        Value::Gitsha1 => "gitsha1/",
        _ => "",
    };
    format!("{segment}{}/{}", digest.hash, digest.size_bytes)
}

/// The digest with the first character of its hash changed: well formed, but of no stored blob.
pub(crate) fn another_hash(digest: &reapi::Digest) -> reapi::Digest {
    let flipped = if digest.hash.starts_with('0') { "1" } else { "0" };
    let rest = digest.hash.get(1..).unwrap_or_default();
    reapi::Digest { hash: format!("{flipped}{rest}"), size_bytes: digest.size_bytes }
}

/// A source of unique bytes.
#[derive(Debug)]
pub(crate) struct Salt {
    run: uuid::Uuid,
    next: AtomicU64,
}

impl Salt {
    /// Creates a salt that differs from the salts of all other runs.
    pub(crate) fn new() -> Self {
        Self { run: uuid::Uuid::new_v4(), next: AtomicU64::new(0) }
    }

    /// The name of the run.
    pub(crate) fn run(&self) -> String {
        self.run.to_string()
    }

    /// A new word on each call.
    pub(crate) fn word(&self) -> String {
        format!("{}-{}", self.run, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Incompressible bytes. They are unique if there are at least 16 of them.
    pub(crate) fn noise(&self, size: usize) -> Vec<u8> {
        let [high, low] = [self.run.as_u128() >> 64, self.run.as_u128()].map(|half| half as u64);
        let mut state = high ^ self.next.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            // The generator splitmix64: every state is valid, and every bit of the output depends on the whole state.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state ^ low;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
        bytes.truncate(size);
        bytes
    }

    /// Compressible text. It is unique if it has at least 60 bytes.
    pub(crate) fn text(&self, size: usize) -> Vec<u8> {
        let mut bytes = format!("{}\n", self.word()).into_bytes();
        let line = b"the quick brown fox jumps over the lazy dog\n";
        while bytes.len() < size {
            bytes.extend_from_slice(line);
        }
        bytes.truncate(size);
        bytes
    }
}

impl Default for Salt {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_blobs_of_any_two_runs_are_equal_and_sizes_are_exact() {
        let runs = [Salt::new(), Salt::new()];
        let mut seen = std::collections::HashSet::new();
        for salt in &runs {
            for size in [60, 61, 1000] {
                for bytes in [salt.noise(size), salt.noise(size), salt.text(size), salt.text(size)] {
                    assert_eq!(bytes.len(), size);
                    assert!(seen.insert(bytes));
                }
            }
            assert_eq!(salt.noise(0).len() + salt.noise(7).len(), 7);
        }
    }
}
