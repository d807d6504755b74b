"""Users can leave: a head that our trainer made, run by worker/python/carryon.py in transformers, gives our pool's probabilities.

A pool of f32 trains a small head for some steps on the quick start's data, then scores held-out samples with it; so does carryon.py.
"""

import hashlib
import json
import os
import pathlib
import sys
import tempfile
import urllib.request

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "bench"), str(HERE.parent.parent / "worker/python")]

from carryon import CarryOn  # noqa: E402
from common import MODEL  # noqa: E402
from processes import start_pool, start_trainer  # noqa: E402

WORKER = pathlib.Path(os.environ["CARRYON_BIN"]) / "carryon-worker"
DATA = pathlib.Path(os.environ["CARRYON_DATA"]) / "quickstart"
# Log probabilities, natural: f32 sums in another order.
TOLERANCE = 1e-3


def ask(url: str, body: bytes, method: str = "POST") -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"}, method=method), timeout=300) as answer:
        return answer.read()


def pool_scores(url: str, request: dict) -> list[dict]:
    """Events of the pool's answer."""
    return [json.loads(line) for line in ask(f"{url}/v1/generate", json.dumps(request).encode()).splitlines() if line.strip()]


def check(model: CarryOn, url: str, digest: str, tokens: list[int]) -> float:
    """Largest difference of the prompt's log probabilities, the best five of each position; greedy answers must be equal."""
    events = pool_scores(url, {"prompt": tokens, "max_tokens": 12, "prompt_logprobs": 5, "head": digest})
    ours = torch.log_softmax(model.logits(tokens).double(), -1)
    worst = 0.0
    for row, entry in enumerate(events[0]["prompt_logprobs"][1:]):
        for token, logprob in [(entry["token"], entry["logprob"]), *entry["top"]]:
            worst = max(worst, abs(float(ours[row, token]) - logprob))
    answered = [event["token"] for event in events if "token" in event]
    assert answered == model.generate(tokens, len(answered)), "another greedy answer"
    return worst


def main() -> int:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        pool, url = start_pool(WORKER, MODEL, folder / "pool", "float32")
        try:
            print("training a head for 30 steps", flush=True)
            head = {"width": 64, "blocks": 2, "attentionHeads": 4, "gate": True, "alpha": 0.8}
            training = {"maxSteps": 30, "perDeviceTrainBatchSize": 4, "warmupSteps": 3}
            split = {"train": ["train.jsonl"]}
            trainer = start_trainer(WORKER, url, DATA, folder, format="PromptCompletion", head=head, training=training, split=split)
            if trainer.child.wait():
                sys.exit((folder / "trainer.log").read_text())
            path = next(folder.glob("output/heads/*/head.safetensors"))
            digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
            ask(f"{url}/v1/heads/{digest}", path.read_bytes(), "PUT")
            tokenizer = json.loads(urllib.request.urlopen(f"{url}/v1/tokenizer").read())
            encode = encoder(tokenizer)
            model = CarryOn.load(str(MODEL), str(path))
            samples = [json.loads(line) for line in (DATA / "eval.jsonl").open(encoding="utf-8")][:4]
            worst = max(check(model, url, digest, encode(sample["prompt"] + "\n" + sample["completion"])) for sample in samples)
        finally:
            pool.stop()
    print(f"largest difference of a log probability: {worst:.1e} (allowed {TOLERANCE:.0e})")
    return int(worst > TOLERANCE)


def encoder(tokenizer: dict):
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(json.dumps(tokenizer))
    return lambda text: loaded.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    sys.exit(main())
