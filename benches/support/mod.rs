//! How the benchmarks of the store open one.

#![allow(dead_code, clippy::unwrap_used)]

use gorego::{
    action::TimeoutPolicy,
    actors::cas::{CasActor, LeaseTimes, StoreSettings, client::Cas},
    instance::{Instance, Instances},
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::runtime::Handle;

/// How long a store that was closed may stay locked.
const LOCKED: Duration = Duration::from_secs(30);

/// Settings of a store that never evicts and does no work in the background.
pub(crate) fn settings(root: PathBuf) -> StoreSettings {
    StoreSettings {
        root,
        max_bytes: 1 << 40,
        max_blob_bytes: 1 << 34,
        partial_upload_retention: Duration::from_secs(60),
        zstd_level: 1,
        leases: LeaseTimes::default(),
        result_links_bytes: 1 << 20,
        sync: Default::default(),
        packing: None,
        scrub_bytes_per_second: 0,
        timeouts: TimeoutPolicy { default: Duration::from_secs(60), max: Duration::from_secs(600) },
    }
}

/// Opens a store with one instance, the default one.
pub(crate) fn open(settings: &StoreSettings) -> (Cas, Instance) {
    let instances = Instances::new([""]).unwrap();
    let store = CasActor::open(settings.clone(), &instances, Handle::current()).unwrap().launch();
    (store, instances.get("").unwrap())
}

/// Opens a store that was just closed. The last file operation of the closed store may still hold its lock, and no
/// event tells its end.
pub(crate) async fn reopen(settings: &StoreSettings) -> CasActor {
    let instances = Instances::new([""]).unwrap();
    let end = Instant::now() + LOCKED;
    loop {
        match CasActor::open(settings.clone(), &instances, Handle::current()) {
            Ok(store) => return store,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
