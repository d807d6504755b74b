//! Training data as people have them: lines that cannot be read, tables and folders of tables.

use std::fs;
use std::path::Path;

use carryon_crds::job::OnError;
use carryon_crds::wire::ExitCode;

use super::Job;
use super::toy_pool::ToyPool;

#[test]
fn bad_lines_are_left_out_counted_and_named_in_the_report_where_that_is_asked_for() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    let file = job.path("data/train.jsonl");
    let lines = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{{\"messages\":[]}}\n{lines}no <json>\n")).unwrap();
    let error = job.run(&pool).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Data);
    assert!(error.to_string().ends_with("line 1: field `messages` is empty"), "{error}");
    job.config.on_error = OnError::Skip;
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
    let words = job.last_words().message;
    assert!(words.ends_with("; 2 lines of the data were left out, see the report"), "{words}");
    let report = fs::read_to_string(job.head_folder().join("report.html")).unwrap();
    assert!(report.contains("line 1: field `messages` is empty") && report.contains("line 15, column 2: not JSON"), "{report}");
}

#[test]
fn a_folder_of_tables_trains_the_head_that_its_lines_train() {
    let pool = ToyPool::start();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/tables");
    let head = |train: &str, files: &[&str]| {
        let mut job = Job::chat();
        for file in files {
            let place = job.path("data").join(file);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::copy(fixtures.join(file), place).unwrap();
        }
        job.config.split.train = vec![train.to_owned()];
        // The toy's template knows no tools.
        job.config.on_error = OnError::Skip;
        job.run(&pool).unwrap();
        job.head()
    };
    let lines = head("chat.jsonl", &["chat.jsonl"]);
    let hub = ["hub/data/train-00000-of-00002.parquet", "hub/data/train-00001-of-00002.parquet"];
    assert!(head("hub", &hub) == lines, "Parquet as on the Hub");
    let saved = ["saved/dataset_dict.json", "saved/train/state.json", "saved/train/data-00000-of-00001.arrow"];
    assert!(head("saved", &saved) == lines, "what save_to_disk wrote");
}
