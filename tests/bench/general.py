"""What a head does to text that has nothing to do with what it learned: mathematics learned, editorials left alone, with and without replay."""

import pathlib
import shutil

from common import MODEL
from processes import start_pool, start_trainer
from rows import WORKER, result
from training import first_samples, lines, recipe_data

SAMPLES, EPOCHS = 200, (3, 20)
HEAD = {"width": 256, "blocks": 2, "attentionHeads": 4}
GENERAL = {"general": ["general-eval.jsonl"]}
VARIANTS = {"alone": GENERAL, "replay": GENERAL | {"replay": ["general-train.jsonl"]}}


def rows(data_python: str, cache: pathlib.Path, tasks: pathlib.Path) -> list[dict]:
    folder = cache / "general"
    data = first_samples(recipe_data(data_python, cache), folder, SAMPLES)
    for name in ("general-train.jsonl", "general-eval.jsonl"):
        shutil.copy(tasks / name, data / name)
    pool, url = start_pool(WORKER, MODEL, folder / "pool")
    table = []
    try:
        for epochs in EPOCHS:
            for variant, split in VARIANTS.items():
                changes = {
                    "head": HEAD, "training": {"numTrainEpochs": epochs, "perDeviceTrainBatchSize": 8},
                    "split": {"train": ["train.jsonl"], "evaluation": ["eval.jsonl"]} | split,
                }
                trainer = start_trainer(WORKER, url, data, folder / f"{variant}-{epochs}", state_cache=folder / "states", **changes)
                if code := trainer.child.wait():
                    raise SystemExit(f"the trainer ended with {code}; see {folder / f'{variant}-{epochs}' / 'trainer.log'}")
                last = [row for row in lines(folder / f"{variant}-{epochs}/output/metrics.jsonl") if "eval_loss" in row][-1]
                name = f"{variant}_{epochs}_epochs"
                table.append(result(f"{name}_general_loss_increase", "nats per token", last["general_loss"] - last["base_general_loss"]))
                table.append(result(f"{name}_eval_loss", "nats per target", last["eval_loss"]))
                print(f"  {name}: {last}", flush=True)
    finally:
        pool.stop()
    return table
