//! The system call filter, which refuses some system calls to an action. Pure, except for [`Program::install`].
//!
//! The filter is a deny list. Compilers and language runtimes use hundreds of system calls, and the calls that stay
//! allowed only affect what the action's namespaces contain. The filter refuses calls that widen the attack surface of
//! the kernel and calls that create namespaces or mounts.

mod program;

use super::{SetupFailure, Step as _};
use program::{Answer, Case, Table, Test};
use seccompiler::BpfProgram;
use std::{collections::BTreeMap, io, ops::Range};

/// open_tree_attr(2). It has the same number on every architecture, and the libc crate does not name it yet.
const OPEN_TREE_ATTR: libc::c_long = 467;

/// Calls that fail with EPERM whatever their arguments are.
const REFUSED: &[libc::c_long] = &[
    // Mounts, old and new.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_mount_setattr,
    // Namespaces.
    libc::SYS_setns,
    // Keys.
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // Large subsystems of the kernel that a build does not need.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    libc::SYS_open_by_handle_at,
    libc::SYS_lookup_dcookie,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_nfsservctl,
    libc::SYS_vhangup,
    // Clocks.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    // The machine.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
];

/// Flags of clone and unshare that make namespaces.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;
/// CLONE_NEWTIME, which only unshare accepts: clone uses the same bit for the exit signal.
const NEW_TIME: u32 = 0x80;

/// The socket families that are allowed. For most others the kernel would load a module, and some families ignore
/// network namespaces. Of netlink, only the protocol with which the C library lists network interfaces is allowed.
const FAMILIES: &[libc::c_int] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// Mask for the socket type. The same argument contains flags such as SOCK_CLOEXEC.
const SOCKET_TYPE: u32 = 0xf;

/// The socket types that are refused for IP, each with its error: raw and packet sockets, and the types of protocols
/// for which the kernel would load a module. To programs, `ESOCKTNOSUPPORT` means that the kernel lacks the protocol.
const OTHER_TYPES: [(libc::c_int, libc::c_int); 5] = [
    (libc::SOCK_RAW, libc::EPERM),
    (SOCK_PACKET, libc::EPERM),
    (libc::SOCK_RDM, libc::ESOCKTNOSUPPORT),
    (libc::SOCK_SEQPACKET, libc::ESOCKTNOSUPPORT),
    (libc::SOCK_DCCP, libc::ESOCKTNOSUPPORT),
];
/// The old form of packet sockets, which the kernel still knows.
const SOCK_PACKET: libc::c_int = 10;
/// The protocols that IP sockets may have; 0 is the usual one of the type. For most others the kernel would load a
/// module.
const IP_PROTOCOLS: [libc::c_int; 5] =
    [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6];

/// The architecture as the kernel numbers it (`AUDIT_ARCH_*`); `None` if the filter does not know the system call
/// numbers of this machine.
const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// Numbers of the x32 calls, which report the architecture x86-64 but have another ABI. The range excludes the number
/// -1, with which a tracer skips a call; the kernel answers that number with ENOSYS.
const X32: Range<u32> = 0x4000_0000..u32::MAX;

/// The filter as a BPF program that the kernel can load.
#[derive(Debug, Clone)]
pub(crate) struct Program(BpfProgram);

impl Program {
    /// Compiles the filter for this machine.
    pub(crate) fn new() -> Result<Self, SetupFailure> {
        let unknown = || io::Error::other(format!("not known for {}", std::env::consts::ARCH));
        let architecture = ARCHITECTURE.ok_or_else(unknown).step("make the system call filter")?;
        Ok(Self(table(architecture).assemble()))
    }

    /// Filters the calls of this process and of its future children. The process must have set `no_new_privs`.
    pub(crate) fn install(&self) -> io::Result<()> {
        seccompiler::apply_filter(&self.0).map_err(io::Error::other)
    }
}

/// The rules of the filter.
fn table(architecture: u32) -> Table {
    let refuse = |tests: &[(u8, Test)]| Case { tests: tests.to_vec(), answer: errno(libc::EPERM) };
    let mut calls: BTreeMap<libc::c_long, Vec<Case>> =
        REFUSED.iter().map(|call| (*call, vec![refuse(&[])])).collect();
    // A filter cannot read the flags of clone3, which are in memory. On ENOSYS the C library falls back to clone.
    calls.insert(libc::SYS_clone3, vec![Case { tests: Vec::new(), answer: errno(libc::ENOSYS) }]);
    calls.insert(libc::SYS_clone, vec![refuse(&[(0, Test::HasAnyOf(NAMESPACES))])]);
    calls.insert(libc::SYS_unshare, vec![refuse(&[(0, Test::HasAnyOf(NAMESPACES | NEW_TIME))])]);
    // The limit on core dumps must stay at 1, because any other value would enable the host's core handler. Setting it
    // succeeds without effect.
    let core = Test::Is(libc::RLIMIT_CORE);
    let ignore = |tests: &[(u8, Test)]| Case { tests: tests.to_vec(), answer: Answer::Errno(0) };
    calls.insert(libc::SYS_setrlimit, vec![ignore(&[(0, core)])]);
    // The first process of the cell has the same user as the action, so its limits have to be protected. Pid 1 is
    // always that process.
    let prlimit =
        vec![refuse(&[(0, Test::Is(1)), (2, Test::NotNull)]), ignore(&[(1, core), (2, Test::NotNull)])];
    calls.insert(libc::SYS_prlimit64, prlimit);
    let other_family: Vec<_> =
        FAMILIES.iter().map(|family| (0, Test::IsNot(family.unsigned_abs()))).collect();
    let other_family = Case { tests: other_family, answer: errno(libc::EAFNOSUPPORT) };
    let family = |family: libc::c_int| (0, Test::Is(family.unsigned_abs()));
    let other_protocol = (2, Test::IsNot(libc::NETLINK_ROUTE.unsigned_abs()));
    let other_netlink =
        Case { tests: vec![family(libc::AF_NETLINK), other_protocol], answer: errno(libc::EPROTONOSUPPORT) };
    // For local and netlink sockets, these types and protocols have no special meaning.
    let mut sockets = vec![other_family.clone(), other_netlink];
    for ip in [libc::AF_INET, libc::AF_INET6] {
        sockets.extend(OTHER_TYPES.map(|(kind, error)| {
            let kind = Test::Masked { mask: SOCKET_TYPE, value: kind.unsigned_abs() };
            Case { tests: vec![family(ip), (1, kind)], answer: errno(error) }
        }));
        let mut tests = vec![family(ip)];
        tests.extend(IP_PROTOCOLS.map(|protocol| (2, Test::IsNot(protocol.unsigned_abs()))));
        sockets.push(Case { tests, answer: errno(libc::EPROTONOSUPPORT) });
    }
    calls.insert(libc::SYS_socket, sockets);
    calls.insert(libc::SYS_socketpair, vec![other_family]);
    let numbered = calls.into_iter().filter_map(|(call, cases)| Some((u32::try_from(call).ok()?, cases)));
    let foreign = if cfg!(target_arch = "x86_64") { X32 } else { 0..0 };
    Table { architecture, calls: numbered.collect(), foreign }
}

fn errno(errno: libc::c_int) -> Answer {
    // No errno is larger than 4095.
    Answer::Errno(errno.unsigned_abs() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The filter's answer to a call of this architecture.
    fn answer(call: libc::c_long, arguments: &[u64]) -> Answer {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        let architecture = ARCHITECTURE.unwrap();
        table(architecture).answer(architecture, u32::try_from(call).unwrap(), &all)
    }

    #[test]
    fn the_program_is_short() {
        // The kernel evaluates the program for each of about 460 calls when it is installed, and it is installed for
        // every action.
        let program = Program::new().unwrap();
        assert!(program.0.len() < 256, "{}", program.0.len());
    }

    /// An action that is root inside its cell cannot tell whether its arguments, missing capabilities or the filter
    /// made a call fail.
    #[test]
    fn calls_are_refused_for_their_number_and_not_for_what_the_caller_may_do() {
        for call in REFUSED {
            assert_eq!(answer(*call, &[u64::MAX; 6]), errno(libc::EPERM), "{call}");
            assert_eq!(answer(*call, &[0; 6]), errno(libc::EPERM), "{call}");
        }
        assert_eq!(answer(libc::SYS_clone3, &[]), errno(libc::ENOSYS));
        for call in [libc::SYS_read, libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mmap, libc::SYS_connect] {
            assert_eq!(answer(call, &[0; 6]), Answer::Allow, "{call}");
        }
        #[cfg(target_arch = "x86_64")]
        assert_eq!(answer(0x4000_0000 + 39, &[]), Answer::EndProcess);
    }

    #[test]
    fn processes_can_be_made_and_namespaces_cannot() {
        let thread =
            libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
        for flags in [libc::SIGCHLD, thread, libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD] {
            assert_eq!(answer(libc::SYS_clone, &[flags as u64]), Answer::Allow);
        }
        assert_eq!(answer(libc::SYS_unshare, &[libc::CLONE_FILES as u64]), Answer::Allow);
        for bit in (0..32).map(|bit| 1u32 << bit).filter(|bit| NAMESPACES & bit != 0).map(u64::from) {
            assert_eq!(answer(libc::SYS_clone, &[bit | libc::SIGCHLD as u64]), errno(libc::EPERM));
            assert_eq!(answer(libc::SYS_unshare, &[bit]), errno(libc::EPERM));
        }
        assert_eq!(answer(libc::SYS_unshare, &[NEW_TIME.into()]), errno(libc::EPERM));
    }

    #[test]
    fn only_usual_sockets_can_be_made() {
        let socket = |family, kind, protocol| {
            answer(libc::SYS_socket, &[family, kind, protocol].map(|n: i32| n as u64))
        };
        let (stream, raw) = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::SOCK_RAW | libc::SOCK_NONBLOCK);
        for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
            assert_eq!(socket(family, stream, 0), Answer::Allow);
        }
        assert_eq!(socket(libc::AF_UNIX, raw, 0), Answer::Allow);
        assert_eq!(socket(libc::AF_NETLINK, raw, libc::NETLINK_ROUTE), Answer::Allow);
        assert_eq!(socket(libc::AF_NETLINK, raw, libc::NETLINK_AUDIT), errno(libc::EPROTONOSUPPORT));
        for family in [libc::AF_INET, libc::AF_INET6] {
            for (kind, error) in OTHER_TYPES {
                assert_eq!(socket(family, kind | libc::SOCK_NONBLOCK, 0), errno(error), "{kind}");
            }
            for (kind, protocol) in [(stream, libc::IPPROTO_TCP), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)] {
                assert_eq!(socket(family, kind, protocol), Answer::Allow);
            }
            for protocol in [libc::IPPROTO_SCTP, libc::IPPROTO_DCCP, libc::IPPROTO_MPTCP, 115] {
                assert_eq!(socket(family, stream, protocol), errno(libc::EPROTONOSUPPORT), "{protocol}");
            }
        }
        for family in (0..64).filter(|family| !FAMILIES.contains(family)) {
            assert_eq!(socket(family, stream, 0), errno(libc::EAFNOSUPPORT), "{family}");
            assert_eq!(answer(libc::SYS_socketpair, &[family as u64]), errno(libc::EAFNOSUPPORT));
        }
    }

    #[test]
    fn the_limit_on_core_dumps_and_those_of_the_first_process_stay() {
        let prlimit =
            |process, limit: libc::c_uint, new| answer(libc::SYS_prlimit64, &[process, limit.into(), new, 0]);
        assert_eq!(prlimit(0, libc::RLIMIT_CORE, 4096), Answer::Errno(0));
        assert_eq!(prlimit(1, libc::RLIMIT_NOFILE, 4096), errno(libc::EPERM));
        assert_eq!(prlimit(1, libc::RLIMIT_NOFILE, 0), Answer::Allow);
        assert_eq!(prlimit(7, libc::RLIMIT_NOFILE, 4096), Answer::Allow);
    }
}
