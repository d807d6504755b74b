#!/usr/bin/env python3
"""Writes the files of `corpus/` that are no text: small GGUF and safetensors files, each with much of what its reader knows."""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, LIST, U64, I64, F64 = range(13)
FORMATS = "B b H h I i f ? - - Q q d".split()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def value(kind: int, what) -> bytes:
    if kind == STRING:
        return text(what.encode() if isinstance(what, str) else what)
    if kind == LIST:
        inner, items = what
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack("<" + FORMATS[kind], what)


def gguf(metadata: dict, tensors: dict) -> bytes:
    """`tensors`: name → (dimensions, type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, what) in metadata.items():
        head += text(key.encode()) + struct.pack("<I", kind) + value(kind, what)
    data = b""
    for name, (shape, kind, content) in tensors.items():
        head += text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def model(architecture: str, **more) -> dict:
    sizes = dict(block_count=1, embedding_length=32, feed_forward_length=32, context_length=64)
    metadata = {"general.architecture": (STRING, architecture)} | {f"{architecture}.{key}": (U32, size) for key, size in sizes.items()}
    metadata |= {f"{architecture}.attention.head_count": (U32, 2), f"{architecture}.attention.layer_norm_rms_epsilon": (F32, 1e-5)}
    return metadata | {f"{architecture}.{key.replace('__', '.')}": what for key, what in more.items()}


def words(**more) -> dict:
    return {f"tokenizer.{key.replace('__', '.')}": what for key, what in more.items()}


def safetensors(tensors: dict, **more) -> bytes:
    """`tensors`: name → (type, shape, bytes)."""
    header, data = dict(more), b""
    for name, (kind, shape, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


BYTES = words(
    ggml__model=(STRING, "gpt2"), ggml__pre=(STRING, "llama-bpe"), ggml__tokens=(LIST, (STRING, ["a", "b", "ab", "Ġ", "<s>", "<t>"])),
    ggml__merges=(LIST, (STRING, ["a b"])), ggml__token_type=(LIST, (I32, [1, 1, 1, 1, 3, 4])), ggml__bos_token_id=(U32, 4),
    ggml__eos_token_id=(U32, 4), ggml__add_bos_token=(BOOL, True), chat_template=(STRING, "{{ messages }}"),
)
PIECES = words(
    ggml__model=(STRING, "llama"), ggml__tokens=(LIST, (STRING, ["<unk>", "<s>", "<0x0A>", "▁", "a", "b", "▁a", "ab"])),
    ggml__scores=(LIST, (F32, [0, 0, 0, -1, -2, -3, -1, -2])), ggml__token_type=(LIST, (U8, [2, 3, 6, 1, 1, 1, 1, 4])),
    ggml__bos_token_id=(U32, 1), ggml__add_space_prefix=(BOOL, True),
)  # fmt: skip
KINDS = {f"x.{name}": (kind, what) for name, kind, what in [
    ("u8", U8, 1), ("i8", I8, -1), ("u16", U16, 1), ("i16", I16, -1), ("i32", I32, -1), ("u64", U64, 1), ("i64", I64, -1), ("f64", F64, 0.1),
    ("latin", STRING, b"\xe9"), ("lists", LIST, (LIST, [(U8, [1, 2]), (STRING, ["a"])])), ("bits", LIST, (BOOL, [True])),
    ("long", LIST, (U8, range(200))), ("doubles", LIST, (F64, [0.5])),
]}  # fmt: skip
FACTORS = dict(rope__scaling__type=(STRING, "yarn"), rope__scaling__factor=(F32, 4.0), rope__scaling__original_context_length=(U32, 16))

LONG = {"tokenizer.ggml.merges": (LIST, (STRING, ["<s> <t>"]))}

FILES = {
    "gguf/bytes": gguf(
        model("llama", rope__freq_base=(F32, 1e4)) | BYTES,
        {"token_embd.weight": ([32, 6], 1, bytes(384)), "rope_freqs.weight": ([8], 0, struct.pack("<8f", *[1.0] * 8))},
    ),
    "gguf/pieces": gguf(
        model("gemma2", attention__head_count_kv=(U32, 1), attention__key_length=(U32, 16), attention__sliding_window=(U32, 8)) | PIECES,
        {"token_embd.weight": ([32, 8], 8, bytes(272)), "output.weight": ([32, 8], 2, bytes(144))},
    ),
    "gguf/kinds": gguf(
        model("qwen2", vocab_size=(U32, 8), **FACTORS) | {"general.name": (STRING, "x"), "general.alignment": (U32, 32)} | KINDS,
        {"a": ([256], 12, bytes(144)), "b": ([32, 2, 2], 20, bytes(72)), "c": ([], 30, bytes(2))},
    ),
    "vocabulary/bytes": gguf(model("llama") | BYTES, {}),
    "vocabulary/merge": gguf(model("llama") | BYTES | LONG, {}),
    "vocabulary/pieces": gguf(model("phi3") | PIECES, {}),
    "safetensors/one": safetensors({"a": ("F32", [1], bytes(4))}),
    "safetensors/several": safetensors(
        {
            "model.language_model.a.weight": ("F8_E4M3", [2, 2], bytes(4)), "model.language_model.a.weight_scale_inv": ("BF16", [1, 1], bytes(2)),
            "lm_head.weight": ("F16", [2, 3], bytes(12)), "empty": ("I64", [0], b""),
        },
        __metadata__={"format": "pt"},
    ),
}  # fmt: skip

for name, content in FILES.items():
    (CORPUS / name).write_bytes(content)
