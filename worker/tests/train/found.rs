//! Whatever else lies in an output folder: a trainer goes on with the bits of an unbroken run, or ends and names the file that is in its way.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use carryon_crds::wire::ExitCode;

use super::toy_pool::ToyPool;
use super::{Job, find};

/// What somebody, or a crash, has done to the output folder of a trainer that was killed after step 3 of 8.
type Done = fn(&Path);

fn last_checkpoint(output: &Path) -> std::path::PathBuf {
    output.join("checkpoints/step-0000000003.safetensors")
}

const GOES_ON: [(&str, Done); 20] = [
    ("others' files", |output| {
        for folder in ["", "checkpoints", "cache", "heads"] {
            fs::create_dir_all(output.join(folder).join("lost+found")).unwrap();
            fs::write(output.join(folder).join("notes.txt"), "ours").unwrap();
        }
    }),
    ("heads elsewhere", |output| {
        fs::create_dir(output.with_file_name("elsewhere")).unwrap();
        symlink("../elsewhere", output.join("heads")).unwrap();
    }),
    ("a folder named as a checkpoint", |output| fs::create_dir(output.join("checkpoints/step-0000000099.safetensors")).unwrap()),
    ("a checkpoint that leads nowhere", |output| symlink("/nowhere", output.join("checkpoints/step-0000000004.safetensors")).unwrap()),
    ("an empty checkpoint", |output| fs::write(last_checkpoint(output), "").unwrap()),
    ("half a checkpoint", |output| {
        let content = fs::read(last_checkpoint(output)).unwrap();
        fs::write(last_checkpoint(output), &content[..content.len() / 2]).unwrap();
    }),
    ("a checkpoint under a later name", |output| {
        fs::copy(last_checkpoint(output), output.join("checkpoints/step-0000000099.safetensors")).unwrap();
    }),
    ("no checkpoint", |output| fs::remove_dir_all(output.join("checkpoints")).unwrap()),
    ("no metrics", |output| fs::remove_file(output.join("metrics.jsonl")).unwrap()),
    ("metrics of others", |output| fs::write(output.join("metrics.jsonl"), "{\"step\": \"x\"}\n\n[]\n\u{FEFF}{\n").unwrap()),
    ("a marker that is no JSON", |output| fs::write(output.join("finished.json"), "{").unwrap()),
    ("a marker without its head", |output| {
        let message = r#"{"run": "r", "message": {"message": "", "digest": "sha256:00"}}"#;
        fs::write(output.join("finished.json"), message).unwrap();
    }),
    ("a marker that leads away", |output| {
        let message = r#"{"run": "r", "message": {"message": "", "digest": "../../.."}}"#;
        fs::write(output.join("finished.json"), message).unwrap();
    }),
    ("an empty lease", |output| fs::write(output.join("trainer.lease"), "").unwrap()),
    ("a cache without its key", |output| fs::remove_file(find(&output.join("cache"), "key.json")).unwrap()),
    ("a key of another cache", |output| fs::write(find(&output.join("cache"), "key.json"), "{}").unwrap()),
    ("half a cache", |output| {
        let states = find(&output.join("cache"), "states.bin");
        let content = fs::read(&states).unwrap();
        fs::write(&states, &content[..content.len() / 2 + 7]).unwrap();
    }),
    ("an empty cache", |output| fs::write(find(&output.join("cache"), "states.bin"), "").unwrap()),
    ("a cache with more behind it", |output| {
        let states = find(&output.join("cache"), "states.bin");
        let content = [fs::read(&states).unwrap(), vec![7; 100_000]].concat();
        fs::write(&states, content).unwrap();
    }),
    ("half written files", |output| {
        fs::create_dir(output.join(".tmp")).unwrap();
        for place in [".tmpabc", "checkpoints/.tmpabc", "metrics.jsonl.tmp"] {
            fs::write(output.join(place), "half").unwrap();
        }
    }),
];

#[test]
fn a_trainer_goes_on_whatever_lies_in_its_folder() {
    let (pool, unbroken) = (ToyPool::start(), Job::chat());
    unbroken.run(&pool).unwrap();
    for (name, done) in GOES_ON {
        let job = Job::chat();
        job.run(&pool).unwrap();
        job.kill_after(3);
        done(&job.path("output"));
        let ended = job.run(&pool);
        assert!(matches!(ended, Ok(ExitCode::Complete)), "{name}: {ended:?}");
        assert_eq!(job.head(), unbroken.head(), "{name}");
        let steps: Vec<u64> = job.steps().iter().map(|line| line.step).collect();
        assert!(steps.ends_with(&[4, 5, 6, 7, 8]), "{name}: {steps:?}");
        let kept = job.path("output/checkpoints/notes.txt");
        assert!(name != "others' files" || fs::read_to_string(kept).unwrap() == "ours");
    }
}

/// Where nothing can be written: the file that the error must name, below the job's folder.
const NAMED: [(&str, Done); 8] = [
    ("output/checkpoints", |output| {
        fs::remove_dir_all(output.join("checkpoints")).unwrap();
        fs::write(output.join("checkpoints"), "").unwrap();
    }),
    ("output/checkpoints/step-0000000004.safetensors", |output| {
        fs::create_dir(output.join("checkpoints/step-0000000004.safetensors")).unwrap();
    }),
    ("output/metrics.jsonl", |output| {
        fs::remove_file(output.join("metrics.jsonl")).unwrap();
        fs::create_dir(output.join("metrics.jsonl")).unwrap();
    }),
    ("output/trainer.lease", |output| fs::create_dir(output.join("trainer.lease")).unwrap()),
    ("output/heads", |output| fs::write(output.join("heads"), "").unwrap()),
    ("output/cache", |output| {
        fs::remove_dir_all(output.join("cache")).unwrap();
        fs::write(output.join("cache"), "").unwrap();
    }),
    ("output", |output| {
        fs::remove_dir_all(output).unwrap();
        fs::write(output, "").unwrap();
    }),
    ("output", |output| {
        fs::remove_dir_all(output).unwrap();
        symlink("/nowhere/at/all", output).unwrap();
    }),
];

#[test]
fn what_is_in_a_trainers_way_is_named() {
    let pool = ToyPool::start();
    for (name, done) in NAMED {
        let job = Job::chat();
        job.run(&pool).unwrap();
        job.kill_after(3);
        done(&job.path("output"));
        let error = job.run(&pool).unwrap_err();
        assert!(error.to_string().contains(job.path(name).to_str().unwrap()), "{name}: {error}");
        assert_eq!(error.exit_code(), ExitCode::Retryable, "{name}: {error}");
    }
}
