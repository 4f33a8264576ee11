//! [`Checks`]: expensive checks of credentials, and their bounds.
//!
//! - Requests with the same credential share one check while it runs. So a build tool that opens a hundred calls at
//!   once causes one check.
//! - A password check computes a slow hash on a thread for blocking work. At most [`PASSWORD_CHECKS`] run at a time,
//!   shared among peers, and the rate of wrong passwords of a peer is limited to [`WRONG_PASSWORDS`]. So a flood of
//!   wrong passwords takes a fraction of one CPU.

use super::verified::CredentialHash;
use crate::{
    access::{basic::UserSet, principal::Principal, rejection::Rejection},
    budget::{Bounds, Budget},
    caller::{Caller, Peer},
    rate::{Bucket, Rate},
};
use futures::future::{BoxFuture, FutureExt as _, Shared, WeakShared};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Maximum number of concurrent password checks.
pub(super) const PASSWORD_CHECKS: Bounds =
    Bounds { what: "passwords that are checked", total: 2, connection: 1 };
/// The rate at which the checks of one peer may fail. Running checks count as failed.
pub(super) const WRONG_PASSWORDS: Rate = Rate { burst: 10, per_second: 1 };
/// How long a peer with too many wrong passwords is asked to wait.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long a check may wait for its turn.
const TURN_LIMIT: Duration = Duration::from_secs(10);
/// Maximum number of peers whose failures are counted separately. All further peers are counted together.
const PEERS_MAX: usize = 4_096;
/// When there are more running checks than this, checks that no request waits for are removed.
const MAX_RUNNING_UNTIDIED: usize = 1_024;

type CheckOutcome = Result<Principal, Rejection>;
type RunningCheck = BoxFuture<'static, CheckOutcome>;

/// Runs checks; see the top of this file.
pub(super) struct Checks {
    under_way: Mutex<HashMap<CredentialHash, WeakShared<RunningCheck>>>,
    places: Budget,
    failures: Mutex<HashMap<Peer, Bucket>>,
    start: Instant,
}

impl Default for Checks {
    fn default() -> Self {
        Self {
            under_way: Mutex::default(),
            places: Budget::new(PASSWORD_CHECKS),
            failures: Mutex::default(),
            start: Instant::now(),
        }
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Checks").finish_non_exhaustive()
    }
}

impl Checks {
    /// Returns the running check of the credential with this hash. If there is none, starts `check`.
    pub(super) fn share(
        &self,
        hash: CredentialHash,
        check: impl FnOnce() -> RunningCheck,
    ) -> Shared<RunningCheck> {
        let mut under_way = lock(&self.under_way);
        if let Some(shared) =
            under_way.get(&hash).and_then(WeakShared::upgrade).filter(|check| check.peek().is_none())
        {
            return shared;
        }
        if under_way.len() >= MAX_RUNNING_UNTIDIED {
            under_way.retain(|_, check| check.upgrade().is_some());
        }
        let shared = check().shared();
        shared.downgrade().and_then(|weak| under_way.insert(hash, weak));
        shared
    }

    /// Checks a password on another thread. Wrong passwords are limited for each peer.
    pub(super) async fn password(
        &self,
        users: Arc<UserSet>,
        user: String,
        password: Vec<u8>,
        caller: Caller,
    ) -> CheckOutcome {
        if !self.take_failure(caller.peer) {
            return Err(Rejection::TooMany(
                "too many wrong passwords came from your address; try again later, or use a token".into(),
                RETRY_AFTER,
            ));
        }
        let busy =
            |_| Rejection::TooMany("too many passwords are being checked; try again".into(), RETRY_AFTER);
        let place = tokio::time::timeout(TURN_LIMIT, self.places.wait_for(caller, 1)).await;
        let place = place.map_err(|_| ()).and_then(|place| place.map_err(|_| ())).map_err(busy)?;
        let checked = tokio::task::spawn_blocking(move || {
            let principal = users.check(&user, &password);
            drop(place);
            principal
        });
        let checked =
            checked.await.map_err(|_| Rejection::Unavailable("the password could not be checked".into()))?;
        let principal = checked.ok_or_else(|| Rejection::refused("the user or the password is wrong"))?;
        self.give_back_failure(caller.peer);
        Ok(principal)
    }

    fn take_failure(&self, peer: Peer) -> bool {
        let now = self.now_ms();
        let mut failures = lock(&self.failures);
        if failures.len() >= PEERS_MAX && !failures.contains_key(&peer) {
            failures.retain(|_, bucket| !bucket.is_full(now));
        }
        let peer =
            if failures.len() < PEERS_MAX || failures.contains_key(&peer) { peer } else { Peer::Unknown };
        failures.entry(peer).or_insert_with(|| Bucket::new(WRONG_PASSWORDS, now)).take(1, now)
    }

    fn give_back_failure(&self, peer: Peer) {
        if let Some(bucket) = lock(&self.failures).get_mut(&peer) {
            bucket.earn(1);
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{basic::PasswordFile, policy::Policy};
    use futures::future::join_all;
    use std::{
        net::IpAddr,
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
    };

    fn caller(number: u8) -> Caller {
        Caller::without_connection(IpAddr::from([127, 0, 0, number]).into())
    }

    fn users() -> Arc<UserSet> {
        let file = PasswordFile::parse(&format!("u:{}", bcrypt::hash("p", 5).unwrap())).unwrap();
        let policy = Policy::with_roles([], &[]);
        Arc::new(UserSet::new(&file, &Default::default(), &policy).unwrap())
    }

    #[tokio::test]
    async fn a_peer_that_is_wrong_too_often_has_to_wait_and_others_do_not() {
        let (checks, users) = (Checks::default(), users());
        let check = |number, password: &str| {
            checks.password(users.clone(), "u".into(), password.into(), caller(number))
        };
        for _ in 0..2 * WRONG_PASSWORDS.burst {
            assert!(check(1, "p").await.is_ok(), "right passwords are not counted");
        }
        let wrong = join_all((0..3 * WRONG_PASSWORDS.burst).map(|_| check(1, "x"))).await;
        let refused = wrong.iter().filter(|outcome| matches!(outcome, Err(Rejection::TooMany(..)))).count();
        assert!(refused as u64 >= WRONG_PASSWORDS.burst, "{refused}");
        assert!(matches!(check(1, "p").await, Err(Rejection::TooMany(..))));
        assert!(check(2, "p").await.is_ok());
    }

    #[tokio::test]
    async fn requests_with_one_credential_share_one_check_also_if_the_first_of_them_leaves() {
        let (checks, begun) = (Checks::default(), AtomicUsize::new(0));
        let share = || {
            checks.share([7; 32], || {
                begun.fetch_add(1, SeqCst);
                async {
                    tokio::task::yield_now().await;
                    Ok(Principal::default())
                }
                .boxed()
            })
        };
        let mut first = share();
        let others: Vec<_> = (0..100).map(|_| share()).collect();
        assert!(futures::poll!(&mut first).is_pending());
        drop(first);
        assert!(join_all(others).await.iter().all(Result::is_ok));
        assert_eq!(begun.load(SeqCst), 1);
        assert!(share().await.is_ok());
        assert_eq!(begun.load(SeqCst), 2, "an outcome is not kept here");
    }

    #[test]
    fn the_counts_of_failures_are_bounded() {
        let checks = Checks::default();
        for number in 0..2 * PEERS_MAX as u32 {
            checks.take_failure(IpAddr::from(number.to_be_bytes()).into());
        }
        assert!(lock(&checks.failures).len() <= PEERS_MAX + 1);
    }
}
