//! [`QuotaAccounts`]: what principals have used lately, in requests and bytes. Pure. The time is an argument, in
//! milliseconds.
//!
//! Memory is bounded: there are at most [`MAX_ACCOUNTS`]. An account whose buckets are full again is equal to a new
//! one, and is forgotten when its place is needed. While all accounts are in use, further principals share one account.

use super::limits::QuotaLimits;
use crate::{
    caller::Peer,
    instance::InstanceId,
    rate::{Bucket, Rate},
};
use std::{collections::HashMap, time::Duration};

/// Maximum number of accounts. An account takes about 200 bytes.
pub(super) const MAX_ACCOUNTS: usize = 10_000;
/// The shortest time between two searches for accounts that can be forgotten.
const TIDY_INTERVAL_MS: u64 = 1_000;
/// How many seconds' worth of requests may come at once: build tools send their requests in bursts.
const BURST_SECONDS: u64 = 2;
const SECONDS_OF_AN_HOUR: u64 = 3_600;
/// The shortest and the longest time after which a client is asked to try again.
const RETRY_SECONDS: std::ops::RangeInclusive<u64> = 1..=60;

/// The principal of an account, and its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AccountKey {
    pub(crate) peer: Peer,
    pub(crate) instance: InstanceId,
}

/// The recent use of all principals, in requests and bytes.
#[derive(Debug, Default)]
pub(super) struct QuotaAccounts {
    accounts: HashMap<AccountKey, QuotaAccount>,
    /// The account of all principals for which there is no place.
    shared: Option<QuotaAccount>,
    tidied_ms: u64,
}

/// What one principal may still use in one instance.
#[derive(Debug)]
struct QuotaAccount {
    limits: QuotaLimits,
    requests: Option<Bucket>,
    upload: Option<Bucket>,
}

/// The quantity that is over its quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Metered {
    /// Requests at either port.
    Requests,
    /// The bytes of uploads.
    Upload,
}

impl QuotaAccount {
    fn new(limits: QuotaLimits, now_ms: u64) -> Self {
        let requests = limits
            .requests
            .map(|per_second| Rate { burst: per_second.saturating_mul(BURST_SECONDS), per_second });
        let upload = limits
            .upload_bytes
            .map(|bytes| Rate { burst: bytes, per_second: (bytes / SECONDS_OF_AN_HOUR).max(1) });
        let bucket = |rate| Bucket::new(rate, now_ms);
        Self { limits, requests: requests.map(bucket), upload: upload.map(bucket) }
    }

    /// Whether it is equal to a new account.
    fn is_idle(&mut self, now_ms: u64) -> bool {
        let mut buckets = self.requests.iter_mut().chain(&mut self.upload);
        buckets.all(|bucket| bucket.is_full(now_ms))
    }
}

impl QuotaAccounts {
    /// Takes this much from an account. Takes nothing if that is too much, and returns when to try again.
    ///
    /// An amount that exceeds a full account takes everything, so that a single large message is not refused for ever.
    pub(super) fn take(
        &mut self,
        key: AccountKey,
        limits: QuotaLimits,
        what: Metered,
        amount: u64,
        now_ms: u64,
    ) -> Result<(), Duration> {
        let account = self.account(key, limits, now_ms);
        let bucket = match what {
            Metered::Requests => account.requests.as_mut(),
            Metered::Upload => account.upload.as_mut(),
        };
        let Some(bucket) = bucket else { return Ok(()) };
        let amount = amount.min(bucket.burst());
        if bucket.take(amount, now_ms) {
            return Ok(());
        }
        let seconds = bucket.ready_in_ms(amount, now_ms).div_ceil(1_000);
        Err(Duration::from_secs(seconds.clamp(*RETRY_SECONDS.start(), *RETRY_SECONDS.end())))
    }

    /// The account of this key. If its limits have changed, it starts again as a new account.
    fn account(&mut self, key: AccountKey, limits: QuotaLimits, now_ms: u64) -> &mut QuotaAccount {
        if self.accounts.len() >= MAX_ACCOUNTS && !self.accounts.contains_key(&key) && !self.make_room(now_ms)
        {
            // The shared account keeps the limits of the first principal until it is idle. Otherwise each principal
            // with other limits would fill it again.
            let shared = self.shared.get_or_insert_with(|| QuotaAccount::new(limits, now_ms));
            if shared.limits != limits && shared.is_idle(now_ms) {
                *shared = QuotaAccount::new(limits, now_ms);
            }
            return shared;
        }
        let account = self.accounts.entry(key).or_insert_with(|| QuotaAccount::new(limits, now_ms));
        if account.limits != limits {
            *account = QuotaAccount::new(limits, now_ms);
        }
        account
    }

    /// Forgets idle accounts. Returns whether there is room for another one.
    fn make_room(&mut self, now_ms: u64) -> bool {
        if now_ms >= self.tidied_ms.saturating_add(TIDY_INTERVAL_MS) {
            self.tidied_ms = now_ms;
            self.accounts.retain(|_, account| !account.is_idle(now_ms));
        }
        self.accounts.len() < MAX_ACCOUNTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    const MB: u64 = 1_000_000;
    const LIMITS: QuotaLimits =
        QuotaLimits { operations: None, queued: None, upload_bytes: Some(3_600 * MB), requests: Some(10) };

    fn key(peer: u32) -> AccountKey {
        AccountKey { peer: Peer::V4(Ipv4Addr::from_bits(peer)), instance: InstanceId(0) }
    }

    fn requests(accounts: &mut QuotaAccounts, key: AccountKey, tries: u64, now_ms: u64) -> usize {
        let mut took = |_: &u64| accounts.take(key, LIMITS, Metered::Requests, 1, now_ms).is_ok();
        (0..tries).filter(|number| took(number)).count()
    }

    #[test]
    fn requests_come_in_bursts_of_two_seconds_and_then_at_their_rate() {
        let mut accounts = QuotaAccounts::default();
        assert_eq!(requests(&mut accounts, key(1), 100, 0), 20);
        let refused = accounts.take(key(1), LIMITS, Metered::Requests, 1, 0);
        assert_eq!(refused, Err(Duration::from_secs(1)));
        assert_eq!(requests(&mut accounts, key(2), 100, 0), 20, "others have their own");
        let elsewhere = AccountKey { instance: InstanceId(1), ..key(1) };
        assert_eq!(requests(&mut accounts, elsewhere, 100, 0), 20, "and so has each instance");
        assert_eq!(requests(&mut accounts, key(1), 100, 500), 5);
    }

    #[test]
    fn uploads_of_an_hour_may_come_at_once_and_the_client_is_told_when_to_try_again() {
        let mut accounts = QuotaAccounts::default();
        let mut take = |bytes, now_ms| accounts.take(key(1), LIMITS, Metered::Upload, bytes, now_ms);
        assert_eq!(take(3_590 * MB, 0), Ok(()));
        assert_eq!(take(30 * MB, 0), Err(Duration::from_secs(20)));
        assert_eq!(take(30 * MB, 19_999), Err(Duration::from_secs(1)));
        assert_eq!(take(30 * MB, 20_000), Ok(()));
        assert_eq!(take(3_000 * MB, 20_000), Err(Duration::from_secs(60)), "at most");
        assert_eq!(take(u64::MAX, 4_000_000), Ok(()), "it takes all that an hour gives");
        assert_eq!(take(MB, 4_000_000), Err(Duration::from_secs(1)));
    }

    #[test]
    fn what_has_no_limit_is_not_counted_and_new_limits_count_at_once() {
        let mut accounts = QuotaAccounts::default();
        let free = QuotaLimits { requests: None, ..LIMITS };
        for _ in 0..1_000 {
            assert_eq!(accounts.take(key(1), free, Metered::Requests, 1, 0), Ok(()));
        }
        assert_eq!(requests(&mut accounts, key(1), 100, 0), 20);
        let more = QuotaLimits { requests: Some(100), ..LIMITS };
        assert_eq!(accounts.take(key(1), more, Metered::Requests, 200, 0), Ok(()));
    }

    #[test]
    fn memory_is_bounded_and_those_without_an_account_share_one() {
        let mut accounts = QuotaAccounts::default();
        let full = u32::try_from(MAX_ACCOUNTS).unwrap();
        for peer in 0..full {
            assert_eq!(requests(&mut accounts, key(peer), 100, 0), 20);
        }
        assert_eq!(requests(&mut accounts, key(full), 15, 0), 15);
        assert_eq!(requests(&mut accounts, key(full + 1), 15, 0), 5, "they share");
        assert_eq!(requests(&mut accounts, key(0), 100, 0), 0, "the others keep theirs");
        assert_eq!(accounts.accounts.len(), MAX_ACCOUNTS);
        assert_eq!(requests(&mut accounts, key(full), 100, 10_000), 20, "idle accounts were forgotten");
        assert_eq!(accounts.accounts.len(), 1);
    }

    proptest! {
        /// No sequence of requests gets more than the burst and the rate.
        #[test]
        fn nobody_gets_more_than_the_limit(
            steps in prop::collection::vec((0..4_u32, 0..700_u64, 1..9_u64), 1..200),
        ) {
            let mut accounts = QuotaAccounts::default();
            let (mut now_ms, mut taken) = (0, HashMap::<u32, u64>::new());
            for (peer, pause, amount) in steps {
                now_ms += pause;
                let took = accounts.take(key(peer), LIMITS, Metered::Requests, amount, now_ms);
                let taken = taken.entry(peer).or_default();
                *taken += if took.is_ok() { amount } else { 0 };
                prop_assert!(*taken * 1_000 <= 20_000 + now_ms * 10);
                if let Err(retry) = took {
                    let later = now_ms + u64::try_from(retry.as_millis()).unwrap();
                    prop_assert_eq!(accounts.take(key(peer), LIMITS, Metered::Requests, amount, later), Ok(()));
                    now_ms = later;
                    *taken += amount;
                }
            }
        }
    }
}
