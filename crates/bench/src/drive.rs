//! Makes the calls of a workload and measures them.
//!
//! A measurement consists of rounds. Before a round, its calls are prepared: their blobs are created and hashed, and
//! their actions are uploaded. Then the clock runs while the calls are made. So during a round the server only does
//! what is measured, and memory is bounded by [`STOCK_BYTES`]. The first rounds are a warm-up and are not recorded.
//!
//! In an open loop, calls are due at fixed times, whether or not earlier ones have ended, and latency counts from the
//! time at which a call was due. So a server that stalls cannot hide that by slowing its clients down ("coordinated
//! omission"). Each round continues the schedule of the one before it. A call that becomes due while a round waits for
//! its last answers is late when the next round begins.

use crate::{
    Options, Progress,
    figures::{Figures, Recorder, Work},
    process::{ServerUse, Usage},
};
use futures::{
    StreamExt as _, TryStreamExt as _,
    future::{BoxFuture, join_all},
    stream,
};
use gorego_reapi::error::{Error, Result};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// Time that one round should take.
const ROUND: Duration = Duration::from_secs(1);
/// Maximum number of bytes that prepared calls may hold in memory.
const STOCK_BYTES: u64 = 512 * 1024 * 1024;
/// Maximum number of calls in a round.
const MAX_ROUND_CALLS: u64 = 200_000;
/// Number of calls that are prepared concurrently.
const PREPARED_AT_ONCE: usize = 16;
/// A run ends after this many rounds without a successful call, because the server then refuses everything.
const MAX_FAILED_ROUNDS: u32 = 3;

/// When calls are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// Each caller makes its next call when the previous one has ended.
    Closed,
    /// Calls are due at this rate per second. At most `callers` calls are in progress. If a call has to wait for a
    /// caller, the waiting time is part of its latency.
    Open(f64),
}

/// A scenario that has been set up on a server.
pub(crate) trait Workload: Send + Sync {
    /// Prepares one call. Each number is used once.
    fn prepare(&self, number: u64) -> BoxFuture<'_, Result<Call>>;
}

/// One call, ready to be made.
pub(crate) struct Call {
    /// Makes the call. As far as possible, the error message does not depend on the number of the call.
    pub(crate) make: BoxFuture<'static, std::result::Result<Work, String>>,
    /// The memory that the call holds until it is made.
    pub(crate) bytes: u64,
}

impl Call {
    /// A call that holds no blobs.
    pub(crate) fn new(
        make: impl Future<Output = std::result::Result<Work, String>> + Send + 'static,
    ) -> Self {
        Self { make: Box::pin(make), bytes: 0 }
    }

    /// The same call with this memory size.
    pub(crate) fn holding(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }
}

/// A workload whose calls are prepared by this function.
struct Calls<F>(F);

impl<F> Workload for Calls<F>
where
    F: Fn(u64) -> BoxFuture<'static, Result<Call>> + Send + Sync,
{
    fn prepare(&self, number: u64) -> BoxFuture<'_, Result<Call>> {
        (self.0)(number)
    }
}

/// A workload whose calls need no preparation.
pub(crate) fn ready<M>(make: impl Fn(u64) -> M + Send + Sync + 'static) -> Box<dyn Workload>
where
    M: Future<Output = std::result::Result<Work, String>> + Send + 'static,
{
    Box::new(Calls(move |number| {
        let call = Call::new(make(number));
        Box::pin(async move { Ok(call) }) as BoxFuture<'static, _>
    }))
}

/// A workload whose calls are prepared by futures.
pub(crate) fn prepared<P>(prepare: impl Fn(u64) -> P + Send + Sync + 'static) -> Box<dyn Workload>
where
    P: Future<Output = Result<Call>> + Send + 'static,
{
    Box::new(Calls(move |number| Box::pin(prepare(number)) as BoxFuture<'static, _>))
}

/// The results of a measurement, and the resources that the server used.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) figures: Figures,
    pub(crate) server: Option<ServerUse>,
}

/// Measures a workload.
///
/// # Errors
/// If calls cannot be prepared.
pub(crate) async fn measure(
    name: &'static str,
    workload: &dyn Workload,
    callers: usize,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Measured> {
    let mut rounds =
        Rounds { callers, pace: options.pace, next: 0, size: callers as u64 * 4, behind: Duration::ZERO };
    let mut warm = Duration::ZERO;
    while warm < options.warm_up {
        warm += rounds.run(workload).await?.1.max(Duration::from_millis(1));
    }
    let (mut all, mut measured, mut failed_rounds) = (Recorder::new(), Duration::ZERO, 0);
    let mut used = Usage::default();
    while measured < options.duration && failed_rounds < MAX_FAILED_ROUNDS {
        let stock = rounds.prepare(workload).await?;
        let before = options.pid.map(Usage::of);
        let (recorder, elapsed) = rounds.make(stock).await;
        if let (Some(pid), Some(before)) = (options.pid, before) {
            used.add(&Usage::of(pid).since(&before));
        }
        failed_rounds = if recorder.has_success() { 0 } else { failed_rounds + 1 };
        all.add(recorder);
        measured += elapsed;
        progress(Progress::Measured { scenario: name, calls: all.calls(), time: measured });
    }
    let calls = all.calls();
    let server = options.pid.map(|pid| ServerUse::new(pid, &used, calls));
    Ok(Measured { figures: all.figures(measured), server })
}

/// The rounds of one measurement.
struct Rounds {
    callers: usize,
    pace: Pace,
    /// Number of the next call.
    next: u64,
    /// Calls of the next round.
    size: u64,
    /// How late the next round begins in an open loop.
    behind: Duration,
}

impl Rounds {
    async fn run(&mut self, workload: &dyn Workload) -> Result<(Recorder, Duration)> {
        let stock = self.prepare(workload).await?;
        Ok(self.make(stock).await)
    }

    /// Prepares the calls of the next round: as many as [`STOCK_BYTES`] allow, and at least one for each caller.
    async fn prepare(&mut self, workload: &dyn Workload) -> Result<Vec<Call>> {
        let first = self.next;
        let mut calls = stream::iter(first..first + self.size)
            .map(|number| workload.prepare(number))
            .buffered(PREPARED_AT_ONCE);
        let (mut stock, mut bytes) = (Vec::new(), 0);
        while let Some(call) = calls.try_next().await? {
            bytes += call.bytes;
            stock.push(call);
            if bytes > STOCK_BYTES && stock.len() >= self.callers {
                break;
            }
        }
        // The preparation of further calls is dropped, and their numbers are not used again.
        self.next = first + self.size;
        Ok(stock)
    }

    /// Makes the calls and chooses the size of the next round.
    async fn make(&mut self, stock: Vec<Call>) -> (Recorder, Duration) {
        let (count, start) = (stock.len() as f64, Instant::now());
        let recorder = match self.pace {
            Pace::Closed => closed(stock, self.callers).await,
            Pace::Open(rate) => {
                let interval = Duration::from_secs_f64(1.0 / rate);
                let recorder = open(stock, self.callers, interval, self.behind).await;
                let scheduled = interval.mul_f64(count);
                self.behind = (self.behind + start.elapsed()).saturating_sub(scheduled);
                recorder
            }
        };
        let elapsed = start.elapsed();
        let rate = match self.pace {
            Pace::Closed => count / elapsed.as_secs_f64().max(1e-6),
            Pace::Open(rate) => rate,
        };
        let size = (rate * ROUND.as_secs_f64()) as u64;
        self.size = size.clamp(self.callers as u64, MAX_ROUND_CALLS);
        (recorder, elapsed)
    }
}

/// Each caller makes one call after the other.
async fn closed(stock: Vec<Call>, callers: usize) -> Recorder {
    let stock = Arc::new(Mutex::new(stock));
    let caller = || {
        let stock = stock.clone();
        async move {
            let mut recorder = Recorder::new();
            loop {
                let call = stock.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(call) = call else { return recorder };
                let start = Instant::now();
                let outcome = call.make.await;
                recorder.record(start.elapsed(), outcome);
            }
        }
    };
    join_recorders((0..callers).map(|_| tokio::spawn(caller())).collect()).await
}

/// One call is due in each interval. The first one was due `behind` ago.
async fn open(stock: Vec<Call>, callers: usize, interval: Duration, behind: Duration) -> Recorder {
    let (now, total) = (Instant::now(), stock.len());
    // The clock may not reach back so far, if the machine has just started.
    let start = now.checked_sub(behind).unwrap_or(now);
    if total == 0 {
        return Recorder::new();
    }
    let due = Arc::new(Semaphore::new(0));
    // Timers of the runtime are inexact by a millisecond. A separate thread sleeps more exactly.
    let pacer = {
        let due = due.clone();
        std::thread::spawn(move || {
            for at in 0..total {
                let wait = (start + interval.mul_f64(at as f64)).saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    std::thread::sleep(wait);
                }
                due.add_permits(1);
            }
        })
    };
    let stock: Arc<Mutex<Vec<Option<Call>>>> = Arc::new(Mutex::new(stock.into_iter().map(Some).collect()));
    let next = Arc::new(AtomicUsize::new(0));
    let caller = || {
        let (stock, next, due) = (stock.clone(), next.clone(), due.clone());
        async move {
            let mut recorder = Recorder::new();
            loop {
                let Ok(permit) = due.acquire().await else { return recorder };
                permit.forget();
                // Permits have no numbers. The number is taken after the permit, so its call is due.
                let at = next.fetch_add(1, Relaxed);
                if at + 1 == total {
                    due.close();
                }
                let call =
                    stock.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at).and_then(Option::take);
                let Some(call) = call else { return recorder };
                let outcome = call.make.await;
                recorder.record((start + interval.mul_f64(at as f64)).elapsed(), outcome);
            }
        }
    };
    let recorder = join_recorders((0..callers).map(|_| tokio::spawn(caller())).collect()).await;
    let _ = pacer.join();
    recorder
}

async fn join_recorders(callers: Vec<tokio::task::JoinHandle<Recorder>>) -> Recorder {
    let mut all = Recorder::new();
    for done in join_all(callers).await {
        match done {
            Ok(recorder) => all.add(recorder),
            Err(error) => all.record(Duration::ZERO, Err(format!("a caller failed: {error}"))),
        }
    }
    all
}

/// The message of a failed call.
pub(crate) fn message(method: &str, status: &tonic::Status) -> String {
    format!("{method}: {:?}: {}", status.code(), status.message())
}

/// The error for an answer without the data that the workload needs.
pub(crate) fn unusable(what: &str) -> Error {
    Error::Unavailable(format!("the server gave no usable answer: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::OnceLock;

    /// Calls that take this long, of which each tenth fails.
    struct Fake(Duration);

    impl Workload for Fake {
        fn prepare(&self, number: u64) -> BoxFuture<'_, Result<Call>> {
            let pause = self.0;
            Box::pin(async move {
                Ok(Call::new(async move {
                    tokio::time::sleep(pause).await;
                    if number % 10 == 9 { Err("tenth".into()) } else { Ok(Work { units: 2, bytes: 3 }) }
                }))
            })
        }
    }

    fn options(pace: Pace) -> Options {
        Options {
            callers: None,
            pace,
            warm_up: Duration::ZERO,
            duration: Duration::from_millis(200),
            pid: None,
            limits: None,
        }
    }

    #[tokio::test]
    async fn a_closed_loop_makes_calls_until_the_time_is_over() {
        let fake = Fake(Duration::from_millis(2));
        let measured = measure("fake", &fake, 4, &options(Pace::Closed), &|_| {}).await.unwrap();
        let figures = measured.figures;
        assert!(figures.seconds >= 0.2 && figures.calls > 40, "{figures:?}");
        assert!(figures.errors["tenth"] == figures.failed && figures.failed * 8 <= figures.calls);
        assert!(figures.latency_us.p50 >= 2_000.0);
        assert!((figures.units_per_second / figures.calls_per_second - 2.0).abs() < 1e-6);
    }

    /// One caller needs 20 ms for a call and one is due every 5 ms: the waiting time counts.
    #[tokio::test]
    async fn an_open_loop_counts_the_time_that_a_call_is_late() {
        let fake = Fake(Duration::from_millis(20));
        let measured = measure("fake", &fake, 1, &options(Pace::Open(200.0)), &|_| {}).await.unwrap();
        let latency = measured.figures.latency_us;
        assert!(latency.max > 200_000.0, "{latency:?}");
    }

    /// A server that answers no call before the stall is over.
    #[tokio::test]
    async fn an_open_loop_counts_the_calls_that_became_due_while_the_server_stalled() {
        struct Stalled(OnceLock<tokio::time::Instant>);
        impl Workload for Stalled {
            fn prepare(&self, _: u64) -> BoxFuture<'_, Result<Call>> {
                let now = tokio::time::Instant::now();
                let end = *self.0.get_or_init(|| now + Duration::from_millis(400));
                Box::pin(async move {
                    Ok(Call::new(async move {
                        tokio::time::sleep_until(end).await;
                        Ok(Work { units: 1, bytes: 0 })
                    }))
                })
            }
        }
        // The first round takes 32 ms without the stall.
        let stalled = Stalled(OnceLock::new());
        let options = Options { duration: Duration::from_millis(600), ..options(Pace::Open(500.0)) };
        let measured = measure("fake", &stalled, 4, &options, &|_| {}).await.unwrap();
        let latency = measured.figures.latency_us;
        assert!(latency.p90 > 150_000.0, "{latency:?}");
    }

    #[tokio::test]
    async fn a_server_that_refuses_everything_ends_the_run() {
        struct Refusing;
        impl Workload for Refusing {
            fn prepare(&self, _: u64) -> BoxFuture<'_, Result<Call>> {
                Box::pin(async { Ok(Call::new(async { Err("refused".into()) })) })
            }
        }
        let options = Options { duration: Duration::from_secs(3600), ..options(Pace::Closed) };
        let figures = measure("fake", &Refusing, 2, &options, &|_| {}).await.unwrap().figures;
        assert!(figures.calls == 0 && figures.failed > 0);
    }
}
