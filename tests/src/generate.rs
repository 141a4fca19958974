//! Random frames that have a lot to do with a [`Scene`]: its listeners, its targets, few clients.

use std::net::{IpAddr, SocketAddr};

use etherparse::{TcpHeader, UdpHeader};
use lb_common::flow::TCP;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{
    icmp::{Complaint, IcmpError},
    packets::{Checksum, Packet, Transport},
    progrun::DEVICES,
    scene::{Scene, VIPS},
};

/// Clients: with a route by each device, on the segment, without a route, not resolved.
const CLIENTS: [&str; 16] = [
    "192.0.10.1",
    "192.0.10.2",
    "192.0.11.1",
    "192.0.11.7",
    "192.0.12.1",
    "192.0.13.1",
    "10.0.10.1",
    "10.0.10.66",
    "198.18.0.1",
    "2001:db8:10::1",
    "2001:db8:10:0:ffff::2",
    "2001:db8:11::1",
    "2001:db8:12::1",
    "2001:db8:13::1",
    "fd00:10::1",
    "2001:db8:ffff::1",
];

/// The machine's own addresses that the agent did not add.
const LOCAL: [&str; 4] = ["10.0.10.2", "10.0.11.2", "fd00:10::2", "fd00:11::2"];

/// Ports of clients: few, so that flows are met again.
const PORTS: std::ops::Range<u16> = 1000..1006;

/// Ports that targets see: the first that are given out, and one that never is.
const SNAT_PORTS: std::ops::Range<u16> = 19_999..20_080;

/// What the ways of targets carry, bytes; the last is that of every device.
pub const MTUS: [u16; 5] = [60, 100, 576, 1280, 1500];

/// Makes frames; the same ones for the same seed and scene.
#[derive(Debug)]
pub struct Generator {
    rng: StdRng,
    listeners: Vec<(u8, SocketAddr)>,
    targets: Vec<(u8, SocketAddr)>,
    /// Targets that see another address as their client's.
    snat: Vec<(u8, SocketAddr, IpAddr)>,
}

impl Generator {
    /// A generator for a scene.
    pub fn new(seed: u64, scene: &Scene) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self {
            rng,
            listeners: scene.listeners(),
            targets: scene.ways_back(),
            snat: scene.snat_targets(),
        }
    }

    /// The source of chance, for what else a test leaves to it.
    pub fn rng(&mut self) -> &mut StdRng {
        &mut self.rng
    }

    /// A device of those that frames come in by, and a frame of at least 14 bytes.
    pub fn frame(&mut self) -> (u32, Vec<u8>) {
        let device = *DEVICES[..2].choose(&mut self.rng).expect("two devices");
        let mut frame = match self.rng.random_range(0..20) {
            0 => self.noise(),
            1 => self.other_protocol(),
            2 => self.icmp_error(),
            _ => self.transport_packet(),
        };
        if self.rng.random_ratio(1, 4) {
            for _ in 0..self.rng.random_range(1..3) {
                self.mutate(&mut frame);
            }
        }
        (device, frame)
    }

    fn transport_packet(&mut self) -> Vec<u8> {
        let (protocol, source, destination) = self.endpoints();
        let mut packet = match protocol {
            TCP => self.segment(source, destination),
            _ => Packet::udp(source, destination),
        };
        let rng = &mut self.rng;
        if rng.random_ratio(1, 40) {
            packet.destination_mac = *[[2, 0, 0, 0, 0, 3], [0xff; 6]].choose(rng).expect("two");
        }
        packet.hop_limit = *[64, 64, 64, 64, 64, 64, 64, 255, 2, 1, 0].choose(rng).expect("some");
        packet.checksum = match rng.random_range(0..12) {
            0 => Checksum::Wrong,
            1 => Checksum::Partial,
            2 => Checksum::Zero,
            _ => Checksum::Right,
        };
        for _ in 0..rng.random_range(0..6_u32).saturating_sub(3) {
            packet.vlans.push(rng.random_range(0..4096));
        }
        if source.is_ipv4() && rng.random_ratio(1, 10) {
            packet.ipv4_options = vec![1; 4 * rng.random_range(1..=10)];
        }
        let l3 = 14 + 4 * packet.vlans.len();
        let length = match self.rng.random_range(0..20) {
            // As large as some way, a byte less or more.
            0..2 => {
                let headers = packet.build().len() - l3;
                let mtu = MTUS.choose(&mut self.rng).expect("some");
                (usize::from(*mtu) + self.rng.random_range(0..3) - 1).saturating_sub(headers)
            }
            2..12 => self.rng.random_range(0..40),
            _ => 0,
        };
        packet.payload = (0..length).map(|_| self.rng.random()).collect();
        if protocol != TCP && self.rng.random_ratio(1, 8) {
            packet.payload.resize(self.rng.random_range(1198..1203), 0);
            packet.payload[..6].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8]);
        }
        let mut frame = packet.build();
        if source.is_ipv6() && self.rng.random_ratio(1, 6) {
            self.add_extensions(&mut frame, l3);
        }
        if self.rng.random_ratio(1, 4) {
            // Type of service or traffic class; and whether routers may fragment.
            frame[l3 + 1] = self.rng.random();
            if source.is_ipv4() {
                frame[l3 + 6] ^= 0x40;
            } else {
                frame[l3] = 0x60 | self.rng.random_range(0..16_u8);
            }
        }
        if !packet.vlans.is_empty() {
            frame[14] |= self.rng.random::<u8>() & 0xf0;
        }
        frame
    }

    fn segment(&mut self, source: SocketAddr, destination: SocketAddr) -> Packet {
        let rng = &mut self.rng;
        let mut header = TcpHeader::new(0, 0, rng.random(), rng.random());
        header.acknowledgment_number = rng.random();
        // Mostly what connections are made of, sometimes anything.
        let flags: u8 = *[0x02, 0x02, 0x10, 0x10, 0x10, 0x18, 0x12, 0x11, 0x04, 0x14, rng.random()]
            .choose(rng)
            .expect("some");
        header.fin = flags & 1 != 0;
        header.syn = flags & 2 != 0;
        header.rst = flags & 4 != 0;
        header.psh = flags & 8 != 0;
        header.ack = flags & 16 != 0;
        header.urg = flags & 32 != 0;
        if rng.random_ratio(1, 4) {
            header.set_options_raw(&vec![1; 4 * rng.random_range(1..=10)]).expect("up to 40 bytes");
        }
        let transport = Transport::Tcp(Box::new(header));
        Packet { transport, ..Packet::tcp(source, destination) }
    }

    /// Protocol, source and destination: from a client to a listener, back from a target, and what
    /// comes near it.
    fn endpoints(&mut self) -> (u8, SocketAddr, SocketAddr) {
        let (protocol, listener) = *self.listeners.choose(&mut self.rng).expect("a listener");
        let (from, target) = *self.targets.choose(&mut self.rng).expect("a target");
        match self.rng.random_range(0..20) {
            0..11 => (protocol, self.client(listener), listener),
            11..14 => (from, target, self.client(target)),
            14..16 => {
                let (from, target, source) = *self.snat.choose(&mut self.rng).expect("a target");
                (from, target, (source, self.rng.random_range(SNAT_PORTS)).into())
            }
            16 => (from, self.client(target), target),
            17 => {
                let vip = self.of_family(&VIPS, listener);
                let port = self.rng.random_range(0..100);
                (protocol, self.client(listener), (vip, port).into())
            }
            18 => {
                let local = self.of_family(&LOCAL, target);
                (from, target, (local, self.rng.random_range(PORTS)).into())
            }
            _ => (protocol, self.client(listener), self.client(listener)),
        }
    }

    fn client(&mut self, peer: SocketAddr) -> SocketAddr {
        let address = self.of_family(&CLIENTS, peer);
        (address, self.rng.random_range(PORTS)).into()
    }

    fn of_family(&mut self, addresses: &[&str], peer: SocketAddr) -> IpAddr {
        let parsed = addresses.iter().map(|text| text.parse::<IpAddr>().expect("an address"));
        let matching: Vec<IpAddr> = parsed.filter(|a| a.is_ipv4() == peer.is_ipv4()).collect();
        *matching.choose(&mut self.rng).expect("both families")
    }

    /// Puts extension headers behind an IPv6 header; not all make sense.
    fn add_extensions(&mut self, frame: &mut Vec<u8>, l3: usize) {
        let rng = &mut self.rng;
        let mut next = frame[l3 + 6];
        let mut headers = Vec::new();
        for _ in 0..rng.random_range(1..=6) {
            let kind = *[0_u8, 43, 44, 60, 60, 51, 59].choose(rng).expect("some");
            let words =
                if kind == 44 || rng.random_ratio(3, 4) { 0 } else { rng.random_range(1..20) };
            let mut header = vec![0; 8 * (usize::from(words) + 1)];
            header[0] = next;
            header[1] = words;
            if kind == 44 {
                let offset_more = *[0_u16, 0, 6, 1, 8, 9, rng.random()].choose(rng).expect("some");
                header[2..4].copy_from_slice(&offset_more.to_be_bytes());
            }
            headers.splice(0..0, header);
            next = kind;
        }
        frame[l3 + 6] = next;
        frame.splice(l3 + 40..l3 + 40, headers);
        let payload = (frame.len() - l3 - 40) as u16;
        frame[l3 + 4..l3 + 6].copy_from_slice(&payload.to_be_bytes());
    }

    /// An ICMP error about a packet that answers one of [`Self::endpoints`]; mostly one that fits.
    fn icmp_error(&mut self) -> Vec<u8> {
        let (protocol, to, from) = self.endpoints();
        let mut quoted = match protocol {
            TCP => self.segment(from, to),
            _ => Packet::udp(from, to),
        };
        let rng = &mut self.rng;
        quoted.payload = vec![7; rng.random_range(0..30)];
        quoted.checksum =
            *[Checksum::Right, Checksum::Wrong, Checksum::Zero].choose(rng).expect("some");
        if from.is_ipv4() && rng.random_ratio(1, 8) {
            quoted.ipv4_options = vec![1; 4 * rng.random_range(1..=10)];
        }
        let complaints = [
            Complaint::PortUnreachable,
            Complaint::TooBig(1400),
            Complaint::TimeExceeded,
            Complaint::ParameterProblem(9),
        ];
        let complaint = *complaints.choose(rng).expect("some");
        let kept = rng.random_range(0..60_usize).max(8);
        let hop_limit = *[64, 64, 64, 2, 1].choose(rng).expect("some");
        let vlans = (0..rng.random_range(0..5_u32).saturating_sub(2)).map(|_| 7).collect();
        let own = self.rng.random_ratio(1, 2);
        let source = if own { to } else { self.client(from) }.ip();
        let destination = if self.rng.random_ratio(1, 10) { self.client(from) } else { from }.ip();
        let macs = (quoted.source_mac, quoted.destination_mac);
        let error = IcmpError {
            source_mac: macs.0,
            destination_mac: macs.1,
            vlans,
            source,
            destination,
            hop_limit,
            complaint,
            quoted,
            kept,
        };
        error.build()
    }

    /// A well-made packet whose protocol is another: ICMP of both versions, SCTP, anything.
    fn other_protocol(&mut self) -> Vec<u8> {
        let (_, source, destination) = self.endpoints();
        let packet = Packet { payload: vec![0; 40], ..Packet::udp(source, destination) };
        let mut frame = packet.build();
        let protocol =
            *[1, 1, 58, 58, 132, 47, self.rng.random()].choose(&mut self.rng).expect("some");
        let (at, l4) = if source.is_ipv4() { (14 + 9, 14 + 20) } else { (14 + 6, 14 + 40) };
        frame[at] = protocol;
        frame[l4] = *[8, 128, 135, 3, 1, 0].choose(&mut self.rng).expect("some");
        frame
    }

    /// Something with an EtherType.
    fn noise(&mut self) -> Vec<u8> {
        let rng = &mut self.rng;
        let length = rng.random_range(14..120);
        let mut frame: Vec<u8> = (0..length).map(|_| rng.random()).collect();
        let kinds: [u16; 6] = [0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8, rng.random()];
        frame[12..14].copy_from_slice(&kinds.choose(rng).expect("some").to_be_bytes());
        frame
    }

    /// Makes a frame less well-made.
    fn mutate(&mut self, frame: &mut Vec<u8>) {
        let rng = &mut self.rng;
        // Most of what matters is at the front.
        let at = rng.random_range(12..frame.len().clamp(14, 100));
        match rng.random_range(0..10) {
            0 => frame.truncate(rng.random_range(14..=frame.len())),
            1 => frame.truncate(frame.len().saturating_sub(rng.random_range(0..30)).max(14)),
            2 => frame.extend(0..rng.random_range(1..60)),
            3 if at < frame.len() => frame[at] ^= 1 << rng.random_range(0..8),
            4 if at < frame.len() => frame[at] = rng.random(),
            5 if at + 1 < frame.len() => {
                let word: u16 =
                    *[0, 1, 0x2000, 0x4000, 0xffff, rng.random()].choose(rng).expect("some");
                frame[at..at + 2].copy_from_slice(&word.to_be_bytes());
            }
            // The fields that say how long and how broken up an IPv4 packet is.
            6 if frame.len() > 22 && frame[12..14] == [8, 0] => {
                let word: u16 = *[0x2000, 0x2001, 1, 100, 0x8000].choose(rng).expect("some");
                frame[20..22].copy_from_slice(&word.to_be_bytes());
            }
            7 if frame.len() > 22 => {
                let field = if frame[12..14] == [8, 0] { 16 } else { 18 };
                let length = u16::from_be_bytes([frame[field], frame[field + 1]]);
                let length = length.wrapping_add_signed(rng.random_range(-30..30));
                frame[field..field + 2].copy_from_slice(&length.to_be_bytes());
            }
            8 => {
                frame.splice(12..12, [0x81, 0, rng.random(), rng.random()]);
            }
            // The length of a datagram.
            9 if frame.len() > 14 + 20 + UdpHeader::LEN => {
                frame[39] = frame[39].wrapping_add_signed(rng.random_range(-9..9));
            }
            _ => {}
        }
    }
}
