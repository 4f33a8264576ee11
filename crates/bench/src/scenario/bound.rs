//! [`Bound`]: the limit of the machine that the rate of a scenario is compared with.

use crate::{Figures, Limit, limits::Kind};

/// The limit of a scenario, and how much of it one call takes.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) kind: &'static Kind,
    takes: Takes,
}

#[derive(Debug)]
enum Takes {
    /// The content that it reads or writes, in MB.
    Content,
    /// This number of calls, processes or files.
    Count(usize),
}

impl Bound {
    /// Each call takes one of the calls or processes of this limit.
    pub(super) const fn calls(kind: &'static Kind) -> Option<Self> {
        Self::calls_of(1, kind)
    }

    /// Each call takes this number of the calls, processes or files of this limit.
    pub(super) const fn calls_of(count: usize, kind: &'static Kind) -> Option<Self> {
        Some(Self { kind, takes: Takes::Count(count) })
    }

    /// Each call takes as many MB of this limit as it reads or writes.
    pub(super) const fn content(kind: &'static Kind) -> Option<Self> {
        Some(Self { kind, takes: Takes::Content })
    }

    /// The share of the limit that these figures reach: 1 is all of it.
    pub(crate) fn share(&self, figures: &Figures, limit: &Limit) -> Option<f64> {
        let rate = match self.takes {
            Takes::Content => figures.megabytes_per_second,
            Takes::Count(count) => figures.calls_per_second * count as f64,
        };
        (limit.per_second > 0.0).then(|| rate / limit.per_second)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Figures, Latency, Limit, find};
    use std::collections::BTreeMap;

    #[test]
    fn a_share_counts_calls_or_content_or_files() {
        let latency_us = Latency { mean: 1.0, p50: 1.0, p90: 1.0, p99: 1.0, p999: 1.0, max: 1.0 };
        let figures = Figures {
            calls: 1,
            failed: 0,
            seconds: 1.0,
            calls_per_second: 30.0,
            units_per_second: 70.0,
            megabytes_per_second: 50.0,
            latency_us,
            errors: BTreeMap::new(),
        };
        let limit = |per_second| Limit { name: "a".into(), about: "b".into(), per_second, unit: "c".into() };
        let share = |name: &str, per_second| {
            let scenario = find(&[name.to_owned()]).unwrap()[0];
            scenario.bound.as_ref().unwrap().share(&figures, &limit(per_second))
        };
        assert_eq!(share("cache-hit", 40.0), Some(0.75));
        assert_eq!(share("read-large", 200.0), Some(0.25));
        assert_eq!(share("execute-outputs", 12_000.0), Some(0.5));
        assert_eq!(share("cache-hit", 0.0), None);
    }
}
