//! The machine: qemu, which emulates the processor where there is no KVM.

use std::fs::{self, OpenOptions};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::initramfs::SHARE;
use super::kernels::Kernel;
use crate::process::{command, interrupted};

/// As much as the tests need, with their own files in memory.
const MEMORY: &str = "3G";
/// More processors gain nothing where they are emulated.
const PROCESSORS: usize = 2;
/// A machine that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(600);

/// Boots a kernel, runs a script with `sh` in this machine's files, and powers off. Every line that
/// the script writes goes to `each`. Its exit status; an error if the machine did not get that far.
pub fn run(
    kernel: &Kernel,
    folder: &Path,
    script: &str,
    each: &mut dyn FnMut(&str),
) -> Result<i32> {
    let share = folder.join("share");
    if share.exists() {
        fs::remove_dir_all(&share)?;
    }
    fs::create_dir_all(&share)?;
    fs::write(share.join("script"), script)?;
    fs::write(share.join("start"), start())?;
    let initramfs = folder.join("initramfs");
    super::initramfs::write(kernel, &initramfs)?;
    let console = folder.join("console");
    let mut qemu = machine(kernel, &initramfs, &share, &console);
    let silent = watch(&mut qemu, each)?;
    let status = fs::read_to_string(share.join("status")).unwrap_or_default();
    let Ok(status) = status.trim().parse() else {
        let log = fs::read_to_string(&console).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n");
        let what = if silent { "said nothing for too long" } else { "stopped before its end" };
        bail!("the machine {what}. Its console ({}):\n{last}", console.display());
    };
    Ok(status)
}

/// What follows the initramfs; ends by switching the machine off.
fn start() -> String {
    format!(
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
         export TMPDIR=/run/tmp HOME=/root\n\
         mkdir -p /run/netns /run/lock\n\
         mount -t tmpfs shm /dev/shm 2>/dev/null\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null\n\
         ip link set lo up\n\
         busybox stty -F /dev/ttyS1 raw -echo\n\
         sh {SHARE}/script >/dev/ttyS1 2>&1 </dev/null\n\
         echo $? >{SHARE}/status\n\
         sync\n\
         echo o >/proc/sysrq-trigger\n\
         sleep 60\n"
    )
}

fn machine(kernel: &Kernel, initramfs: &Path, share: &Path, console: &Path) -> Command {
    let has_kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let processors = thread::available_parallelism().map_or(1, usize::from).min(PROCESSORS);
    let share =
        format!("local,path={},mount_tag=share,security_model=none,id=share", share.display());
    let mut qemu = command("qemu-system-x86_64");
    qemu.args(["-accel", if has_kvm { "kvm" } else { "tcg,thread=multi" }])
        .args(["-cpu", if has_kvm { "host" } else { "max" }])
        .args(["-M", "q35", "-m", MEMORY, "-smp", &processors.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-net", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 mitigations=off nokaslr panic=-1 quiet"])
        .arg("-virtfs")
        .arg("local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap")
        .args(["-virtfs", &share])
        .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"]);
    qemu
}

/// Runs it to its end; whether it was ended because it was silent.
fn watch(qemu: &mut Command, each: &mut dyn FnMut(&str)) -> Result<bool> {
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let output = child.stdout.take().context("stdout is piped")?;
    let (sender, lines) = channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let mut heard = Instant::now();
    let silent = loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                heard = Instant::now();
                each(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) if interrupted() => break false,
            Err(RecvTimeoutError::Timeout) if heard.elapsed() > SILENCE => break true,
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    if silent || interrupted() {
        child.kill()?;
    }
    child.wait()?;
    // Its only panic would be a bug of ours, and has been printed.
    let _ = reader.join();
    ensure!(!interrupted(), "interrupted");
    Ok(silent)
}
