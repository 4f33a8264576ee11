//! The Capabilities service: what this endpoint can do. It depends only on the settings and the policy, so it is cheap
//! and the same on every connection (CAP-19). Other files of this directory implement what it promises.

use super::{Edge, ProtocolSettings, cas::BATCH_MAX_BYTES, chunks};
use crate::{
    access::permission::Permission, actors::scheduler::settings::Priorities, call::Call,
    grpc::services::capabilities_server::Capabilities,
};
use gorego_reapi::{
    digest::DigestFunction,
    proto::{
        reapi::{
            ActionCacheUpdateCapabilities, CacheCapabilities, ExecutionCapabilities, GetCapabilitiesRequest,
            PriorityCapabilities, ServerCapabilities, compressor, priority_capabilities::PriorityRange,
            symlink_absolute_path_strategy,
        },
        semver::SemVer,
    },
    tree::NodeProperties,
};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Oldest supported version. Clients refuse a server whose oldest version is newer than this (CAP-02).
const LOW_VERSION: (i32, i32) = (2, 0);
/// Newest supported version: 2.1 promises `output_paths`, 2.2 `Action.platform`, 2.3 today's rules for `argv[0]`
/// (CAP-04).
const HIGH_VERSION: (i32, i32) = (2, 3);

#[derive(Debug)]
pub(crate) struct CapabilitiesService(pub Arc<Edge>);

#[tonic::async_trait]
impl Capabilities for CapabilitiesService {
    async fn get_capabilities(
        &self,
        request: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        let call = Call::of(request.extensions());
        let instance = self.0.gate.enter_for_any(&call, &request.get_ref().instance_name)?;
        let may = |permission| self.0.gate.permits(&call, &instance, permission);
        let rights = Rights {
            updates: may(Permission::AcWrite),
            executes: self.0.scheduler.is_some() && may(Permission::Execute),
        };
        let functions = &instance.policy().digest_functions;
        Ok(Response::new(capabilities(self.0.settings, functions, rights)))
    }
}

/// The client's rights in the instance that it asks about.
#[derive(Debug, Clone, Copy)]
struct Rights {
    /// Whether the client may write action results.
    updates: bool,
    /// Whether the client may execute actions.
    executes: bool,
}

fn capabilities(
    settings: ProtocolSettings,
    digest_functions: &[DigestFunction],
    rights: Rights,
) -> ServerCapabilities {
    let digest_functions: Vec<i32> = digest_functions.iter().map(|f| f.wire().into()).collect();
    // Priorities outside of this range are accepted and clamped to it (CAP-18).
    let Priorities { min, max } = settings.priorities;
    let priorities =
        PriorityCapabilities { priorities: vec![PriorityRange { min_priority: min, max_priority: max }] };
    let mut cache = CacheCapabilities {
        digest_functions: digest_functions.clone(),
        action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
            update_enabled: rights.updates,
        }),
        // Priorities of results are ignored, so no range is advertised (CAP-18).
        cache_priority_capabilities: None,
        max_batch_total_size_bytes: BATCH_MAX_BYTES as i64,
        symlink_absolute_path_strategy: symlink_absolute_path_strategy::Value::Allowed.into(),
        supported_compressors: vec![compressor::Value::Zstd.into()],
        supported_batch_update_compressors: vec![compressor::Value::Zstd.into()],
        max_cas_blob_size_bytes: i64::try_from(settings.max_blob_bytes).unwrap_or(i64::MAX),
        ..CacheCapabilities::default()
    };
    chunks::advertise(settings.chunking, &mut cache);
    // An endpoint that is only a cache omits this (CAP-01).
    let execution = rights.executes.then(|| ExecutionCapabilities {
        // Two clients read only this field (CAP-06). SHA-256 comes first if it is enabled.
        digest_function: digest_functions.first().copied().unwrap_or_default(),
        exec_enabled: true,
        execution_priority_capabilities: Some(priorities),
        supported_node_properties: NodeProperties::NAMES.iter().map(ToString::to_string).collect(),
        digest_functions,
    });
    ServerCapabilities {
        cache_capabilities: Some(cache),
        execution_capabilities: execution,
        deprecated_api_version: None,
        low_api_version: Some(version(LOW_VERSION)),
        high_api_version: Some(version(HIGH_VERSION)),
    }
}

fn version((major, minor): (i32, i32)) -> SemVer {
    SemVer { major, minor, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CommittedSize;

    const SETTINGS: ProtocolSettings = ProtocolSettings {
        max_blob_bytes: 7,
        compressed_committed_size: CommittedSize::Compressed,
        chunking: true,
        priorities: Priorities { min: -3, max: 4 },
    };

    /// CAP-02 to CAP-07, CAP-11 to CAP-14, CAP-16, CAP-18.
    #[test]
    fn what_clients_check_at_start_up_is_there() {
        let capabilities =
            capabilities(SETTINGS, DigestFunction::ALL, Rights { updates: true, executes: true });
        let cache = capabilities.cache_capabilities.unwrap();
        let execution = capabilities.execution_capabilities.unwrap();
        assert_eq!(capabilities.low_api_version, Some(version((2, 0))));
        assert_eq!(capabilities.high_api_version, Some(version((2, 3))));
        assert_eq!(capabilities.deprecated_api_version, None);
        assert!(execution.digest_functions.contains(&execution.digest_function));
        assert!(execution.digest_functions.iter().all(|f| cache.digest_functions.contains(f)));
        assert!(!cache.digest_functions.contains(&0));
        assert_eq!(execution.digest_function, DigestFunction::Sha256.wire() as i32);
        assert_eq!(cache.digest_functions.len(), 8);
        assert_eq!(cache.max_batch_total_size_bytes, 4_000_000);
        assert_eq!(cache.max_cas_blob_size_bytes, 7);
        assert_eq!(cache.supported_compressors, [compressor::Value::Zstd as i32]);
        assert_eq!(cache.supported_batch_update_compressors, [compressor::Value::Zstd as i32]);
        assert!(cache.split_blob_support && cache.splice_blob_support);
        assert_ne!(cache.symlink_absolute_path_strategy, 0);
        assert!(execution.exec_enabled);
        let range = PriorityRange { min_priority: -3, max_priority: 4 };
        assert_eq!(execution.execution_priority_capabilities.unwrap().priorities, [range], "CAP-18");
    }

    /// CAP-01, CAP-08, CAP-09.
    #[test]
    fn what_is_switched_off_is_not_promised() {
        let none = Rights { updates: false, executes: false };
        let settings = ProtocolSettings { chunking: false, ..SETTINGS };
        let off = capabilities(settings, DigestFunction::ALL, none);
        assert_eq!(off.execution_capabilities, None);
        let cache = off.cache_capabilities.unwrap();
        assert!(!cache.action_cache_update_capabilities.unwrap().update_enabled);
        assert!(!cache.split_blob_support && cache.fast_cdc_2020_params.is_none());
    }
}
