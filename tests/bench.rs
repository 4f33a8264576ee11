//! `gorego bench` as a user runs it: a real server, and short measurements.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod support;

use rustix::{
    pty::{OpenptFlags, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use serde_json::Value;
use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    process::{Command, Stdio},
};
use support::Server;

/// `gorego bench` with these arguments and short measurements.
fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gorego"));
    command.arg("bench").args(args).args(["--warm-up", "1ms"]).stdin(Stdio::null());
    command.env_remove("GOREGO_ENDPOINT").env_remove("GOREGO_INSTANCE");
    command
}

/// Standard output of a run that succeeds.
fn printed(args: &[&str]) -> String {
    let output = bench(args).args(["--duration", "50ms"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn endpoint(server: &Server) -> String {
    format!("grpc://{}", server.address())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_limits_says_which_share_of_them_each_scenario_reaches() {
    let server = Server::start().await;
    let files = tempfile::tempdir().unwrap();
    let (endpoint, earlier) = (endpoint(&server), files.path().join("earlier.json"));
    let run = [&*endpoint, "capabilities", "write-small", "--limits"];

    let text = printed(&[&run[..], &["--json"]].concat());
    let report: Value = serde_json::from_str(&text).unwrap();
    for (scenario, limit) in
        report["scenarios"].as_array().unwrap().iter().zip(["grpc-unary", "grpc-write-small"])
    {
        assert_eq!(scenario["limit"]["name"], limit);
        let rate = scenario["figures"]["calls_per_second"].as_f64().unwrap();
        let share = rate / scenario["limit"]["per_second"].as_f64().unwrap();
        assert!((scenario["share"].as_f64().unwrap() / share - 1.0).abs() < 1e-6, "{scenario}");
    }
    std::fs::write(&earlier, text).unwrap();

    let table = printed(&run);
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].contains(" share ") && lines[0].ends_with("of the limit"), "{table}");
    assert!(lines[1].contains(" % ") && lines[1].contains(" grpc-unary "), "{table}");

    let earlier = earlier.to_str().unwrap();
    let table = printed(&[&run[..], &["--compare", earlier]].concat());
    assert!(table.lines().next().unwrap().contains("share before"), "{table}");
    // Without limits of its own, a run has no shares to compare.
    let table = printed(&[&*endpoint, "capabilities", "--compare", earlier]);
    assert!(!table.contains("share"), "{table}");
    assert!(!printed(&[&*endpoint, "capabilities"]).contains("limit"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_are_printed_as_json() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().to_str().unwrap();
    let output = bench(&["limits", "--json", "--duration", "1ms", "--directory", place]).output();
    let limits: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let names: Vec<_> = limits["limits"].as_array().unwrap().iter().map(|limit| &limit["name"]).collect();
    assert!(names.len() == 14 && names[0] == "hash" && names[13] == "grpc-read-zstd", "{names:?}");
    let output = bench(&["limits", "--limits"]).output().unwrap();
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("--limits"));
}

/// The line shows numbers as soon as a round of calls is measured.
#[tokio::test(flavor = "multi_thread")]
async fn the_progress_line_names_the_scenario_before_its_first_call_is_measured() {
    let server = Server::start().await;
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    unlockpt(&terminal).unwrap();
    let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal, size).unwrap();
    let name = ptsname(&terminal, vec![]).unwrap();
    let theirs = OpenOptions::new().read(true).write(true).open(OsStr::from_bytes(name.as_bytes())).unwrap();
    let mut command = bench(&[&endpoint(&server), "capabilities", "--limits", "--duration", "500ms"]);
    command.env("TERM", "xterm").stdout(Stdio::null()).stderr(theirs);
    let mut child = command.spawn().unwrap();
    drop(command);
    let (mut said, mut piece) = (String::new(), [0; 1024]);
    let mut terminal = File::from(terminal);
    // An error means that the other end is closed.
    while let Ok(count @ 1..) = terminal.read(&mut piece) {
        said.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
    assert!(child.wait().unwrap().success());
    let at = |text: &str| said.find(text).unwrap_or_else(|| panic!("{text} is missing: {said:?}"));
    assert!(at("grpc-unary: the limit") < at("capabilities: warm-up"), "{said:?}");
    assert!(at("capabilities: warm-up") < at(" calls in "), "{said:?}");
}
