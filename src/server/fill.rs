//! Fills the settings of each part of the server from the configuration. The configuration does not depend on these
//! parts. Pure.

use crate::{
    action::TimeoutPolicy,
    actors::{
        asset::{AssetSettings, origins::Origins},
        cas::{LeaseTimes, PackingSettings, StoreSettings, SyncPolicy},
        scheduler::settings::{Priorities, SchedulerConfig, SchedulerSettings},
    },
    config::{Durability, ExecutionSettings, MAX_CONCURRENCY, Settings},
    grpc::ProtocolSettings,
    log_streams::{LogSettings, MAX_STREAM_BYTES, StreamLimits},
    node::NodeName,
};
use std::time::Duration;

pub(super) fn store_settings(settings: &Settings) -> StoreSettings {
    StoreSettings {
        root: settings.cache_dir.clone(),
        max_bytes: settings.max_size_bytes,
        max_blob_bytes: settings.max_blob_bytes,
        partial_upload_retention: settings.partial_upload_retention,
        leases: LeaseTimes {
            named: whole_seconds(settings.build_lease),
            unnamed: whole_seconds(settings.unnamed_build_lease),
        },
        result_links_bytes: settings.result_links_bytes,
        sync: match settings.durability {
            Durability::Process => SyncPolicy::Never,
            Durability::Disk => SyncPolicy::BeforeAnswer,
        },
        scrub_bytes_per_second: settings.scrub_bytes_per_second,
        zstd_level: settings.zstd_level,
        packing: settings.compression.map(|compression| PackingSettings {
            after_secs: whole_seconds(compression.after),
            min_bytes: compression.min_bytes,
            min_saving_percent: compression.min_saving_percent,
            cpu_percent: compression.cpu_percent,
        }),
        timeouts: settings
            .execution
            .as_ref()
            .map_or(TimeoutPolicy::UNLIMITED, |execution| execution.timeouts),
    }
}

/// Rounds up to whole seconds.
fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(1_000)).unwrap_or(u32::MAX)
}

pub(super) fn protocol_settings(settings: &Settings) -> ProtocolSettings {
    ProtocolSettings {
        max_blob_bytes: settings.max_blob_bytes,
        compressed_committed_size: settings.compressed_committed_size,
        chunking: settings.chunking,
        priorities: settings.execution.as_ref().map_or(Priorities { min: 0, max: 0 }, |e| e.priorities),
    }
}

pub(super) fn asset_settings(settings: &Settings) -> AssetSettings {
    let assets = settings.assets.clone();
    AssetSettings {
        origins: Origins::new(assets.hosts, assets.networks),
        push: assets.push,
        concurrency: assets.concurrency,
        // A larger one could not be stored.
        max_download_bytes: assets.max_download_bytes.min(settings.max_blob_bytes),
        max_unpacked_bytes: assets.max_unpacked_bytes,
        timeout: assets.timeout,
        max_redirects: assets.max_redirects,
        max_age: assets.max_age,
        file: settings.cache_dir.join("v1").join("assets"),
    }
}

/// Run streams are kept as long as the operations that name them, and each slot may have one more. A reload can raise
/// the number of slots to [`MAX_CONCURRENCY`]. Run streams hold no bytes.
pub(super) fn log_settings(settings: &Settings) -> LogSettings {
    let (kept, streams) = settings.execution.as_ref().map_or((Duration::ZERO, 0), |execution| {
        (execution.retention, execution.retained_operations.saturating_add(MAX_CONCURRENCY))
    });
    let clients = settings.log_streams;
    LogSettings {
        client_streams: clients.enabled,
        clients: StreamLimits {
            streams: clients.max_streams,
            bytes: clients.max_bytes,
            stream_bytes: MAX_STREAM_BYTES,
            idle: Some(clients.retention),
            kept: clients.retention,
        },
        runs: StreamLimits { streams, bytes: 0, stream_bytes: 0, idle: None, kept },
        spool_directory: settings.cache_dir.clone(),
    }
}

pub(super) fn scheduler_settings(node: NodeName, execution: &ExecutionSettings) -> SchedulerSettings {
    SchedulerSettings::new(SchedulerConfig {
        node,
        queue_size: execution.queue_size,
        priorities: execution.priorities,
        priority_ageing: execution.priority_ageing,
        unknown_properties: execution.unknown_properties,
        queue_timeout: execution.queue_timeout,
        transfer_timeout: execution.transfer_timeout,
        retention: execution.retention,
        retained_operations: execution.retained_operations,
        abandon_grace: execution.abandon_grace,
        contended_abandon_grace: execution.contended_abandon_grace,
        max_attempts: execution.max_attempts,
    })
}
