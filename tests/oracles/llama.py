"""Hidden states and logits of the Llama family: a tiny random checkpoint, and the real SmolLM2.

Tap i is the output of the i-th decoder layer (0: the embedding), `final` comes after the final norm. transformers' own last
`hidden_states` entry is already normed, so states are read by hooks.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import MODEL, save, save_json

TINY_TOKENS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79], [200, 7, 131], [7] * 9, [101, 32, 116, 104, 258, 257, 0]]
SMOLLM2_TEXT = "The quick brown fox jumps over 13 lazy dogs; på svenska: räksmörgås."


@torch.inference_mode()
def states(model, tokens: list[int]) -> dict[str, torch.Tensor]:
    """`layer.0` … `layer.L`, `final` and `logits` of one sequence, rows × width."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name):
        return lambda _module, _inputs, output: seen.__setitem__(name, (output[0] if isinstance(output, tuple) else output)[0].float())

    modules = [model.model.embed_tokens, *model.model.layers]
    handles = [module.register_forward_hook(hook(f"layer.{index}")) for index, module in enumerate(modules)]
    handles.append(model.model.norm.register_forward_hook(hook("final")))
    seen["logits"] = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    for handle in handles:
        handle.remove()
    return seen


def tiny_model() -> LlamaForCausalLM:
    """Random weights, rounded to bf16 (so that a pool of either dtype has the same ones), large enough that attention is not uniform."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=256, eos_token_id=258, initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        parameter.data = parameter.data.bfloat16().float()
    return model


def tiny_tokenizer() -> Tokenizer:
    """Bytes, and the three special tokens of SmolLM2 after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def generate_tiny(folder: pathlib.Path) -> None:
    model = tiny_model()
    checkpoint = folder / "tiny_llama"
    model.save_pretrained(checkpoint)
    for name in checkpoint.iterdir():
        if name.name not in ("config.json", "model.safetensors"):
            name.unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("transformers_version", None)
    save_json(checkpoint / "config.json", config | {"dtype": "bfloat16"})
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    save_json(checkpoint / "tokenizer.json", json.loads(tiny_tokenizer().to_str()), indent=None)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    save_json(checkpoint / "tokenizer_config.json", special | {"chat_template": TEMPLATE})
    tensors = {}
    for index, tokens in enumerate(TINY_TOKENS):
        tensors[f"{index}.tokens"] = torch.tensor(tokens, dtype=torch.uint32)
        tensors |= {f"{index}.{name}": tensor for name, tensor in states(model, tokens).items()}
    save(folder / "tiny_llama_states.safetensors", tensors)


def smollm2(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=dtype).eval()


def generate_smollm2(folder: pathlib.Path) -> None:
    from llama_cpp import Llama

    tokens = Llama(str(MODEL), vocab_only=True, verbose=False).tokenize(SMOLLM2_TEXT.encode(), add_bos=False, special=True)
    seen = states(smollm2(), tokens)
    logits = seen.pop("logits")
    rows, columns = [0, 5, len(tokens) - 1], list(range(0, logits.shape[1], 96))
    tensors = {name: tensor[rows] for name, tensor in seen.items()}
    tensors["tokens"] = torch.tensor(tokens, dtype=torch.uint32)
    tensors["rows"] = torch.tensor(rows, dtype=torch.uint32)
    tensors["columns"] = torch.tensor(columns, dtype=torch.uint32)
    tensors["logits"] = logits[rows][:, columns]
    tensors["log_sum_exp"] = logits[rows].logsumexp(-1)
    save(folder / "smollm2_states.safetensors", tensors)
