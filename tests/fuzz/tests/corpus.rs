//! Every file of the kept corpus, and each of them damaged in many ways, is read or refused.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

use std::path::Path;

use carryon_fuzz::{Bounded, Folder, TARGETS};

#[global_allocator]
static ALLOCATOR: Bounded = Bounded::new();

#[test]
fn what_is_kept_and_what_it_becomes_when_damaged_is_read_or_refused() {
    let folder = Folder::new().unwrap();
    for (name, target) in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut count = 0;
        for file in std::fs::read_dir(&corpus).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            target(&folder, &bytes);
            let step = (bytes.len() / 64).max(1);
            for place in (0..bytes.len()).step_by(step) {
                target(&folder, &bytes[..place]);
                let mut damaged = bytes.clone();
                damaged[place] ^= 1 << (place % 8);
                target(&folder, &damaged);
                damaged[place] = 0xFF;
                target(&folder, &damaged);
                count += 3;
            }
        }
        println!("{name}: {count} inputs");
        assert!(count > 50, "{name}");
    }
}
