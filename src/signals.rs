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
use tokio::{
    runtime::Handle,
    select,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};

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

/// The signals that a process listens for.
pub(crate) struct StopSignals {
    arrivals: Vec<(StopSignal, Signal)>,
    /// A signal that was received and has not had its effect yet.
    put_back: Option<StopSignal>,
}

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
        Ok(Self { arrivals: heard.map(listen).collect::<Result<_>>()?, put_back: None })
    }

    /// Receives a signal again with the next call of [`StopSignals::next`].
    pub(crate) fn put_back(&mut self, signal: StopSignal) {
        self.put_back = Some(signal);
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> StopSignal {
        if let Some(signal) = self.put_back.take() {
            return signal;
        }
        let arrivals = self.arrivals.iter_mut().map(|(stop, arrivals)| async move {
            arrivals.recv().await;
            *stop
        });
        match arrivals.collect::<FuturesUnordered<_>>().next().await {
            Some(stop) => stop,
            None => std::future::pending().await,
        }
    }
}

/// Watches for signals while a server starts, which can take seconds. A signal to stop takes effect at once. A request
/// to read the configuration again waits for the end of the start.
pub(crate) struct StartWatch {
    watching: JoinHandle<StopSignals>,
    has_started: oneshot::Sender<()>,
}

impl StartWatch {
    /// Watches on this runtime. `stop` is called with a signal to stop.
    pub(crate) fn begin(
        mut signals: StopSignals,
        runtime: &Handle,
        stop: impl Fn(StopSignal) + Send + 'static,
    ) -> Self {
        let (has_started, mut started) = oneshot::channel();
        let watching = runtime.spawn(async move {
            let mut must_reload = false;
            loop {
                select! {
                    _ = &mut started => break,
                    signal = signals.next() => match signal {
                        StopSignal::Reload => must_reload = true,
                        signal => stop(signal),
                    }
                }
            }
            if must_reload {
                signals.put_back(StopSignal::Reload);
            }
            signals
        });
        Self { watching, has_started }
    }

    /// Ends the watch. Later signals are for the caller.
    ///
    /// # Errors
    /// `Internal` if the watch has panicked.
    pub(crate) async fn end(self) -> Result<StopSignals> {
        drop(self.has_started);
        self.watching.await.map_err(|_| Error::internal("the watch for signals panicked"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal as Raised, getpid, kill_process};
    use std::time::Duration;
    use tokio::{sync::mpsc, time::timeout};

    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_signal_to_stop_works_during_a_start_and_a_reload_waits_for_its_end() {
        let signals = StopSignals::listen([StopSignal::Reload, StopSignal::Terminate].into_iter()).unwrap();
        let (stop, mut stops) = mpsc::channel(1);
        let watch =
            StartWatch::begin(signals, &Handle::current(), move |signal| stop.try_send(signal).unwrap());
        kill_process(getpid(), Raised::HUP).unwrap();
        kill_process(getpid(), Raised::TERM).unwrap();
        assert_eq!(timeout(PATIENCE, stops.recv()).await.unwrap(), Some(StopSignal::Terminate));
        let mut signals = watch.end().await.unwrap();
        assert_eq!(timeout(PATIENCE, signals.next()).await.unwrap(), StopSignal::Reload);
        // It is received once.
        assert!(timeout(Duration::from_millis(20), signals.next()).await.is_err());
    }
}
