//! [`StopSignals`]: the signals that ask this process to stop.
//!
//! A signal that was ignored when the process started stays ignored, as `nohup` expects of SIGHUP. A server hears the others in
//! any case: a shell without job control ignores SIGINT for what it starts in the background, and there must be a way to stop it.

use futures::stream::{FuturesUnordered, StreamExt as _};
use gorego_reapi::error::{Error, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that asks this process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StopSignal {
    /// The terminal was closed.
    Hangup,
    /// Ctrl-C.
    Interrupt,
    /// What a service manager sends.
    Terminate,
}

impl StopSignal {
    const ALL: [Self; 3] = [Self::Hangup, Self::Interrupt, Self::Terminate];

    /// The name, such as `SIGTERM`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hangup => "SIGHUP",
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        }
    }

    /// The number, for an exit code.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Hangup => 1,
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

/// Listens for [`StopSignal`]s.
pub(crate) struct StopSignals(Vec<(StopSignal, Signal)>);

impl StopSignals {
    /// Starts to listen for the signals that stop a server. From now on they do not end the process by themselves.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn of_server() -> Result<Self> {
        Self::listen(|stop| stop == StopSignal::Hangup && stop.is_ignored())
    }

    /// The same for a client command, which no ignored signal stops.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn of_client() -> Result<Self> {
        Self::listen(StopSignal::is_ignored)
    }

    fn listen(is_left_out: impl Fn(StopSignal) -> bool) -> Result<Self> {
        let heard = StopSignal::ALL.into_iter().filter(|stop| !is_left_out(*stop));
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
