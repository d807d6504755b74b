//! ggml's types of tensors: their numbers in a file, their names, and how those that are read are decoded.

use candle_core::quantized::GgmlDType::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

use crate::model::encoding::Encoding::{self, Bf16, F16, F32, Ggml, Iq4Nl};

const KINDS: [(u32, &str, Option<Encoding>); 34] = [
    (0, "F32", Some(F32)),
    (1, "F16", Some(F16)),
    (2, "Q4_0", Some(Ggml(Q4_0))),
    (3, "Q4_1", Some(Ggml(Q4_1))),
    (6, "Q5_0", Some(Ggml(Q5_0))),
    (7, "Q5_1", Some(Ggml(Q5_1))),
    (8, "Q8_0", Some(Ggml(Q8_0))),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(Ggml(Q2K))),
    (11, "Q3_K", Some(Ggml(Q3K))),
    (12, "Q4_K", Some(Ggml(Q4K))),
    (13, "Q5_K", Some(Ggml(Q5K))),
    (14, "Q6_K", Some(Ggml(Q6K))),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", Some(Iq4Nl)),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(Bf16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
    (41, "Q1_0", None),
];

/// How values of the type `kind` are decoded; the type's name when they are not, and what is.
pub(super) fn encoding(kind: u32) -> Result<Encoding, String> {
    let read = || KINDS.iter().filter(|(.., encoding)| encoding.is_some()).map(|(_, name, _)| *name).collect::<Vec<_>>().join(", ");
    match KINDS.iter().find(|(number, ..)| *number == kind) {
        Some((_, _, Some(encoding))) => Ok(*encoding),
        Some((_, name, None)) => Err(format!("tensor type {name}, where {} are read,", read())),
        None => Err(format!("tensor type {kind}, where {} are read,", read())),
    }
}
