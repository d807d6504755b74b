"""The recipe's data and its training step in PyTorch: what our trainer is compared with.

A head of five taps (10, 20, 25, 28, final), width 256, two blocks on SmolLM2; 1000/200 samples of gsm_symbolic, batch 8, three epochs,
Muon 0.02 for matrices and AdamW 3e-3 for vectors, warm-up 10 steps, cosine to 10 %, gradient norm 1.

usage: recipe.py data QUICKSTART_DATA_DIR FOLDER      tokenised samples as JSON Lines: input_ids, prompt_length
       recipe.py step FOLDER STEPS                    seconds of PyTorch's training step on the same samples, as one JSON line
"""

import json
import math
import pathlib
import random
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "oracles"))
from common import MODEL  # noqa: E402

TAPS, MAX_LENGTH, BATCH = [10, 20, 25, 28], 320, 8
HIDDEN, WIDTH, HEADS, BLOCKS, FEED_FORWARD = 576, 256, 4, 2, 688


def encode(source: pathlib.Path, target: pathlib.Path) -> None:
    """Prompt without the template's default system turn, completion and end token, cut at MAX_LENGTH.

    transformers' tokenizer of the GGUF file splits digits after blanks, llama.cpp and we before: 27 of the 1200 samples differ by it.
    The recipe's figures were measured with transformers' ids.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name)
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        with (source / f"{split}.jsonl").open(encoding="utf-8") as lines, (target / f"{split}.jsonl").open("w") as out:
            for sample in map(json.loads, lines):
                prompt = ids(f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n")
                whole = prompt + ids(sample["completion"] + "<|im_end|>")
                out.write(json.dumps({"input_ids": whole[:MAX_LENGTH], "prompt_length": len(prompt)}) + "\n")


def batches(samples: list, seed: int) -> list[list[int]]:
    """Buckets of eight batches sorted by length, the batches shuffled."""
    order, rng, out = list(range(len(samples))), random.Random(seed), []
    rng.shuffle(order)
    for start in range(0, len(order), BATCH * 8):
        bucket = sorted(order[start : start + BATCH * 8], key=lambda i: len(samples[i]["input_ids"]))
        out += [bucket[k : k + BATCH] for k in range(0, len(bucket), BATCH)]
    rng.shuffle(out)
    return out


def measure(folder: pathlib.Path, steps: int) -> dict:
    """The median step over the first batches of an epoch, on hidden states made beforehand."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(2)
    samples = [json.loads(line) for line in (folder / "train.jsonl").open()]
    chosen = batches(samples, 0)[:steps]
    base = AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32).bfloat16().eval()
    lm_head = base.lm_head.weight.detach()
    taps, seen = [*TAPS, "final"], {}
    for tap in TAPS:
        hook = lambda _module, _inputs, output, tap=tap: seen.__setitem__(tap, output[0] if isinstance(output, tuple) else output)
        base.model.layers[tap - 1].register_forward_hook(hook)

    @torch.inference_mode()
    def hidden(batch):
        rows = [samples[i]["input_ids"] for i in batch]
        tokens = torch.full((len(rows), max(map(len, rows))), 2)
        for j, ids in enumerate(rows):
            tokens[j, : len(ids)] = torch.tensor(ids)
        seen["final"] = base.model(input_ids=tokens, use_cache=False).last_hidden_state
        return {tap: seen[tap].clone() for tap in taps}, [seen["final"][j, : len(ids)] for j, ids in enumerate(rows)]

    states = [hidden(batch)[0] for batch in chosen]
    del base

    def rms(x, weight=None):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x if weight is None else x * weight

    def rope(x):
        rows, d = x.shape[-2:]
        angle = torch.arange(rows).float()[:, None] * 1e4 ** (-torch.arange(0, d, 2).float() / d)
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        u, v = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([u * cosine - v * sine, v * cosine + u * sine], -1)

    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ParameterList([torch.ones(WIDTH), torch.ones(WIDTH)])
            self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH) for _ in range(4))
            self.gate, self.up, self.down = linear(WIDTH, FEED_FORWARD), linear(WIDTH, FEED_FORWARD), linear(FEED_FORWARD, WIDTH)

        def forward(self, x):
            b, t, _ = x.shape
            split = lambda y: y.view(b, t, HEADS, WIDTH // HEADS).transpose(1, 2)
            h = rms(x, self.norms[0])
            attended = F.scaled_dot_product_attention(rope(split(self.q(h))), rope(split(self.k(h))), split(self.v(h)), is_causal=True)
            x = x + self.o(attended.transpose(1, 2).reshape(b, t, WIDTH))
            h = rms(x, self.norms[1])
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.bridge = nn.ModuleList([linear(HIDDEN, WIDTH) for _ in taps])
            self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
            self.output = linear(WIDTH, HIDDEN)
            nn.init.zeros_(self.output.weight)

        def forward(self, states, x):
            u = sum(project(rms(state)) for project, state in zip(self.bridge, states))
            for block in self.blocks:
                u = block(u)
            return x + self.output(rms(u))

    head = Head()
    matrices = [p for p in head.parameters() if p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW([p for p in head.parameters() if p.ndim < 2], lr=3e-3, weight_decay=0.01)

    @torch.no_grad()
    def muon(factor):
        for p, momentum in zip(matrices, momenta):
            momentum.mul_(0.95).add_(p.grad)
            g = p.grad.add(momentum, alpha=0.95)
            x = g / (g.norm() + 1e-7)
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.mul_(1 - 0.02 * factor * 0.01).add_(x.T if tall else x, alpha=-0.02 * factor * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    seconds, tokens = [], 0
    for step, (batch, stored) in enumerate(zip(chosen, states)):
        started = time.perf_counter()
        factor = min(1, (step + 1) / 10) * (0.45 * (1 + math.cos(math.pi * step / 375)) + 0.1)
        for group in adamw.param_groups:
            group["lr"] = 3e-3 * factor
        targets = torch.full(stored["final"].shape[:2], -100)
        for j, i in enumerate(batch):
            ids, prompt = samples[i]["input_ids"], samples[i]["prompt_length"]
            targets[j, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
        keep = targets != -100
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = head([stored[tap].float() for tap in taps], stored["final"].float())
        loss = F.cross_entropy(F.linear(y[keep].bfloat16(), lm_head).float(), targets[keep], reduction="sum") / keep.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        muon(factor)
        adamw.step()
        head.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        tokens += sum(len(samples[i]["input_ids"]) for i in batch)
    return {"median_step": statistics.median(seconds), "tokens_per_second": tokens / sum(seconds), "last_loss": loss.item()}


if __name__ == "__main__":
    if sys.argv[1] == "data":
        encode(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        print(json.dumps(measure(pathlib.Path(sys.argv[2]), int(sys.argv[3]))))
