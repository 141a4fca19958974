//! The documentation names tests as proofs; they must exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

/// A link in a table's last cell: the name of a test, and the file in which it is.
#[derive(Debug)]
struct Proof<'a> {
    test: &'a str,
    file: &'a str,
}

/// The rows of all tables whose columns are "Behaviour" and "Proved by".
fn rows_of(page: &str) -> impl Iterator<Item = &str> {
    let mut is_inside = false;
    page.lines().filter(move |line| {
        let is_header = line.starts_with("| Behaviour | Proved by |");
        is_inside = is_header || is_inside && line.starts_with('|');
        is_inside && !is_header && !line.starts_with("|---")
    })
}

/// What stands in a row's last cell, if it is `[test](../file), [test](../file)` and no more.
fn proofs(row: &str) -> Option<Vec<Proof<'_>>> {
    let cell = row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap_or_default();
    cell.split(", ")
        .map(|link| {
            let (test, file) = link.strip_prefix('[')?.strip_suffix(')')?.split_once("](../")?;
            Some(Proof { test, file })
        })
        .collect()
}

/// The names of the tests in a source file.
fn tests_in(source: &str) -> BTreeSet<String> {
    let lines: Vec<&str> = source.lines().map(str::trim_start).collect();
    let name = |at: usize| {
        let line = lines[at].strip_prefix("async ").unwrap_or(lines[at]);
        let (name, _) = line.strip_prefix("fn ")?.split_once('(')?;
        let mut attributes = lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
        attributes.any(|attribute| attribute.contains("test")).then(|| name.to_owned())
    };
    (0..lines.len()).filter_map(name).collect()
}

#[test]
fn every_behaviour_of_the_data_path_has_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = fs::read_to_string(root.join("docs/datapath.md")).unwrap();
    let mut files: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let (mut rows, mut wrong) = (0, Vec::new());
    for row in rows_of(&page) {
        rows += 1;
        let Some(proofs) = proofs(row) else {
            wrong.push(format!("no test: {row}"));
            continue;
        };
        for Proof { test, file } in proofs {
            let tests = files.entry(file).or_insert_with(|| {
                fs::read_to_string(root.join(file)).map(|text| tests_in(&text)).unwrap_or_default()
            });
            if !tests.contains(test) {
                wrong.push(format!("no test {test} in {file}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(rows > 50, "the tables are not found: {rows} rows");
}

/// systemd's own checker, where there is one, with a program that is there.
#[test]
fn the_unit_file_is_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let unit = fs::read_to_string(root.join("dist/lb.service")).unwrap();
    let installed = "/usr/local/bin/lb-userspace";
    assert!(unit.contains(&format!("ExecStart={installed}\n")), "{unit}");
    assert!(fs::read_to_string(root.join("README.md")).unwrap().contains(installed));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lb.service");
    fs::write(&path, unit.replace(installed, "/bin/true")).unwrap();
    match Command::new("systemd-analyze").arg("verify").arg(&path).output() {
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            let about_it: Vec<_> =
                errors.lines().filter(|line| line.contains("lb.service")).collect();
            assert!(about_it.is_empty(), "{about_it:#?}");
        }
        Err(error) => eprintln!("not checked by systemd-analyze: {error}"),
    }
}
