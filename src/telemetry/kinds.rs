//! Counters with one label whose values are an enumeration.

use super::Labels;
use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use std::marker::PhantomData;

/// An enumeration of the values of a label.
pub(super) trait LabelValue: Copy + PartialEq + 'static {
    /// The name of the label.
    const LABEL: &'static str;
    /// All values. Each has a counter from the start.
    const ALL: &'static [Self];

    /// The value in the text.
    fn name(self) -> &'static str;
}

/// A counter for each value. All of them exist from the start.
#[derive(Debug)]
pub(super) struct KindCounters<K> {
    counters: Vec<Counter>,
    of: PhantomData<K>,
}

impl<K: LabelValue> KindCounters<K> {
    pub(super) fn register(registry: &mut Registry, name: &str, help: &str) -> Self {
        let family = Family::<Labels<1>, Counter>::default();
        registry.register(name, help, family.clone());
        let counter = |kind: &K| family.get_or_create_owned(&[(K::LABEL, kind.name())]);
        Self { counters: K::ALL.iter().map(counter).collect(), of: PhantomData }
    }

    pub(super) fn count(&self, kind: K) {
        if let Some(at) = K::ALL.iter().position(|other| *other == kind)
            && let Some(counter) = self.counters.get(at)
        {
            counter.inc();
        }
    }
}
