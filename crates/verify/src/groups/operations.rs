//! OPS: google.longrunning.Operations, in addition to the streams of Execution.

use super::{Beyond, execution::stream::unknown_name_like};
use crate::{
    actions::{metadata, response, result_of},
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, inline, show},
    checks,
    job::{Job, story},
    patience::within_patience,
    session::Session,
};
use gorego_reapi::proto::{
    longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        Operation, WaitOperationRequest,
    },
    reapi::execution_stage::Value as Stage,
};
use std::time::{Duration, Instant};
use tonic::{Code, Status};

pub(super) const CHECKS: &[Check] = checks![
    getoperation_says_what_the_stream_says => "OPS-01";
    calls_that_are_not_offered_are_unimplemented => "OPS-02";
    a_cancelled_operation_ends_inside_its_response => "OPS-03";
    a_merged_run_outlives_the_cancel_of_one_client => "OPS-04";
    a_merged_run_outlives_the_disconnect_of_one_client => "OPS-04";
    waitoperation_returns_when_the_time_is_up_or_the_operation_ends => "OPS-05";
];

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[];

/// Time limit for a requested end.
const PROMPT: Duration = Duration::from_secs(10);

async fn get(s: &Session, name: &str) -> Result<Operation, Status> {
    let request = GetOperationRequest { name: name.to_owned() };
    Ok(s.operations().get_operation(request).await?.into_inner())
}

async fn cancel(s: &Session, name: &str) -> Result<(), Status> {
    let request = CancelOperationRequest { name: name.to_owned() };
    s.operations().cancel_operation(request).await.map(drop)
}

fn is_executing(operation: &Operation) -> bool {
    metadata(operation).is_ok_and(|metadata| metadata.stage == i32::from(Stage::Executing))
}

async fn getoperation_says_what_the_stream_says(s: Session) -> Verdict {
    let job = Job::sh(&s, "sleep 1").uncached();
    let mut run = job.start().await?;
    let running = run.until_executing().await?;
    let seen = get(&s, &running.name).await.offered("GetOperation answers")?;
    equal("name", &seen.name, &running.name)?;
    let described = metadata(&seen).own()?;
    equal("action_digest", &described.action_digest, &Some(job.digest()))?;
    ensure(described.stage >= 3, "EXECUTING, or the end", format!("stage {}", described.stage))?;
    equal("done of an unfinished stage", &seen.done, &(described.stage == 4))?;
    let ended = run.until("done", |operation| operation.done).await?;
    let seen = get(&s, &running.name).await.wanted("GetOperation of a finished operation answers")?;
    equal("done", &seen.done, &true)?;
    equal("response", &response(&seen).own()?, &response(&ended)?)?;
    equal("metadata", &metadata(&seen).own()?, &metadata(&ended)?)?;
    get(&s, &unknown_name_like(&running.name))
        .await
        .refused("an unknown operation", &[Code::NotFound])
        .map(drop)
}

async fn calls_that_are_not_offered_are_unimplemented(s: Session) -> Verdict {
    let messages = Job::sh(&s, "exit 0").story().await.control()?;
    let name = messages.first().map(|operation| operation.name.clone()).unwrap_or_default();
    let parent = s.qualify("operations");
    // OK if the method exists. A server may also refuse the guessed name of the list, or refuse to forget an operation.
    let acceptable = |answer: Result<(), Status>, what: &str, codes: &[Code]| match answer {
        Ok(()) => Ok(()),
        Err(status) if status.code() == Code::Unimplemented || codes.contains(&status.code()) => Ok(()),
        Err(status) => Err(fail(format!("{what} answers, or is UNIMPLEMENTED"), show(&status))),
    };
    let refusals = [Code::InvalidArgument, Code::NotFound, Code::PermissionDenied];
    let list = ListOperationsRequest { name: parent, page_size: 10, ..Default::default() };
    let listed = s.operations().list_operations(list).await.map(drop);
    acceptable(listed, "ListOperations", &refusals)?;
    let wait = WaitOperationRequest { name: name.clone(), timeout: Duration::from_secs(1).try_into().ok() };
    let waited = s.operations().wait_operation(wait).await.map(drop);
    acceptable(waited, "WaitOperation", &refusals)?;
    let delete = DeleteOperationRequest { name };
    let deleted = s.operations().delete_operation(delete).await.map(drop);
    acceptable(deleted, "DeleteOperation", &refusals)
}

async fn a_cancelled_operation_ends_inside_its_response(s: Session) -> Verdict {
    // The process is recognisable by the fraction of the seconds.
    let fraction = s.word().bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let sleep = format!("sleep 25.{fraction}");
    let mut run = Job::sh(&s, &sleep).uncached().start().await?;
    let name = run.until_executing().await?.name;
    let begin = Instant::now();
    cancel(&s, &name).await.offered("CancelOperation of a running operation is OK")?;
    let late = |_| fail(format!("an end within {PROMPT:?} of the cancel"), "the operation goes on");
    let messages = tokio::time::timeout(PROMPT, story(run)).await.map_err(late)??;
    let last = messages.last().ok_or_else(|| fail("the end", "the stream ended OK without it"))?;
    let status = response(last).own()?.status;
    inline("ExecuteResponse.status of a cancelled operation", status.as_ref(), &[Code::Cancelled])?;
    let took = begin.elapsed();
    ensure(took < PROMPT, "an end at once", format!("an end after {took:?}"))?;
    cancel(&s, &name).await.wanted("CancelOperation of a finished operation is OK")?;
    let unknown = cancel(&s, &unknown_name_like(&name)).await;
    unknown.refused("CancelOperation of an unknown operation", &[Code::NotFound])?;
    // Works only if this action runs on the same machine: a process that it finds proves a fault, but finding none
    // proves nothing.
    let look = format!(
        "for process in /proc/[0-9]*; do line=$(tr '\\0' ' ' < $process/cmdline 2>/dev/null)
         case \"$line\" in '{sleep} ') echo alive;; esac; done; exit 0"
    );
    // A server may report the end of the operation before its worker has killed the command.
    within_patience(|| async {
        let alive = Job::sh(&s, &look).uncached().stdout().await?;
        ensure(alive.is_empty(), "the command killed", "it runs")
    })
    .await
}

/// Two clients with separate connections run one action. Returns the stream and name of the first, and the stream of
/// the other.
async fn two_clients(
    s: &Session,
) -> Verdict<(crate::actions::OperationStream, String, crate::actions::OperationStream)> {
    let leaving = s.reconnect().await?;
    let job = Job::sh(&leaving, "sleep 2; echo done");
    let mut first = job.start().await?;
    let name = first.until_executing().await?.name;
    let mut second = s.start(s.execute_request(&job.digest())).await.wanted("Execute is accepted")?;
    second.until("EXECUTING", |operation| is_executing(operation) || operation.done).await?;
    Ok((first, name, second))
}

async fn a_merged_run_outlives_the_cancel_of_one_client(s: Session) -> Verdict {
    let (_first, name, second) = two_clients(&s).await?;
    cancel(&s, &name).await.offered("CancelOperation of a running operation is OK")?;
    let result = result_of(second.finish().await?)?;
    equal("stdout of the other client's run", &s.stdout_of(&result).await?.as_str(), &"done\n")
}

async fn a_merged_run_outlives_the_disconnect_of_one_client(s: Session) -> Verdict {
    let (first, _, second) = two_clients(&s).await?;
    drop(first);
    let result = result_of(second.finish().await?)?;
    equal("stdout of the other client's run", &s.stdout_of(&result).await?.as_str(), &"done\n")
}

async fn waitoperation_returns_when_the_time_is_up_or_the_operation_ends(s: Session) -> Verdict {
    const LIMIT: Duration = Duration::from_secs(1);
    let mut run = Job::sh(&s, "sleep 8").uncached().start().await?;
    let name = run.until_executing().await?.name;
    let wait = async |limit: Duration| {
        let begin = Instant::now();
        let request = WaitOperationRequest { name: name.clone(), timeout: limit.try_into().ok() };
        let answer = s.operations().wait_operation(request).await;
        (answer.map(tonic::Response::into_inner), begin.elapsed())
    };
    let (answer, took) = wait(LIMIT).await;
    let operation = answer.offered("WaitOperation answers when its time is up")?;
    equal("name", &operation.name, &name)?;
    ensure(!operation.done, "an operation that goes on", "the end of a command of 8 s")?;
    let in_time = took >= LIMIT.mul_f32(0.9) && took < LIMIT * 5;
    ensure(in_time, format!("an answer after {LIMIT:?}"), format!("an answer after {took:?}"))?;
    let (answer, _) = wait(2 * PROMPT).await;
    let operation = answer.wanted("WaitOperation answers when the operation ends")?;
    ensure(operation.done, "the end, well before the time is up", "an operation that goes on")?;
    let ended = run.until("done", |operation| operation.done).await?;
    equal("response", &response(&operation).own()?, &response(&ended)?)
}
