//! The schedule beside a device that only costs time.

use rand::SeedableRng as _;
use rand::rand_core::Rng as _;
use rand_chacha::ChaCha8Rng;

use super::*;

/// Seconds: fixed part of a step, a token of a prompt, a decoded token.
type Device = [f64; 3];
/// A small model on two cores, a large one on a few, a large one on a GPU.
const DEVICES: [Device; 3] = [[0.008, 0.0007, 0.002], [0.4, 0.03, 0.02], [0.02, 0.000_05, 0.0002]];
/// Seconds of a row of a training layer.
const ROW: f64 = 0.0001;

/// A request to be served.
#[derive(Clone, Default)]
struct Client {
    arrival: f64,
    prompt: usize,
    answer: usize,
    /// Tokens of the prompt that have run.
    done: usize,
    /// When each token came.
    tokens: Vec<f64>,
}

/// A request of a trainer, which asks again as soon as it is answered.
#[derive(Clone)]
struct Request {
    trainer: Trainer,
    kind: Kind,
    arrival: f64,
    /// Seconds of a batch; a loss is one.
    batch: f64,
    batches: usize,
    /// Seconds between the answer and the next request.
    pause: f64,
    /// Seconds that ran, and the longest time between request and answer.
    ran: f64,
    slowest: f64,
}

fn captures(trainer: Trainer) -> Request {
    Request { trainer, kind: Kind::Capture, arrival: 0.0, batch: 2.0, batches: 8, pause: 0.0, ran: 0.0, slowest: 0.0 }
}

fn losses(trainer: Trainer, pause: f64) -> Request {
    Request { kind: Kind::Loss, batch: 0.3, batches: 1, pause, ..captures(trainer) }
}

fn lane(schedule: &mut Schedule<usize, (usize, usize), (usize, usize)>, kind: Kind) -> &mut Lane<(usize, usize)> {
    match kind {
        Kind::Loss => &mut schedule.losses,
        Kind::Capture => &mut schedule.captures,
    }
}

struct World {
    now: f64,
    device: Device,
    random: ChaCha8Rng,
    clients: Vec<Client>,
    requests: Vec<Request>,
    /// Request, batches left, seconds left of the batch: of a loss and a capture that run.
    running: [Option<(usize, usize, f64)>; 2],
    arrived: (Vec<bool>, Vec<bool>),
    schedule: Schedule<usize, (usize, usize), (usize, usize)>,
}

impl World {
    fn new(device: Device, max_tokens: usize, clients: Vec<Client>, requests: Vec<Request>) -> Self {
        let arrived = (vec![false; clients.len()], vec![false; requests.len()]);
        let (random, schedule) = (ChaCha8Rng::seed_from_u64(1), Schedule::new(64, max_tokens));
        Self { now: 0.0, device, random, clients, requests, running: [None; 2], arrived, schedule }
    }

    fn run(mut self, end: f64) -> Self {
        while self.now < end {
            self.arrive();
            let sequences = self.schedule.serving.lengths().0 > 0;
            match self.schedule.turn(sequences, |_| true) {
                Turn::Serve => self.serve(),
                Turn::Train(kind, work, rows) => self.train(kind, work, rows),
                Turn::Idle => self.now += 0.001,
            }
        }
        self
    }

    fn arrive(&mut self) {
        for (index, client) in self.clients.iter().enumerate() {
            if client.arrival <= self.now && !std::mem::replace(&mut self.arrived.0[index], true) {
                self.schedule.serving.push(index);
            }
        }
        for (index, request) in self.requests.iter().enumerate() {
            if request.arrival <= self.now && !std::mem::replace(&mut self.arrived.1[index], true) {
                lane(&mut self.schedule, request.kind).push(request.trainer, (index, request.batches));
            }
        }
        let clients = &self.clients;
        let wanted = |index: &usize| clients[*index].tokens.len() < clients[*index].answer;
        self.schedule.serving.refresh(wanted, |_| Ok::<_, ()>(true)).unwrap();
    }

    /// What takes `seconds` on the average takes a tenth more or less.
    fn pass(&mut self, seconds: f64) -> f64 {
        let seconds = seconds * (0.9 + 0.2 * f64::from(self.random.next_u32()) / f64::from(u32::MAX));
        self.now += seconds;
        seconds
    }

    fn serve(&mut self) {
        let active = self.schedule.serving.active().to_vec();
        let demand = |index: &usize| match self.clients[*index].prompt - self.clients[*index].done {
            0 => Demand::Decode,
            rest => Demand::Prefill(rest),
        };
        let demands: Vec<_> = active.iter().map(demand).collect();
        let grants = self.schedule.grants(&demands);
        let tokens = Tokens::of(&demands, &grants);
        assert!(tokens.prefill + tokens.decode > 0, "a step that runs nothing");
        let [fixed, prefill, decode] = self.device;
        let seconds = self.pass(fixed + prefill * tokens.prefill as f64 + decode * tokens.decode as f64);
        for ((index, demand), granted) in active.iter().zip(demands).zip(grants).filter(|(_, granted)| *granted > 0) {
            let client = &mut self.clients[*index];
            if demand != Demand::Decode {
                client.done += granted;
            }
            if client.done == client.prompt {
                client.tokens.push(self.now);
            }
        }
        self.schedule.served(tokens, seconds);
    }

    fn train(&mut self, kind: Kind, work: Work, rows: usize) {
        if let Work::Start(place) = work {
            let (request, batches) = lane(&mut self.schedule, kind).take(place).unwrap();
            self.running[kind as usize] = Some((request, batches - 1, self.requests[request].batch));
        }
        let (index, batches, left) = self.running[kind as usize].unwrap();
        let rows = rows.min((left / ROW).ceil() as usize);
        let seconds = self.pass(rows as f64 * ROW);
        self.schedule.trained(kind, rows, seconds);
        let request = &mut self.requests[index];
        request.ran += seconds;
        let left = left - rows as f64 * ROW;
        self.running[kind as usize] = Some((index, batches, left));
        if left < ROW / 2.0 {
            self.running[kind as usize] = None;
            lane(&mut self.schedule, kind).end((batches > 0).then_some((index, batches)));
            if batches == 0 {
                request.slowest = request.slowest.max(self.now - request.arrival);
                (request.arrival, self.arrived.1[index]) = (self.now + request.pause, false);
            }
        }
    }

    /// The time between two tokens of which `share` are shorter, over all clients.
    fn gap(&self, share: f64) -> f64 {
        let mut gaps: Vec<f64> = self.clients.iter().flat_map(|client| client.tokens.windows(2).map(|pair| pair[1] - pair[0])).collect();
        gaps.sort_by(f64::total_cmp);
        gaps[((gaps.len() - 1) as f64 * share) as usize]
    }

    fn trained(&self) -> f64 {
        self.requests.iter().map(|request| request.ran).sum::<f64>() / self.now
    }
}

fn clients(count: usize, prompt: usize, answer: usize) -> Vec<Client> {
    vec![Client { prompt, answer, ..Client::default() }; count]
}

/// Seconds of a step of `decode` answers alone, and the longest a step beside prompts may take.
fn steps([fixed, _, decode]: Device, count: usize) -> (f64, f64) {
    let alone = fixed + decode * count as f64;
    (alone, STEP_SECONDS.max(2.0 * alone))
}

#[test]
fn answers_keep_their_pace_beside_a_trainer_at_full_speed_and_it_keeps_its_share() {
    for device in DEVICES {
        let world = World::new(device, 2048, clients(4, 16, 100_000), vec![captures(1)]).run(100.0);
        let (alone, _) = steps(device, 4);
        assert!(world.gap(0.95) < 1.75 * alone, "{device:?}: {} instead of {alone}", world.gap(0.95));
        assert!((0.3..0.4).contains(&world.trained()), "{device:?}: {}", world.trained());
    }
}

#[test]
fn prompts_never_stop_answers_and_go_on_beside_them() {
    for (device, trainers) in DEVICES.iter().flat_map(|device| [(*device, 0), (*device, 2)]) {
        let mut all = clients(4, 16, 100_000);
        all.push(Client { arrival: 5.0, prompt: 3000, answer: 1, ..Client::default() });
        let requests = (0..trainers).map(captures).collect();
        let world = World::new(device, 2048, all, requests).run(900.0);
        let ((alone, longest), beside) = (steps(device, 4), if trainers > 0 { 1.5 } else { 1.0 });
        let noise = 1.25;
        assert!(world.gap(1.0) < noise * beside * longest, "{device:?} {trainers}: {} instead of {longest}", world.gap(1.0));
        // What of each step is beyond the answers' own part is the prompt's, once some steps have taught what its tokens cost.
        let expected = 3000.0 * device[1] / (1.0 - alone / longest) * beside;
        let first = world.clients[4].tokens[0] - 5.0;
        assert!(first < noise * expected + 5.0 * longest, "{device:?} {trainers}: {first} instead of {expected}");
    }
}

#[test]
fn training_keeps_its_share_under_prompts_without_end() {
    for device in DEVICES {
        let prompts = (0..2000).map(|index| Client { arrival: f64::from(index) * 0.01, prompt: 1500, answer: 40, ..Client::default() });
        let world = World::new(device, 2048, prompts.collect(), vec![captures(1)]).run(60.0);
        assert!((0.3..0.4).contains(&world.trained()), "{device:?}: {}", world.trained());
    }
}

#[test]
fn more_answers_than_a_step_holds_take_turns() {
    let world = World::new(DEVICES[0], 16, clients(60, 4, 100_000), vec![captures(1)]).run(60.0);
    let counts = world.clients.iter().map(|client| client.tokens.len());
    assert!(counts.clone().max().unwrap() - counts.clone().min().unwrap() <= 20, "{:?}", counts.collect::<Vec<_>>());
    assert!(world.gap(1.0) < 8.0 * 1.5 * steps(DEVICES[0], 16).1);
}

#[test]
fn a_device_that_only_trains_answers_after_one_slice() {
    for device in DEVICES {
        let one = Client { arrival: 3.0, prompt: 10, answer: 1, ..Client::default() };
        let world = World::new(device, 2048, vec![one], vec![captures(1), losses(2, 0.0)]).run(10.0);
        let first = world.clients[0].tokens[0] - 3.0;
        assert!(first < 1.2 * (MOST_SLICE + steps(device, 0).0 + 10.0 * device[1]), "{device:?}: {first}");
    }
}

#[test]
fn trainers_take_turns_however_much_they_ask_for() {
    let requests = vec![captures(1), captures(1), captures(1), captures(2), Request { batches: 1, ..captures(3) }];
    for answers in [0, 4] {
        let world = World::new(DEVICES[0], 2048, clients(answers, 16, 100_000), requests.clone()).run(400.0);
        let of = |trainer| world.requests.iter().filter(|request| request.trainer == trainer).map(|request| request.ran).sum::<f64>();
        for trainer in [1, 2, 3] {
            let share = of(trainer) / world.trained() / world.now;
            assert!((share - 1.0 / 3.0).abs() < 0.04, "{answers} answers, trainer {trainer}: {share}");
        }
    }
}

#[test]
fn a_loss_goes_before_captures_which_keep_a_quarter_beside_losses_without_end() {
    // Alone with captures a loss takes its own time; a trainer that computes between its losses waits for nothing else.
    let world = World::new(DEVICES[0], 2048, Vec::new(), vec![captures(1), losses(2, 0.6)]).run(100.0);
    assert!(world.requests[1].slowest < 0.3 * 1.1 + 1.2 * MOST_SLICE, "{}", world.requests[1].slowest);

    let world = World::new(DEVICES[0], 2048, Vec::new(), vec![captures(1), losses(2, 0.0), losses(3, 0.0)]).run(100.0);
    assert!((0.24..0.3).contains(&(world.requests[0].ran / world.now)), "{}", world.requests[0].ran / world.now);
    assert!((world.requests[1].ran / world.requests[2].ran - 1.0).abs() < 0.1);
}

#[test]
fn what_was_held_up_is_made_up_for_little_by_little() {
    let mut schedule: Schedule<(), (), ()> = Schedule::new(4, 2048);
    schedule.serving.push(());
    schedule.serving.refresh(|()| true, |()| Ok::<_, ()>(true)).unwrap();
    schedule.captures.push(1, ());
    // A million rows a second.
    schedule.trained(Kind::Capture, 1_000_000, 1.0);
    // Runs steps until training has a turn, and that for as long as it lasts; returns the number of steps, and the seconds of training.
    let mut round = |step: f64, slice: Option<f64>| {
        let (mut steps, mut trained) = (0, 0.0);
        loop {
            match schedule.turn(true, |()| true) {
                Turn::Serve if trained > 0.0 => return (steps, trained),
                Turn::Serve => {
                    steps += 1;
                    schedule.served(Tokens { prefill: 0, decode: 1 }, step);
                }
                Turn::Train(kind, work, rows) => {
                    if let Work::Start(place) = work {
                        schedule.captures.take(place);
                    }
                    let seconds = rows as f64 / 1e6;
                    let (rows, seconds) = slice.map_or((rows, seconds), |seconds| ((seconds * 1e6) as usize, seconds));
                    trained += seconds;
                    schedule.trained(kind, rows, seconds);
                }
                Turn::Idle => unreachable!(),
            }
        }
    };
    let near = |found: (usize, f64), steps: usize, trained: f64| assert!(found.0 == steps && (found.1 - trained).abs() < 1e-5, "{found:?}");
    near(round(0.02, None), 1, 0.01);
    near(round(0.003, None), 3, 0.0045);
    // A slice that took half a second is paid for by the next second of steps.
    near(round(0.02, Some(0.5)), 1, 0.5);
    near(round(0.02, None), 50, 0.01);
    // A step that took ten seconds is worth five of training, but no turn is longer than beside a step of the longest that is meant.
    near(round(10.0, None), 1, 0.05);
    near(round(0.02, None), 1, 0.05);
}

#[test]
fn whatever_comes_nothing_starves() {
    for seed in 0..30 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut below = |most: usize| random.next_u32() as usize % most;
        let (device, max_tokens) = (DEVICES[below(3)], [64, 512, 2048][below(3)]);
        let all: Vec<_> = (0..below(60) + 1)
            .map(|_| Client { arrival: below(20_000) as f64 / 1e3, prompt: below(400) + 1, answer: below(60) + 1, ..Client::default() })
            .collect();
        let requests: Vec<_> = (0..below(6))
            .map(|_| {
                let (trainer, arrival, pause) = (below(3) as Trainer, below(5000) as f64 / 1e3, below(2000) as f64 / 1e3);
                let asked = if below(2) == 0 { captures(trainer) } else { losses(trainer, pause) };
                Request { arrival, batches: if asked.kind == Kind::Loss { 1 } else { below(8) + 1 }, ..asked }
            })
            .collect();
        let world = World::new(device, max_tokens, all, requests).run(1500.0);
        let case = format!("{seed}: {device:?} {max_tokens}");
        assert!(world.clients.iter().all(|client| client.tokens.len() == client.answer), "{case}");
        // At most all of them decode at once; a prompt alone may precede.
        let (_, longest) = steps(device, world.clients.len());
        assert!(
            world.clients.iter().all(|client| client.tokens.len() < 2) || world.gap(1.0) < 2.0 * longest.max(PROMPT_SECONDS),
            "{case}: {}",
            world.gap(1.0)
        );
        for request in &world.requests {
            let needed = request.batch * request.batches as f64 * world.requests.len() as f64 * 4.0;
            assert!(request.slowest > 0.0 && request.slowest < 3.0 * needed + 10.0, "{case}: {} of {needed}", request.slowest);
        }
    }
}

#[test]
fn sequences_that_wait_for_what_comes_from_outside_leave_the_device_to_training_or_idle() {
    let mut schedule: Schedule<(), (), ()> = Schedule::new(4, 2048);
    schedule.serving.push(());
    schedule.serving.refresh(|()| true, |()| Ok::<_, ()>(true)).unwrap();
    assert_eq!(schedule.turn(false, |()| true), Turn::Idle);
    assert_eq!(schedule.turn(true, |()| true), Turn::Serve);
    schedule.captures.push(1, ());
    assert!(matches!(schedule.turn(false, |()| true), Turn::Train(Kind::Capture, ..)));
}
