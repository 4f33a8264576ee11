//! The gateway of a cell whose command may use a network ([`crate::sandbox::network`]): two processes beside the cell.
//!
//! The first one is a fork of the runner. When the cell has made its network namespace, this process starts the second
//! one, `pasta`, and puts the filter of frames onto the interface that pasta has made in the cell. Then it tells the
//! cell that the network works. If a step fails, the cell fails.
//!
//! Both end with the cell: the first process of the cell keeps a socket to the gateway open, and the gateway notices
//! when that socket is closed. Both also die with their parents, so no process is left when the runner is killed.

use super::{children::KILL_LIMIT, sys};
use crate::sandbox::{
    SetupFailure, Step as _, namespaces,
    network::{
        ADDRESS_V4, ADDRESS_V6, BITS_V4, GATEWAY_V4, GATEWAY_V6, GO, INTERFACE, MAX_PROBLEM, Resolver,
        excluded, frames, host_addresses,
    },
    world::GatewayPlan,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, Gid, Uid, fchown, fstat, major, minor},
    io::Errno,
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, pidfd_getfd, pidfd_open, pidfd_send_signal,
        waitpid,
    },
};
use std::{
    ffi::{OsStr, OsString},
    io::{self, PipeReader, Read as _, Write as _},
    net::IpAddr,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixStream, process::CommandExt as _},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long pasta may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum length of what pasta may print before it works.
const MAX_OUTPUT: usize = 4096;
/// Maximum descriptor number of pasta that is tried. It has about 150 descriptors.
const MAX_DESCRIPTORS: i32 = 1024;
/// The device through which pasta exchanges frames with the cell: major and minor number.
const TUN: (u32, u32) = (10, 200);

/// The gateway of one cell. It is ended on drop.
pub(super) struct Gateway {
    process: Pid,
    pidfd: OwnedFd,
    /// The addresses of the host that the filter drops.
    host: Vec<IpAddr>,
}

impl Gateway {
    /// The addresses of the host at this moment, and the two ends of the socket between a cell and its gateway.
    pub(super) fn prepare() -> Result<(Vec<IpAddr>, UnixStream, UnixStream), SetupFailure> {
        let (inner, outer) = UnixStream::pair().step("make a socket")?;
        Ok((host_addresses()?, inner, outer))
    }

    /// Starts a gateway for the cell with this first process. The gateway waits until the cell asks for the network.
    pub(super) fn start(
        plan: &GatewayPlan<'_>,
        cell: Pid,
        socket: &UnixStream,
        host: Vec<IpAddr>,
    ) -> Result<Self, SetupFailure> {
        let process = namespaces::start_beside(|| i32::from(serve(plan, cell, socket, &host).is_err()))?;
        let pidfd = pidfd_open(process, PidfdFlags::empty()).step("watch the gateway of the network")?;
        Ok(Self { process, pidfd, host })
    }

    /// Whether the host still has the addresses that it had when the filter was made.
    pub(super) fn is_current(&self) -> bool {
        host_addresses().is_ok_and(|host| host == self.host)
    }

    /// Waits until the gateway has ended. Returns false if that takes longer than `limit`.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let timeout = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, timeout.as_ref()), Ok(1))
    }
}

impl Drop for Gateway {
    /// Leaves no process behind. The cell has ended, so the gateway is about to end too.
    fn drop(&mut self) {
        if !self.wait(KILL_LIMIT) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            self.wait(KILL_LIMIT);
        }
        let _ = waitpid(Some(self.process), WaitOptions::NOHANG);
    }
}

/// Main function of the gateway. It uses no inherited descriptors except `socket`.
fn serve(plan: &GatewayPlan<'_>, cell: Pid, socket: &UnixStream, host: &[IpAddr]) -> io::Result<()> {
    sys::close_all_but(&[0, 1, 2, socket.as_raw_fd()])?;
    sys::die_with_parent()?;
    rustix::process::setsid()?;
    sys::be_subreaper()?;
    let mut socket = socket;
    let mut asked = [0];
    if socket.read(&mut asked)? == 0 || asked != [GO] {
        return Ok(());
    }
    match open(plan, cell, host) {
        Ok((mut pasta, output)) => {
            socket.write_all(&[GO])?;
            let waited = wait_for_end(socket, output);
            let _ = pasta.kill();
            pasta.wait()?;
            reap_orphans();
            waited
        }
        Err(failure) => {
            let mut problem = failure.to_string().into_bytes();
            problem.truncate(MAX_PROBLEM);
            socket.write_all(&problem)
        }
    }
}

/// Reaps orphans of pasta. It starts some processes that enter the cell for a short time, and does not wait for them.
fn reap_orphans() {
    while matches!(waitpid(None, WaitOptions::NOHANG), Ok(Some(_))) {}
}

/// Waits until the cell or pasta has ended. The output of pasta is read, so that pasta never blocks on it.
fn wait_for_end(socket: &UnixStream, mut output: PipeReader) -> io::Result<()> {
    let mut buffer = [0; MAX_OUTPUT];
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&output, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [cell_ended, has_output] = fds.map(|fd| !fd.revents().is_empty());
        if cell_ended || (has_output && output.read(&mut buffer)? == 0) {
            return Ok(());
        }
    }
}

/// Starts pasta and installs the filter for the frames that it receives from the cell.
fn open(plan: &GatewayPlan<'_>, cell: Pid, host: &[IpAddr]) -> Result<(Child, PipeReader), SetupFailure> {
    let (mut output, theirs) = io::pipe().step("make a pipe")?;
    if let Some((user, group)) = plan.owner {
        // pasta opens the pipe again, by path.
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        fchown(&theirs, Some(user), Some(group)).step("give a pipe to the action's user")?;
    }
    let mut command = Command::new(OsStr::from_bytes(&plan.pasta.path));
    command
        .args(arguments(plan.resolver))
        .arg(cell.as_raw_pid().to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::from(OwnedFd::from(theirs.try_clone().step("make a pipe")?)))
        .stderr(Stdio::from(OwnedFd::from(theirs)));
    if let Some((user, group)) = plan.owner {
        // Supplementary groups are dropped, because this process is root.
        command.uid(user).gid(group);
    }
    sys::let_die_with_parent(&mut command);
    let mut pasta = command.spawn().step("start pasta")?;
    // The command holds write ends of the pipe. They are closed here, so that only pasta has the pipe open.
    drop(command);
    let started = wait_until_ready(&mut output).and_then(|()| filter(&pasta, host));
    match started {
        Ok(()) => Ok((pasta, output)),
        Err(failure) => {
            let _ = pasta.kill();
            let _ = pasta.wait();
            reap_orphans();
            Err(failure)
        }
    }
}

/// The options of pasta: a network interface with fixed addresses, no connections from the host into the cell, and no
/// connections from the cell to the host's loopback interface except queries to its name server.
fn arguments(resolver: Option<&Resolver>) -> Vec<OsString> {
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |options: &[&str]| all.extend(options.iter().map(OsString::from));
    // The process id is printed when everything is set up.
    add(&["--foreground", "--quiet", "--pid", "/proc/self/fd/1"]);
    add(&["--config-net", "--ns-ifname", INTERFACE, "--netmask", &BITS_V4.to_string()]);
    add(&["--address", &ADDRESS_V4.to_string(), "--gateway", &GATEWAY_V4.to_string()]);
    add(&["--address", &ADDRESS_V6.to_string(), "--gateway", &GATEWAY_V6.to_string()]);
    // pasta takes the first name server of the host's resolv.conf. It must not be named here: with `--dns`, versions of
    // 2023 no longer read that file, and do not pass on queries to the server that is named.
    if let Some(resolver) = resolver {
        add(&["--dns-forward", &resolver.inside().to_string()]);
    }
    add(&["--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ra"]);
    add(&["--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"]);
    all
}

/// Reads the output of pasta until pasta has printed its process id.
fn wait_until_ready(output: &mut PipeReader) -> Result<(), SetupFailure> {
    let end = Instant::now() + START_TIMEOUT;
    let mut printed = Vec::new();
    loop {
        let timeout = Timespec::try_from(end.saturating_duration_since(Instant::now())).ok();
        let ready = poll(&mut [PollFd::new(&*output, PollFlags::IN)], timeout.as_ref());
        if ready.step("wait for pasta")? == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut)).step("wait for pasta");
        }
        let mut buffer = [0; MAX_OUTPUT];
        let length = output.read(&mut buffer).step("wait for pasta")?;
        printed.extend_from_slice(&buffer[..length]);
        let text = String::from_utf8_lossy(&printed).into_owned();
        if text.lines().any(|line| line.parse::<u32>().is_ok()) {
            return Ok(());
        }
        if length == 0 || printed.len() > MAX_OUTPUT {
            return Err(io::Error::other(complaint(&text))).step("start pasta");
        }
    }
}

/// The error message of pasta. Its complaint about a missing system log is left out.
fn complaint(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.ends_with("to syslog"));
    match lines.collect::<Vec<_>>().join("; ") {
        none if none.is_empty() => "it ended without a message".into(),
        lines => lines,
    }
}

/// Installs the filter on the interface that pasta has open.
fn filter(pasta: &Child, host: &[IpAddr]) -> Result<(), SetupFailure> {
    let step = "filter the traffic of the sandbox's network";
    let process = i32::try_from(pasta.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH).step(step)?;
    let pidfd = pidfd_open(process, PidfdFlags::empty()).step(step)?;
    // An ordinary user may not list the descriptors in /proc, because pasta has protected itself from being traced.
    for number in 0..MAX_DESCRIPTORS {
        let file = match pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            Err(Errno::BADF) => continue,
            file => file.step(step)?,
        };
        let stat = fstat(&file).step(step)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && (major(stat.st_rdev), minor(stat.st_rdev)) == TUN
        {
            return frames::attach(file.as_fd(), frames::program(&excluded(host))).step(step);
        }
    }
    Err(Errno::NODEV).step(step)
}
