//! Tests of the memory that unfinished requests hold, and of their time limits.

use super::*;
use futures::{FutureExt as _, StreamExt as _, stream};
use proptest::prelude::*;
use std::future::poll_fn;
use tonic::body::Body as TonicBody;

fn message(length: usize) -> Vec<u8> {
    let prefix = [0].into_iter().chain((length as u32).to_be_bytes());
    prefix.chain(std::iter::repeat_n(7, length)).collect()
}

proptest! {
    #[test]
    fn what_is_held_is_the_unfinished_message_however_it_is_cut(
        lengths in proptest::collection::vec(0usize..50, 0..8), rest in 1usize..40, piece in 1usize..60,
    ) {
        let mut all: Vec<u8> = lengths.iter().copied().flat_map(message).collect();
        all.extend(&message(rest)[..rest]);
        let mut unfinished = PartialMessage::default();
        let mut ends = Vec::new();
        for mut piece in all.chunks(piece) {
            while !piece.is_empty() {
                let (taken, finished) = unfinished.take(piece);
                ends.extend(finished.map(|message| message.bytes as usize));
                piece = &piece[taken..];
            }
        }
        prop_assert_eq!(ends, lengths);
        prop_assert_eq!(unfinished.bytes, rest.saturating_sub(PREFIX_BYTES) as u64);
        prop_assert!(unfinished.is_begun());
        let end = &message(rest)[rest..];
        prop_assert_eq!(unfinished.take(end), (end.len(), Some(CompleteMessage { bytes: rest as u64, is_compressed: false })));
        prop_assert!(!unfinished.is_begun() && unfinished.bytes == 0);
    }
}

/// A body that sends these bytes and then nothing, and does not end.
fn stalled(bytes: Vec<u8>, budgets: &Budgets) -> IncomingBody<TonicBody> {
    watched(stream::iter([Ok::<_, Status>(Bytes::from(bytes))]).chain(stream::pending()), budgets)
}

fn watched(
    pieces: impl futures::Stream<Item = Result<Bytes, Status>> + Send + 'static,
    budgets: &Budgets,
) -> IncomingBody<TonicBody> {
    let body = TonicBody::new(axum::body::Body::from_stream(pieces));
    let kind = RequestKind { is_stream: false, has_lists: true, is_gzip: false };
    IncomingBody::new(body, Caller::default(), budgets.clone(), Arc::default(), kind)
}

async fn next(body: &mut IncomingBody<TonicBody>) -> Result<Frame<Bytes>, Status> {
    poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_sender_that_stops_inside_of_a_message_is_not_waited_for() {
    let budgets = IntakeLayer::default().budgets;
    let mut body = stalled(message(10_000)[..5_000].to_vec(), &budgets);
    next(&mut body).await.unwrap();
    assert_eq!(budgets.unfinished.held(), 5_000);
    let begin = Instant::now();
    assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    assert_eq!(begin.elapsed().as_secs(), SILENCE_LIMIT.as_secs());
    drop(body);
    assert_eq!(budgets.unfinished.held(), 0);
    // A client that opens a stream and sends nothing is not waited for.
    let nothing = stream::pending::<Result<Bytes, Status>>();
    let mut body = watched(nothing, &budgets);
    assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    // A client that does not end a request of one message is not waited for.
    let mut body = stalled(message(10_000), &budgets);
    next(&mut body).await.unwrap();
    assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
    assert_eq!(budgets.unfinished.held(), 10_005, "it is held until its end");
    drop(body);
    // Between two messages of a stream, a client may be silent. The handler limits these pauses.
    let mut body = stalled(message(10_000), &budgets);
    body.kind.is_stream = true;
    next(&mut body).await.unwrap();
    assert!(tokio::time::timeout(10 * SILENCE_LIMIT, next(&mut body)).await.is_err());
    assert_eq!(budgets.unfinished.held(), 10_000, "the buffer of a silent stream");
}

#[tokio::test]
async fn a_second_message_is_refused_where_a_method_has_one() {
    let budgets = Budgets::default();
    for second in [message(7), message(0), vec![0]] {
        let mut body = stalled([message(100), second].concat(), &budgets);
        assert_eq!(next(&mut body).await.unwrap().into_data().unwrap().len(), 100 + PREFIX_BYTES);
        assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}

#[tokio::test]
async fn each_compressed_message_of_a_stream_takes_memory_of_its_own_until_the_handler_asks_for_more() {
    let budgets = Budgets::default();
    let mut compressed = message(5_000);
    compressed[0] = 1;
    let mut body = stalled([compressed.clone(), compressed, message(5)].concat(), &budgets);
    (body.kind.is_stream, body.kind.has_lists) = (true, false);
    for _ in 0..2 {
        assert_eq!(next(&mut body).await.unwrap().into_data().unwrap().len(), 5_000 + PREFIX_BYTES);
        assert_eq!(budgets.decoded.held(), 5_000 + 2 * REQUEST_MAX_BYTES as u64);
        assert_eq!(budgets.unfinished.held(), 5_000 + PREFIX_BYTES as u64);
    }
    assert_eq!(next(&mut body).await.unwrap().into_data().unwrap().len(), 5 + PREFIX_BYTES);
    assert_eq!(budgets.decoded.held(), 0);
}

#[test]
fn no_request_takes_more_memory_than_is_kept_free_and_small_gzip_takes_little() {
    let kind = RequestKind { is_stream: false, has_lists: true, is_gzip: true };
    let memory =
        |kind: RequestKind, bytes, is_compressed| kind.memory(CompleteMessage { bytes, is_compressed });
    for bytes in [UNCOUNTED_BYTES as u64 + 1, 1 << 20, u32::MAX.into()] {
        for (is_gzip, is_compressed) in [(false, false), (false, true), (true, true)] {
            assert!(
                memory(RequestKind { is_gzip, ..kind }, bytes, is_compressed).unwrap()
                    <= LARGEST_REQUEST_MEMORY
            );
        }
    }
    assert!(memory(kind, 20, true).unwrap() < 10 * 1024 * 1024);
    assert_eq!(memory(kind, UNCOUNTED_BYTES as u64, false), None);
}

#[tokio::test]
async fn what_all_hold_together_is_bounded() {
    let budgets = IntakeLayer::default().budgets;
    let others = budgets.unfinished.take(Caller::default(), UNFINISHED.connection - 10).unwrap();
    let mut body = stalled(message(10_000)[..5_000].to_vec(), &budgets);
    assert_eq!(next(&mut body).await.unwrap_err().code(), tonic::Code::ResourceExhausted);
    drop(body);
    assert!(next(&mut stalled(message(1), &budgets)).await.is_ok());
    assert_eq!(budgets.unfinished.held(), others.amount());
}

#[tokio::test]
async fn a_large_message_is_handed_on_when_there_is_room_to_decode_it() {
    let budgets = IntakeLayer::default().budgets;
    let others = budgets.decoded.take(Caller::default(), DECODED.connection).unwrap();
    let mut body = stalled(message(UNCOUNTED_BYTES + 1), &budgets);
    assert!(next(&mut body).now_or_never().is_none(), "it waits");
    drop(others);
    assert_eq!(next(&mut body).await.unwrap().into_data().unwrap().len(), UNCOUNTED_BYTES + 1 + PREFIX_BYTES);
    assert!(budgets.decoded.held() > 0, "the call holds it");
    drop(body);
    assert_eq!(budgets.decoded.held(), 0);
    let mut small = stalled(message(UNCOUNTED_BYTES), &budgets);
    assert!(next(&mut small).now_or_never().unwrap().is_ok() && budgets.decoded.held() == 0);
}
