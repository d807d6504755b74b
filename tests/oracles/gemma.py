"""The real Gemma 3 270M in our pool against transformers: states at all taps, log probabilities and greedy answers. For who may have the model.

Its terms must be accepted twice: at the hub, whose token is HF_TOKEN, and by ACCEPT_GEMMA_TERMS=yes. `gemma.py FOLDER` fetches it into the folder.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common import HERE, difference
from llama import SMOLLM2_TEXT, states

sys.path.insert(0, str(HERE.parent / "bench"))
from processes import start_pool  # noqa: E402

REPOSITORY, TERMS = "google/gemma-3-270m", "https://ai.google.dev/gemma/terms"
WORKER = pathlib.Path(os.environ["CARRYON_BIN"]) / "carryon-worker"
# Of f32: sums in another order, through 18 layers.
TOLERANCE = 1e-3


def refuse(why: str) -> None:
    sys.exit(f"NOT TESTED: {why}")


def fetch(folder: pathlib.Path) -> None:
    if os.environ.get("ACCEPT_GEMMA_TERMS") != "yes":
        refuse(f"{REPOSITORY} is used under the terms at {TERMS}: read them, and say ACCEPT_GEMMA_TERMS=yes if you accept them")
    if not os.environ.get("HF_TOKEN"):
        refuse(f"{REPOSITORY} needs a token of who has accepted its terms at https://huggingface.co/{REPOSITORY}: give it in HF_TOKEN")
    command = [WORKER, "fetch", "--hugging-face", REPOSITORY, "--output", folder]
    if subprocess.run(command, check=False).returncode:
        refuse(f"{REPOSITORY} could not be fetched, for the reason above")


def ask(url: str, request: dict) -> bytes:
    asked = urllib.request.Request(url, json.dumps(request).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        return answer.read()


def compare(folder: pathlib.Path) -> float:
    """The largest difference of all taps' states, relative, and of log probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SMOLLM2_TEXT).ids
    expected = states(model, tokens)
    layers = list(range(model.config.num_hidden_layers + 1))
    with tempfile.TemporaryDirectory() as temporary:
        pool, url = start_pool(WORKER, folder, pathlib.Path(temporary), "float32")
        try:
            found = load(ask(f"{url}/v1/hidden-states", {"sequences": [tokens], "taps": {"layers": layers, "final": True}}))
            scored = ask(f"{url}/v1/generate", {"prompt": tokens, "max_tokens": 8, "prompt_logprobs": 5})
        finally:
            pool.stop()
    worst = max(difference(expected[tap], found[tap].float()) for tap in [*(f"layer.{layer}" for layer in layers), "final"])
    print(f"  states are off by {worst:.1e}")
    events = [json.loads(line) for line in scored.splitlines() if line.strip()]
    ours = torch.log_softmax(expected["logits"].double(), -1)
    for row, entry in enumerate(events[0]["prompt_logprobs"][1:]):
        for token, logprob in [(entry["token"], entry["logprob"]), *entry["top"]]:
            worst = max(worst, abs(float(ours[row, token]) - logprob))
    answered = [event["token"] for event in events if "token" in event]
    ids = model.generate(torch.tensor([tokens]), max_new_tokens=len(answered), do_sample=False)[0, len(tokens):].tolist()
    return worst if ids == answered else math.inf


def main(folder: pathlib.Path) -> int:
    torch.set_num_threads(2)
    fetch(folder)
    worst = compare(folder)
    print(f"{REPOSITORY}: the largest difference of states and log probabilities is {worst:.1e} (allowed {TOLERANCE:.0e})")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
