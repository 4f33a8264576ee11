//! [`Owners`]: watches the actors that own the state of the server.
//!
//! Everything here runs on the actors' thread. If an owner dies, the process exits, because a partial server is worse
//! than none. If an owner does not answer, the reports to the supervisor stop, and the supervisor ends the process
//! after its own time limit.

use crate::{
    actors::{
        asset::client::Assets,
        cas::{InspectStore, StoreInspection, client::Cas},
        scheduler::{
            SchedulerActor,
            messages::{Inspect, Inspection},
        },
    },
    size::Size,
    supervisor::Supervision,
};
use actix::Addr;
use gorego_reapi::error::{Error, Result};
use std::time::Duration;
use tokio::{
    runtime::Handle,
    time::{MissedTickBehavior, interval},
};

/// Interval between checks that the owners are alive.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Maximum interval between two reports to the supervisor. The displayed status is at most this old.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The number of reports in the time in which the supervisor expects one. Two of them may be late before the supervisor
/// acts.
const REPORTS_PER_LIMIT: u32 = 3;

/// The actors that own the state of the server.
#[derive(Clone)]
pub(super) struct Owners {
    pub cas: Cas,
    pub assets: Assets,
    pub scheduler: Option<Addr<SchedulerActor>>,
}

impl Owners {
    /// Completes when an owner has died.
    pub(super) async fn died(&self) -> Error {
        let mut ticks = interval(WATCH_INTERVAL);
        loop {
            ticks.tick().await;
            if let Err(error) = self.check() {
                return error;
            }
        }
    }

    /// Fails if an owner has died. A panic in a handler closes the actor's address permanently.
    pub(super) fn check(&self) -> Result<()> {
        if !self.cas.actor().connected() {
            return Err(Error::internal("the store's actor died"));
        }
        if !self.assets.actor().connected() {
            return Err(Error::internal("the asset service's actor died"));
        }
        if self.scheduler.as_ref().is_some_and(|scheduler| !scheduler.connected()) {
            return Err(Error::internal("the scheduler's actor died"));
        }
        Ok(())
    }

    /// Reports to the supervisor as long as the owners and the threads that serve connections (`workers`) answer.
    pub(super) async fn report(self, supervision: Supervision, max_bytes: u64, workers: Handle) {
        report(supervision, async || self.answer(max_bytes, &workers).await).await;
    }

    /// The state of the owners in one line; `None` if one of them is gone. Waits until all have answered.
    async fn answer(&self, max_bytes: u64, workers: &Handle) -> Option<String> {
        let store = self.cas.actor().send(InspectStore).await.ok()?;
        let work = match &self.scheduler {
            Some(scheduler) => Some(scheduler.send(Inspect).await.ok()?),
            None => None,
        };
        // The asset service runs on the same thread as the store and the scheduler.
        workers.spawn(async {}).await.ok()?;
        Some(status(&store, work, max_bytes))
    }
}

/// Sends a report for each answer.
async fn report(supervision: Supervision, mut answer: impl AsyncFnMut() -> Option<String>) {
    let Supervision { supervisor, watchdog, .. } = supervision;
    if !supervisor.is_there() {
        return;
    }
    let every = watchdog.map_or(REPORT_INTERVAL, |limit| (limit / REPORTS_PER_LIMIT).min(REPORT_INTERVAL));
    // A limit of 0 means no limit, but an interval must not be 0.
    let mut ticks = interval(every.max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(status) = answer().await else { return };
        supervisor.alive(&status);
    }
}

/// The state of the server in one line.
fn status(store: &StoreInspection, work: Option<Inspection>, max_bytes: u64) -> String {
    let used = Size::from_bytes(store.totals.used).rounded();
    let stored = format!("{used} of {} stored", Size::from_bytes(max_bytes).rounded());
    match work {
        Some(work) => {
            format!("{} of {} slots busy, {} actions queued, {stored}", work.running, work.slots, work.queued)
        }
        None => format!("cache only, {stored}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{actors::cas::Totals, supervisor::Supervisor};
    use std::{cell::Cell, os::unix::net::UnixDatagram, sync::mpsc, thread};
    use tokio::{runtime::Builder, sync::oneshot};

    /// This is longer than some intervals between reports, and short enough for a test.
    const SILENCE: Duration = Duration::from_millis(200);

    fn next(reports: &UnixDatagram, patience: Duration) -> Option<String> {
        reports.set_read_timeout(Some(patience)).unwrap();
        let mut bytes = [0; 256];
        let length = reports.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
    }

    /// Reads the remaining reports from the socket. Returns whether no more arrive.
    fn falls_silent(reports: &UnixDatagram) -> bool {
        while next(reports, Duration::from_millis(1)).is_some() {}
        next(reports, SILENCE).is_none()
    }

    /// A real server cannot be stopped in the middle of a handler, so the loop is tested alone.
    #[test]
    fn a_stuck_thread_or_an_owner_that_does_not_answer_sends_no_sign_of_life() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let reports = UnixDatagram::bind(&path).unwrap();
        let supervision = Supervision {
            supervisor: Supervisor::connect(Some(path.into())),
            watchdog: Some(Duration::from_millis(60)),
            ..Supervision::default()
        };
        let (stick, stuck) = oneshot::channel::<mpsc::Receiver<()>>();
        let (silence, silent) = oneshot::channel::<()>();
        let actors = thread::spawn(move || {
            let silent = Cell::new(Some(silent));
            let is_silent = Cell::new(false);
            let answers = report(supervision, async || {
                if let Some(mut told) = silent.take() {
                    match told.try_recv() {
                        Ok(()) => is_silent.set(true),
                        Err(_) => silent.set(Some(told)),
                    }
                }
                if is_silent.get() {
                    std::future::pending::<()>().await;
                }
                Some("busy".into())
            });
            let blocked = async {
                let release = stuck.await.unwrap();
                release.recv().unwrap();
                std::future::pending::<()>().await;
            };
            let runtime = Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                tokio::select! { () = answers => {}, () = blocked => {}, () = tokio::time::sleep(20 * SILENCE) => {} }
            });
        });
        let patience = 10 * SILENCE;
        assert_eq!(next(&reports, patience).unwrap(), "WATCHDOG=1\nSTATUS=busy\n");
        let (release, released) = mpsc::channel();
        stick.send(released).unwrap();
        // The thread may be about to send one more report.
        let _ = next(&reports, SILENCE);
        assert!(falls_silent(&reports), "the thread is stuck");
        release.send(()).unwrap();
        assert!(next(&reports, patience).is_some(), "the thread goes on");
        silence.send(()).unwrap();
        let _ = next(&reports, SILENCE);
        assert!(falls_silent(&reports), "an owner does not answer");
        drop(actors);
    }

    #[test]
    fn the_status_says_how_busy_and_how_full_the_server_is() {
        let store = StoreInspection {
            totals: Totals { used: 31_000_000_000, ..Totals::default() },
            ..StoreInspection::default()
        };
        let work = Inspection { queued: 12, running: 2, slots: 8, ..Inspection::default() };
        assert_eq!(
            status(&store, Some(work), 50_000_000_000),
            "2 of 8 slots busy, 12 actions queued, 31 GB of 50 GB stored"
        );
        assert_eq!(status(&store, None, 50_000_000_000), "cache only, 31 GB of 50 GB stored");
    }
}
