//! The filter of system calls: what an action may not ask of the kernel. Pure until it is installed.
//!
//! The list names what is refused. Compilers and language runtimes use hundreds of calls, and what is left can only act on
//! what the namespaces show. What is refused widens the attack surface of the kernel or makes new namespaces and mounts.

mod program;

use super::{SetupFailure, Step as _};
use program::{Answer, Case, Table, Test};
use seccompiler::BpfProgram;
use std::{collections::BTreeMap, io, ops::Range};

/// open_tree_attr(2), which has the same number everywhere and no name in libc yet.
const OPEN_TREE_ATTR: libc::c_long = 467;

/// Calls that answer EPERM, whatever their arguments.
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
    // Large parts of the kernel that a build does not need.
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
/// The same for time, which clone has no room for.
const NEW_TIME: u32 = 0x80;

/// Kinds of sockets whose type is masked from flags such as SOCK_CLOEXEC.
const SOCKET_TYPE: u32 = 0xf;

/// The architecture in the kernel's words (`AUDIT_ARCH_*`), if the numbers of its calls are known here.
const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// The calls of the x32 ABI, which has the architecture of x86-64 and other numbers. -1, with which a tracer skips a call, has no
/// ABI: the kernel answers ENOSYS.
const X32: Range<u32> = 0x4000_0000..u32::MAX;

/// The program that the kernel runs for system calls.
#[derive(Debug, Clone)]
pub(crate) struct Program(BpfProgram);

impl Program {
    /// The program for this machine.
    pub(crate) fn new() -> Result<Self, SetupFailure> {
        let unknown = || io::Error::other(format!("not known for {}", std::env::consts::ARCH));
        let architecture = ARCHITECTURE.ok_or_else(unknown).step("make the system call filter")?;
        Ok(Self(table(architecture).assemble()))
    }

    /// Filters the calls of this process and its children from now on. The process must have given up new privileges.
    pub(crate) fn install(&self) -> io::Result<()> {
        seccompiler::apply_filter(&self.0).map_err(io::Error::other)
    }
}

/// What is refused.
fn table(architecture: u32) -> Table {
    let refuse = |tests: &[(u8, Test)]| Case { tests: tests.to_vec(), answer: errno(libc::EPERM) };
    let mut calls: BTreeMap<libc::c_long, Vec<Case>> =
        REFUSED.iter().map(|call| (*call, vec![refuse(&[])])).collect();
    // Its flags cannot be seen. The C library falls back to clone.
    calls.insert(libc::SYS_clone3, vec![Case { tests: Vec::new(), answer: errno(libc::ENOSYS) }]);
    calls.insert(libc::SYS_clone, vec![refuse(&[(0, Test::HasAnyOf(NAMESPACES))])]);
    calls.insert(libc::SYS_unshare, vec![refuse(&[(0, Test::HasAnyOf(NAMESPACES | NEW_TIME))])]);
    // Lowering the limit on core dumps succeeds without effect: it would switch on core handlers again.
    let core = Test::Is(libc::RLIMIT_CORE);
    let ignore = |tests: &[(u8, Test)]| Case { tests: tests.to_vec(), answer: Answer::Errno(0) };
    calls.insert(libc::SYS_setrlimit, vec![ignore(&[(0, core)])]);
    // The limits of the first process, which has the same user. Nothing else that an action may change has this number.
    let prlimit =
        vec![refuse(&[(0, Test::Is(1)), (2, Test::NotNull)]), ignore(&[(1, core), (2, Test::NotNull)])];
    calls.insert(libc::SYS_prlimit64, prlimit);
    let family = |family: libc::c_int| (0, Test::Is(family.unsigned_abs()));
    let raw = Test::Masked { mask: SOCKET_TYPE, value: libc::SOCK_RAW.unsigned_abs() };
    // Netlink sockets are raw by name only, and the C library lists interfaces with them.
    let netlink = libc::AF_NETLINK.unsigned_abs();
    let sockets = vec![
        refuse(&[family(libc::AF_VSOCK)]),
        refuse(&[family(libc::AF_ALG)]),
        refuse(&[family(libc::AF_PACKET)]),
        refuse(&[(1, raw), (0, Test::IsNot(netlink))]),
    ];
    calls.insert(libc::SYS_socket, sockets);
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

    #[test]
    fn the_program_is_short() {
        // The kernel evaluates it for each of some 460 calls when it is installed, once for each action.
        let program = Program::new().unwrap();
        assert!(program.0.len() < 256, "{}", program.0.len());
    }
}
