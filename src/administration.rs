//! [`Administration`]: the parts of the server that the Admin service acts on, besides the store.

use crate::{access::AccessLoader, disk::BudgetUse, nondeterminism::NonDeterminismReports, reload::Reloader};
use std::{fmt, sync::Arc, time::SystemTime};

/// Reads how much of its disk budget a cache takes. May block.
type Gauge = Arc<dyn Fn() -> BudgetUse + Send + Sync>;

/// The parts of the server that the Admin service acts on. The default is a server that has none of these parts.
#[derive(Clone)]
pub struct Administration {
    /// When the server started.
    pub started_at: SystemTime,
    /// The staged input trees; `None` for a server that runs no actions.
    pub staged_trees: Option<Gauge>,
    /// The unpacked container images; `None` if actions cannot name any.
    pub images: Option<Gauge>,
    /// The actions that were seen with different outputs.
    pub(crate) reports: NonDeterminismReports,
    /// Reads the configuration again; `None` if the server has no configuration to read.
    pub(crate) reloader: Option<Reloader>,
    /// Revokes static tokens; `None` if the server has no access rules.
    pub(crate) access: Option<Arc<AccessLoader>>,
}

impl Default for Administration {
    fn default() -> Self {
        Self {
            started_at: SystemTime::now(),
            staged_trees: None,
            images: None,
            reports: Default::default(),
            reloader: None,
            access: None,
        }
    }
}

impl fmt::Debug for Administration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Administration").field("started_at", &self.started_at).finish_non_exhaustive()
    }
}
