"""What a pool gives to trainers: states beside plain prefill of the same tokens, and ten jobs on one pool and data."""

import json
import pathlib
import random
import threading
import time
import urllib.request

from common import MODEL
from processes import start_pool, start_trainer
from rows import WORKER, result
from training import first_samples, lines, recipe_data

SEQUENCES, TOKENS = 8, 256
TAPS = {"layers": [10, 20, 25, 28], "final": True}
JOBS, SAMPLES, EPOCHS = 10, 80, 2


def ask(url: str, path: str, body: dict) -> int:
    """Bytes of the whole answer."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return sum(map(len, iter(lambda: answer.read(1 << 20), b"")))


def capture(folder: pathlib.Path, rounds: int) -> list[dict]:
    """Tokens a second of a pool that sends the states of eight sequences, or computes them as prompts, each of new tokens."""
    pool, url = start_pool(WORKER, MODEL, folder / "pool")
    draw = random.Random(0)
    fresh = lambda: [[draw.randrange(1000, 40_000) for _ in range(TOKENS)] for _ in range(SEQUENCES)]

    def prefill(sequences: list[list[int]]) -> None:
        threads = [threading.Thread(target=ask, args=(url, "/v1/generate", {"prompt": prompt, "max_tokens": 1})) for prompt in sequences]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]

    def rate(run) -> float:
        sequences, started = fresh(), time.monotonic()
        run(sequences)
        return SEQUENCES * TOKENS / (time.monotonic() - started)

    states = lambda sequences: ask(url, "/v1/hidden-states", {"sequences": sequences, "taps": TAPS})
    try:
        rate(states), rate(prefill)
        pairs = [(rate(states), rate(prefill)) for _ in range(3 * rounds)]
    finally:
        pool.stop()
    ours, theirs = map(list, zip(*pairs))
    return [result("capture_vs_prefill", "tokens/s", ours, theirs, "our own prefill")]


def asked(url: str) -> int:
    """Tokens whose states were computed for trainers."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        found = [line.split()[1] for line in answer.read().decode().splitlines() if line.startswith('carryon_tokens_total{class="training"}')]
    return int(float(found[0]))


def sweep(data_python: str, cache: pathlib.Path) -> list[dict]:
    """Ten jobs at once with one state cache, beside one that asks for all states and ten that find them."""
    folder = cache / "sharing"
    data = first_samples(recipe_data(data_python, cache), folder, SAMPLES)
    pool, url = start_pool(WORKER, MODEL, folder / "pool")

    def run(name: str, states: str, seeds: range) -> tuple[float, list[dict]]:
        started = time.monotonic()
        begin = lambda seed: start_trainer(
            WORKER, url, data, folder / f"{name}-{seed}", state_cache=folder / states, training={"numTrainEpochs": EPOCHS, "perDeviceTrainBatchSize": 8, "seed": seed}
        )
        trainers = [begin(seed) for seed in seeds]
        codes = [trainer.child.wait() for trainer in trainers]
        if any(codes):
            raise SystemExit(f"trainers ended with {codes}; see {folder}")
        steps = [row for seed in seeds for row in lines(folder / f"{name}-{seed}/output/metrics.jsonl") if "loss" in row]
        return time.monotonic() - started, steps

    try:
        cold, _ = run("cold", "first", range(1))
        before = asked(url)
        warm, _ = run("warm", "first", range(1))
        one_by_one = sum(run("alone", "first", range(seed, seed + 1))[0] for seed in range(JOBS))
        between = asked(url)
        total, steps = run("sweep", "second", range(JOBS))
        after = asked(url)
    finally:
        pool.stop()
    print(f"  one job {cold:.1f} s, with all states there {warm:.1f} s; ten of those one by one {one_by_one:.1f} s; ten at once from nothing {total:.1f} s", flush=True)
    taken = sum(step["seconds"] - previous["seconds"] for previous, step in zip(steps, steps[1:]) if step["step"] > previous["step"])
    waits = sum(step["wait_seconds"] for previous, step in zip(steps, steps[1:]) if step["step"] > previous["step"])
    return [
        result("sweep_tokens_asked", "of one job", (after - between) / before),
        result("sweep_tokens_asked_again", "tokens", between - before),
        result("sweep_of_ten_jobs", "s", total, cold - warm + one_by_one, "one capture and ten trainings", smaller_is_better=True),
        result("sweep_wait_share", "of a step", waits / taken),
    ]


def rows(data_python: str, cache: pathlib.Path, rounds: int) -> list[dict]:
    return capture(cache / "sharing", rounds) + sweep(data_python, cache)
