//! Tests with a scheduler that answers late: scrapes are not delayed, and it is asked only once.

use super::*;
use crate::actors::scheduler::slots::{PoolId, PoolStatus};
use actix::{Actor, Context, Handler, ResponseFuture};
use futures::future::{pending, ready};
use std::sync::atomic::AtomicUsize;

/// A scheduler that answers the first requests and then no more.
struct Late {
    answers: usize,
    asked: Arc<AtomicUsize>,
    state: PoolState,
}

impl Actor for Late {
    type Context = Context<Self>;
}

impl Handler<Measure> for Late {
    type Result = ResponseFuture<Vec<PoolMeasurement>>;

    fn handle(&mut self, _: Measure, _: &mut Self::Context) -> Self::Result {
        if self.asked.fetch_add(1, SeqCst) >= self.answers {
            return Box::pin(pending());
        }
        Box::pin(ready(vec![pool(self.state)]))
    }
}

/// A pool with one slot in each state and two waiting actions.
fn pool(state: PoolState) -> PoolMeasurement {
    let status =
        PoolStatus { id: PoolId::default(), name: "linux".into(), state, slots: 3, busy: 2, stuck: 1 };
    PoolMeasurement { status, waiting: 2, oldest: None, desired: 3 }
}

fn watch_of(answers: usize, state: PoolState) -> (PoolWatch, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let late = Late { answers, asked: asked.clone(), state };
    (PoolWatch::new(late.start().recipient()), asked)
}

#[actix::test]
async fn a_scheduler_that_does_not_answer_delays_no_scrape_and_is_asked_once() {
    let (watch, asked) = watch_of(1, PoolState::Open);
    let seen = watch.look().await.expect("the first question is answered");
    assert!(can_execute(Some(&seen)));
    for _ in 0..5 {
        let start = std::time::Instant::now();
        let late = watch.look().await.expect("the last answer is kept");
        assert!(start.elapsed() < POOLS_WAIT * 10, "{:?}", start.elapsed());
        assert_eq!(late.at, seen.at);
    }
    assert_eq!(asked.load(SeqCst), 2, "one question is under way at a time");
    let old = PoolSight { at: Instant::now() - POOLS_MAX_AGE * 2, ..seen };
    assert!(!can_execute(Some(&old)), "a scheduler that has been silent for long is not ready");
    assert!(pool_readings(old).age > POOLS_MAX_AGE);
}

#[actix::test]
async fn a_pool_without_workers_executes_nothing_and_its_slots_are_out_of_service() {
    assert!(!can_execute(None), "nothing is known before the first answer");
    for (state, executes, free, out_of_service) in
        [(PoolState::Open, true, 1, 1), (PoolState::Draining, true, 0, 2), (PoolState::Closed, false, 0, 2)]
    {
        let (watch, _) = watch_of(1, state);
        let seen = watch.look().await.unwrap();
        assert_eq!(can_execute(Some(&seen)), executes, "{state:?}");
        let readings = pool_readings(seen).pools;
        let expected = PoolReading {
            name: "linux".into(),
            free,
            busy: 1,
            out_of_service,
            waiting: 2,
            oldest: None,
            desired: 3,
        };
        assert_eq!(readings, [expected], "{state:?}");
    }
}
