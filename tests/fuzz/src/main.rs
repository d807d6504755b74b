//! The fuzzer: `CARRYON_FUZZ` names the reader, the arguments are libFuzzer's.

#![no_main]

use std::sync::OnceLock;

use carryon_fuzz::{Bounded, Folder, TARGETS, Target};
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

static CHOSEN: OnceLock<(Folder, Target)> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let (folder, target) = CHOSEN.get_or_init(|| {
        let name = std::env::var("CARRYON_FUZZ").unwrap_or_default();
        let target = TARGETS.into_iter().find(|target| target.name == name).unwrap_or_else(|| panic!("CARRYON_FUZZ is {name:?}"));
        (Folder::new().expect("a folder"), target)
    });
    target.run(folder, bytes);
});
