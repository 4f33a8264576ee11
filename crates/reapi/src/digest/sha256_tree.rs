//! SHA256TREE: SHA-256 of each KiB, joined by a binary tree (see DigestFunction in the API).
//!
//! The hash of a blob of at most [`LEAF_BYTES`] is its SHA-256. A larger blob is split after the largest power of two
//! that leaves a non-empty right part. The concatenated hashes of both parts are one block for the compression function
//! of SHA-256, which starts from other constants and omits the final addition.
//!
//! Memory is one hash per level: two subtrees of equal size are joined at once.

use sha2::{Digest as _, Sha256, block_api::compress256};

/// Size of a leaf, which is hashed with plain SHA-256.
const LEAF_BYTES: usize = 1024;

/// Initial state: the fractional parts of the square roots of the primes from 23 to 53.
const START: [u32; 8] =
    [0xcbbb_9d5d, 0x629a_292a, 0x9159_015a, 0x152f_ecd8, 0x6733_2667, 0x8eb4_4a87, 0xdb0c_2e0d, 0x47b5_481d];

type Hash = [u8; 32];

/// The hashing state of one blob.
#[derive(Clone, Default)]
pub(super) struct Sha256Tree {
    /// The current leaf. A full leaf is closed only when more bytes follow, so the last leaf is never empty.
    leaf: Sha256,
    leaf_bytes: usize,
    /// Number of closed leaves.
    leaves: u64,
    /// Hashes of complete subtrees, largest first. Their sizes in leaves are the bits of `leaves`.
    subtrees: Vec<Hash>,
}

impl Sha256Tree {
    /// Adds the next bytes of the blob.
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.leaf_bytes == LEAF_BYTES {
                self.finish_leaf();
            }
            let (now, later) = bytes.split_at(bytes.len().min(LEAF_BYTES - self.leaf_bytes));
            self.leaf.update(now);
            self.leaf_bytes += now.len();
            bytes = later;
        }
    }

    fn finish_leaf(&mut self) {
        let mut hash: Hash = std::mem::take(&mut self.leaf).finalize().into();
        self.leaf_bytes = 0;
        self.leaves += 1;
        for _ in 0..self.leaves.trailing_zeros() {
            if let Some(left) = self.subtrees.pop() {
                hash = join(&left, &hash);
            }
        }
        self.subtrees.push(hash);
    }

    /// The hash of all bytes that were added.
    pub(super) fn finish(self) -> Hash {
        let last: Hash = self.leaf.finalize().into();
        self.subtrees.iter().rev().fold(last, |right, left| join(left, &right))
    }
}

fn join(left: &Hash, right: &Hash) -> Hash {
    let mut block = [0; 64];
    block[..32].copy_from_slice(left);
    block[32..].copy_from_slice(right);
    let mut state = START;
    compress256(&mut state, &[block]);
    let mut hash = [0; 32];
    // The library adds the initial state to the output, as SHA-256 does; this subtracts it again.
    for ((bytes, word), start) in hash.chunks_exact_mut(4).zip(state).zip(START) {
        bytes.copy_from_slice(&word.wrapping_sub(start).to_be_bytes());
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A direct transcription of the definition.
    fn by_definition(blob: &[u8]) -> Hash {
        if blob.len() <= LEAF_BYTES {
            return Sha256::digest(blob).into();
        }
        let left = (blob.len() as u64).next_power_of_two() / 2;
        let (left, right) = blob.split_at(left as usize);
        join(&by_definition(left), &by_definition(right))
    }

    /// Values from an independent implementation, written from the definition in another language for this test,
    /// without a library for the compression function.
    #[test]
    fn known_blobs_have_their_known_hashes() {
        for (size, hash) in [
            (1025, "3360d15384a19ded505535b64417c1643850c28eac810a782c36da836e4b87e3"),
            (2048, "2a7899dd46482691e3436190ff144476fbab355ab5ea9d63ae51ac056a4e1f3f"),
            (5000, "99777168e7f62697ba9006b6b9c07de473dc384d84a7620e8ccbc63e43b81f5d"),
        ] {
            let blob: Vec<u8> = (0..size).map(|n: u32| (n * 7 + n / 256) as u8).collect();
            let mut state = Sha256Tree::default();
            state.update(&blob);
            assert_eq!(const_hex::encode(state.finish()), hash, "{size}");
        }
    }

    #[test]
    fn the_tree_grown_from_the_left_is_the_tree_parted_from_the_top() {
        let blob: Vec<u8> = (0..70_000u64).map(|n| ((n * n) >> 3) as u8).collect();
        for size in (0..8_200).step_by(41).chain([1023, 1024, 1025, 2048, 2049, 4096, 65_536, 65_537, 70_000])
        {
            let mut state = Sha256Tree::default();
            state.update(&blob[..size]);
            assert_eq!(state.finish(), by_definition(&blob[..size]), "{size}");
        }
    }
}
