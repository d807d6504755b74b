"""What a head does to text that has nothing to do with what it learned: mathematics learned, editorials left alone, with and without replay, and with
as much of the head as they allow."""

import json
import pathlib
import shutil

from common import MODEL
from processes import start_pool, start_trainer
from rows import WORKER, result
from training import first_samples, lines, recipe_data

SAMPLES, EPOCHS = 200, (3, 20)
HEAD = {"width": 256, "blocks": 2, "attentionHeads": 4, "gate": False}
GENERAL = {"general": ["general-eval.jsonl"]}
VARIANTS = {"alone": (GENERAL, {}), "replay": (GENERAL | {"replay": ["general-train.jsonl"]}, {})}
# The best head trained without replay, of which no more is added than general text allows.
CHOSEN = {"alphas": [1, 0.8, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05], "maxGeneralLossIncrease": 0.1}
VARIANTS["alpha"] = (GENERAL, CHOSEN)


def rows(data_python: str, cache: pathlib.Path, tasks: pathlib.Path) -> list[dict]:
    folder = cache / "general"
    data = first_samples(recipe_data(data_python, cache), folder, SAMPLES)
    for name in ("general-train.jsonl", "general-eval.jsonl"):
        shutil.copy(tasks / name, data / name)
    pool, url = start_pool(WORKER, MODEL, folder / "pool")
    table = []
    try:
        for epochs in EPOCHS:
            for variant, (split, evaluation) in VARIANTS.items():
                changes = {
                    "head": HEAD, "training": {"numTrainEpochs": epochs, "perDeviceTrainBatchSize": 8, "bf16": True},
                    "split": {"train": ["train.jsonl"], "evaluation": ["eval.jsonl"]} | split, "evaluation": evaluation,
                }
                trainer = start_trainer(WORKER, url, data, folder / f"{variant}-{epochs}", state_cache=folder / "states", **changes)
                if code := trainer.child.wait():
                    raise SystemExit(f"the trainer ended with {code}; see {folder / f'{variant}-{epochs}' / 'trainer.log'}")
                output = folder / f"{variant}-{epochs}/output"
                last = [row for row in lines(output / "metrics.jsonl") if "eval_loss" in row][-1]
                if evaluation:
                    head = json.loads(next(output.glob("heads/*/head.json")).read_text())
                    last = head["metrics"] | {"alpha": head["shape"]["alpha"], "step": head["lineage"]["steps"]}
                name = f"{variant}_{epochs}_epochs"
                table.append(result(f"{name}_general_loss_increase", "nats per token", last["general_loss"] - last["base_general_loss"]))
                table.append(result(f"{name}_eval_loss", "nats per target", last["eval_loss"]))
                print(f"  {name}: {last}", flush=True)
    finally:
        pool.stop()
    return table
