//! Determines the user of a command in an image: converts `User` of its configuration to numbers.

use crate::{regular_file, sandbox::identity::InnerUser};
use rustix::fs::{self as rfs, Mode, OFlags, ResolveFlags};
use std::{fs::File, path::Path};

/// Maximum size of a file with names of users or groups.
const MAX_BYTES: u64 = 1024 * 1024;

/// The numbers of a user such as `1000`, `1000:100`, `build` or `build:users`, using the names in the image. `None` if
/// no user is configured. Without a named group, the group is the user's group in `/etc/passwd`, or 0.
///
/// # Errors
/// If the image does not have the user or group.
pub(super) fn find(user: &str, root: &File) -> Result<Option<InnerUser>, String> {
    numbers(user, &|path| read(root, path).unwrap_or_default())
}

fn numbers(user: &str, file: &dyn Fn(&str) -> String) -> Result<Option<InnerUser>, String> {
    if user.is_empty() {
        return Ok(None);
    }
    let (name, group) = user.split_once(':').map_or((user, None), |(name, group)| (name, Some(group)));
    let passwd = file("etc/passwd");
    let entry = find_entry(&passwd, name);
    let unknown = |kind: &str, name: &str| {
        let shown: String = name.escape_debug().take(60).collect();
        format!("its user is the {kind} \"{shown}\", which it does not have")
    };
    let number = entry.and_then(|fields| fields.get(2)?.parse().ok()).or_else(|| name.parse().ok());
    let own_group = entry.and_then(|fields| fields.get(3)?.parse().ok()).unwrap_or(0);
    let group_number = match group {
        None | Some("") => Some(own_group),
        Some(group) => {
            let groups = file("etc/group");
            let named = find_entry(&groups, group).and_then(|fields| fields.get(2)?.parse().ok());
            named.or_else(|| group.parse().ok())
        }
    };
    // The kernel interprets the highest number as "no user".
    let real = |number: &u32| *number != u32::MAX;
    let user = number.filter(real).ok_or_else(|| unknown("user", name))?;
    let group = group_number.filter(real).ok_or_else(|| unknown("group", group.unwrap_or_default()))?;
    Ok(Some(InnerUser { user, group }))
}

/// The fields of the line with this name or number.
fn find_entry<'a>(text: &'a str, name: &str) -> Option<EntryFields<'a>> {
    let lines = text.lines().map(EntryFields::of);
    lines
        .clone()
        .find(|fields| fields.get(0) == Some(name))
        .or_else(|| lines.clone().find(|fields| fields.get(2) == Some(name)))
}

/// The first fields of a line of passwd or group.
#[derive(Clone, Copy)]
struct EntryFields<'a>([Option<&'a str>; 4]);

impl<'a> EntryFields<'a> {
    fn of(line: &'a str) -> Self {
        let mut parts = line.split(':');
        Self(std::array::from_fn(|_| parts.next()))
    }

    fn get(&self, at: usize) -> Option<&'a str> {
        self.0.get(at).copied().flatten()
    }
}

fn read(root: &File, path: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file: File = rfs::openat2(root, Path::new(path), flags, Mode::empty(), resolve).ok()?.into();
    let file = file.metadata().is_ok_and(|metadata| metadata.is_file()).then_some(file)?;
    Some(String::from_utf8_lossy(&regular_file::read_open(&file, MAX_BYTES).ok()?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_or_number_with_their_groups() {
        let file = |path: &str| match path {
            "etc/passwd" => {
                "root:x:0:0:root:/:/bin/sh\nbuild:x:500:50::/:/bin/sh\n7:x:70:71::/:\nbroken\n".to_owned()
            }
            _ => "users:x:100:build\n".to_owned(),
        };
        let find =
            |user: &str| numbers(user, &file).map(|found| found.map(|found| (found.user, found.group)));
        for (user, expected) in [
            ("", None),
            ("root", Some((0, 0))),
            ("build", Some((500, 50))),
            ("500", Some((500, 50))),
            ("7", Some((70, 71))),
            ("build:users", Some((500, 100))),
            ("9:9", Some((9, 9))),
            ("9", Some((9, 0))),
        ] {
            assert_eq!(find(user), Ok(expected), "{user}");
        }
        for user in ["nobody", "build:nogroup", "4294967295", "-1", ":5"] {
            assert!(find(user).unwrap_err().contains("does not have"), "{user}");
        }
    }
}
