//! What runs on every kernel: test binaries of this machine, and what came of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::kernels::Kernel;
use crate::agent::{self, Profile};
use crate::process::{capture, cargo, root};

/// Tests at the same time in the machine: as many as it has processors.
const TEST_THREADS: &str = "2";
/// Frames that are generated for host and kernel to agree on; on this machine it is many more.
const FRAMES: &str = "20000";

/// The oldest kernel that all suites run on: what lb supports. Older ones only have to say what they
/// lack.
const OLDEST: [u64; 2] = [6, 1];

/// What runs on a kernel that is older: `the_programs_load` knows what is to become of them there.
const OF_OLDER: [Suite; 1] = [Suite { name: "system_kernel", tests: &["the_programs_load"] }];

/// How many times longer tests may wait: an emulated processor is some 20 times slower.
const SLOWNESS: u32 = 20;

/// A test binary and which of its tests run; none named: all.
struct Suite {
    name: &'static str,
    tests: &'static [&'static str],
}

/// The programs load, every fixture gives what it gives here, and real machines work together.
const SUITES: [Suite; 6] = [
    Suite { name: "system_kernel", tests: &[] },
    Suite { name: "progrun", tests: &[] },
    Suite { name: "target_progrun", tests: &[] },
    Suite {
        name: "system_forwarding",
        tests: &["nat_with_two_nics", "vlan_tags_of_requests_are_removed"],
    },
    Suite { name: "system_tunnels", tests: &["ip_in_ip", "ip_in_udp"] },
    Suite {
        name: "system_target",
        tests: &["tunnels_from_the_load_balancer_are_unwrapped", "nothing_is_left_behind"],
    },
];

/// The suites of a kernel.
fn suites(kernel: &Kernel) -> &'static [Suite] {
    if kernel.version() < OLDEST.to_vec() { &OF_OLDER } else { &SUITES }
}

/// Begins the lines that the machine writes between the tests'.
const MARK: &str = "== vm: ";

/// What is to run, built.
pub struct Plan {
    agent: PathBuf,
    binaries: BTreeMap<String, PathBuf>,
}

impl Plan {
    /// Builds agent and tests.
    pub fn build() -> Result<Self> {
        let agent = agent::build(Profile::Dev)?;
        println!("build: tests ...");
        let mut build =
            cargo(["test", "--no-run", "--message-format", "json", "--package", "lb-tests"]);
        for suite in &SUITES {
            build.args(["--test", suite.name]);
        }
        let messages = capture(&mut build)?;
        let mut binaries = BTreeMap::new();
        for line in messages.lines() {
            let message: serde_json::Value =
                serde_json::from_str(line).context("cargo's messages")?;
            let name = message["target"]["name"].as_str();
            if let Some((name, file)) = name.zip(message["executable"].as_str()) {
                binaries.insert(name.to_owned(), file.into());
            }
        }
        Ok(Self { agent, binaries })
    }

    /// The script that runs it all, also after a failure.
    pub fn script(&self, kernel: &Kernel) -> String {
        let folder = root().join("tests");
        let mut script = format!(
            "[ \"$(uname -r)\" = {} ] || exit 9\n\
             export LB_BIN={} LB_ALL_DEVICES=1 LB_FRAMES={FRAMES} LB_SLOWNESS={SLOWNESS} RUST_BACKTRACE=0\n\
             cd {}\n\
             status=0\n\
             run() {{\n\
             name=$1; shift\n\
             read begin rest </proc/uptime\n\
             \"$@\"\n\
             code=$?\n\
             [ $code = 0 ] || status=1\n\
             read end rest </proc/uptime\n\
             echo \"{MARK}$name $code $begin $end\"\n\
             }}\n",
            kernel.release,
            self.agent.display(),
            folder.display(),
        );
        for suite in suites(kernel) {
            let Some(binary) = self.binaries.get(suite.name) else { continue };
            script += &format!("run {} {}", suite.name, binary.display());
            script += &format!(" --test-threads {TEST_THREADS} --color never");
            for test in suite.tests {
                script += &format!(" {test}");
            }
            if !suite.tests.is_empty() {
                script += " --exact";
            }
            script.push('\n');
        }
        script + "exit $status\n"
    }
}

/// What became of a suite.
pub struct Row {
    /// Its name.
    pub name: String,
    /// Tests passed and failed.
    pub tests: (u32, u32),
    /// How long it took.
    pub time: Duration,
    exit: i32,
}

impl Row {
    /// The machine came up.
    pub fn boot(time: Duration) -> Self {
        Self { name: "boot".into(), tests: (1, 0), time, exit: 0 }
    }

    /// A suite without tests is no success.
    pub fn passed(&self) -> bool {
        self.exit == 0 && self.tests.0 > 0 && self.tests.1 == 0
    }
}

/// Reads what the machine writes.
#[derive(Default)]
pub struct Results {
    tests: (u32, u32),
    rows: Vec<Row>,
}

impl Results {
    /// Takes note of a line; whether the user is to see it.
    pub fn take(&mut self, line: &str) -> bool {
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| {
                let words: Vec<_> = result.split([' ', ';', '.']).collect();
                words.windows(2).find(|pair| pair[1] == what).and_then(|pair| pair[0].parse().ok())
            };
            self.tests = (count("passed").unwrap_or(0), count("failed").unwrap_or(0));
        } else if let Some(mark) = line.strip_prefix(MARK) {
            let tests = std::mem::take(&mut self.tests);
            self.rows.extend(row(mark, tests));
            return false;
        }
        true
    }

    /// A row for each suite.
    pub fn rows(self, plan: &Plan, kernel: &Kernel) -> Result<Vec<Row>> {
        let ran: Vec<_> = self.rows.iter().map(|row| row.name.as_str()).collect();
        for suite in suites(kernel) {
            let name = suite.name;
            anyhow::ensure!(plan.binaries.contains_key(name), "cargo built no test {name}");
            anyhow::ensure!(ran.contains(&name), "{name} did not run to its end");
        }
        Ok(self.rows)
    }
}

/// `NAME CODE BEGIN END`, times in seconds of uptime.
fn row(mark: &str, tests: (u32, u32)) -> Option<Row> {
    let words: Vec<_> = mark.split(' ').collect();
    let [name, exit, begin, end] = words[..] else { return None };
    let (begin, end): (f64, f64) = (begin.parse().ok()?, end.parse().ok()?);
    let time = Duration::try_from_secs_f64(end - begin).ok()?;
    Some(Row { name: name.to_owned(), tests, time, exit: exit.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_from_the_lines() {
        let mut results = Results::default();
        assert!(results.take("test a ... ok"));
        assert!(results.take(
            "test result: FAILED. 75 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out"
        ));
        assert!(!results.take("== vm: progrun 101 10.50 70.75"));
        assert!(!results.take("== vm: target_progrun 0 71.00 72.00"));
        let [first, second] = &results.rows[..] else { panic!("two rows") };
        assert_eq!((first.name.as_str(), first.tests, first.exit), ("progrun", (75, 1), 101));
        assert_eq!(first.time, Duration::from_millis(60_250));
        assert!(!first.passed());
        assert!(!second.passed(), "nothing ran");
    }
}
