"""Texts that people have judged, as data of each task: FOLDER/TASK-{train,eval}.jsonl.

usage: task_data.py VADER FAQ FOLDER

VADER is the source archive of PyPI's vaderSentiment 3.3.2, whose hutto_ICWSM_2014.tar.gz holds sentences of four sources with a mean score of ten
people each, from -4 to 4; FAQ the wheel of zaragoza-construction-faq 1.2.1, questions and answers on building in Sweden, in English. All is shuffled with seed 0.

- regression: the score of a sentence.
- labels: its source, and `praise` or `blame` where the score is beyond ±1.
- classes: its source alone; editorials are rare.
- reward: two sentences of one source, the one with the higher score is `chosen`.
- dpo: the same two, as answers to a `prompt`.
- general: editorials, to be left alone.
- answers: its source too, as an answer in JSON to a `prompt`.
- embedding: a question (`anchor`) and its answer (`positive`).
"""

import io
import json
import os
import pathlib
import random
import sys
import tarfile
import zipfile

SOURCES = {"movie": "movieReviewSnippets", "tweet": "tweets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets"}
PROMPTS = {"movie": "Write a sentence about a film.", "product": "Write a sentence about a product.", "tweet": "Write a tweet.", "editorial": "Write a sentence about politics."}


def sentences(package: pathlib.Path) -> list[dict]:
    with tarfile.open(package) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            rows = []
            for source, name in SOURCES.items():
                text = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode("utf-8", "replace")
                for line in text.splitlines():
                    _, score, sentence = line.split("\t", 2)
                    if len(sentence.strip()) > 20:
                        rows.append({"source": source, "score": round(float(score), 3), "text": sentence.strip()})
    random.Random(0).shuffle(rows)
    return rows


def labels(row: dict) -> list[str]:
    return [row["source"]] + (["praise"] if row["score"] > 1 else ["blame"] if row["score"] < -1 else [])


def pairs(rows: list[dict]) -> list[dict]:
    """Neighbours of one source that people do not judge alike."""
    found = []
    for source in SOURCES:
        own = [row for row in rows if row["source"] == source]
        for left, right in zip(own[::2], own[1::2]):
            if abs(left["score"] - right["score"]) > 1:
                chosen, rejected = (left, right) if left["score"] > right["score"] else (right, left)
                found.append({"prompt": PROMPTS[source], "chosen": chosen["text"], "rejected": rejected["text"]})
    random.Random(0).shuffle(found)
    return found


def answers(package: pathlib.Path) -> list[dict]:
    with zipfile.ZipFile(package) as archive:
        lines = archive.read("zaragoza_construction_faq/data/faq-en.jsonl").decode().splitlines()
    rows = [{"anchor": row["q"], "positive": row["a"]} for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows


def write(folder: pathlib.Path, task: str, rows: list[dict], train: int, evaluation: int) -> None:
    for part, some in [("eval", rows[:evaluation]), ("train", rows[evaluation : evaluation + train])]:
        partial = folder / f"{task}-{part}.partial"
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
        os.replace(partial, folder / f"{task}-{part}.jsonl")


def main() -> None:
    vader, faq, folder = map(pathlib.Path, sys.argv[1:4])
    folder.mkdir(parents=True, exist_ok=True)
    rows = sentences(vader)
    rare = [row for index, row in enumerate(rows) if row["source"] != "editorial" or index % 5 == 0]
    write(folder, "regression", [{"text": row["text"], "label": row["score"]} for row in rows], 400, 200)
    write(folder, "labels", [{"text": row["text"], "label": labels(row)} for row in rows], 400, 200)
    preferred = pairs(rows)
    write(folder, "reward", [{"chosen": pair["chosen"], "rejected": pair["rejected"]} for pair in preferred], 300, 150)
    write(folder, "dpo", preferred, 240, 80)
    write(folder, "general", [{"text": row["text"]} for row in rows if row["source"] == "editorial"], 400, 100)
    write(folder, "embedding", answers(faq), 350, 150)
    asked = [{"prompt": f"Where is this from?\n{row['text']}", "completion": json.dumps({"source": row["source"]})} for row in rare]
    write(folder, "answers", asked, 400, 100)
    # Last: make looks at this one.
    write(folder, "classes", [{"text": row["text"], "label": row["source"]} for row in rare], 400, 200)
    print(f"{len(rows)} sentences in {folder}")


if __name__ == "__main__":
    main()
