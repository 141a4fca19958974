//! A plain receiver of tunnels, for targets on kernels without `ipip` and `fou`.

use std::{
    collections::HashSet,
    ffi::c_char,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    os::fd::AsRawFd as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{IpNumber, NetSlice, SlicedPacket, TransportSlice};
use nix::libc;

use crate::{frames::PacketSocket, netns::Namespace, packets, scene::GUE_PORT};

const INTERFACE: &str = "tun0";
/// How long it takes at most to notice that it is to end.
const NAP: Duration = Duration::from_millis(100);

/// Takes outer headers off what comes in by a machine's `eth0`, and hands the kernel what is inside,
/// by a TUN device. Ends when it is dropped.
#[derive(Debug)]
pub struct Decapsulator {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What came through tunnels.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Source addresses of outer headers.
    pub sources: HashSet<IpAddr>,
    /// Source ports of outer UDP headers.
    pub ports: HashSet<u16>,
    /// Families: whether the inner, the outer header is IPv6.
    pub families: HashSet<(bool, bool)>,
    /// What is wrong with outer headers.
    pub faults: Vec<String>,
}

impl Decapsulator {
    /// Starts one on a machine.
    ///
    /// # Errors
    ///
    /// If the kernel has no TUN devices, or the machine has one already.
    pub fn start(machine: &Namespace) -> Result<Self> {
        let mut device = machine.run(open_tun)?;
        machine.ip(&format!("link set {INTERFACE} up"))?;
        for interface in ["all", INTERFACE] {
            // Clients are not behind it.
            machine.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")?;
        }
        let socket = PacketSocket::open(machine, "eth0")?;
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Relaxed) {
                let Ok(frame) = socket.receive(NAP, |frame| tunnelled(frame).is_some()) else {
                    continue;
                };
                let Some(tunnelled) = tunnelled(&frame) else { continue };
                shared.lock().expect("no panic").note(&tunnelled);
                // The kernel counts what it refuses; a test misses the packet.
                let _ = device.write(&tunnelled.inner);
            }
        });
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// What came so far.
    ///
    /// # Panics
    ///
    /// If its thread did.
    pub fn seen(&self) -> Seen {
        self.seen.lock().expect("no panic").clone()
    }
}

impl Drop for Decapsulator {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

/// A packet out of a tunnel.
struct Tunnelled {
    source: IpAddr,
    port: Option<u16>,
    inner: Vec<u8>,
    fault: Option<String>,
}

impl Seen {
    fn note(&mut self, tunnelled: &Tunnelled) {
        let inner_v6 = tunnelled.inner.first().is_some_and(|byte| byte >> 4 == 6);
        self.sources.insert(tunnelled.source);
        self.ports.extend(tunnelled.port);
        self.families.insert((inner_v6, tunnelled.source.is_ipv6()));
        self.faults.extend(tunnelled.fault.clone());
    }
}

/// What is inside of a frame, if it came through a tunnel.
fn tunnelled(frame: &[u8]) -> Option<Tunnelled> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, payload, fault): (IpAddr, _, _) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            let is_right = header.header_checksum == header.calc_header_checksum();
            let fault = (!is_right).then(|| format!("checksum of {header:?}"));
            (ip.header().source_addr().into(), ip.payload().clone(), fault)
        }
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.payload().clone(), None),
        NetSlice::Arp(_) => return None,
    };
    if let Some(TransportSlice::Udp(udp)) = packet.transport {
        let (port, inner) = (Some(udp.source_port()), udp.payload().to_vec());
        return (udp.destination_port() == GUE_PORT).then_some(Tunnelled {
            source,
            port,
            inner,
            fault,
        });
    }
    let is_ip = [IpNumber(4), IpNumber(41)].contains(&payload.ip_number);
    is_ip.then(|| Tunnelled { source, port: None, inner: payload.payload.to_vec(), fault })
}

/// Checks the checksums of a frame; if it came through a tunnel, those of what is inside, and of the
/// outer IP header.
///
/// # Errors
///
/// If one is wrong or missing, or the frame cannot be parsed.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let Some(tunnelled) = tunnelled(frame) else { return packets::verify_checksums(frame) };
    ensure!(tunnelled.fault.is_none(), "{:?}", tunnelled.fault);
    let is_v6 = tunnelled.inner.first().is_some_and(|byte| byte >> 4 == 6);
    let ether_type: [u8; 2] = if is_v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
    packets::verify_checksums(&[&[0; 12][..], &ether_type, &tunnelled.inner].concat())
}

/// Makes the device, in the namespace of the calling thread.
fn open_tun() -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let file = file.context("open /dev/net/tun")?;
    // SAFETY: all zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(INTERFACE.bytes()) {
        *place = byte as c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: the request outlives the call, which reads and writes nothing else.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "make {INTERFACE}: {}", io::Error::last_os_error());
    Ok(file)
}
