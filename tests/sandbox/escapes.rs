//! Ways out of the sandbox that need a program of their own: calls of another architecture, open directories, and core
//! dumps.

#![cfg(target_arch = "x86_64")]

use crate::{Host, support::*, with_each};
use gorego_reapi::{digest::Digest, proto::reapi::FileNode};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

/// A program for x86-64 that consists of this machine code.
pub(crate) fn program(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    const ADDRESS: u64 = 0x40_0000;
    let size = HEADERS + code.len() as u64;
    // The ELF header: 64 bits, little endian, an executable for x86-64.
    let mut program = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [ADDRESS + HEADERS, 64, 0] {
        program.extend(word.to_le_bytes());
    }
    program.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0");
    // One segment that is loaded, readable and executable.
    program.extend(b"\x01\0\0\0\x05\0\0\0");
    for word in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
        program.extend(word.to_le_bytes());
    }
    program.extend(code);
    program
}

/// exit(7)
pub(crate) const EXIT_7: &[u8] = b"\xbf\x07\0\0\0\xb8\x3c\0\0\0\x0f\x05";
/// getpid() as a call of the i386 ABI.
const GETPID_OF_I386: &[u8] = b"\xb8\x14\0\0\0\xcd\x80";

/// An input root with executable files.
pub(crate) async fn programs(host: &Host, programs: &[(&str, Vec<u8>)]) -> Digest {
    let mut files: Vec<FileNode> = Vec::new();
    for (name, bytes) in programs {
        let digest = host.client.upload(bytes.clone()).await;
        files.push(FileNode { is_executable: true, ..file(name, digest) });
    }
    host.client.upload(directory(files, vec![], vec![])).await
}

#[tokio::test]
async fn a_call_of_i386_kills_the_process_and_the_message_names_the_filter() {
    with_each(&[], async |host| {
        let foreign = program(&[GETPID_OF_I386, EXIT_7].concat());
        let root = programs(host, &[("foreign", foreign), ("own", program(EXIT_7))]).await;
        for (script, exit_code) in [("exec ./own", 7), ("exec ./foreign", 128 + 31), ("./foreign", 128 + 31)]
        {
            let action = host.client.action(sh(script), root).await;
            let response = host.client.run(action).await;
            assert_eq!(response.result.as_ref().unwrap().exit_code, exit_code, "{script}: {response:?}");
            let is_named = response.message.contains("the system call filter of the sandbox forbids");
            assert_eq!(is_named, exit_code != 7, "{script}: {}", response.message);
        }
    })
    .await;
}

/// Descriptors of directories that the action has opened, moved or removed lead to the root directory of the sandbox,
/// and no further.
#[tokio::test]
async fn an_open_directory_does_not_lead_out_of_the_sandbox() {
    with_each(&[], async |host| {
        let outside = tempfile::tempdir().unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = outside.path().to_str().unwrap();
        let store = host.server.store().to_str().unwrap();
        // Opens "../../.." from each directory, and prints whether it is the root directory and whether a directory of
        // the host or the store is below it.
        let script = r#"mkdir -p a/b/c /tmp/a/b/c moved gone; perl -e '
            my @open = map { opendir my $d, $_ or die "$_: $!"; $d }
                qw(. a/b/c /tmp/a/b/c /usr/bin /dev/shm /proc/self /proc/self/root /proc/self/cwd moved gone /);
            rename "moved", "a/b/c/moved" or die; rmdir "gone" or die; chdir "a/b/c";
            my @root = stat "/"; my ($tried, $root) = (0, 0);
            for my $d (@open) {
                my $up = syscall(257, fileno($d), my $path = "../" x 12, 0x10000);
                $tried++;
                next if $up < 0 and $!{ENOENT};
                die "not opened: $!" if $up < 0;
                my @up = stat "/proc/self/fd/$up"; $root++ if $up[0] == $root[0] and $up[1] == $root[1];
                for my $name (@ARGV) {
                    for my $at ($up, fileno $d) {
                        my $file = "../" x 12 . substr $name, 1;
                        my $found = syscall(257, $at, $file, 0);
                        print "found $name\n" if $found >= 0 or !$!{ENOENT} and !$!{EACCES};
                        print "found $name\n" if -e "/proc/self/fd/$at/$file";
                        my $made = syscall(257, $at, "$file/made", 0x41, 0600);
                        print "made $name\n" if $made >= 0;
                    }
                }
            }
            print "$tried $root\n"' "#;
        let said = host.says(&format!("{} {path} {store}", script.trim_end())).await;
        assert_eq!(said, "11 11", "each of the eleven leads to the root directory of the sandbox");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "nothing was made");
        assert!(!fs::exists(format!("{store}/made")).unwrap());
    })
    .await;
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

/// A script that the kernel runs with each core dump of the machine. The earlier setting is restored on drop, and by
/// `tests/run` if the test is killed.
struct CoreHandler {
    before: String,
    /// The script, which makes its files here. Only root can make this directory again, because the kernel runs the
    /// script as root for as long as the setting stays.
    directory: tempfile::TempDir,
}

impl CoreHandler {
    /// Fails if this machine does not let this user set a handler.
    fn install() -> Self {
        let before = fs::read_to_string(CORE_PATTERN).unwrap();
        let directory = tempfile::tempdir_in("/run").unwrap();
        let handler = directory.path().join("handler");
        let text = format!("cat > /dev/null\n: > {}/ran-for-$1\n", directory.path().display());
        fs::write(&handler, text).unwrap();
        if let Err(error) = fs::write(CORE_PATTERN, format!("|/bin/sh {} %e", handler.display())) {
            panic!("not tested: {CORE_PATTERN} cannot be written: {error}");
        }
        Self { before, directory }
    }

    /// The names of the crashed programs for which it ran.
    fn ran_for(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap().flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter_map(|name| name.strip_prefix("ran-for-").map(str::to_owned)).collect()
    }
}

impl Drop for CoreHandler {
    fn drop(&mut self) {
        let _ = fs::write(CORE_PATTERN, &self.before);
    }
}

/// Makes a program crash in each way that asks for a core dump.
fn crash(name: &Path) -> String {
    let name = name.display();
    format!("for signal in SEGV ABRT QUIT BUS SYS XCPU; do {name} -e \"kill $signal, \\$\\$; sleep 9\"; done")
}

/// The handler would run outside of the sandbox, as root.
#[tokio::test]
#[ignore = "it changes the core handler of the machine; root runs it with --ignored"]
async fn a_crash_does_not_start_the_core_handler_of_the_machine() {
    let handler = CoreHandler::install();
    // Outside of the sandbox, the handler runs.
    let programs = tempfile::tempdir().unwrap();
    let copy = programs.path().join("crash-outside");
    fs::copy("/usr/bin/perl", &copy).unwrap();
    Command::new("sh").args(["-c", &format!("ulimit -c unlimited; {}", crash(&copy))]).status().unwrap();
    eventually("the handler runs", || handler.ran_for().contains(&"crash-outside".to_owned())).await;
    with_each(&[], async |host| {
        let name = if host.is_root { "crash-of-root" } else { "crash-of-user" };
        for limit in ["", "ulimit -c unlimited;", "ulimit -c 0;", "prlimit --core=unlimited --pid $$;"] {
            // A program becomes dumpable when it is executed. It can also ask for it.
            let own = PathBuf::from(format!("./{name}"));
            let script = format!(
                "{limit} cp /usr/bin/perl {name}; {}; ./{name} -e 'syscall(157, 4, 1, 0, 0, 0); kill SEGV, $$; sleep 9'; \
                 rm {name}; ls",
                crash(&own)
            );
            let did = host.run(&script).await;
            assert_eq!((did.exit_code, &*did.stdout), (0, ""), "{}", did.stderr);
        }
        // The handler still runs for a later crash outside, so it had the time to run for the earlier ones.
        let later = programs.path().join(format!("after-{}", host.is_root));
        fs::copy("/usr/bin/perl", &later).unwrap();
        let crash = format!("ulimit -c unlimited; {} -e 'kill SEGV, $$; sleep 9'", later.display());
        Command::new("sh").args(["-c", &crash]).status().unwrap();
        let after = later.file_name().unwrap().to_string_lossy().into_owned();
        eventually("the handler runs again", || handler.ran_for().contains(&after)).await;
        assert!(!handler.ran_for().contains(&name.to_owned()), "{:?}", handler.ran_for());
    })
    .await;
}
