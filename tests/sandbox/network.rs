//! Actions with their own network (`network = "on"`): the addresses that they can and cannot reach.
//!
//! Each test runs in its own network and mount namespace, which stands for the machine. A second network namespace
//! stands for the internet. So nothing outside of the test is needed or touched.

use crate::{Host, processes_with, support::*, with_each};
use gorego_reapi::proto::reapi;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

/// The port of every server of these tests.
const PORT: u16 = 7777;
/// Name of an abstract socket of the machine.
const ABSTRACT: &str = "gorego-network-test";
/// A part of the command line of a gateway process.
const PASTA: &str = "--config-net --ns-ifname";

/// The machine: `wan` leads to the internet, and the machine has other addresses. Its /dev/net/tun is open to all, as
/// udev makes it, and its name server listens on the loopback interface.
const MACHINE: &str = "
    mount --make-rprivate /
    ip link set lo up
    ip link add wan type veth peer name internet netns $INTERNET
    ip address add 198.51.100.2/24 dev wan
    ip address add 172.31.7.1/24 dev wan
    ip address add 169.254.7.1/16 dev wan
    ip address add fd00:7::2/64 dev wan nodad 2>/dev/null || true
    ip link set wan up
    ip route add default via 198.51.100.1
    ip route add default via fd00:7::1 2>/dev/null || true
    mkdir -p /dev/net
    mount -t tmpfs tun /dev/net
    mknod -m 666 /dev/net/tun c 10 200
    echo nameserver 127.0.0.53 > $SCRATCH/resolv.conf
    mount --bind $SCRATCH/resolv.conf $(readlink -f /etc/resolv.conf)
";
/// The internet: a host with addresses of both kinds, and a metadata service on the link of the machine.
const INTERNET: &str = "
    ip link set lo up
    ip address add 198.51.100.1/24 dev internet
    ip address add 198.51.100.10/32 dev lo
    ip address add 169.254.169.254/16 dev internet
    ip address add fd00:7::1/64 dev internet nodad 2>/dev/null || true
    ip address add fd00:8::10/128 dev lo nodad 2>/dev/null || true
    ip link set internet up
";

/// What an action runs: `perl -e TALK KIND ADDRESS PORT [DEVICE]` prints what the server at this address says. With a
/// device, the socket is bound to it and no route is followed.
const TALK: &str = r#"
    use Socket qw(:all);
    my ($kind, $address, $port, $device) = @ARGV;
    my $v6 = $address =~ /:/;
    socket(my $socket, $v6 ? AF_INET6 : AF_INET, $kind eq "tcp" ? SOCK_STREAM : SOCK_DGRAM, 0) or die "socket: $!\n";
    my $patience = $device ? 1 : 5;
    setsockopt($socket, SOL_SOCKET, $_, pack("qq", $patience, 0)) or die "timeout: $!\n" for SO_SNDTIMEO, SO_RCVTIMEO;
    setsockopt($socket, SOL_SOCKET, 25, "$device\0") or die "device: $!\n" if $device;
    my $to = $v6 ? pack_sockaddr_in6($port, inet_pton(AF_INET6, $address)) : pack_sockaddr_in($port, inet_aton($address));
    connect($socket, $to) or die "connect: $!\n";
    send($socket, "hello", MSG_NOSIGNAL) or die "send: $!\n";
    defined(recv($socket, my $answer, 100, 0)) or die "receive: $!\n";
    print $answer;
"#;

fn missing(program: &str) -> bool {
    let found =
        Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status();
    !found.unwrap().success()
}

/// Runs a test on its own machine and in its own thread, because other tests must not get its namespaces.
fn on_own_machine(test: impl AsyncFnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can make a network to test with");
    }
    if let Some(program) = ["pasta", "ip", "perl"].into_iter().find(|program| missing(program)) {
        return eprintln!("skipped: {program} is not installed");
    }
    let machine = thread::spawn(move || {
        let scratch = tempfile::tempdir().unwrap();
        // SAFETY: no flag stops the sharing of descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
        let (from_internet, to_internet) = start_internet();
        let namespace = from_internet.recv().unwrap();
        setup(MACHINE, &[("INTERNET", &namespace), ("SCRATCH", scratch.path().to_str().unwrap())]);
        to_internet.send(()).unwrap();
        from_internet.recv().unwrap();
        for address in ["127.0.0.1", "::1", "198.51.100.2", "172.31.7.1", "169.254.7.1", "fd00:7::2"] {
            serve(address, &format!("the machine at {address}"));
        }
        serve_names();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
        drop(to_internet);
    });
    if let Err(panic) = machine.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Starts a thread with its own network namespace. It first sends the path of the namespace. When it is told that the
/// machine is connected to it, it brings the internet up, and sends an empty text when that is done.
fn start_internet() -> (mpsc::Receiver<String>, mpsc::Sender<()>) {
    let (to_test, from_internet) = mpsc::channel();
    let (to_internet, from_test) = mpsc::channel();
    thread::spawn(move || {
        // SAFETY: no flag stops the sharing of descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        let thread = rustix::thread::gettid().as_raw_pid();
        to_test.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id())).unwrap();
        from_test.recv().unwrap();
        setup(INTERNET, &[]);
        for address in ["198.51.100.10", "fd00:8::10", "169.254.169.254"] {
            serve(address, &format!("the internet at {address}"));
        }
        to_test.send(String::new()).unwrap();
        // The namespace exists for as long as this thread does.
        let _ = from_test.recv();
    });
    (from_internet, to_internet)
}

fn setup(script: &str, variables: &[(&str, &str)]) {
    let mut shell = Command::new("sh");
    let status = shell.args(["-e", "-c", script]).envs(variables.iter().copied()).status().unwrap();
    assert!(status.success(), "{script}");
}

/// Serves a text over TCP and UDP at an address of this thread's network, if it has the address. Without IPv6 it does
/// not.
fn serve(address: &str, text: &str) {
    let ip: std::net::IpAddr = address.parse().unwrap();
    let (Ok(tcp), Ok(udp)) = (TcpListener::bind((ip, PORT)), UdpSocket::bind((ip, PORT))) else {
        assert!(ip.is_ipv6(), "{address} does not exist");
        return;
    };
    let (over_tcp, over_udp) = (text.to_owned(), text.to_owned());
    thread::spawn(move || {
        for mut peer in tcp.incoming().flatten() {
            // A connection that is closed with unread bytes is reset.
            let _ = peer.read(&mut [0; 100]).and_then(|_| peer.write_all(over_tcp.as_bytes()));
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((_, peer)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(over_udp.as_bytes(), peer);
        }
    });
}

/// A name server on the loopback interface. It gives every name the address of the internet's host.
fn serve_names() {
    let socket = UdpSocket::bind(("127.0.0.53", 53)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            // A question ends with the empty label, its type and its class.
            let Some(end) = buffer[12..length].iter().position(|byte| *byte == 0).map(|at| 12 + at + 5)
            else {
                continue;
            };
            let mut answer = [&buffer[..2], &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0], &buffer[12..end]].concat();
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 10]);
            let _ = socket.send_to(&answer, peer);
        }
    });
}

/// A command that talks to a server.
fn talk(kind: &str, address: &str, device: Option<&str>) -> reapi::Command {
    let port = PORT.to_string();
    let words = ["perl", "-e", TALK, kind, address, &port].into_iter().chain(device);
    reapi::Command { arguments: words.map(str::to_owned).collect(), ..sh("") }
}

/// The digest of an action that asks for a network.
async fn asking(host: &Host, command: reapi::Command) -> gorego_reapi::digest::Digest {
    let network = reapi::platform::Property { name: "network".into(), value: "on".into() };
    let change = |action: &mut reapi::Action| {
        action.platform = Some(reapi::Platform { properties: vec![network] });
        action.do_not_cache = true;
    };
    host.client.action_with(command, empty(), change).await
}

/// Exit code, standard output and standard error of an action that asks for a network.
async fn with_network(host: &Host, command: reapi::Command) -> (i32, String, String) {
    let response = host.client.run(asking(host, command).await).await;
    let result = response.result.unwrap_or_else(|| panic!("{:?}", response.status));
    let did = host.did(&result).await;
    (did.exit_code, did.stdout, did.stderr)
}

const ON: &[(&str, &str)] = &[("EXECUTION__SANDBOX__NETWORK", "on"), ("EXECUTION__CONCURRENCY", "1")];

#[test]
fn an_action_with_a_network_reaches_other_machines_and_not_this_one() {
    on_own_machine(async || {
        let address = {
            use std::os::linux::net::SocketAddrExt as _;
            std::os::unix::net::SocketAddr::from_abstract_name(ABSTRACT).unwrap()
        };
        let _abstract = UnixListener::bind_addr(&address).unwrap();
        let has_v6 = Path::new("/proc/net/if_inet6").exists();
        with_each(ON, async |host| {
            assert!(host.server.started()["sandbox"].as_str().unwrap().ends_with("gateway"));
            let internet = ["198.51.100.10", "fd00:8::10"].into_iter().filter(|ip| has_v6 || !ip.contains(':'));
            for (kind, ip) in internet.flat_map(|ip| [("tcp", ip), ("udp", ip)]) {
                let (exit, said, error) = with_network(host, talk(kind, ip, None)).await;
                assert_eq!((exit, &*said), (0, &*format!("the internet at {ip}")), "{kind} {error}");
            }
            let machine =
                ["127.0.0.1", "::1", "198.51.100.2", "172.31.7.1", "169.254.7.1", "fd00:7::2", "169.254.169.254"];
            for (kind, ip) in machine.into_iter().flat_map(|ip| [("tcp", ip), ("udp", ip)]) {
                // A socket that is bound to the interface bypasses the routes.
                for device in [None, Some("eth0")] {
                    let (exit, said, _) = with_network(host, talk(kind, ip, device)).await;
                    assert_ne!(exit, 0, "{kind} {ip} {device:?}: {said}");
                }
            }
            // A connection to an excluded address fails at once, so that programs that look for metadata do not wait.
            let (_, _, error) = with_network(host, talk("tcp", "169.254.169.254", None)).await;
            assert!(error.contains("No route to host") || error.contains("unreachable"), "{error}");
            let connect = format!(
                "perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un(\"\\0{ABSTRACT}\")) or die $!'"
            );
            assert_ne!(with_network(host, sh(&connect)).await.0, 0);
            // An action that does not ask for a network has none, even in the same pool.
            let did = host.run_command(talk("tcp", "198.51.100.10", None)).await;
            assert!(did.exit_code != 0 && did.stderr.contains("unreachable"), "{}", did.stderr);
            assert!(!host.says("ls /etc").await.contains("resolv.conf"));
        })
        .await;
    });
}

#[test]
fn an_action_with_a_network_resolves_names_and_cannot_change_its_network() {
    on_own_machine(async || {
        with_each(ON, async |host| {
            let (exit, said, error) = with_network(host, sh("getent ahostsv4 server.example")).await;
            assert!(exit == 0 && said.starts_with("198.51.100.10 "), "{said}{error}");
            if host.is_root {
                let limits = "cat /proc/sys/kernel/shmall /proc/sys/kernel/msgmni";
                let without = host.says(limits).await;
                let (_, with, error) = with_network(host, sh(limits)).await;
                assert_eq!(with.trim(), without.trim(), "{error}");
                assert!(with.trim().ends_with("\n1000"), "{with}");
            }
            // The result is the same on every machine.
            let (_, said, _) =
                with_network(host, sh("cat /etc/resolv.conf; cat /proc/net/route | wc -l")).await;
            assert!(said.starts_with("nameserver 203.0.113.53\n"), "{said}");
            let change = "perl -MSocket -e 'socket(S, AF_INET, SOCK_DGRAM, 0); \
                          my $request = pack(\"a16s\", \"eth0\", 0); ioctl(S, 0x8914, $request) or die $!'";
            let (exit, _, error) = with_network(host, sh(change)).await;
            assert!(exit != 0 && error.contains("not permitted"), "{error}");
            // Neither the helper nor the device is visible.
            let (_, said, _) = with_network(host, sh("cat /proc/[0-9]*/comm; ls /dev/net 2>&1; true")).await;
            assert!(
                !said.contains("pasta") && !said.contains("passt") && said.contains("No such file"),
                "{said}"
            );
        })
        .await;
    });
}

/// The processes of gateways in this test's network namespace.
fn gateways() -> usize {
    let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let is_own = |line: &&String| {
        let pid = line.split(':').next().unwrap();
        // The gateway is outside of the cell, so it is in the network namespace of the machine.
        fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| namespace == own)
    };
    processes_with(PASTA).iter().filter(is_own).count()
}

/// The processes below this one that have ended and were not reaped, without the cells that have just ended.
fn zombies(server: u32) -> usize {
    let has_parent = |status: &str, parent: u32| status.contains(&format!("\nPPid:\t{parent}\n"));
    let statuses: Vec<_> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|process| fs::read_to_string(process.path().join("status")).ok())
        .collect();
    let runners = statuses.iter().filter(|status| has_parent(status, server));
    let runners: Vec<u32> = runners
        .filter_map(|status| status.split("\nPid:\t").nth(1)?.split('\n').next()?.parse().ok())
        .collect();
    let is_left = |status: &&String| {
        status.contains("\nState:\tZ")
            && status.starts_with("Name:\tpas")
            && runners.iter().any(|runner| has_parent(status, *runner))
    };
    statuses.iter().filter(is_left).count()
}

#[test]
fn no_gateway_outlives_its_action_or_the_server() {
    on_own_machine(async || {
        with_each(ON, async |host| {
            assert_eq!(gateways(), 0, "no action has asked for one");
            // The next cell is prepared while the action runs.
            let (exit, ..) = with_network(host, sh("sleep 0.2")).await;
            assert_eq!(exit, 0);
            eventually("only the gateway of the next cell is left", || gateways() == 1).await;
            for _ in 0..3 {
                with_network(host, sh("(setsid sleep 1000 &) ; true")).await;
            }
            eventually("only the gateway of the next cell is left", || gateways() <= 1).await;
            // pasta leaves processes that it has not waited for.
            eventually("nothing is left unreaped", || zombies(host.server.pid()) == 0).await;
            let running = host.client.start(asking(host, sh(": in-a-network; sleep 1000")).await).await;
            eventually("the action runs", || !processes_with(": in-a-network").is_empty()).await;
            assert!(gateways() >= 1);
            host.server.signal("KILL");
            eventually("the gateways are gone", || gateways() == 0).await;
            eventually("the action is gone", || processes_with(": in-a-network").is_empty()).await;
            drop(running);
        })
        .await;
    });
}

/// The filter of a prepared cell was made before the machine got this address.
#[test]
fn a_new_address_of_the_machine_is_excluded_too() {
    on_own_machine(async || {
        with_each(ON, async |host| {
            with_network(host, sh("sleep 0.2")).await;
            eventually("a cell is prepared", || gateways() == 1).await;
            let address = if host.is_root { "172.31.8.1" } else { "172.31.9.1" };
            setup(&format!("ip address add {address}/24 dev wan"), &[]);
            serve(address, "the machine");
            for device in [None, Some("eth0")] {
                let (exit, said, _) = with_network(host, talk("udp", address, device)).await;
                assert_ne!(exit, 0, "{said}");
            }
        })
        .await;
    });
}

/// Without a way out, the helper refuses to start. A server that requires everything does so too; another one does not
/// offer a network, and says why.
#[test]
fn a_network_that_does_not_work_is_not_offered_and_the_start_says_why() {
    on_own_machine(async || {
        setup("ip route del default; ip -6 route del default 2>/dev/null || true", &[]);
        let auto = [("EXECUTION__SANDBOX__NETWORK", "on"), ("EXECUTION__SANDBOX__MODE", "auto")];
        let host = Host::of(server::Server::with(&auto).await, true).await;
        let log = host.server.log();
        let missing = log.iter().find(|event| event["event"] == "protection_missing").unwrap();
        assert_eq!(missing["protection"], "gateway");
        assert!(missing["remedy"].as_str().unwrap().contains("default route"), "{missing}");
        let action = asking(&host, sh("true")).await;
        let refused = host.client.start_request(host.client.request(action)).await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("execution.sandbox.network"), "{}", refused.message());
        assert_eq!(host.says("echo fine").await, "fine");

        let store = tempfile::tempdir().unwrap();
        let mut serve = server::command(store.path());
        serve
            .env("GOREGO_EXECUTION__SANDBOX__NETWORK", "on")
            .env("GOREGO_EXECUTION__SANDBOX__MODE", "required");
        let output = serve.stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("gateway is off"), "{said}");
    });
}
