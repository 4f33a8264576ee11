//! [`World`]: the state that all cells of one runner share, and the code that moves a process into a cell.
//!
//! The runner [assembles](super::assemble) each view once, in a mount namespace of its own, so that starting a cell
//! costs one copy of the tree instead of dozens of mounts. An ordinary user first enters a user namespace in which it
//! may mount.

use super::{
    EXEC_ROOT, SetupFailure, Step as _,
    assemble::{Assembled, ThisHost, ViewMounts, read_names},
    confine, filter, identity,
    identity::InnerUser,
    kind::{CellKind, CellNetwork},
    landlock,
    layers::{self, Layers},
    mounts,
    namespaces::{self, Map},
    network::{OwnNetwork, Resolver},
    settings::{Pasta, Sandbox},
    sys,
    view::{self, ConfiguredPaths, PrivateMounts, ProcPlan},
};
use rustix::{
    fs::CWD,
    mount::MountAttrFlags,
    process::{Pid, getegid, geteuid},
    thread::UnshareFlags,
};
use std::{
    fs, io,
    net::IpAddr,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

/// Maximum number of views that a runner keeps. Each takes memory of the kernel for its mounts. Before Linux 6.15, each
/// also makes every new cell a little slower, because its mounts are copied.
const MAX_VIEWS: usize = 4;
/// Directories with mounts of the sandbox, which are moved into an input root that is the root directory.
const CELL_MOUNTS: &[&str] = &["dev", "proc", "tmp"];

/// The state that all cells of a runner share.
#[derive(Debug)]
pub(crate) struct World {
    sandbox: Sandbox,
    mounts: ViewMounts,
    /// The assembled views. The most recently used one is last.
    views: Vec<KnownView>,
    /// Number of the next view.
    next: u64,
    /// User and group of an action outside its cell.
    user: u32,
    group: u32,
    /// User namespace of the idmapped mounts, which show the server's files as owned by the action.
    ids: Option<OwnedFd>,
    proc: ProcPlan,
    filter: Option<filter::Program>,
    /// The name server of the host, if there is one.
    resolver: Option<Resolver>,
}

#[derive(Debug)]
struct KnownView {
    kind: CellKind,
    number: u64,
    view: Assembled,
}

/// A cell that is complete except for its input root. Its process still has the capabilities to attach the input root.
#[derive(Debug)]
pub(crate) struct OpenCell {
    rules: Option<landlock::Rules>,
    has_input_root_as_root: bool,
}

/// The descriptors and settings that a runner passes to the first process of a new cell.
#[derive(Debug)]
pub(crate) struct CellSetup {
    tree: OwnedFd,
    kind: CellKind,
    network: Option<OwnNetwork>,
}

/// The settings of a cell's gateway. Each cell has its own gateway process.
#[derive(Debug)]
pub(crate) struct GatewayPlan<'a> {
    /// The pasta program that serves the network.
    pub pasta: &'a Pasta,
    /// User and group of the program on the host; `None` to keep the user and group of this process.
    pub owner: Option<(u32, u32)>,
    /// The name server of the host, if there is one.
    pub resolver: Option<&'a Resolver>,
}

impl CellSetup {
    /// Connects the cell to its gateway. `host` lists the addresses of the host.
    pub(crate) fn with_gateway(self, gateway: UnixStream, host: Vec<IpAddr>) -> Self {
        Self { network: Some(OwnNetwork { gateway, host }), ..self }
    }

    /// The descriptors that the first process must keep open.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let gateway = self.network.as_ref().map(|network| network.gateway.as_raw_fd());
        gateway.into_iter().chain([self.tree.as_raw_fd()])
    }

    /// Returns the socket that the first process must keep open until the cell ends. The gateway ends when it is
    /// closed.
    pub(crate) fn into_gateway(self) -> Option<UnixStream> {
        self.network.map(|network| network.gateway)
    }
}

impl World {
    /// Creates the world for the cells of this process. The process must have a single thread. It gets its own mount
    /// namespace.
    pub(crate) fn new(sandbox: Sandbox) -> Result<Self, SetupFailure> {
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let on = sandbox.protections;
        let (outer, ids) = if on.identity {
            let outer = (sandbox.user, sandbox.user);
            let ids = Map { inner: InnerUser { user, group }, user: outer.0, group: outer.1 };
            (outer, Some(namespaces::mapping(ids)?))
        } else {
            sys::unshare(UnshareFlags::NEWUSER).step("make a user namespace")?;
            namespaces::write_maps("self", Map { inner: InnerUser { user, group }, user, group }, false)?;
            ((user, group), None)
        };
        sys::unshare(UnshareFlags::NEWNS).step("make a mount namespace")?;
        mounts::stop_propagation_to_host().step("separate the mounts from the host's")?;
        let wanted = sandbox.configured_paths();
        let needed: Vec<_> =
            wanted.visible.into_iter().chain(wanted.writable).chain([sandbox.build_root()]).collect();
        let mounts = ViewMounts::new(&needed)?;
        let filter = if on.filter { Some(filter::Program::new()?) } else { None };
        let (user, group) = outer;
        let proc = view::proc_plan(&ThisHost, user == 0);
        let resolver = fs::read_to_string(view::RESOLVERS).ok().and_then(|text| Resolver::read(&text));
        let mut world =
            Self { sandbox, mounts, views: Vec::new(), next: 0, user, group, ids, proc, filter, resolver };
        // The first view is assembled here so that faulty settings are reported at once.
        world.view(&world.sandbox.first.clone().unwrap_or_default())?;
        Ok(world)
    }

    /// User and group on the host that must own files which an action opens again by path; `None` for the user and
    /// group of this process.
    pub(crate) fn owner(&self) -> Option<(u32, u32)> {
        self.ids.is_some().then_some((self.user, self.group))
    }

    /// The number of the current view of this kind. It changes when the view has to be assembled again.
    pub(crate) fn view(&mut self, kind: &CellKind) -> Result<u64, SetupFailure> {
        if let Some(at) = self.views.iter().position(|known| known.kind == *kind) {
            let known = self.views.remove(at);
            if known.view.is_current() {
                let number = known.number;
                self.views.push(known);
                return Ok(number);
            }
        }
        let root = kind.root_directory();
        let existing = |path: &str| root.as_ref().and_then(|root| read_names(root, path));
        let resolvers = self.resolver.as_ref().map(Resolver::conf);
        let plan = view::view(kind, &self.sandbox.configured_paths(), &ThisHost, existing, resolvers);
        let ids = self.ids.as_ref().map(|ids| ids.as_fd());
        let view = Assembled::new(&mut self.mounts, &plan, root.as_deref(), ids)?;
        let number = self.next;
        self.next += 1;
        self.views.push(KnownView { kind: kind.clone(), number, view });
        if self.views.len() > MAX_VIEWS {
            self.views.remove(0);
        }
        Ok(number)
    }

    /// Prepares what a new cell of this kind needs, and returns it with the number of its view. Must be called before
    /// the fork.
    pub(crate) fn setup(&mut self, kind: &CellKind) -> Result<(CellSetup, u64), SetupFailure> {
        let number = self.view(kind)?;
        let known = self.views.last().ok_or(io::ErrorKind::NotFound).step("find the view of the action")?;
        let tree = mounts::copy_of(known.view.tree()).step("copy the view of the action")?;
        Ok((CellSetup { tree, kind: kind.clone(), network: None }, number))
    }

    /// The gateway settings for cells of this kind, if they have a gateway.
    pub(crate) fn gateway(&self, kind: &CellKind) -> Result<Option<GatewayPlan<'_>>, SetupFailure> {
        if kind.network() != CellNetwork::On {
            return Ok(None);
        }
        let pasta = self.sandbox.pasta.as_ref().ok_or(io::ErrorKind::NotFound).step("find pasta")?;
        Ok(Some(GatewayPlan { pasta, owner: self.owner(), resolver: self.resolver.as_ref() }))
    }

    /// Forks the first process of a cell of this kind, which runs `child`. The calling process must have a single
    /// thread.
    pub(crate) fn start(&self, kind: &CellKind, child: impl FnOnce() -> i32) -> Result<Pid, SetupFailure> {
        let Some(user) = self.gateway_user(kind) else { return namespaces::start(None, child) };
        // The first process has this effective user, who may not limit an IPC namespace. So it inherits one that this
        // process has limited.
        let leave = || sys::unshare(UnshareFlags::NEWIPC).step("make a namespace (IPC)");
        leave()?;
        confine::limit_ipc(self.sandbox.shm_bytes);
        let started = namespaces::start(Some(user), child)?;
        // This process must not keep the namespace, and the segments in it, when the cell has ended.
        leave().inspect_err(|_| namespaces::end(started))?;
        Ok(started)
    }

    /// The host user whose processes must be able to enter cells of this kind, if it is not the user of this process.
    fn gateway_user(&self, kind: &CellKind) -> Option<u32> {
        self.owner().map(|(user, _)| user).filter(|_| kind.network() == CellNetwork::On)
    }

    /// Maps the user of the first process of a new cell.
    pub(crate) fn map_user(&self, process: i32, kind: &CellKind) -> Result<(), SetupFailure> {
        // This is done outside of the cell, because an action cannot lower a score that a privileged process has set.
        confine::raise_oom_score(process);
        let map = Map { inner: kind.user(), user: self.user, group: self.group };
        namespaces::write_maps(&process.to_string(), map, self.ids.is_some())
    }

    /// Opens the input root, either the directory at this path or an overlay of these layers, for attaching it in a
    /// cell.
    pub(crate) fn exec_root(&self, path: &Path, layers: Option<&Layers>) -> Result<OwnedFd, SetupFailure> {
        if let Some(layers) = layers {
            let owner = (self.user, self.group);
            return layers::mount(layers, self.ids.as_ref().map(|ids| (ids.as_fd(), owner)));
        }
        let tree = mounts::copy(CWD, path).step("copy the mount of the input root")?;
        match &self.ids {
            Some(ids) => mounts::map_ids(tree.as_fd(), ids.as_fd()),
            None => mounts::restrict(tree.as_fd(), true, false),
        }
        .step("give the input root to the action's user (an idmapped mount)")?;
        Ok(tree)
    }

    /// Moves the first process of a cell into its namespaces and view. All descriptors that it needs from outside are
    /// already open.
    pub(crate) fn enter(&self, setup: &CellSetup) -> Result<OpenCell, SetupFailure> {
        let on = self.sandbox.protections;
        let has_network = on.network && setup.kind.network() != CellNetwork::Host;
        let has_ipc = self.gateway_user(&setup.kind).is_some();
        let mut own = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
        own.set(UnshareFlags::NEWNET, has_network);
        own.set(UnshareFlags::NEWIPC, !has_ipc);
        sys::unshare(own).step("make namespaces (mount, IPC, names, cgroup, network)")?;
        if has_network {
            sys::loopback_up().step("switch on the loopback interface")?;
        }
        // This must come before the change of the user, too.
        if !has_ipc {
            confine::limit_ipc(self.sandbox.shm_bytes);
        }
        // This must come before the change of the user, because the gateway could not enter the namespace afterwards.
        if let Some(network) = &setup.network {
            network.set_up()?;
        }
        confine::new_keyring().step("leave the server's keyring")?;
        rustix::system::sethostname(identity::HOST_NAME.as_bytes()).step("set the host name")?;
        // The kernel allows a new /proc mount only while another one is visible.
        let proc =
            mounts::new("proc", &[], MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC)
                .step("mount /proc")?;
        namespaces::become_inner(setup.kind.user(), self.ids.is_some())?;
        mounts::become_root(setup.tree.as_fd())?;
        mounts::attach(proc.as_fd(), CWD, Path::new("/proc")).step("mount /proc")?;
        fs::write("/proc/sys/user/max_user_namespaces", "0").step("forbid further user namespaces")?;
        restrict_proc(&self.proc)?;
        // Root file systems other than the host's show no files of the host.
        let wanted = if setup.kind.root.is_none() {
            self.sandbox.configured_paths()
        } else {
            ConfiguredPaths::default()
        };
        mount_private_file_systems(self.sandbox.private_mounts(), &wanted)?;
        confine::limit_cores().step("limit core dumps")?;
        confine::limit_processes(self.sandbox.processes).step("limit the number of processes")?;
        confine::forbid_new_privileges().step("give up new privileges")?;
        let own = ["/tmp", "/dev", "/proc"].map(PathBuf::from);
        let writable = wanted.writable.into_iter().filter(|path| path.exists());
        let rules = on.landlock.then(|| landlock::Rules::new(own.into_iter().chain(writable)));
        let has_input_root_as_root = setup.kind.has_input_root_as_root();
        Ok(OpenCell { rules: rules.transpose()?, has_input_root_as_root })
    }

    /// Does the last steps: attaches the input root, and drops all privileges that a command must not have. Returns the
    /// path of the input root.
    pub(crate) fn finish(&self, cell: OpenCell, exec_root: &OwnedFd) -> Result<&'static Path, SetupFailure> {
        let path = Path::new(if cell.has_input_root_as_root { "/" } else { EXEC_ROOT });
        if cell.has_input_root_as_root {
            become_root_with_cell(exec_root)?;
        } else {
            mounts::attach(exec_root.as_fd(), CWD, path).step("mount the input root")?;
        }
        confine::drop_capabilities().step("give up capabilities")?;
        cell.rules.map_or(Ok(()), |rules| rules.restrict(path.into()))?;
        self.filter
            .as_ref()
            .map_or(Ok(()), filter::Program::install)
            .step("install the system call filter")?;
        Ok(path)
    }
}

/// Makes the input root the root directory and moves the cell's own mounts into it.
fn become_root_with_cell(exec_root: &OwnedFd) -> Result<(), SetupFailure> {
    let copy = |name: &&'static str| {
        mounts::copy(CWD, &Path::new("/").join(name))
            .map(|mount| (*name, mount))
            .step(format_args!("copy /{name}"))
    };
    let mounts = CELL_MOUNTS.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
    mounts::become_root(exec_root.as_fd())?;
    for (name, mount) in mounts {
        // The input root may have anything at this path, such as a symbolic link, so the path is resolved without
        // following links.
        mounts::directory_without_links(exec_root.as_fd(), Path::new(name))
            .and_then(|target| mounts::attach_to(mount.as_fd(), target.as_fd()))
            .step(format_args!("mount /{name} in the input root"))?;
    }
    Ok(())
}

/// Restricts this process, which is a runner, and its children on machines without namespaces. They can write only to
/// the build root and to the shared directories that are writable for every user.
pub(crate) fn restrict_in_place(sandbox: &Sandbox) -> Result<(), SetupFailure> {
    let on = sandbox.protections;
    confine::limit_cores().step("limit core dumps")?;
    confine::restrict_root_capabilities().step("give up capabilities")?;
    rustix::thread::set_no_new_privs(true).step("give up new privileges")?;
    if on.landlock {
        let shared = ["/tmp", "/var/tmp", "/dev", "/proc"].map(PathBuf::from);
        let writable =
            sandbox.configured_paths().writable.into_iter().chain(shared).filter(|path| path.exists());
        landlock::Rules::new(writable)?.restrict(sandbox.build_root())?;
    }
    if on.filter {
        filter::Program::new()?.install().step("install the system call filter")?;
    }
    Ok(())
}

/// Hides some files of /proc and makes others read-only.
fn restrict_proc(plan: &ProcPlan) -> Result<(), SetupFailure> {
    for path in &plan.hidden {
        cover(path, "/dev/null", true).step(format_args!("hide {path}"))?;
    }
    for path in &plan.fixed {
        cover(path, path, false).step(format_args!("make {path} read-only"))?;
    }
    Ok(())
}

/// Mounts a read-only copy of the file `by` over `path`. Both paths may be the same.
fn cover(path: &str, by: &str, is_device: bool) -> io::Result<()> {
    let tree = mounts::copy(CWD, Path::new(by))?;
    mounts::restrict(tree.as_fd(), false, is_device)?;
    mounts::attach(tree.as_fd(), CWD, Path::new(path))
}

/// Mounts the private file systems of a cell, and in /tmp the host directories that are configured below it.
fn mount_private_file_systems(fresh: PrivateMounts, wanted: &ConfiguredPaths) -> Result<(), SetupFailure> {
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
