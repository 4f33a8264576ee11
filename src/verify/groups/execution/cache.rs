//! EXE-16 to EXE-21: when the action cache answers, and what goes into it.

use super::UNIQUE;
use crate::{
    checks,
    proto::reapi::{ActionResult, OutputFile},
    verify::{
        actions::result_of,
        check::{Answer as _, Check, Verdict, ensure, equal, fail, inline, skipped},
        job::Job,
        session::Session,
    },
};
use std::time::Duration;
use tonic::Code;

/// What this file checks.
pub const CHECKS: &[Check] = checks![
    cached_result_says_whether_the_cache_answered => "EXE-16";
    skip_cache_lookup_runs_again_and_replaces_the_result => "EXE-17";
    a_success_is_cached_by_the_time_it_is_done => "EXE-18";
    do_not_cache_and_timeouts_leave_nothing_in_the_cache => "EXE-19";
    a_failed_command_runs_again => "EXE-20";
    an_incomplete_result_does_not_answer_execute => "EXE-21";
];

/// Runs a job: what it printed, and whether that is said to come from the cache.
async fn run(job: &Job, skip_cache_lookup: bool) -> Verdict<(String, bool)> {
    let run = job.start_with(|request| request.skip_cache_lookup = skip_cache_lookup).await?;
    let response = run.finish().await?;
    let cached = response.cached_result;
    let result = result_of(response)?;
    Ok((job.session().stdout_of(&result).await?, cached))
}

/// What the action cache has for a job; `None` for NOT_FOUND.
async fn cached(job: &Job) -> Verdict<Option<ActionResult>> {
    match job.session().result(&job.digest()).await {
        Err(status) if status.code() == Code::NotFound => Ok(None),
        answer => answer.wanted("GetActionResult answers").map(Some),
    }
}

async fn cached_result_says_whether_the_cache_answered(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 0"));
    let (first, from_cache) = run(&job, false).await?;
    ensure(!from_cache, "cached_result false for the first run", "cached_result true")?;
    let (second, from_cache) = run(&job, false).await?;
    equal("cached_result of a repetition that printed the same bytes", &from_cache, &(first == second))
}

async fn skip_cache_lookup_runs_again_and_replaces_the_result(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 0"));
    let (first, _) = run(&job, false).await?;
    let (second, from_cache) = run(&job, true).await?;
    ensure(first != second && !from_cache, "another run", format!("the old result: {second}"))?;
    if cached(&job).await?.is_none() {
        // Nothing is cached here (EXE-18), so nothing can be replaced.
        return Ok(());
    }
    if s.updates_results().is_ok() {
        let poison = s.text(100);
        s.store(&[&poison]).await?;
        let result = ActionResult { stdout_digest: Some(poison.digest), ..Default::default() };
        s.update_result(&job.digest(), result).await.wanted("an update of the action cache is accepted")?;
    }
    let (third, _) = run(&job, true).await?;
    ensure(third != first && third != second, "another run", format!("an old result: {third}"))?;
    let kept = cached(&job).await?.ok_or_else(|| fail("the new result in the cache", "nothing"))?;
    equal("what the cached result printed", &s.stdout_of(&kept).await?, &third)
}

async fn a_success_is_cached_by_the_time_it_is_done(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 0"));
    let (printed, _) = run(&job, false).await?;
    let kept = s.result(&job.digest()).await.wanted("a success is in the action cache when it is done")?;
    equal("what the cached result printed", &s.stdout_of(&kept).await?, &printed)
}

async fn do_not_cache_and_timeouts_leave_nothing_in_the_cache(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 0")).uncached();
    let (first, _) = run(&job, false).await?;
    ensure(cached(&job).await?.is_none(), "nothing in the cache for do_not_cache", "a result")?;
    let (second, from_cache) = run(&job, false).await?;
    ensure(!from_cache && first != second, "another run for do_not_cache", "the result of the first")?;

    let slow = Job::sh(&s, "sleep 20").timeout(Duration::from_secs(1));
    let response = slow.response().await?;
    inline("the command that takes too long", response.status.as_ref(), &[Code::DeadlineExceeded])?;
    ensure(cached(&slow).await?.is_none(), "nothing in the cache for a timeout", "a result")
}

async fn a_failed_command_runs_again(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 1"));
    let (first, _) = run(&job, false).await?;
    ensure(cached(&job).await?.is_none(), "no failure in the action cache", "a result")?;
    let (second, from_cache) = run(&job, false).await?;
    ensure(!from_cache && first != second, "another run after a failure", "the result of the first")
}

async fn an_incomplete_result_does_not_answer_execute(s: Session) -> Verdict {
    s.updates_results()?;
    let job = Job::sh(&s, "echo here > out").outputs(["out"]);
    job.upload().await?;
    let lost = OutputFile { path: "out".into(), digest: Some(s.unknown()), ..Default::default() };
    let result = ActionResult { output_files: vec![lost], ..Default::default() };
    if let Err(status) = s.update_result(&job.digest(), result).await {
        let code = status.code();
        return Err(skipped(format!(
            "the server takes no result whose outputs are missing ({code:?}), so none can be left in its cache"
        )));
    }
    let response = job.response().await?;
    ensure(!response.cached_result, "a run, since the cached result lacks an output", "the cached result")?;
    let result = result_of(response)?;
    let output = result.output_files.first().and_then(|file| file.digest.clone());
    let output = output.ok_or_else(|| fail("the output of a run", "no output"))?;
    let read = s.read(&output).await.wanted("the output can be read")?;
    equal("the output", &read.as_ref(), &b"here\n".as_slice())
}
