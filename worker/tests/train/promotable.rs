//! What a head must be to be promoted: its answers, and the bounds of its figures.

use carryon_crds::job::{Generation, Metric, Task, Threshold};
use carryon_crds::wire::{ExitCode, TrainConfig};
use carryon_worker::head::artifact;

use super::toy_pool::ToyPool;
use super::{Job, refusal};

fn generation(regex: Option<&str>) -> Option<Generation> {
    Some(Generation { regex: regex.map(str::to_owned), json_field: None, max_new_tokens: 16, max_samples: 3 })
}

fn threshold(metric: Metric, min: Option<f64>, max: Option<f64>) -> Threshold {
    Threshold { metric, min, max }
}

/// This pool answers alike whatever it is asked.
#[test]
fn a_head_below_its_thresholds_is_written_and_says_so() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.config.evaluation.generation = generation(None);
    let bounds = [(Metric::ExactMatch, Some(0.5), None), (Metric::Loss, None, Some(100.0)), (Metric::Loss, Some(100.0), None)];
    job.config.evaluation.thresholds = bounds.map(|(metric, min, max)| threshold(metric, min, max)).to_vec();
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
    let (words, (_, manifest)) = (job.last_words(), artifact::read(&job.head_folder()).unwrap());
    let share = manifest.metrics.evaluation["exact_match"];
    assert!(share.value == 0.0 && share.low < 1e-9 && (0.5..0.6).contains(&share.high), "none of three: {share:?}");
    assert_eq!(words.evaluation["exact_match"], 0.0);
    let loss = manifest.metrics.eval_loss.unwrap();
    let unmet = ["exact_match is 0.0000, less than 0.5".to_owned(), format!("loss is {loss:.4}, less than 100")];
    assert_eq!((&words.unmet_thresholds[..], &manifest.metrics.unmet_thresholds[..]), (&unmet[..], &unmet[..]));
    assert!(words.message.ends_with(&format!("; not promotable: {}", unmet.join(", "))), "{}", words.message);
    let report = std::fs::read_to_string(job.head_folder().join("report.html")).unwrap();
    assert!(report.contains("<b>not promotable</b>") && report.contains("exact match of answers"), "{report}");
}

#[test]
fn what_cannot_be_judged_is_refused_before_anything_is_trained() {
    let pool = ToyPool::start();
    let refused = |change: &dyn Fn(&mut TrainConfig)| {
        let mut job = Job::chat();
        change(&mut job.config);
        let (message, code) = refusal(job.run(&pool));
        assert_eq!((code, job.path("output/metrics.jsonl").exists()), (ExitCode::Configuration, false), "{message}");
        message
    };
    let answers = |regex: &str| refused(&|config| config.evaluation.generation = generation(Some(regex)));
    let lacks = answers("number 1[0-4]");
    assert!(
        lacks.starts_with("evaluation.generation: the answer of held-out sample 3 has no match of regex \"number 1[0-4]\": \"number 15"),
        "{lacks}"
    );
    assert!(answers("(").starts_with("evaluation.generation: regex \"(\": "));
    let of_labels = refused(&|config| config.evaluation.thresholds = vec![threshold(Metric::Accuracy, Some(0.5), None)]);
    assert_eq!(of_labels, "evaluation.thresholds: task CausalLM has no figure Accuracy");
    let chosen = refused(&|config| config.evaluation.metric = Metric::ExactMatch);
    assert_eq!(chosen, "evaluation.metric ExactMatch: task CausalLM has no such figure");
    let of_pairs = refused(&|config| {
        (config.task, config.evaluation.generation) = (Task::Dpo, generation(None));
    });
    assert_eq!(of_pairs, "evaluation.generation is for task CausalLM");
    let scaled = refused(&|config| config.evaluation.alphas = vec![0.0]);
    assert_eq!(scaled, "evaluation.alphas: 0 is not from 0.01 to 100");
}
