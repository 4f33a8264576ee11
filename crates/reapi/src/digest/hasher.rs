//! [`Hasher`]: computes the digest of a blob that arrives in pieces, with any function.

use super::{Digest, DigestFunction, sha256_tree::Sha256Tree};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use std::fmt;

/// Computes the [`Digest`] of a blob that arrives in pieces.
#[derive(Clone)]
pub struct Hasher {
    function: DigestFunction,
    size: u64,
    state: State,
}

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    // Boxed, because it is ten times as large as the others.
    Blake3(Box<blake3::Hasher>),
    Sha256Tree(Sha256Tree),
    Sha384(Sha384),
    Sha512(Sha512),
    Sha1(Sha1),
    Md5(Md5),
}

impl Hasher {
    pub(super) fn new(function: DigestFunction, size: u64) -> Self {
        let state = match function {
            DigestFunction::Sha256 => State::Sha256(Sha256::new()),
            DigestFunction::Blake3 => State::Blake3(Box::default()),
            DigestFunction::Sha256Tree => State::Sha256Tree(Sha256Tree::default()),
            DigestFunction::Sha384 => State::Sha384(Sha384::new()),
            DigestFunction::Sha512 => State::Sha512(Sha512::new()),
            DigestFunction::Sha1 => State::Sha1(Sha1::new()),
            DigestFunction::GitSha1 => State::Sha1(Sha1::new_with_prefix(format!("blob {size}\0"))),
            DigestFunction::Md5 => State::Md5(Md5::new()),
        };
        Self { function, size: 0, state }
    }

    /// Adds the next bytes of the blob.
    pub fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        match &mut self.state {
            State::Sha256(state) => state.update(bytes),
            State::Blake3(state) => drop(state.update(bytes)),
            State::Sha256Tree(state) => state.update(bytes),
            State::Sha384(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
            State::Sha1(state) => state.update(bytes),
            State::Md5(state) => state.update(bytes),
        }
    }

    /// Number of bytes added so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of all bytes that were added.
    pub fn finish(self) -> Digest {
        let digest = |hash: &[u8]| Digest::new(self.function, hash, self.size);
        match self.state {
            State::Sha256(state) => digest(&state.finalize()),
            State::Blake3(state) => digest(state.finalize().as_bytes()),
            State::Sha256Tree(state) => digest(&state.finish()),
            State::Sha384(state) => digest(&state.finalize()),
            State::Sha512(state) => digest(&state.finalize()),
            State::Sha1(state) => digest(&state.finalize()),
            State::Md5(state) => digest(&state.finalize()),
        }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher")
            .field("function", &self.function)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Published values for "abc"; the value of GITSHA1 is the output of `git hash-object`.
    #[test]
    fn known_blobs_have_their_known_hashes() {
        for (function, hash) in [
            (DigestFunction::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (DigestFunction::Blake3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
            (DigestFunction::Sha256Tree, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                DigestFunction::Sha384,
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
                 8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                DigestFunction::Sha512,
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
            (DigestFunction::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (DigestFunction::GitSha1, "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"),
            (DigestFunction::Md5, "900150983cd24fb0d6963f7d28e17f72"),
        ] {
            let digest = function.digest(b"abc");
            assert_eq!((digest.hash_hex().as_str(), digest.size()), (hash, 3), "{}", function.name());
        }
    }

    proptest! {
        #[test]
        fn the_digest_does_not_depend_on_how_the_bytes_arrive(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3_000), 0..8),
        ) {
            let whole = pieces.concat();
            for &function in DigestFunction::ALL {
                let mut hasher = function.hasher(whole.len() as u64);
                for piece in &pieces {
                    hasher.update(piece);
                }
                prop_assert_eq!(hasher.size(), whole.len() as u64);
                prop_assert_eq!(hasher.finish(), function.digest(&whole));
            }
        }
    }
}
