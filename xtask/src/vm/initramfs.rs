//! The first user space of the machine: a busybox, the modules, and a script that puts this
//! machine's own files under a writable layer and goes on in them.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::kernels::Kernel;
use crate::process::find;

/// The folder of the host's that the machine may write to, as the machine sees it.
pub const SHARE: &str = "/run/lb-vm";

/// The files of the host come over 9p, read-only; what is written stays in memory.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir /proc /sys /dev /lower /writable /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
nine=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $nine,cache=loose,ro root /lower
mount -t tmpfs writable /writable
mkdir /writable/upper /writable/work
mount -t overlay -o lowerdir=/lower,upperdir=/writable/upper,workdir=/writable/work root /root
for folder in proc sys dev; do mount -o move /$folder /root/$folder; done
mount -t tmpfs run /root/run
mkdir /root/run/lb-vm /root/run/tmp
mount -t 9p -o $nine,cache=none share /root/run/lb-vm
exec switch_root /root /bin/sh /run/lb-vm/start
"#;

/// Writes the archive.
pub fn write(kernel: &Kernel, to: &Path) -> Result<()> {
    let busybox = find("busybox").context("no busybox: apt-get install busybox-static")?;
    let mut archive = Archive(Vec::new());
    archive.folder("bin")?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.folder("modules")?;
    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().context("a module's name")?.to_string_lossy();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(module)?)?;
        order += &format!("{name}\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    fs::write(to, archive.end()?).with_context(|| format!("write {}", to.display()))
}

/// An archive as the kernel unpacks it: cpio's format "newc"
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
struct Archive(Vec<u8>);

impl Archive {
    fn folder(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | permissions, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let (name_size, size) = (u32::try_from(name.len() + 1)?, u32::try_from(content.len())?);
        write!(self.0, "070701")?;
        // Number, mode, owner, group, links, time, size, two devices of two numbers, name, checksum.
        for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(self.0, "{field:08x}")?;
        }
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_as_the_kernel_reads_it() {
        let mut archive = Archive(Vec::new());
        archive.file("init", 0o755, b"abcde").unwrap();
        let bytes = archive.end().unwrap();
        let header = std::str::from_utf8(&bytes[..110]).unwrap();
        assert_eq!(&header[..22], "07070100000000000081ed");
        assert_eq!(&header[54..62], "00000005", "size");
        assert_eq!(&header[94..102], "00000005", "of the name");
        assert_eq!(&bytes[110..116], b"init\0\0");
        assert_eq!(&bytes[116..124], b"abcde\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
    }
}
