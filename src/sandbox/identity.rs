//! Who an action is: user and group 1000 `build` inside; outside a user of its own for each slot, where the server is root.
//!
//! A root server maps the user of a slot to a number from a configured range, so that two actions never share a user and
//! none is root. An ordinary user can only map its own number.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

/// User and group of every action, as it sees them.
pub(crate) const INNER: u32 = 1000;
/// The host name that every action sees.
pub(crate) const HOST_NAME: &str = "build";
/// First user and group of the default range.
pub(crate) const FIRST: u32 = 200_000;

/// The files that give the numbers their names, and what the C library reads about names.
pub(crate) const FILES: &[(&str, &str)] = &[
    (
        "/etc/passwd",
        "root:x:0:0:root:/:/usr/sbin/nologin\nbuild:x:1000:1000:build:/tmp:/bin/sh\n\
         nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    ),
    ("/etc/group", "root:x:0:\nbuild:x:1000:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost build\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("/etc/hostname", "build\n"),
    ("/etc/host.conf", "multi on\n"),
    (
        "/etc/nsswitch.conf",
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\n\
         services: files\nethers: files\nrpc: files\n",
    ),
];

/// The users of the slots of one server. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Users {
    first: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

/// A user that belongs to one slot until this is dropped.
#[derive(Debug)]
pub(crate) struct User {
    number: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

impl Users {
    /// The users from `first` on.
    pub(crate) fn new(first: u32) -> Self {
        Self { first, taken: Arc::default() }
    }

    /// The lowest number that is free.
    pub(crate) fn take(&self) -> User {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut number = self.first;
        while !taken.insert(number) {
            number += 1;
        }
        User { number, taken: self.taken.clone() }
    }
}

impl User {
    /// Number of the user and of its group on the host.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_slots_share_a_user_and_a_free_one_is_used_again() {
        let users = Users::new(7);
        let (first, second) = (users.take(), users.clone().take());
        assert_eq!((first.number(), second.number()), (7, 8));
        drop(first);
        assert_eq!(users.take().number(), 7);
    }
}
