//! The architecture, held by tests: who may depend on whom, how long a file may be, that examples and code map are true.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use carryon_tests::{binary, repository};

/// Lines of production code (what comes before the file's unit tests) a file may have.
const MAX_LINES: usize = 500;

/// The worker's rooms and the rooms each may use. Test code may use what it likes.
const ROOMS: &[(&str, &[&str])] = &[
    ("kernel", &[]),
    ("text", &[]),
    ("http", &[]),
    ("exchange", &["files", "tensor_file"]),
    ("model", &["kernel"]),
    ("head", &["kernel", "files", "tensor_file"]),
    ("base", &["kernel", "model", "head", "exchange", "text", "http", "files", "tensor_file"]),
    ("train", &["kernel", "head", "exchange", "text", "http", "files", "tensor_file"]),
    ("serve", &["exchange", "text", "http", "files"]),
    ("fetch", &["files", "http", "model"]),
];

/// The files of the operator's `cluster/` and the files each may use: only such as stand above it.
const CLUSTER: &[(&str, &[&str])] = &[
    ("lock", &[]),
    ("pod_user", &[]),
    ("args", &["pod_user"]),
    ("key", &[]),
    ("ask", &["key", "lock"]),
    ("clients", &[]),
    ("clocks", &[]),
    ("covers", &[]),
    ("election", &[]),
    ("events", &[]),
    ("failure", &[]),
    ("ownership", &["failure"]),
    ("status_patch", &[]),
    ("tenure", &["clocks"]),
    ("store", &["lock"]),
    ("synced", &["lock"]),
    ("stored", &["failure"]),
    ("written", &["lock"]),
    ("watch", &["clients", "store", "synced", "tenure", "written"]),
    ("queue", &["key", "lock"]),
    ("wake", &["key", "queue", "store", "watch"]),
    ("leader", &["args", "clocks", "election", "failure", "tenure"]),
    ("fence", &["tenure"]),
    ("apply", &["covers", "failure", "ownership", "written"]),
    ("refused", &["apply"]),
    ("context", &["apply", "ask", "events", "store", "written"]),
    ("kinds", &["context", "failure", "key", "store"]),
    ("attempts", &["context", "failure", "ownership"]),
    ("pools", &["context", "failure", "key", "kinds", "refused", "store"]),
    ("jobs", &["attempts", "context", "failure", "key", "kinds", "ownership", "refused", "store"]),
    ("deployments", &["context", "failure", "key", "kinds", "store"]),
    ("write_status", &["context", "failure", "kinds", "status_patch"]),
    ("reconcile", &["context", "failure", "key", "kinds", "write_status"]),
    ("metrics", &["key", "queue", "store"]),
    ("controller", &["context", "failure", "key", "kinds", "lock", "metrics", "queue", "reconcile", "synced", "tenure"]),
    ("readiness", &["lock", "metrics", "queue", "store", "synced", "tenure"]),
    ("endpoint", &["metrics", "readiness"]),
];

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The lines before the unit tests.
fn production(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().take_while(|line| *line != "#[cfg(test)]").map(String::from).collect()
}

/// All packages `package` is built from when it is built alone, tests and build scripts aside. (`cargo metadata` would add
/// the features that other packages of the workspace ask for.)
fn dependencies(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--package", package]);
    let output = command.current_dir(repository()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| line.split(' ').next()).filter(|name| *name != package).map(String::from).collect()
}

#[test]
fn packages_depend_on_what_the_table_allows() {
    let table: &[(&str, &[&str], &[&str])] = &[
        ("carryon-crds", &[], &["tokio", "kube-client", "candle-core", "reqwest"]),
        ("carryon-operator", &["carryon-crds"], &["candle-core", "candle-nn", "tokenizers"]),
        ("carryon-worker", &["carryon-crds"], &["kube-client", "kube-runtime"]),
        ("carryon-tests", &["carryon-crds", "carryon-operator"], &["candle-core", "carryon-worker"]),
    ];
    for (package, ours, forbidden) in table {
        let found = dependencies(package);
        let own: Vec<&str> = found.iter().map(String::as_str).filter(|name| name.starts_with("carryon-")).collect();
        assert_eq!(&own, ours, "{package} uses these packages of ours");
        let bad: Vec<_> = forbidden.iter().filter(|name| found.contains(**name)).collect();
        assert!(bad.is_empty(), "{package} depends on {bad:?}");
    }
}

#[test]
fn crds_has_neither_clock_nor_file_system() {
    for path in rust_files(&repository().join("crds/src")) {
        for line in production(&path) {
            let bad = ["std::fs", "std::net", "std::process", "SystemTime", "Instant::now", "::now()"]
                .into_iter()
                .find(|word| line.contains(word));
            assert_eq!(bad, None, "{}: {line}", path.display());
        }
    }
}

#[test]
fn rooms_of_the_worker_use_each_other_only_along_the_arrows() {
    let root = repository().join("worker/src");
    let rooms: BTreeSet<String> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(rooms, ROOMS.iter().map(|(room, _)| (*room).to_owned()).collect(), "rooms and the table of arrows");
    for (room, allowed) in ROOMS {
        rust_files(&root.join(room)).iter().for_each(|path| uses_only(path, "crate::", room, allowed, ROOMS));
    }
}

#[test]
fn files_of_the_operators_cluster_use_each_other_without_a_circle() {
    let root = repository().join("operator/src/cluster");
    let name = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_str().unwrap().split(['/', '.']).next().unwrap().to_owned();
    let files: BTreeSet<String> = rust_files(&root).iter().map(name).filter(|name| name != "mod").collect();
    assert_eq!(files, CLUSTER.iter().map(|(file, _)| (*file).to_owned()).collect(), "files and the table of arrows");
    for (place, (file, allowed)) in CLUSTER.iter().enumerate() {
        let below: Vec<_> = allowed.iter().filter(|other| !CLUSTER[..place].iter().any(|(above, _)| above == *other)).collect();
        assert!(below.is_empty(), "{file} uses {below:?}, which does not stand above it");
        uses_only(&root.join(file).with_extension("rs"), "super::", file, allowed, CLUSTER);
    }
}

/// The modules of `table` that a file names after `prefix` are its own and those allowed to it.
fn uses_only(path: &Path, prefix: &str, own: &str, allowed: &[&str], table: &[(&str, &[&str])]) {
    for line in production(path).iter().filter(|line| !line.trim_start().starts_with("//")) {
        for other in line.match_indices(prefix).map(|(at, word)| &line[at + word.len()..]) {
            let names: Vec<&str> = match other.strip_prefix('{') {
                Some(list) => list.split(['{', '}', ',']).map(str::trim).collect(),
                None => vec![other],
            };
            for name in names.iter().map(|name| name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default()) {
                let known = table.iter().any(|(module, _)| *module == name);
                assert!(!known || name == own || allowed.contains(&name), "{}: {own} must not use {name}: {line}", path.display());
            }
        }
    }
}

#[test]
fn no_file_is_too_long() {
    for package in ["crds", "operator", "worker", "tests"] {
        for path in rust_files(&repository().join(package)) {
            let lines = production(&path).len();
            assert!(lines <= MAX_LINES, "{} has {lines} lines, more than {MAX_LINES}", path.display());
        }
    }
}

/// Nothing here builds them; what they name must be there.
#[test]
fn images_name_the_toolchain_stages_and_features_that_there_are() {
    let read = |path: &str| fs::read_to_string(repository().join(path)).unwrap();
    let after = |line: &str, word: &str| line.split_once(word).map(|(_, rest)| rest.split(' ').next().unwrap().to_owned());
    let toolchain = format!("rust:{}-", after(&read("Cargo.toml").replace('"', " "), "rust-version =  ").unwrap());
    for package in ["operator", "worker"] {
        let (file, mut stages) = (read(&format!("{package}/Dockerfile")), Vec::new());
        for line in file.lines() {
            for image in [after(line, "FROM "), after(line, "--from=")].into_iter().flatten() {
                assert!(stages.contains(&image) || image.contains(':'), "{package}: no stage {image}");
                assert!(!image.starts_with("rust:") || image.starts_with(&toolchain), "{package}: {image} is not {toolchain}");
            }
            stages.extend(after(line, " AS "));
            let feature = after(line, &format!("--features carryon-{package}/"));
            let known = |name: &String| read(&format!("{package}/Cargo.toml")).contains(&format!("\n{name} = ["));
            assert!(feature.as_ref().is_none_or(known), "{package} has no feature {feature:?}");
            let binary = after(line, "--bin ");
            assert!(binary.as_ref().is_none_or(|name| *name == format!("carryon-{package}")), "{package}: {binary:?}");
        }
    }
}

/// With a worker that does not exist, `local up` ends after it has admitted every manifest and before it starts anything.
#[test]
fn every_example_is_admitted() {
    let mut examples = 0;
    for entry in fs::read_dir(repository().join("examples")).unwrap() {
        let folder = entry.unwrap().path();
        // Those for clusters with GPUs and images are validated by the operator's own tests.
        if !folder.is_dir() || ["models", "sources"].iter().any(|name| folder.ends_with(name)) {
            continue;
        }
        let state = std::env::temp_dir().join(format!("carryon-tidy-{}-{examples}", std::process::id()));
        let mut command = Command::new(binary("carryon-operator"));
        command.args(["local", "up", "--worker", "/nonexistent/carryon-worker", "--state-dir"]).arg(&state).arg("-f").arg(&folder);
        let output = command.output().unwrap();
        let _ = fs::remove_dir_all(&state);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let admitted = stderr.contains("worker binary /nonexistent/carryon-worker not found");
        assert!(admitted, "{} is refused: {stderr}", folder.display());
        examples += 1;
    }
    assert!(examples >= 2, "{examples} examples");
}

#[test]
fn the_code_map_names_every_folder() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let folders = |under: &str| {
        let entries = fs::read_dir(repository().join(under)).unwrap().map(|entry| entry.unwrap());
        let names = entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with('.') && !["target", "shared"].contains(&name.as_str())).collect::<Vec<_>>()
    };
    for under in [".", "worker/src", "operator/src"] {
        for name in folders(under) {
            assert!(readme.contains(&format!("{name}/")), "README.md's code map does not name {under}/{name}");
        }
    }
}
