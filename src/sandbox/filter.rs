//! The filter of system calls: what an action may not ask of the kernel. Pure until it is installed.
//!
//! The list names what is refused. Compilers and language runtimes use hundreds of calls, and what is left can only act on
//! what the namespaces show. What is refused widens the attack surface of the kernel or makes new namespaces and mounts.

use super::{SetupFailure, Step as _};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch, sock_filter,
};
use std::{collections::BTreeMap, io};

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
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
/// The same for time, which clone has no room for.
const NEW_TIME: u64 = 0x80;

/// The families of sockets that there are.
const FAMILIES: &[libc::c_int] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// Kinds of sockets whose type is masked from flags such as SOCK_CLOEXEC.
const SOCKET_TYPE: u64 = 0xf;

/// The first system call number of the x32 ABI.
const X32: u32 = 0x4000_0000;

/// The programs that the kernel runs for each system call.
#[derive(Debug, Clone)]
pub(crate) struct Programs(Vec<BpfProgram>);

impl Programs {
    /// The programs for this machine.
    pub(crate) fn new() -> Result<Self, SetupFailure> {
        let build = || -> Result<Vec<BpfProgram>, Box<dyn std::error::Error + Send + Sync>> {
            let refused = program(refused()?, libc::EPERM)?;
            let missing = program([(libc::SYS_clone3, vec![])].into(), libc::ENOSYS)?;
            let families = program(other_families()?, libc::EAFNOSUPPORT)?;
            let protocols = program(other_protocols()?, libc::EPROTONOSUPPORT)?;
            let ignored = program(ignored()?, 0)?;
            Ok(vec![without_x32(refused), missing, families, protocols, ignored])
        };
        build().map(Self).map_err(io::Error::other).step("make the system call filter")
    }

    /// Filters the calls of this process and its children from now on. The process must have given up new privileges.
    pub(crate) fn install(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(io::Error::other))
    }
}

type Rules = BTreeMap<libc::c_long, Vec<Rule>>;

/// What answers EPERM.
fn refused() -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, vec![])).collect();
    let any_of = |argument, flags: u64| -> Result<Vec<Rule>, seccompiler::BackendError> {
        let bits = (0..64).map(|bit| 1u64 << bit).filter(|bit| flags & bit != 0);
        bits.map(|bit| Rule::new(vec![Condition::new(argument, Len::Qword, Op::MaskedEq(bit), bit)?]))
            .collect()
    };
    rules.insert(libc::SYS_clone, any_of(0, NAMESPACES)?);
    rules.insert(libc::SYS_unshare, any_of(0, NAMESPACES | NEW_TIME)?);
    // The limits of the first process, which has the same user. Nothing else that an action may change has this number.
    let first = Condition::new(0, Len::Dword, Op::Eq, 1)?;
    let changes = Condition::new(2, Len::Qword, Op::Ne, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![Rule::new(vec![first, changes])?]);
    // Local sockets have the raw type as another name for datagrams.
    let raw = Condition::new(1, Len::Dword, Op::MaskedEq(SOCKET_TYPE), libc::SOCK_RAW as u64)?;
    let internet = [libc::AF_INET, libc::AF_INET6]
        .map(|family| Rule::new(vec![Condition::new(0, Len::Dword, Op::Eq, family as u64)?, raw.clone()]));
    rules.insert(libc::SYS_socket, internet.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

/// Sockets of families that a build does not need. For most of them the kernel would load a module, and some do not know of network
/// namespaces.
fn other_families() -> Result<Rules, seccompiler::BackendError> {
    let is_other = FAMILIES.iter().map(|family| Condition::new(0, Len::Dword, Op::Ne, *family as u64));
    let other = Rule::new(is_other.collect::<Result<_, _>>()?)?;
    Ok([libc::SYS_socket, libc::SYS_socketpair].map(|call| (call, vec![other.clone()])).into())
}

/// Netlink beyond what the C library lists interfaces with.
fn other_protocols() -> Result<Rules, seccompiler::BackendError> {
    let netlink = Condition::new(0, Len::Dword, Op::Eq, libc::AF_NETLINK as u64)?;
    let other = Condition::new(2, Len::Dword, Op::Ne, libc::NETLINK_ROUTE as u64)?;
    Ok([(libc::SYS_socket, vec![Rule::new(vec![netlink, other])?])].into())
}

/// What succeeds without effect: lowering the limit on core dumps, which would switch on core handlers again.
fn ignored() -> Result<Rules, seccompiler::BackendError> {
    let core = u64::from(libc::RLIMIT_CORE);
    let is_core = |argument| Condition::new(argument, Len::Dword, Op::Eq, core);
    Ok([
        (libc::SYS_setrlimit, vec![Rule::new(vec![is_core(0)?])?]),
        (libc::SYS_prlimit64, vec![Rule::new(vec![is_core(1)?, Condition::new(2, Len::Qword, Op::Ne, 0)?])?]),
    ]
    .into())
}

/// A program that answers the calls in `rules` with this errno, and ends processes of another architecture.
fn program(rules: Rules, errno: libc::c_int) -> Result<BpfProgram, Box<dyn std::error::Error + Send + Sync>> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let answer = SeccompAction::Errno(errno.unsigned_abs());
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, answer, arch)?.try_into()?)
}

/// Adds the end of processes that use the x32 ABI, which has the architecture of x86-64 and other numbers.
fn without_x32(program: BpfProgram) -> BpfProgram {
    if cfg!(not(target_arch = "x86_64")) {
        return program;
    }
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let mut whole = vec![
        // The number of the call is the first field of seccomp_data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        // -1, with which a tracer skips a call, has no ABI: the kernel answers ENOSYS.
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 2, 0, u32::MAX),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    whole.extend(program);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do, in the bits of a filter's return value.
    #[derive(Debug, PartialEq)]
    enum Answer {
        Allow,
        Errno(libc::c_int),
        Kill,
    }

    /// Runs a program as the kernel does, as far as these programs go.
    fn run(program: &BpfProgram, data: &[u32; 16]) -> u32 {
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let code = u32::from(code);
            let holds = match code & 0xf7 {
                jump if jump == libc::BPF_JMP | libc::BPF_JA => {
                    at += k as usize;
                    continue;
                }
                jump if jump == libc::BPF_JMP | libc::BPF_JEQ => accumulator == k,
                jump if jump == libc::BPF_JMP | libc::BPF_JGE => accumulator >= k,
                jump if jump == libc::BPF_JMP | libc::BPF_JGT => accumulator > k,
                jump if jump == libc::BPF_JMP | libc::BPF_JSET => accumulator & k != 0,
                other => {
                    match other {
                        load if load == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                            accumulator = data[k as usize / 4];
                        }
                        and if and == libc::BPF_ALU | libc::BPF_AND => accumulator &= k,
                        end if end == libc::BPF_RET => return k,
                        _ => panic!("an unexpected instruction, {code:#x}"),
                    }
                    continue;
                }
            };
            at += usize::from(if holds { jt } else { jf });
        }
    }

    /// The answer to a call of this architecture.
    fn answer(call: libc::c_long, arguments: &[u64]) -> Answer {
        #[cfg(target_arch = "x86_64")]
        const ARCH: u32 = 0xc000_003e;
        #[cfg(target_arch = "aarch64")]
        const ARCH: u32 = 0xc000_00b7;
        let mut data = [0; 16];
        (data[0], data[1]) = (call as u32, ARCH);
        for (at, argument) in arguments.iter().enumerate() {
            // Little-endian, like these machines.
            (data[4 + 2 * at], data[5 + 2 * at]) = (*argument as u32, (*argument >> 32) as u32);
        }
        // The lowest action of all programs counts, as a signed number.
        let returned =
            Programs::new().unwrap().0.iter().map(|program| run(program, &data)).min_by_key(|r| *r as i32);
        match returned.unwrap() {
            libc::SECCOMP_RET_ALLOW => Answer::Allow,
            libc::SECCOMP_RET_KILL_PROCESS => Answer::Kill,
            errno => Answer::Errno((errno & libc::SECCOMP_RET_DATA) as libc::c_int),
        }
    }

    #[test]
    fn the_programs_fit_the_kernel() {
        let programs = Programs::new().unwrap();
        // BPF_MAXINSNS.
        assert!(programs.0.iter().all(|program| (1..=4096).contains(&program.len())));
    }

    /// An action that is root inside cannot tell whether a call fails for its arguments, its lack of capabilities or the filter.
    #[test]
    fn calls_are_refused_for_their_number_and_not_for_what_the_caller_may_do() {
        for call in REFUSED {
            assert_eq!(answer(*call, &[u64::MAX; 6]), Answer::Errno(libc::EPERM), "{call}");
            assert_eq!(answer(*call, &[0; 6]), Answer::Errno(libc::EPERM), "{call}");
        }
        assert_eq!(answer(libc::SYS_clone3, &[]), Answer::Errno(libc::ENOSYS));
        for call in [libc::SYS_read, libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mmap, libc::SYS_connect] {
            assert_eq!(answer(call, &[0; 6]), Answer::Allow, "{call}");
        }
        #[cfg(target_arch = "x86_64")]
        assert_eq!(answer(0x4000_0000 + 39, &[]), Answer::Kill);
    }

    #[test]
    fn processes_can_be_made_and_namespaces_cannot() {
        let thread =
            libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
        for flags in [libc::SIGCHLD, thread, libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD] {
            assert_eq!(answer(libc::SYS_clone, &[flags as u64]), Answer::Allow);
        }
        assert_eq!(answer(libc::SYS_unshare, &[libc::CLONE_FILES as u64]), Answer::Allow);
        for bit in (0..64).map(|bit| 1 << bit).filter(|bit| NAMESPACES & bit != 0) {
            assert_eq!(answer(libc::SYS_clone, &[bit | libc::SIGCHLD as u64]), Answer::Errno(libc::EPERM));
            assert_eq!(answer(libc::SYS_unshare, &[bit]), Answer::Errno(libc::EPERM));
        }
        assert_eq!(answer(libc::SYS_unshare, &[NEW_TIME]), Answer::Errno(libc::EPERM));
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
        assert_eq!(socket(libc::AF_NETLINK, raw, libc::NETLINK_AUDIT), Answer::Errno(libc::EPROTONOSUPPORT));
        for family in [libc::AF_INET, libc::AF_INET6] {
            assert_eq!(socket(family, raw, 1), Answer::Errno(libc::EPERM));
        }
        for family in (0..64).filter(|family| !FAMILIES.contains(family)) {
            assert_eq!(socket(family, stream, 0), Answer::Errno(libc::EAFNOSUPPORT), "{family}");
            assert_eq!(answer(libc::SYS_socketpair, &[family as u64]), Answer::Errno(libc::EAFNOSUPPORT));
        }
    }

    #[test]
    fn the_limit_on_core_dumps_and_those_of_the_first_process_stay() {
        let prlimit =
            |process, limit: libc::c_uint, new| answer(libc::SYS_prlimit64, &[process, limit.into(), new, 0]);
        assert_eq!(prlimit(0, libc::RLIMIT_CORE, 4096), Answer::Errno(0));
        assert_eq!(prlimit(1, libc::RLIMIT_NOFILE, 4096), Answer::Errno(libc::EPERM));
        assert_eq!(prlimit(1, libc::RLIMIT_NOFILE, 0), Answer::Allow);
        assert_eq!(prlimit(7, libc::RLIMIT_NOFILE, 4096), Answer::Allow);
    }
}
