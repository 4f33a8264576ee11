//! The Admin service (`proto/gorego/v1/admin.proto`): store, configuration and trust in action results.
//!
//! Each call writes one audit event, which describes the request and its outcome.

use super::{Edge, convert, page_token, services::admin_server::Admin};
use crate::{
    actors::cas::{StoreInspection, Tally, Totals, results::ResultCondition},
    call::Call,
    disk::BudgetUse,
    instance::Instance,
    logging::Event,
    reload::{KeyChange, Reloaded},
};
use gorego_reapi::{
    duration::time_from_wire,
    error::{Error, Result},
    proto::gorego::{
        BoundedStats, ConfigChange, GetStoreStatsRequest, ListNonDeterminismRequest,
        ListNonDeterminismResponse, PurgeResultsRequest, PurgeResultsResponse, ReloadConfigRequest,
        ReloadConfigResponse, RevokeTokensRequest, RevokeTokensResponse, RevokedToken, StoreStats,
    },
    status::shorten,
};
use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tonic::{Request, Response, Status};

/// Target of the audit events.
const AUDIT: &str = "gorego::audit";
/// Name of the audit event of this service.
const ADMIN_REQUEST: &str = "admin_request";

/// Largest number of results that one request for a purge examines.
const PURGE_PAGE: usize = 1_000;
/// Default number of reports in a page, and the largest one. A report takes up to 7 kB.
const REPORTS_PAGE: usize = 50;
const MAX_REPORTS_PAGE: usize = 100;
/// Most tokens that one request revokes.
const REVOKED_MAX: usize = 1_000;
/// Longest id of a token in a request, in bytes. Real ids have 16 bytes.
const TOKEN_ID_MAX_BYTES: usize = 64;
/// Longest description of a request in an audit event, in bytes.
const DETAILS_MAX_BYTES: usize = 1024;
/// Longest text in the conditions of a purge, in bytes. Longer ones are not stored.
const CONDITION_MAX_BYTES: usize = 512;

#[derive(Debug)]
pub(crate) struct AdminService(pub Arc<Edge>);

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_store_stats(
        &self,
        request: Request<GetStoreStatsRequest>,
    ) -> Result<Response<StoreStats>, Status> {
        let call = Call::of(request.extensions());
        let answer = self.store_stats(&call).await;
        audited(&call, "GetStoreStats", "", answer)
    }

    async fn reload_config(
        &self,
        request: Request<ReloadConfigRequest>,
    ) -> Result<Response<ReloadConfigResponse>, Status> {
        let call = Call::of(request.extensions());
        let dry_run = request.get_ref().dry_run;
        let answer = self.reload(&call, dry_run).await;
        audited(&call, "ReloadConfig", if dry_run { "dry run" } else { "" }, answer)
    }

    async fn purge_results(
        &self,
        request: Request<PurgeResultsRequest>,
    ) -> Result<Response<PurgeResultsResponse>, Status> {
        let call = Call::of(request.extensions());
        let answer = self.purge(&call, request.get_ref()).await;
        audited(&call, "PurgeResults", &purge_details(request.get_ref()), answer)
    }

    async fn list_non_determinism(
        &self,
        request: Request<ListNonDeterminismRequest>,
    ) -> Result<Response<ListNonDeterminismResponse>, Status> {
        let call = Call::of(request.extensions());
        let answer = self.reports(&call, request.get_ref());
        audited(&call, "ListNonDeterminism", "", answer)
    }

    async fn revoke_tokens(
        &self,
        request: Request<RevokeTokensRequest>,
    ) -> Result<Response<RevokeTokensResponse>, Status> {
        let call = Call::of(request.extensions());
        let details = shorten(request.get_ref().ids.join(" "), DETAILS_MAX_BYTES);
        let answer = self.revoke(&call, request.into_inner().ids).await;
        audited(&call, "RevokeTokens", &details, answer)
    }
}

/// Logs an administrative request with its outcome. `details` describes the request. It is empty if the name of
/// the method is enough.
fn audited<T>(call: &Call, method: &str, details: &str, answer: Result<T>) -> Result<Response<T>, Status> {
    let peer = call.peer().map(|peer| peer.to_string()).unwrap_or_default();
    let error = answer.as_ref().err();
    let shown = error.map(ToString::to_string);
    let principal = call.principal();
    Event::info(AUDIT, ADMIN_REQUEST)
        .with("method", method)
        .with("principal", principal.name())
        .with("peer", &*peer)
        .with("grpc_code", error.map_or("OK", Error::code_name))
        .with_some("instance", call.instance().map(|instance| instance.name()))
        .with_some("details", Some(details).filter(|details| !details.is_empty()))
        .with_some("error", shown.as_deref())
        .log(format_args!("{} called {method}", principal.name()));
    answer.map(Response::new).map_err(Status::from)
}

impl AdminService {
    async fn store_stats(&self, call: &Call) -> Result<StoreStats> {
        self.0.gate.administer(call)?;
        let store = self.0.cas.inspect().await?;
        let administration = self.0.administration.clone();
        let cas = self.0.cas.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let read =
                |gauge: Option<&Arc<dyn Fn() -> BudgetUse + Send + Sync>>| gauge.map(|gauge| usage(gauge()));
            (
                read(administration.staged_trees.as_ref()),
                read(administration.images.as_ref()),
                cas.disk_free(),
                administration.started_at,
            )
        });
        let (staged_trees, images, disk_free, started_at) =
            looked.await.map_err(|_| Error::internal("the disk could not be inspected"))?;
        Ok(StoreStats {
            staged_trees,
            images,
            disk_free_bytes: disk_free.map(wire),
            started_at: Some(started_at.into()),
            ..stats(store)
        })
    }
}

impl AdminService {
    async fn reload(&self, call: &Call, dry_run: bool) -> Result<ReloadConfigResponse> {
        self.0.gate.administer(call)?;
        let reloader = self.0.administration.reloader.as_ref();
        let reloader = reloader.ok_or_else(|| Error::Unimplemented("there is no configuration".into()))?;
        let Reloaded { applied, needs_restart, warnings, .. } = reloader.reload(dry_run).await?;
        let changes = |changes: Vec<KeyChange>| {
            let change = |KeyChange { key, description }| ConfigChange { key, description };
            changes.into_iter().map(change).collect()
        };
        Ok(ReloadConfigResponse {
            applied: changes(applied),
            needs_restart: changes(needs_restart),
            warnings,
        })
    }

    async fn purge(&self, call: &Call, request: &PurgeResultsRequest) -> Result<PurgeResultsResponse> {
        let instance = self.0.gate.enter(call, &request.instance_name)?;
        let condition = condition(&instance, request)?;
        // After a restart, results are in other slots.
        let started_at = self.0.administration.started_at;
        let binding = format!(
            "purge {} of {:?} with {condition:?} since {started_at:?}",
            request.remove,
            instance.name()
        );
        let from = match request.page_token.as_str() {
            "" => 0,
            token => u32::try_from(page_token::open(&binding, token)?).unwrap_or(u32::MAX),
        };
        let max = page_size(request.page_size, PURGE_PAGE, PURGE_PAGE)?;
        let purged = self.0.cas.purge_results(&instance, &condition, from, max, request.remove).await?;
        Ok(PurgeResultsResponse {
            results: purged.results,
            examined: wire(purged.examined),
            unreadable: wire(purged.unreadable),
            next_page_token: purged
                .next
                .map(|next| page_token::seal(&binding, next.into()))
                .unwrap_or_default(),
        })
    }
}

impl AdminService {
    async fn revoke(&self, call: &Call, ids: Vec<String>) -> Result<RevokeTokensResponse> {
        self.0.gate.administer(call)?;
        if ids.is_empty() || ids.len() > REVOKED_MAX || ids.iter().any(|id| id.len() > TOKEN_ID_MAX_BYTES) {
            return Err(Error::Invalid(format!(
                "ids: name 1 to {REVOKED_MAX} tokens, each by an id of at most {TOKEN_ID_MAX_BYTES} bytes"
            )));
        }
        let access = self.0.administration.access.clone();
        let access = access.ok_or_else(|| Error::Unimplemented("this server has no tokens".into()))?;
        let revoked = tokio::task::spawn_blocking(move || access.revoke(&ids)).await;
        let revoked = revoked.map_err(|_| Error::internal("the tokens could not be revoked"))??;
        let tokens = revoked.into_iter().map(|token| RevokedToken { id: token.id, roles: token.roles });
        Ok(RevokeTokensResponse { tokens: tokens.collect() })
    }
}

impl AdminService {
    fn reports(
        &self,
        call: &Call,
        request: &ListNonDeterminismRequest,
    ) -> Result<ListNonDeterminismResponse> {
        let instance = self.0.gate.enter(call, &request.instance_name)?;
        // After a restart, the reports have other numbers.
        let started_at = self.0.administration.started_at;
        let binding = format!("reports of {:?} since {started_at:?}", instance.name());
        let before = match request.page_token.as_str() {
            "" => u64::MAX,
            token => page_token::open(&binding, token)?,
        };
        let max = page_size(request.page_size, REPORTS_PAGE, MAX_REPORTS_PAGE)?;
        let page = self.0.administration.reports.page(instance.name(), before, max);
        Ok(ListNonDeterminismResponse {
            reports: page.reports.iter().map(|report| (**report).clone()).collect(),
            next_page_token: page.next.map(|next| page_token::seal(&binding, next)).unwrap_or_default(),
        })
    }
}

/// Describes a purge for the audit event.
fn purge_details(request: &PurgeResultsRequest) -> String {
    let action =
        request.action_digest.as_ref().map(|digest| format!("{}/{}", digest.hash, digest.size_bytes));
    let since = request.since.as_ref().and_then(time_from_wire);
    let since = since.map(|since| humantime::format_rfc3339_seconds(since).to_string());
    let conditions = [
        ("action", action.as_deref().unwrap_or_default()),
        ("invocation", &*request.invocation_id),
        ("principal", &*request.principal),
        ("worker", &*request.worker),
        ("since", since.as_deref().unwrap_or_default()),
    ];
    let conditions = conditions.iter().filter(|(_, value)| !value.is_empty());
    let conditions: Vec<_> = conditions.map(|(name, value)| format!("{name}={value}")).collect();
    let what = if request.remove { "removes" } else { "shows" };
    shorten(format!("{what} {}", conditions.join(" ")), DETAILS_MAX_BYTES)
}

fn condition(instance: &Instance, request: &PurgeResultsRequest) -> Result<ResultCondition> {
    let text = |value: &str, field: &str| match value.len() {
        0 => Ok(None),
        1..=CONDITION_MAX_BYTES => Ok(Some(value.to_owned())),
        _ => Err(Error::Invalid(format!("{field} is longer than {CONDITION_MAX_BYTES} bytes"))),
    };
    let action = request
        .action_digest
        .as_ref()
        .map(|digest| convert::digest(instance, request.digest_function, Some(digest), "action_digest"));
    let since = request.since.as_ref().map(|since| {
        time_from_wire(since).ok_or_else(|| Error::invalid("since is before 1970 or not a valid time"))
    });
    let condition = ResultCondition {
        action: action.transpose()?,
        invocation: text(&request.invocation_id, "invocation_id")?,
        principal: text(&request.principal, "principal")?,
        worker: text(&request.worker, "worker")?,
        since: since.transpose()?,
    };
    if condition == ResultCondition::default() {
        return Err(Error::invalid(
            "say which results to purge: action_digest, invocation_id, principal, worker or since",
        ));
    }
    Ok(condition)
}

/// The number of entries of a page.
fn page_size(asked: i32, default: usize, max: usize) -> Result<usize> {
    match usize::try_from(asked) {
        Ok(0) => Ok(default),
        Ok(size) => Ok(size.min(max)),
        Err(_) => Err(Error::invalid("page_size is negative")),
    }
}

fn stats(store: StoreInspection) -> StoreStats {
    let StoreInspection { totals, running_uploads, partial_uploads, tally, oldest_use } = store;
    let Totals {
        blobs, results, zstd_forms, used, held, leased, reserved, deleting, overhead, limit, ..
    } = totals;
    let Totals { packed_blobs, packed_content, packed_used, .. } = totals;
    let Tally { evicted: entries, evicted_bytes: bytes, broken_promises, .. } = tally;
    StoreStats {
        max_bytes: wire(limit),
        used_bytes: wire(used),
        held_bytes: wire(held),
        leased_bytes: wire(leased),
        broken_promises: wire(broken_promises),
        reserved_bytes: wire(reserved),
        deleting_bytes: wire(deleting),
        overhead_bytes: wire(overhead),
        blobs: wire(blobs),
        results: wire(results),
        zstd_forms: wire(zstd_forms),
        compressed_blobs: wire(packed_blobs),
        compressed_content_bytes: wire(packed_content),
        compressed_used_bytes: wire(packed_used),
        evicted_entries: wire(entries),
        evicted_bytes: wire(bytes),
        oldest_use: oldest_use.map(|seconds| (UNIX_EPOCH + Duration::from_secs(seconds.into())).into()),
        running_uploads: wire(running_uploads as u64),
        partial_uploads: wire(partial_uploads as u64),
        ..StoreStats::default()
    }
}

fn usage(BudgetUse { count, bytes, max_bytes }: BudgetUse) -> BoundedStats {
    BoundedStats { count: wire(count), bytes: wire(bytes), max_bytes: wire(max_bytes) }
}

fn wire(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
