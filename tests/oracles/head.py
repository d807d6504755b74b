"""The head in PyTorch, tensor for tensor under the artifact's names: loss, every gradient, the optimizers, fifty training steps.

    û0 = Σ_k B_k · rms(h_k);  block: u + o·attention(rms(u)·n1), u + down·(silu(gate·h)·up·h) with h = rms(u)·n2
    y = x + α · g ⊙ (O · rms(u)),  g = sigmoid(G · rms(u) + b) or 1
    classifier: p = softmax over the sequence, or its last tokens, of pooling·rms(u);  logits = C · Σ p·rms(u) + b
"""

import json
import math
import pathlib

import torch
import torch.nn.functional as F

from common import save, save_json
from llama import states, tiny_model

HIDDEN, WIDTH, BLOCKS, HEADS, FEED_FORWARD, ALPHA, THETA, EPSILON = 64, 24, 2, 3, 64, 0.7, 10000.0, 1e-5
TAPS = ["layer.1", "layer.2", "final"]
LABELS = ["no", "yes", "perhaps"]
POOLED_TOKENS = 5
STEPS, WARMUP, LEARNING_RATE, MUON_RATE, WEIGHT_DECAY, MIN_RATIO, MAX_NORM = 50, 10, 3e-3, 0.02, 0.01, 0.1, 1.0


def shape(task: str, gate: bool) -> dict:
    """`HeadShape`, as in the artifact's metadata."""
    return {
        "format_version": 1, "task": task, "taps": {"layers": [1, 2], "final": True}, "hidden_size": HIDDEN, "width": WIDTH, "blocks": BLOCKS,
        "heads": HEADS, "feed_forward": FEED_FORWARD, "gate": gate, "alpha": ALPHA, "window": 64, "rope_theta": THETA, "norm_epsilon": EPSILON,
        "labels": LABELS if task == "Classification" else [],
    }


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of every kind of head; a kind takes its own."""
    shapes = {f"bridge.{i}.weight": (WIDTH, HIDDEN) for i in range(len(TAPS))}
    for j in range(BLOCKS):
        block = f"blocks.{j}"
        shapes |= {f"{block}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
    shapes |= {"output.weight": (HIDDEN, WIDTH), "gate.weight": (HIDDEN, WIDTH), "gate.bias": (HIDDEN,)}
    return shapes | {"pooling.weight": (WIDTH,), "classifier.weight": (len(LABELS), WIDTH), "classifier.bias": (len(LABELS),)}


def random_weights() -> dict[str, torch.Tensor]:
    """A point where nothing is zero."""
    torch.manual_seed(2)
    weights = {}
    for name, size in sorted(tensor_shapes().items()):
        if "layernorm" in name:
            weights[name] = torch.empty(size).uniform_(0.5, 1.5)
        else:
            weights[name] = torch.randn(size) * (0.3 if len(size) == 1 else 0.7 / math.sqrt(size[1]))
    return weights


def weights_of(task: str, gate: bool, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    own = ("bridge.", "blocks.") + (("pooling.", "classifier.") if task == "Classification" else ("output.", *(["gate."] if gate else [])))
    return {name: tensor for name, tensor in weights.items() if name.startswith(own)}


def rms(x, weight=None):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
    return x if weight is None else x * weight


def rope(x):
    """Half-split rotary embedding of heads × rows × d, positions from 0."""
    rows, d = x.shape[-2:]
    angle = torch.arange(rows, dtype=x.dtype)[:, None] * THETA ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


def trunk(weights, taps):
    """rms(u) of one sequence: rows × WIDTH."""
    u = sum(rms(tap) @ weights[f"bridge.{i}.weight"].T for i, tap in enumerate(taps))
    for j in range(BLOCKS):
        get = lambda name: weights[f"blocks.{j}.{name}.weight"]
        split = lambda x: x.view(len(x), HEADS, WIDTH // HEADS).transpose(0, 1)
        h = rms(u, get("input_layernorm"))
        q, k, v = (split(h @ get(f"self_attn.{name}_proj").T) for name in "qkv")
        attended = F.scaled_dot_product_attention(rope(q)[None], rope(k)[None], v[None], is_causal=True)[0]
        u = u + attended.transpose(0, 1).reshape(len(u), WIDTH) @ get("self_attn.o_proj").T
        h = rms(u, get("post_attention_layernorm"))
        u = u + (F.silu(h @ get("mlp.gate_proj").T) * (h @ get("mlp.up_proj").T)) @ get("mlp.down_proj").T
    return rms(u)


def delta(weights, taps):
    """g ⊙ Δ of one sequence, without α: rows × HIDDEN."""
    u = trunk(weights, taps)
    out = u @ weights["output.weight"].T
    return torch.sigmoid(u @ weights["gate.weight"].T + weights["gate.bias"]) * out if "gate.weight" in weights else out


def class_logits(weights, taps, pooled_tokens=0):
    """All tokens are pooled, or the last ones."""
    u = trunk(weights, taps)[-pooled_tokens:]
    attention = torch.softmax(u @ weights["pooling.weight"], 0)
    return weights["classifier.weight"] @ (attention @ u) + weights["classifier.bias"]


def lm_loss(weights, batch, lm_head):
    """Mean cross entropy over the targets of a packed batch; `rows` are the positions that have one."""
    deltas = torch.cat([delta(weights, taps) for taps in split(batch)])
    y = batch["tap.2"] + ALPHA * deltas
    return F.cross_entropy(y[batch["rows"].long()] @ lm_head.T, batch["targets"].long())


def class_loss(weights, batch, pooled_tokens=0):
    return F.cross_entropy(torch.stack([class_logits(weights, taps, pooled_tokens) for taps in split(batch)]), batch["labels"].long())


def split(batch):
    """The taps of each sequence of a packed batch."""
    lengths = batch["lengths"].tolist()
    return list(zip(*(batch[f"tap.{i}"].split(lengths) for i in range(len(TAPS)))))


def packed_batch(model, generator, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random tokens through the tiny llama; the first third of each sequence is its prompt, without targets."""
    sequences = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    seen = [states(model, tokens) for tokens in sequences]
    batch = {f"tap.{i}": torch.cat([s[tap] for s in seen]) for i, tap in enumerate(TAPS)}
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [(start + t, tokens[t + 1]) for start, tokens in zip(starts, sequences) for t in range(len(tokens) // 3, len(tokens) - 1)]
    integers = {"lengths": lengths, "rows": [r for r, _ in rows], "targets": [t for _, t in rows]}
    integers |= {"labels": [(7 * i + lengths[i]) % len(LABELS) for i in range(len(lengths))], "tokens": [t for s in sequences for t in s]}
    return batch | {name: torch.tensor(values, dtype=torch.uint32) for name, values in integers.items()}


def gradients(weights, loss_of):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    loss = loss_of(leaves)
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def muon_step(weight, momentum, gradient, rate):
    """Momentum 0.95 (Nesterov), five Newton–Schulz steps, decoupled decay, scale √max(1, rows/columns); in place."""
    momentum.mul_(0.95).add_(gradient)
    update = gradient.add(momentum, alpha=0.95)
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
    weight.mul_(1 - rate * WEIGHT_DECAY).add_(x.T if tall else x, alpha=-rate * scale)


def schedule(step: int) -> float:
    """Factor of both learning rates at a step counted from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return min(1, (step + 1) / WARMUP) * (MIN_RATIO + (1 - MIN_RATIO) * cosine)


def train(weights, batches, lm_head, dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of STEPS steps over the batches in turn: Muon for matrices, AdamW for vectors."""
    cast = lambda tensors: {n: t if t.dtype == torch.uint32 else t.to(dtype) for n, t in tensors.items()}
    leaves = {name: tensor.to(dtype).clone().requires_grad_() for name, tensor in weights.items()}
    batches, lm_head = [cast(batch) for batch in batches], lm_head.to(dtype)
    matrices = [leaf for leaf in leaves.values() if leaf.ndim == 2]
    momenta = [torch.zeros_like(leaf) for leaf in matrices]
    adamw = torch.optim.AdamW([leaf for leaf in leaves.values() if leaf.ndim < 2], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        factor = schedule(step)
        for group in adamw.param_groups:
            group["lr"] = LEARNING_RATE * factor
        loss = lm_loss(leaves, batches[step % len(batches)], lm_head)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), MAX_NORM)
        with torch.no_grad():
            for leaf, momentum in zip(matrices, momenta):
                muon_step(leaf, momentum, leaf.grad, MUON_RATE * factor)
        adamw.step()
        for leaf in leaves.values():
            leaf.grad = None
        losses.append(loss.item())
    return losses, {name: leaf.detach() for name, leaf in leaves.items()}


def generate_heads(folder: pathlib.Path) -> None:
    """Loss, outputs and every gradient of three heads on one packed batch. The gradients are those of the mean loss."""
    model, weights = tiny_model(), random_weights()
    lm_head = model.lm_head.weight.detach()
    batch = packed_batch(model, torch.Generator().manual_seed(3), [13, 1, 22, 6])
    save(folder / "head_batch.safetensors", batch)
    for name, task, gate in [("gated", "CausalLM", True), ("plain", "CausalLM", False), ("classifier", "Classification", False)]:
        own = weights_of(task, gate, weights)
        save(folder / f"head_{name}.safetensors", own, {"carryon.head": json.dumps(shape(task, gate))})
        if task == "CausalLM":
            loss, grads = gradients(own, lambda leaves: lm_loss(leaves, batch, lm_head))
            output = torch.cat([delta(own, taps) for taps in split(batch)])
        else:
            loss, grads = gradients(own, lambda leaves: class_loss(leaves, batch))
            output = torch.stack([class_logits(own, taps) for taps in split(batch)])
        save(folder / f"head_{name}_expected.safetensors", grads | {"loss": loss.reshape(1), "output": output})
    # The classifier once more, of the last tokens.
    loss, grads = gradients(own, lambda leaves: class_loss(leaves, batch, POOLED_TOKENS))
    output = torch.stack([class_logits(own, taps, POOLED_TOKENS) for taps in split(batch)])
    save(folder / "head_last_tokens_expected.safetensors", grads | {"loss": loss.reshape(1), "output": output})


def generate_optimizers(folder: pathlib.Path) -> None:
    """Two steps each, so that the state of the first is felt; `NAME.0` are the weights, `NAME.grad.S` the gradient of step S."""
    torch.manual_seed(4)
    tensors = {}
    for name, size in [("tall", (24, 8)), ("wide", (8, 24)), ("square", (16, 16))]:
        weight, momentum = torch.randn(size), torch.zeros(size)
        tensors[f"muon.{name}.0"] = weight.clone()
        for step in (1, 2):
            gradient = torch.randn(size)
            muon_step(weight, momentum, gradient, MUON_RATE)
            tensors |= {f"muon.{name}.grad.{step}": gradient, f"muon.{name}.{step}": weight.clone()}
    for name, size in [("vector", (24,)), ("matrix", (5, 9))]:
        weight = torch.randn(size).requires_grad_()
        adamw = torch.optim.AdamW([weight], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        tensors[f"adamw.{name}.0"] = weight.detach().clone()
        for step in (1, 2):
            weight.grad = torch.randn(size)
            adamw.step()
            tensors |= {f"adamw.{name}.grad.{step}": weight.grad.clone(), f"adamw.{name}.{step}": weight.detach().clone()}
    # Nobody else needs it.
    import bitsandbytes.functional as bitsandbytes

    gradient = torch.randn(16, 256) * torch.logspace(-4, 1, 256)
    tensors["int8.gradient"] = gradient
    for moment, value in [("first_moment", (1 - 0.9) * gradient), ("second_moment", (1 - 0.999) * gradient * gradient)]:
        code_map = bitsandbytes.create_dynamic_map(signed=moment == "first_moment")
        _, state = bitsandbytes.quantize_blockwise(value, code=code_map, blocksize=256)
        # The nearest value of the map; bitsandbytes' own loop for CPUs looks small ones up in a coarse table.
        shares = value.reshape(-1, 256) / state.absmax[:, None]
        codes = (shares[:, :, None] - code_map).abs().argmin(-1).reshape(value.shape)
        tensors |= {f"int8.{moment}.codes": codes.float(), f"int8.{moment}.scales": state.absmax}
    save(folder / "optimizers.safetensors", tensors)


def generate_training(folder: pathlib.Path) -> None:
    """Fifty steps from `head_gated.safetensors`; the reference is computed in f64, and f32 must stay within a tenth of the tolerance."""
    model = tiny_model()
    lm_head, own = model.lm_head.weight.detach(), weights_of("CausalLM", True, random_weights())
    generator = torch.Generator().manual_seed(5)
    batches = [packed_batch(model, generator, lengths) for lengths in ([9, 14, 4], [17, 8, 6], [5, 12, 11])]
    losses, _ = train(own, batches, lm_head, torch.float64)
    single, _ = train(own, batches, lm_head, torch.float32)
    worst = max(abs(a - b) / a for a, b in zip(losses, single))
    print(f"  fifty steps: loss {losses[0]:.4f} → {losses[-1]:.4f}, f32 against f64 {worst:.1e}")
    save(folder / "training_batches.safetensors", {f"{i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()})
    settings = {
        "steps": STEPS, "warmup_steps": WARMUP, "learning_rate": LEARNING_RATE, "muon_learning_rate": MUON_RATE,
        "weight_decay": WEIGHT_DECAY, "min_lr_ratio": MIN_RATIO, "max_grad_norm": MAX_NORM,
    }
    save_json(folder / "training.json", settings | {"losses": losses})
