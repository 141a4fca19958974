//! The modules that the tests need, out of a kernel's package.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::kernels::find_below;
use crate::process::command;

/// Where they and what they depend on are, below `kernel`.
pub const FOLDERS: [&str; 6] =
    ["net", "lib", "crypto", "drivers/virtio", "drivers/net/*.ko*", "fs/*/*.ko*"];

/// What the tests need, first what the machine itself does.
const WANTED: [&str; 19] = [
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "veth",
    "bridge",
    "macvlan",
    "tun",
    "dummy",
    "8021q",
    "ipip",
    "sit",
    "ip6_tunnel",
    "fou",
    "fou6",
    "sch_ingress",
    "cls_bpf",
    "sch_netem",
    "nf_tables",
];

/// Copies those that the kernel has not built in to a folder, unpacked; their names there, each after
/// those that it depends on.
pub fn choose(unpacked: &Path, to: &Path) -> Result<Vec<String>> {
    let mut choice =
        Choice { to, files: BTreeMap::new(), done: BTreeSet::new(), order: Vec::new() };
    for file in find_below(unpacked, &|name| name.contains(".ko"))? {
        choice.files.insert(name_of(&file), file);
    }
    for list in find_below(unpacked, &|name| name == "modules.builtin")? {
        choice.done.extend(fs::read_to_string(list)?.lines().map(|line| name_of(Path::new(line))));
    }
    WANTED.iter().try_for_each(|name| choice.add(name))?;
    Ok(choice.order)
}

struct Choice<'a> {
    to: &'a Path,
    files: BTreeMap<String, PathBuf>,
    done: BTreeSet<String>,
    order: Vec<String>,
}

impl Choice<'_> {
    fn add(&mut self, name: &str) -> Result<()> {
        if !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| {
            format!("the kernel's module {name} is not where it is looked for ({FOLDERS:?})")
        })?;
        let bytes = read(file).with_context(|| format!("unpack {}", file.display()))?;
        for needed in dependencies(&bytes).with_context(|| format!("read the module {name}"))? {
            self.add(&needed)?;
        }
        let kept = format!("{name}.ko");
        fs::write(self.to.join(&kept), bytes)?;
        self.order.push(kept);
        Ok(())
    }
}

/// As the kernel names it: `8021q` for `net/8021q/8021q.ko.xz`.
fn name_of(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let mut tool = match file.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return Ok(fs::read(file)?),
        Some("xz") => command("xz"),
        Some("zst") => command("zstd"),
        other => bail!("compressed as {other:?}"),
    };
    let output = tool.args(["-d", "-c"]).arg(file).stderr(Stdio::inherit()).output()?;
    anyhow::ensure!(output.status.success(), "{} failed", tool.get_program().display());
    Ok(output.stdout)
}

/// The modules that one names in its section `.modinfo`: `depends=stp,llc`.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let start = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let length = module[start..].iter().position(|byte| *byte == 0)?;
    let names = std::str::from_utf8(&module[start..start + length]).ok()?;
    Some(
        names
            .split(',')
            .filter(|name| !name.is_empty())
            .map(|name| name.replace('-', "_"))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let read = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(dependencies(b"x\0depends=stp,ip6-tunnel\0y"), read(&["stp", "ip6_tunnel"]));
        assert_eq!(dependencies(b"x\0depends=\0y"), read(&[]));
        assert_eq!(dependencies(b"license=GPL"), None);
    }

    #[test]
    fn names_are_the_kernels() {
        assert_eq!(name_of(Path::new("net/8021q/8021q.ko.xz")), "8021q");
        assert_eq!(name_of(Path::new("kernel/drivers/net/a-b.ko")), "a_b");
    }
}
