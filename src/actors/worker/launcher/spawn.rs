//! Starts one process from the runner. This module has all the code that runs between fork and exec.
//!
//! The child shares the runner's memory until it calls exec (`CLONE_VM | CLONE_VFORK`, as in posix_spawn(3)). Thus the
//! time of a start does not depend on the size of the runner, and the child reports a failure by storing its errno. A
//! plain fork of the runner took 0.2 ms more (0.91 against 0.71 ms for `/bin/true`, start to end). In return, the code
//! of the child allocates nothing, takes no lock and cannot panic.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    io,
    os::fd::RawFd,
    ptr,
};

/// Size of the child's stack until exec. One or two pages of it are used.
const STACK_BYTES: usize = 64 * 1024;

/// How often to try a program that another process has open for writing (ETXTBSY). This can be a new process of the
/// server that has not executed its own program yet: until then, it has copies of the server's descriptors, including
/// those of input files that are being written. The command cannot be cancelled during these attempts.
const BUSY_TRIES: u32 = 30;
/// How long to wait before a busy program is tried again.
const BUSY_PAUSE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Everything that is needed to start a process.
pub(super) struct Plan {
    /// Files to try, in order.
    pub programs: Vec<CString>,
    /// The arguments, including argv\[0\].
    pub arguments: Vec<CString>,
    /// All environment variables, as `NAME=value`.
    pub environment: Vec<CString>,
    /// Descriptor of the working directory.
    pub working_directory: RawFd,
    /// Descriptor that becomes standard input; `None` to inherit the standard input of this process, which is
    /// /dev/null.
    pub stdin: Option<RawFd>,
    /// Descriptor that becomes standard output.
    pub stdout: RawFd,
    /// Descriptor that becomes standard error.
    pub stderr: RawFd,
    /// Maximum size in bytes of a file that the process may write.
    pub max_file_bytes: u64,
    /// Whether `stdout` is a terminal. It then also becomes standard input and the controlling terminal of the session.
    pub has_terminal: bool,
}

/// A process that was started, or that failed to execute its program.
pub(super) struct Spawned {
    /// Process id. The process is a child of this one and must be reaped in both cases.
    pub pid: libc::pid_t,
    /// Errno if no program could be executed; otherwise 0.
    pub not_started: i32,
}

/// The [`Plan`] as raw pointers and integers, for the child.
struct ChildArgs {
    programs: *const *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    working_directory: RawFd,
    stdin: RawFd,
    stdout: RawFd,
    stderr: RawFd,
    max_file_bytes: u64,
    has_terminal: bool,
    no_signals: libc::sigset_t,
    error: c_int,
}

/// Starts a process in a session of its own. All descriptors except the first three are closed on exec.
///
/// # Errors
/// If the kernel cannot create a process.
pub(super) fn spawn(plan: &Plan, stack: &mut Stack) -> io::Result<Spawned> {
    let (programs, arguments) = (pointers(&plan.programs), pointers(&plan.arguments));
    let environment = pointers(&plan.environment);
    // SAFETY: all zeros is a valid value of sigset_t; sigemptyset then makes it the empty set.
    let no_signals = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        set
    };
    let mut args = ChildArgs {
        programs: programs.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        working_directory: plan.working_directory,
        stdin: plan.stdin.unwrap_or(libc::STDIN_FILENO),
        stdout: plan.stdout,
        stderr: plan.stderr,
        max_file_bytes: plan.max_file_bytes,
        has_terminal: plan.has_terminal,
        no_signals,
        error: 0,
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack is ours, writable and not in use; everything that `args` points to outlives the call, and the
    // call returns only after the child has left our memory by exec or exit.
    let pid = unsafe { libc::clone(child, stack.top(), flags, ptr::from_mut(&mut args).cast()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `args.error` is live. The read is volatile because the compiler does not know that the child wrote it.
    let not_started = unsafe { ptr::read_volatile(&args.error) };
    Ok(Spawned { pid, not_started })
}

/// Reusable memory for the child's stack.
pub(super) struct Stack(Vec<u128>);

impl Stack {
    /// A stack of [`STACK_BYTES`].
    pub(super) fn new() -> Self {
        // u128 has the alignment that the ABI requires for a stack.
        Self(vec![0; STACK_BYTES / size_of::<u128>()])
    }

    fn top(&mut self) -> *mut c_void {
        self.0.as_mut_ptr_range().end.cast()
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Runs in the child on its own stack. It shares the memory of the runner, which is suspended meanwhile.
extern "C" fn child(args: *mut c_void) -> c_int {
    let args = args.cast::<ChildArgs>();
    // SAFETY: `spawn` passes a ChildArgs that lives until this process execs or exits, and no other code accesses it.
    // Only async-signal-safe functions are called.
    unsafe {
        let error = prepare_and_exec(&*args);
        ptr::write_volatile(&raw mut (*args).error, error);
        libc::_exit(super::super::command::EXIT_NOT_FOUND)
    }
}

/// Prepares the process and executes the program. Returns only on failure, with the errno.
///
/// # Safety
/// As for [`child`].
unsafe fn prepare_and_exec(args: &ChildArgs) -> c_int {
    let limit = |bytes| libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: system calls on plain values and live pointers.
    unsafe {
        let ok = libc::setsid() >= 0
            // dup2 has no effect if both descriptors are the same.
            && libc::dup2(args.stdin, 0) >= 0
            && libc::dup2(args.stdout, 1) >= 0
            && libc::dup2(args.stderr, 2) >= 0
            && (!args.has_terminal || (libc::dup2(1, 0) >= 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) >= 0))
            && libc::fchdir(args.working_directory) >= 0
            && libc::setrlimit(libc::RLIMIT_FSIZE, &limit(args.max_file_bytes)) >= 0
            // At a limit of 1 byte the kernel writes no core file and starts no core handler either.
            && libc::setrlimit(libc::RLIMIT_CORE, &limit(1)) >= 0
            // If the runner is killed, at least the command itself is killed too.
            && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) >= 0
            && libc::sigprocmask(libc::SIG_SETMASK, &args.no_signals, ptr::null_mut()) >= 0;
        if !ok {
            return *libc::__errno_location();
        }
        // As in execvp(3): a file that may not be executed is skipped, but its error is remembered.
        let (mut program, mut error, mut tries) = (args.programs, libc::ENOENT, 1);
        while !(*program).is_null() {
            libc::execve(*program, args.arguments, args.environment);
            match *libc::__errno_location() {
                libc::ETXTBSY if tries < BUSY_TRIES => {
                    tries += 1;
                    libc::nanosleep(&BUSY_PAUSE, ptr::null_mut());
                    continue;
                }
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => error = libc::EACCES,
                other => return other,
            }
            program = program.add(1);
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _, unix::fs::PermissionsExt as _},
        path::Path,
        process::Command,
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    /// Starts a program without arguments. Returns the errno if it could not be executed.
    fn start(program: &Path) -> i32 {
        let (null, here) = (fs::File::open("/dev/null").unwrap(), fs::File::open("/").unwrap());
        let program = CString::new(program.as_os_str().as_bytes()).unwrap();
        let plan = Plan {
            programs: vec![program.clone()],
            arguments: vec![program],
            environment: Vec::new(),
            working_directory: here.as_raw_fd(),
            stdin: None,
            stdout: null.as_raw_fd(),
            stderr: null.as_raw_fd(),
            max_file_bytes: 1024,
            has_terminal: false,
        };
        let spawned = spawn(&plan, &mut Stack::new()).unwrap();
        super::super::sys::reap(spawned.pid).unwrap();
        spawned.not_started
    }

    /// Whether this thread has a child that sleeps.
    fn has_sleeping_child(thread: libc::pid_t) -> bool {
        let children = fs::read_to_string(format!("/proc/self/task/{thread}/children")).unwrap();
        children.split_whitespace().any(|child| {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
        })
    }

    #[test]
    fn a_program_that_is_still_being_written_starts_once_it_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::copy("/bin/true", &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let writer = fs::OpenOptions::new().append(true).open(&program).unwrap();
        // Another process has to be the writer, because a child starts with all descriptors of this one.
        let mut writer = Command::new("/bin/sleep").arg("60").stderr(writer).spawn().unwrap();
        // SAFETY: the call has no arguments and cannot fail.
        let (starter, is_over) = (unsafe { libc::gettid() }, AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                // The child sleeps only between two tries.
                while !is_over.load(Ordering::Relaxed) && !has_sleeping_child(starter) {
                    thread::yield_now();
                }
                writer.kill().unwrap();
                writer.wait().unwrap();
            });
            assert_eq!(start(&program), 0);
            is_over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_program_that_stays_busy_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::copy("/bin/true", &program).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let _writer = fs::OpenOptions::new().append(true).open(&program).unwrap();
        assert_eq!(start(&program), libc::ETXTBSY);
    }
}
