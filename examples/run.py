"""Runs an example's manifests on this machine and shows what came of it: used by `make quickstart` and `make quickstart-spam`.

usage: run.py EXAMPLE --data FOLDER [--state-dir DIR] [--timeout DURATION] [--model REPOSITORY|PATH]

Everything is started by `carryon-operator local up`, which goes on serving in the background until `carryon-operator local down`.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
MODELS = pathlib.Path(os.environ["CARRYON_MODEL"]).parent
# Names in the summary and in head.json; a classifier has no base to compare with, a language model no accuracy.
FIGURES = {"base_eval_loss": "base_eval_loss", "head_eval_loss": "eval_loss", "eval_accuracy": "eval_accuracy"}
OPERATOR = pathlib.Path(os.environ["CARRYON_BIN"]) / "carryon-operator"


def operator(*arguments: str) -> None:
    status = subprocess.run([OPERATOR, "local", *arguments]).returncode
    if status:
        sys.exit(status)


def with_model(example: pathlib.Path, model: str, folder: pathlib.Path) -> pathlib.Path:
    """The example's manifests with another model: a file or folder of this machine, or a repository of a Hugging Face hub. Its taps are a
    preset's, for it has layers of its own."""
    path = pathlib.Path(model).expanduser()
    if path.exists():
        source = {"persistentVolumeClaim": {"claimName": "models", "path": path.resolve().name}}
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        source = {"huggingFace": {"repository": model}}
    else:
        sys.exit(f"MODEL={model} is neither a file or folder here nor a repository (OWNER/NAME)")
    changes = {
        "pool.yaml": [(r"    source:\n(      .*\n)+", f"    source: {json.dumps(source)}\n")],
        "job.yaml": [(r"    taps:\n(      .*\n)+", "    taps: {preset: Balanced}\n")],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for manifest in example.glob("*.yaml"):
        text = re.sub(r"\bsmollm2\b", "base", manifest.read_text())
        for pattern, replacement in changes.get(manifest.name, []):
            text, count = re.subn(pattern, lambda _: replacement, text)
            assert count == 1, f"{manifest} has no {pattern}"
        (folder / manifest.name).write_text(text)
    return folder


def status_of(state: pathlib.Path, kind: str, name: str) -> dict:
    return json.loads((state / "objects" / f"{kind}.default.{name}.json").read_text())["status"]


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def first_line(path: pathlib.Path) -> dict:
    with path.open(encoding="utf-8") as lines:
        return json.loads(next(lines))


def show_answers(url: str, name: str, sample: dict) -> None:
    """The same prompt to the base and to the head, at temperature 0."""
    print(f"\nPrompt\n  {sample['prompt']}\nExpected\n{indent(sample['completion'])}")
    for model, title in [(f"{name}-base", "Base"), (name, "Base with the trained head")]:
        body = {"model": model, "messages": [{"role": "user", "content": sample["prompt"]}], "temperature": 0, "max_tokens": 160}
        answer = post(f"{url}/v1/chat/completions", body)
        print(f"{title}\n{indent(answer['choices'][0]['message']['content'])}")
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "A pen costs 3 dollars. What do 7 pens cost?"}]})
    print(f"\nTry it\n  curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")


def show_labels(url: str, name: str, folder: pathlib.Path) -> None:
    """Some held-out texts and what the head says of them."""
    with (folder / "eval.jsonl").open(encoding="utf-8") as lines:
        samples = [json.loads(next(lines)) for _ in range(8)]
    answer = post(f"{url}/v1/classify", {"model": name, "input": [sample["text"][:600] for sample in samples]})
    print("\nanswer  truth  text")
    for sample, row in zip(samples, answer["data"]):
        print(f"{row['label']:6}  {sample['label']:5}  {sample['text'][:100]}")
    body = json.dumps({"model": name, "input": ["Congratulations! You have won a free cruise. Click here now!"]})
    print(f"\nTry it\n  curl -s {url}/v1/classify -H 'content-type: application/json' -d '{body}'")


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("example", choices=["quickstart", "spam"])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--state-dir", type=pathlib.Path, default=pathlib.Path(".carryon"))
    parser.add_argument("--timeout")
    parser.add_argument("--model", default="", help="instead of SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    name, state = arguments.example, arguments.state_dir

    started = time.monotonic()
    state.mkdir(parents=True, exist_ok=True)
    # A run before this one may be serving still: objects are made anew, volumes (with the hidden-state cache) stay.
    operator("down", "--state-dir", str(state), "--delete")
    manifests, models = HERE / name, [f"models={MODELS}"]
    if arguments.model:
        manifests = with_model(manifests, arguments.model, state / "manifests")
        path = pathlib.Path(arguments.model).expanduser()
        models = [f"models={path.resolve().parent}"] if path.exists() else []
    volumes = [*models, f"{name}-data={arguments.data.resolve()}"]
    volume_arguments = [word for volume in volumes for word in ("--volume", volume)]
    # A model that has to come first takes as long as it takes.
    waiting = ["--until", "complete", "--timeout", arguments.timeout or ("12h" if arguments.model else "20m"), "--detach"]
    operator("up", "--state-dir", str(state), "-f", str(manifests), *volume_arguments, *waiting)

    url = status_of(state, "CarryOnDeployment", name)["url"].rstrip("/").removesuffix("/v1")
    folder = (state / "volumes" / f"{name}-output" / name).resolve()
    # Heads lie under their digests; those of earlier runs stay.
    head = folder / "heads" / status_of(state, "CarryOnJob", name)["artifact"]["digest"].replace(":", "-")
    metrics = json.loads((head / "head.json").read_text())["metrics"]
    if name == "spam":
        show_labels(url, name, arguments.data)
    else:
        show_answers(url, name, first_line(arguments.data / "eval.jsonl"))
    report = head / "report.html"
    summary = {
        **{key: round(metrics[name], 4) for key, name in FIGURES.items() if metrics.get(name) is not None},
        "seconds": round(time.monotonic() - started, 1),
        "train_seconds": round(metrics["train_seconds"], 1),
        "report": str(report),
        "url": f"{url}/v1",
    }
    (report.parent / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\nResult")
    for key, value in summary.items():
        print(f"  {key:15} {value}")
    print(f"\nIt serves until: {OPERATOR} local down --state-dir {state}")


if __name__ == "__main__":
    main()
