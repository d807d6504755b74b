use carryon_crds::pool::Dtype;
use half::bf16;

use super::*;
use crate::head::Weight;
use crate::numbers::Values;
use crate::train::optim::{Map, Moment};

pub(crate) fn identity() -> Identity {
    let text = str::to_owned;
    Identity { weights: text("w"), tokenizer: text("t"), chat_template: text("c"), norm_point: text("final_norm") }
}

pub(crate) fn numerics() -> Numerics {
    Numerics { dtype: Dtype::Float32, device: "cpu".to_owned(), kernel: "portable".to_owned() }
}

fn checkpoint(step: u64, run: &str) -> Checkpoint {
    let tensor = |value| Weight::new(vec![2, 1], vec![value, f32::MIN_POSITIVE]);
    let halves = Weight::new(vec![1, 2], Values::Bfloat16(vec![bf16::ONE, bf16::MIN_POSITIVE]));
    let weights = Weights::from([("gate.weight".to_owned(), halves), ("output.weight".to_owned(), tensor(step as f32))]);
    let moments = [
        ("muon.output.weight.momentum", Moment::Plain(vec![0.5, f32::MIN_POSITIVE].into())),
        ("adamw.a.first_moment", Moment::Plain(Values::Bfloat16(vec![bf16::from_f32(0.5), bf16::NEG_ONE]))),
        ("adamw.a.second_moment", Moment::Int8 { map: Map::Unsigned, codes: vec![1, 255], scales: vec![0.1] }),
        ("muon.b.momentum", Moment::Int8 { map: Map::Signed, codes: vec![7, 0], scales: vec![3.0] }),
    ];
    let tensors = moments.map(|(name, moment)| (name.to_owned(), (vec![2, 1], moment.into())));
    let optimizer = OptimizerState { steps: step, tensors: tensors.into() };
    let best = Best { step: 1, loss: 0.1 + 0.2, accuracy: None, general: None, figure: None };
    let state = State::new(run.to_owned(), identity(), numerics(), 7);
    let state = State { step, optimizer_steps: step, best: Some(best), train_seconds: 1.0 / 3.0, ..state };
    let weights = Arc::new(weights);
    Checkpoint { state, average: (step > 3).then(|| weights.clone()), best: Some(weights.clone()), weights, optimizer }
}

#[test]
fn what_is_read_is_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let folder = Folder::new(folder.path().join("checkpoints"), 2);
    for step in [3, 6, 9] {
        folder.save(&checkpoint(step, "run")).unwrap();
    }
    let found = folder.latest("run", &identity()).unwrap();
    assert_eq!((found.checkpoint, found.warnings.len()), (Some(checkpoint(9, "run")), 0));
    assert_eq!(folder.files().unwrap().len(), 2);
}

#[test]
fn a_state_that_an_earlier_worker_wrote_is_read() {
    let state = checkpoint(3, "run").state;
    let mut earlier = serde_json::to_value(&state).unwrap();
    for member in ["total_steps", "eval_loss", "grad_norm"] {
        earlier.as_object_mut().unwrap().remove(member).unwrap();
    }
    assert_eq!(serde_json::from_value::<State>(earlier).unwrap(), state);
}

#[test]
fn what_keeps_general_text_is_better_than_what_does_not() {
    let best =
        |loss, increase| Best { step: 1, loss, accuracy: None, general: Some(General { head: 3.0 + increase, base: 3.0 }), figure: None };
    let (good, forgetful) = (best(0.9, 0.125), best(0.1, 0.5));
    assert!(forgetful.is_better(&good, None) && !good.is_better(&forgetful, None));
    assert!(good.is_better(&forgetful, Some(0.125)) && !forgetful.is_better(&good, Some(0.125)));
    assert!(forgetful.is_better(&good, Some(0.5)) && forgetful.is_better(&good, Some(0.1)), "both keep to it, or neither");
}

#[test]
fn the_better_figure_is_better_and_of_equal_ones_the_lower_loss() {
    let best = |figure, loss| Best { step: 1, loss, accuracy: None, general: None, figure };
    let better = |left: (Option<f64>, f64), right: (Option<f64>, f64)| best(left.0, left.1).is_better(&best(right.0, right.1), None);
    assert!(better((Some(0.8), 0.9), (Some(0.7), 0.1)) && !better((Some(0.7), 0.1), (Some(0.8), 0.9)));
    assert!(better((Some(0.8), 0.1), (Some(0.8), 0.2)) && !better((Some(0.8), 0.2), (Some(0.8), 0.2)));
    assert!(better((None, 0.1), (None, 0.2)) && better((Some(0.1), 9.0), (None, 0.2)));
    assert!(!better((Some(f64::NAN), 0.1), (Some(0.8), 0.2)) && !better((None, f64::NAN), (None, 0.2)));
}

#[test]
fn a_damaged_checkpoint_falls_back_to_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::new(directory.path().to_owned(), 3);
    for step in [3, 6, 9] {
        folder.save(&checkpoint(step, "run")).unwrap();
    }
    let files = folder.files().unwrap();
    let mut content = fs::read(&files[2]).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&files[2], &content).unwrap();
    fs::write(&files[1], &content[..content.len() - 3]).unwrap();
    let found = folder.latest("run", &identity()).unwrap();
    assert_eq!(found.checkpoint, Some(checkpoint(3, "run")));
    assert!(found.warnings[0].contains("step-0000000009.safetensors\" is damaged (its digest does not fit"), "{:?}", found.warnings);
    assert!(found.warnings[1].contains("step-0000000006.safetensors\" is damaged"), "{:?}", found.warnings);
}

#[test]
fn another_configuration_starts_anew_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::new(directory.path().to_owned(), 3);
    folder.save(&checkpoint(3, "old")).unwrap();
    let found = folder.latest("new", &identity()).unwrap();
    assert!(found.checkpoint.is_none() && found.warnings[0].contains("another configuration"), "{:?}", found.warnings);
    assert!(folder.files().unwrap().is_empty());
}

#[test]
fn checkpoints_of_another_base_are_set_aside_by_name_and_left_there() {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::new(directory.path().to_owned(), 3);
    [3, 6].into_iter().for_each(|step| folder.save(&checkpoint(step, "run")).unwrap());
    let other = Identity { tokenizer: "other".to_owned(), ..identity() };
    let found = folder.latest("run", &other).unwrap();
    let aside = directory.path().join(format!("base-{}", &identity().digest()[7..19]));
    assert_eq!(found.checkpoint, None);
    for (warning, name) in found.warnings.iter().zip(["step-0000000006.safetensors", "step-0000000003.safetensors"]) {
        let expected = format!("{name}\" is of another base (identity member `tokenizer` differs): set aside as {:?}", aside.join(name));
        assert!(warning.ends_with(&expected), "{warning}");
    }
    assert_eq!(file::read(&aside.join("step-0000000006.safetensors")).unwrap(), checkpoint(6, "run"));
    assert_eq!(folder.latest("run", &other).unwrap().warnings, [""; 0]);
}

#[test]
fn a_damaged_checkpoint_of_a_later_step_takes_no_place_of_a_whole_one() {
    let directory = tempfile::tempdir().unwrap();
    let folder = Folder::new(directory.path().to_owned(), 1);
    folder.save(&checkpoint(9, "run")).unwrap();
    fs::write(&folder.files().unwrap()[0], "damaged").unwrap();
    folder.save(&checkpoint(3, "run")).unwrap();
    folder.save(&checkpoint(6, "run")).unwrap();
    assert_eq!(folder.latest("run", &identity()).unwrap().checkpoint, Some(checkpoint(6, "run")));
    assert_eq!(folder.files().unwrap().len(), 2);
}
