//! [`World`]: what all cells of one runner have in common, and the way of a process into a cell.
//!
//! The runner assembles the view once, in a mount namespace of its own, so that starting a cell costs one copy of the tree
//! instead of dozens of mounts. As an ordinary user it first enters a user namespace in which it may mount.
//!
//! In its mount namespace the runner sees the host as before, but for the directory on which the view is mounted, which
//! belongs to the kernel and has nothing that a runner needs ([`MOUNT_POINTS`]).

use super::{
    EXEC_ROOT, SetupFailure, Step as _, confine, filter, identity, landlock,
    layers::{self, Layers},
    mounts,
    namespaces::{self, Map},
    settings::Sandbox,
    sys,
    view::{self, Access, Fresh, Host, Kind, ViewPiece, Wanted},
};
use rustix::{
    fs::{self as rfs, CWD, FileType, Mode, OFlags},
    io::Errno,
    mount::MountAttrFlags,
    process::{getegid, geteuid},
    thread::UnshareFlags,
};
use std::{
    fs,
    io::{self, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

/// Size of the root file system of a view, which holds nothing but mount points and a few small files.
const ROOT_BYTES: u64 = 1024 * 1024;
/// Most files and directories of that.
const ROOT_FILES: u64 = 4096;
/// Where the runner mounts the view, for itself: the first of these that exists. Not the root directory: the kernel makes no
/// user namespace for a process whose root directory is covered.
const MOUNT_POINTS: &[&str] = &["/sys/kernel", "/sys/fs", "/media", "/mnt"];

/// What all cells of a runner have in common.
#[derive(Debug)]
pub(crate) struct World {
    sandbox: Sandbox,
    /// The assembled view.
    view: OwnedFd,
    /// Who an action is.
    map: Map,
    /// Shows files of the server as files of the action.
    ids: Option<OwnedFd>,
    filter: Option<filter::Program>,
}

/// A cell that is complete but for its input root. Its process still has the capabilities to attach that.
#[derive(Debug)]
pub(crate) struct OpenCell {
    rules: Option<landlock::Rules>,
}

/// What a runner hands to a new cell.
#[derive(Debug)]
pub(crate) struct Passage {
    tree: OwnedFd,
}

impl Passage {
    /// The descriptor that must stay open.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.tree.as_raw_fd()
    }
}

impl World {
    /// Makes the world of this process's cells. The process must have a single thread; its mounts are its own afterwards.
    pub(crate) fn new(sandbox: Sandbox) -> Result<Self, SetupFailure> {
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let on = sandbox.protections;
        let (map, ids) = if on.identity {
            let outer = sandbox.user;
            let ids = Map { inner: user, user: outer, group: outer };
            (Map { inner: identity::INNER, user: outer, group: outer }, Some(namespaces::mapping(ids)?))
        } else {
            sys::unshare(UnshareFlags::NEWUSER).step("make a user namespace")?;
            namespaces::write_maps("self", Map { inner: user, user, group }, false)?;
            (Map { inner: identity::INNER, user, group }, None)
        };
        sys::unshare(UnshareFlags::NEWNS).step("make a mount namespace")?;
        mounts::follow_the_host().step("separate the mounts from the host's")?;
        let view = assemble(&view::pieces(&sandbox.wanted(), &ThisHost))?;
        let filter = if on.filter { Some(filter::Program::new()?) } else { None };
        Ok(Self { sandbox, view, map, ids, filter })
    }

    /// User and group of the host that own what an action must be able to open again; `None` for those of this process.
    pub(crate) fn owner(&self) -> Option<(u32, u32)> {
        self.ids.is_some().then_some((self.map.user, self.map.group))
    }

    /// What a new cell needs; to be taken before the fork.
    pub(crate) fn passage(&self) -> Result<Passage, SetupFailure> {
        Ok(Passage { tree: mounts::copy_of(self.view.as_fd()).step("copy the view of the action")? })
    }

    /// Gives the first process of a new cell its user.
    pub(crate) fn admit(&self, process: i32) -> Result<(), SetupFailure> {
        namespaces::write_maps(&process.to_string(), self.map, self.ids.is_some())
    }

    /// The input root at this path or of these layers, ready to be attached in a cell.
    pub(crate) fn exec_root(&self, path: &Path, layers: Option<&Layers>) -> Result<OwnedFd, SetupFailure> {
        if let Some(layers) = layers {
            return layers::mount(layers, self.ids.as_ref().map(|ids| (ids.as_fd(), self.map)));
        }
        let tree = mounts::copy(CWD, path).step("take hold of the input root")?;
        match &self.ids {
            Some(ids) => mounts::map_ids(tree.as_fd(), ids.as_fd()),
            None => mounts::restrict(tree.as_fd(), true, false),
        }
        .step("give the input root to the action's user (an idmapped mount)")?;
        Ok(tree)
    }

    /// Moves the first process of a cell into it. What it needs from outside is already open.
    pub(crate) fn enter(&self, passage: &Passage) -> Result<OpenCell, SetupFailure> {
        let on = self.sandbox.protections;
        let mut own =
            UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
        if on.network {
            own |= UnshareFlags::NEWNET;
        }
        sys::unshare(own).step("make namespaces (mount, IPC, names, cgroup, network)")?;
        if on.network {
            sys::loopback_up().step("switch on the loopback interface")?;
        }
        confine::new_keyring().step("leave the server's keyring")?;
        rustix::system::sethostname(identity::HOST_NAME.as_bytes()).step("set the host name")?;
        confine::offer_to_the_oom_killer();
        // Possible only while another /proc can be seen.
        let proc =
            mounts::new("proc", &[], MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC)
                .step("mount /proc")?;
        namespaces::become_inner(self.ids.is_some())?;
        mounts::become_root(passage.tree.as_fd())?;
        mounts::attach(proc.as_fd(), CWD, Path::new("/proc")).step("mount /proc")?;
        fs::write("/proc/sys/user/max_user_namespaces", "0").step("forbid further user namespaces")?;
        restrict_proc()?;
        let wanted = self.sandbox.wanted();
        mount_fresh(self.sandbox.fresh(), &wanted)?;
        confine::limit_cores().step("limit core dumps")?;
        confine::limit_processes(self.sandbox.processes).step("limit the number of processes")?;
        confine::gain_nothing().step("give up new privileges")?;
        let own = ["/tmp", "/dev", "/proc"].map(PathBuf::from);
        let writable = wanted.writable.into_iter().filter(|path| path.exists());
        let rules = on.landlock.then(|| landlock::Rules::new(own.into_iter().chain(writable)));
        Ok(OpenCell { rules: rules.transpose()? })
    }

    /// The last steps: attaches the input root, and gives up everything that a command must not have.
    pub(crate) fn close(&self, cell: OpenCell, exec_root: &OwnedFd) -> Result<(), SetupFailure> {
        mounts::attach(exec_root.as_fd(), CWD, Path::new(EXEC_ROOT)).step("mount the input root")?;
        confine::give_up_capabilities().step("give up capabilities")?;
        cell.rules.map_or(Ok(()), |rules| rules.restrict(EXEC_ROOT.into()))?;
        self.filter.as_ref().map_or(Ok(()), filter::Program::install).step("install the system call filter")
    }
}

/// What there is without namespaces: restricts this process, which is a runner, and its children. They write into the build
/// root and where everybody may write.
pub(crate) fn restrict_in_place(sandbox: &Sandbox) -> Result<(), SetupFailure> {
    let on = sandbox.protections;
    confine::limit_cores().step("limit core dumps")?;
    rustix::thread::set_no_new_privs(true).step("give up new privileges")?;
    if on.landlock {
        let shared = ["/tmp", "/var/tmp", "/dev", "/proc"].map(PathBuf::from);
        let writable = sandbox.wanted().writable.into_iter().chain(shared).filter(|path| path.exists());
        landlock::Rules::new(writable)?.restrict(sandbox.build_root())?;
    }
    if on.filter {
        filter::Program::new()?.install().step("install the system call filter")?;
    }
    Ok(())
}

/// Puts the pieces together below a new root directory, and gives that.
fn assemble(pieces: &[ViewPiece]) -> Result<OwnedFd, SetupFailure> {
    let root = mounts::tmpfs(ROOT_BYTES, ROOT_FILES, "755").step("make the root directory of the view")?;
    // Only mounts that are attached can get others below them.
    let exists = |path: &&&str| Path::new(path).is_dir();
    let mount_point = MOUNT_POINTS.iter().find(exists).ok_or(Errno::NOENT).step("find a mount point")?;
    mounts::attach(root.as_fd(), CWD, Path::new(mount_point)).step("mount the root directory of the view")?;
    for piece in pieces {
        put(&root, piece)?;
    }
    mounts::close(root.as_fd()).step("make the root directory of the view read-only")?;
    Ok(root)
}

fn put(root: &OwnedFd, piece: &ViewPiece) -> Result<(), SetupFailure> {
    match piece {
        ViewPiece::Directory(at) => make_directories(root, at).step(format_args!("make {}", at.display())),
        ViewPiece::Link { at, target } => make_parent(root, at)
            .and_then(|()| Ok(rfs::symlinkat(target, root, relative(at))?))
            .step(format_args!("make the link {}", at.display())),
        ViewPiece::File { at, text } => make_parent(root, at)
            .and_then(|()| make_file(root, at, text))
            .step(format_args!("make {}", at.display())),
        ViewPiece::Host { at, is_directory, access } => {
            show(root, at, *is_directory, *access).step(format_args!("show {} of the host", at.display()))
        }
        ViewPiece::Hidden(at) => hide(root, at).step(format_args!("hide {}", at.display())),
    }
}

fn show(root: &OwnedFd, at: &Path, is_directory: bool, access: Access) -> io::Result<()> {
    let tree = match mounts::copy(CWD, at) {
        // It was there a moment ago.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        tree => tree?,
    };
    mounts::restrict(tree.as_fd(), access == Access::Write, access == Access::Device)?;
    if is_directory {
        make_directories(root, at)?;
    } else if rfs::statat(root, relative(at), rfs::AtFlags::SYMLINK_NOFOLLOW).is_err() {
        make_parent(root, at)?;
        make_file(root, at, "")?;
    }
    mounts::attach(tree.as_fd(), root.as_fd(), relative(at))
}

/// Covers what is at a path of the view, if anything is.
fn hide(root: &OwnedFd, at: &Path) -> io::Result<()> {
    let stat = match rfs::statat(root, relative(at), rfs::AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        stat => stat?,
    };
    let cover = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => mounts::tmpfs(4096, 0, "555")?,
        FileType::Symlink => return Ok(()),
        _ => mounts::copy(root.as_fd(), Path::new("dev/null"))?,
    };
    mounts::restrict(cover.as_fd(), false, false)?;
    mounts::attach(cover.as_fd(), root.as_fd(), relative(at))
}

/// Hides parts of /proc and makes others read-only.
fn restrict_proc() -> Result<(), SetupFailure> {
    let (hidden, fixed) = view::of_proc();
    let exists = |path: &&&str| rfs::access(**path, rfs::Access::EXISTS).is_ok();
    for path in hidden.iter().filter(exists) {
        let hide = || {
            let null = mounts::copy(CWD, Path::new("/dev/null"))?;
            mounts::restrict(null.as_fd(), false, true)?;
            mounts::attach(null.as_fd(), CWD, Path::new(path))
        };
        hide().step(format_args!("hide {path}"))?;
    }
    for path in fixed.iter().filter(exists) {
        let fix = || {
            let tree = mounts::copy(CWD, Path::new(path))?;
            mounts::restrict(tree.as_fd(), false, false)?;
            mounts::attach(tree.as_fd(), CWD, Path::new(path))
        };
        fix().step(format_args!("make {path} read-only"))?;
    }
    Ok(())
}

/// What every cell has for itself. What is configured below /tmp is part of it.
fn mount_fresh(fresh: Fresh, wanted: &Wanted) -> Result<(), SetupFailure> {
    let mut below_tmp = Vec::new();
    for path in wanted.below_tmp() {
        match mounts::copy(CWD, path) {
            Ok(tree) => below_tmp.push((path, tree)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).step(format_args!("show {} of the host", path.display())),
        }
    }
    let devpts = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")];
    let made = [
        ("/tmp", mounts::tmpfs(fresh.tmp_bytes, fresh.tmp_files, "1777")),
        ("/dev/shm", mounts::tmpfs(fresh.shm_bytes, fresh.tmp_files, "1777")),
        ("/dev/pts", mounts::new("devpts", &devpts, MountAttrFlags::MOUNT_ATTR_NOEXEC)),
    ];
    for (path, mount) in made {
        mount
            .and_then(|mount| mounts::attach(mount.as_fd(), CWD, Path::new(path)))
            .step(format_args!("mount {path}"))?;
    }
    for (path, tree) in below_tmp {
        fs::create_dir_all(path)
            .and_then(|()| mounts::attach(tree.as_fd(), CWD, path))
            .step(format_args!("show {} of the host", path.display()))?;
    }
    Ok(())
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn make_parent(root: &OwnedFd, at: &Path) -> io::Result<()> {
    at.parent().map_or(Ok(()), |parent| make_directories(root, parent))
}

/// Makes a directory and those above it. Those of the host are there already.
fn make_directories(root: &OwnedFd, at: &Path) -> io::Result<()> {
    let mut path = PathBuf::new();
    for part in relative(at).components() {
        path.push(part);
        match rfs::mkdirat(root, &path, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Nothing can be made in what is read-only, and nothing has to be if it is there.
            Err(Errno::ROFS) if mounts::directory(root, &path).is_ok() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn make_file(root: &OwnedFd, at: &Path, text: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rfs::openat(root, relative(at), flags, Mode::from_raw_mode(0o644))?;
    fs::File::from(file).write_all(text.as_bytes())
}

/// The host that this process sees.
struct ThisHost;

impl Host for ThisHost {
    fn kind(&self, path: &Path) -> Option<Kind> {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some(match metadata.file_type() {
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_symlink() => Kind::Link(fs::read_link(path).ok()?),
            _ => Kind::Other,
        })
    }

    fn names(&self, path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}
