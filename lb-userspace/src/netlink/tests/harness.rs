//! Network namespaces, and what is heard and seen in them.

use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc as blocking;
use std::thread::JoinHandle;
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::super::*;
use super::PATIENCE;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, kept by a thread of its own in which jobs run. It ends with the value.
pub(super) struct Namespace {
    path: PathBuf,
    jobs: Option<blocking::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    pub(super) fn new() -> Self {
        let (jobs, receiver) = blocking::channel::<Job>();
        let (path_sender, path) = blocking::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; this test needs root");
            let thread = fs::read_link("/proc/thread-self").unwrap();
            path_sender.send(Path::new("/proc").join(thread).join("ns/net")).unwrap();
            for job in receiver {
                job();
            }
        });
        let path = path.recv().expect("the namespace's thread");
        let namespace = Self { path, jobs: Some(jobs), thread: Some(thread) };
        namespace.ip("link set lo up");
        namespace
    }

    pub(super) fn run<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        let (sender, result) = blocking::channel();
        let job = Box::new(move || sender.send(job()).unwrap());
        self.jobs.as_ref().unwrap().send(job).unwrap();
        result.recv().expect("the job panicked")
    }

    /// Runs ip(8) inside.
    pub(super) fn ip(&self, arguments: &'static str) {
        self.run(move || ip(arguments));
    }

    /// Runs a future inside, on a runtime of its own.
    pub(super) fn block_on<F: Future<Output = ()>>(
        &self,
        make: impl FnOnce() -> F + Send + 'static,
    ) {
        self.run(move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().unwrap().block_on(make());
        });
    }

    /// What comes in by `interface` from now on.
    pub(super) fn capture(&self) -> Capture {
        let descriptor = self.run(|| {
            let kind = SockType::Raw;
            let flags = SockFlag::SOCK_CLOEXEC;
            socket(AddressFamily::Packet, kind, flags, SockProtocol::EthAll).unwrap()
        });
        setsockopt(&descriptor, sockopt::ReceiveTimeout, &TimeVal::seconds(1)).unwrap();
        Capture(descriptor)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        let ended = self.thread.take().expect("dropped once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "a job panicked");
    }
}

/// Runs ip(8) in the namespace of the calling thread.
pub(super) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
}

pub(super) struct Capture(std::os::fd::OwnedFd);

impl Capture {
    /// Waits for a frame that starts with `start` after the two hardware addresses.
    pub(super) fn expect(&self, what: &str, start: &[u8]) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            if let Ok(length) = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())
                && buffer[12..length].starts_with(start)
            {
                return buffer[..length].to_vec();
            }
        }
        panic!("no {what} seen");
    }
}

/// A machine with `eth0` (10.0.0.1/24, 2001:db8::1/64) and a neighbour on it with `peer0`
/// (10.0.0.2/24, 2001:db8::2/64).
pub(super) struct Segment {
    machine: Namespace,
    neighbour: Namespace,
}

impl Segment {
    pub(super) fn new() -> Self {
        let machine = Namespace::new();
        let neighbour = Namespace::new();
        machine.ip("link add eth0 address 02:00:00:00:00:01 type veth \
                    peer name peer0 address 02:00:00:00:00:02");
        let path = neighbour.path.display().to_string();
        machine.run(move || ip(&format!("link set peer0 netns {path}")));
        // The kernel's own link-local addresses become usable seconds later, when a test expects
        // no more changes. Without any it solicits no neighbours.
        machine.ip("link set eth0 addrgenmode none");
        machine.ip("address add fe80::1/64 dev eth0 nodad");
        machine.ip("address add 10.0.0.1/24 dev eth0");
        machine.ip("address add 2001:db8::1/64 dev eth0 nodad");
        machine.ip("link set eth0 up");
        neighbour.ip("link set peer0 addrgenmode none");
        neighbour.ip("address add fe80::2/64 dev peer0 nodad");
        neighbour.ip("address add 10.0.0.2/24 dev peer0");
        neighbour.ip("address add 2001:db8::2/64 dev peer0 nodad");
        neighbour.ip("link set peer0 up");
        Self { machine, neighbour }
    }
}

/// Runs `test` in the machine of a segment; the neighbour can be given jobs meanwhile.
pub(super) fn on_segment<F: Future<Output = ()>>(
    test: impl FnOnce(Namespace) -> F + Send + 'static,
) {
    let Segment { machine, neighbour } = Segment::new();
    machine.block_on(move || test(neighbour));
}

pub(super) struct Observer {
    pub(super) netlink: Netlink,
    pub(super) events: mpsc::Receiver<NetworkEvent>,
}

impl Observer {
    pub(super) fn start() -> Self {
        let (sender, events) = mpsc::channel(64);
        Self { netlink: Netlink::start(sender).unwrap(), events }
    }

    pub(super) async fn snapshot(&mut self) -> std::sync::Arc<Network> {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("a snapshot in time") {
                Some(NetworkEvent::Snapshot(network)) => return network,
                Some(NetworkEvent::RoutesChanged) => {}
                Some(NetworkEvent::Lost) | None => panic!("the observer ended"),
            }
        }
    }

    /// The first snapshot that `condition` holds for.
    pub(super) async fn until(
        &mut self,
        condition: impl Fn(&Network) -> bool,
    ) -> std::sync::Arc<Network> {
        let mut last = None;
        let search = async {
            loop {
                let network = self.snapshot().await;
                if condition(&network) {
                    return network;
                }
                last = Some(network);
            }
        };
        match timeout(PATIENCE, search).await {
            Ok(network) => network,
            Err(_) => panic!("no such snapshot; the last was {last:#?}"),
        }
    }

    /// Waits until `destination` is resolved to `mac`.
    pub(super) async fn resolved_to(&mut self, destination: &str, mac: [u8; 6]) -> NextHop {
        let destination: IpAddr = destination.parse().unwrap();
        let resolved = |network: &Network| match network.next_hops.get(&destination) {
            Some(Ok(next_hop)) if next_hop.destination_mac == mac => Some(*next_hop),
            _ => None,
        };
        resolved(&*self.until(|network| resolved(network).is_some()).await).unwrap()
    }

    /// Waits until `destination` is unresolved for `reason`.
    pub(super) async fn unresolved(&mut self, destination: &str, reason: Unresolved) {
        let destination: IpAddr = destination.parse().unwrap();
        self.until(|network| network.next_hops.get(&destination) == Some(&Err(reason))).await;
    }
}
