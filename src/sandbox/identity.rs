//! The user of an action. Inside a cell it is user and group 1000, `build`. On the host it is a separate user for each
//! slot if the server is root.
//!
//! A root server gives each slot a user number from a configured range, so that no two actions share a user and no
//! action is root. An ordinary user can only map its own number.

use prost::Message;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

/// Number of the user and of the group of every action, as the action sees them.
pub(crate) const INNER: u32 = 1000;
/// The host name that every action sees.
pub(crate) const HOST_NAME: &str = "build";
/// First user and group of the default range.
pub(crate) const FIRST: u32 = 200_000;

/// Name of the user and the group of every action.
const NAME: &str = "build";

/// Files that the C library reads to resolve host names, with their content.
const HOST_NAME_FILES: &[(&str, &str)] = &[
    ("/etc/hosts", "127.0.0.1 localhost build\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("/etc/hostname", "build\n"),
    ("/etc/host.conf", "multi on\n"),
];
const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
const NSSWITCH: &str = "/etc/nsswitch.conf";
const USERS: &str = "root:x:0:0:root:/:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n";
const GROUPS: &str = "root:x:0:\nnogroup:x:65534:\n";
const SOURCES_HOST_NAME_FILES: &str = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\nprotocols: files\n\
                                services: files\nethers: files\nrpc: files\n";

/// Numbers of user and group inside of a cell.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct InnerUser {
    /// Number of the user.
    #[prost(uint32, tag = "1")]
    pub user: u32,
    /// Number of the group.
    #[prost(uint32, tag = "2")]
    pub group: u32,
}

/// The files that list users, groups and hosts in every view. `existing` returns the content of such a file in a root
/// file system other than the host's. Users listed there are kept.
pub(crate) fn files(
    InnerUser { user, group }: InnerUser,
    existing: impl Fn(&str) -> Option<String>,
) -> Vec<(&'static str, String)> {
    let own = |path, text: &str| existing(path).unwrap_or_else(|| text.to_owned());
    let passwd =
        with_number(own(PASSWD, USERS), user, &format!("{NAME}:x:{user}:{group}:{NAME}:/tmp:/bin/sh\n"));
    let groups = with_number(own(GROUP, GROUPS), group, &format!("{NAME}:x:{group}:\n"));
    let mut files =
        vec![(PASSWD, passwd), (GROUP, groups), (NSSWITCH, own(NSSWITCH, SOURCES_HOST_NAME_FILES))];
    files.extend(HOST_NAME_FILES.iter().map(|(path, text)| (*path, (*text).to_owned())));
    files
}

/// Adds a line to a list of users or groups, unless the list already has an entry for the number.
fn with_number(mut list: String, number: u32, line: &str) -> String {
    let number = number.to_string();
    if !list.lines().any(|line| line.split(':').nth(2) == Some(&*number)) {
        if !list.is_empty() && !list.ends_with('\n') {
            list.push('\n');
        }
        list.push_str(line);
    }
    list
}

/// The host users that a server gives to its slots. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Users {
    first: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

/// A host user that is reserved for one slot until this is dropped.
#[derive(Debug)]
pub(crate) struct User {
    number: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

impl Users {
    /// The range of users that starts at `first`.
    pub(crate) fn new(first: u32) -> Self {
        Self { first, taken: Arc::default() }
    }

    /// Reserves the lowest free number.
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
    fn the_user_of_an_action_has_a_name_whatever_its_number_is() {
        let found = |user, group, existing: Option<&str>| {
            let files = files(InnerUser { user, group }, |path| {
                existing.filter(|_| path != NSSWITCH).map(str::to_owned)
            });
            [PASSWD, GROUP].map(|path| files.iter().find(|(at, _)| *at == path).unwrap().1.clone())
        };
        let [passwd, group] = found(1000, 1000, None);
        assert!(
            passwd.ends_with("\nbuild:x:1000:1000:build:/tmp:/bin/sh\n") && passwd.starts_with("root:x:0:")
        );
        assert!(group.ends_with("\nbuild:x:1000:\n"));
        assert_eq!(found(0, 0, None)[0].lines().filter(|line| line.contains(":0:0:")).count(), 1);
        assert_eq!(found(7, 8, Some("lp:x:7:8::/:/bin/sh"))[0], "lp:x:7:8::/:/bin/sh");
        assert_eq!(found(7, 9, Some("lp:x:8"))[1], "lp:x:8\nbuild:x:9:\n");
    }

    #[test]
    fn no_two_slots_share_a_user_and_a_free_one_is_used_again() {
        let users = Users::new(7);
        let (first, second) = (users.take(), users.clone().take());
        assert_eq!((first.number(), second.number()), (7, 8));
        drop(first);
        assert_eq!(users.take().number(), 7);
    }
}
