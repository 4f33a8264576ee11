//! [`Supervisor`]: reports to the process that started the server, as datagrams on a socket.
//!
//! A report never delays the server for long. Reports that are sent once (ready, stopping, reloading) wait up to
//! [`SEND_LIMIT`] for room in the socket. Repeated reports (status and signs of life) are dropped if there is no room.

use rustix::net::{SendFlags, send};
use sd_notify::NotifyState;
use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// How long a report may wait for a supervisor that does not read.
const SEND_LIMIT: Duration = Duration::from_secs(1);
/// Maximum length of the status line in bytes. It is displayed in one line, and errors can be long.
const MAX_STATUS: usize = 512;

/// The connection to the supervisor, if there is one. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Supervisor {
    socket: Option<Arc<UnixDatagram>>,
    /// Why there is no connection, although a supervisor was announced.
    problem: Option<Arc<str>>,
    is_stopping: Arc<AtomicBool>,
}

impl Supervisor {
    /// Connects to the socket with this name, which is a path, or an abstract name that starts with `@`.
    pub(crate) fn connect(name: Option<OsString>) -> Self {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Self::default() };
        match connect(&name) {
            Ok(socket) => Self { socket: Some(Arc::new(socket)), ..Self::default() },
            Err(error) => Self {
                problem: Some(format!("{} (NOTIFY_SOCKET): {error}", name.display()).into()),
                ..Self::default()
            },
        }
    }

    /// Why the supervisor, which expects reports, cannot receive any.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Whether there is a supervisor that expects reports.
    pub(crate) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// Reports that requests are answered from now on, or that a reload has ended.
    pub(crate) fn ready(&self) {
        // A reload may end after the shutdown has begun.
        if !self.is_stopping.load(Ordering::Relaxed) {
            self.tell(&[NotifyState::Ready]);
        }
    }

    /// Reports that the configuration is being read again. [`Supervisor::ready`] reports the end, whether the reload
    /// succeeded or not.
    pub(crate) fn reloading(&self) {
        if self.is_stopping.load(Ordering::Relaxed) {
            return;
        }
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            // A supervisor that requires the time would otherwise end the server.
            Err(_) => self.status("reloading"),
        }
    }

    /// Reports that the server begins its shutdown.
    pub(crate) fn stopping(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.tell(&[NotifyState::Stopping]);
    }

    /// Reports the status line, which the supervisor displays to people.
    pub(crate) fn status(&self, text: &str) {
        self.mention(&[NotifyState::Status(&self.line(text))]);
    }

    /// Reports that the server is alive, with its status line.
    pub(crate) fn alive(&self, text: &str) {
        self.mention(&[NotifyState::Watchdog, NotifyState::Status(&self.line(text))]);
    }

    fn line(&self, text: &str) -> String {
        let stage = if self.is_stopping.load(Ordering::Relaxed) { "shutting down: " } else { "" };
        let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut line = format!("{stage}{line}");
        while line.len() > MAX_STATUS {
            line.pop();
        }
        line
    }

    /// Sends a report that is not repeated. If the supervisor is gone, the server goes on.
    fn tell(&self, states: &[NotifyState<'_>]) {
        if let Some(socket) = &self.socket {
            let _ = socket.send(message(states).as_bytes());
        }
    }

    /// Sends a report that is repeated later, without waiting.
    fn mention(&self, states: &[NotifyState<'_>]) {
        if let Some(socket) = &self.socket {
            let _ = send(socket, message(states).as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

fn message(states: &[NotifyState<'_>]) -> String {
    states.iter().map(|state| format!("{state}\n")).collect()
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(SEND_LIMIT))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn reports_arrive_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("@gorego-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name[1..]).unwrap();
        for (socket, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str()),
            (UnixDatagram::bind_addr(&address).unwrap(), OsStr::new(&abstract_name)),
        ] {
            let supervisor = Supervisor::connect(Some(name.to_owned()));
            assert!(supervisor.is_there() && supervisor.problem().is_none());
            supervisor.ready();
            assert_eq!(received(&socket), "READY=1\n");
            supervisor.alive("3 of 8");
            assert_eq!(received(&socket), "WATCHDOG=1\nSTATUS=3 of 8\n");
            supervisor.reloading();
            let reloading = received(&socket);
            assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
            supervisor.stopping();
            assert_eq!(received(&socket), "STOPPING=1\n");
            // Neither the end of the reload nor another one is reported after the shutdown has begun.
            supervisor.ready();
            supervisor.reloading();
            supervisor.status("a\nb");
            assert_eq!(
                received(&socket),
                "STATUS=shutting down: a b\n",
                "a line break would begin another field"
            );
        }
    }

    #[test]
    fn a_status_is_cut_between_two_characters() {
        let line = Supervisor::default().line(&"ü".repeat(MAX_STATUS));
        assert_eq!(line, "ü".repeat(MAX_STATUS / 2));
        let line = Supervisor::default().line(&format!("x{}", "ü".repeat(MAX_STATUS)));
        assert_eq!(line.len(), MAX_STATUS - 1);
    }

    #[test]
    fn without_a_supervisor_reports_go_nowhere_and_one_that_is_not_there_is_named() {
        Supervisor::connect(None).ready();
        Supervisor::connect(Some(OsString::new())).ready();
        let gone = Supervisor::connect(Some("/nonexistent/notify".into()));
        gone.ready();
        assert!(gone.problem().unwrap().contains("/nonexistent/notify"));
    }

    #[test]
    fn signs_of_life_do_not_wait_for_a_supervisor_that_does_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let _socket = UnixDatagram::bind(&path).unwrap();
        let supervisor = Supervisor::connect(Some(path.into()));
        let begin = std::time::Instant::now();
        // More than the queue of a socket holds.
        (0..2_000).for_each(|_| supervisor.alive("waiting"));
        assert!(begin.elapsed() < SEND_LIMIT, "{:?}", begin.elapsed());
    }
}
