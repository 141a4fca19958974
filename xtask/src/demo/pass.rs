//! An XDP program that passes everything.
//!
//! The kernel delivers a frame that XDP sends out of a veth only if the other end runs an XDP
//! program too. On a real NIC there is no such other end. The program is two instructions, so it
//! is given to bpf(2) as it is: no compiler, loader or object file needed.

use std::io;
use std::mem::size_of_val;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use nix::libc;
use nix::net::if_::if_nametoindex;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// `struct bpf_insn` as one word, little endian: opcode, registers, offset, immediate.
/// `r0 = XDP_PASS; exit`.
static PASS: [u64; 2] = [0xb7 | 2 << 32, 0x95];

/// The head of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u32; 4],
    kern_version: u32,
    prog_flags: u32,
}

/// The head of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// The program on an interface; dropping it detaches.
pub struct Pass(#[expect(dead_code, reason = "held open, never used")] OwnedFd);

impl Pass {
    /// Attaches to an interface of the calling thread's network namespace, in the driver.
    pub fn attach(interface: &str) -> Result<Self> {
        let target_ifindex =
            if_nametoindex(interface).with_context(|| format!("interface {interface}"))?;
        let program = bpf(
            BPF_PROG_LOAD,
            &ProgLoad {
                prog_type: BPF_PROG_TYPE_XDP,
                insn_cnt: 2,
                insns: PASS.as_ptr() as u64,
                license: c"MIT".as_ptr() as u64,
                log: [0; 4],
                kern_version: 0,
                prog_flags: 0,
            },
        )
        .context("load an XDP program (BPF_PROG_LOAD)")?;
        let link = bpf(
            BPF_LINK_CREATE,
            &LinkCreate {
                prog_fd: fd_word(program.as_raw_fd()),
                target_ifindex,
                attach_type: BPF_XDP,
                flags: XDP_FLAGS_DRV_MODE,
            },
        )
        .with_context(|| format!("attach an XDP program to {interface} (BPF_LINK_CREATE)"))?;
        Ok(Self(link))
    }
}

/// A descriptor as bpf_attr has it.
fn fd_word(fd: RawFd) -> u32 {
    fd.unsigned_abs()
}

/// One bpf(2) call that answers with a descriptor.
fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is a repr(C) prefix of union bpf_attr without padding, lives through the
    // call, and its size goes with it; the kernel takes what is beyond as zero. Pointers in it
    // are to statics.
    let answer = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of_val(attr))
    };
    let fd = RawFd::try_from(answer).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both commands answer with a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
