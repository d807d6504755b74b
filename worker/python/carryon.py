"""Runs a Carry-On head on its base with nothing but transformers: what was trained here can leave.

    model = CarryOn.load("SmolLM2-135M-Instruct.Q4_1.gguf", "head.safetensors")   # or a Hugging Face folder
    logits = model.logits([token ids])                                            # rows × vocabulary, or, of other tasks than CausalLM, the label scores, the number, or the embedding
    print(model.generate([token ids], max_tokens=100))

Mathematics: u0 = Σ_k B_k·rms(h_k); blocks of causal attention and SwiGLU; Δ = O·rms(u); g = sigmoid(G·rms(u) + b) or 1;
logits = W·(x + α·g⊙Δ), with x and W the base's final state and LM head. Needs torch, transformers, safetensors (and gguf for GGUF files).
"""

import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM


def load_base(path: str, dtype=torch.float32):
    """A frozen base: a GGUF file (dequantised) or a folder in the Hugging Face layout."""
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).eval()


class CarryOn:
    def __init__(self, base, shape: dict, weights: dict[str, torch.Tensor]):
        self.base, self.shape, self.weights = base, shape, weights
        self.taps = [("layer", layer) for layer in sorted(shape["taps"]["layers"])] + ([("final", None)] if shape["taps"]["final"] else [])

    @classmethod
    def load(cls, base: str, head: str) -> "CarryOn":
        with safe_open(head, "pt") as file:
            shape = json.loads(file.metadata()["carryon.head"])
            return cls(load_base(base), shape, {name: file.get_tensor(name).float() for name in file.keys()})

    @torch.inference_mode()
    def logits(self, tokens: list[int], alpha: float | None = None) -> torch.Tensor:
        layers, x = self._states(tokens)
        u = self._trunk([x if kind == "final" else layers[layer] for kind, layer in self.taps])
        weights = self.weights
        if self.shape["task"] != "CausalLM":
            u = u[-(self.shape.get("pooled_tokens") or len(u)) :]
            attention = torch.softmax(u @ weights["pooling.weight"], 0)
            found = weights["classifier.weight"] @ (attention @ u) + weights["classifier.bias"]
            return F.normalize(found, dim=0) if self.shape["task"] == "Embedding" else found
        delta = u @ weights["output.weight"].T
        if self.shape["gate"]:
            delta = torch.sigmoid(u @ weights["gate.weight"].T + weights["gate.bias"]) * delta
        y = x + (self.shape["alpha"] if alpha is None else alpha) * delta
        logits = self.base.lm_head(y.to(self.base.lm_head.weight.dtype)).float()
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def generate(self, tokens: list[int], max_tokens: int = 64, stop: tuple[int, ...] = ()) -> list[int]:
        """The likeliest continuation; every step reads the whole sequence: plain, not fast."""
        sequence = list(tokens)
        for _ in range(max_tokens):
            token = int(self.logits(sequence)[-1].argmax())
            if token in stop:
                break
            sequence.append(token)
        return sequence[len(tokens) :]

    def _states(self, tokens: list[int]):
        """Outputs of the layers that are tapped (0: the embedding) and the final state, rows × width, f32."""
        decoder, seen = self.base.model, {}
        hook = lambda layer: lambda _module, _inputs, output: seen.__setitem__(layer, (output[0] if isinstance(output, tuple) else output)[0].float())
        modules = [decoder.embed_tokens, *decoder.layers]
        handles = [modules[layer].register_forward_hook(hook(layer)) for kind, layer in self.taps if kind == "layer"]
        try:
            final = decoder(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0].float()
        finally:
            for handle in handles:
                handle.remove()
        return seen, final

    def _trunk(self, taps: list[torch.Tensor]) -> torch.Tensor:
        width, heads = self.shape["width"], self.shape["heads"]
        u = sum(self._rms(tap) @ self.weights[f"bridge.{index}.weight"].T for index, tap in enumerate(taps))
        rows = len(u)
        position = torch.arange(rows)
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < self.shape["window"])
        for block in range(self.shape["blocks"]):
            get = lambda name: self.weights[f"blocks.{block}.{name}.weight"]
            h = self._rms(u) * get("input_layernorm")
            q, k, v = ((h @ get(f"self_attn.{name}_proj").T).view(rows, heads, width // heads).transpose(0, 1) for name in "qkv")
            attended = F.scaled_dot_product_attention(self._rope(q)[None], self._rope(k)[None], v[None], attn_mask=visible)[0]
            u = u + attended.transpose(0, 1).reshape(rows, width) @ get("self_attn.o_proj").T
            h = self._rms(u) * get("post_attention_layernorm")
            u = u + (F.silu(h @ get("mlp.gate_proj").T) * (h @ get("mlp.up_proj").T)) @ get("mlp.down_proj").T
        return self._rms(u)

    def _rms(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape["norm_epsilon"])

    def _rope(self, x):
        rows, d = x.shape[-2:]
        angle = torch.arange(rows)[:, None].float() * self.shape["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)
        u, v = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()], -1)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: carryon.py BASE head.safetensors PROMPT")
    from transformers import AutoTokenizer

    base = pathlib.Path(sys.argv[1])
    place = {"gguf_file": base.name} if base.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(str(base.parent if place else base), **place)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[3]}], tokenize=False, add_generation_prompt=True)
    model = CarryOn.load(sys.argv[1], sys.argv[2])
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    print(tokenizer.decode(model.generate(ids, 160, (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")))))
