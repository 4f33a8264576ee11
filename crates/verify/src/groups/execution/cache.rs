//! EXE-16 to EXE-21: when the action cache answers, and what is stored in it.

use super::UNIQUE;
use crate::{
    actions::result_of,
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, inline, skipped},
    checks,
    job::Job,
    patience::within_patience,
    session::Session,
};
use gorego_reapi::proto::reapi::{ActionResult, OutputFile};
use std::{collections::BTreeSet, time::Duration};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    cached_result_says_whether_the_cache_answered => "EXE-16";
    skip_cache_lookup_runs_again_and_replaces_the_result => "EXE-17";
    a_success_is_cached_by_the_time_it_is_done => "EXE-18";
    do_not_cache_and_timeouts_leave_nothing_in_the_cache => "EXE-19";
    a_failed_command_runs_again => "EXE-20";
    an_incomplete_result_does_not_answer_execute => "EXE-21";
];

/// Runs a job. Returns its output, and whether the response claims to come from the cache.
async fn run(job: &Job, skip_cache_lookup: bool) -> Verdict<(String, bool)> {
    let run = job.start_with(|request| request.skip_cache_lookup = skip_cache_lookup).await?;
    let response = run.finish().await?;
    let cached = response.cached_result;
    let result = result_of(response)?;
    Ok((job.session().stdout_of(&result).await?, cached))
}

/// How often an action is repeated, and the delay in between. A server that is finishing a run has finished it by then.
const REPETITIONS: usize = 8;
const PAUSE: Duration = Duration::from_millis(500);

/// The cached result of a job; `None` for NOT_FOUND.
async fn cached(job: &Job) -> Verdict<Option<ActionResult>> {
    match job.session().result(&job.digest()).await {
        Err(status) if status.code() == Code::NotFound => Ok(None),
        answer => answer.needs("AC-01", "GetActionResult answers").map(Some),
    }
}

async fn cached_result_says_whether_the_cache_answered(s: Session) -> Verdict {
    let job = Job::sh(&s, format!("{UNIQUE} 0"));
    let (first, from_cache) = run(&job, false).await?;
    ensure(!from_cache, "cached_result false for the first run", "cached_result true")?;
    if s.updates_results().is_ok() {
        a_planted_result_tells_where_it_is_from(&s).await.case("a result that was uploaded")?;
    }
    a_repetition_tells_where_it_is_from(&job, first).await.case("a repetition")
}

/// The output of a repetition shows where its result came from, except in one case: earlier output with `cached_result`
/// false. A server may share a run that is just finishing with a new caller. That is not an answer of its cache, and it
/// happens once. A server that answers so repeatedly answers from its cache.
async fn a_repetition_tells_where_it_is_from(job: &Job, first: String) -> Verdict {
    let mut printed = BTreeSet::from([first]);
    for _ in 0..REPETITIONS {
        let (text, from_cache) = run(job, false).await?;
        match (printed.contains(&text), from_cache) {
            // A new run: nothing is cached here, or not yet.
            (false, false) => drop(printed.insert(text)),
            (true, true) => return Ok(()),
            // The cache may hold another run than the shared one, for example after a worker was lost. Then the cache
            // returns that run.
            (false, true) => return in_the_cache(job, &text).await,
            (true, false) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
    // The first run counts too. Here each repetition was a separate run.
    let always_ran = printed.len() > REPETITIONS;
    let seen = format!("cached_result false {REPETITIONS} times for what was printed before");
    ensure(always_ran, "cached_result true for what comes from the action cache", seen)
}

/// Waits until the action cache returns this result for a job.
async fn in_the_cache(job: &Job, printed: &str) -> Verdict {
    within_patience(|| async {
        let kept = cached(job).await?.ok_or_else(|| fail("a result in the action cache", "none"))?;
        equal("what the cached result printed", &job.session().stdout_of(&kept).await?.as_str(), &printed)
    })
    .await
}

/// A planted result has output that no run produces.
async fn a_planted_result_tells_where_it_is_from(s: &Session) -> Verdict {
    let job = Job::sh(s, format!("{UNIQUE} 0"));
    job.upload().await?;
    let planted = s.text(100);
    s.store(&[&planted]).await?;
    let result = ActionResult { stdout_digest: Some(planted.digest), ..Default::default() };
    s.update_result(&job.digest(), result)
        .await
        .needs("AC-08", "an update of the action cache is accepted")?;
    let (printed, from_cache) = run(&job, false).await?;
    let from_cache_indeed = printed.as_bytes() == planted.data;
    equal("cached_result", &from_cache, &from_cache_indeed)
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
        let answer = s.update_result(&job.digest(), result).await;
        answer.needs("AC-08", "an update of the action cache is accepted")?;
    }
    let (third, _) = run(&job, true).await?;
    ensure(third != first && third != second, "another run", format!("an old result: {third}"))?;
    // A cache of several machines may return the old result for a while.
    in_the_cache(&job, &third).await
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
