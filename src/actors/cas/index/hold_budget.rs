//! [`HoldBudget`]: how much one eviction may do while look-ups wait.

/// Looks at entries that take about as long as the removal of one.
const LOOKS_PER_ENTRY: usize = 16;

/// The work that is left under one hold of the lock that look-ups share.
#[derive(Debug, Clone, Copy)]
pub(in crate::actors::cas) struct HoldBudget {
    /// Entries that may be removed, results that need a removed blob included.
    pub(super) entries: usize,
    /// Entries that may be looked at to find those.
    pub(super) looks: usize,
}

impl HoldBudget {
    /// Work without a bound.
    pub(in crate::actors::cas) const UNLIMITED: Self = Self { entries: usize::MAX, looks: usize::MAX };

    /// The removal of this many entries.
    pub(in crate::actors::cas) fn new(entries: usize) -> Self {
        Self { entries, looks: entries.saturating_mul(LOOKS_PER_ENTRY) }
    }

    /// Whether the eviction has to go on under another hold.
    pub(in crate::actors::cas) fn is_used_up(&self) -> bool {
        self.entries == 0 || self.looks == 0
    }
}
