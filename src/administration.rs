//! [`Administration`]: what the Admin service acts on, besides the store. Only the wiring knows all of it.

use crate::{access::AccessLoader, disk::BudgetUse, nondeterminism::NonDeterminismReports, reload::Reloader};
use std::{fmt, sync::Arc, time::SystemTime};

/// Reads how much of their budget some things take. It may block.
type Gauge = Arc<dyn Fn() -> BudgetUse + Send + Sync>;

/// See the top of this file. The default is a server that has none of it.
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
    /// Reads the configuration again; `None` if there is none to read.
    pub(crate) reloader: Option<Reloader>,
    /// Revokes static tokens; `None` if there is nothing to revoke them from.
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
