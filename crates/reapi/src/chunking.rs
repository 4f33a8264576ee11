//! Content-defined chunking: the bytes of a blob decide where it is cut, so blobs with common parts share chunks.
//!
//! [`Chunking`] is a chunking function of the API with its parameters; [`Splitter`] cuts a stream of bytes with it.
//! Pure. It knows neither digests nor the store. Invariants: the concatenated chunks are the stream; the cuts do not
//! depend on how the bytes arrive; a splitter holds at most [`Chunking::lookahead`] plus what was pushed since the last
//! chunk was taken.

mod fast_cdc;
mod rep_max;
#[cfg(test)]
mod tests;

use crate::proto::reapi;
use bytes::{Bytes, BytesMut};

/// The buffer grows in steps of this size. Each step copies what is left after the last cut once.
const GROWTH_BYTES: usize = 4 * 1024 * 1024;

/// A chunking function of the API. Its parameters are within the range that the API allows (CAP-17).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Chunking {
    /// FastCDC 2020 at normalisation level 2.
    FastCdc2020(fast_cdc::FastCdcParameters),
    /// RepMaxCDC, with a minimum chunk size and a horizon.
    RepMaxCdc(rep_max::RepMaxParameters),
}

impl Chunking {
    /// The function that this server advertises and prefers. It uses the parameters that the API recommends, because
    /// only clients with equal parameters share chunks.
    pub const FAST_CDC: Self = Self::FastCdc2020(fast_cdc::FastCdcParameters::RECOMMENDED);
    /// The other advertised function, with the recommended parameters.
    pub const REP_MAX: Self = Self::RepMaxCdc(rep_max::RepMaxParameters::RECOMMENDED);

    /// FastCDC with another average size; `None` unless the average is a power of two from 1 KiB to 1 MiB.
    pub fn fast_cdc(average: u32, seed: u32) -> Option<Self> {
        fast_cdc::FastCdcParameters::new(average, seed).map(Self::FastCdc2020)
    }

    /// RepMaxCDC with other sizes; `None` unless the minimum is from 64 bytes to 1 MiB and the horizon is at most 16
    /// MiB.
    pub fn rep_max(min: u32, horizon: u32) -> Option<Self> {
        rep_max::RepMaxParameters::new(min, horizon).map(Self::RepMaxCdc)
    }

    /// The enum value of the function on the wire.
    pub fn wire(self) -> reapi::chunking_function::Value {
        match self {
            Self::FastCdc2020(_) => reapi::chunking_function::Value::FastCdc2020,
            Self::RepMaxCdc(_) => reapi::chunking_function::Value::RepMaxCdc,
        }
    }

    /// The parameters in the form of the capabilities, if this is FastCDC.
    pub fn fast_cdc_params(self) -> Option<reapi::FastCdc2020Params> {
        match self {
            Self::FastCdc2020(parameters) => Some(parameters.to_wire()),
            Self::RepMaxCdc(_) => None,
        }
    }

    /// The parameters in the form of the capabilities, if this is RepMaxCDC.
    pub fn rep_max_params(self) -> Option<reapi::RepMaxCdcParams> {
        match self {
            Self::FastCdc2020(_) => None,
            Self::RepMaxCdc(parameters) => Some(parameters.to_wire()),
        }
    }

    /// Smallest and largest chunk in bytes. Only the last chunk of a blob may be smaller (CAS-33).
    pub fn chunk_sizes(self) -> std::ops::RangeInclusive<u64> {
        let (min, max) = match self {
            Self::FastCdc2020(parameters) => (parameters.min(), parameters.max()),
            Self::RepMaxCdc(parameters) => (parameters.min(), parameters.max()),
        };
        min as u64..=max as u64
    }

    /// Whether every blob of this size is a single chunk, for any content.
    pub fn is_one_chunk(self, size: u64) -> bool {
        match self {
            Self::FastCdc2020(parameters) => size <= parameters.min() as u64,
            Self::RepMaxCdc(parameters) => size <= parameters.max() as u64,
        }
    }

    /// Number of bytes from the start of a chunk that determine where the chunk ends.
    pub fn lookahead(self) -> usize {
        match self {
            Self::FastCdc2020(parameters) => parameters.max(),
            Self::RepMaxCdc(parameters) => parameters.lookahead(),
        }
    }
}

/// Cuts one stream of bytes into chunks. Call [`Splitter::push`] with bytes as they arrive and [`Splitter::end`] after
/// the last. Take chunks with [`Splitter::next_chunk`] at any time.
#[derive(Debug)]
pub struct Splitter {
    cutter: Cutter,
    lookahead: usize,
    /// The bytes since the last cut.
    window: BytesMut,
    ended: bool,
}

#[derive(Debug)]
enum Cutter {
    FastCdc(fast_cdc::FastCdcCutter),
    RepMax(rep_max::RepMaxCutter),
}

impl Splitter {
    /// Creates a splitter at the start of a stream.
    pub fn new(chunking: Chunking) -> Self {
        let cutter = match chunking {
            Chunking::FastCdc2020(parameters) => Cutter::FastCdc(fast_cdc::FastCdcCutter::new(parameters)),
            Chunking::RepMaxCdc(parameters) => Cutter::RepMax(rep_max::RepMaxCutter::new(parameters)),
        };
        Self { cutter, lookahead: chunking.lookahead(), window: BytesMut::new(), ended: false }
    }

    /// Adds the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.window.capacity() - self.window.len() < bytes.len() {
            self.window.reserve(bytes.len().max(GROWTH_BYTES));
        }
        self.window.extend_from_slice(bytes);
    }

    /// Marks the end of the stream.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The next chunk; `None` if it needs more bytes, and at the end of the stream.
    pub fn next_chunk(&mut self) -> Option<Bytes> {
        if self.window.is_empty() || (self.window.len() < self.lookahead && !self.ended) {
            return None;
        }
        let length = match &mut self.cutter {
            Cutter::FastCdc(cutter) => cutter.cut(&self.window),
            Cutter::RepMax(cutter) => cutter.cut(&self.window),
        };
        Some(self.window.split_to(length.min(self.window.len())).freeze())
    }
}
