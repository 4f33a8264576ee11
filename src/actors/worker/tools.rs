//! Tools: Bazel's persistent workers, which are processes that outlive their first action and serve others.
//!
//! Starting a compiler often takes longer than compiling. For such an action, Bazel tells the server that the tool can
//! keep running, and which inputs belong to the tool ([`call`]). The tool is started once, gets one request for each
//! action ([`codec`]), and is kept between actions ([`idle`]). A tool runs in a sandbox of its own, like any command.
//! The inputs in its exec root are [exchanged](exchange) for each request, and its outputs are [copied out](collect).
//! If a tool fails, it is ended and the action runs as an ordinary command, as on a server without tools.
//!
//! [`Tools`] owns the idle tools of one pool. While a tool serves an action, it belongs to the worker's thread and is
//! counted by a [`ToolReservation`]. A thread ends tools that were idle for too long. It exits when the [`Tools`] are
//! dropped.

mod call;
mod codec;
mod collect;
mod exchange;
mod idle;
mod turn;

pub(super) use call::wants_tool;
pub use idle::ToolLimits;
pub(super) use turn::{NotServed, ToolJob, ToolTurn};

use super::{build_root::Workspace, launcher::tool::ToolProcess};
use crate::logging::Event;
use call::{ToolCall, ToolKey};
use exchange::PlacedInputs;
use idle::{IdleTools, NotKept, ToolChoice, ToolUses};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

const TOOL_STARTED: &str = "tool_started";
const TOOL_ENDED: &str = "tool_ended";
/// Why a tool ends that exceeds [`ToolLimits::max_memory`].
const TOO_LARGE: &str = "it takes too much memory";
/// Time between two measurements of the memory of idle tools.
const MEMORY_LOOK: Duration = Duration::from_secs(5);

/// The tools of one pool. They end when this is dropped.
#[derive(Debug)]
pub struct Tools(Arc<ToolsShared>);

#[derive(Debug)]
struct ToolsShared {
    pool: String,
    limits: ToolLimits,
    idle: Mutex<IdleTools<Tool>>,
    /// Wakes the thread that ends idle tools.
    changed: Condvar,
}

/// A tool that serves one action after the other. Its processes are killed before its exec directory is removed.
#[derive(Debug)]
struct Tool {
    process: ToolProcess,
    workspace: Workspace,
    contents: PlacedInputs,
}

/// The reservation of one of a pool's places for tools.
#[derive(Debug)]
struct ToolReservation<'a> {
    tools: &'a Tools,
    usage: ToolUses,
    is_kept: bool,
}

impl Tools {
    /// Creates the collection for the pool with this name. It starts no tools.
    pub fn new(pool: &str, limits: ToolLimits) -> Self {
        let shared = Arc::new(ToolsShared {
            pool: pool.to_owned(),
            limits,
            idle: Mutex::new(IdleTools::new(limits)),
            changed: Condvar::new(),
        });
        let of_thread = shared.clone();
        // Without the thread, idle tools stay until their places are needed.
        let _ = thread::Builder::new().name("gorego-tools".into()).spawn(move || of_thread.end_idle());
        Self(shared)
    }

    /// Ends all idle tools, for instance when the disk is full. Blocks until they are gone.
    pub fn clear(&self) {
        let tools = self.0.idle_tools().clear();
        self.0.end(tools, "the disk is full");
    }

    /// Ends all idle tools and admits no new ones: a tool that serves an action ends after that action. Blocks like
    /// [`Tools::clear`].
    pub fn close(&self) {
        let tools = self.0.idle_tools().close();
        self.0.changed.notify_all();
        self.0.end(tools, "the server stops");
    }

    /// Reserves a tool that can serve a call. Also returns the tool itself, unless it has to be started first. `None`
    /// if all places are taken by tools that serve other actions.
    fn hold(&self, call: &ToolCall) -> Option<(ToolReservation<'_>, Option<Tool>)> {
        loop {
            let taken = self.0.idle_tools().take(call.key);
            let held = |usage| ToolReservation { tools: self, usage, is_kept: false };
            match taken {
                ToolChoice::Kept(tool, usage) => {
                    let held = held(usage);
                    match tool.process.problem() {
                        None => return Some((held, Some(tool))),
                        Some(problem) => self.0.end(vec![tool], &problem),
                    }
                }
                ToolChoice::New(usage, evicted) => {
                    let held = held(usage);
                    self.0.end(evicted.into_iter().collect(), "another tool needs its place");
                    return Some((held, None));
                }
                ToolChoice::Full => return None,
            }
        }
    }

    fn log_start(&self, key: ToolKey) {
        Event::info("gorego::worker", TOOL_STARTED)
            .with("pool", &*self.0.pool)
            .with("tool", &*short(key))
            .log(format_args!("a tool was started that can serve several actions"));
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        self.close();
    }
}

impl ToolReservation<'_> {
    /// Keeps the tool for later calls, if it may serve another one.
    fn keep(mut self, tool: Tool) {
        self.is_kept = true;
        let memory = tool.process.sample().memory;
        let shared = &self.tools.0;
        let kept = shared.idle_tools().keep(tool, self.usage, memory, Instant::now());
        match kept {
            Ok(()) => shared.changed.notify_all(),
            Err((tool, why)) => shared.end(
                vec![tool],
                match why {
                    NotKept::Used => "it has served enough actions",
                    NotKept::Large => TOO_LARGE,
                    NotKept::Closed => "the server stops",
                },
            ),
        }
    }
}

impl Drop for ToolReservation<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.tools.0.idle_tools().lost();
        }
    }
}

impl ToolsShared {
    fn idle_tools(&self) -> MutexGuard<'_, IdleTools<Tool>> {
        // The state is consistent between two calls of its methods.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends tools one after the other. The caller must not hold the lock of the idle tools.
    fn end(&self, tools: Vec<Tool>, reason: &str) {
        for tool in tools {
            drop(tool);
            Event::info("gorego::worker", TOOL_ENDED)
                .with("pool", &*self.pool)
                .with("error", reason)
                .log(format_args!("a tool ended: {reason}"));
        }
    }

    /// The loop of the thread: ends tools that were idle for too long or have grown too large, until the pool is
    /// closed.
    fn end_idle(&self) {
        let mut idle = self.idle_tools();
        let mut next_look = Instant::now();
        while !idle.is_closed() {
            let now = Instant::now();
            let expired = idle.expire(now);
            let mut outgrown = Vec::new();
            if now >= next_look {
                next_look = now + MEMORY_LOOK;
                outgrown = idle.outgrown(|tool| tool.process.sample().memory);
            }
            if !expired.is_empty() || !outgrown.is_empty() {
                drop(idle);
                self.end(expired, "it was idle for too long");
                self.end(outgrown, TOO_LARGE);
                idle = self.idle_tools();
                continue;
            }
            idle = match idle.next_expiry() {
                Some(next) => {
                    let left = next.min(next_look).saturating_duration_since(now);
                    self.changed.wait_timeout(idle, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(idle).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Short name of a tool for logs.
fn short(key: ToolKey) -> String {
    key.0.hash_hex().chars().take(8).collect()
}
