//! Every file of the kept corpus, and each of them damaged in many ways, is read or refused.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

use std::path::Path;

use carryon_fuzz::{Bounded, Folder, TARGETS};

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// Places of a file that are damaged.
const PLACES: usize = 64;

#[test]
fn what_is_kept_and_what_it_becomes_when_damaged_is_read_or_refused() {
    let folder = Folder::new().unwrap();
    for target in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        let mut files: Vec<_> = std::fs::read_dir(&corpus).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{}", corpus.display());
        for file in files {
            println!("{}", file.display());
            let bytes = std::fs::read(file).unwrap();
            target.run(&folder, &bytes);
            for place in (0..bytes.len()).step_by((bytes.len() / PLACES).max(1)) {
                target.run(&folder, &bytes[..place]);
                for wrong in [bytes[place] ^ (1 << (place % 8)), 0xFF] {
                    let mut damaged = bytes.clone();
                    damaged[place] = wrong;
                    target.run(&folder, &damaged);
                }
            }
        }
    }
}
