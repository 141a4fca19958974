//! Where the sources may have `unsafe`.
#![expect(clippy::unwrap_used, reason = "a test that fails says where, in its helpers too")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Whether a line of Rust has the keyword, beyond its comment.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.split(|c| !is_name(c)).any(|word| word == "unsafe")
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The files below a folder of the workspace that have the keyword, as paths within that folder.
fn unsafe_in(folder: &str) -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(folder);
    let found = sources(&root);
    assert!(!found.is_empty(), "{folder} has no sources");
    let is_unsafe = |path: &&PathBuf| fs::read_to_string(path).unwrap().lines().any(has_unsafe);
    let name = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
    found.iter().filter(is_unsafe).map(name).collect()
}

/// What is decided about a packet is decided by safe code; what the kernel demands is in as few
/// places as can be: a packet's bytes, the maps, and in a main file the licence.
#[test]
fn unsafe_is_where_it_must_be_and_nowhere_else() {
    assert_eq!(unsafe_in("lb-common"), BTreeSet::new());
    let places = ["frame.rs", "main.rs", "maps.rs"];
    let objects = ["src", "src/target"];
    let mut expected: BTreeSet<_> =
        objects.iter().flat_map(|object| places.map(|place| format!("{object}/{place}"))).collect();
    // Parts of `maps.rs`.
    expected.extend(["src/maps/loads.rs", "src/maps/snat.rs"].map(String::from));
    assert_eq!(unsafe_in("lb-ebpf"), expected);
    for object in objects {
        let main = format!("{}/../lb-ebpf/{object}/main.rs", env!("CARGO_MANIFEST_DIR"));
        let source = fs::read_to_string(main).unwrap();
        let lines: Vec<_> = source.lines().filter(|line| has_unsafe(line)).collect();
        assert_eq!(
            lines,
            [r#"#[unsafe(link_section = "license")]"#, "#[unsafe(no_mangle)]"],
            "{object}/main.rs"
        );
    }
}
