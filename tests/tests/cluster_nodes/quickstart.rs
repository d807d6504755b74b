//! The quick start with real training, unbroken and broken, under load, and a second head rolled out.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Instant;

use carryon_crds::CarryOnDeployment;
use carryon_crds::wire::digest;
use carryon_tests::{binary, example, model, python, repository};
use kube::ResourceExt as _;
use serde_json::json;
use tempfile::TempDir;

use super::closed::closed;
use super::key::Locked;
use super::load::{Load, Outcomes, ask};
use super::world::{HOME, World, job, short_job};

/// Tokens of an answer that tells two heads apart.
const TOKENS: u32 = 24;

const STEPS: u32 = 12;

/// `kubectl get KIND --output=wide --watch`, and the file that it prints to.
struct Watch {
    arguments: [String; 6],
    path: PathBuf,
    kubectl: Child,
}

impl Watch {
    fn start(world: &World, namespace: &str, kind: &str) -> Self {
        let path = std::env::temp_dir().join(format!("carryon-watch-{kind}-{}", std::process::id()));
        let arguments = ["--namespace", namespace, "get", kind, "--output=wide", "--watch"].map(str::to_owned);
        let kubectl = world.cluster.command("kubectl").args(&arguments).stdout(File::create(&path).unwrap()).spawn().unwrap();
        Self { arguments, path, kubectl }
    }

    fn stop(mut self, world: &World) -> String {
        let asked = format!("kubectl {}", self.arguments.join(" "));
        assert!(world.cluster.command("pkill").args(["--full", &asked]).status().unwrap().success(), "{asked} has ended by itself");
        self.kubectl.wait().unwrap();
        let text = std::fs::read_to_string(&self.path).unwrap();
        std::fs::remove_file(self.path).unwrap();
        text
    }
}

/// The same manifests and data by `carryon-operator local`: digest of the head's bytes.
fn local_head(world: &World) -> String {
    let root = TempDir::new().unwrap();
    let (manifests, state) = (root.path().join("manifests"), root.path().join("state"));
    std::fs::create_dir(&manifests).unwrap();
    for (file, text) in
        [("pool.yaml", example("quickstart/pool.yaml")), ("job.yaml", job(STEPS)), ("volumes.yaml", example("quickstart/volumes.yaml"))]
    {
        std::fs::write(manifests.join(file), text).unwrap();
    }
    let local = |arguments: &[&str]| {
        let mut operator = Command::new(binary("carryon-operator"));
        operator.arg("local").args(arguments).arg("--state-dir").arg(&state);
        operator
    };
    let mut up = local(&["up", "--detach", "--until", "complete", "--timeout", "480"]);
    up.arg("-f").arg(&manifests).arg("--worker").arg(binary("carryon-worker"));
    up.args([
        "--volume",
        &format!("models={}", model().parent().unwrap().display()),
        "--volume",
        &format!("quickstart-data={}", world.data().display()),
    ]);
    let output = up.output().unwrap();
    let heads = std::fs::read_dir(state.join("volumes/quickstart-output/quickstart/heads"));
    let head = heads.map(|mut heads| std::fs::read(heads.next().unwrap().unwrap().path().join("head.safetensors")));
    assert!(local(&["down"]).status().unwrap().success());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    digest(&head.unwrap().unwrap())
}

/// Applied to served, every state on the way seen by kubectl.
fn served(world: &World, space: &str) -> String {
    let watches = ["bmp", "coj", "cod"].map(|kind| Watch::start(world, space, kind));
    let started = Instant::now();
    for manifest in [example("quickstart/pool.yaml"), job(STEPS), example("quickstart/deployment.yaml")] {
        world.apply(space, &manifest);
    }
    let url = world.until_served(space);
    world.until_answered(&url);
    println!("from apply to the first answer: {:.1} s", started.elapsed().as_secs_f64());
    let [pool, job, deployment] = watches.map(|watch| watch.stop(world));
    println!("{pool}{job}{deployment}");
    for (table, states) in [
        (pool, &["0 of 1 pods are ready", "1 of 1 pods serve"][..]),
        (job, &["waiting for BaseModelPool", "waiting for its pod to run", "training", "the head is written"]),
        (deployment, &["waiting for CarryOnJob", "0 of 1 gateways are ready", "1 of 1 gateways serve"]),
    ] {
        let mut rest = table.as_str();
        for state in states {
            let (_, after) = rest.split_once(state).unwrap_or_else(|| panic!("{state} is not seen in\n{table}"));
            rest = after;
        }
    }
    let client = world
        .cluster
        .command(python().to_str().unwrap())
        .arg(repository().join("tests/client.py"))
        .args([&url, "quickstart"])
        .output()
        .unwrap();
    assert!(client.status.success(), "client.py: {}", String::from_utf8_lossy(&client.stderr));
    url
}

/// What the operator says of itself.
fn metrics(world: &World) {
    let pod = world.cluster.kubectl(&["--namespace", HOME, "get", "pods", "--output", "name"]);
    let path = format!("/api/v1/namespaces/{HOME}/pods/{}:8080/proxy/metrics", pod.trim().trim_start_matches("pod/"));
    let lines = [
        "carryon_objects{condition=\"Complete\",kind=\"CarryOnJob\"} 1",
        "carryon_objects{condition=\"Ready\",kind=\"BaseModelPool\"} 1",
        "carryon_objects{condition=\"Ready\",kind=\"CarryOnDeployment\"} 1",
        "carryon_queue_length{kind=\"CarryOnJob\"} 0",
        "carryon_reconciles_total{kind=\"CarryOnJob\",outcome=\"done\"} ",
        "carryon_reconcile_seconds_count{kind=\"CarryOnJob\"} ",
    ];
    world.until("the operator's metrics", || {
        let text = world.cluster.kubectl(&["get", "--raw", &path]);
        let missing = lines.into_iter().find(|line| !text.contains(line));
        missing.map_or(Ok(()), |line| Err(format!("no {line} in\n{text}")))
    });
}

/// The operator is killed after three of its writes and once in between, every other pod deleted; pool and trainer are on different GPU nodes.
fn served_nonetheless(world: &World, space: &str, expected: BTreeSet<String>) -> String {
    let mut gpus = ["server", "trainer"].map(|_| String::new());
    let placed = world.cluster.may("pool and trainer on different GPU nodes: the nodes get GPUs that no device backs");
    if placed {
        world.cluster.add_extended_resource("node1", "nvidia.com/gpu", 8);
        world.cluster.add_extended_resource("node2", "nvidia.com/gpu", 1);
        gpus = [("server", 8), ("trainer", 1)]
            .map(|(part, count)| format!("  {part}:\n    resources:\n      limits:\n        nvidia.com/gpu: {count}\n"));
    }
    let [server, trainer] = gpus;
    world.apply(space, &(example("quickstart/pool.yaml") + &server));
    world.apply(space, &(job(STEPS) + &trainer));
    world.apply(space, &example("quickstart/deployment.yaml"));
    let node = |component: &str| world.pod(space, component).spec.unwrap().node_name.unwrap();
    let kill_operator = || world.cluster.kubectl(&["--namespace", HOME, "delete", "pod", "--all", "--grace-period=0", "--force"]);
    let kill_operator_after = |child: &str| {
        world.wait(&format!("{child} is written"), || world.children(space).contains(child));
        kill_operator();
    };

    kill_operator_after("statefulset.apps/smollm2-pool");
    kill_operator_after("job.batch/quickstart-1");
    world.until_step(space, 1);
    assert!(!placed || (node("pool").as_str(), node("trainer").as_str()) == ("node1", "node2"));
    world.until_step(space, 5);
    world.delete_pod(space, "trainer");
    world.wait("another trainer", || world.step(space) < 5);
    world.until_step(space, 6);
    kill_operator();
    world.delete_pod(space, "pool");
    kill_operator_after("deployment.apps/quickstart-gateway");
    let url = world.until_served(space);
    let gateway = world.pod(space, "gateway").name_any();
    world.delete_pod(space, "gateway");
    world.until_replaced(space, &gateway);
    world.until_answered(&url);

    let job = world.job(space).status.unwrap();
    println!("broken: {} attempts, {} counted failures", job.attempt, job.failures);
    assert_eq!(job.failures, 0, "{job:#?}");
    let attempts = (2..=job.attempt).map(|attempt| format!("job.batch/quickstart-{attempt}"));
    let expected = expected.into_iter().chain(attempts).collect();
    assert_eq!(world.children(space), expected, "children are missing, or there are too many");
    url
}

/// A pool whose container dies under streams is back with its heads; who was cut off was told.
fn killed_under_load(world: &World, space: &str, url: &str) {
    if !world.cluster.may("a pool's container killed in its node") {
        return;
    }
    let whole = world.cluster.block_on(ask(url, "quickstart", 64)).unwrap();
    let load = Load::start(&world.cluster, url, "quickstart", 3, 64);
    world.wait("some answers", || load.answered() >= 3);
    let restarts = || world.pod(space, "pool").status.unwrap().container_statuses.unwrap()[0].restart_count;
    let before = restarts();
    // One of which nothing was sent yet is begun again when the pool is back, and its client does not notice.
    let begun = load.begun();
    world.wait("a stream is under way", || load.begun() > begun);
    world.cluster.kill_container(&world.pod(space, "pool"));
    world.wait("the container is started anew", || restarts() == before + 1);
    world.until_answered(url);
    let answered = load.answered();
    world.wait("the clients are answered again", || load.answered() > answered + 3);
    let Outcomes { answers, failures } = load.stop(&world.cluster);
    println!("{} answers, {} failures while the pool was away; one of them: {:?}", answers.len(), failures.len(), failures.first());
    assert!(!failures.is_empty(), "nobody noticed");
    // The head is back with the pool: the base alone would answer otherwise.
    answers.iter().for_each(|text| assert_eq!(text, &whole));
}

/// Two heads of two jobs behind one gateway, one of which is replaced while clients ask both: none of them notices anything but other answers of
/// that one.
fn rolled(world: &World, space: &str, url: &str) {
    world.apply(space, &short_job("second", 4));
    world.wait("the second head", || world.condition(space, "coj/second", "Complete").0 == "Complete");
    let serve = |other: &str| {
        let gateway = world.pod(space, "gateway").name_any();
        let heads = [("quickstart", "quickstart"), ("other", other)]
            .map(|(name, job)| json!({ "name": name, "source": { "jobRef": { "name": job } } }));
        world.patch::<CarryOnDeployment>(space, "quickstart", json!({ "spec": { "heads": heads } }));
        world.until_replaced(space, &gateway);
    };
    serve("second");
    let answer = |model: &str| world.cluster.block_on(ask(url, model, TOKENS)).unwrap();
    let (first, second, base) = (answer("quickstart"), answer("other"), answer("quickstart-base"));
    assert!(first != second && first != base && second != base, "{first:?}, {second:?}, {base:?}");

    let loads = ["quickstart", "other"].map(|model| Load::start(&world.cluster, url, model, 1, TOKENS));
    world.wait("answers of both heads", || loads.iter().all(|load| load.answered() >= 2));
    serve("quickstart");
    let answered = loads[1].answered();
    world.wait("answers of the head that has come", || loads[1].answered() > answered + 2);
    let [one, other] = loads.map(|load| load.stop(&world.cluster));
    assert_eq!([one.failures, other.failures].concat(), [""; 0]);
    println!("{} and {} requests while one of two heads was rolled, none failed", one.answers.len(), other.answers.len());
    assert!(one.answers.iter().all(|text| *text == first), "{:?}", one.answers);
    // While both gateways serve, either answers.
    assert!(other.answers.iter().all(|text| [&first, &second].contains(&text)), "{:?}", other.answers);
    assert_eq!((other.answers.first(), other.answers.last()), (Some(&second), Some(&first)));
    let deployment: CarryOnDeployment = world.get(space, "quickstart");
    let stable: Vec<_> = deployment.status.unwrap().heads.iter().map(|head| head.stable.as_ref().unwrap().source.clone()).collect();
    assert_eq!(stable, ["CarryOnJob/quickstart"; 2]);
}

#[test]
fn the_quick_start_is_served_from_two_nodes_with_the_bits_of_a_local_run() {
    let Some(world) = World::start(2) else { return };
    world.install("install", "carry-on", &[]);
    world.test("carry-on");
    let (unbroken, broken) = (world.volumes("unbroken"), world.volumes("broken"));
    let url = served(&world, &unbroken);
    metrics(&world);
    let head = world.head(&unbroken);
    let children = world.children(&unbroken);
    closed(&world, &unbroken);
    // A kubelet takes about a minute: that of the broken run.
    let locked = Locked::start(&world, &unbroken);
    let broken_url = served_nonetheless(&world, &broken, children);
    if let Some(locked) = locked {
        locked.until_rotated();
    }
    assert_eq!(world.head(&broken), head, "the head of the broken run has other bits");
    killed_under_load(&world, &broken, &broken_url);
    world.cluster.kubectl(&["delete", "namespace", &broken, "--wait=false"]);
    rolled(&world, &unbroken, &url);
    if world.cluster.may("a local run has the same bits: the nodes may have other processors") {
        assert_eq!(local_head(&world), head, "the head of the local run has other bits");
    }
}
