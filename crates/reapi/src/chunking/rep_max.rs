//! RepMaxCDC: cuts where a rolling hash over 64 bytes is largest, so that all chunks are of one to two times a minimum.
//!
//! A cut of a chunk may lie from `min` bytes after its start to `min + horizon`, and `min` bytes before the end of the blob
//! at the latest. The position in there whose hash is largest, the first of equals, is where some chunk is going to end.
//! If that would make this chunk `2 * min` bytes or more, the search is repeated up to `min` bytes before that position, so
//! that a later chunk can still end there; and so on until a position is near enough. A blob below `2 * min` is one chunk.
//!
//! The hash (gear, with FastCDC's table) at a position depends on the 64 bytes before it and on nothing else. So the largest
//! hash of each block of positions is kept from chunk to chunk, a search looks at blocks, and only the blocks at the two
//! ends of a range are hashed again.

use crate::proto::reapi;
use fastcdc::v2020::get_gear_with_seed;
use std::{borrow::Cow, collections::VecDeque};

/// Bytes that the hash at a position depends on; the hash is shifted by one bit for each.
const HASH_WINDOW: usize = 64;
/// Smallest and largest minimum. The API has no upper bound; this one, and that of the horizon, bound the memory of a split.
const MINIMA: std::ops::RangeInclusive<u32> = 64..=1_048_576;
const MAX_HORIZON: u32 = 16 * 1_048_576;
/// Positions of a block. A search hashes at most two blocks again and looks at one entry for each block between.
const BLOCK: usize = 4_096;

/// What it is parametrised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parameters {
    min: u32,
    horizon: u32,
}

impl Parameters {
    /// Those that the API recommends.
    pub const RECOMMENDED: Self = Self { min: 262_144, horizon: 8 * 262_144 };

    /// `None` for what the API or this server does not allow.
    pub fn new(min: u32, horizon: u32) -> Option<Self> {
        (MINIMA.contains(&min) && horizon <= MAX_HORIZON).then_some(Self { min, horizon })
    }

    /// Smallest chunk, unless the blob is smaller.
    pub fn min(self) -> usize {
        self.min as usize
    }

    /// Largest chunk.
    pub fn max(self) -> usize {
        2 * self.min() - 1
    }

    /// Bytes that are looked at for one cut.
    pub fn lookahead(self) -> usize {
        2 * self.min() + self.horizon as usize
    }

    /// As the capabilities have it.
    pub fn to_wire(self) -> reapi::RepMaxCdcParams {
        reapi::RepMaxCdcParams {
            min_chunk_size_bytes: self.min.into(),
            horizon_size_bytes: self.horizon.into(),
        }
    }
}

/// A place in the blob where it could be cut, and the hash there.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    hash: u64,
    /// Bytes from the start of the blob.
    position: u64,
}

impl Candidate {
    /// The one with the larger hash; of equal ones `self`, which comes first.
    fn or_larger(self, later: Self) -> Self {
        if later.hash > self.hash { later } else { self }
    }
}

/// Finds the ends of chunks, one after another.
#[derive(Debug)]
pub struct Cutter {
    parameters: Parameters,
    gear: Cow<'static, [u64]>,
    /// Where the window begins, in bytes from the start of the blob.
    start: u64,
    /// The best of each block of positions that is known so far, from block `first_block` on.
    best: VecDeque<Option<Candidate>>,
    first_block: u64,
}

impl Cutter {
    /// A cutter at the start of a blob.
    pub fn new(parameters: Parameters) -> Self {
        let (gear, _) = get_gear_with_seed(0);
        Self { parameters, gear, start: 0, best: VecDeque::new(), first_block: 0 }
    }

    /// Length of the first chunk of `window`, which has [`Parameters::lookahead`] bytes or goes to the end of the blob. The
    /// next window begins where this chunk ends.
    pub fn cut(&mut self, window: &[u8]) -> usize {
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
            // At least `min`, so this ends.
            last = length - min;
        }
    }

    /// The first position in `from..=to` of the window whose hash is the largest; `from` is at least the hash window.
    fn largest(&mut self, window: &[u8], from: usize, to: usize) -> usize {
        let block = BLOCK as u64;
        let (first, end) = (self.start + from as u64, self.start + to as u64 + 1);
        // Whole blocks within the range, if any.
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
        // Blocks are asked for from the start of a range on, so none lies before the first that is kept.
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

    /// The best of the positions `first..end` of the blob, by hashing.
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
            // The hash is a sum, so four steps can be summed up apart from it: they need not wait for one another.
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
