//! The files that the server keeps beside the store. If they are on the same file system, they count against the
//! store's limit.

use super::execution_setup::ExecutionSetup;
use crate::{actors::cas::client::Cas, config::Settings, log_streams::LogStreams};
use std::{os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

/// Makes the store count the other files of the server on its file system.
pub(super) fn count(
    cas: &Cas,
    settings: &Settings,
    setup: Option<&Arc<ExecutionSetup>>,
    log_streams: &LogStreams,
) {
    let log_streams = log_streams.clone();
    cas.count_beside("log_streams", move || log_streams.client_bytes());
    let Some(setup) = setup.filter(|setup| share_disk(setup.build_root.path(), &settings.cache_dir)) else {
        return;
    };
    let (runs, trees) = (setup.build_root.clone(), setup.build_root.clone());
    cas.count_beside("exec_directories", move || runs.bytes_of_runs());
    cas.count_beside("staged_trees", move || trees.staged_usage().bytes);
    if let Some(images) = setup.images.clone() {
        cas.count_beside("images", move || images.usage().bytes);
    }
}

/// Whether two directories are on the same file system.
fn share_disk(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| path.metadata().map(|metadata| metadata.dev()).ok();
    device(one).is_some() && device(one) == device(other)
}
