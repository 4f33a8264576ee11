//! The standard output and error of commands, as the worker stores them.

use crate::support::*;
use gorego_reapi::error::Error;
use std::{fs, io::Write as _, time::Duration};

/// A command cannot fill the disk with one file. The limit in these tests is 1 GiB.
#[test]
fn files_beyond_the_limit_end_the_command() {
    with_worker(async |bench| {
        let result = bench.result(&argv(&["/usr/bin/truncate", "-s", "2G", "big"])).await;
        assert_ne!(result.exit_code, 0);
    });
}

/// As in a shell, output goes through a pipe, so that opening it again neither overwrites nor truncates it.
#[test]
fn a_command_may_open_its_standard_output_and_error_again_in_any_mode() {
    with_worker(async |bench| {
        let script = "echo 1 > /dev/stderr; echo 2 >> /dev/stderr; echo 3 > /dev/fd/2; echo 4 > /proc/self/fd/2
            echo 5 | tee /dev/stderr; echo 6 1<> /dev/stderr; echo 7 >&2; echo 8 > /dev/stdout; echo 9 > /proc/$$/fd/1
            dd if=/dev/stdin of=/dev/stderr conv=notrunc status=none <<end
10
end";
        let result = bench.result(&sh(script)).await;
        assert_eq!(bench.text(&result.stdout_digest), "5\n8\n9\n");
        let expected: String = [1, 2, 3, 4, 5, 6, 7, 10].map(|n| format!("{n}\n")).concat();
        assert_eq!(bench.text(&result.stderr_digest), expected);
    });
}

/// EXE-59: output of many processes, small and large, up to the last bytes before the end.
#[test]
fn all_output_is_kept_in_the_order_of_its_pipe() {
    with_worker(async |bench| {
        let script =
            "seq 1000000; printf 'last word'; for i in $(seq 50); do printf $i, >&2; done; kill -9 $$";
        let result = bench.result(&sh(script)).await;
        let expected: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
        assert!(bench.text(&result.stdout_digest) == expected + "last word");
        let expected: String = (1..=50).map(|n| format!("{n},")).collect();
        assert_eq!(bench.text(&result.stderr_digest), expected);
        // Many processes print concurrently. Each line is one write and stays whole.
        let script = "for i in 1 2 3 4; do for n in $(seq 2000); do echo $n; done & done; wait";
        let lines = bench.text(&bench.result(&sh(script)).await.stdout_digest);
        let mut lines: Vec<u32> = lines.lines().map(|line| line.parse().unwrap()).collect();
        lines.sort_unstable();
        assert_eq!(lines, (1..=2_000).flat_map(|n| [n; 4]).collect::<Vec<_>>());
    });
}

/// A descriptor can be passed to a process that the command did not start, such as a build daemon. The result does not
/// wait for that process.
#[test]
fn a_process_that_holds_an_output_open_neither_delays_the_result_nor_writes_to_the_next_log() {
    with_worker(async |bench| {
        let job = sh("echo mine; echo $$ > pid; while ! [ -e ../../gate ]; do :; done");
        let (report, held) = tokio::join!(bench.report(&job), async {
            let pid = || {
                let mut runs = fs::read_dir(&bench.build_root).unwrap().flatten();
                runs.find_map(|run| fs::read_to_string(run.path().join("root/pid")).ok()).unwrap_or_default()
            };
            eventually("the command begins", || pid().ends_with('\n')).await;
            let mut held =
                fs::File::options().write(true).open(format!("/proc/{}/fd/1", pid().trim())).unwrap();
            held.write_all(b"and his\n").unwrap();
            fs::write(bench.build_root.join("gate"), "").unwrap();
            held
        });
        assert_eq!(bench.text(&report.unwrap().result.stdout_digest), "mine\nand his\n");
        let mut held = held;
        let refused = held.write_all(b"too late").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
        assert_eq!(bench.text(&bench.result(&sh("echo next")).await.stdout_digest), "next\n");
    });
}

/// EXE-59: the size limit of files applies to logs, and no command can turn a truncated log into a success.
#[test]
fn a_command_that_prints_more_than_a_log_may_hold_is_killed_and_the_message_names_the_setting() {
    const LIMIT: usize = 300_000;
    with_worker_of(LIMIT as u64, async |bench| {
        let exact = bench.result(&sh(&format!("head -c {LIMIT} /dev/zero"))).await;
        assert_eq!((exact.exit_code, exact.stdout_digest.unwrap().size_bytes), (0, LIMIT as i64));
        bench.store.results.lock().unwrap().clear();
        for (script, name) in [
            ("trap '' PIPE XFSZ; yes; sleep 600", "stdout"),
            ("yes >&2", "stderr"),
            // The last write is one byte too long.
            (&*format!("head -c {LIMIT} /dev/zero; printf x; exit 0"), "stdout"),
        ] {
            let report = bench.report(&sh(script)).await.unwrap();
            assert_eq!(report.result.exit_code, 128 + libc::SIGXFSZ, "{script}");
            let told = &report.account.message;
            assert!(told.contains(name) && told.contains("execution.max_output_file_gb"), "{told}");
            let log =
                if name == "stdout" { &report.result.stdout_digest } else { &report.result.stderr_digest };
            assert_eq!(log.as_ref().unwrap().size_bytes, LIMIT as i64, "what fits is kept");
        }
        assert!(bench.store.results.lock().unwrap().is_empty(), "EXE-20");
    });
}

/// A command that waits for space in its pipe can be stopped like any other.
#[test]
fn a_chatty_command_is_stopped_by_its_timeout() {
    /// A fast machine prints a gigabyte before the timeout, and the size limit must not end the command first.
    const UNREACHED: u64 = 1 << 40;
    with_worker_of(UNREACHED, async |bench| {
        let begun = std::time::Instant::now();
        let job = sh("while :; do echo spam; done & yes spam").timeout(Duration::from_secs(1));
        let failure = bench.failure(&job).await;
        assert!(matches!(failure.error, Error::DeadlineExceeded(_)), "{}", failure.error);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let log = bench.text(&failure.partial.unwrap().stdout_digest);
        assert!(log.starts_with("spam\n") && log.len() > 100_000, "{} bytes", log.len());
    });
}
