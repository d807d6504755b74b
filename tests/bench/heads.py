"""What the shape of a head, and of what it reads, does to its loss: three seeds of each, on two tasks.

Worked answers in mathematics (the recipe: 1,000/200 samples) and answers of a handbook (350/150), three epochs each. A run that has ended is not
repeated, so this may be broken off and gone on with; all runs of a task share their hidden states.
"""

import json
import math
import pathlib
import shutil
import statistics

from common import MODEL
from processes import start_pool, start_trainer
from rows import WORKER, result
from training import lines, recipe_data

SEEDS = range(3)
T_TWO_DEGREES = 4.303  # 95 % of Student's t with three values
FIVE_TAPS = {"layers": [10, 20, 25, 28], "final": True}
RECIPE = {"width": 256, "blocks": 2, "attentionHeads": 4, "gate": False}
SMALL = {"width": 96, "blocks": 1, "attentionHeads": 4}
VARIANTS = {
    "plain": {"head": RECIPE},
    "gate": {"head": RECIPE | {"gate": True}},
    "half_million": {"head": SMALL | {"gate": True}},
    "fp8_states": {"head": RECIPE, "hiddenStatesDtype": "Float8E4M3"},
}
TASKS = {"mathematics": tuple(VARIANTS), "handbook": ("plain", "gate")}


def handbook(tasks: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Questions and answers as prompts and completions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        pairs = map(json.loads, (tasks / f"embedding-{split}.jsonl").open(encoding="utf-8"))
        text = "".join(json.dumps({"prompt": pair["anchor"], "completion": pair["positive"]}) + "\n" for pair in pairs)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def losses(urls: list[str], data: pathlib.Path, folder: pathlib.Path, name: str, seed: int, epochs: int = 3, **changes) -> list[float]:
    """Held-out loss after each epoch, the base's first, of a head that reads the pools behind `urls`; a run that has ended is not repeated."""
    output, done = folder / f"{name}-{seed}", folder / f"{name}-{seed}/losses.json"
    if not done.exists():
        shutil.rmtree(output, ignore_errors=True)
        changes |= {"training": {"numTrainEpochs": epochs, "perDeviceTrainBatchSize": 8, "seed": seed, "bf16": True}, "taps": FIVE_TAPS}
        trainer = start_trainer(WORKER, urls[0], data, output, state_cache=folder / "states", other_pools=urls[1:], **changes)
        if code := trainer.child.wait():
            raise SystemExit(f"the trainer ended with {code}; see {output / 'trainer.log'}")
        evaluations = [row for row in lines(output / "output/metrics.jsonl") if "eval_loss" in row]
        done.write_text(json.dumps([row["eval_loss"] for row in evaluations]))
    found = json.loads(done.read_text())
    print(f"  {folder.name} {name} seed {seed}: {' / '.join(f'{loss:.4f}' for loss in found)}", flush=True)
    return found


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return T_TWO_DEGREES * statistics.stdev(values) / math.sqrt(len(values))


def rows(data_python: str, cache: pathlib.Path, tasks: pathlib.Path) -> list[dict]:
    data = {"mathematics": recipe_data(data_python, cache), "handbook": handbook(tasks, cache / "handbook")}
    pool, url = start_pool(WORKER, MODEL, cache / "heads/pool")
    try:
        found = {(task, variant): [] for task, variants in TASKS.items() for variant in variants}
        for seed in SEEDS:
            for task, variant in found:
                found[task, variant].append(losses([url], data[task], cache / "heads" / task, variant, seed, format="Auto", **VARIANTS[variant])[-1])
    finally:
        pool.stop()
    table = []
    for (task, variant), values in found.items():
        row = result(f"{task}_{variant}_eval_loss", "nats per target", statistics.mean(values))
        table.append(row | {"rounds": {"ours": values}, "interval": interval(values)})
        if variant != "plain":
            # Of one seed with another shape: what the seed itself does is in both.
            apart = [value - plain for value, plain in zip(values, found[task, "plain"])]
            table.append(result(f"{task}_{variant}_against_plain", "nats per target", statistics.mean(apart)) | {"rounds": {"ours": apart}, "interval": interval(apart)})
    return table
