//! The permissions that each RPC needs. An RPC without a row is refused by the [`gate`](crate::gate).

use super::services::{
    action_cache_server as action_cache, admin_server as admin, byte_stream_server as byte_stream,
    capabilities_server as capabilities, content_addressable_storage_server as cas,
    execution_server as execution, fetch_server as fetch, log_stream_service_server as log_stream,
    operations_server as operations, push_server as push,
};
use crate::access::permission::{
    ANY,
    Permission::{
        AcRead, AcWrite, Admin, Assets, CasRead, CasWrite, Execute, Logs, OperationsAll, OperationsOwn,
    },
    Permissions,
};

/// The methods of a service.
type ServiceMethods = &'static [(&'static str, Permissions)];

/// The permissions of a method that is about an operation: the first is enough for one's own operations.
const OPERATIONS: Permissions = &[OperationsOwn, OperationsAll];

/// Every method of every service. The methods of ByteStream need another permission for log streams, which depends on
/// the stream.
const SERVICES: &[(&str, ServiceMethods)] = &[
    (execution::SERVICE_NAME, &[("Execute", &[Execute]), ("WaitExecution", OPERATIONS)]),
    (action_cache::SERVICE_NAME, &[("GetActionResult", &[AcRead]), ("UpdateActionResult", &[AcWrite])]),
    (
        cas::SERVICE_NAME,
        &[
            ("FindMissingBlobs", &[CasRead]),
            ("BatchUpdateBlobs", &[CasWrite]),
            ("BatchReadBlobs", &[CasRead]),
            ("GetTree", &[CasRead]),
            ("SplitBlob", &[CasRead]),
            ("SpliceBlob", &[CasWrite]),
        ],
    ),
    (
        byte_stream::SERVICE_NAME,
        &[
            ("Read", &[CasRead, Logs, OperationsOwn, OperationsAll]),
            ("Write", &[CasWrite, Logs]),
            ("QueryWriteStatus", &[CasWrite, Logs]),
        ],
    ),
    (
        operations::SERVICE_NAME,
        &[
            ("ListOperations", OPERATIONS),
            ("GetOperation", OPERATIONS),
            ("DeleteOperation", OPERATIONS),
            ("CancelOperation", OPERATIONS),
            ("WaitOperation", OPERATIONS),
        ],
    ),
    (log_stream::SERVICE_NAME, &[("CreateLogStream", &[Logs])]),
    (fetch::SERVICE_NAME, &[("FetchBlob", &[Assets]), ("FetchDirectory", &[Assets])]),
    (push::SERVICE_NAME, &[("PushBlob", &[Assets, AcWrite]), ("PushDirectory", &[Assets, AcWrite])]),
    (capabilities::SERVICE_NAME, &[("GetCapabilities", ANY)]),
    (
        admin::SERVICE_NAME,
        &[
            ("GetStoreStats", &[Admin]),
            ("ReloadConfig", &[Admin]),
            ("PurgeResults", &[Admin]),
            ("ListNonDeterminism", &[Admin]),
            ("RevokeTokens", &[Admin]),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", &[]), ("Watch", &[])]),
    ("grpc.reflection.v1.ServerReflection", &[("ServerReflectionInfo", ANY)]),
    ("grpc.reflection.v1alpha.ServerReflection", &[("ServerReflectionInfo", ANY)]),
];

/// The path of every RPC, and its name in log lines and metrics.
pub(super) fn rpcs() -> impl Iterator<Item = (String, String)> {
    SERVICES.iter().flat_map(|(service, methods)| {
        let short = service.rsplit('.').next().unwrap_or(service);
        methods.iter().map(move |(method, _)| (format!("/{service}/{method}"), format!("{short}/{method}")))
    })
}

/// The permissions of the RPC with this path; `None` for a path without a row.
pub(super) fn of(path: &str) -> Option<Permissions> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let (_, methods) = SERVICES.iter().find(|(name, _)| *name == service)?;
    methods.iter().find(|(name, _)| *name == method).map(|(_, permissions)| *permissions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::documented::{table, written};
    use gorego_reapi::proto::DESCRIPTORS;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;
    use std::collections::{BTreeMap, BTreeSet};

    /// The paths of all RPCs in these descriptors.
    fn paths(descriptors: &[u8]) -> BTreeSet<String> {
        let files = FileDescriptorSet::decode(descriptors).unwrap().file;
        let services = files.iter().flat_map(|file| {
            file.service.iter().map(|service| (format!("/{}.{}/", file.package(), service.name()), service))
        });
        services
            .flat_map(|(start, service)| {
                service.method.iter().map(move |method| format!("{start}{}", method.name()))
            })
            .collect()
    }

    /// Nobody can add an RPC without deciding who may call it.
    #[test]
    fn every_rpc_has_a_row_and_every_row_an_rpc() {
        let mut rpcs = paths(DESCRIPTORS);
        for descriptors in [
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            rpcs.extend(paths(descriptors));
        }
        assert!(rpcs.len() > 25, "{rpcs:?}");
        let row = |(service, methods): &(&str, ServiceMethods)| {
            methods.iter().map(|(method, _)| format!("/{service}/{method}")).collect::<Vec<_>>()
        };
        let rows: BTreeSet<String> = SERVICES.iter().flat_map(row).collect();
        assert_eq!(rows, rpcs);
        assert!(rpcs.iter().all(|path| of(path).is_some()));
    }

    #[test]
    fn a_path_that_is_no_rpc_has_no_permissions() {
        for path in ["", "/", "//", "/grpc.health.v1.Health", "/grpc.health.v1.Health/", "/x/Check", "*"] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn the_documentation_has_the_permissions_of_every_rpc() {
        let documented =
            table("### What each RPC needs").into_iter().map(|(rpc, needs)| (rpc[0].to_owned(), needs));
        let methods = SERVICES.iter().flat_map(|(service, methods)| {
            methods
                .iter()
                .map(move |(method, permissions)| (format!("{service}/{method}"), written(permissions)))
        });
        assert_eq!(documented.collect::<BTreeMap<_, _>>(), methods.collect());
    }
}
