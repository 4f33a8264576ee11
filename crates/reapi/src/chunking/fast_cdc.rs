//! FastCDC 2020 as the API defines it: normalisation level 2, chunks from a quarter of the average to four times the
//! average. The gear table holds the MD5 of 64 copies of each byte, and each entry is XORed with the seed.
//!
//! The `fastcdc` crate, which the API names as its reference, searches for the cuts (CAS-34).

use crate::proto::reapi;
use fastcdc::v2020::{Normalization, cut_gear, get_gear_with_seed, select_masks};
use std::borrow::Cow;

/// The average sizes that clients accept (CAP-17).
const AVERAGES: std::ops::RangeInclusive<u32> = 1_024..=1_048_576;

/// The parameters of FastCDC, within the accepted range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FastCdcParameters {
    average: u32,
    seed: u32,
}

impl FastCdcParameters {
    /// The parameters that the API recommends.
    pub const RECOMMENDED: Self = Self { average: 524_288, seed: 0 };

    /// `None` for an average that clients would reject. Some clients accept only powers of two.
    pub fn new(average: u32, seed: u32) -> Option<Self> {
        (average.is_power_of_two() && AVERAGES.contains(&average)).then_some(Self { average, seed })
    }

    /// Smallest chunk in bytes, except for the last of a blob.
    pub fn min(self) -> usize {
        self.average as usize / 4
    }

    /// Largest chunk in bytes.
    pub fn max(self) -> usize {
        self.average as usize * 4
    }

    /// The parameters in the form of the capabilities.
    pub fn to_wire(self) -> reapi::FastCdc2020Params {
        reapi::FastCdc2020Params { avg_chunk_size_bytes: self.average.into(), seed: self.seed }
    }
}

/// Finds the ends of chunks. Keeps no state between chunks.
#[derive(Debug)]
pub(super) struct FastCdcCutter {
    parameters: FastCdcParameters,
    strict: u64,
    relaxed: u64,
    gear: Cow<'static, [u64]>,
    /// The gear table shifted left by one bit: the search processes two bytes in a step.
    gear_shifted: Cow<'static, [u64]>,
}

impl FastCdcCutter {
    /// Computes the tables for these parameters.
    pub(super) fn new(parameters: FastCdcParameters) -> Self {
        let (strict, relaxed) = select_masks(parameters.average as usize, Normalization::Level2);
        let (gear, gear_shifted) = get_gear_with_seed(parameters.seed.into());
        Self { parameters, strict, relaxed, gear, gear_shifted }
    }

    /// Length of the first chunk of `window`. The window has [`FastCdcParameters::max`] bytes or ends at the end of the
    /// blob.
    pub(super) fn cut(&self, window: &[u8]) -> usize {
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
