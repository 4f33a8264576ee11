//! The stream of one operation: the answer to Execute and WaitExecution.
//!
//! It follows the operation's watch cell. It sends the current snapshot at once, then each change, repeats the snapshot
//! while nothing changes, and ends right after COMPLETED. A repeated snapshot of a waiting operation says why it waits.
//! If the cell changes faster than the client reads, intermediate states are skipped, but never the last one. The
//! stream ends with OK only after `done` (EXE-10). If the scheduler stops before, it ends with UNAVAILABLE, which every
//! client retries.

use super::{
    Edge,
    ask::Scheduler,
    convert::{self, Detail},
    inline,
};
use crate::actors::scheduler::{
    messages::Explain,
    operation::{OperationInfo, Snapshot, Stage, Subscription},
};
use crate::call::Call;
use futures::stream::{self, Stream};
use gorego_reapi::{error::Error, proto::longrunning::Operation};
use std::{sync::Arc, time::Duration};
use tonic::Status;

/// Interval after which an unchanged state is sent again, because some proxies and clients close silent streams
/// (EXE-11).
pub(crate) const RESEND_INTERVAL: Duration = Duration::from_secs(30);

/// Delay after which an operation that still waits is sent again with the reason. This is short enough for a person who
/// watches, and long enough that most operations of a burst are running by then and need no explanation.
pub(crate) const EXPLAIN_AFTER: Duration = Duration::from_secs(1);

/// Adds the reason why an operation waits to its snapshot.
pub(crate) async fn explain(scheduler: &Scheduler, info: &OperationInfo, snapshot: &mut Snapshot) {
    if snapshot.stage == Stage::Queued {
        let question = Explain { instance: info.instance.clone(), id: info.id };
        snapshot.queue = scheduler.explain(question).await;
    }
}

/// Makes the Operation message of a snapshot, with the contents that this client wants inlined.
///
/// # Errors
/// `Exhausted` when there is no room for its result for too long.
pub(crate) async fn encode(
    edge: &Edge,
    info: &OperationInfo,
    snapshot: &Snapshot,
    detail: Detail,
    call: &Call,
) -> Result<Operation, Error> {
    let cas = &edge.cas;
    edge.tell_logs(call, info, snapshot);
    let result = match snapshot.outcome.as_ref().and_then(|outcome| outcome.result.as_ref()) {
        Some(result) => {
            let function = info.action.function();
            Some(inline::prepare(cas, &info.instance, function, &info.inline, result, call).await?)
        }
        None => None,
    };
    Ok(convert::operation(info, snapshot, result, detail))
}

/// The messages of an operation, from now to its end. The first one is sent without another question to the scheduler.
pub(crate) fn follow(
    edge: Arc<Edge>,
    scheduler: Scheduler,
    subscription: Subscription,
    call: Call,
) -> impl Stream<Item = Result<Operation, Status>> + Send {
    let info = subscription.info.clone();
    snapshots(subscription, move |mut snapshot, is_first| {
        let (edge, scheduler, info, call) = (edge.clone(), scheduler.clone(), info.clone(), call.clone());
        async move {
            if !is_first {
                explain(&scheduler, &info, &mut snapshot).await;
            }
            encode(&edge, &info, &snapshot, Detail::Short, &call).await
        }
    })
}

/// The position of a stream.
enum Position {
    /// Nothing was sent yet.
    Start,
    /// Only the first message was sent.
    Started,
    /// More messages were sent.
    Following,
    /// The last message was sent.
    End,
}

/// Encodes the snapshots of a subscription, at the times that the top of this file describes. The stream holds the
/// subscription, so that its operation counts as waited for.
fn snapshots<T, F>(
    subscription: Subscription,
    encode: impl Fn(Snapshot, bool) -> F + Send,
) -> impl Stream<Item = Result<T, Status>> + Send
where
    T: Send,
    F: Future<Output = Result<T, Error>> + Send,
{
    stream::unfold(
        (subscription, encode, Position::Start),
        |(mut subscription, encode, position)| async move {
            let cell = &mut subscription.snapshots;
            let patience = match position {
                Position::Started if cell.borrow().stage == Stage::Queued => EXPLAIN_AFTER,
                _ => RESEND_INTERVAL,
            };
            match position {
                Position::End => return None,
                Position::Start => {}
                // On a timeout, the unchanged state is sent.
                Position::Started | Position::Following => {
                    match tokio::time::timeout(patience, cell.changed()).await {
                        Ok(Ok(())) | Err(_) => {}
                        Ok(Err(_)) => {
                            let lost = Error::Unavailable(format!(
                                "the server stopped following operation {}; ask for it again, or run the action again",
                                subscription.info.name()
                            ));
                            return Some((Err(lost.into()), (subscription, encode, Position::End)));
                        }
                    }
                }
            }
            let snapshot = cell.borrow_and_update().clone();
            let next = match position {
                _ if snapshot.outcome.is_some() => Position::End,
                Position::Start => Position::Started,
                _ => Position::Following,
            };
            match encode(snapshot, matches!(position, Position::Start)).await {
                Ok(message) => Some((Ok(message), (subscription, encode, next))),
                Err(error) => Some((Err(error.into()), (subscription, encode, Position::End))),
            }
        },
    )
}

/// The state of an operation when it ends or when `limit` passes, whichever is first (OPS-05).
///
/// # Errors
/// `Unavailable` when the scheduler stops before.
pub(crate) async fn settle(subscription: &mut Subscription, limit: Duration) -> Result<Snapshot, Error> {
    let ended = subscription.snapshots.wait_for(|snapshot| snapshot.outcome.is_some());
    if let Ok(Err(_)) = tokio::time::timeout(limit, ended).await {
        return Err(Error::Unavailable("the scheduler has stopped; the server is going down".into()));
    }
    let snapshot = subscription.snapshots.borrow();
    Ok(snapshot.clone())
}

/// The current state of a subscription.
pub(crate) fn current(subscription: &Subscription) -> (Arc<OperationInfo>, Snapshot) {
    (subscription.info.clone(), subscription.snapshots.borrow().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::{
            scheduler::operation::{ClientInfo, Inline, OperationId, Outcome, Stage},
            worker::messages::RunStage,
        },
        instance::Instances,
    };
    use futures::StreamExt as _;
    use gorego_reapi::{
        digest::{Digest, DigestFunction},
        proto::reapi,
    };
    use std::time::SystemTime;
    use tokio::{sync::watch, time::Instant};

    fn queued() -> Snapshot {
        Snapshot::queued(SystemTime::UNIX_EPOCH)
    }

    fn executing() -> Snapshot {
        Snapshot {
            stage: Stage::Executing,
            run_stage: Some((RunStage::Running, SystemTime::UNIX_EPOCH)),
            ..queued()
        }
    }

    fn completed() -> Snapshot {
        let outcome = Outcome {
            result: Some(reapi::ActionResult { exit_code: 7, ..Default::default() }.into()),
            cached: false,
            error: None,
            message: String::new(),
            server_logs: Vec::new(),
        };
        Snapshot { stage: Stage::Completed, outcome: Some(Arc::new(outcome)), ..queued() }
    }

    fn operation(snapshot: Snapshot) -> (watch::Sender<Snapshot>, Subscription) {
        let info = OperationInfo {
            id: OperationId::random(Default::default()),
            instance: Instances::new([""]).unwrap().get("").unwrap(),
            action: Digest::empty(DigestFunction::Sha256),
            inline: Inline::default(),
            client: ClientInfo::default(),
            principal: Default::default(),
            peer: Default::default(),
        };
        let (sender, snapshots) = watch::channel(snapshot);
        (sender, Subscription { info: Arc::new(info), snapshots })
    }

    fn stages(subscription: Subscription) -> stream::BoxStream<'static, Result<Stage, Status>> {
        snapshots(subscription, |snapshot, _| async move { Ok(snapshot.stage) }).boxed()
    }

    /// EXE-01, EXE-05, EXE-12.
    #[tokio::test(start_paused = true)]
    async fn the_current_state_comes_at_once_each_change_after_and_the_end_after_completed() {
        let (sender, subscription) = operation(queued());
        let mut stream = stages(subscription);
        assert_eq!(stream.next().await.unwrap().unwrap(), Stage::Queued);
        sender.send_replace(executing());
        assert_eq!(stream.next().await.unwrap().unwrap(), Stage::Executing);
        sender.send_replace(completed());
        assert_eq!(stream.next().await.unwrap().unwrap(), Stage::Completed);
        assert!(stream.next().await.is_none());
    }

    /// EXE-12.
    #[tokio::test(start_paused = true)]
    async fn a_late_comer_gets_the_final_message_first_and_only_that() {
        let (sender, subscription) = operation(queued());
        sender.send_replace(completed());
        drop(sender);
        let messages: Vec<_> = stages(subscription).map(Result::unwrap).collect().await;
        assert_eq!(messages, [Stage::Completed]);
    }

    /// A slow reader may miss intermediate states, but never the last one.
    #[tokio::test(start_paused = true)]
    async fn the_last_state_is_seen_even_if_the_scheduler_went_away_right_after_it() {
        let (sender, subscription) = operation(queued());
        let mut stream = stages(subscription);
        stream.next().await.unwrap().unwrap();
        sender.send_replace(executing());
        sender.send_replace(completed());
        drop(sender);
        assert_eq!(stream.next().await.unwrap().unwrap(), Stage::Completed);
        assert!(stream.next().await.is_none());
    }

    /// EXE-11.
    #[tokio::test(start_paused = true)]
    async fn an_unchanged_state_is_sent_again_before_anybody_loses_patience() {
        let (_sender, subscription) = operation(executing());
        let mut stream = stages(subscription);
        stream.next().await.unwrap().unwrap();
        for _ in 0..100 {
            let before = Instant::now();
            assert_eq!(stream.next().await.unwrap().unwrap(), Stage::Executing);
            assert_eq!(before.elapsed(), RESEND_INTERVAL);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_room_for_its_answer_ends_with_that_error() {
        let (_sender, subscription) = operation(completed());
        let no_room = || Error::Exhausted { message: "no room".into(), retry_after: None };
        let mut stream = snapshots(subscription, |_, _| async move { Err::<(), _>(no_room()) }).boxed();
        let status = stream.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(stream.next().await.is_none());
    }

    /// EXE-10.
    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_scheduler_goes_away_ends_unavailable_and_never_ok() {
        let (sender, subscription) = operation(executing());
        let mut stream = stages(subscription);
        stream.next().await.unwrap().unwrap();
        drop(sender);
        let status = stream.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(stream.next().await.is_none());
    }

    /// The operation counts as waited for exactly as long as its stream exists.
    #[tokio::test(start_paused = true)]
    async fn dropping_the_stream_gives_the_subscription_back() {
        let (sender, subscription) = operation(executing());
        let mut stream = stages(subscription);
        stream.next().await.unwrap().unwrap();
        assert_eq!(sender.receiver_count(), 1);
        drop(stream);
        assert_eq!(sender.receiver_count(), 0);
    }

    /// OPS-05.
    #[tokio::test(start_paused = true)]
    async fn waiting_for_an_operation_ends_with_it_or_with_the_time_limit() {
        let (sender, mut subscription) = operation(executing());
        let snapshot = settle(&mut subscription, Duration::from_secs(1)).await.unwrap();
        assert_eq!(snapshot.stage, Stage::Executing);
        sender.send_replace(completed());
        let snapshot = settle(&mut subscription, Duration::from_secs(1)).await.unwrap();
        assert_eq!(snapshot.stage, Stage::Completed);

        let (sender, mut subscription) = operation(executing());
        drop(sender);
        let lost = settle(&mut subscription, Duration::from_secs(1)).await;
        assert!(matches!(lost, Err(Error::Unavailable(_))));
    }
}
