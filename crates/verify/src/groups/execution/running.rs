//! EXE-40 to EXE-46: arguments, environment, isolation, and the end of commands.

use crate::{
    actions::result_of,
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, inline, show_inline},
    checks,
    job::{Folder, Job, NOT_STARTED, PATH},
    session::Session,
};
use futures::future::try_join_all;
use std::time::{Duration, Instant};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    arguments_arrive_byte_for_byte => "EXE-40";
    programs_are_found_by_path_and_by_name => "EXE-40";
    the_environment_is_that_of_the_command => "EXE-41";
    a_program_that_cannot_be_started_fails_clearly => "EXE-42";
    what_an_action_does_to_its_inputs_is_seen_by_nobody => "EXE-43";
    stdin_is_empty => "EXE-44";
    what_an_action_leaves_running_is_killed => "EXE-44";
    a_timeout_keeps_the_output_so_far => "EXE-45";
    exit_codes_and_signals_are_passed_through => "EXE-46";
];

/// Time limit on a busy machine for something that should end at once.
const PROMPT: Duration = Duration::from_secs(10);

async fn arguments_arrive_byte_for_byte(s: Session) -> Verdict {
    let arguments =
        ["", " ", "two words", "'single' \"double\"", "$HOME `id` $(id)", "a\nb", "\\n", "ünï", "-n", "*"];
    let show = "for argument; do printf '<%s>\\n' \"$argument\"; done";
    let all = [&["/bin/sh", "-c", show, "sh"][..], &arguments].concat();
    let printed = Job::args(&s, all).stdout().await?;
    let expected: String = arguments.iter().map(|argument| format!("<{argument}>\n")).collect();
    equal("arguments", &printed, &expected)
}

async fn programs_are_found_by_path_and_by_name(s: Session) -> Verdict {
    let tool = "#!/bin/sh\necho \"tool $1\"\n";
    let root = Folder::new().program("tool", tool).folder("w", Folder::new().program("tool", tool));
    let run = async |program: &str, directory: &str| {
        let job = Job::args(&s, [program, "x"]).over(&root).within(directory);
        s.case(format!("{program} in {directory:?}"), async {
            equal("stdout", &job.stdout().await?.as_str(), &"tool x\n")
        })
        .await
    };
    run("./tool", "").await?;
    run("w/tool", "").await?;
    run("./tool", "w").await?;
    run("../tool", "w").await?;
    let by_name = Job::args(&s, ["sh", "-c", "echo found"]).stdout().await?;
    equal("stdout of sh, found in PATH", &by_name.as_str(), &"found\n")
}

/// Variables that a worker may set itself.
fn leaks(name: &str) -> bool {
    let private = ["HOME", "USER", "LOGNAME", "MAIL", "PS1", "HOSTNAME"];
    let prefixes =
        ["SSH_", "AWS_", "GOOGLE_", "AZURE_", "KUBERNETES_", "DOCKER_", "GITHUB_", "XDG_", "CARGO_"];
    let words = ["TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "_KEY"];
    private.contains(&name)
        || prefixes.iter().any(|prefix| name.starts_with(prefix))
        || words.iter().any(|word| name.contains(word))
}

async fn the_environment_is_that_of_the_command(s: Session) -> Verdict {
    let variables =
        [("A", "two words"), ("B", " padded "), ("EMPTY", ""), ("LINES", "a\nb"), ("Z", "ünï=$A")];
    // The command runs without a shell, which would set its own variables.
    let printed = Job::args(&s, ["/usr/bin/env", "-0"]).env(&variables).stdout().await?;
    let seen: Vec<_> = printed.split_terminator('\0').filter_map(|entry| entry.split_once('=')).collect();
    for wanted in variables.iter().chain(&[("PATH", PATH)]) {
        let found: Vec<_> = seen.iter().filter(|(name, _)| *name == wanted.0).collect();
        equal("variable", &found, &vec![wanted])?;
    }
    let asked = |name: &str| name == "PATH" || variables.iter().any(|(asked, _)| *asked == name);
    let leaked: Vec<_> =
        seen.iter().map(|(name, _)| *name).filter(|name| !asked(name) && leaks(name)).collect();
    ensure(leaked.is_empty(), "nothing of the worker's own environment", format!("{leaked:?}"))
}

async fn a_program_that_cannot_be_started_fails_clearly(s: Session) -> Verdict {
    Job::sh(&s, "exit 0").stdout().await.control()?;
    let root = Folder::new().file("data", "#!/bin/sh\nexit 0\n");
    for program in ["./nope", "./data", "no-such-program-anywhere"] {
        let what = format!("{program}, which cannot be started");
        s.case(what, async {
            let begin = Instant::now();
            let job = Job::args(&s, [program]).over(&root);
            job.upload().await?;
            let codes = [Code::Ok, Code::InvalidArgument, Code::FailedPrecondition];
            match s.start(s.execute_request(&job.digest())).await {
                Err(status) => drop(Err::<(), _>(status).refused("Execute", &codes)?),
                Ok(run) => {
                    let response = run.finish().await?;
                    inline("the response", response.status.as_ref(), &codes)?;
                    let status = response.status.unwrap_or_default();
                    if status.code == 0 {
                        let result = response.result.unwrap_or_default();
                        let text = s.log_text(result.stderr_digest.as_ref(), &result.stderr_raw).await?;
                        let told = NOT_STARTED.contains(&result.exit_code) && !text.is_empty();
                        let seen = format!("exit code {} and stderr {text:?}", result.exit_code);
                        ensure(told, "exit code 126 or 127 with a word on stderr", seen)?;
                    } else {
                        ensure(!status.message.is_empty(), "a message", show_inline(&status))?;
                    }
                }
            }
            let took = begin.elapsed();
            ensure(took < PROMPT, "an end at once", format!("an end after {took:?}"))
        })
        .await?;
    }
    Ok(())
}

async fn what_an_action_does_to_its_inputs_is_seen_by_nobody(s: Session) -> Verdict {
    const ROUNDS: usize = 3;
    let content = s.blob_of(format!("pristine {}\n", s.word()));
    let inner = Folder::new().file("inner", "inner\n");
    let root = Folder::new().file("file", content.data.clone()).folder("d", inner);
    let spoil = "chmod u+w . file d d/inner; echo spoilt >> file; rm -f d/inner; echo stray > stray; echo stray > d/stray; exit 0";
    let look = "ls; cat file; ls d; cat d/inner";
    let expected = format!("d\nfile\n{}inner\ninner\n", String::from_utf8_lossy(&content.data));
    for round in 1..=ROUNDS {
        s.case(format!("round {round} of {ROUNDS}"), async {
            s.case("the action that spoils its inputs", Job::sh(&s, spoil).over(&root).uncached().stdout())
                .await?;
            let next = Job::sh(&s, look).over(&root).uncached();
            let seen = s.case("the next action", next.stdout()).await?;
            equal("what the next action sees", &seen, &expected)
        })
        .await?;
    }
    let read = s.read(&content.digest).await.needs("BS-07", "the input can still be read")?;
    ensure(read == content.data, "the input as it was uploaded", "other bytes")
}

async fn stdin_is_empty(s: Session) -> Verdict {
    let begin = Instant::now();
    let printed = Job::sh(&s, "cat; echo end").timeout(PROMPT).stdout().await?;
    equal("what is read from stdin", &printed.as_str(), &"end\n")?;
    let took = begin.elapsed();
    ensure(took < PROMPT, "an end at once", format!("an end after {took:?}"))
}

async fn what_an_action_leaves_running_is_killed(s: Session) -> Verdict {
    // The command line is recognisable by the fraction of the seconds.
    let fraction = s.word().bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let sleep = format!("sleep 60.{fraction}");
    let begin = Instant::now();
    let left = format!("({sleep} &) ; {sleep} & echo left");
    let printed = Job::sh(&s, left).uncached().stdout().await?;
    equal("stdout", &printed.as_str(), &"left\n")?;
    let took = begin.elapsed();
    ensure(took < 2 * PROMPT, "an end with the main process", format!("an end after {took:?}"))?;
    // A server may kill the processes after its answer.
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Works only if this action runs on the same machine: a process that it finds proves a fault, but finding none
    // proves nothing.
    let look = format!(
        "for process in /proc/[0-9]*; do line=$(tr '\\0' ' ' < $process/cmdline 2>/dev/null)
         case \"$line\" in '{sleep} ') echo alive;; esac; done; exit 0"
    );
    let alive = Job::sh(&s, look).uncached().stdout().await?;
    ensure(
        alive.is_empty(),
        "nothing left running a second later",
        format!("{} processes", alive.lines().count()),
    )
}

async fn a_timeout_keeps_the_output_so_far(s: Session) -> Verdict {
    // The timeout is long enough to print, even if a worker starts commands slowly. The timeout may include the start.
    const TIMEOUT: Duration = Duration::from_secs(3);
    let job = Job::sh(&s, "echo out; echo err >&2; sleep 9").timeout(TIMEOUT);
    let begin = Instant::now();
    let response = job.response().await.own()?;
    let took = begin.elapsed();
    inline("a command past its timeout", response.status.as_ref(), &[Code::DeadlineExceeded])?;
    let result = response.result.ok_or_else(|| fail("a result with the output so far", "no result"))?;
    equal("stdout", &s.stdout_of(&result).await?.as_str(), &"out\n")?;
    let stderr = s.log_text(result.stderr_digest.as_ref(), &result.stderr_raw).await?;
    equal("stderr", &stderr.as_str(), &"err\n")?;
    ensure(
        took < 2 * PROMPT,
        format!("an end soon after a timeout of {TIMEOUT:?}"),
        format!("an end after {took:?}"),
    )
}

async fn exit_codes_and_signals_are_passed_through(s: Session) -> Verdict {
    let exit_code = async |script: String| {
        let job = Job::sh(&s, &script);
        let result = s.case(script, async { result_of(job.response().await?) }).await?;
        Ok(result.exit_code)
    };
    let codes = [0, 1, 42, 255];
    let seen = try_join_all(codes.map(|code| exit_code(format!("exit {code}")))).await?;
    equal("exit codes", &seen, &codes.to_vec())?;
    let killed = exit_code("kill -9 $$".into()).await?;
    ensure(killed != 0, "a non-zero exit code for a command that was killed", "exit code 0")
}
