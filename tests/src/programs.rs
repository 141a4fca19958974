//! The helper programs of `tests/ebpf` in the kernel, and packets run through programs.

#[path = "../ebpf/src/template.rs"]
mod template;

use std::{fmt, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{Array, ProgramArray},
    programs::{ProgramError, ProgramFd, TestRun as _, TestRunOptions, Xdp, XdpMode},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::ClockId,
    unistd::Pid,
};
use template::{HEADERS_SIZE, Template};

use crate::{
    netns::Namespace,
    packets::{Packet, Transport},
};

pub use template::{FIRST_PORT, PORT_BITS};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lb-tests-ebpf"));

/// A program with nothing to decide: what a real one is compared with. `Pass` also belongs onto the
/// veth peers of a balancer, which otherwise lose what it sends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Floor {
    /// Leaves the packet as the wrapper made it.
    Pass,
    /// Does nothing: the wrapper alone.
    Drop,
    /// Swaps the MAC addresses and sends the packet back.
    Swap,
    /// Wraps it in a constant IPv4 header of 20 bytes.
    Encap,
}

impl Floor {
    /// Every floor, the cheapest first.
    pub const ALL: [Self; 4] = [Self::Pass, Self::Drop, Self::Swap, Self::Encap];

    fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Drop => "drop",
            Self::Swap => "swap",
            Self::Encap => "encap",
        }
    }
}

/// A helper program on interfaces; detached on drop.
pub struct Attached {
    ebpf: Ebpf,
    program: Floor,
}

impl Attached {
    /// Loads the program; it is on no interface yet.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn load(program: Floor) -> Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT)?;
        xdp(&mut ebpf, program.name())?.load()?;
        Ok(Self { ebpf, program })
    }

    /// Attaches it in native mode.
    ///
    /// # Errors
    ///
    /// If there is no such interface, or it runs a program.
    pub fn attach(&mut self, namespace: &Namespace, interface: &str) -> Result<()> {
        let program = xdp(&mut self.ebpf, self.program.name())?;
        namespace
            .run(|| program.attach(interface, XdpMode::Driver))
            .with_context(|| format!("attach to {interface} in {}", namespace.name()))?;
        Ok(())
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("program", &self.program).finish_non_exhaustive()
    }
}

/// Which end of the packet is the client's, and differs from flow to flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Varying {
    /// The source, as in requests.
    Source,
    /// The destination, as in replies.
    Destination,
}

/// What a run gave.
#[derive(Debug)]
pub struct Run {
    /// The verdict on the last packet, one of `aya_ebpf_bindings::xdp_action`.
    pub verdict: u32,
    /// Nanoseconds a packet, of the thread's own CPU time: what else runs on the machine does not
    /// count. Measured around the whole system call, which costs about a microsecond more: repeat
    /// often.
    pub nanoseconds: f64,
    /// The last packet as the program left it.
    pub frame: Vec<u8>,
}

/// Runs a program in the kernel over packets of many flows, each made anew.
pub struct Wrapper {
    ebpf: Ebpf,
    frame: Vec<u8>,
}

impl Wrapper {
    /// Loads the wrapper and the floors.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn load() -> Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT)?;
        for name in Floor::ALL.map(Floor::name).into_iter().chain(["wrapper"]) {
            xdp(&mut ebpf, name)?.load().with_context(|| format!("load {name}"))?;
        }
        Ok(Self { ebpf, frame: Vec::new() })
    }

    /// Chooses what to run.
    ///
    /// # Errors
    ///
    /// If the kernel does not let the wrapper call it: not XDP, or with support for fragments.
    pub fn call(&mut self, program: &ProgramFd) -> Result<()> {
        let map = self.ebpf.map_mut("PROGRAMS").context("the object has this map")?;
        Ok(ProgramArray::try_from(map)?.set(0, program, 0)?)
    }

    /// Chooses a floor to run.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn call_floor(&mut self, floor: Floor) -> Result<()> {
        let program = xdp(&mut self.ebpf, floor.name())?.fd()?.try_clone()?;
        self.call(&program)
    }

    /// Chooses what packets to make: `packet`, from (or to) `flows` clients, in an order that looks
    /// random and visits each before it begins again.
    ///
    /// Flow `i` has port [`FIRST_PORT`] + `i` mod 2^[`PORT_BITS`], and `i` / 2^[`PORT_BITS`] as the
    /// last 16 bits of the address. A payload too short is filled up to 80 bytes of frame.
    ///
    /// # Errors
    ///
    /// If the packet has VLAN tags, or there are no flows or more than 2^26.
    pub fn make(&mut self, packet: &Packet, varying: Varying, flows: u32) -> Result<()> {
        ensure!(packet.vlans.is_empty(), "the wrapper knows no VLAN tags");
        ensure!((1..=1 << (16 + PORT_BITS)).contains(&flows), "{flows} flows");
        let (template, frame) = template_of(packet, varying, flows);
        let map = self.ebpf.map_mut("TEMPLATE").context("the object has this map")?;
        let mut map: Array<_, [u8; size_of::<Template>()]> = Array::try_from(map)?;
        map.set(0, bytemuck::cast::<Template, [u8; size_of::<Template>()]>(template), 0)?;
        self.frame = frame;
        Ok(())
    }

    /// Makes `repeat` packets and runs the program over each.
    ///
    /// # Errors
    ///
    /// If nothing was chosen with [`Wrapper::make`], or the kernel refuses.
    pub fn run(&mut self, repeat: u32) -> Result<Run> {
        let wrapper = xdp(&mut self.ebpf, "wrapper")?;
        let (result, elapsed, mut frame) = loop {
            let mut frame = vec![0; self.frame.len() + 256];
            let options = TestRunOptions {
                data_in: Some(&self.frame),
                data_out: Some(&mut frame),
                repeat,
                ..Default::default()
            };
            let start = cpu_time()?;
            match wrapper.test_run(options) {
                // A long run on a busy machine can be cut short; half a run is no measurement.
                Err(ProgramError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break (result?, cpu_time()? - start, frame),
            }
        };
        frame.truncate(usize::try_from(result.data_size_out)?);
        let nanoseconds = elapsed.as_secs_f64() * 1e9 / f64::from(repeat);
        Ok(Run { verdict: result.return_value, nanoseconds, frame })
    }
}

impl fmt::Debug for Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wrapper").field("frame", &self.frame).finish_non_exhaustive()
    }
}

fn cpu_time() -> Result<Duration> {
    Ok(ClockId::CLOCK_THREAD_CPUTIME_ID.now()?.into())
}

/// Keeps the calling thread on one CPU, for steady figures.
///
/// # Errors
///
/// If there is no such CPU.
pub fn pin_to_cpu(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?;
    Ok(program.try_into()?)
}

fn template_of(packet: &Packet, varying: Varying, flows: u32) -> (Template, Vec<u8>) {
    let mut packet = packet.clone();
    let client = match varying {
        Varying::Source => &mut packet.source,
        Varying::Destination => &mut packet.destination,
    };
    client.set_port(0);
    client.set_ip(without_last_16_bits(client.ip()));
    let missing = HEADERS_SIZE.saturating_sub(packet.build().len());
    packet.payload.resize(packet.payload.len() + missing, 0);
    let frame = packet.build();

    const IP: u16 = 14;
    let replies = varying == Varying::Destination;
    let (address, ip_checksum, l4) = match (packet.source.is_ipv4(), replies) {
        (true, false) => (IP + 14, IP + 10, IP + 20),
        (true, true) => (IP + 18, IP + 10, IP + 20),
        (false, false) => (IP + 22, 0, IP + 40),
        (false, true) => (IP + 38, 0, IP + 40),
    };
    let l4_checksum = match packet.transport {
        Transport::Tcp(_) => l4 + 16,
        Transport::Udp => l4 + 6,
    };
    let sum = |checksum: u16| {
        let at = usize::from(checksum);
        !u16::from_ne_bytes([frame[at], frame[at + 1]])
    };
    let mut headers = [0; HEADERS_SIZE / 8];
    bytemuck::cast_slice_mut(&mut headers).copy_from_slice(&frame[..HEADERS_SIZE]);
    let template = Template {
        headers,
        frame_length: frame.len() as u32,
        flows,
        next: 0,
        stride: stride(flows),
        address,
        port: if replies { l4 + 2 } else { l4 },
        ip_checksum,
        l4_checksum,
        // Of IPv6 it is never used.
        ip_sum: sum(ip_checksum),
        l4_sum: sum(l4_checksum),
        _padding: [0; 2],
    };
    (template, frame)
}

fn without_last_16_bits(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4((address.to_bits() & !0xffff).into()),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & !0xffff).into()),
    }
}

/// A step through `flows` numbers that meets all of them: without a common divisor, and near the
/// golden section.
fn stride(flows: u32) -> u32 {
    let golden = (f64::from(flows) * 0.618_034) as u32;
    (golden..flows).find(|&step| greatest_common_divisor(step, flows) == 1).unwrap_or(0)
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
