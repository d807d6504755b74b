//! Hidden states that a run has fetched, and when they are fetched again.

use std::fs;

use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::wire::ExitCode;
use carryon_worker::head::artifact;

use super::toy_pool::ToyPool;
use super::{Job, find};

#[test]
fn states_are_asked_for_once() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.config.training.num_train_epochs = 3;
    job.run(&pool).unwrap();
    assert_eq!(pool.asked(), 13 + 4);
}

#[test]
fn another_kernel_asks_for_the_states_again() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    job.kill_after(3);
    pool.describe(|description| description.numerics.kernel = "other".to_owned());
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
    assert!(pool.asked() > 17, "{}", pool.asked());
}

#[test]
fn a_damaged_cache_record_is_fetched_again() {
    let (pool, unbroken, job) = (ToyPool::start(), Job::chat(), Job::chat());
    unbroken.run(&pool).unwrap();
    job.run(&pool).unwrap();
    job.kill_after(0);
    let cache = find(&job.path("output/cache"), "states.bin");
    let mut content = fs::read(&cache).unwrap();
    content[600] ^= 1;
    fs::write(&cache, content).unwrap();
    let asked = pool.asked();
    job.run(&pool).unwrap();
    assert_eq!(pool.asked(), asked + 1);
    assert_eq!(job.head(), unbroken.head());
}

#[test]
fn states_of_eight_bits_train_a_head_much_like_states_of_thirty_two_and_lie_in_a_cache_of_their_own() {
    let (pool, plain, mut small) = (ToyPool::start(), Job::chat(), Job::chat());
    small.config.hidden_states_dtype = HiddenStatesDtype::Float8E4M3;
    plain.run(&pool).unwrap();
    assert_eq!(pool.asked(), 17);
    small.run(&pool).unwrap();
    assert_eq!(pool.asked(), 34);
    let loss = |job: &Job| artifact::read(&job.head_folder()).unwrap().1.metrics.eval_loss.unwrap();
    assert!(small.head() != plain.head());
    assert!((loss(&small) - loss(&plain)).abs() < 0.02, "{} against {}", loss(&small), loss(&plain));
    let bytes = |job: &Job| {
        let folder = fs::read_dir(job.path("output/cache")).unwrap().next().unwrap().unwrap().path();
        fs::metadata(folder.join("states.bin")).unwrap().len()
    };
    assert!(bytes(&small) <= bytes(&plain));
    let unbroken = small.head();
    small.kill_after(3);
    small.run(&pool).unwrap();
    assert_eq!((pool.asked(), small.head() == unbroken), (34, true));
}
