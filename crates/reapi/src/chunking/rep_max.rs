//! RepMaxCDC: cuts where a rolling hash over 64 bytes is largest, so that each chunk has one to two times the minimum
//! size.
//!
//! A chunk may end from `min` to `min + horizon` bytes after its start, and at least `min` bytes before the end of the
//! blob. Some chunk will end at the position in this range with the largest hash (the first one, if several are equal).
//! If that would make this chunk `2 * min` bytes or longer, the search is repeated in the range that ends `min` bytes
//! before that position, so that a later chunk can still end there. This continues until a position is near enough. A
//! blob shorter than `2 * min` is one chunk.
//!
//! The hash (gear, with FastCDC's table) at a position depends only on the 64 bytes before it. So the largest hash of
//! each block of positions is kept from chunk to chunk, and a search compares blocks. Only the blocks at the two ends
//! of a range are hashed again.

use crate::proto::reapi;
use fastcdc::v2020::get_gear_with_seed;
use std::{borrow::Cow, collections::VecDeque};

/// Number of bytes that determine the hash at a position. Each byte shifts the hash by one bit.
const HASH_WINDOW: usize = 64;
/// Range of the minimum size. The API has no upper bound; this one and `MAX_HORIZON` bound the memory of a split.
const MINIMA: std::ops::RangeInclusive<u32> = 64..=1_048_576;
const MAX_HORIZON: u32 = 16 * 1_048_576;
/// Number of positions in a block. A search hashes at most two blocks again and reads one entry for each block in
/// between.
const BLOCK: usize = 4_096;

/// The parameters of RepMaxCDC, within the accepted range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RepMaxParameters {
    min: u32,
    horizon: u32,
}

impl RepMaxParameters {
    /// The parameters that the API recommends.
    pub const RECOMMENDED: Self = Self { min: 262_144, horizon: 8 * 262_144 };

    /// `None` for parameters that the API or this server does not allow.
    pub fn new(min: u32, horizon: u32) -> Option<Self> {
        (MINIMA.contains(&min) && horizon <= MAX_HORIZON).then_some(Self { min, horizon })
    }

    /// Smallest chunk in bytes, unless the blob is smaller.
    pub fn min(self) -> usize {
        self.min as usize
    }

    /// Largest chunk in bytes.
    pub fn max(self) -> usize {
        2 * self.min() - 1
    }

    /// Number of bytes that one search for a cut reads.
    pub fn lookahead(self) -> usize {
        2 * self.min() + self.horizon as usize
    }

    /// The parameters in the form of the capabilities.
    pub fn to_wire(self) -> reapi::RepMaxCdcParams {
        reapi::RepMaxCdcParams {
            min_chunk_size_bytes: self.min.into(),
            horizon_size_bytes: self.horizon.into(),
        }
    }
}

/// A position in the blob where it could be cut, and the hash at this position.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    hash: u64,
    position: u64,
}

impl Candidate {
    /// The candidate with the larger hash; `self` if they are equal, because it comes first.
    fn or_larger(self, later: Self) -> Self {
        if later.hash > self.hash { later } else { self }
    }
}

/// Finds the ends of consecutive chunks.
#[derive(Debug)]
pub(super) struct RepMaxCutter {
    parameters: RepMaxParameters,
    gear: Cow<'static, [u64]>,
    /// Start of the window, in bytes from the start of the blob.
    start: u64,
    /// The best candidate of each block of positions, as far as known, from block `first_block` on.
    best: VecDeque<Option<Candidate>>,
    first_block: u64,
}

impl RepMaxCutter {
    /// Creates a cutter at the start of a blob.
    pub(super) fn new(parameters: RepMaxParameters) -> Self {
        let (gear, _) = get_gear_with_seed(0);
        Self { parameters, gear, start: 0, best: VecDeque::new(), first_block: 0 }
    }

    /// Length of the first chunk of `window`. The window has [`RepMaxParameters::lookahead`] bytes or ends at the end
    /// of the blob. The next window starts where this chunk ends.
    pub(super) fn cut(&mut self, window: &[u8]) -> usize {
        let length = self.find(window);
        self.start += length as u64;
        while self.first_block * (BLOCK as u64) < self.start && self.best.pop_front().is_some() {
            self.first_block += 1;
        }
        length
    }

    fn find(&mut self, window: &[u8]) -> usize {
        let min = self.parameters.min();
        let seen = window.len().min(self.parameters.lookahead());
        if seen < 2 * min {
            return seen;
        }
        let mut last = seen - min;
        loop {
            let length = self.largest(window, min, last);
            if length < 2 * min {
                return length;
            }
            // The chunk has at least `min` bytes, so the loop ends.
            last = length - min;
        }
    }

    /// The first position in `from..=to` of the window with the largest hash; `from` is at least the hash window.
    fn largest(&mut self, window: &[u8], from: usize, to: usize) -> usize {
        let block = BLOCK as u64;
        let (first, end) = (self.start + from as u64, self.start + to as u64 + 1);
        // The whole blocks within the range, if any.
        let (head, tail) = (first.next_multiple_of(block), end - end % block);
        let mut best = if head < tail {
            let mut best = self.scan(window, first, head);
            for number in head / block..tail / block {
                let candidate = self.best_of_block(window, number);
                best = later(best, candidate);
            }
            later(best, self.scan(window, tail, end))
        } else {
            self.scan(window, first, end)
        };
        let best = best.get_or_insert(Candidate { hash: 0, position: first });
        usize::try_from(best.position - self.start).unwrap_or(from)
    }

    fn best_of_block(&mut self, window: &[u8], number: u64) -> Option<Candidate> {
        if self.best.is_empty() {
            self.first_block = number;
        }
        // Blocks are requested from the start of a range on, so none lies before the first block that is kept.
        let at = usize::try_from(number.checked_sub(self.first_block)?).ok()?;
        if self.best.len() <= at {
            self.best.resize(at + 1, None);
        }
        if let Some(known) = self.best.get(at).copied().flatten() {
            return Some(known);
        }
        let block = BLOCK as u64;
        let found = self.scan(window, number * block, (number + 1) * block);
        if let Some(place) = self.best.get_mut(at) {
            *place = found;
        }
        found
    }

    /// The best candidate among the positions `first..end` of the blob, found by hashing.
    fn scan(&self, window: &[u8], first: u64, end: u64) -> Option<Candidate> {
        let from = usize::try_from(first.checked_sub(self.start)?).ok()?;
        let count = usize::try_from(end.checked_sub(first)?).ok()?;
        let gear: &[u64; 256] = self.gear.as_ref().try_into().ok()?;
        let roll = |hash: u64, byte: u8| (hash << 1).wrapping_add(gear[usize::from(byte)]);
        let before = window.get(from.checked_sub(HASH_WINDOW)?..from)?;
        let bytes = window.get(from..from + count.checked_sub(1)?)?;
        let mut hash = before.iter().fold(0, |hash, &byte| roll(hash, byte));
        let mut best = Candidate { hash, position: first };
        let mut position = first;
        let (fours, rest) = bytes.as_chunks::<4>();
        for &[a, b, c, d] in fours {
            // The hash is a sum, so four steps can be summed independently of it and executed in parallel.
            let (one, two) = (roll(0, a), roll(roll(0, a), b));
            let (three, four) = (roll(two, c), roll(roll(two, c), d));
            let after = |bits: u32, sum: u64| (hash << bits).wrapping_add(sum);
            let hashes = [after(1, one), after(2, two), after(3, three), after(4, four)];
            if hashes.iter().any(|hash| *hash > best.hash) {
                for (hash, position) in hashes.into_iter().zip(position + 1..) {
                    best = best.or_larger(Candidate { hash, position });
                }
            }
            hash = hashes[3];
            position += 4;
        }
        for &byte in rest {
            hash = roll(hash, byte);
            position += 1;
            best = best.or_larger(Candidate { hash, position });
        }
        Some(best)
    }
}

fn later(best: Option<Candidate>, candidate: Option<Candidate>) -> Option<Candidate> {
    match (best, candidate) {
        (Some(best), Some(candidate)) => Some(best.or_larger(candidate)),
        (best, candidate) => best.or(candidate),
    }
}
