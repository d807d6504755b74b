//! Pods that are asked in turn.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use carryon_crds::names;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt as _;
use tokio::sync::Notify;

use super::get::{Http, Unheard};
use crate::cluster::lock::lock;
use crate::shared::said::Said;
use crate::shared::{meta, worker};

/// How long a pod that did not answer is left alone, and how often those that are gone are looked for.
const RETRY: Duration = Duration::from_secs(5);

/// How fast a round goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two asks, whomever they go to.
    pub between: Duration,
    /// After an answer; never again when absent.
    pub again: Option<Duration>,
}

/// The pods that are asked for one thing.
pub struct Round<T> {
    http: Http,
    path: &'static str,
    pace: Pace,
    who: Who,
    /// By UID.
    pods: Mutex<HashMap<String, Asked<T>>>,
    /// Somebody new is to be asked.
    new: Notify,
}

/// Which container of a pod answers.
#[derive(Clone, Copy, Debug)]
enum Who {
    Worker,
    Fetch,
}

impl Who {
    fn port(self, pod: &Pod) -> Option<i32> {
        match self {
            Self::Worker => worker::port(pod),
            Self::Fetch => worker::fetch_port(pod),
        }
    }

    fn status(self, pod: &Pod) -> Option<&ContainerStatus> {
        match self {
            Self::Worker => worker::status(pod),
            Self::Fetch => worker::fetch_status(pod),
        }
    }
}

/// A pod that is asked.
struct Asked<T> {
    namespace: String,
    pod: String,
    /// Name of the object it works for.
    instance: String,
    url: String,
    /// Which container answers: another one has other things to say.
    container: String,
    last: Option<Instant>,
    /// Whether an answer is on its way.
    under_way: bool,
    answer: Option<T>,
}

/// One question to one container.
struct Question {
    uid: String,
    url: String,
    container: String,
}

impl<T> Asked<T> {
    /// Time until it may be asked; none when there is nothing to ask.
    fn due_in(&self, pace: Pace, now: Instant) -> Option<Duration> {
        if self.under_way {
            return None;
        }
        let period = if self.answer.is_some() { pace.again? } else { RETRY };
        Some(self.last.map_or(Duration::ZERO, |last| (last + period).saturating_duration_since(now)))
    }
}

impl<T: Said + Clone + PartialEq> Round<T> {
    /// A round with nobody in it.
    pub fn new(http: Http, path: &'static str, pace: Pace) -> Self {
        Self { http, path, pace, who: Who::Worker, pods: Mutex::default(), new: Notify::new() }
    }

    /// One that asks the containers that fetch models.
    pub fn of_fetches(http: Http, path: &'static str, pace: Pace) -> Self {
        Self { who: Who::Fetch, ..Self::new(http, path, pace) }
    }

    /// What `pod` said last. From now on it is asked, until it is gone.
    pub fn hear(&self, pod: &Pod) -> Option<T> {
        let (uid, ip) = (pod.uid()?, pod.status.as_ref()?.pod_ip.as_deref()?);
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{}{}", self.who.port(pod)?, self.path);
        let container = self.who.status(pod)?.container_id.clone().unwrap_or_default();
        let mut pods = lock(&self.pods);
        if let Some(known) = pods.get(&uid).filter(|known| known.url == url && known.container == container) {
            return known.answer.clone();
        }
        let (namespace, instance) = (meta::namespace(pod), pod.labels().get(names::INSTANCE_LABEL)?.clone());
        let asked = Asked { namespace, pod: pod.name_any(), instance, url, container, last: None, under_way: false, answer: None };
        pods.insert(uid, asked);
        self.new.notify_one();
        None
    }

    /// What `pods` said last, by name; who has not answered yet is left out.
    pub fn hear_all<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<String, T> {
        pods.filter_map(|pod| Some((pod.name_any(), self.hear(pod)?))).collect()
    }

    /// Asks without end those that `lives(namespace, name, uid)`, and calls `news(namespace, name)` of an object whose pod says something else.
    pub async fn run(&self, lives: impl Fn(&str, &str, &str) -> bool, news: impl Fn(&str, &str)) {
        let due = futures::stream::unfold(Instant::now(), |swept| self.due(swept, &lives));
        let asks = due.for_each_concurrent(None, |question| {
            let news = &news;
            async move {
                let answer = self.http.get(&question.url).await;
                if let Some((namespace, name)) = self.learn(&question, answer) {
                    news(&namespace, &name);
                }
            }
        });
        asks.await;
    }

    /// The next question, once its time has come; and when those that are gone were looked for.
    async fn due(&self, mut swept: Instant, lives: impl Fn(&str, &str, &str) -> bool) -> Option<(Question, Instant)> {
        loop {
            let now = Instant::now();
            if now.duration_since(swept) >= RETRY {
                self.forget(&lives);
                swept = now;
            }
            match self.next(now) {
                Ok(question) => {
                    tokio::time::sleep(self.pace.between).await;
                    return Some((question, swept));
                }
                Err(wait) => tokio::time::timeout(wait, self.new.notified()).await.unwrap_or_default(),
            }
        }
    }

    /// To the pod that has waited longest of those that are due; else how long nobody is.
    fn next(&self, now: Instant) -> Result<Question, Duration> {
        let mut pods = lock(&self.pods);
        let waits = |asked: &Asked<T>| asked.due_in(self.pace, now);
        let due = pods.iter_mut().filter(|(_, asked)| waits(asked) == Some(Duration::ZERO)).min_by_key(|(_, asked)| asked.last);
        if let Some((uid, asked)) = due {
            (asked.last, asked.under_way) = (Some(now), true);
            return Ok(Question { uid: uid.clone(), url: asked.url.clone(), container: asked.container.clone() });
        }
        Err(pods.values().filter_map(waits).fold(RETRY, Duration::min))
    }

    /// Enters what came of a question; the object for which it is news. What another container of the pod has said is no answer any more.
    fn learn(&self, question: &Question, answer: Result<T, Unheard>) -> Option<(String, String)> {
        let mut pods = lock(&self.pods);
        let same = |asked: &&mut Asked<T>| asked.url == question.url && asked.container == question.container;
        let asked = pods.get_mut(&question.uid).filter(same)?;
        asked.under_way = false;
        match answer {
            Ok(answer) if asked.answer.as_ref() != Some(&answer) => {
                asked.answer = Some(answer);
                Some((asked.namespace.clone(), asked.instance.clone()))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::debug!("pod {}/{} is not heard: {error}", asked.namespace, asked.pod);
                None
            }
        }
    }

    fn forget(&self, lives: impl Fn(&str, &str, &str) -> bool) {
        lock(&self.pods).retain(|uid, asked| lives(&asked.namespace, &asked.pod, uid));
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::wire::Progress;
    use serde_json::json;

    use super::*;

    const PACE: Pace = Pace { between: Duration::from_millis(50), again: Some(Duration::from_secs(5)) };

    fn round(pace: Pace) -> Round<Progress> {
        Round::new(Http::new(Duration::from_secs(1)).unwrap(), "/progress", pace)
    }

    fn pod(name: &str, container: &str) -> Pod {
        let labels = json!({"app.kubernetes.io/component": "trainer", "app.kubernetes.io/instance": name});
        let status = json!({"podIP": "::1", "containerStatuses": [{"name": "trainer", "containerID": container, "image": "", "imageID": "", "ready": true, "restartCount": 0}]});
        let container = json!({"name": "trainer", "ports": [{"containerPort": 8081}]});
        let pod = json!({"metadata": {"name": name, "namespace": "a", "uid": name, "labels": labels}, "spec": {"containers": [container]}, "status": status});
        serde_json::from_value(pod).unwrap()
    }

    fn progress(step: u64) -> Progress {
        Progress { step, ..Progress::default() }
    }

    #[test]
    fn each_is_asked_in_turn_and_none_before_its_time() {
        let (round, start) = (round(PACE), Instant::now());
        let names = ["x", "y", "z"];
        names.iter().for_each(|name| assert_eq!(round.hear(&pod(name, "c")), None));
        let ask = |second: u64| {
            let question = round.next(start + Duration::from_secs(second)).ok()?;
            assert_eq!(question.url, "http://[::1]:8081/progress");
            Some(question.uid)
        };
        let mut first: Vec<_> = [0, 1, 2].into_iter().filter_map(ask).collect();
        assert_eq!(ask(4), None, "answers are on their way");
        let answer = |uid: &str| {
            let question = Question { uid: uid.to_owned(), url: "http://[::1]:8081/progress".to_owned(), container: "c".to_owned() };
            round.learn(&question, Ok(progress(1)))
        };
        for uid in &first {
            assert_eq!(answer(uid), Some(("a".to_owned(), uid.clone())));
        }
        assert_eq!(ask(4), None, "no more often than every five seconds");
        // All are due; who was asked first comes first again.
        assert_eq!([9, 9, 9].into_iter().filter_map(ask).collect::<Vec<_>>(), first);
        first.sort();
        assert_eq!(first, names);
        assert_eq!(answer("x"), None, "no news");
        assert_eq!(round.hear(&pod("x", "c")), Some(progress(1)));
    }

    #[test]
    fn another_container_is_asked_anew_and_a_pod_that_is_gone_forgotten() {
        let (round, start) = (round(Pace { again: None, ..PACE }), Instant::now());
        round.hear(&pod("x", "first"));
        let question = round.next(start).ok().unwrap();
        round.learn(&question, Ok(progress(1)));
        assert_eq!(round.hear(&pod("x", "first")), Some(progress(1)));
        assert!(round.next(start + Duration::from_secs(3600)).is_err(), "once is enough");
        assert_eq!(round.hear(&pod("x", "second")), None);
        // The first one's answer was on its way.
        assert_eq!(round.learn(&question, Ok(progress(9))), None);
        assert_eq!(round.hear(&pod("x", "second")), None);
        assert!(round.next(start).is_ok());
        round.forget(|namespace, pod, uid| (namespace, pod, uid) != ("a", "x", "x"));
        assert!(lock(&round.pods).is_empty());
    }
}
