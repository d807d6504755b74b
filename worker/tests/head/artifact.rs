//! The artifact on disk: complete, deterministic, and refused by name when it is not what it says.

use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::head::{BaseReference, HeadManifest, Lineage, Metrics};
use carryon_crds::wire::{HeadShape, Identity, Numerics};
use carryon_worker::head::{Artifact, Weights, artifact};

use super::fixtures::Case;

fn base() -> BaseReference {
    let identity = Identity {
        weights: "sha256:1".into(),
        tokenizer: "sha256:2".into(),
        chat_template: String::new(),
        norm_point: "final_norm".into(),
    };
    BaseReference { name: "tiny".into(), identity, others: Vec::new() }
}

fn head() -> Artifact {
    let case = Case::load("gated");
    Artifact::new(case.shape, base(), case.weights).unwrap()
}

fn manifest(artifact: &Artifact) -> HeadManifest {
    HeadManifest {
        format_version: 1,
        digest: artifact.digest.clone(),
        shape: artifact.shape.clone(),
        base: artifact.base.clone(),
        other_numerics: Vec::new(),
        numerics: Numerics { dtype: Dtype::Float32, device: "cpu".into(), kernel: "avx512_f32".into() },
        chat_template: None,
        end_token_ids: vec![2],
        parameters: artifact.parameters(),
        lineage: Lineage {
            job: "default/math".into(),
            train_data: "sha256:3".into(),
            evaluation_data: None,
            averaged_seeds: Vec::new(),
            seed: 0,
            init_head: None,
            steps: 3,
            worker_version: "0.1.0".into(),
        },
        metrics: Metrics::default(),
    }
}

fn written() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let head = head();
    artifact::write(folder.path(), &head, &manifest(&head)).unwrap();
    folder
}

fn refusal(folder: &Path) -> String {
    artifact::read(folder).unwrap_err().to_string()
}

/// The bytes of a head with its header text changed; the length of the text is kept with blanks.
fn with_header(change: impl Fn(String) -> String) -> Vec<u8> {
    let bytes = head().to_bytes();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat()
}

fn parse_refusal(bytes: &[u8]) -> String {
    Artifact::parse("request body", bytes).unwrap_err().to_string()
}

#[test]
fn comes_back_as_written_with_equal_bytes() {
    let folder = written();
    let (read, read_manifest) = artifact::read(folder.path()).unwrap();
    assert_eq!(read, head());
    assert_eq!(read_manifest, manifest(&read));
    assert_eq!(fs::read(folder.path().join("head.safetensors")).unwrap(), head().to_bytes());
    assert_eq!(read.digest, carryon_crds::wire::digest(&read.to_bytes()));
    assert_eq!(Artifact::parse("body", &read.to_bytes()).unwrap(), read);
}

#[test]
fn damage_is_named_with_its_file() {
    let folder = written();
    let path = folder.path().join("head.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(refusal(folder.path()).contains("head.json: digest is sha256:"));
    fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
    assert!(refusal(folder.path()).contains("head.safetensors: header is invalid"));
    fs::remove_file(&path).unwrap();
    assert!(refusal(folder.path()).contains("failed to read"));
    fs::write(folder.path().join("head.json"), "{").unwrap();
    assert!(refusal(folder.path()).contains("head.json: manifest is invalid: EOF"));
}

#[test]
fn a_manifest_of_another_head_is_refused() {
    let head = head();
    let folder = written();
    let mut other = manifest(&head);
    other.shape.window = 3;
    fs::write(folder.path().join("head.json"), serde_json::to_string(&other).unwrap()).unwrap();
    assert!(refusal(folder.path()).contains("shape is"));
    other = manifest(&head);
    other.digest = "sha256:0".into();
    assert!(artifact::write(folder.path(), &head, &other).unwrap_err().to_string().contains("expected sha256:0"));
}

#[test]
fn tensors_that_the_shape_does_not_ask_for_are_named() {
    let case = Case::load("gated");
    let refusal = |change: &dyn Fn(&mut HeadShape, &mut Weights)| {
        let (mut shape, mut weights) = (case.shape.clone(), case.weights.clone());
        change(&mut shape, &mut weights);
        Artifact::new(shape, base(), weights).unwrap_err().to_string()
    };
    assert!(refusal(&|_, weights| drop(weights.remove("gate.bias"))).contains("tensor \"gate.bias\" is missing"));
    assert!(refusal(&|shape, _| shape.gate = false).contains("tensor \"gate.bias\" is not part of a head of this shape"));
    assert!(refusal(&|shape, _| shape.hidden_size = 65).contains("tensor \"bridge.0.weight\" has shape [24, 64], expected [24, 65]"));
    assert!(refusal(&|_, weights| weights.get_mut("gate.bias").unwrap().values.floats_mut().truncate(63)).contains("has 63 values"));
}

#[test]
fn numbers_from_outside_are_bounded_before_anything_is_allocated() {
    let huge = with_header(|header| header.replace("\\\"width\\\":24", "\\\"width\\\":4000000000"));
    assert!(parse_refusal(&huge).contains("the head's width is 4000000000, not in 2..=8192"));
    let deep = with_header(|header| header.replace("\\\"blocks\\\":2", "\\\"blocks\\\":200"));
    assert!(parse_refusal(&deep).contains("blocks is 200"));
    let odd = with_header(|header| header.replace("\\\"heads\\\":3", "\\\"heads\\\":5"));
    assert!(parse_refusal(&odd).contains("heads 5 do not divide width 24"));
    let half = with_header(|header| header.replace("F32", "I32"));
    assert!(parse_refusal(&half).contains("has type I32, expected F32"));
    let nameless = with_header(|header| header.replace("carryon.head", "carryon.tail"));
    assert!(parse_refusal(&nameless).contains("request body: carryon.head is invalid: is missing"));
    assert!(parse_refusal(&[255; 64]).contains("header is invalid"));
    assert!(parse_refusal(&[]).contains("header is invalid"));
}
