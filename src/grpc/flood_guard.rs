//! [`FloodGuard`]: limits on the behaviour of a connection, based on the frames in both directions. Pure.
//!
//! Opening and cancelling a stream costs a client nothing, but costs this server the work of a call (CVE-2023-44487).
//! The HTTP/2 library bounds how many cancelled streams are pending, but not their rate. So each cancelled stream takes
//! a token from a bucket that finished streams refill, and so does each stream that this server has to reset because of
//! its client's frames (CVE-2025-8671). Frames without payload or effect (PING, SETTINGS, empty DATA) take tokens from
//! another bucket, which answers refill.
//!
//! A stray frame is one of a stream that is not open. The HTTP/2 library answers many of them with an RST_STREAM, and
//! keeps a stream in memory for each until it is written, without a bound. So stray frames are counted, and a client
//! that does not read its socket may send only a few of them ([`super::connection`]). Small ones are noise
//! ([`STRAY_MIN_BYTES`]).
//!
//! It also counts the bytes that the client has sent on each open stream, for [`crate::connections::ahead`].

use super::{
    STREAM_WINDOW_BYTES,
    frames::{Frame, FrameReader, kind},
};
use crate::connections::{
    STREAMS_MAX, ahead,
    rate::{Bucket, Rate},
};
use std::{collections::HashMap, mem};

/// Rate of cancelled streams on a connection that finishes none. A failed build cancels all its running actions.
pub(super) const RESETS: Rate = Rate { burst: 5_000, per_second: 200 };
/// Rate of frames without payload or effect, in units of a WINDOW_UPDATE. While clients download, they send pings and
/// small window updates, so each frame of an answer pays for [`UPDATES_PER_DATA`].
pub(super) const NOISE: Rate = Rate { burst: 640_000, per_second: 64_000 };
/// The cost of a PING, SETTINGS, PRIORITY, an empty frame, or a frame of an unknown type. Each needs an answer or a
/// lookup.
const NOISE_COST: u64 = 64;
/// Smaller stray frames are noise. An upload that is answered before its end leaves many frames on their way, but these
/// are large.
const STRAY_MIN_BYTES: u32 = 1024;
/// The credit for a frame of an answer.
const UPDATES_PER_DATA: u64 = 2 * NOISE_COST;

/// Counts the frames of a connection and limits its behaviour.
#[derive(Debug)]
pub(super) struct FloodGuard {
    inward: FrameReader,
    outward: FrameReader,
    resets: Bucket,
    noise: Bucket,
    /// Number of streams that were answered since the last resets.
    finished: u64,
    /// Number of unanswered streams that this server has reset since the client sent the last bytes.
    provoked: u64,
    last_stream: u32,
    open: OpenStreams,
    /// Number of stray frames since [`FloodGuard::forget_strays`].
    strays: usize,
    /// The stream of the last DATA frame, if that was large. Its next frame may be the rest of a message.
    last_large: Option<u32>,
}

/// The bytes that the client has sent on open streams. The HTTP/2 library discards data of other streams.
#[derive(Debug, Default)]
struct OpenStreams {
    streams: HashMap<u32, SentAhead>,
    /// Upper bound of the bytes of all streams that no handler has taken.
    most: u64,
}

#[derive(Debug, Default)]
struct SentAhead {
    bytes: u64,
    /// The overhead of small frames.
    surplus: u64,
}

impl SentAhead {
    /// Upper bound of the bytes that no handler has taken.
    fn most(&self) -> u64 {
        self.bytes.min(STREAM_WINDOW_BYTES.into()) + self.surplus
    }
}

impl OpenStreams {
    /// The library refuses further streams, so they are not counted. Returns whether the stream is counted.
    fn open(&mut self, stream: u32) -> bool {
        let has_room = self.streams.len() < STREAMS_MAX as usize;
        if has_room {
            self.streams.entry(stream).or_default();
        }
        has_room
    }

    fn has(&self, stream: u32) -> bool {
        self.streams.contains_key(&stream)
    }

    /// Counts a DATA frame and returns its cost; `None` if its stream is not open.
    fn receive(&mut self, frame: Frame) -> Option<u64> {
        let sent = self.streams.get_mut(&frame.stream)?;
        let (before, bytes) = (sent.most(), u64::from(frame.length));
        let cost = ahead::cost(bytes);
        sent.bytes += bytes;
        sent.surplus += cost - bytes;
        self.most += sent.most() - before;
        Some(cost)
    }

    fn close(&mut self, stream: u32) -> bool {
        let closed = self.streams.remove(&stream);
        self.most -= closed.as_ref().map_or(0, SentAhead::most);
        closed.is_some()
    }
}

/// The effect of received bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Received {
    pub frames: usize,
    /// Number of cancelled streams, and of streams that this server had to reset before.
    pub resets: u64,
    /// Number of streams that were answered since the last resets; 0 if there are no resets now.
    pub finished: u64,
    /// Whether the head of a request is incomplete, if that has changed.
    pub head_is_open: Option<bool>,
    /// Whether the connection cancelled too many streams.
    pub resets_too_much: bool,
    /// Whether the connection sent too many frames without payload or effect.
    pub is_noise: bool,
    /// Cost of the received parts of requests, until handlers take them.
    pub ahead: u64,
    /// Whether a stream was closed.
    pub has_closed: bool,
}

/// The effect of sent bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Whether a DATA frame began.
    pub has_data: bool,
    /// Whether a stream was closed.
    pub has_closed: bool,
}

impl FloodGuard {
    pub(super) fn new(now_ms: u64) -> Self {
        Self {
            inward: FrameReader::of_client(),
            outward: FrameReader::of_server(),
            resets: Bucket::new(RESETS, now_ms),
            noise: Bucket::new(NOISE, now_ms),
            finished: 0,
            provoked: 0,
            last_stream: 0,
            open: OpenStreams::default(),
            strays: 0,
            last_large: None,
        }
    }

    /// Processes bytes that the client sent.
    pub(super) fn receive(&mut self, bytes: &[u8], now_ms: u64) -> Received {
        let mut received = Received { resets: mem::take(&mut self.provoked), ..Received::default() };
        let (mut noise, mut last) = (0u64, self.last_stream);
        self.inward.take(bytes, |frame| {
            received.frames += 1;
            received.resets += u64::from(frame.kind == kind::RST_STREAM);
            let (mut is_stray, mut is_rest) = (false, false);
            match frame.kind {
                kind::HEADERS => {
                    is_stray = if frame.stream > last {
                        last = frame.stream;
                        !self.open.open(last)
                    } else {
                        !self.open.has(frame.stream)
                    };
                    received.head_is_open = Some(!frame.ends_headers());
                }
                kind::DATA => {
                    match self.open.receive(frame) {
                        Some(cost) => received.ahead += cost,
                        None => is_stray = true,
                    }
                    let is_large = frame.length >= STRAY_MIN_BYTES;
                    is_rest = self.last_large == Some(frame.stream);
                    self.last_large = is_large.then_some(frame.stream);
                }
                kind::PRIORITY => is_stray = !self.open.has(frame.stream),
                kind::RST_STREAM => received.has_closed |= self.open.close(frame.stream),
                // The HTTP/2 library walks over all streams to move their windows.
                kind::SETTINGS => noise += self.open.streams.len() as u64,
                kind::CONTINUATION if frame.ends_headers() => received.head_is_open = Some(false),
                _ => {}
            }
            self.strays += usize::from(is_stray);
            noise += cost(frame, is_stray && !is_rest);
        });
        self.last_stream = last;
        if received.resets > 0 {
            received.finished = mem::take(&mut self.finished);
            self.resets.earn(received.finished);
            received.resets_too_much = !self.resets.take(received.resets, now_ms);
        }
        received.is_noise = noise > 0 && !self.noise.take(noise, now_ms);
        received
    }

    /// Processes bytes that this server sent, and adds their effect to `sent`. An RST_STREAM before the end of an
    /// answer is caused by frames of the client, because a handler that fails sends a status. One after the end only
    /// stops an upload.
    pub(super) fn send(&mut self, bytes: &[u8], sent: &mut Sent) {
        let (mut finished, mut heads, mut data) = (0, 0, 0);
        self.outward.take(bytes, |frame| {
            finished += u64::from(frame.ends_stream());
            heads += u64::from(frame.kind == kind::HEADERS);
            data += u64::from(frame.kind == kind::DATA);
            let is_reset = frame.kind == kind::RST_STREAM;
            if frame.ends_stream() || is_reset {
                let was_open = self.open.close(frame.stream);
                self.provoked += u64::from(is_reset && was_open);
                sent.has_closed |= was_open;
            }
        });
        self.finished += finished;
        if heads + data > 0 {
            self.noise.earn((heads + data) * UPDATES_PER_DATA);
        }
        sent.has_data |= data > 0;
    }

    /// Number of streams that the client has opened and that were neither answered nor cancelled.
    pub(super) fn open_streams(&self) -> usize {
        self.open.streams.len()
    }

    /// Number of frames of other streams that the client has sent since [`FloodGuard::forget_strays`].
    pub(super) fn strays(&self) -> usize {
        self.strays
    }

    /// Forgets the stray frames, because the answers to them are being written.
    pub(super) fn forget_strays(&mut self) {
        self.strays = 0;
    }

    /// Upper bound of the bytes of open streams that no handler has taken.
    pub(super) fn ahead_at_most(&self) -> u64 {
        self.open.most
    }

    /// A GOAWAY frame with ENHANCE_YOUR_CALM, if one can be sent at this point.
    pub(super) fn goaway(&self) -> Option<[u8; 17]> {
        const ENHANCE_YOUR_CALM: u8 = 0xb;
        let [a, b, c, d] = self.last_stream.to_be_bytes();
        let frame = [0, 0, 8, kind::GOAWAY, 0, 0, 0, 0, 0, a, b, c, d, 0, 0, 0, ENHANCE_YOUR_CALM];
        self.outward.is_between_frames().then_some(frame)
    }
}

fn cost(frame: Frame, is_stray: bool) -> u64 {
    match frame.kind {
        kind::HEADERS | kind::DATA if is_stray && frame.length < STRAY_MIN_BYTES => NOISE_COST,
        // These are limited by streams and resets.
        kind::HEADERS | kind::RST_STREAM => 0,
        kind::DATA if frame.length > 0 || frame.ends_stream() => 0,
        kind::CONTINUATION if frame.length > 0 || frame.ends_headers() => 0,
        kind::WINDOW_UPDATE => 1,
        _ => NOISE_COST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut bytes = vec![0, 0, length, kind, flags, 0, 0, 0, 5];
        bytes.extend(std::iter::repeat_n(0, length.into()));
        bytes
    }

    fn connected() -> FloodGuard {
        let mut flood_guard = FloodGuard::new(0);
        flood_guard.receive(&[b'x'; 24], 0);
        flood_guard
    }

    #[test]
    fn streams_may_be_cancelled_as_many_as_were_finished_and_a_burst_besides() {
        let reset = frame(kind::RST_STREAM, 0, 4);
        let mut flood_guard = connected();
        for _ in 0..RESETS.burst {
            assert!(!flood_guard.receive(&reset, 0).resets_too_much);
        }
        assert!(flood_guard.receive(&reset, 0).resets_too_much);
        flood_guard.send(&frame(kind::HEADERS, 0x5, 10), &mut Sent::default());
        let received = flood_guard.receive(&reset, 0);
        assert_eq!((received.finished, received.resets_too_much), (1, false));
        assert!(flood_guard.receive(&reset, 0).resets_too_much);
        assert!(!flood_guard.receive(&reset, 1_000).resets_too_much, "it comes back with time");
    }

    #[test]
    fn streams_that_the_server_has_to_reset_count_as_cancelled_unless_they_were_answered() {
        let (head, reset) = (frame(kind::HEADERS, 0x4, 3), frame(kind::RST_STREAM, 0, 4));
        let mut flood_guard = connected();
        flood_guard.receive(&head, 0);
        flood_guard.send(&[frame(kind::HEADERS, 0x5, 3), reset.clone()].concat(), &mut Sent::default());
        assert_eq!(flood_guard.receive(&[], 0).resets, 0, "it was answered");
        let open = |flood_guard: &mut FloodGuard, at: u32| {
            let mut head = head.clone();
            head[5..9].copy_from_slice(&(2 * at + 7).to_be_bytes());
            flood_guard.receive(&head, 0)
        };
        for at in 0..=RESETS.burst as u32 {
            assert!(!open(&mut flood_guard, at).resets_too_much);
            let mut reset = reset.clone();
            reset[5..9].copy_from_slice(&(2 * at + 7).to_be_bytes());
            flood_guard.send(&reset.repeat(2), &mut Sent::default());
        }
        assert!(open(&mut flood_guard, 1 << 20).resets_too_much);
    }

    #[test]
    fn finished_streams_are_credited_whatever_comes_before_the_next_resets() {
        let (reset, window) = (frame(kind::RST_STREAM, 0, 4), frame(kind::WINDOW_UPDATE, 0, 4));
        let mut flood_guard = connected();
        for _ in 0..3 {
            flood_guard.send(&frame(kind::HEADERS, 0x5, 10), &mut Sent::default());
            assert_eq!(flood_guard.receive(&window, 0).finished, 0);
        }
        assert_eq!(flood_guard.receive(&reset, 0).finished, 3);
        assert_eq!(flood_guard.receive(&reset, 0).finished, 0, "they are credited once");
    }

    #[test]
    fn frames_without_effect_are_noise_unless_answers_pay_for_them() {
        const PING: u8 = 6;
        for quiet in [frame(kind::DATA, 0, 0), frame(PING, 0, 8), frame(77, 0, 0), frame(4, 0, 0)] {
            let mut flood_guard = connected();
            let flood = quiet.repeat(usize::try_from(NOISE.burst / NOISE_COST).unwrap());
            assert!(!flood_guard.receive(&flood, 0).is_noise);
            assert!(flood_guard.receive(&quiet, 0).is_noise);
            flood_guard.send(&frame(kind::DATA, 0, 100), &mut Sent::default());
            assert!(!flood_guard.receive(&quiet, 0).is_noise);
        }
        let mut flood_guard = connected();
        flood_guard.receive(&frame(kind::HEADERS, 0x4, 3), 0);
        let upload = frame(kind::DATA, 0, 1).repeat(100_000);
        assert!(!flood_guard.receive(&upload, 0).is_noise);
    }

    #[test]
    fn frames_of_streams_that_are_not_open_are_counted_and_small_ones_are_noise() {
        const PRIORITY: u8 = 2;
        let large = [&[0, 4, 0, kind::DATA, 0, 0, 0, 0, 5][..], &[0; 1024]].concat();
        let mut flood_guard = connected();
        let message = [large.clone(), frame(kind::DATA, 0, 5)].concat();
        let messages = message.repeat(2 * (NOISE.burst / NOISE_COST) as usize);
        assert!(!flood_guard.receive(&messages, 0).is_noise, "the rest of a message is small");
        flood_guard.forget_strays();
        assert!(!flood_guard.receive(&large.repeat(2 * (NOISE.burst / NOISE_COST) as usize), 0).is_noise);
        flood_guard.forget_strays();
        flood_guard.receive(&frame(kind::HEADERS, 0x4, 3), 0);
        for of_open_stream in [kind::HEADERS, kind::DATA, PRIORITY] {
            flood_guard.receive(&frame(of_open_stream, 0x4, 5), 0);
        }
        assert_eq!(flood_guard.strays(), 0);
        flood_guard.send(&frame(kind::HEADERS, 0x5, 3), &mut Sent::default());
        for stray in [frame(kind::HEADERS, 0x4, 3), frame(kind::DATA, 0x1, 3), frame(PRIORITY, 0, 5), large] {
            flood_guard.receive(&stray, 0);
        }
        assert_eq!(flood_guard.strays(), 4);
        let small = frame(kind::DATA, 0x1, 3).repeat((NOISE.burst / NOISE_COST) as usize);
        assert!(flood_guard.receive(&small, 0).is_noise);
    }

    #[test]
    fn settings_cost_more_where_many_streams_are_open() {
        let settings = frame(kind::SETTINGS, 0, 0);
        let most = |streams: u32| {
            let mut flood_guard = connected();
            for stream in 0..streams {
                let mut head = frame(kind::HEADERS, 0x4, 0);
                head[5..].copy_from_slice(&(2 * stream + 1).to_be_bytes());
                flood_guard.receive(&head, 0);
            }
            (0..NOISE.burst).take_while(|_| !flood_guard.receive(&settings, 0).is_noise).count() as u64
        };
        assert_eq!(most(0), NOISE.burst / NOISE_COST);
        assert_eq!(most(1_000), NOISE.burst / (NOISE_COST + 1_000));
    }

    #[test]
    fn what_a_client_is_ahead_is_what_it_sent_of_streams_that_are_open() {
        let mut flood_guard = connected();
        let data = frame(kind::DATA, 0, 200);
        assert_eq!(flood_guard.receive(&data, 0).ahead, 0, "the stream is not open");
        flood_guard.receive(&frame(kind::HEADERS, 0x4, 3), 0);
        let cost = ahead::cost(200);
        assert_eq!((flood_guard.receive(&data, 0).ahead, flood_guard.ahead_at_most()), (cost, cost));
        let mut sent = Sent::default();
        flood_guard.send(&frame(kind::HEADERS, 0x4, 3), &mut sent);
        assert_eq!((sent.has_closed, flood_guard.ahead_at_most()), (false, cost));
        flood_guard.send(&frame(kind::HEADERS, 0x5, 3), &mut sent);
        assert_eq!((sent.has_closed, flood_guard.ahead_at_most()), (true, 0), "it was answered");
        assert_eq!(flood_guard.receive(&data, 0).ahead, 0);
        flood_guard.receive(&frame(kind::HEADERS, 0x5, 3), 0);
        assert_eq!(flood_guard.receive(&data, 0).ahead, 0, "trailers open nothing");
    }

    #[test]
    fn a_head_is_open_from_its_first_frame_to_its_last() {
        let mut flood_guard = connected();
        assert_eq!(flood_guard.receive(&frame(kind::HEADERS, 0, 3), 0).head_is_open, Some(true));
        assert_eq!(flood_guard.receive(&frame(kind::CONTINUATION, 0, 3), 0).head_is_open, None);
        assert_eq!(flood_guard.receive(&frame(kind::CONTINUATION, 0x4, 3), 0).head_is_open, Some(false));
        assert_eq!(flood_guard.goaway().unwrap()[9..13], [0, 0, 0, 5]);
        flood_guard.send(&[0, 0], &mut Sent::default());
        assert!(flood_guard.goaway().is_none(), "not in the middle of a frame");
    }
}
