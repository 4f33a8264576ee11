//! Chunking against its references, and what holds for any bytes.
//!
//! CAS-34's vectors are of an image that is not kept here. In their place stand the results of the implementations that the
//! API names, run once over bytes that are made on the spot: the `fastcdc` crate 3.2.1 for FastCDC, and go-cdc 0.0.10 for
//! RepMaxCDC. Two plain implementations after the API's description say the same of any bytes.

use super::*;
use crate::digest::DigestFunction;
use md5::{Digest as _, Md5};
use proptest::prelude::*;

/// SplitMix64; what the references were run over.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Cuts a blob whose bytes arrive in pieces of these sizes, over and over.
fn split_in_pieces(chunking: Chunking, blob: &[u8], pieces: &[usize]) -> Vec<Bytes> {
    let mut splitter = Splitter::new(chunking);
    let mut chunks = vec![];
    let (mut rest, mut sizes) = (blob, pieces.iter().cycle());
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
        splitter.push(piece);
        chunks.extend(std::iter::from_fn(|| splitter.next_chunk()));
        rest = after;
    }
    splitter.end();
    chunks.extend(std::iter::from_fn(|| splitter.next_chunk()));
    chunks
}

fn lengths(chunking: Chunking, blob: &[u8]) -> Vec<usize> {
    split_in_pieces(chunking, blob, &[256 * 1024]).iter().map(Bytes::len).collect()
}

/// The gear table: the first half of the MD5 of 64 times each byte. The API's text speaks of the MD5 of the byte, but all its
/// reference implementations have this table.
fn gear(byte: u8) -> u64 {
    u64::from_be_bytes(Md5::digest([byte; 64])[..8].try_into().unwrap())
}

/// FastCDC a byte at a time.
fn plain_fast_cdc(average: usize, seed: u64, mut rest: &[u8]) -> Vec<usize> {
    let (strict, relaxed) = fastcdc::v2020::select_masks(average, fastcdc::v2020::Normalization::Level2);
    let table: Vec<u64> = (0..=255).map(|byte| gear(byte) ^ seed).collect();
    let mut lengths = vec![];
    while !rest.is_empty() {
        let end = rest.len().min(average * 4);
        // Bytes are looked at in pairs: an odd one at the end of the blob is no place to cut before.
        let last = end - end % 2;
        let mut hash = 0u64;
        let cut = (average / 4..last).find(|&at| {
            hash = (hash << 1).wrapping_add(table[usize::from(rest[at])]);
            hash & (if at < average { strict } else { relaxed }) == 0
        });
        lengths.push(cut.unwrap_or(end));
        rest = &rest[cut.unwrap_or(end)..];
    }
    lengths
}

/// RepMaxCDC with every hash at hand.
fn plain_rep_max(min: usize, horizon: usize, blob: &[u8]) -> Vec<usize> {
    let table: Vec<u64> = (0..=255).map(gear).collect();
    let mut hash = 0u64;
    let mut hashes = vec![0];
    hashes.extend(blob.iter().map(|byte| {
        hash = (hash << 1).wrapping_add(table[usize::from(*byte)]);
        hash
    }));
    let (mut start, mut lengths) = (0, vec![]);
    while start < blob.len() {
        let seen = (blob.len() - start).min(2 * min + horizon);
        let mut length = seen;
        if seen >= 2 * min {
            let mut last = start + seen - min;
            loop {
                let from = start + min;
                let best = (from..=last).rev().max_by_key(|&at| hashes[at]).unwrap();
                length = best - start;
                if best < from + min {
                    break;
                }
                last = best - min;
            }
        }
        lengths.push(length);
        start += length;
    }
    lengths
}

fn summary(lengths: &[usize]) -> (usize, String) {
    let bytes: Vec<u8> = lengths.iter().flat_map(|length| (*length as u64).to_le_bytes()).collect();
    (lengths.len(), DigestFunction::Sha256.digest(&bytes).hash_hex()[..16].to_owned())
}

/// CAS-34.
#[test]
fn cuts_are_those_of_the_reference_implementations() {
    let noise = noise(8 << 20, 1);
    let million = &noise[..1 << 20];
    let odd = &million[..(1 << 20) - 777];
    let bits: Vec<u8> = million.iter().map(|byte| byte & 1).collect();
    let periodic: Vec<u8> = (0..1 << 20).map(|at| noise[at % 1_000]).collect();
    let fast = |average, seed| Chunking::fast_cdc(average, seed).unwrap();
    let rep = |min, horizon| Chunking::rep_max(min, horizon).unwrap();
    for (chunking, blob, chunks, lengths_sha256) in [
        (Chunking::FAST_CDC, &noise[..], 16, "c738820dc6c5c283"),
        (fast(524_288, 666), &noise, 14, "baab68f369337702"),
        (fast(1_024, 0), million, 889, "1d4442d9d34121d7"),
        (fast(16_384, 0), million, 59, "f635ae24bd4f7a94"),
        (fast(16_384, 666), million, 57, "7db00f7597d508b2"),
        (fast(16_384, 7), odd, 54, "69466100aef15c55"),
        (fast(4_096, 0), &bits, 221, "a121b34832eb2ac3"),
        (fast(4_096, 0), &periodic, 64, "7ad0bd513622196f"),
        (Chunking::REP_MAX, &noise, 25, "e2c33fa73be9a9cb"),
        (rep(4_096, 32_768), million, 191, "8dae62cfa58bada3"),
        (rep(64, 512), million, 12_342, "f00011382d1d04f8"),
        (rep(2_048, 0), million, 512, "eaadc1736c6c325f"),
        (rep(2_048, 1), million, 511, "367651ee64705d01"),
        (rep(5_000, 12_345), odd, 158, "337ecdafcea43f7f"),
        (rep(2_048, 16_384), &bits, 385, "cc3684370581e4f2"),
        (rep(2_048, 16_384), &[0; 1 << 20], 512, "eaadc1736c6c325f"),
        (rep(2_048, 16_384), &periodic, 350, "1c67bdf97ed0b558"),
    ] {
        let cuts = lengths(chunking, blob);
        assert_eq!(summary(&cuts), (chunks, lengths_sha256.to_owned()), "{chunking:?}: {:?}", &cuts[..8]);
    }
}

/// CAP-17.
#[test]
fn parameters_that_clients_would_not_take_cannot_be_had() {
    for average in [0, 512, 1_000, 1_025, 2_097_152, u32::MAX] {
        assert_eq!(Chunking::fast_cdc(average, 0), None, "{average}");
    }
    for (min, horizon) in [(0, 0), (63, 512), (1_048_577, 0), (u32::MAX, 0), (64, u32::MAX)] {
        assert_eq!(Chunking::rep_max(min, horizon), None, "{min} {horizon}");
    }
    let fast = Chunking::FAST_CDC.fast_cdc_params().unwrap();
    assert_eq!((fast.avg_chunk_size_bytes, fast.seed), (524_288, 0));
    let rep = Chunking::REP_MAX.rep_max_params().unwrap();
    assert_eq!((rep.min_chunk_size_bytes, rep.horizon_size_bytes), (262_144, 2_097_152));
}

/// Which stretches of noise a blob is made of; zeros and short periods find other ways through the search than noise.
fn blob() -> impl Strategy<Value = Vec<u8>> {
    let stretch = (0u8..4, 0usize..12_000, 0u64..4).prop_map(|(kind, length, seed)| match kind {
        0 => vec![seed as u8; length],
        1 => noise(37, seed).into_iter().cycle().take(length).collect(),
        _ => noise(length, seed),
    });
    proptest::collection::vec(stretch, 0..6).prop_map(|stretches| stretches.concat())
}

fn functions() -> impl Strategy<Value = Chunking> {
    prop_oneof![
        (10u32..13, 0u32..3).prop_map(|(bits, seed)| Chunking::fast_cdc(1 << bits, seed).unwrap()),
        (64u32..1_500, 0u32..9_000).prop_map(|(min, horizon)| Chunking::rep_max(min, horizon).unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// CAS-30, CAS-33, CAS-34.
    #[test]
    fn chunks_are_the_blob_within_the_bounds_however_it_arrives(
        blob in blob(),
        chunking in functions(),
        pieces in proptest::collection::vec(1usize..5_000, 1..5),
    ) {
        let chunks = split_in_pieces(chunking, &blob, &pieces);
        let lengths: Vec<usize> = chunks.iter().map(Bytes::len).collect();
        prop_assert_eq!(chunks.concat(), &blob[..]);
        let sizes = chunking.chunk_sizes();
        for (at, length) in lengths.iter().enumerate() {
            let is_last = at + 1 == lengths.len();
            prop_assert!(*length > 0 && *length as u64 <= *sizes.end());
            prop_assert!(is_last || *length as u64 >= *sizes.start());
        }
        if chunking.is_one_chunk(blob.len() as u64) {
            prop_assert_eq!(lengths.len(), usize::from(!blob.is_empty()));
        }
        let plain = match chunking {
            Chunking::FastCdc2020(parameters) => {
                let wire = parameters.to_wire();
                plain_fast_cdc(wire.avg_chunk_size_bytes as usize, wire.seed.into(), &blob)
            }
            Chunking::RepMaxCdc(parameters) => {
                let wire = parameters.to_wire();
                plain_rep_max(wire.min_chunk_size_bytes as usize, wire.horizon_size_bytes as usize, &blob)
            }
        };
        prop_assert_eq!(lengths, plain);
    }
}

/// What all this is for. Where the chunks meet again is a matter of luck, so it is the mean that counts, over the same changes
/// each time.
#[test]
fn a_change_in_the_middle_changes_the_chunks_around_it_only() {
    for chunking in [Chunking::rep_max(1_024, 8_192), Chunking::fast_cdc(2_048, 0)] {
        let fresh = (0..40u64).map(|seed| {
            let before = noise(200_000, seed);
            let (before_it, after_it) = before.split_at(20_000 + 4_000 * seed as usize);
            let after = [before_it, &noise(1 + 5 * seed as usize, seed + 100), after_it].concat();
            let known = split_in_pieces(chunking.unwrap(), &before, &[65_536]);
            let chunks = split_in_pieces(chunking.unwrap(), &after, &[65_536]);
            chunks.iter().filter(|chunk| !known.contains(chunk)).map(Bytes::len).sum::<usize>()
        });
        let mean = fresh.sum::<usize>() / 40;
        assert!(mean < 10_000, "{mean} bytes are in new chunks");
    }
}
