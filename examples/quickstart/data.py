"""Grade-school mathematics with worked answers, from reasoning-gym's gsm_symbolic: train.jsonl (seed 42), eval.jsonl (seed 4242).

usage: data.py FOLDER [TRAIN] [EVAL]        lines: {"prompt", "completion"}

Both splits fill the same hundred templates with other names and numbers: a low loss is partly the templates, learned.
Needs `pip install --no-deps reasoning-gym==0.1.25`.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import types


@functools.cache
def gsm_symbolic():
    """The module of this one data set. The package's __init__ files import every data set, with twenty packages that those need."""
    root = pathlib.Path(importlib.util.find_spec("reasoning_gym").origin).parent
    for name in ("reasoning_gym", "reasoning_gym.arithmetic", "reasoning_gym.coaching"):
        bare = types.ModuleType(name)
        bare.__path__ = [str(root.parent / name.replace(".", "/"))]
        sys.modules[name] = bare
    return importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")


def samples(size: int, seed: int) -> list[dict[str, str]]:
    """The first samples of the seed whose questions differ, without the sentence that gsm_symbolic puts after each question."""
    module, unique = gsm_symbolic(), {}
    dataset = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(size=size + size // 10 + 10, seed=seed))
    for item in dataset:
        question = item["question"].removesuffix(" Give the result as your final answer. Do not include units.")
        unique.setdefault(question, item["metadata"]["answer_cot"])
        if len(unique) == size:
            return [{"prompt": prompt, "completion": completion} for prompt, completion in unique.items()]
    raise ValueError(f"gsm_symbolic has fewer than {size} questions for seed {seed}")


def write(path: pathlib.Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    folder, train, evaluation = pathlib.Path(sys.argv[1]), int(sys.argv[2] if sys.argv[2:] else 200), int(sys.argv[3] if sys.argv[3:] else 40)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", samples(train, 42))
    write(folder / "eval.jsonl", samples(evaluation, 4242))
    print(f"{train} training and {evaluation} evaluation samples in {folder}")


if __name__ == "__main__":
    main()
