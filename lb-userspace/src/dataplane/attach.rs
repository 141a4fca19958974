//! Putting the program on a NIC, and saying what to do where that is impossible.

use anyhow::{Context as _, anyhow, bail};
use aya::programs::links::{FdLink, LinkInfo, LinkType};
use aya::programs::{ProgramError, Xdp, XdpMode as AyaMode, loaded_links, loaded_programs};
use nix::errno::Errno;
use tracing::warn;

use crate::config::XdpMode;
use crate::netlink::{Interface, XdpAttachmentMode};

use super::PROGRAM;
use crate::target::WAY_IN;

/// A program on a NIC. Dropping it detaches the program.
#[derive(Debug)]
pub struct Attachment {
    /// Index of the NIC.
    pub ifindex: u32,
    /// Name of the NIC.
    pub name: String,
    /// Whether the program runs in the driver.
    pub is_native: bool,
    _link: FdLink,
}

/// Attaches a loaded program.
///
/// # Errors
/// An XDP program of somebody else, a NIC that cannot run XDP in the mode asked for, missing
/// privileges: each with what to do about it.
pub fn attach(program: &mut Xdp, nic: &Interface, mode: XdpMode) -> anyhow::Result<Attachment> {
    let name = &nic.name;
    if let Some(vlan) = &nic.vlan {
        bail!(
            "{name} is VLAN {} of another interface (index {}): attach to that parent instead; \
             lb reads and writes the tags itself",
            vlan.id,
            vlan.parent
        );
    }
    if let Some(foreign) = &nic.xdp {
        let id = foreign.program_id;
        if is_ours(id) {
            bail!(
                "{name} already has lb's program (id {id}): another lb agent is attached to it. End \
                 that agent, or leave {name} to it; `sudo lb-userspace status` shows the one with \
                 the default socket"
            );
        }
        bail!(
            "{name} already has an XDP program (id {id}) that is not lb's; lb does not replace it. \
             See it with `ip link show {name}`. {}",
            removal(name, foreign.mode, &links_of(id))
        );
    }
    let (link, is_native) = match mode {
        XdpMode::Native => {
            (link(program, nic, AyaMode::Driver).map_err(|e| explain(e, name))?, true)
        }
        XdpMode::Generic => {
            (link(program, nic, AyaMode::Skb).map_err(|e| explain(e, name))?, false)
        }
        XdpMode::Auto => match link(program, nic, AyaMode::Driver) {
            Ok(link) => (link, true),
            Err(error) if is_unsupported(&error) => {
                let code = errno(&error).unwrap_or(Errno::UnknownErrno);
                warn!(
                    interface = %name,
                    "falling back to generic mode, which is several times slower: {} ({code})",
                    why_not_native(code, name)
                );
                (link_generic(program, nic)?, false)
            }
            Err(error) => return Err(explain(error, name)),
        },
    };
    Ok(Attachment { ifindex: nic.index, name: name.clone(), is_native, _link: link })
}

/// Whether a program is another agent's.
fn is_ours(program_id: u32) -> bool {
    let mut programs = loaded_programs().filter_map(Result::ok);
    let found = programs.find(|program| program.id() == program_id);
    found.is_some_and(|program| matches!(program.name_as_str(), Some(PROGRAM | WAY_IN)))
}

/// The BPF links that hold a program on interfaces. None can also mean that the kernel does not say.
fn links_of(program_id: u32) -> Vec<u32> {
    let is_its = |link: &LinkInfo| {
        link.program_id() == program_id && matches!(link.link_type(), Ok(LinkType::Xdp))
    };
    loaded_links().filter_map(Result::ok).filter(is_its).map(|link| link.id()).collect()
}

/// How to get rid of a program that is on an interface. What holds it by a BPF link cannot be
/// removed by name, only by that link.
fn removal(name: &str, mode: XdpAttachmentMode, links: &[u32]) -> String {
    let key = match mode {
        XdpAttachmentMode::Native => "xdp",
        XdpAttachmentMode::Generic => "xdpgeneric",
        XdpAttachmentMode::Offload => "xdpoffload",
    };
    let by_link =
        "End the agent that attached it, which did so by a BPF link (`xdp off` does not help)";
    match links {
        [] => format!(
            "Remove it with `ip link set {name} {key} off`, or end the agent that attached it"
        ),
        [id] => format!("{by_link}, or detach that with `bpftool link detach id {id}`"),
        several => {
            let ids = several.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            format!(
                "{by_link}, or detach that with `bpftool link detach id N`: N is one of {ids}, \
                 `bpftool link show` says which is on {name}"
            )
        }
    }
}

fn link_generic(program: &mut Xdp, nic: &Interface) -> anyhow::Result<FdLink> {
    link(program, nic, AyaMode::Skb).map_err(|error| explain(error, &nic.name))
}

fn link(program: &mut Xdp, nic: &Interface, mode: AyaMode) -> Result<FdLink, ProgramError> {
    let id = program.attach_to_if_index(nic.index, mode)?;
    // Only kernels before 5.9 attach without a link that ends with its owner.
    program
        .take_link(id)?
        .try_into()
        .map_err(|_| ProgramError::IOError(std::io::Error::from(std::io::ErrorKind::Unsupported)))
}

/// Whether the driver cannot run XDP as the NIC is now; the reasons differ by driver.
fn is_unsupported(error: &ProgramError) -> bool {
    matches!(
        errno(error),
        Some(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ERANGE | Errno::EMSGSIZE)
    )
}

fn errno(error: &ProgramError) -> Option<Errno> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(code) = error.downcast_ref::<std::io::Error>().and_then(|e| e.raw_os_error()) {
            return Some(Errno::from_raw(code));
        }
        source = error.source();
    }
    // aya wraps the system's error without naming it as the source.
    match error {
        ProgramError::SyscallError(call) => call.io_error.raw_os_error().map(Errno::from_raw),
        _ => None,
    }
}

fn explain(error: ProgramError, name: &str) -> anyhow::Error {
    let Some(code) = errno(&error) else {
        return anyhow!(error).context(format!("attach to {name}"));
    };
    let help = match code {
        Errno::EBUSY | Errno::EEXIST => format!(
            "{name} has an XDP program already: see it with `ip link show {name}` and remove it \
             with `ip link set {name} xdp off` (or `xdpgeneric off`, as it is shown)"
        ),
        Errno::EPERM | Errno::EACCES => {
            "attaching XDP programs needs root (or CAP_NET_ADMIN and CAP_BPF): run with sudo".into()
        }
        _ if is_unsupported(&error) => {
            format!("{}; `--xdp-mode generic` always works", why_not_native(code, name))
        }
        _ => format!("attach to {name}"),
    };
    anyhow!(error).context(format!("{help} ({code})"))
}

/// Why the driver does not run XDP, and what could help, for errors that [`is_unsupported`].
fn why_not_native(code: Errno, name: &str) -> String {
    match code {
        Errno::EOPNOTSUPP => format!("the driver of {name} has no native XDP"),
        _ => format!(
            "the driver of {name} refused native XDP; often its MTU is too large for XDP (try \
             `ip link set {name} mtu 1500`, on a veth at the peer as well) or it lacks queues"
        ),
    }
}

/// Checks what loading needs before the kernel says it in a less friendly way.
///
/// # Errors
/// Without the privileges, saying which.
pub fn check_privileges() -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let status = std::fs::read_to_string("/proc/self/status").context("read own capabilities")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let (net_admin, bpf) = (1 << 12, 1 << 39);
    if effective & net_admin == 0 || effective & bpf == 0 {
        bail!(
            "loading and attaching XDP programs needs root (or CAP_NET_ADMIN and CAP_BPF): run with sudo"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use XdpAttachmentMode::{Generic, Native, Offload};

    #[test]
    fn the_advice_is_what_helps() {
        assert!(removal("eth0", Native, &[]).contains("`ip link set eth0 xdp off`"));
        assert!(removal("eth0", Generic, &[]).contains("`ip link set eth0 xdpgeneric off`"));
        assert!(removal("eth0", Offload, &[]).contains("`ip link set eth0 xdpoffload off`"));
        let one = removal("eth0", Native, &[7]);
        assert!(
            one.contains("`bpftool link detach id 7`") && !one.contains("ip link set"),
            "{one}"
        );
        let several = removal("eth0", Generic, &[7, 9]);
        assert!(several.contains("one of 7, 9") && several.contains("on eth0"), "{several}");
    }
}
