//! The process that started the server, if it is systemd or speaks the protocol of systemd (sd_notify(3) and
//! sd_listen_fds(3)).
//!
//! [`Supervision::take`] reads the environment of that protocol once, before there are threads, and removes it, so that
//! no child inherits it. The result is plain values: the [`Supervisor`] to report to, the [`InheritedSockets`] to serve
//! on, and the watchdog time of the supervisor. `src/server.rs` decides when each of them is used. A server that was
//! started by hand has none of these, and every report is then a no-op.

mod notify;
mod sockets;

pub(crate) use notify::Supervisor;
pub(crate) use sockets::InheritedSockets;

use gorego_reapi::error::Result;
use std::time::Duration;

/// The variables of the protocol.
const VARIABLES: &[&str] =
    &["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"];

/// The parts of the protocol that the supervisor uses.
#[derive(Debug, Default)]
pub(crate) struct Supervision {
    /// The receiver of reports.
    pub supervisor: Supervisor,
    /// Listening sockets that the supervisor opened for this process.
    pub sockets: InheritedSockets,
    /// The supervisor restarts the server if it sends no sign of life for this time.
    pub watchdog: Option<Duration>,
}

impl Supervision {
    /// Reads the variables of the protocol and removes them from the environment of this process.
    ///
    /// # Errors
    /// [`Error::Precondition`](gorego_reapi::error::Error::Precondition) if an inherited socket cannot be served on.
    /// The supervisor is returned in any case, so that the error can be reported to it.
    pub(crate) fn take() -> (Supervisor, Result<Self>) {
        let supervisor = Supervisor::connect(std::env::var_os("NOTIFY_SOCKET"));
        let watchdog = sd_notify::watchdog_enabled();
        let sockets = InheritedSockets::take();
        if is_single_threaded() {
            for name in VARIABLES {
                // SAFETY: there is no other thread that could read the environment.
                unsafe { std::env::remove_var(name) };
            }
        }
        let taken = sockets.map(|sockets| Self { supervisor: supervisor.clone(), sockets, watchdog });
        (supervisor, taken)
    }
}

/// Whether the process has only this thread. Tests have more.
fn is_single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}
