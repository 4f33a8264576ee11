//! [`VerifiedCredentials`]: a cache of checked credentials, so that each is checked once for many requests.
//!
//! A credential is stored as a keyed hash, with a random key of this process. An entry ends when its credential
//! expires, and there are at most [`VERIFIED_MAX`] entries. Only valid credentials are stored, so clients without one
//! cannot displace entries.

use crate::access::principal::Principal;
use sha2::{Digest as _, Sha256};
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};
use uuid::Uuid;

/// Maximum number of entries, which take about a megabyte.
pub(super) const VERIFIED_MAX: usize = 4_096;

pub(super) type CredentialHash = [u8; 32];

/// The cache; see the top of this file.
pub(super) struct VerifiedCredentials {
    /// The key ensures that hashes from the memory of this process are useless elsewhere.
    key: [u8; 32],
    entries: Mutex<VerifiedEntries>,
}

#[derive(Default)]
struct VerifiedEntries {
    by_hash: HashMap<CredentialHash, (Principal, SystemTime)>,
    /// The hashes in the order of insertion. Some of them may already be removed from the map.
    order: VecDeque<CredentialHash>,
}

impl Default for VerifiedCredentials {
    fn default() -> Self {
        let mut key = [0; 32];
        let (first, second) = key.split_at_mut(16);
        first.copy_from_slice(Uuid::new_v4().as_bytes());
        second.copy_from_slice(Uuid::new_v4().as_bytes());
        Self { key, entries: Mutex::default() }
    }
}

impl fmt::Debug for VerifiedCredentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("VerifiedCredentials").finish_non_exhaustive()
    }
}

impl VerifiedCredentials {
    /// The hash of a credential that consists of these parts.
    pub(super) fn hash(&self, parts: &[&[u8]]) -> CredentialHash {
        let keyed = Sha256::new().chain_update(self.key);
        parts.iter().fold(keyed, |hash, part| hash.chain_update(part)).finalize().into()
    }

    /// Returns the principal of a credential that was checked and has not expired, and the end of its validity.
    pub(super) fn get(&self, hash: &CredentialHash, now: SystemTime) -> Option<(Principal, SystemTime)> {
        let mut entries = self.entries();
        let known = entries.by_hash.get(hash)?;
        if now < known.1 {
            return Some(known.clone());
        }
        entries.by_hash.remove(hash);
        None
    }

    /// Stores a credential until this time. If the cache is full, removes the oldest entry.
    pub(super) fn put(&self, hash: CredentialHash, principal: Principal, until: SystemTime) {
        let mut entries = self.entries();
        if entries.by_hash.insert(hash, (principal, until)).is_none() {
            entries.order.push_back(hash);
        }
        while entries.order.len() > VERIFIED_MAX {
            let oldest = entries.order.pop_front();
            oldest.and_then(|oldest| entries.by_hash.remove(&oldest));
        }
    }

    fn entries(&self) -> MutexGuard<'_, VerifiedEntries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_checked_credential_is_known_until_it_expires_and_the_number_is_bounded() {
        let verified = VerifiedCredentials::default();
        let (start, nobody) = (SystemTime::UNIX_EPOCH, Principal::nobody());
        let at = |seconds| start + Duration::from_secs(seconds);
        let hash = verified.hash(&[b"secret"]);
        assert_ne!(hash, VerifiedCredentials::default().hash(&[b"secret"]));
        verified.put(hash, nobody.clone(), at(10));
        assert!(verified.get(&hash, at(9)).is_some());
        assert!(verified.get(&hash, at(10)).is_none() && verified.get(&hash, at(9)).is_none());
        for number in 0..2 * VERIFIED_MAX {
            verified.put(verified.hash(&[&number.to_le_bytes()]), nobody.clone(), at(10));
        }
        let entries = verified.entries();
        assert_eq!((entries.by_hash.len(), entries.order.len()), (VERIFIED_MAX, VERIFIED_MAX));
    }
}
