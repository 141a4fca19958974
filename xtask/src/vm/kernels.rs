//! Debian's kernels: found in a mirror's lists, downloaded without being installed, and of each only
//! what is needed kept in `target/vm`.
//!
//! apt runs with a configuration of its own, so that neither the machine's lists nor its packages
//! change, and no privilege is needed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::modules;
use crate::process::{capture, command, find, run, show};

/// Names the mirror where the machine's own apt has none of Debian, such as on Ubuntu.
const MIRROR: &str = "LB_DEBIAN_MIRROR";

/// What stands for the newest kernel.
pub const NEWEST: &str = "newest";

/// Where Debian has a kernel of these numbers; others are looked for everywhere.
const SUITES: [(&str, &[&str]); 5] = [
    ("5.10", &["bullseye"]),
    ("6.1", &["bookworm"]),
    ("6.12", &["trixie"]),
    ("6.18", &["trixie-backports"]),
    (NEWEST, &["trixie-backports", "sid"]),
];
const EVERYWHERE: [&str; 6] =
    ["bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports", "sid"];

/// Debian's keys, as its releases name the file.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Packages that together are a kernel; which of them there are differs by version.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
const FLAVOUR: &str = "-amd64";

/// A kernel that can be booted.
pub struct Kernel {
    /// What `uname -r` says.
    pub release: String,
    /// The image.
    pub image: PathBuf,
    /// Modules, each after those that it depends on.
    pub modules: Vec<PathBuf>,
}

impl Kernel {
    /// The numbers of its release.
    pub fn version(&self) -> Vec<u64> {
        numbers(&self.release)
    }
}

/// The kernel that `wanted` names, from the cache or from the mirror: `newest`, or the first numbers
/// of a version.
pub fn get(wanted: &str, cache: &Path) -> Result<Kernel> {
    let folder = cache.join(wanted);
    if !folder.join("release").exists() {
        ensure!(
            wanted == NEWEST || (wanted.contains('.') && !numbers(wanted).is_empty()),
            "{wanted} is no kernel: give the first numbers of a version, such as 6.12, or {NEWEST}"
        );
        download(wanted, cache, &folder).with_context(|| format!("get the kernel {wanted}"))?;
    }
    let release = fs::read_to_string(folder.join("release"))?;
    let modules = fs::read_to_string(folder.join("order"))?;
    Ok(Kernel {
        release,
        image: folder.join("vmlinuz"),
        modules: modules.lines().map(|name| folder.join(name)).collect(),
    })
}

fn download(wanted: &str, cache: &Path, folder: &Path) -> Result<()> {
    let fresh = cache.join(format!("{wanted}.new"));
    remove(&fresh)?;
    let unpacked = fresh.join("unpacked");
    fs::create_dir_all(&unpacked)?;
    let apt = Apt::new(&cache.join("apt"), suites(wanted))?;
    let packages = apt.packages()?;
    let (release, parts) = newest(&packages, wanted)?;
    println!("vm: {release}: download {}", parts.join(", "));
    run(apt.command("apt-get")?.args(["-qq", "download"]).args(&parts).current_dir(&fresh))?;
    for entry in fs::read_dir(&fresh)? {
        let file = entry?.path();
        if file.extension() == Some(OsStr::new("deb")) {
            unpack(&file, &unpacked)?;
            fs::remove_file(file)?;
        }
    }
    let image = find_below(&unpacked, &|name| name.starts_with("vmlinuz"))?;
    let image = image.first().with_context(|| format!("{release} has no vmlinuz"))?;
    fs::rename(image, fresh.join("vmlinuz"))?;
    let order = modules::choose(&unpacked, &fresh)?;
    remove(&unpacked)?;
    fs::write(fresh.join("order"), order.join("\n"))?;
    fs::write(fresh.join("release"), release)?;
    remove(folder)?;
    Ok(fs::rename(fresh, folder)?)
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}

fn suites(wanted: &str) -> &'static [&'static str] {
    SUITES.iter().find(|(name, _)| *name == wanted).map_or(&EVERYWHERE, |(_, suites)| suites)
}

/// Unpacks the image and the modules' folders that [`modules::FOLDERS`] names; a whole package of
/// modules is some hundred megabytes.
fn unpack(package: &Path, to: &Path) -> Result<()> {
    let mut data = command("dpkg-deb");
    data.arg("--fsys-tarfile").arg(package).stdout(Stdio::piped());
    let mut child = data.spawn().with_context(|| format!("run {}", show(&data)))?;
    let archive = child.stdout.take().context("stdout is piped")?;
    let mut tar = command("tar");
    // What is not in this package is in another; that all is there shows afterwards.
    tar.args(["-x", "--wildcards", "--no-wildcards-match-slash", "-C"]).arg(to);
    for top in [".", "./usr"] {
        tar.arg(format!("{top}/boot/vmlinuz*")).arg(format!("{top}/lib/modules/*/vmlinuz"));
        tar.arg(format!("{top}/lib/modules/*/modules.builtin"));
        for folder in modules::FOLDERS {
            tar.arg(format!("{top}/lib/modules/*/kernel/{folder}"));
        }
    }
    tar.stdin(archive).stderr(Stdio::null()).status().context("run tar")?;
    // Ends with an error if tar did not want the rest.
    child.wait()?;
    Ok(())
}

/// Files below a folder whose name fits.
pub fn find_below(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            found.extend(find_below(&entry.path(), fits)?);
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(fits) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// apt over the lists of some suites.
struct Apt {
    config: PathBuf,
}

impl Apt {
    /// Fetches the lists.
    fn new(folder: &Path, suites: &[&str]) -> Result<Self> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            ensure!(find(tool).is_some(), "no {tool} here: Debian or Ubuntu is needed");
        }
        for name in ["lists/partial", "cache/archives/partial", "parts"] {
            fs::create_dir_all(folder.join(name))?;
        }
        fs::write(folder.join("status"), "")?;
        let (mirror, keyring) = (mirror()?, keyring()?);
        let sources: String = suites
            .iter()
            .map(|suite| format!("deb [signed-by={keyring}] {mirror} {suite} main\n"))
            .collect();
        fs::write(folder.join("sources.list"), sources)?;
        let config = folder.join("apt.conf");
        fs::write(&config, settings(folder))?;
        let apt = Self { config };
        println!("vm: lists of {} ...", suites.join(", "));
        run(apt.command("apt-get")?.args(["-qq", "update", "--error-on=any"]))
            .with_context(|| format!("the mirror must have {}", suites.join(", ")))?;
        Ok(apt)
    }

    fn command(&self, tool: &str) -> Result<Command> {
        let mut apt = command(tool);
        apt.env("APT_CONFIG", fs::canonicalize(&self.config)?);
        Ok(apt)
    }

    fn packages(&self) -> Result<Vec<String>> {
        let names = capture(self.command("apt-cache")?.args(["pkgnames", "linux-"]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }
}

fn settings(folder: &Path) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let (sources, parts, lists) = (at("sources.list"), at("parts"), at("lists"));
    let (status, cache) = (at("status"), at("cache"));
    format!(
        "Dir::Etc::sourcelist \"{sources}\";\n\
         Dir::Etc::sourceparts \"{parts}\";\n\
         Dir::Etc::preferencesparts \"{parts}\";\n\
         Dir::State::status \"{status}\";\n\
         Dir::State::lists \"{lists}\";\n\
         Dir::Cache \"{cache}\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Architectures \"amd64\";\n\
         APT::Sandbox::User \"\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::GzipIndexes \"true\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         // Mirrors and clocks of test machines may stand still; signatures are checked.\n\
         Acquire::Check-Valid-Until \"false\";\n"
    )
}

/// Where this machine gets its own Debian packages from.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var(MIRROR) {
        return Ok(mirror);
    }
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let of = |key: &str| {
        let value = system.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_default().trim_matches('"')
    };
    if of("ID") == "debian" {
        let format = ["indextargets", "--format", "$(RELEASE) $(REPO_URI)"];
        let targets = capture(command("apt-get").args(format).arg("Created-By: Packages"))?;
        let codename = of("VERSION_CODENAME");
        let own = [codename, "stable", "oldstable", "testing", "unstable", "sid"];
        let found = targets.lines().filter_map(|line| line.split_once(' '));
        for (suite, mirror) in found {
            if !suite.is_empty() && own.contains(&suite) {
                return Ok(mirror.to_owned());
            }
        }
    }
    bail!("apt's sources here name no mirror of Debian: set {MIRROR} to the URL of one")
}

fn keyring() -> Result<&'static str> {
    let found = KEYRINGS.into_iter().find(|file| Path::new(file).exists());
    found.context("the keys of Debian are missing: apt-get install debian-archive-keyring")
}

/// The highest version that fits, and its packages.
fn newest(packages: &[String], wanted: &str) -> Result<(String, Vec<String>)> {
    let mut releases: BTreeMap<Vec<u64>, &str> = BTreeMap::new();
    for package in packages {
        let Some(release) = package.strip_prefix(PARTS[0]) else { continue };
        let Some(version) = release.strip_suffix(FLAVOUR) else { continue };
        // Neither other flavours nor real-time kernels.
        let is_plain =
            version.replace("deb", "").chars().all(|c| c.is_ascii_digit() || ".+-".contains(c));
        if is_plain && version.starts_with(|c: char| c.is_ascii_digit()) {
            releases.insert(numbers(version), release);
        }
    }
    let prefix = numbers(wanted);
    let fitting = releases.iter().rfind(|(numbers, _)| numbers.starts_with(&prefix));
    let Some((_, release)) = fitting else {
        let known: Vec<_> = releases.values().copied().collect();
        bail!("the mirror has none in {}; it has {}", suites(wanted).join(", "), known.join(", "))
    };
    let parts = PARTS.iter().map(|part| format!("{part}{release}"));
    let parts = parts.filter(|part| packages.contains(part)).collect();
    Ok(((*release).to_owned(), parts))
}

/// The numbers of a version, which order it.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_counts() {
        let packages = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-50-amd64",
            "linux-image-6.1.0-51-rt-amd64",
            "linux-image-6.1.0-52-cloud-amd64",
            "linux-image-6.1.0-53-amd64-unsigned",
            "linux-image-6.12.9+deb13-amd64",
            "linux-image-6.12.10+deb13-amd64",
            "linux-image-7.2.1+deb14-amd64",
            "linux-modules-7.2.1+deb14-amd64",
            "linux-image-amd64",
        ];
        let packages = packages.map(str::to_owned);
        let release = |wanted| newest(&packages, wanted).unwrap().0;
        assert_eq!(release("6.1"), "6.1.0-50-amd64");
        assert_eq!(release("6.12"), "6.12.10+deb13-amd64");
        assert_eq!(release("6.12.9"), "6.12.9+deb13-amd64");
        assert_eq!(release(NEWEST), "7.2.1+deb14-amd64");
        assert_eq!(newest(&packages, NEWEST).unwrap().1, packages[7..9]);
        let error = newest(&packages, "6.18").unwrap_err().to_string();
        assert!(error.contains("none in trixie-backports") && error.contains("7.2.1"), "{error}");
    }
}
