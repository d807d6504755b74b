use std::path::Path;

use super::*;
use crate::train::data::dataset::{self, Part};
use crate::train::data::rows::Rows;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/tables").join(name)
}

/// All rows of some files; members that are null are absent.
fn rows(paths: &[PathBuf]) -> Result<Vec<serde_json::Value>, DataError> {
    let mut all = Vec::new();
    for path in paths {
        let mut rows = Rows::open(path)?;
        while let Some(row) = rows.next_row()? {
            all.push(serde_json::from_str(row).unwrap());
        }
    }
    Ok(all)
}

#[test]
fn tables_of_the_python_libraries_hold_what_their_lines_hold() {
    let lines = |name: &str| rows(&[fixture(name)]).unwrap();
    assert_eq!(lines("chat.jsonl").len(), 5);
    let folder = |name: &str, part| rows(&dataset::files(&fixture(name), part).unwrap()).unwrap();
    assert_eq!(folder("hub", Part::Train), lines("chat.jsonl"), "datasets, to_parquet");
    assert_eq!(folder("saved", Part::Train), lines("chat.jsonl"), "datasets, save_to_disk");
    assert_eq!(folder("saved", Part::Evaluation), lines("label.jsonl"));
    assert_eq!(folder("saved/test", Part::Train), lines("label.jsonl"), "one split of it");
    for name in ["pandas.parquet", "zstd.parquet", "dictionary.parquet"] {
        assert_eq!(lines(name), lines("label.jsonl"), "{name}");
    }
}

#[test]
fn a_row_is_named_by_its_number() {
    let mut rows = Rows::open(&fixture("pandas.parquet")).unwrap();
    rows.next_row().unwrap();
    rows.next_row().unwrap();
    assert!(rows.error("is wrong").to_string().ends_with("pandas.parquet\" row 2: is wrong"));
}

#[test]
fn a_damaged_table_is_refused_by_name_and_takes_no_more_memory_than_it_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged");
    for name in ["pandas.parquet", "saved/test/data-00000-of-00001.arrow"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        let check = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            // What is read in spite of the damage is the checks' of its lines; here it is enough that it ends.
            match Rows::open(&path).and_then(drain) {
                Err(error) => assert!(error.to_string().contains("damaged\""), "{error}"),
                Ok(rows) => assert!(rows < 1 << 20, "{rows}"),
            }
        };
        (4..whole.len()).step_by(7).for_each(|length| check(&whole[..length]));
        for place in 4..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 0xff;
            check(&bytes);
        }
    }
}

/// Reads on until the end, or to a number of rows that no such file has.
fn drain(mut rows: Rows) -> Result<u64, DataError> {
    let mut count = 0;
    while rows.next_row()?.is_some() && count < 1 << 20 {
        count += 1;
    }
    Ok(count)
}
