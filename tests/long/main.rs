//! Tests that take minutes to hours. CI compiles them and does not run them; `README.md` says how and when to.
#![allow(clippy::unwrap_used, missing_docs)]

mod kills;
mod load;
mod soak;
#[path = "../support/mod.rs"]
mod support;

pub(crate) use load::{Load, Stored};

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

/// SplitMix64, so that a seed repeats a run.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// A generator with the seed of the environment, or a new one, which is printed.
    pub(crate) fn seeded(test: &str) -> Self {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        let seed = setting("LONG_SEED", now.as_nanos() as u64);
        println!("{test}: LONG_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// A generator for another task.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.number())
    }

    /// Bytes of a size that is usually small.
    pub(crate) fn blob(&mut self) -> Vec<u8> {
        let most = 1 << self.below(22);
        let words = 1 + self.below(most) / 8;
        (0..words).flat_map(|_| self.number().to_le_bytes()).collect()
    }
}
