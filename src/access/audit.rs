//! [`Audit`]: logs an event for each refused request, at a bounded rate.
//!
//! The events have a separate target, so that a log filter can select them. Each peer has its own rate, so a client
//! that is refused all the time does not hide the refusals of others. Refusals beyond the rate are counted.

use super::principal::Principal;
use crate::{
    caller::Peer,
    logging::Event,
    rate::{Bucket, Rate},
};
use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

/// Target of audit events.
pub(crate) const TARGET: &str = "gorego::audit";
/// The event of a request that was refused.
const ACCESS_DENIED: &str = "access_denied";
/// The event with the number of refusals that were not logged one by one.
const DENIALS_NOT_LISTED: &str = "denials_not_listed";
/// The rate of events about one peer.
const PEER_DENIALS: Rate = Rate { burst: 50, per_second: 1 };
/// Maximum number of peers that are counted separately. All further peers are counted together.
const PEERS_MAX: usize = 1_024;

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DenialKind {
    /// The request needs a credential and has none.
    NoCredential,
    /// Its credential is not valid.
    WrongCredential,
    /// Its principal lacks a permission.
    NoPermission,
}

impl DenialKind {
    const fn name(self) -> &'static str {
        match self {
            Self::NoCredential => "no_credential",
            Self::WrongCredential => "wrong_credential",
            Self::NoPermission => "no_permission",
        }
    }
}

/// A request that was refused.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Denial<'a> {
    pub(crate) kind: DenialKind,
    pub(crate) method: &'a str,
    pub(crate) peer: SocketAddr,
    pub(crate) principal: &'a Principal,
    pub(crate) instance: Option<&'a str>,
    /// The message that the client got.
    pub(crate) error: &'a str,
}

/// Logs and counts refusals; see the top of this file.
pub(crate) struct Audit {
    books: Mutex<HashMap<Peer, PeerDenials>>,
    start: Instant,
}

struct PeerDenials {
    lines: Bucket,
    not_listed: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { books: Mutex::default(), start: Instant::now() }
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Audit").finish_non_exhaustive()
    }
}

impl Audit {
    /// Logs a refused request, or only counts it if its peer has caused many.
    pub(crate) fn denied(&self, denial: &Denial<'_>) {
        if !self.takes_line(denial.peer.into()) {
            return;
        }
        let Denial { kind, method, peer, principal, instance, error } = *denial;
        Event::info(TARGET, ACCESS_DENIED)
            .with("denial", kind.name())
            .with("method", method)
            .with_shown("peer", &peer)
            .with("principal", principal.name())
            .with_some("instance", instance)
            .with("error", error)
            .log(format_args!("{principal} was refused {method}"));
    }

    /// Logs the refusals that were counted since the last call, and forgets peers that are quiet.
    pub(crate) fn log_counted(&self) {
        let now = self.now_ms();
        let mut counted = Vec::new();
        self.books().retain(|peer, denials| {
            let not_listed = std::mem::take(&mut denials.not_listed);
            if not_listed > 0 {
                counted.push((*peer, not_listed));
            }
            not_listed > 0 || !denials.lines.is_full(now)
        });
        for (peer, denials) in counted {
            let shown = if peer == Peer::Unknown { "others".to_owned() } else { peer.to_string() };
            Event::info(TARGET, DENIALS_NOT_LISTED)
                .with("peer", &shown)
                .with("denials", denials)
                .log(format_args!("{denials} more requests of {shown} were refused"));
        }
    }

    fn takes_line(&self, peer: Peer) -> bool {
        let now = self.now_ms();
        let mut books = self.books();
        let peer = if books.len() < PEERS_MAX || books.contains_key(&peer) { peer } else { Peer::Unknown };
        let new = || PeerDenials { lines: Bucket::new(PEER_DENIALS, now), not_listed: 0 };
        let denials = books.entry(peer).or_insert_with(new);
        let takes_line = denials.lines.take(1, now);
        denials.not_listed += u64::from(!takes_line);
        takes_line
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn books(&self) -> MutexGuard<'_, HashMap<Peer, PeerDenials>> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn peer(number: u32) -> Peer {
        IpAddr::from(number.to_be_bytes()).into()
    }

    #[test]
    fn a_peer_has_a_burst_of_lines_and_the_rest_is_counted() {
        let audit = Audit::default();
        let listed = (0..10 * PEER_DENIALS.burst).filter(|_| audit.takes_line(peer(1))).count() as u64;
        assert!((PEER_DENIALS.burst..2 * PEER_DENIALS.burst).contains(&listed), "{listed}");
        assert!(audit.takes_line(peer(2)), "it hides no other");
        assert_eq!(audit.books()[&peer(1)].not_listed, 10 * PEER_DENIALS.burst - listed);
        audit.log_counted();
        assert_eq!(audit.books()[&peer(1)].not_listed, 0);
        for number in 0..4 * PEERS_MAX as u32 {
            audit.takes_line(peer(number));
        }
        assert!(audit.books().len() <= PEERS_MAX + 1);
    }
}
