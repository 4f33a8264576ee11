//! How commands are started, and how they end.

use crate::support::*;
use actix::System;
use gorego::actors::worker::{
    launcher::protocol::{self, Kill, Order, Run, ToRunner},
    messages::RunStage,
};
use gorego_reapi::error::Error;
use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process,
    time::{Duration, Instant},
};

/// EXE-41.
#[test]
fn a_process_gets_exactly_the_environment_of_its_command() {
    with_worker(async |bench| {
        let job = argv(&["/usr/bin/env", "-0"]).env("B", "two words").env("A", "");
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "B=two words\0A=\0");
    });
}

/// EXE-40.
#[test]
fn arguments_arrive_byte_for_byte() {
    with_worker(async |bench| {
        let odd = ["", " ", "a\nb", "$HOME", "'\"\\", "*", "é", "--"];
        let mut arguments = vec!["/usr/bin/printf", "%s\\0"];
        arguments.extend(odd);
        let result = bench.result(&argv(&arguments)).await;
        assert_eq!(bench.text(&result.stdout_digest), odd.map(|a| format!("{a}\0")).concat());
    });
}

/// EXE-40, EXE-42.
#[test]
fn programs_are_found_in_the_path_of_the_command_or_reported_as_a_shell_would() {
    with_worker(async |bench| {
        let root = bench.input(&[
            ("tools/hello", program("#!/bin/sh\necho hello from $0\n")),
            ("tools/plain", file("#!/bin/sh\n")),
            ("tools/garbage", program("not a program")),
            ("tools/orphan", program("#!/no/such/interpreter\n")),
        ]);
        let run = async |name: &str, path: Option<&str>| {
            let mut job = argv(&[name]).root(root);
            if let Some(path) = path {
                job = job.env("PATH", path);
            }
            let result = bench.result(&job).await;
            (result.exit_code, bench.text(&result.stdout_digest), bench.text(&result.stderr_digest))
        };
        assert_eq!(run("hello", Some("/nowhere:tools")).await.1, "hello from tools/hello\n");
        assert_eq!(run("tools/hello", None).await.0, 0);
        assert_eq!(run("true", None).await.0, 0, "the default path is used without PATH");
        for (name, path, code, word) in [
            ("hello", Some("/usr/bin"), 127, "PATH=/usr/bin"),
            ("./nope", None, 127, "No such file"),
            ("/no/such", None, 127, "No such file"),
            ("tools/orphan", None, 127, "interpreter"),
            ("plain", Some("tools"), 126, "not executable"),
            ("tools/garbage", None, 126, "#!"),
            ("tools", None, 127, "PATH"),
            ("./tools", None, 126, "directory"),
        ] {
            let (got, _, stderr) = run(name, path).await;
            assert_eq!(got, code, "{name}: {stderr}");
            assert!(stderr.contains(word) && stderr.starts_with("gorego: "), "{name}: {stderr}");
        }
    });
}

/// EXE-46.
#[test]
fn exit_codes_and_signals_are_passed_on() {
    with_worker(async |bench| {
        for (script, code) in [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -9 $$", 137)] {
            assert_eq!(bench.result(&sh(script)).await.exit_code, code, "{script}");
        }
        // A writer to a closed pipe must be killed by SIGPIPE, as usual.
        let result = bench.result(&sh("(yes; echo $? >&2) | head -n 1")).await;
        assert_eq!(bench.text(&result.stderr_digest), "141\n");
    });
}

/// EXE-44, EXE-45.
#[test]
fn a_command_past_its_timeout_is_killed_with_all_it_started_and_keeps_its_log() {
    with_worker(async |bench| {
        let job = sh("echo begun; sh -c 'echo $$; exec sleep 600' & sleep 600")
            .timeout(Duration::from_secs(2))
            .outputs(&["o"]);
        let begin = Instant::now();
        let failure = bench.failure(&job).await;
        assert!(begin.elapsed() >= Duration::from_secs(2), "{:?}", begin.elapsed());
        assert!(matches!(failure.error, Error::DeadlineExceeded(_)) && !failure.retryable);
        let partial = failure.partial.unwrap();
        let log = bench.text(&partial.stdout_digest);
        let (begun, pid) = log.split_once('\n').unwrap();
        assert_eq!(begun, "begun");
        assert!(pid.trim().parse::<u32>().is_ok() && !is_alive(pid), "{log}");
        let run = partial.execution_metadata.as_ref().unwrap().virtual_execution_duration.unwrap();
        // The start of the process counts, which takes longer on a busy machine.
        assert!(Duration::try_from(run).unwrap() >= Duration::from_millis(1_500), "{run:?}");
        assert!(bench.store.results.lock().unwrap().is_empty(), "EXE-19");
    });
}

/// EXE-44. This includes a daemon that has left its session, process group and parents.
#[test]
fn nothing_survives_the_command() {
    with_worker(async |bench| {
        let daemon = "setsid sh -c 'setsid sh -c \"echo \\$\\$ > daemon; exec sleep 600\" & exit' & \
            sleep 600 & echo $! > background; while ! [ -s daemon ]; do :; done; cat daemon background";
        let pids = bench.text(&bench.result(&sh(daemon)).await.stdout_digest);
        assert_eq!(pids.lines().count(), 2);
        pids.lines().for_each(|pid| assert!(!is_alive(pid), "{pid} lives"));
        // stdin is empty.
        assert_eq!(bench.result(&argv(&["/bin/cat"])).await.exit_code, 0);
    });
}

#[test]
fn a_cancelled_command_stops_at_once_and_keeps_its_log() {
    with_worker(async |bench| {
        let job = sh("echo begun; sleep 600");
        let cancel = job.cancel.clone();
        let stages = bench.stages.clone();
        let build_root = bench.build_root.clone();
        actix::spawn(async move {
            let begun = || {
                let mut logs = fs::read_dir(&build_root).unwrap().flatten().map(|d| d.path().join("stdout"));
                logs.any(|log| fs::metadata(log).is_ok_and(|m| m.len() > 0))
            };
            eventually("the command begins", begun).await;
            cancel.cancel();
        });
        let failure = bench.failure(&job).await;
        assert!(matches!(failure.error, Error::Cancelled(_)) && !failure.retryable);
        assert_eq!(bench.text(&failure.partial.unwrap().stdout_digest), "begun\n");
        let expected = [RunStage::Running, RunStage::Uploading];
        eventually("the stages are reported", || *stages.lock().unwrap() == expected).await;
        // If the action is cancelled before it starts, nothing is done.
        assert!(matches!(bench.failure(&job).await.error, Error::Cancelled(_)));
        assert_eq!(stages.lock().unwrap().len(), 2);
    });
}

/// Service managers send SIGTERM to every process, and scripts signal their parents. Running commands survive this.
#[test]
fn the_runner_blocks_signals_and_its_commands_do_not() {
    with_worker(async |bench| {
        let signalled =
            "for s in HUP INT TERM TSTP USR1 ALRM; do kill -$s $PPID; done; echo through; kill $$";
        let result = bench.result(&sh(signalled).timeout(Duration::from_secs(10))).await;
        assert_eq!(bench.text(&result.stdout_digest), "through\n");
        assert_eq!(result.exit_code, 128 + 15);
    });
}

/// A command can signal its runner, because both run as the same user. The worker must survive that. Processes that the
/// command left in other sessions and directories must be killed.
#[test]
fn a_command_that_kills_its_runner_is_reported_and_the_next_one_runs() {
    with_worker(async |bench| {
        let pids = bench.build_root.parent().unwrap().join("pids");
        let script = format!(
            "f() {{ f & exit; }}; for i in 1 2 3 4 5 6 7 8; do f & done; sleep 600 & echo $! > {0}; cd /; \
             setsid sleep 600 & echo $! >> {0}; kill -9 $PPID; sleep 600",
            pids.display()
        );
        let failure = bench.failure(&sh(&script)).await;
        assert!(matches!(failure.error, Error::Internal(_)) && failure.retryable, "{}", failure.error);
        let left = fs::read_to_string(pids).unwrap();
        assert_eq!(left.lines().count(), 2);
        for pid in left.lines() {
            eventually("what the command started is killed", || !is_alive(pid)).await;
        }
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let mut places = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
        assert!(!places.any(|cwd| cwd.starts_with(&bench.build_root)), "something keeps forking");
        assert_eq!(bench.result(&sh("true")).await.exit_code, 0);
    });
}

#[test]
fn a_panic_becomes_a_report_and_the_worker_goes_on() {
    with_worker(async |bench| {
        *bench.store.panic_next.lock().unwrap() = Some(bench.store.put("text"));
        let job = sh("true").root(bench.input(&[("input", file("text"))]));
        let failure = bench.failure(&job).await;
        assert!(failure.retryable && failure.error.to_string().contains("that the test asked for"));
        assert_eq!(bench.result(&job).await.exit_code, 0);
    });
}

/// The server may be killed at any time. Its commands must not continue.
#[test]
fn a_runner_whose_server_dies_kills_what_it_started_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).into_os_string().into_encoded_bytes();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut runner = process::Command::new(env!("CARGO_BIN_EXE_gorego"))
        .arg("runner")
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    // A kill without a running command is not an error.
    protocol::write(&ours, &ToRunner { order: Some(Order::Kill(Kill {})) }).unwrap();
    let script = "setsid sleep 600 & echo $! > pids; echo $$ >> pids; sleep 600";
    let run = Run {
        programs: vec![b"/bin/sh".into()],
        arguments: [&b"sh"[..], b"-c", script.as_bytes()].map(Vec::from).into(),
        root: path(""),
        working_directory: b".".into(),
        stdout: path("stdout"),
        stderr: path("stderr"),
        max_file_bytes: u64::MAX,
        ..Default::default()
    };
    protocol::write(&ours, &ToRunner { order: Some(Order::Run(run)) }).unwrap();
    let pids = || fs::read_to_string(directory.path().join("pids")).unwrap_or_default();
    System::new().block_on(async {
        eventually("the command runs", || pids().lines().count() == 2).await;
        drop(ours);
        for pid in pids().lines() {
            eventually("it is killed", || !is_alive(pid)).await;
        }
        eventually("the runner ends", || runner.try_wait().unwrap().is_some()).await;
    });
}
