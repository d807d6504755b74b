"""Share of FOLDER/eval.jsonl that scikit-learn's logistic regression on TF-IDF of words and pairs of words gets right. usage: tfidf.py FOLDER"""

import json
import pathlib
import sys

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def read(path: pathlib.Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return [row["text"] for row in rows], [row["label"] for row in rows]


folder = pathlib.Path(sys.argv[1])
classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
classifier.fit(*read(folder / "train.jsonl"))
print(classifier.score(*read(folder / "eval.jsonl")))
