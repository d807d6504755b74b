//! Folders whose weights are floats of 8 bits with a scale for each block of 128 x 128.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::PageTable;
use safetensors::tensor::{Dtype as TensorType, TensorView};
use serde_json::json;

use crate::common::engine::load;
use crate::common::tiny::{Random, Tiny, Weight};
use crate::error;

/// Some bytes and their values.
const VALUES: [(u8, f32); 8] = [(0x00, 0.0), (0x30, 0.5), (0x38, 1.0), (0x3c, 1.5), (0x40, 2.0), (0xb0, -0.5), (0xb8, -1.0), (0xbc, -1.5)];

/// Type, shape and bytes.
type Stored = (TensorType, Vec<usize>, Vec<u8>);

fn tiny() -> Tiny {
    Tiny { feed_forward: 200, vocabulary: 301, hidden: 140, ..Tiny::default() }
}

/// The layers' matrices in 8 bits and everything else in 32, and the values of those matrices.
fn stored() -> (BTreeMap<String, Stored>, BTreeMap<String, Weight>) {
    let (mut random, mut stored, mut values) = (Random(5), BTreeMap::new(), BTreeMap::new());
    for (name, (shape, weights)) in tiny().tensors() {
        let (true, [rows, cols]) = (name.contains("layers"), &shape[..]) else {
            stored.insert(name, (TensorType::F32, shape, bytemuck::cast_slice(&weights).to_vec()));
            continue;
        };
        let (rows, cols) = (*rows, *cols);
        let blocks = vec![rows.div_ceil(128), cols.div_ceil(128)];
        let scales: Vec<f32> = (0..blocks[0] * blocks[1]).map(|_| 0.1 + 0.05 * random.unit()).collect();
        let picked: Vec<_> = (0..rows * cols).map(|_| VALUES[random.next() as usize % 8]).collect();
        let scale = |place: usize| scales[place / cols / 128 * blocks[1] + place % cols / 128];
        values.insert(name.clone(), (shape.clone(), picked.iter().enumerate().map(|(place, (_, value))| value * scale(place)).collect()));
        stored.insert(format!("{name}_scale_inv"), (TensorType::F32, blocks, bytemuck::cast_slice(&scales).to_vec()));
        stored.insert(name, (TensorType::F8_E4M3, shape, picked.iter().map(|(byte, _)| *byte).collect()));
    }
    (stored, values)
}

fn write(stored: &BTreeMap<String, Stored>, folder: &Path) {
    let views = stored.iter().map(|(name, (kind, shape, bytes))| (name, TensorView::new(*kind, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &folder.join("model.safetensors")).unwrap();
    let mut config = tiny().config();
    config["quantization_config"] =
        json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_model_in_eight_bits_is_the_model_of_their_values_times_their_scales() {
    let states = |folder: &Path| {
        let engine = load(folder, Dtype::Float32, 2);
        engine.states(&[&[3, 1, 4, 1, 5, 300]], &mut [PageTable::default()], &engine.all_taps())
    };
    let (folder, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (stored, values) = stored();
    write(&stored, folder.path());
    Tiny { extra: values, ..tiny() }.write(plain.path());
    assert_eq!(states(folder.path()), states(plain.path()));
}

#[test]
fn scales_that_are_missing_or_wrong_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (weight, scales) = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight_scale_inv");
    let whole = stored().0;
    let four = |kind, shape: &[usize], bytes| Some((kind, shape.to_vec(), vec![0; bytes]));
    for (changed, replacement, expected) in [
        (scales, None, format!("{scales}: tensor is missing, but {weight} has values of 8 bits")),
        (scales, four(TensorType::F32, &[2, 1], 8), format!("{scales}: shape [2, 1] is not [2, 2], a scale for each block of {weight}")),
        (scales, four(TensorType::F32, &[4], 16), format!("{scales}: shape [4] is not [2, 2], a scale for each block of {weight}")),
        (scales, four(TensorType::I32, &[2, 2], 16), format!("{scales}: number type I32 is not supported")),
        (scales, four(TensorType::F8_E4M3, &[2, 2], 4), format!("{scales}: number type F8_E4M3 of scales is not supported")),
        (weight, four(TensorType::F8_E5M2, &[200, 140], 28000), format!("{weight}: number type F8_E5M2 is not supported")),
        // With values of 32 bits the scales are a tensor that nobody uses.
        (
            weight,
            four(TensorType::F32, &[200, 140], 112_000),
            format!("{scales}: a decoder of this configuration does not use this tensor"),
        ),
    ] {
        let mut damaged = whole.clone();
        match replacement {
            Some(stored) => drop(damaged.insert(changed.to_owned(), stored)),
            None => drop(damaged.remove(changed)),
        }
        write(&damaged, folder.path());
        assert_eq!(error(folder.path()), format!("{}: {expected}", folder.path().join("model.safetensors").display()));
    }
}
