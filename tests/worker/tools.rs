//! Tools that stay alive for further actions (Bazel's persistent workers), with real processes.
//!
//! The tool of these tests is a Python program that speaks both encodings and executes the arguments of a request as
//! instructions. Without Python the tests are skipped with a message.

use super::support::{
    Bench, Job, Node, argv, eventually, file, is_alive, link, sh, tool, with_tools, with_tools_within,
};
use gorego::actors::worker::tools::ToolLimits;
use gorego_reapi::error::Error;
use std::{path::Path, time::Duration};

/// Path of Python, which is also visible in the sandbox.
const PYTHON: &str = "/usr/bin/python3";

pub(crate) const LIMITS: ToolLimits = ToolLimits {
    max_tools: 2,
    max_idle: Duration::from_secs(600),
    max_uses: 1000,
    max_memory: 1 << 40,
    max_call: Duration::from_secs(60),
};

/// The program of the tool. As a persistent worker it executes the arguments of each request. Without
/// `--persistent_worker` it executes its arguments file.
const TOOL: &str = r#"
import base64, json, os, subprocess, sys, time
served = 0
out = sys.stdout.buffer
def varint(n):
    b = b""
    while n > 127:
        b += bytes([n & 127 | 128])
        n >>= 7
    return b + bytes([n])
def read_varint(f):
    n = shift = 0
    while True:
        b = f.read(1)
        if not b: sys.exit(0)
        n |= (b[0] & 127) << shift
        if b[0] < 128: return n
        shift += 7
def fields(b):
    import io
    f = io.BytesIO(b)
    while f.tell() < len(b):
        tag = read_varint(f)
        yield tag >> 3, read_varint(f) if tag & 7 == 0 else f.read(read_varint(f))
def ask():
    if "json" in sys.argv:
        line = sys.stdin.readline()
        if not line: sys.exit(0)
        r = json.loads(line)
        return r["arguments"], {i["path"]: base64.b64decode(i["digest"]).decode() for i in r["inputs"]}
    b = sys.stdin.buffer.read(read_varint(sys.stdin.buffer))
    arguments, inputs = [], {}
    for n, v in fields(b):
        if n == 1: arguments.append(v.decode())
        if n == 2:
            i = dict(fields(v))
            inputs[i[1].decode()] = i[2].decode()
    return arguments, inputs
def answer(code, text, id=0, more=b""):
    if "json" in sys.argv:
        out.write(json.dumps({"exitCode": code, "output": text, "requestId": id}).encode() + b"\n")
    else:
        t = text.encode()
        m = b"\x08" + varint(code) + b"\x12" + varint(len(t)) + t + b"\x18" + varint(id)
        out.write(varint(len(m)) + m)
    # One write, so that nobody reads the answer without what follows it.
    out.write(more)
    out.flush()
def listing():
    found = []
    for d, ds, fs in os.walk("."):
        found += [os.path.join(d, n)[2:] + ("/" if n in ds and not os.path.islink(os.path.join(d, n)) else "") for n in ds + fs]
    return " ".join(sorted(found))
def work(arguments, inputs, stays):
    code, text, id = 0, [], 0
    for a in arguments:
        verb, _, rest = a.partition(" ")
        if verb == "print": text.append(rest)
        if verb == "served": text.append(str(served))
        if verb == "pid": text.append(str(os.getpid()))
        if verb == "cwd": text.append(os.getcwd())
        if verb == "inputs": text.append(" ".join(sorted(inputs)))
        if verb == "digest": text.append(inputs.get(rest, "none"))
        if verb == "ls": text.append(listing())
        if verb == "cat": text.append(open(rest).read())
        if verb == "code": code = int(rest)
        if verb == "write":
            path, _, content = rest.partition("=")
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            open(path, "w").write(content)
        if verb == "sh": subprocess.run(rest, shell=True, stdin=subprocess.DEVNULL, check=True)
        if not stays: continue
        if verb == "mumble":
            out.write(rest.encode())
            out.flush()
        if verb == "sleep": time.sleep(float(rest))
        if verb == "die":
            print("last words", file=sys.stderr)
            os._exit(3)
        if verb == "id": id = int(rest)
        if verb == "afterwards":
            answer(0, "", more=b"x")
    return code, "\n".join(text), id
if "--persistent_worker" in sys.argv:
    while True:
        arguments, inputs = ask()
        served += 1
        code, text, id = work(arguments, inputs, True)
        answer(code, text, id)
else:
    code, text, id = work(open(sys.argv[-1][1:]).read().split("\n"), {}, False)
    print("cold " + text, file=sys.stderr, end="")
    sys.exit(code)
"#;

/// An action for the tool. The lines are its instructions.
fn ask(bench: &Bench, lines: &[&str]) -> Job {
    ask_with(bench, lines, &[])
}

/// [`ask`] with more inputs.
fn ask_with(bench: &Bench, lines: &[&str], more: &[(&str, Node)]) -> Job {
    ask_in(bench, lines, more, "proto")
}

fn ask_in(bench: &Bench, lines: &[&str], more: &[(&str, Node)], protocol: &str) -> Job {
    let mut inputs = vec![("bin/tool.py", tool(TOOL)), ("args", file(&lines.join("\n")))];
    inputs.extend_from_slice(more);
    argv(&[PYTHON, "bin/tool.py", protocol, "@args"])
        .root(bench.input(&inputs))
        .platform("persistentWorkerKey", "k")
        .platform("persistentWorkerProtocol", protocol)
        .env("PYTHONDONTWRITEBYTECODE", "1")
}

/// Runs a test with tools if Python is available.
fn with_python(limits: ToolLimits, body: impl AsyncFn(&Bench)) {
    if Path::new(PYTHON).exists() {
        with_tools(limits, body);
    } else {
        eprintln!("not tested: {PYTHON} does not exist");
    }
}

/// The standard error of an action, which must succeed.
async fn says(bench: &Bench, job: &Job) -> String {
    let result = bench.result(job).await;
    let text = bench.text(&result.stderr_digest);
    assert_eq!(result.exit_code, 0, "{text}");
    text
}

/// The actions have two versions of one file. They are all served by the same process.
#[test]
fn a_tool_serves_several_actions_with_the_inputs_of_each() {
    with_python(LIMITS, async |bench| {
        for protocol in ["proto", "json"] {
            let job = |text: &str| {
                let lines = ["served", "cat src/a", "digest src/a", "inputs", "write out/b=done"];
                ask_in(bench, &lines, &[("src/a", file(text))], protocol).outputs(&["out/b"])
            };
            let (mut pids, mut served) = (Vec::new(), 1);
            for text in ["first version", "second version, longer", "first version"] {
                let result = bench.result(&job(text)).await;
                let digest = super::support::SHA256.digest(text.as_bytes()).hash_hex();
                assert_eq!(
                    bench.text(&result.stderr_digest),
                    format!("{served}\n{text}\n{digest}\nargs bin/tool.py src/a")
                );
                served += 2;
                let [output] = &*result.output_files else { panic!("{:?}", result.output_files) };
                assert_eq!(bench.text(&output.digest), "done");
                pids.push(says(bench, &ask_in(bench, &["pid"], &[], protocol)).await);
            }
            assert!(pids.windows(2).all(|pair| pair[0] == pair[1]), "{pids:?}");
        }
    });
}

#[test]
fn files_left_by_an_action_are_removed_before_the_next() {
    with_python(LIMITS, async |bench| {
        let mess = [
            "sh mkdir -p junk/deep src/more && touch junk/deep/x src/more/y .hidden && ln -s /etc loop && chmod 0 junk \
                     && rm -r old && echo changed > kept && mkdir new && rmdir out/o",
        ];
        let inputs = [
            ("src/a", file("a")),
            ("old/f", file("old")),
            ("kept", file("kept")),
            ("l", link("src/a")),
            ("out/o", Node::Dir),
        ];
        says(bench, &ask_with(bench, &mess, &inputs)).await;
        // Files become directories, and directories become files.
        let inputs = [
            ("src", file("now a file")),
            ("old/f", file("old")),
            ("kept/g", file("g")),
            ("l", link("old/f")),
        ];
        let look = ["served", "ls", "cat l", "cat kept/g"];
        let seen = says(bench, &ask_with(bench, &look, &inputs).outputs(&["o/p/q"])).await;
        assert_eq!(seen, "2\nargs bin/ bin/tool.py kept/ kept/g l o/ o/p/ old/ old/f src\nold\ng");
        // An input that the previous action has changed is written again.
        says(bench, &ask_with(bench, &["write same=other"], &[("same", file("same"))])).await;
        let seen = says(bench, &ask_with(bench, &["served", "cat same"], &[("same", file("same"))])).await;
        assert_eq!(seen, "4\nsame");
    });
}

#[test]
fn outputs_are_the_same_with_and_without_a_tool() {
    with_python(LIMITS, async |bench| {
        let make = [
            "sh mkdir -p o/d/e o/none && echo x > o/d/e/f && chmod 755 o/d/e/f && ln -s e/f o/d/l && ln -s nowhere o/l && echo y > o/y",
        ];
        let job = |make: &[&str]| ask(bench, make).outputs(&["o/d", "o/l", "o/y", "o/missing", "o/d/e/f"]);
        let warm = bench.result(&job(&make)).await;
        let mut cold = job(&make);
        cold.platform.clear();
        let cold = bench.result(&cold).await;
        assert_eq!(warm.output_files, cold.output_files);
        assert_eq!(warm.output_directories, cold.output_directories);
        assert_eq!(warm.output_symlinks, cold.output_symlinks);
        assert_eq!(
            (warm.output_files.len(), warm.output_directories.len(), warm.output_symlinks.len()),
            (2, 1, 1)
        );
    });
}

#[test]
fn the_exit_code_and_the_output_are_those_of_the_answer() {
    with_python(LIMITS, async |bench| {
        let result = bench.result(&ask(bench, &["code 7", "print no such symbol"])).await;
        assert_eq!(result.exit_code, 7);
        assert_eq!(bench.text(&result.stderr_digest), "no such symbol");
        assert_eq!(result.stdout_digest, None);
        let usage = result.execution_metadata.unwrap();
        assert!(!usage.auxiliary_metadata.is_empty(), "its usage is reported");
        // A failed action does not count as a failed tool.
        assert_eq!(says(bench, &ask(bench, &["served"])).await, "2");
    });
}

/// Each action is run again without the tool and says why. The next action has a new tool.
#[test]
fn an_action_whose_tool_fails_runs_without_it() {
    let limits = ToolLimits { max_call: Duration::from_millis(1500), ..LIMITS };
    with_python(limits, async |bench| {
        for (trouble, reason) in [
            ("mumble Hello, world", "printed \"Hello, world"),
            ("die", "exit code 3; the last line of its standard error is \"last words\""),
            ("sleep 60", "did not answer within 1.5s"),
            ("id 9", "answered request 9"),
            ("afterwards", "after its answer"),
            ("sh echo >> bin/tool.py", ""),
        ] {
            assert_eq!(says(bench, &ask(bench, &["served"])).await, "1", "{trouble}");
            let report = bench
                .report(&ask(bench, &["write o=", trouble, "print done"]).outputs(&["o"]))
                .await
                .unwrap();
            if reason.is_empty() {
                assert_eq!(report.account.message, "");
            } else {
                assert!(report.account.message.contains(reason), "{trouble}: {}", report.account.message);
                assert_eq!(bench.text(&report.result.stderr_digest), "cold done");
            }
            assert_eq!(report.result.output_files.len(), 1);
        }
        let report = bench.report(&ask(bench, &["served"])).await.unwrap();
        assert!(
            report.account.message.contains("changed its own file \"bin/tool.py\""),
            "{}",
            report.account.message
        );
    });
}

/// The tool gets half of the time for fetching the inputs, so that there is time to fetch them again.
#[test]
fn an_action_whose_tool_hangs_has_time_left_to_run_without_it() {
    if !Path::new(PYTHON).exists() {
        eprintln!("not tested: {PYTHON} does not exist");
        return;
    }
    with_tools_within(Duration::from_secs(4), LIMITS, async |bench| {
        let report = bench.report(&ask(bench, &["sleep 60", "print done"])).await;
        let report = report.unwrap_or_else(|failure| panic!("{}", failure.error));
        assert!(report.account.message.contains("did not answer"), "{}", report.account.message);
        assert_eq!(bench.text(&report.result.stderr_digest), "cold done");
    });
}

#[test]
fn a_tool_that_ended_while_it_was_idle_is_replaced() {
    with_python(LIMITS, async |bench| {
        if bench.is_sandboxed {
            return;
        }
        let pid = says(bench, &ask(bench, &["pid"])).await;
        sh_kill(&pid);
        eventually("the tool is dead", || !is_alive(&pid)).await;
        let report = bench.report(&ask(bench, &["served"])).await.unwrap();
        assert_eq!(bench.text(&report.result.stderr_digest), "1");
        assert_eq!(report.account.message, "");
    });
}

fn sh_kill(pid: &str) {
    let killed = std::process::Command::new("kill").args(["-9", pid]).status();
    assert!(killed.unwrap().success());
}

#[test]
fn a_cancelled_action_ends_its_tool_with_all_processes() {
    with_python(LIMITS, async |bench| {
        let mark = format!("{}", 700_000 + std::process::id());
        let job = ask(bench, &[&format!("sh sleep {mark} & setsid sleep {mark} &"), "sleep 60"]);
        let is_there = || processes_with(&format!("sleep {mark}")) > 0;
        let stop = async {
            eventually("it runs", is_there).await;
            job.cancel.cancel();
        };
        let (failure, ()) = futures::join!(bench.failure(&job), stop);
        assert!(matches!(failure.error, Error::Cancelled(_)), "{}", failure.error);
        assert!(!is_there());
        assert_eq!(says(bench, &ask(bench, &["served"])).await, "1");
    });
}

/// The number of processes whose command line contains this text.
fn processes_with(text: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let line = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
    let lines = entries.filter_map(line).map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(text) && !line.contains("python")).count()
}

#[test]
fn tools_end_when_they_are_used_up_idle_large_or_too_many() {
    with_python(ToolLimits { max_uses: 2, ..LIMITS }, async |bench| {
        let mut served = Vec::new();
        for _ in 0..4 {
            served.push(says(bench, &ask(bench, &["served"])).await);
        }
        assert_eq!(served, ["1", "2", "1", "2"]);
    });
    with_python(ToolLimits { max_memory: 1, ..LIMITS }, async |bench| {
        assert_eq!(says(bench, &ask(bench, &["served"])).await, "1");
        assert_eq!(says(bench, &ask(bench, &["served"])).await, "1");
    });
    with_python(ToolLimits { max_idle: Duration::from_millis(100), ..LIMITS }, async |bench| {
        says(bench, &ask(bench, &["served"])).await;
        // Its exec directory is removed too.
        let empty = || std::fs::read_dir(&bench.build_root).unwrap().next().is_none();
        eventually("the tool is gone", empty).await;
    });
    with_python(ToolLimits { max_tools: 1, ..LIMITS }, async |bench| {
        let other = |job: Job| job.platform("other", "tool");
        let mut served = Vec::new();
        for job in [
            ask(bench, &["served"]),
            ask(bench, &["served"]),
            other(ask(bench, &["served"])),
            ask(bench, &["served"]),
        ] {
            served.push(says(bench, &job).await);
        }
        assert_eq!(served, ["1", "2", "1", "1"]);
    });
}

#[test]
fn an_action_that_no_tool_can_serve_runs_without_one() {
    with_python(LIMITS, async |bench| {
        let mut plain = ask(bench, &["print x"]);
        plain.platform.clear();
        assert_eq!(says(bench, &plain).await, "cold x");
        // If a file of arguments is not among the inputs, its argument belongs to the command.
        let missing = argv(&["/bin/echo", "@nowhere"])
            .root(bench.input(&[("t", tool("t"))]))
            .platform("persistentWorkerKey", "k");
        let result = bench.result(&missing).await;
        assert_eq!(bench.text(&result.stdout_digest), "@nowhere\n");
        let result = bench.result(&sh("exit 4").platform("persistentWorkerKey", "k")).await;
        assert_eq!(result.exit_code, 4);
    });
}
