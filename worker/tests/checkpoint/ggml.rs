//! GGUF files in ggml's types.

use std::fs;
use std::path::Path;

use carryon_worker::model::gguf::Gguf;

use crate::common::tiny::Tiny;
use crate::error;

fn rows(gguf: &Gguf, name: &str) -> Vec<Vec<f32>> {
    let tensor = gguf.tensor(name).unwrap_or_else(|error| panic!("{error}"));
    let mut rows = vec![vec![f32::NAN; tensor.cols]; tensor.rows];
    rows.iter_mut().enumerate().for_each(|(row, values)| tensor.row(row, values));
    rows
}

/// `tests/oracles/formats.py` wrote them; gguf-py multiplies and adds in the same order, so the bits are the same.
#[test]
fn blocks_have_the_values_of_gguf_py() {
    let gguf = Gguf::open(Path::new("../tests/oracles/fixtures/ggml.gguf")).unwrap();
    let types = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"];
    assert_eq!(gguf.tensor_names().count(), 2 * types.len());
    for name in types {
        let (found, expected) = (rows(&gguf, name), rows(&gguf, &format!("{name}.expected")));
        assert_eq!((found.len(), found[0].len()), (2, 512), "{name}");
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_eq!(found.to_bits(), expected.to_bits(), "{name}, row {row}, value {place}: {found} is not {expected}");
            }
        }
    }
}

/// The numbers are those of ggml.h's `ggml_type`.
#[test]
fn other_types_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("typed.gguf");
    let whole = Tiny::default().gguf();
    // The type follows the tensor's name and two dimensions.
    let place = whole.windows(19).position(|window| window == b"blk.0.ffn_up.weight").unwrap() + 19 + 4 + 16;
    for (kind, expected) in [
        (9, "tensor type Q8_1, where {read} are read, is not supported"),
        (16, "tensor type IQ2_XXS, where {read} are read, is not supported"),
        (21, "tensor type IQ3_S, where {read} are read, is not supported"),
        (34, "tensor type TQ1_0, where {read} are read, is not supported"),
        (39, "tensor type MXFP4, where {read} are read, is not supported"),
        (4, "tensor type 4, where {read} are read, is not supported"),
        (12, "72 rows of 40 values are no blocks of 256"),
        (20, "72 rows of 40 values are no blocks of 32"),
    ] {
        let mut bytes = whole.clone();
        bytes[place] = kind;
        fs::write(&path, bytes).unwrap();
        let read = "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16";
        let expected = expected.replace("{read}", read);
        assert_eq!(error(&path), format!("{}: blk.0.ffn_up.weight: {expected}", path.display()));
    }
}
