//! A server under a supervisor: readiness, signs of life, inherited sockets. The test plays systemd (sd_notify(3) and
//! sd_listen_fds(3)).

use crate::support::{PATIENCE, Server, command, empty, sh};
use std::{
    collections::BTreeSet,
    fs,
    net::{TcpListener, UdpSocket},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{net::UnixDatagram, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// The number of the first inherited descriptor.
const FIRST: i32 = 3;

/// The supervisor's end of the reports.
struct Reports {
    socket: UnixDatagram,
    path: PathBuf,
    _directory: TempDir,
}

impl Reports {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path, _directory: directory }
    }

    /// The next report that has this field.
    fn next_with(&self, field: &str) -> String {
        let mut bytes = [0; 4096];
        loop {
            let length = self.socket.recv(&mut bytes).unwrap_or_else(|error| panic!("no {field}: {error}"));
            let report = String::from_utf8(bytes[..length].to_vec()).unwrap();
            if report.lines().any(|line| line.starts_with(field)) {
                return report;
            }
        }
    }
}

/// The command with which a supervisor starts `gorego serve` with these sockets.
fn supervised(store: &Path, reports: &Reports, sockets: Vec<(&str, OwnedFd)>) -> Command {
    let serve = command(store);
    let mut shell = Command::new("sh");
    // The shell becomes the server, with the process id that it has seen.
    shell.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]).arg(serve.get_program()).args(serve.get_args());
    shell.env_clear().envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.stdin(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let names: Vec<_> = sockets.iter().map(|(name, _)| *name).collect();
    shell.env("NOTIFY_SOCKET", &reports.path);
    if !sockets.is_empty() {
        shell.env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    }
    // These numbers must not collide with the numbers in the child.
    let sockets: Vec<_> =
        sockets.into_iter().map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, FIRST + 8).unwrap()).collect();
    let place = move || {
        for (fd, number) in sockets.iter().zip(FIRST..) {
            // SAFETY: dup2 may be called between fork and exec, and no code there owns these numbers.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only calls dup2.
    unsafe { shell.pre_exec(place) };
    shell
}

fn listener() -> (OwnedFd, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener.into(), address)
}

/// The exit code and the log of a server that does not start.
fn failed(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn a_supervisor_hears_of_the_start_of_life_of_a_reload_and_of_the_stop() {
    let (reports, store) = (Reports::new(), Arc::new(tempfile::tempdir().unwrap()));
    let mut serve = supervised(store.path(), &reports, Vec::new());
    serve.env("WATCHDOG_USEC", "300000").env("GOREGO_EXECUTION__CONCURRENCY", "2");
    let mut server = Server::spawn(serve, store);
    assert_eq!(reports.next_with(""), "STATUS=opening the store\n", "the first report");
    assert_eq!(reports.next_with("READY=1"), "READY=1\n");
    let client = server.client().await;
    for _ in 0..3 {
        let report = reports.next_with("WATCHDOG=1");
        assert!(report.contains("\nSTATUS=0 of 2 slots busy, 0 actions queued, "), "{report}");
    }
    let mut run = client.start(client.action(sh("sleep 7461"), empty()).await).await;
    run.until(|operation| crate::support::metadata(operation).stage == 3).await;
    while !reports.next_with("WATCHDOG=1").contains("STATUS=1 of 2 slots busy") {}
    server.signal("HUP");
    assert!(reports.next_with("RELOADING=1").contains("\nMONOTONIC_USEC="));
    reports.next_with("READY=1");
    server.signal("TERM");
    reports.next_with("STOPPING=1");
    assert!(reports.next_with("WATCHDOG=1").contains("STATUS=shutting down: 1 of 2 slots busy"));
    drop((run, client));
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_server_serves_on_the_sockets_of_its_supervisor_and_no_child_inherits_them() {
    let (reports, store) = (Reports::new(), Arc::new(tempfile::tempdir().unwrap()));
    let ((grpc, grpc_address), (http, http_address)) = (listener(), listener());
    let inodes: BTreeSet<_> = [&grpc, &http].map(|fd| rustix::fs::fstat(fd).unwrap().st_ino).into();
    // Clients need not wait for the server.
    let mut early = TcpStream::connect(&grpc_address).await.unwrap();
    let server =
        Server::spawn(supervised(store.path(), &reports, vec![("http", http), ("grpc", grpc)]), store);
    assert_eq!(server.address(), grpc_address, "and not what the command line says");
    tokio::io::AsyncReadExt::read_u8(&mut early).await.unwrap();
    let (method, path) = ("GET /healthz HTTP/1.1", "host: localhost\r\nconnection: close");
    let mut http = TcpStream::connect(&http_address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut http, format!("{method}\r\n{path}\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut http, &mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // An action, so that there is a runner.
    let client = server.client().await;
    let mut run = client.start(client.action(sh("sleep 7462"), empty()).await).await;
    run.until(|operation| crate::support::metadata(operation).stage == 3).await;
    let children = descendants(server.pid());
    assert!(children.len() >= 2, "a runner and its command: {children:?}");
    for child in children {
        let open: BTreeSet<_> = sockets_of(child);
        assert!(open.is_disjoint(&inodes), "process {child} has a socket of the supervisor");
        let environment = fs::read_to_string(format!("/proc/{child}/environ")).unwrap_or_default();
        assert!(!environment.contains("LISTEN_") && !environment.contains("NOTIFY_SOCKET"), "{environment}");
    }
    assert!(sockets_of(server.pid()).is_superset(&inodes));
}

#[tokio::test]
async fn a_socket_that_cannot_be_served_on_is_an_error_that_the_supervisor_hears() {
    let udp = || OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
    let everywhere = || OwnedFd::from(TcpListener::bind("0.0.0.0:0").unwrap());
    for (socket, part) in [
        (("grpc", udp()), "is not a stream socket"),
        (("gorego.socket", listener().0), "FileDescriptorName="),
        // The rule for addresses holds for sockets too.
        (("grpc", everywhere()), "is not a loopback address"),
        (("http", everywhere()), "socket \\\"http\\\" of the supervisor"),
    ] {
        let (reports, store) = (Reports::new(), tempfile::tempdir().unwrap());
        let (code, log) = failed(supervised(store.path(), &reports, vec![socket]));
        assert_eq!(code, Some(2), "{log}");
        assert!(log.contains(part), "{part} is not in {log}");
        let status = reports.next_with("STATUS=");
        assert!(status.contains(&part.replace('\\', "")), "{part} is not in {status}");
    }
}

/// All processes below one.
fn descendants(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    children.iter().flat_map(|child| [vec![*child], descendants(*child)].concat()).collect()
}

/// The inodes of the sockets that a process has open.
fn sockets_of(pid: u32) -> BTreeSet<u64> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let inode = |target: PathBuf| target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    targets.filter_map(inode).collect()
}
