//! Quotas: what each principal may use in each instance, so that no principal can take everything.
//!
//! A principal that has authenticated has one account in each instance, whatever machine it calls from. Clients without
//! a credential have one account for each address. [`accounts`] counts requests and uploaded bytes; the scheduler
//! counts operations, whose limits are part of each [`Submit`](crate::actors::scheduler::messages::Submit). The
//! [`gate`](crate::gate) asks here, once for each request.
//!
//! Without limits, a request costs one atomic load. New rules apply from the next request on.

mod accounts;
pub mod limits;

use crate::{access::principal::Principal, caller::Caller, instance::Instance};
use accounts::{AccountKey, Metered, QuotaAccounts};
use arc_swap::ArcSwapOption;
use gorego_reapi::error::{Error, Result};
use limits::{QuotaLimits, QuotaRules};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// The quotas of all principals and instances. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Quotas(Arc<QuotasState>);

#[derive(Debug)]
struct QuotasState {
    /// `None` if no principal has a limit.
    rules: ArcSwapOption<QuotaRules>,
    accounts: Mutex<QuotaAccounts>,
    start: Instant,
}

/// The limits on the operations of one principal in one instance. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OperationLimits {
    /// Maximum number of unfinished operations.
    pub operations: Option<usize>,
    /// Unfinished operations that wait for a worker.
    pub queued: Option<usize>,
}

impl Default for Quotas {
    fn default() -> Self {
        Self::new(QuotaRules::default())
    }
}

impl Quotas {
    /// Quotas by these rules.
    pub fn new(rules: QuotaRules) -> Self {
        let state =
            QuotasState { rules: ArcSwapOption::empty(), accounts: Mutex::default(), start: Instant::now() };
        let quotas = Self(Arc::new(state));
        quotas.replace(rules);
        quotas
    }

    /// Replaces the rules. Where a limit stays the same, earlier use still counts.
    pub fn replace(&self, rules: QuotaRules) {
        self.0.rules.store((!rules.are_off()).then(|| Arc::new(rules)));
    }

    /// Whether no principal has a limit.
    pub(crate) fn are_off(&self) -> bool {
        self.0.rules.load().is_none()
    }

    /// The limits on the operations of a principal.
    pub(crate) fn operations_of(&self, principal: &Principal) -> OperationLimits {
        let limits = self.limits_of(principal).unwrap_or_default();
        OperationLimits { operations: limits.operations, queued: limits.queued }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// `OverQuota` if there were too many requests.
    pub(crate) fn count_request(
        &self,
        principal: &Principal,
        caller: Caller,
        instance: &Instance,
    ) -> Result<()> {
        let Some(limits) = self.limits_of(principal) else { return Ok(()) };
        let Some(per_second) = limits.requests else { return Ok(()) };
        self.take(AccountKey::of(principal, caller, instance), limits, Metered::Requests, 1, || {
            format!("{} sends more than {per_second} requests a second", named(principal))
        })
    }

    /// A meter for the bytes of an upload; `None` if there is no limit.
    pub(crate) fn upload_meter(
        &self,
        principal: &Principal,
        caller: Caller,
        instance: &Instance,
    ) -> Option<UploadMeter> {
        self.limits_of(principal)?.upload_bytes?;
        let key = AccountKey::of(principal, caller, instance);
        Some(UploadMeter { quotas: self.clone(), principal: principal.clone(), key, paid: AtomicU64::new(0) })
    }

    fn limits_of(&self, principal: &Principal) -> Option<QuotaLimits> {
        self.0.rules.load().as_ref().map(|rules| rules.of(principal.name()))
    }

    fn take(
        &self,
        key: AccountKey,
        limits: QuotaLimits,
        what: Metered,
        amount: u64,
        problem: impl FnOnce() -> String,
    ) -> Result<()> {
        let now_ms = u64::try_from(self.0.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut accounts = self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = accounts.take(key, limits, what, amount, now_ms);
        drop(accounts);
        taken.map_err(|retry_after| over_quota(&problem(), retry_after))
    }
}

/// Counts the bytes of one upload for its principal.
#[derive(Debug)]
pub(crate) struct UploadMeter {
    quotas: Quotas,
    principal: Principal,
    key: AccountKey,
    /// The bytes that were counted.
    paid: AtomicU64,
}

impl UploadMeter {
    /// Counts the bytes of the request up to this sum.
    ///
    /// # Errors
    /// `OverQuota` if the principal has uploaded too many bytes in the last hour.
    pub(crate) fn count_up_to(&self, received: u64) -> Result<()> {
        let new = received.saturating_sub(self.paid.fetch_max(received, Relaxed));
        let limits = self.quotas.limits_of(&self.principal).unwrap_or_default();
        let Some(bytes) = limits.upload_bytes.filter(|_| new > 0) else { return Ok(()) };
        self.quotas.take(self.key, limits, Metered::Upload, new, || {
            format!("{} uploads more than {bytes} bytes an hour", named(&self.principal))
        })
    }
}

impl AccountKey {
    fn of(principal: &Principal, caller: Caller, instance: &Instance) -> Self {
        Self { peer: principal.peer(caller.peer), instance: instance.id() }
    }
}

/// How a refusal refers to a principal.
fn named(principal: &Principal) -> &str {
    if principal.is_anonymous() { "your address" } else { principal.name() }
}

/// The refusal of a quota.
pub(crate) fn over_quota(problem: &str, retry_after: std::time::Duration) -> Error {
    let message = format!("{problem} (quotas); try again in {} s", retry_after.as_secs());
    Error::OverQuota { message, retry_after }
}
