//! Ports that the kernel must not choose for connections of this machine's own, because flows of
//! clients have them: `net.ipv4.ip_local_reserved_ports`, which counts for IPv6 too.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::note::Note;

type Ports = BTreeSet<u16>;

/// Ports that are reserved because of us, in the network namespace of the thread that made it.
///
/// What was reserved before stays so. Noted in the state directory first, so that it survives
/// kill -9. Dropping it takes nothing back: call [`restore`](Self::restore).
#[derive(Debug)]
pub struct ReservedPorts {
    setting: PathBuf,
    note: Note<Vec<String>>,
    /// Ports that only we reserved.
    ours: Ports,
}

impl ReservedPorts {
    /// Takes over what the note in `state_directory` names.
    ///
    /// # Errors
    /// When the note cannot be read.
    pub fn new(state_directory: &Path) -> io::Result<Self> {
        // The thread's own: /proc/sys/net is the network namespace's of whoever looks.
        Self::at("/proc/sys/net/ipv4/ip_local_reserved_ports".into(), state_directory)
    }

    fn at(setting: PathBuf, state_directory: &Path) -> io::Result<Self> {
        let (note, ranges) = Note::<Vec<String>>::open(state_directory, "reserved-ports")?;
        let ours = parse(&ranges.join(","))?;
        Ok(Self { setting, note, ours })
    }

    /// Has exactly these ports, and those that others reserved, kept from the kernel's choice.
    ///
    /// # Errors
    /// When the setting cannot be read or written (not root, or a read-only /proc/sys), or the note
    /// cannot be written.
    pub fn reserve(&mut self, wanted: &[RangeInclusive<u16>]) -> io::Result<()> {
        if wanted.is_empty() && self.ours.is_empty() {
            return Ok(());
        }
        let wanted: Ports = wanted.iter().cloned().flatten().collect();
        let present = parse(&fs::read_to_string(&self.setting)?)?;
        let others: Ports = present.difference(&self.ours).copied().collect();
        let ours: Ports = wanted.difference(&others).copied().collect();
        let new: Ports = others.union(&ours).copied().collect();
        if new == present && ours == self.ours {
            return Ok(());
        }
        // Whatever happens between the two writes, nothing stays reserved that nobody knows of.
        let either = self.ours.union(&ours).copied().collect();
        self.write_note(&either)?;
        fs::write(&self.setting, format(&new).join(",") + "\n")?;
        self.write_note(&ours)?;
        self.ours = ours;
        Ok(())
    }

    /// Takes back what we reserved.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn restore(&mut self) -> io::Result<()> {
        self.reserve(&[])
    }

    fn write_note(&self, ports: &Ports) -> io::Result<()> {
        if ports.is_empty() { self.note.remove() } else { self.note.write(&format(ports)) }
    }
}

/// `8080,10000-59999`, as the kernel writes it.
fn parse(text: &str) -> io::Result<Ports> {
    let mut ports = Ports::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let parse = |port: &str| port.trim().parse::<u16>().map_err(io::Error::other);
        ports.extend(parse(first)?..=parse(last)?);
    }
    Ok(ports)
}

fn format(ports: &Ports) -> Vec<String> {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *port => *last = *port,
            _ => ranges.push((*port, *port)),
        }
    }
    let show = |(first, last): (u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.into_iter().map(show).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        directory: tempfile::TempDir,
    }

    impl Machine {
        fn new(reserved: &str) -> Self {
            let machine = Self { directory: tempfile::tempdir().unwrap() };
            fs::write(machine.setting(), format!("{reserved}\n")).unwrap();
            machine
        }

        fn setting(&self) -> PathBuf {
            self.directory.path().join("setting")
        }

        fn agent(&self) -> ReservedPorts {
            ReservedPorts::at(self.setting(), &self.directory.path().join("run")).unwrap()
        }

        fn reserved(&self) -> String {
            fs::read_to_string(self.setting()).unwrap().trim().to_owned()
        }
    }

    #[test]
    fn what_was_reserved_before_stays_so() {
        let machine = Machine::new("8080,20000-20010,60500");
        let mut agent = machine.agent();
        agent.reserve(&[10_000..=20_005, 20_000..=20_020]).unwrap();
        assert_eq!(machine.reserved(), "8080,10000-20020,60500");
        agent.reserve(&[10_000..=10_001]).unwrap();
        assert_eq!(machine.reserved(), "8080,10000-10001,20000-20010,60500");
        agent.restore().unwrap();
        assert_eq!(machine.reserved(), "8080,20000-20010,60500");
    }

    #[test]
    fn a_killed_agent_s_reservation_is_taken_over() {
        let machine = Machine::new("");
        machine.agent().reserve(&[10_000..=59_999]).unwrap();
        let mut next = machine.agent();
        next.reserve(&[20_000..=20_000]).unwrap();
        assert_eq!(machine.reserved(), "20000");
        drop(next);
        machine.agent().restore().unwrap();
        assert_eq!(machine.reserved(), "");
        assert_eq!(fs::read_dir(machine.directory.path().join("run")).unwrap().count(), 0);
    }

    #[test]
    fn the_whole_range_can_be_written() {
        assert_eq!(format(&(0..=u16::MAX).collect()), ["0-65535"]);
        assert_eq!(parse("0-65535\n").unwrap().len(), 65_536);
        assert!(parse("a-b").is_err());
    }
}
