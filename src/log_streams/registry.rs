//! The [`Registry`]: the existing streams with their sizes and times, and the rules for their removal. Pure.
//!
//! Invariants: the streams and their bytes never exceed [`StreamLimits`]; an unfinished stream is removed only if it is
//! idle; when room is needed, the stream that finished first is removed first.

use gorego_reapi::error::{Error, Result};
use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};
use uuid::Uuid;

/// The retry delay in errors for a limit below which other clients may make room.
const FULL_RETRY: Duration = Duration::from_secs(5);

/// Limits on a set of streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Number of streams, including finished ones.
    pub streams: usize,
    /// Total bytes of all streams.
    pub bytes: u64,
    /// Bytes of one stream.
    pub stream_bytes: u64,
    /// How long an unfinished stream may go without a write; `None` if its end is enforced elsewhere.
    pub idle: Option<Duration>,
    /// How long a finished stream is kept.
    pub kept: Duration,
}

/// Streams by id; see the module documentation.
#[derive(Debug)]
pub(crate) struct Registry<V> {
    limits: StreamLimits,
    entries: HashMap<Uuid, StreamEntry<V>>,
    /// Unfinished streams in order of their last change.
    open: BTreeSet<(Instant, Uuid)>,
    /// Finished streams in order of their end.
    finished: BTreeSet<(Instant, Uuid)>,
    bytes: u64,
}

#[derive(Debug)]
struct StreamEntry<V> {
    value: V,
    bytes: u64,
    /// Time of the last change or of the end.
    since: Instant,
    finished: bool,
}

impl<V> Registry<V> {
    /// Creates an empty registry.
    pub(crate) fn new(limits: StreamLimits) -> Self {
        Self { limits, entries: HashMap::new(), open: BTreeSet::new(), finished: BTreeSet::new(), bytes: 0 }
    }

    /// Adds an empty stream. Returns the finished stream that was removed to make room, if any.
    ///
    /// # Errors
    /// `Exhausted` when there are too many streams and none is finished.
    pub(crate) fn insert(&mut self, id: Uuid, value: V, now: Instant) -> Result<Option<V>> {
        let displaced = match self.entries.len() < self.limits.streams {
            true => None,
            false => Some(self.drop_oldest_finished().ok_or_else(|| Error::Exhausted {
                message: format!(
                    "{} log streams are open, which is the limit of this server; finish some",
                    self.limits.streams
                ),
                retry_after: Some(FULL_RETRY),
            })?),
        };
        self.entries.insert(id, StreamEntry { value, bytes: 0, since: now, finished: false });
        self.open.insert((now, id));
        Ok(displaced)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The stream with this id, if it exists.
    pub(crate) fn get(&self, id: &Uuid) -> Option<&V> {
        self.entries.get(id).map(|entry| &entry.value)
    }

    /// Reserves bytes before they are written. Returns the finished streams that were removed to make room.
    ///
    /// # Errors
    /// `NotFound` when the stream was removed; `OutOfRange` beyond the limit of one stream; `Exhausted` at the limit of
    /// all streams.
    pub(crate) fn grow(&mut self, id: &Uuid, bytes: u64, now: Instant) -> Result<Vec<V>> {
        let entry = self.entries.get(id).filter(|entry| !entry.finished);
        let entry = entry.ok_or_else(gone)?;
        if entry.bytes.saturating_add(bytes) > self.limits.stream_bytes {
            // Not a temporary shortage: no retry makes the stream shorter (GEN-20).
            return Err(Error::OutOfRange(format!(
                "a log stream may have at most {} bytes; create another one",
                self.limits.stream_bytes
            )));
        }
        let mut displaced = Vec::new();
        while self.bytes.saturating_add(bytes) > self.limits.bytes {
            displaced.push(self.drop_oldest_finished().ok_or_else(|| Error::Exhausted {
                message: format!(
                    "log streams hold {} bytes, which is the limit of this server (log_streams.max_size_gb)",
                    self.limits.bytes
                ),
                retry_after: Some(FULL_RETRY),
            })?);
        }
        if let Some(entry) = self.entries.get_mut(id) {
            self.open.remove(&(entry.since, *id));
            entry.since = now;
            entry.bytes = entry.bytes.saturating_add(bytes);
            self.open.insert((now, *id));
            self.bytes = self.bytes.saturating_add(bytes);
        }
        Ok(displaced)
    }

    /// Returns a reservation whose bytes were not written.
    pub(crate) fn shrink(&mut self, id: &Uuid, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(id) {
            let given_back = entry.bytes.min(bytes);
            entry.bytes -= given_back;
            self.bytes = self.bytes.saturating_sub(given_back);
        }
    }

    /// Marks a stream as finished. From now on it is kept for a limited time.
    pub(crate) fn finish(&mut self, id: &Uuid, now: Instant) {
        if let Some(entry) = self.entries.get_mut(id).filter(|entry| !entry.finished) {
            self.open.remove(&(entry.since, *id));
            (entry.since, entry.finished) = (now, true);
            self.finished.insert((now, *id));
        }
    }

    /// Removes and returns the streams whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<V> {
        let over = |since: Instant, limit| now.saturating_duration_since(since) >= limit;
        let mut expired = Vec::new();
        while let Some(&(since, id)) = self.finished.first()
            && over(since, self.limits.kept)
        {
            expired.extend(self.remove(id));
        }
        while let Some(limit) = self.limits.idle
            && let Some(&(since, id)) = self.open.first()
            && over(since, limit)
        {
            expired.extend(self.remove(id));
        }
        expired
    }

    fn drop_oldest_finished(&mut self) -> Option<V> {
        let &(_, id) = self.finished.first()?;
        self.remove(id)
    }

    fn remove(&mut self, id: Uuid) -> Option<V> {
        let entry = self.entries.remove(&id)?;
        let order = if entry.finished { &mut self.finished } else { &mut self.open };
        order.remove(&(entry.since, id));
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        Some(entry.value)
    }
}

/// The error of an append to a stream that was removed.
pub(super) fn gone() -> Error {
    Error::NotFound("the log stream does not exist any more".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: StreamLimits = StreamLimits {
        streams: 4,
        bytes: 100,
        stream_bytes: 60,
        idle: Some(Duration::from_secs(50)),
        kept: Duration::from_secs(20),
    };

    #[derive(Debug, Clone)]
    enum Step {
        Insert,
        Grow(usize, u64),
        Shrink(usize, u64),
        Finish(usize),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Insert),
            (0usize..8, 0u64..70).prop_map(|(n, bytes)| Step::Grow(n, bytes)),
            (0usize..8, 0u64..10).prop_map(|(n, bytes)| Step::Shrink(n, bytes)),
            (0usize..8).prop_map(Step::Finish),
            (0u64..30).prop_map(Step::Pass),
        ]
    }

    /// A model of one stream: number, bytes, last change, finished; in order of creation.
    #[derive(Debug, Clone, PartialEq)]
    struct Modelled {
        number: u128,
        bytes: u64,
        since: u64,
        finished: bool,
    }

    #[derive(Default)]
    struct Model {
        streams: Vec<Modelled>,
        now: u64,
        numbers: u128,
    }

    impl Model {
        fn at(&mut self, n: usize) -> Option<&mut Modelled> {
            let count = self.streams.len();
            self.streams.get_mut(if count == 0 { 0 } else { n % count })
        }

        fn total(&self) -> u64 {
            self.streams.iter().map(|stream| stream.bytes).sum()
        }

        /// The finished stream that must make room.
        fn displace(&mut self) -> Option<u128> {
            let finished = self.streams.iter().filter(|stream| stream.finished);
            let oldest = finished.min_by_key(|stream| (stream.since, stream.number))?.number;
            self.streams.retain(|stream| stream.number != oldest);
            Some(oldest)
        }
    }

    proptest! {
        /// All limits hold after every step, and only the expected streams are removed.
        #[test]
        fn the_registry_holds_what_a_list_would(steps in proptest::collection::vec(step(), 1..200)) {
            let start = Instant::now();
            let mut registry = Registry::new(LIMITS);
            let mut model = Model::default();
            for step in steps {
                let now = start + Duration::from_secs(model.now);
                match step {
                    Step::Insert => {
                        let number = model.numbers;
                        model.numbers += 1;
                        let full = model.streams.len() == LIMITS.streams;
                        let displaced = if full { model.displace() } else { None };
                        let inserted = registry.insert(Uuid::from_u128(number), number, now);
                        if full && displaced.is_none() {
                            prop_assert!(inserted.is_err());
                        } else {
                            prop_assert_eq!(inserted, Ok(displaced));
                            model.streams.push(Modelled { number, bytes: 0, since: model.now, finished: false });
                        }
                    }
                    Step::Grow(n, bytes) => {
                        let Some(stream) = model.at(n).cloned() else { continue };
                        let grown = registry.grow(&Uuid::from_u128(stream.number), bytes, now);
                        if stream.finished || stream.bytes + bytes > LIMITS.stream_bytes {
                            prop_assert!(grown.is_err());
                            continue;
                        }
                        let mut displaced = Vec::new();
                        while model.total() + bytes > LIMITS.bytes {
                            match model.displace() {
                                Some(number) => displaced.push(number),
                                None => break,
                            }
                        }
                        if model.total() + bytes > LIMITS.bytes {
                            prop_assert!(grown.is_err());
                        } else {
                            prop_assert_eq!(grown, Ok(displaced));
                            let since = model.now;
                            let found = model.streams.iter_mut().find(|other| other.number == stream.number);
                            let grown = found.unwrap();
                            grown.bytes += bytes;
                            grown.since = since;
                        }
                    }
                    Step::Shrink(n, bytes) => {
                        let Some(stream) = model.at(n) else { continue };
                        stream.bytes = stream.bytes.saturating_sub(bytes);
                        registry.shrink(&Uuid::from_u128(stream.number), bytes);
                    }
                    Step::Finish(n) => {
                        let since = model.now;
                        let Some(stream) = model.at(n) else { continue };
                        if !stream.finished {
                            (stream.since, stream.finished) = (since, true);
                        }
                        registry.finish(&Uuid::from_u128(stream.number), now);
                    }
                    Step::Pass(seconds) => {
                        model.now += seconds;
                        let time = model.now;
                        let over = |stream: &Modelled| {
                            time - stream.since >= if stream.finished { 20 } else { 50 }
                        };
                        let mut gone: Vec<_> =
                            model.streams.iter().filter(|s| over(s)).map(|s| s.number).collect();
                        model.streams.retain(|stream| !over(stream));
                        let mut expired = registry.expire(start + Duration::from_secs(model.now));
                        gone.sort_unstable();
                        expired.sort_unstable();
                        prop_assert_eq!(expired, gone);
                    }
                }
                prop_assert_eq!(registry.entries.len(), model.streams.len());
                prop_assert_eq!(registry.bytes, model.total());
                prop_assert!(registry.bytes <= LIMITS.bytes && registry.entries.len() <= LIMITS.streams);
                prop_assert_eq!(registry.open.len() + registry.finished.len(), registry.entries.len());
                for stream in &model.streams {
                    prop_assert_eq!(registry.get(&Uuid::from_u128(stream.number)), Some(&stream.number));
                }
            }
        }
    }
}
