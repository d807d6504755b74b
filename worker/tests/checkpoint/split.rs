//! A GGUF model in three files, as llama.cpp's converter cuts it, is one; what is missing or not in its place is named.

use std::fs;
use std::path::{Path, PathBuf};

use super::{digest, error};

const NAMES: [&str; 3] = ["llama3-00001-of-00003.gguf", "llama3-00002-of-00003.gguf", "llama3-00003-of-00003.gguf"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/fixtures/gguf").join(name)
}

fn copied(folder: &Path) -> PathBuf {
    for name in NAMES {
        fs::copy(fixture(name), folder.join(name)).unwrap();
    }
    folder.join(NAMES[0])
}

#[test]
fn all_files_are_found_beside_the_first_through_a_link_too_and_count_for_the_digest() {
    let folder = tempfile::tempdir().unwrap();
    let first = copied(folder.path());
    let link = folder.path().join("model");
    std::os::unix::fs::symlink(&first, &link).unwrap();
    let own = digest(&first);
    assert_eq!(digest(&link), own);
    let all: Vec<u8> = NAMES.iter().flat_map(|name| fs::read(fixture(name)).unwrap()).collect();
    assert_eq!(own, carryon_crds::wire::digest(&all));
}

#[test]
fn a_file_that_is_missing_or_not_in_its_place_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let first = copied(folder.path());
    let second = folder.path().join(NAMES[1]);
    assert!(
        error(&second).ends_with("split.no: it is not the first of its 3 files: name llama3-00001-of-00003.gguf"),
        "{}",
        error(&second)
    );
    fs::copy(fixture(NAMES[2]), &second).unwrap();
    assert_eq!(error(&first), format!("{}: split.no: it is not number 1, from 0 on, of 3 files", second.display()));
    fs::remove_file(&second).unwrap();
    assert!(
        error(&first).ends_with(&format!("split.count: it is one of 3 files, of which {} is missing", second.display())),
        "{}",
        error(&first)
    );
    let renamed = folder.path().join("model.gguf");
    fs::rename(&first, &renamed).unwrap();
    assert!(error(&renamed).ends_with("split.count: it is one of 3 files, but has no name of one of 3"), "{}", error(&renamed));
}
