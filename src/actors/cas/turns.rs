//! [`Turns`]: one lock for each key. Work on one key is serial, and work on different keys runs in parallel.
//!
//! A turn ends when it is dropped, for example because its caller is cancelled. Then the next waiter proceeds. The lock
//! of the table stays in this file and is held for map operations only.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// The locks of the keys in use.
pub(super) struct Turns<K>(Mutex<HashMap<K, Weak<AsyncMutex<()>>>>);

/// The exclusive right to work on a key. It ends when it is dropped.
pub(super) type KeyTurn = OwnedMutexGuard<()>;

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq> Turns<K> {
    /// Waits until no other caller works on this key.
    pub(super) async fn take(&self, key: K) -> KeyTurn {
        self.line(key).lock_owned().await
    }

    /// Takes the turn if no other caller works on this key.
    pub(super) fn take_now(&self, key: K) -> Option<KeyTurn> {
        self.line(key).try_lock_owned().ok()
    }

    fn line(&self, key: K) -> Arc<AsyncMutex<()>> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|_, line| line.strong_count() > 0);
        match lines.get(&key).and_then(Weak::upgrade) {
            Some(line) => line,
            None => {
                let line = Arc::default();
                lines.insert(key, Arc::downgrade(&line));
                line
            }
        }
    }
}

impl<K> std::fmt::Debug for Turns<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turns").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn a_key_has_one_turn_at_a_time_and_leaves_nothing_behind() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let mut second = Box::pin(turns.take("a"));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(turns.take_now("a").is_none() && turns.take_now("b").is_some());
        drop(turns.take("b").await);
        // A waiter that gives up does not block the waiters behind it.
        let third = Box::pin(turns.take("a"));
        drop((second, first));
        drop(third.await);
        drop(turns.take("c").await);
        assert_eq!(turns.0.lock().unwrap().len(), 1);
    }
}
