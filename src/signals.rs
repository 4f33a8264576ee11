//! [`StopSignals`]: the signals that ask this process to stop, or a server to read its configuration again.
//!
//! SIGHUP has two meanings. If a server runs on a terminal, the terminal was closed, and the server stops. Otherwise it
//! reads its configuration again, as daemons usually do.
//!
//! A signal that was ignored when the process started stays ignored, as `nohup` expects of SIGHUP. A server receives
//! the others in any case: a shell without job control ignores SIGINT for what it starts in the background, and there
//! must be a way to stop it.

use futures::stream::{FuturesUnordered, StreamExt as _};
use gorego_reapi::error::{Error, Result};
use std::io::{self, IsTerminal as _};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that asks this process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopSignal {
    /// The terminal was closed.
    Hangup,
    /// The configuration is to be read again.
    Reload,
    /// The user has pressed Ctrl-C (SIGINT).
    Interrupt,
    /// What a service manager sends.
    Terminate,
}

impl StopSignal {
    const STOPS: [Self; 3] = [Self::Hangup, Self::Interrupt, Self::Terminate];

    /// The name, such as `SIGTERM`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hangup | Self::Reload => "SIGHUP",
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        }
    }

    /// The number, for an exit code.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Hangup | Self::Reload => 1,
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }

    fn kind(self) -> SignalKind {
        SignalKind::from_raw(self.number().into())
    }

    fn is_ignored(self) -> bool {
        // SAFETY: without a new action, the call only writes the current one to the given location.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(self.number().into(), std::ptr::null(), &mut action) == 0
                && action.sa_sigaction == libc::SIG_IGN
        }
    }
}

pub(crate) struct StopSignals(Vec<(StopSignal, Signal)>);

impl StopSignals {
    /// Starts to listen for the signals that stop a server. From now on they do not end the process by themselves.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub(crate) fn of_server() -> Result<Self> {
        let has_terminal = io::stdin().is_terminal() || io::stderr().is_terminal();
        let hangup = if has_terminal { StopSignal::Hangup } else { StopSignal::Reload };
        let heard = [hangup, StopSignal::Interrupt, StopSignal::Terminate];
        Self::listen(heard.into_iter().filter(|stop| *stop != hangup || !hangup.is_ignored()))
    }

    /// The same for a client command, which no ignored signal stops.
    ///
    /// # Errors
    /// The errors of the system calls.
    pub(crate) fn of_client() -> Result<Self> {
        Self::listen(StopSignal::STOPS.into_iter().filter(|stop| !stop.is_ignored()))
    }

    fn listen(heard: impl Iterator<Item = StopSignal>) -> Result<Self> {
        let listen = |stop: StopSignal| match signal(stop.kind()) {
            Ok(arrivals) => Ok((stop, arrivals)),
            Err(error) => Err(Error::io("listen for signals", &error)),
        };
        Ok(Self(heard.map(listen).collect::<Result<_>>()?))
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> StopSignal {
        let arrivals = self.0.iter_mut().map(|(stop, arrivals)| async move {
            arrivals.recv().await;
            *stop
        });
        match arrivals.collect::<FuturesUnordered<_>>().next().await {
            Some(stop) => stop,
            None => std::future::pending().await,
        }
    }
}
