//! [`ReadBody`]: the body of the response to a ByteStream.Read.
//!
//! tonic would copy the data of each message into a buffer of its own. Here the beginning of a message and the rest of
//! its data are two frames, and the rest is sent from the buffer into which it was read. Small messages are one frame.

use crate::grpc::ReadStream;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream::StreamExt as _;
use gorego_reapi::proto::bytestream::ReadResponse;
use http_body::{Body, Frame};
use prost::{Message as _, encoding::WireType, encoding::encode_key, encoding::encode_varint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tonic::Status;

/// Data of at most this size is copied behind the beginning of its message, which costs less than a frame of its own.
const COPIED_BYTES: usize = 8 * 1024;
/// The beginning of a message carries this much of larger data. A client may close a connection with too many small
/// frames: h2 counts those of less than 256 bytes.
const FIRST_BYTES: usize = 1024;
/// The number of the field `data` of a [`ReadResponse`].
const DATA_FIELD: u32 = 10;
/// A message begins with a flag and four bytes of its length. Then come the key of the field and the length of the
/// data, which has at most five bytes.
const HEAD_MAX_BYTES: usize = 5 + 1 + 5;

/// The messages of a Read and the status after them.
pub(super) struct ReadBody {
    /// `None` after the last message.
    messages: Option<ReadStream>,
    /// The rest of the data of a message whose beginning was sent.
    rest: Option<Bytes>,
}

impl ReadBody {
    pub(super) fn new(messages: ReadStream) -> Self {
        Self { messages: Some(messages), rest: None }
    }
}

impl Body for ReadBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(rest) = self.rest.take() {
            return Poll::Ready(Some(Ok(Frame::data(rest))));
        }
        let Some(messages) = &mut self.messages else { return Poll::Ready(None) };
        let status = match ready!(messages.poll_next_unpin(context)) {
            Some(Ok(message)) => {
                let (beginning, rest) = encode(message);
                self.rest = rest;
                return Poll::Ready(Some(Ok(Frame::data(beginning))));
            }
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.messages = None;
        Poll::Ready(Some(Ok(Frame::trailers(crate::grpc::answers::trailers(&status)))))
    }

    fn is_end_stream(&self) -> bool {
        self.messages.is_none() && self.rest.is_none()
    }
}

/// Encodes a message as its beginning and the rest of its data, which is `None` if the beginning carries all of it.
fn encode(message: ReadResponse) -> (Bytes, Option<Bytes>) {
    let length = message.encoded_len();
    let ReadResponse { mut data } = message;
    let size = data.len();
    let rest = (size > COPIED_BYTES).then(|| data.split_off(FIRST_BYTES));
    let mut beginning = BytesMut::with_capacity(HEAD_MAX_BYTES + data.len());
    beginning.put_u8(0);
    beginning.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    if size > 0 {
        encode_key(DATA_FIELD, WireType::LengthDelimited, &mut beginning);
        encode_varint(size as u64, &mut beginning);
    }
    beginning.put_slice(&data);
    (beginning.freeze(), rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use std::future::poll_fn;
    use tonic::Code;

    fn body(messages: Vec<Result<ReadResponse, Status>>) -> ReadBody {
        ReadBody::new(stream::iter(messages).boxed())
    }

    async fn frame(body: &mut ReadBody) -> Option<Frame<Bytes>> {
        poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await.map(Result::unwrap)
    }

    fn message(bytes: usize) -> ReadResponse {
        ReadResponse { data: (0..bytes).map(|at| at as u8).collect::<Vec<_>>().into() }
    }

    /// BS-14.
    #[tokio::test]
    async fn messages_of_all_sizes_are_encoded_as_by_prost() {
        let sizes = [0, 1, 122, 123, 128, COPIED_BYTES, COPIED_BYTES + 1, 16_384, 131_072, 3 << 20];
        for size in sizes {
            let mut body = body(vec![Ok(message(size)), Ok(message(1))]);
            let (mut sent, mut trailers) = (Vec::new(), None);
            while let Some(frame) = frame(&mut body).await {
                match frame.into_data() {
                    Ok(data) => sent.extend_from_slice(&data),
                    Err(last) => trailers = last.into_trailers().ok(),
                }
            }
            let mut expected = Vec::new();
            for message in [message(size), message(1)] {
                expected.put_u8(0);
                expected.put_u32(message.encoded_len() as u32);
                message.encode(&mut expected).unwrap();
            }
            assert!(sent == expected, "{size}");
            assert_eq!(trailers.unwrap()["grpc-status"], "0");
        }
    }

    #[tokio::test]
    async fn large_data_is_sent_without_a_copy_and_in_no_small_frame() {
        let large = message(COPIED_BYTES + 1);
        let mut body = body(vec![Ok(large.clone())]);
        let frames = [frame(&mut body).await, frame(&mut body).await];
        let [beginning, rest] = frames.map(|frame| frame.unwrap().into_data().unwrap());
        assert!((FIRST_BYTES..=FIRST_BYTES + HEAD_MAX_BYTES).contains(&beginning.len()));
        assert_eq!(rest.as_ptr(), large.data[FIRST_BYTES..].as_ptr());
        assert_eq!(rest.len(), large.data.len() - FIRST_BYTES);
    }

    /// BS-16.
    #[tokio::test]
    async fn an_error_ends_the_body_with_its_status() {
        let mut body = body(vec![Ok(message(3)), Err(Status::data_loss("short")), Ok(message(3))]);
        assert!(frame(&mut body).await.unwrap().is_data() && !body.is_end_stream());
        let trailers = frame(&mut body).await.unwrap().into_trailers().unwrap();
        assert_eq!(Status::from_header_map(&trailers).unwrap().code(), Code::DataLoss);
        assert!(body.is_end_stream() && frame(&mut body).await.is_none());
    }
}
