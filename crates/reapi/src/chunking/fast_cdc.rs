//! FastCDC 2020 as the API defines it: normalisation level 2, chunks from a quarter of the average to four times it, the
//! gear table made of the MD5 of 64 times each byte, every entry of it XORed with the seed.
//!
//! The search for a cut is that of the `fastcdc` crate, which the API names as its reference (CAS-34).

use crate::proto::reapi;
use fastcdc::v2020::{Normalization, cut_gear, get_gear_with_seed, select_masks};
use std::borrow::Cow;

/// The range of averages that clients accept (CAP-17).
const AVERAGES: std::ops::RangeInclusive<u32> = 1_024..=1_048_576;

/// What it is parametrised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parameters {
    average: u32,
    seed: u32,
}

impl Parameters {
    /// Those that the API recommends.
    pub const RECOMMENDED: Self = Self { average: 524_288, seed: 0 };

    /// `None` for an average that clients would not accept; some of them insist on a power of two.
    pub fn new(average: u32, seed: u32) -> Option<Self> {
        (average.is_power_of_two() && AVERAGES.contains(&average)).then_some(Self { average, seed })
    }

    /// Smallest chunk but the last.
    pub fn min(self) -> usize {
        self.average as usize / 4
    }

    /// Largest chunk.
    pub fn max(self) -> usize {
        self.average as usize * 4
    }

    /// As the capabilities have it.
    pub fn to_wire(self) -> reapi::FastCdc2020Params {
        reapi::FastCdc2020Params { avg_chunk_size_bytes: self.average.into(), seed: self.seed }
    }
}

/// Finds the ends of chunks; has no memory of earlier ones.
#[derive(Debug)]
pub struct Cutter {
    parameters: Parameters,
    strict: u64,
    relaxed: u64,
    gear: Cow<'static, [u64]>,
    /// The same, shifted left by one: the search takes two bytes a step.
    gear_shifted: Cow<'static, [u64]>,
}

impl Cutter {
    /// Its tables.
    pub fn new(parameters: Parameters) -> Self {
        let (strict, relaxed) = select_masks(parameters.average as usize, Normalization::Level2);
        let (gear, gear_shifted) = get_gear_with_seed(parameters.seed.into());
        Self { parameters, strict, relaxed, gear, gear_shifted }
    }

    /// Length of the first chunk of `window`, which has [`Parameters::max`] bytes or goes to the end of the blob.
    pub fn cut(&self, window: &[u8]) -> usize {
        let (min, max) = (self.parameters.min(), self.parameters.max());
        let average = self.parameters.average as usize;
        let (strict, relaxed) = (self.strict, self.relaxed);
        let (_, length) = cut_gear(
            window,
            min,
            average,
            max,
            strict,
            relaxed,
            strict << 1,
            relaxed << 1,
            &self.gear,
            &self.gear_shifted,
        );
        length
    }
}
