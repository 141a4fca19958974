//! The documentation names tests as proofs; they must exist.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

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

/// The rows of all tables whose first columns are "Behaviour" and `second`.
fn rows_of<'a>(page: &'a str, second: &str) -> impl Iterator<Item = &'a str> {
    let (mut is_inside, header) = (false, format!("| Behaviour | {second} |"));
    page.lines().filter(move |line| {
        let is_header = line.starts_with(&header);
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
    for row in rows_of(&page, "Proved by") {
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

/// The full paths of all tests: the file's modules, `tests` if it has that module inside, the name.
fn test_paths(root: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    let mut folders: Vec<_> =
        ["lb-userspace/src", "lb-userspace/tests", "tests/tests"].map(|it| root.join(it)).into();
    let tops = folders.clone();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Some(top) = tops.iter().find(|top| path.starts_with(top)) else { continue };
            let modules = path.strip_prefix(top).unwrap().to_str().unwrap();
            let Some(modules) = modules.strip_suffix(".rs") else { continue };
            let modules = modules.strip_suffix("/mod").unwrap_or(modules).replace('/', "::");
            let source = fs::read_to_string(&path).unwrap();
            let inside = if source.contains("\nmod tests {") { "::tests" } else { "" };
            paths.extend(tests_in(&source).iter().map(|test| format!("{modules}{inside}::{test}")));
        }
    }
    paths
}

/// What code in a cell names: `a::{b, c}` are two paths.
fn named_paths(cell: &str) -> Vec<String> {
    let expand = |code: &str| match code.split_once('{') {
        None => vec![code.to_owned()],
        Some((module, names)) => {
            let names = names.trim_end_matches('}').split(", ");
            names.map(|name| format!("{module}{name}")).collect()
        }
    };
    cell.split('`').skip(1).step_by(2).flat_map(expand).collect()
}

/// Whether a path is that of a test, or of a module of tests, or the beginning of a test's with `*`
/// at its end. What is left out of its beginning says where the test is.
fn names_a_test(tests: &[String], path: &str) -> bool {
    let path = format!("::{path}");
    tests.iter().map(|test| format!("::{test}")).any(|test| {
        let (module, _) = test.rsplit_once("::").unwrap_or_default();
        match path.strip_suffix('*') {
            None => test.ends_with(&path) || module.ends_with(&path),
            Some(beginning) => {
                let (of, name) = beginning.rsplit_once("::").unwrap_or_default();
                module.ends_with(of) && test[module.len()..].starts_with(&format!("::{name}"))
            }
        }
    })
}

#[test]
fn every_behaviour_of_application_load_balancers_has_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = fs::read_to_string(root.join("docs/application.md")).unwrap();
    let tests = test_paths(root);
    let (mut rows, mut wrong) = (0, Vec::new());
    for row in rows_of(&page, "Test") {
        rows += 1;
        let cell = row.split('|').nth(2).unwrap_or_default().trim();
        let named = named_paths(cell);
        if named.is_empty() && cell != "the same" {
            wrong.push(format!("no test: {row}"));
        }
        let missing = named.iter().filter(|path| !names_a_test(&tests, path));
        wrong.extend(missing.map(|path| format!("no test {path}: {row}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(rows > 80, "the tables are not found: {rows} rows");
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
