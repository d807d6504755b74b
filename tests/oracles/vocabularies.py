"""Token ids and decoded texts of every kind of tokenizer that our families have, from transformers; of published vocabularies, from llama.cpp.

The small vocabularies are trained here; a kind is one of them with the normalizer, pre-tokenizer, decoder and added tokens that the publisher's
`tokenizer.json` has.
"""

import collections
import hashlib
import json
import os
import pathlib

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import text
from prompts import PUBLISHED

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""]
GGUF = ["llama-bpe", "llama-spm", "phi-3", "qwen2", "gpt-2", "starcoder", "refact", "command-r"]
EXTRA = [
    "", "<s>", "</s>", "<s>a</s>b", "<s> [INST] Hi [/INST] Hello </s><s>[INST] x[/INST]", "<|user|>\nHi<|end|>\n<|assistant|>\n", "a <|end|>  b", "<|end|>\n\nx", "x<|end|>",
    "<start_of_turn>user\nHi<end_of_turn>\n", "[TOOL_CALLS] [{}]", "<tool>x</tool> <tool>", "<unk>", "▁a▁▁b", "a▁ b", "<0x0A>", "\x00\x01\x7f", "\u2028a\u2029", "ﬀ ﷺ ㎏", "e\u0301 é", "🏴\U000e0067\U000e0062\U000e007f",
    "a" * 300, " " * 70 + "x", "\n" * 40, "\t" * 20, "1" * 50, "12345678901234567890.5", "𠮷野家で𩸽", "가나다라 한글", "᚛ᚑᚌᚐᚋ᚜", "ᏣᎳᎩ", "a\r\nb\r\n\r\nc\rd", " \r\n \t ", "don't DON'T I'LL we’ll", "x\u00a0\u00a0y\u2003z",
]


def byte_level(prefix: bool = False, regex: bool = False) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def split(*patterns: str) -> dict:
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level()]}


def begin(token: str, id: int) -> dict:
    piece = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": piece, "pair": [*piece, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}}


def added(vocabulary: dict, *tokens: tuple[str, bool, dict]) -> list[dict]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fresh, out = len(vocabulary), []
    for content, special, options in tokens:
        id = vocabulary.get(content, fresh)
        fresh += id == fresh
        out.append({"id": id, "content": content, **plain, "special": special, **options})
    return sorted(out, key=lambda token: token["id"])


BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FALLBACK = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PIECES = [("<unk>", True, {}), ("<s>", True, {}), ("</s>", True, {})]
CHAT = [("<|user|>", True, {"rstrip": True}), ("<|assistant|>", True, {"rstrip": True}), ("<|end|>", True, {"rstrip": True})]
TURNS = [("<s>", True, {}), ("</s>", True, {}), ("<|user|>", True, {}), ("<|end|>", True, {}), ("<tool>", False, {})]


def kinds(bytes_: dict, pieces: dict) -> dict[str, dict]:
    """`tokenizer.json` of each kind, without its model."""
    at = len(bytes_)
    of_bytes = lambda pre, normalizer=None, post=None, tokens=TURNS: {"model": "bytes", "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post, "decoder": byte_level(True, True), "added_tokens": added(bytes_, *tokens)}
    of_pieces = lambda pre, normalizer, decoder, tokens: {"model": "pieces", "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": begin("<s>", 1), "decoder": {"type": "Sequence", "decoders": decoder}, "added_tokens": added(pieces, *tokens)}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, BLANKS]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {
        "gpt2": of_bytes(byte_level(regex=True)),
        "smollm": of_bytes({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(regex=True)]}),
        "llama3": of_bytes(split(LLAMA3), post={"type": "Sequence", "processors": [byte_level(True), begin("<s>", at)]}),
        "qwen2": of_bytes(split(QWEN2), normalizer={"type": "NFC"}, post=byte_level()),
        "glm4, olmo2, phi4": of_bytes(split(LLAMA3)),
        "tekken": of_bytes(split(TEKKEN)),
        "deepseek3": of_bytes(split(*DEEPSEEK3), normalizer={"type": "Sequence", "normalizers": []}, post=begin("<s>", at), tokens=[*TURNS, ("<think>", False, {"normalized": True})]),
        "llama2": of_pieces(None, legacy, [*FALLBACK, STRIP], PIECES),
        "mistral": of_pieces(metaspace, None, [*FALLBACK, STRIP], [*PIECES, ("[INST]", True, {}), ("[/INST]", True, {}), ("[TOOL_CALLS]", True, {})]),
        "phi3": of_pieces(None, legacy, [*FALLBACK, STRIP], [*PIECES, *CHAT]),
        "gemma": of_pieces({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, BLANKS, FALLBACK, [*PIECES, ("<start_of_turn>", True, {}), ("<end_of_turn>", True, {}), ("\n\n", False, {}), ("▁▁▁▁", False, {})]),
    }


def train() -> dict[str, dict]:
    """The two models: of bytes, and of pieces with byte fallback."""
    corpus = [line for line in text.texts() if len(line) > 8] * 2
    of_bytes = Tokenizer(models.BPE())
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    of_pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    of_pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    # The trainer's own bound of the alphabet takes any of characters that are equally frequent.
    frequency = collections.Counter("".join(corpus))
    alphabet = set(sorted(frequency, key=lambda character: (-frequency[character], character))[:90])
    common = ["".join(character for character in line if character in alphabet) for line in corpus]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    of_pieces.train_from_iterator([*common, "x    y        z"], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    return {"bytes": json.loads(of_bytes.to_str())["model"], "pieces": json.loads(of_pieces.to_str())["model"]}


def whole(kind: dict, model: dict, name: str) -> str:
    model = {**model, "ignore_merges": name in ("llama3", "tekken")}
    rest = {key: value for key, value in kind.items() if key != "model"}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, **rest, "model": model}, ensure_ascii=False)


def short(value) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()[:8]


def row(tokenizer: PreTrainedTokenizerFast, line: str) -> str:
    """A digest of the ids without and with special tokens, and of what they decode to."""
    ids, around = (tokenizer(line, add_special_tokens=special).input_ids for special in (False, True))
    return short([ids, around, tokenizer.decode(around, skip_special_tokens=True, clean_up_tokenization_spaces=False)])


def generate_vocabularies(folder: pathlib.Path) -> None:
    from llama_cpp import Llama

    lines = [*text.texts(), *EXTRA]
    trained = train()
    described = kinds(trained["bytes"]["vocab"], trained["pieces"]["vocab"])
    rows = {}
    for name, kind in described.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(whole(kind, trained[kind["model"]], name)))
        rows[name] = " ".join(row(tokenizer, line) for line in lines)
    published = {"deepseek": " ".join(row(PreTrainedTokenizerFast(tokenizer_file=str(PUBLISHED.parent / "deepseek.json")), line) for line in lines)}
    for name in GGUF:
        model = Llama(str(PUBLISHED.parent / f"{name}.gguf"), vocab_only=True, verbose=False)
        published[name] = " ".join(short(model.tokenize(line.encode(), add_bos=False, special=True)) for line in lines)
    fixture = {"texts": EXTRA, "models": trained, "kinds": described, "rows": rows, "published": published}
    parts = ",\n".join(f"{json.dumps(name)}: {json.dumps(part, ensure_ascii=False, separators=(',', ':'))}" for name, part in fixture.items())
    (folder / "vocabularies.json").write_text(f"{{\n{parts}\n}}\n")
    print(f"  {len(rows)} kinds and {len(published)} published vocabularies, {len(lines)} texts each")
