//! EXE-01 to EXE-15: the stream of an operation, and who may follow it.

use super::UNIQUE;
use crate::{
    actions::{metadata, response, result_of},
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, inline, skipped},
    checks,
    job::{END_LIMIT, Job, story},
    session::Session,
};
use futures::future::try_join_all;
use gorego_reapi::proto::{longrunning::Operation, reapi::execution_stage::Value as Stage};
use std::time::{Duration, Instant};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    the_first_message_comes_at_once => "EXE-01";
    operations_have_a_name_of_their_own_which_waitexecution_takes => "EXE-02";
    every_message_carries_the_metadata_of_its_action => "EXE-03";
    the_stage_is_never_unknown_and_a_running_action_is_executing => "EXE-04";
    completed_and_done_come_together_in_the_last_message => "EXE-05";
    stages_do_not_go_back => "EXE-06";
    every_end_is_a_response_and_none_is_an_error => "EXE-07";
    a_failed_command_has_a_result => "EXE-08";
    malformed_requests_fail_as_calls_and_timeouts_inside_the_operation => "EXE-09";
    no_stream_ends_ok_before_the_operation_is_done => "EXE-10";
    a_silent_operation_is_repeated => "EXE-11";
    every_waiter_gets_the_current_state_and_the_end => "EXE-12";
    waiting_for_an_unknown_operation_is_not_found => "EXE-13";
    an_operation_outlives_its_client => "EXE-14";
    actions_that_are_not_cached_are_not_merged => "EXE-15";
];

/// The meaning of "at once": well below a second (EXE-01).
const AT_ONCE: Duration = Duration::from_secs(1);
/// Number of attempts, because the machine may be busy. A server that is late every time fails.
const TRIES: usize = 3;
/// Longest time between two messages of a stream (EXE-11).
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// The position of a stage in their order.
fn rank(operation: &Operation) -> Verdict<i32> {
    Ok(metadata(operation)?.stage)
}

fn stages(messages: &[Operation]) -> Verdict<Vec<i32>> {
    messages.iter().map(rank).collect()
}

async fn the_first_message_comes_at_once(s: Session) -> Verdict {
    let job = Job::sh(&s, "sleep 3").uncached();
    job.upload().await?;
    let mut fastest = Duration::MAX;
    for _ in 0..TRIES {
        let request = s.execute_request(&job.digest());
        let begin = Instant::now();
        let mut run = s.start(request).await.wanted("Execute is accepted")?;
        let first = run.next().await?.ok_or_else(|| fail("a first message", "the stream ended OK"))?;
        fastest = fastest.min(begin.elapsed());
        s.give_up(&first.name).await;
        if fastest < AT_ONCE {
            return Ok(());
        }
    }
    Err(fail(format!("a first message within {AT_ONCE:?}"), format!("{fastest:?} at best")))
}

async fn operations_have_a_name_of_their_own_which_waitexecution_takes(s: Session) -> Verdict {
    let named = async |job: Job| {
        let mut run = job.start().await?;
        let first = run.next().await?.ok_or_else(|| fail("a first message", "the stream ended OK"))?;
        ensure(!first.name.is_empty(), "a name", "no name in the first message")?;
        let wait = s.wait(&first.name).await.wanted("WaitExecution takes the name of the operation")?;
        let (rest, waited) = tokio::try_join!(story(run), story(wait)).own()?;
        for operation in rest.iter().chain(&waited) {
            equal("name", &operation.name, &first.name)?;
        }
        Ok(first.name)
    };
    let job = || Job::sh(&s, "sleep 1").uncached();
    let (one, other) = tokio::try_join!(named(job()), named(job()))?;
    ensure(one != other, "a name of its own for each operation", format!("two operations named {one}"))?;
    // An operation may be over before it begins.
    s.case("an Action that is not stored", async {
        let Ok(mut run) = s.start(s.execute_request(&s.unknown())).await else { return Ok(()) };
        // Where this is a status of the call, there is no operation (EXE-25 is about that).
        let Ok(Some(first)) = run.message().await else { return Ok(()) };
        ensure(!first.name.is_empty(), "a name", "no name in the first message")?;
        let wait = s.wait(&first.name).await.wanted("WaitExecution takes the name of the operation")?;
        for operation in story(wait).await.own()? {
            equal("name", &operation.name, &first.name)?;
        }
        Ok(())
    })
    .await
}

async fn every_message_carries_the_metadata_of_its_action(s: Session) -> Verdict {
    let job = Job::sh(&s, "exit 0");
    for (at, operation) in job.story().await?.into_iter().enumerate() {
        s.case(format!("message {at}"), async {
            let metadata = metadata(&operation)?;
            equal("action_digest", &metadata.action_digest, &Some(job.digest()))?;
            let function = i32::from(s.function().wire());
            let fits = metadata.digest_function == function
                // It may be omitted if the length of the hash implies the function.
                || (metadata.digest_function == 0 && function <= 7);
            let seen = format!("digest_function {}", metadata.digest_function);
            ensure(fits, format!("digest_function {function}"), seen)
        })
        .await?;
    }
    Ok(())
}

async fn the_stage_is_never_unknown_and_a_running_action_is_executing(s: Session) -> Verdict {
    // Longer than the interval at which a server may poll its workers.
    let stages = stages(&Job::sh(&s, "sleep 3").story().await?)?;
    let known = stages.iter().all(|stage| (1..=4).contains(stage));
    ensure(known, "stages from 1 to 4", format!("stages {stages:?}"))?;
    let ran = stages.contains(&Stage::Executing.into());
    ensure(ran, "EXECUTING (3) while a command runs for three seconds", format!("stages {stages:?}"))
}

async fn completed_and_done_come_together_in_the_last_message(s: Session) -> Verdict {
    let failing = Job::sh(&s, "exit 3");
    let missing = Job::sh(&s, "exit 0").action(|action| action.input_root_digest = Some(s.unknown()));
    let jobs =
        [("a success", Job::sh(&s, "exit 0")), ("a failure", failing), ("a missing input root", missing)];
    for (case, job) in jobs {
        s.case(case, async {
            let messages = job.story().await?;
            for (at, operation) in messages.iter().enumerate() {
                let completed = rank(operation)? == i32::from(Stage::Completed);
                let last = at + 1 == messages.len();
                let seen = format!(
                    "message {} of {}: done {}, completed {completed}",
                    at + 1,
                    messages.len(),
                    operation.done
                );
                let together = completed == last && operation.done == last;
                ensure(together, "COMPLETED and done, both in the last message and only there", seen)?;
            }
            ensure(!messages.is_empty(), "at least one message", "an empty stream")
        })
        .await?;
    }
    Ok(())
}

async fn stages_do_not_go_back(s: Session) -> Verdict {
    const RUNS: usize = 8;
    let jobs: Vec<_> = (0..RUNS).map(|_| Job::sh(&s, "sleep 0.1").uncached()).collect();
    let stories = try_join_all(jobs.iter().map(Job::story)).await?;
    let mut requeued = 0;
    for (at, messages) in stories.iter().enumerate() {
        s.case(format!("run {at} of {RUNS}"), async {
            let stages = stages(messages)?;
            for (before, after) in stages.iter().zip(stages.iter().skip(1)) {
                match (before, after) {
                    (3, 2) => requeued += 1,
                    _ => ensure(before <= after, "stages in their order", format!("stages {stages:?}"))?,
                }
            }
            Ok(())
        })
        .await?;
    }
    // A worker may be lost once, but not every time.
    ensure(requeued <= 1, "EXECUTING to QUEUED only for work that was requeued", format!("{requeued} times"))
}

async fn every_end_is_a_response_and_none_is_an_error(s: Session) -> Verdict {
    use gorego_reapi::proto::longrunning::operation::Result as End;
    let timeout = Job::sh(&s, "sleep 20").timeout(Duration::from_secs(1));
    let missing = Job::sh(&s, "exit 0").action(|action| action.input_root_digest = Some(s.unknown()));
    let jobs = [
        ("a success", Job::sh(&s, "exit 0")),
        ("a failure", Job::sh(&s, "exit 7")),
        ("a missing input root", missing),
        ("a timeout", timeout),
    ];
    let stories = try_join_all(jobs.iter().map(|(case, job)| s.case(case, job.story()))).await?;
    for ((case, _), messages) in jobs.iter().zip(stories) {
        s.case(case, async {
            for operation in messages {
                match (&operation.result, operation.done) {
                    (None, false) => {}
                    (Some(End::Response(_)), true) => drop(response(&operation)?),
                    (Some(End::Error(status)), _) => {
                        return Err(fail(
                            "Operation.error is never set",
                            format!("error {}", status.message),
                        ));
                    }
                    (Some(_), false) => return Err(fail("no response before done", "a response")),
                    (None, true) => return Err(fail("a response when done", "neither response nor error")),
                }
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn a_failed_command_has_a_result(s: Session) -> Verdict {
    for code in [0, 7] {
        s.case(format!("a command that exits with {code}"), async {
            let response = Job::sh(&s, format!("exit {code}")).response().await?;
            let result = result_of(response)?;
            equal("exit_code", &result.exit_code, &code)
        })
        .await?;
    }
    Ok(())
}

async fn malformed_requests_fail_as_calls_and_timeouts_inside_the_operation(s: Session) -> Verdict {
    s.runs_actions().await?;
    let job = Job::sh(&s, "exit 0");
    job.result().await.control()?;
    let mut digest = job.digest();
    digest.hash.pop();
    for (what, malformed) in [("a short hash", Some(digest)), ("no action_digest", None)] {
        s.case(what, async {
            let mut request = s.execute_request(&job.digest());
            request.action_digest = malformed;
            // The call may also be accepted and then fail with its first message.
            let answer = match s.start(request).await {
                Ok(mut run) => run.message().await,
                Err(status) => Err(status),
            };
            answer.refused("Execute", &[Code::InvalidArgument])?;
            Ok(())
        })
        .await?;
    }
    let slow = Job::sh(&s, "sleep 20").timeout(Duration::from_secs(1));
    let refusal = slow.refused("a timeout", &[Code::DeadlineExceeded]).await?;
    ensure(refusal.inline, "a timeout in ExecuteResponse.status", "a timeout as the status of the call")
}

async fn no_stream_ends_ok_before_the_operation_is_done(s: Session) -> Verdict {
    let mut run = Job::sh(&s, "sleep 1").uncached().start().await?;
    let first = run.next().await?.ok_or_else(|| fail("messages", "the stream ended OK without any"))?;
    let wait = s.wait(&first.name).await.needs("EXE-02", "WaitExecution takes the name of the operation")?;
    let (rest, waited) = tokio::try_join!(story(run), story(wait))?;
    for (what, messages) in [("Execute", rest), ("WaitExecution", waited)] {
        let done = messages.last().is_some_and(|last| last.done);
        ensure(done, format!("{what} goes on to done"), "an end with OK before it")?;
    }
    Ok(())
}

async fn a_silent_operation_is_repeated(s: Session) -> Verdict {
    let needed = MAX_SILENCE + Duration::from_secs(8);
    if s.options().check_limit < needed {
        let seconds = needed.as_secs();
        return Err(skipped(format!("needs a minute of silence; give each check --timeout {seconds}s")));
    }
    let mut run = Job::sh(&s, format!("sleep {}", MAX_SILENCE.as_secs() + 4)).uncached().start().await?;
    let operation = run.until_executing().await?;
    let again = tokio::time::timeout(MAX_SILENCE, run.next()).await;
    s.give_up(&operation.name).await;
    let silent = |_| fail(format!("a message at least every {MAX_SILENCE:?}"), "silence");
    again.map_err(silent)??;
    Ok(())
}

async fn every_waiter_gets_the_current_state_and_the_end(s: Session) -> Verdict {
    let mut run = Job::sh(&s, "sleep 2").uncached().start().await?;
    let first = run.next().await?.ok_or_else(|| fail("a first message", "the stream ended OK"))?;
    let wait = async |delay: Duration| {
        tokio::time::sleep(delay).await;
        let begin = Instant::now();
        let mut wait = s.wait(&first.name).await.wanted("WaitExecution takes the name of the operation")?;
        let now = wait.next().await.own()?.ok_or_else(|| fail("the current state", "the stream ended OK"))?;
        let took = begin.elapsed();
        if now.done {
            return Ok((took, response(&now)?));
        }
        let messages = story(wait).await.own()?;
        let last = messages.last().ok_or_else(|| fail("the end", "the stream ended OK"))?;
        Ok((took, response(last)?))
    };
    const DELAYS: [u64; 4] = [0, 0, 300, 900];
    let waiter = |delay: u64| format!("a waiter that comes after {delay} ms");
    let early = try_join_all(DELAYS.map(|delay| s.case(waiter(delay), wait(Duration::from_millis(delay)))));
    let (messages, waited) = tokio::try_join!(story(run), early)?;
    // A busy machine may be late once. A server that is late for every waiter fails.
    let fastest = waited.iter().map(|(took, _)| *took).min().unwrap_or_default();
    ensure(fastest < 2 * AT_ONCE, "the current state at once", format!("{fastest:?} at best"))?;
    let last = messages.last().ok_or_else(|| fail("the end", "the stream ended OK"))?;
    let expected = response(last)?;
    for ((_, got), delay) in waited.iter().zip(DELAYS) {
        equal(&format!("the response to {}", waiter(delay)), got, &expected)?;
    }
    // The operation is finished. EXE-14 covers how long it is kept.
    let late = async { story(s.wait(&first.name).await.wanted("a finished operation is remembered")?).await };
    let late = late.await.needs("EXE-14")?;
    equal("number of messages about a finished operation", &late.len(), &1)?;
    let ended = late.first().is_some_and(|operation| operation.done);
    ensure(ended, "the final message first", format!("stages {:?}", stages(&late)?))
}

async fn waiting_for_an_unknown_operation_is_not_found(s: Session) -> Verdict {
    let messages = Job::sh(&s, "exit 0").story().await?;
    let name = messages.first().map(|operation| operation.name.clone()).unwrap_or_default();
    let unknown = unknown_name_like(&name);
    let answer = match s.wait(&unknown).await {
        Ok(mut run) => run.message().await,
        Err(status) => Err(status),
    };
    answer.refused("WaitExecution of an operation that never was", &[Code::NotFound])?;
    Ok(())
}

/// An unknown name of the same form: the hex digits of its last segment are changed.
pub(crate) fn unknown_name_like(name: &str) -> String {
    let (parent, id) = name.rsplit_once('/').map_or(("", name), |(_, id)| (name.trim_end_matches(id), id));
    // A fixed pattern would be the same name in every run. Rotating the digits keeps them random.
    let turn = |letter: char| match letter.to_digit(16) {
        Some(digit) if !letter.is_ascii_uppercase() => {
            char::from_digit((digit + 5) % 16, 16).unwrap_or(letter)
        }
        _ => letter,
    };
    let mut turned: Vec<char> = id.chars().collect();
    if let Some(last) = turned.iter_mut().rev().find(|letter| letter.is_ascii_hexdigit()) {
        *last = turn(*last);
    }
    format!("{parent}{}", turned.into_iter().collect::<String>())
}

async fn an_operation_outlives_its_client(s: Session) -> Verdict {
    // A separate connection, which is closed with it.
    let name = {
        let client = s.reconnect().await?;
        // A server may give the slot of an action without followers to another action. So this action is followed until
        // it runs. It ends before such a server would stop it, but after a server that ties operations to connections
        // would have stopped it.
        let mut run = Job::sh(&client, "sleep 0.5").uncached().start().await?;
        let runs = |operation: &Operation| operation.done || rank(operation).is_ok_and(|stage| stage >= 3);
        run.until("running", runs).await?.name
    };
    tokio::time::sleep(END_LIMIT).await;
    let wait = s.wait(&name).await.wanted("an operation goes on without its client")?;
    let response = wait.finish().await?;
    inline("the operation that nobody followed", response.status.as_ref(), &[Code::Ok])?;
    result_of(response).map(drop)
}

async fn actions_that_are_not_cached_are_not_merged(s: Session) -> Verdict {
    let shared = Job::sh(&s, format!("sleep 0.5; {UNIQUE} 0"));
    shared.upload().await?;
    let caller = async |name: &str| {
        s.case(format!("an action that may be merged, {name}"), async {
            let messages = shared.story().await?;
            let last = messages.last().ok_or_else(|| fail("a stream for each caller", "an empty one"))?;
            result_of(response(last)?)
        })
        .await
    };
    tokio::try_join!(caller("first caller"), caller("second caller"))?;
    let apart = Job::sh(&s, format!("sleep 0.5; {UNIQUE} 0")).uncached();
    apart.upload().await?;
    let caller = |name: &str| s.case(format!("an action that says do_not_cache, {name}"), apart.stdout());
    let (one, other) = tokio::try_join!(caller("first caller"), caller("second caller"))?;
    ensure(one != other, "two runs of an action that says do_not_cache", format!("one run for both: {one}"))
}

#[cfg(test)]
mod tests {
    use super::unknown_name_like;

    #[test]
    fn an_unknown_name_has_the_form_of_the_known_one() {
        let name = "a/b/operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        assert_eq!(unknown_name_like(name), "a/b/operations/6ba7b810-9dad-11d1-80b4-00c04fd430cd");
        assert_eq!(unknown_name_like("7"), "c");
        assert_eq!(unknown_name_like(""), "");
    }
}
