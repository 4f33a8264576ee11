//! Finds the directories of this process's groups from `/proc/self/cgroup` and `/proc/self/mountinfo`. Pure.

use super::Controller;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// The directories of this process's own groups.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct OwnGroups {
    /// The group in the unified hierarchy.
    pub v2: Option<PathBuf>,
    /// The groups in the old hierarchies. Several controllers may share a hierarchy.
    pub v1: BTreeMap<Controller, PathBuf>,
}

/// A hierarchy of control groups that is mounted.
struct Hierarchy {
    /// The group that is at the top of the mount.
    root: PathBuf,
    /// Where it is mounted.
    point: PathBuf,
    is_v2: bool,
    /// The options of an old hierarchy, its controllers among them.
    options: Vec<String>,
}

/// Finds the groups of this process in the texts of the two files.
pub(super) fn find(groups: &str, mounts: &str) -> OwnGroups {
    let mounts: Vec<_> = mounts.lines().filter_map(parse_mount).collect();
    let mut found = OwnGroups::default();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if controllers.is_empty() {
            let mut of_v2 = mounts.iter().filter(|mount| mount.is_v2);
            found.v2 = of_v2.find_map(|mount| mount.directory(path));
            continue;
        }
        for controller in Controller::ALL {
            if controllers.split(',').all(|name| name != controller.name()) {
                continue;
            }
            let has_it = |mount: &&Hierarchy| {
                !mount.is_v2 && mount.options.iter().any(|name| name == controller.name())
            };
            if let Some(directory) = mounts.iter().filter(has_it).find_map(|mount| mount.directory(path)) {
                found.v1.insert(controller, directory);
            }
        }
    }
    found
}

/// Parses a line of mountinfo; `None` if it is not about a hierarchy.
fn parse_mount(line: &str) -> Option<Hierarchy> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = file_system.split(' ');
    let is_v2 = match fields.next()? {
        "cgroup" => false,
        "cgroup2" => true,
        _ => return None,
    };
    let options = fields.nth(1)?.split(',').map(str::to_owned).collect();
    let mut fields = mount.split(' ').skip(3);
    Some(Hierarchy { root: unescaped(fields.next()?), point: unescaped(fields.next()?), is_v2, options })
}

impl Hierarchy {
    /// The directory of a group; `None` if it is outside the mount.
    fn directory(&self, group: &str) -> Option<PathBuf> {
        let inside = Path::new(group).strip_prefix(&self.root).ok()?;
        let is_plain = inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        is_plain.then(|| self.point.join(inside))
    }
}

/// Undoes the octal escapes of mountinfo.
fn unescaped(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let code = text.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (byte, code) {
            (b'\\', Some(code)) => {
                plain.push(code);
                at += 4;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1(found: &OwnGroups) -> Vec<(Controller, &str)> {
        found.v1.iter().map(|(controller, path)| (*controller, path.to_str().unwrap())).collect()
    }

    #[test]
    fn a_unified_hierarchy_is_found_at_its_mount_point() {
        let mounts = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n\
                      31 24 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let found = find("0::/user.slice/user-1000.slice/a b.scope\n", mounts);
        assert_eq!(found.v2.unwrap(), Path::new("/sys/fs/cgroup/user.slice/user-1000.slice/a b.scope"));
        assert!(found.v1.is_empty());
    }

    #[test]
    fn old_hierarchies_are_found_by_their_controllers() {
        let mounts = "1 0 0:1 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      2 0 0:2 / /sys/fs/cgroup/memory rw - cgroup none rw,memory\n\
                      3 0 0:3 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n";
        let found = find("9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n", mounts);
        assert_eq!(
            v1(&found),
            [
                (Controller::Memory, "/sys/fs/cgroup/memory/a/b"),
                (Controller::Cpu, "/sys/fs/cgroup/cpu,cpuacct/")
            ]
        );
        assert_eq!(found.v2.unwrap(), Path::new("/sys/fs/cgroup/unified/"));
    }

    /// As in a container that sees its own part of the host's hierarchy.
    #[test]
    fn a_part_that_is_mounted_alone_is_found_and_what_lies_outside_is_not() {
        let mounts = "2 0 0:2 /docker/1f /sys/fs/c\\040g rw - cgroup none rw,memory\n";
        assert_eq!(v1(&find("4:memory:/docker/1f/x\n", mounts)), [(Controller::Memory, "/sys/fs/c g/x")]);
        for outside in
            ["4:memory:/docker/2\n", "4:memory:/docker/1f/../2\n", "4:memory:/../x\n", "nonsense\n"]
        {
            assert_eq!(find(outside, mounts), OwnGroups::default(), "{outside}");
        }
    }
}
