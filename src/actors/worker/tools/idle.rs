//! [`IdleTools`]: decides which tools of a pool are kept, which one serves a call, and which ones must end. Pure. Facts
//! and the time go in, and decisions come out.
//!
//! A tool is either idle or serves one call. A serving tool is only counted here and is owned by its caller.
//! Invariants: there are never more than `max_tools` tools, idle and serving together. A tool serves only calls
//! with its own key, one after the other, and never more than `max_uses`.

use super::call::ToolKey;
use std::time::{Duration, Instant};

/// The limits of the tools of one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolLimits {
    /// Maximum number of tools of the pool at the same time.
    pub max_tools: usize,
    /// How long a tool is kept after its last call.
    pub max_idle: Duration,
    /// Number of calls after which a tool is ended.
    pub max_uses: u64,
    /// A tool that uses more than this memory in bytes after a call, or while it is idle, is ended.
    pub max_memory: u64,
    /// How long one call may take. Then the action runs without a tool.
    pub max_call: Duration,
}

/// The idle tools of a pool, and the number of serving ones.
#[derive(Debug)]
pub(super) struct IdleTools<T> {
    limits: ToolLimits,
    /// Ordered by last use; the most recently used one is last.
    kept: Vec<Kept<T>>,
    serving: usize,
    is_closed: bool,
}

#[derive(Debug)]
struct Kept<T> {
    tool: T,
    usage: ToolUses,
    since: Instant,
}

/// The key and the number of uses of a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ToolUses {
    pub key: ToolKey,
    /// How many calls the tool has served.
    pub uses: u64,
}

/// How a call is served.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ToolChoice<T> {
    /// This idle tool serves it.
    Kept(T, ToolUses),
    /// A new tool serves it. The second tool, if any, must be ended first.
    New(ToolUses, Option<T>),
    /// No tool serves it, because all of them serve other calls.
    Full,
}

/// Why a tool is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotKept {
    /// It has served enough calls.
    Used,
    /// It takes too much memory.
    Large,
    /// The pool is closed.
    Closed,
}

impl<T> IdleTools<T> {
    pub(super) fn new(limits: ToolLimits) -> Self {
        Self { limits, kept: Vec::new(), serving: 0, is_closed: false }
    }

    /// Takes a tool for a call. The caller must give it back with [`IdleTools::keep`], or report its end with
    /// [`IdleTools::lost`].
    pub(super) fn take(&mut self, key: ToolKey) -> ToolChoice<T> {
        if self.is_closed {
            return ToolChoice::Full;
        }
        // The most recently used tool is taken, so that superfluous tools stay idle and expire.
        if let Some(at) = self.kept.iter().rposition(|kept| kept.usage.key == key) {
            self.serving += 1;
            let Kept { tool, usage, .. } = self.kept.remove(at);
            return ToolChoice::Kept(tool, usage);
        }
        let is_full = self.kept.len() + self.serving >= self.limits.max_tools;
        if is_full && self.kept.is_empty() {
            return ToolChoice::Full;
        }
        let evicted = is_full.then(|| self.kept.remove(0).tool);
        self.serving += 1;
        ToolChoice::New(ToolUses { key, uses: 0 }, evicted)
    }

    /// Keeps a tool that has served a call and now uses `memory` bytes. A tool that is returned as an error must be
    /// ended.
    pub(super) fn keep(
        &mut self,
        tool: T,
        usage: ToolUses,
        memory: u64,
        now: Instant,
    ) -> Result<(), (T, NotKept)> {
        self.lost();
        let usage = ToolUses { uses: usage.uses + 1, ..usage };
        let problem = if self.is_closed {
            Some(NotKept::Closed)
        } else if usage.uses >= self.limits.max_uses {
            Some(NotKept::Used)
        } else if memory > self.limits.max_memory {
            Some(NotKept::Large)
        } else {
            None
        };
        match problem {
            Some(problem) => Err((tool, problem)),
            None => {
                self.kept.push(Kept { tool, usage, since: now });
                Ok(())
            }
        }
    }

    /// Records that a tool that was taken has ended.
    pub(super) fn lost(&mut self) {
        self.serving = self.serving.saturating_sub(1);
    }

    /// Takes out the tools that were idle for too long. The caller must end them.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<T> {
        let limit = self.limits.max_idle;
        let old = |kept: &Kept<T>| now.saturating_duration_since(kept.since) >= limit;
        // The tools that were idle the longest are first.
        let count = self.kept.iter().take_while(|kept| old(kept)).count();
        self.kept.drain(..count).map(|kept| kept.tool).collect()
    }

    /// Takes out the tools that use too much memory by now. The caller must end them.
    pub(super) fn outgrown(&mut self, memory: impl Fn(&T) -> u64) -> Vec<T> {
        let limit = self.limits.max_memory;
        self.kept.extract_if(.., |kept| memory(&kept.tool) > limit).map(|kept| kept.tool).collect()
    }

    /// When the next tool will have been idle for too long.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.kept.first().and_then(|kept| kept.since.checked_add(self.limits.max_idle))
    }

    /// Takes out all idle tools. The caller must end them.
    pub(super) fn clear(&mut self) -> Vec<T> {
        self.kept.drain(..).map(|kept| kept.tool).collect()
    }

    /// Takes out all idle tools like [`IdleTools::clear`]. From now on no tool is kept or taken.
    pub(super) fn close(&mut self) -> Vec<T> {
        self.is_closed = true;
        self.clear()
    }

    /// Whether [`IdleTools::close`] was called.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gorego_reapi::digest::DigestFunction;
    use proptest::prelude::*;

    const LIMITS: ToolLimits = ToolLimits {
        max_tools: 3,
        max_idle: Duration::from_secs(10),
        max_uses: 4,
        max_memory: 1000,
        max_call: Duration::MAX,
    };

    fn key(number: u8) -> ToolKey {
        ToolKey(DigestFunction::Sha256.digest(&[number]))
    }

    /// A tool: the number of its key, and its own number.
    type Tool = (u8, u64);

    #[derive(Debug, Clone)]
    enum Step {
        Take(u8),
        /// Gives back one of the serving tools, which then uses this memory.
        Keep(usize, u64),
        Lose(usize),
        Wait(u64),
        /// The tools of this key grow beyond the limit.
        Grow(u8),
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        prop::collection::vec(
            prop_oneof![
                4 => (0u8..3).prop_map(Step::Take),
                4 => (0usize..3, 0u64..1100).prop_map(|(at, memory)| Step::Keep(at, memory)),
                1 => (0usize..3).prop_map(Step::Lose),
                2 => (0u64..12).prop_map(Step::Wait),
                1 => (0u8..3).prop_map(Step::Grow),
                1 => Just(Step::Clear),
            ],
            0..80,
        )
    }

    proptest! {
        /// The model records where each tool is.
        #[test]
        fn every_tool_is_in_one_place_and_within_its_bounds(steps in steps()) {
            let mut idle: IdleTools<Tool> = IdleTools::new(LIMITS);
            let mut serving: Vec<(Tool, ToolUses)> = Vec::new();
            let mut kept: Vec<(Tool, u64, Instant)> = Vec::new();
            let (mut now, mut next) = (Instant::now(), 0);
            for step in steps {
                match step {
                    Step::Take(number) => {
                        let of_key = kept.iter().rposition(|(tool, ..)| tool.0 == number);
                        match (idle.take(key(number)), of_key) {
                            (ToolChoice::Kept(tool, usage), Some(at)) => {
                                let (expected, uses, _) = kept.remove(at);
                                prop_assert_eq!((tool, usage), (expected, ToolUses { key: key(number), uses }));
                                serving.push((tool, usage));
                            }
                            (ToolChoice::New(usage, evicted), None) => {
                                prop_assert_eq!(usage, ToolUses { key: key(number), uses: 0 });
                                let is_full = kept.len() + serving.len() == LIMITS.max_tools;
                                prop_assert_eq!(evicted, is_full.then(|| kept.remove(0).0));
                                next += 1;
                                serving.push(((number, next), usage));
                            }
                            (ToolChoice::Full, None) => prop_assert_eq!(serving.len(), LIMITS.max_tools),
                            other => prop_assert!(false, "{:?}", other),
                        }
                    }
                    Step::Keep(at, memory) if at < serving.len() => {
                        let (tool, usage) = serving.remove(at);
                        let uses = usage.uses + 1;
                        let expected = if uses >= LIMITS.max_uses {
                            Err((tool, NotKept::Used))
                        } else if memory > LIMITS.max_memory {
                            Err((tool, NotKept::Large))
                        } else {
                            kept.push((tool, uses, now));
                            Ok(())
                        };
                        prop_assert_eq!(idle.keep(tool, usage, memory, now), expected);
                    }
                    Step::Lose(at) if at < serving.len() => {
                        serving.remove(at);
                        idle.lost();
                    }
                    Step::Wait(seconds) => {
                        now += Duration::from_secs(seconds);
                        let old = |since: Instant| now - since >= LIMITS.max_idle;
                        let expected: Vec<_> = kept.iter().filter(|k| old(k.2)).map(|k| k.0).collect();
                        kept.retain(|k| !old(k.2));
                        prop_assert_eq!(idle.expire(now), expected);
                        let soonest = kept.iter().map(|k| k.2 + LIMITS.max_idle).min();
                        prop_assert_eq!(idle.next_expiry(), soonest);
                    }
                    Step::Grow(number) => {
                        let (large, rest): (Vec<_>, Vec<_>) = kept.drain(..).partition(|k| k.0.0 == number);
                        kept = rest;
                        let expected: Vec<_> = large.iter().map(|k| k.0).collect();
                        let memory = |tool: &Tool| LIMITS.max_memory + u64::from(tool.0 == number);
                        prop_assert_eq!(idle.outgrown(memory), expected);
                    }
                    Step::Clear => {
                        let expected: Vec<_> = kept.drain(..).map(|k| k.0).collect();
                        prop_assert_eq!(idle.clear(), expected);
                    }
                    Step::Keep(..) | Step::Lose(_) => {}
                }
                prop_assert!(kept.len() + serving.len() <= LIMITS.max_tools);
            }
            let all: Vec<_> = kept.iter().map(|k| k.0).collect();
            prop_assert_eq!(idle.close(), all);
            prop_assert_eq!(idle.take(key(0)), ToolChoice::Full);
            for (tool, usage) in serving {
                prop_assert_eq!(idle.keep(tool, usage, 0, now), Err((tool, NotKept::Closed)));
            }
        }
    }
}
