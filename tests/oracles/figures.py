"""Figures of held-out samples as scikit-learn and scipy have them: fixtures/figures.json, which the worker's tests read.

usage: figures.py        (Python with scikit-learn and scipy)

Resamples are drawn as the worker draws them: SplitMix64 from seed 0, the high 64 bits of 64-bit number × samples.
"""

import json
import pathlib

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import binomtest, rankdata, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, roc_auc_score, top_k_accuracy_score

RESAMPLES = 1000
BINS = 15
MASK = (1 << 64) - 1


def draws(samples: int):
    state = 0
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield ((z ^ (z >> 31)) * samples) >> 64


def bootstrap(samples: int, measure) -> list[float]:
    source, found = draws(samples), []
    for _ in range(RESAMPLES):
        value = measure(np.array([next(source) for _ in range(samples)]))
        if value is not None:
            found.append(value)
    return [measure(np.arange(samples)), *(np.percentile(found, [2.5, 97.5]) if found else [])]


def share(right: np.ndarray) -> list[float]:
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return [right.mean(), interval.low, interval.high]


def auc(wanted: np.ndarray, scores: np.ndarray):
    """Over the columns that have both kinds; `roc_auc_score` itself refuses others."""
    columns = [c for c in range(wanted.shape[1]) if 0 < wanted[:, c].sum() < len(wanted)]
    return roc_auc_score(wanted[:, columns], scores[:, columns], average="macro") if columns else None


def calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    bins = np.clip(np.ceil(confidence * BINS), 1, BINS)
    return sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))


def single(name: str, labels: int, logits: np.ndarray, wanted: np.ndarray) -> dict:
    scores, said, samples = softmax(logits.astype(np.float64), axis=1), logits.argmax(1), len(wanted)
    one_hot = np.eye(labels)[wanted]
    figures = {
        "accuracy": share(said == wanted),
        "macro_f1": bootstrap(samples, lambda s: f1_score(wanted[s], said[s], average="macro", zero_division=0)),
        "roc_auc": bootstrap(samples, lambda s: auc(one_hot[s], scores[s])),
        "ece": bootstrap(samples, lambda s: calibration(scores.max(1)[s], (said == wanted)[s])),
    }
    assert abs(figures["accuracy"][0] - accuracy_score(wanted, said)) < 1e-12
    if labels == 2 and samples > 1:
        assert abs(figures["roc_auc"][0] - roc_auc_score(wanted, scores[:, 1])) < 1e-12
    else:
        if len(np.unique(wanted)) == labels:
            assert abs(figures["roc_auc"][0] - roc_auc_score(wanted, scores, multi_class="ovr", average="macro")) < 1e-12
    return {"name": name, "task": "Classification", "labels": labels, "outputs": logits.ravel().tolist(), "targets": wanted.tolist(), "figures": figures}


def several(name: str, labels: int, logits: np.ndarray, wanted: np.ndarray) -> dict:
    scores, samples = expit(logits.astype(np.float64)), len(wanted)
    said = (scores >= 0.5).astype(int)
    confidence, right = np.maximum(scores, 1 - scores), said == wanted
    figures = {
        "accuracy": share((said == wanted).all(1)),
        "macro_f1": bootstrap(samples, lambda s: f1_score(wanted[s], said[s], average="macro", zero_division=0)),
        "roc_auc": bootstrap(samples, lambda s: auc(wanted[s], scores[s])),
        "ece": bootstrap(samples, lambda s: calibration(confidence[s].ravel(), right[s].ravel())),
    }
    assert abs(figures["accuracy"][0] - accuracy_score(wanted, said)) < 1e-12
    sets = [np.flatnonzero(row).tolist() for row in wanted]
    return {"name": name, "task": "MultiLabelClassification", "labels": labels, "outputs": logits.ravel().tolist(), "targets": sets, "figures": figures}


def numbers(name: str, outputs: np.ndarray, wanted: np.ndarray) -> dict:
    def rank_correlation(s):
        left, right = outputs[s], wanted[s]
        return None if np.ptp(left) == 0 or np.ptp(right) == 0 else np.corrcoef(rankdata(left), rankdata(right))[0, 1]

    figures = {
        "spearman": bootstrap(len(wanted), rank_correlation),
        "mean_squared_error": bootstrap(len(wanted), lambda s: mean_squared_error(wanted[s], outputs[s].astype(np.float64))),
    }
    assert abs(figures["spearman"][0] - spearmanr(outputs, wanted).statistic) < 1e-12
    return {"name": name, "task": "Regression", "labels": 1, "outputs": outputs.tolist(), "targets": wanted.tolist(), "figures": figures}


def preferences(name: str, scores: np.ndarray) -> dict:
    figures = {"accuracy": share(scores[:, 0] > scores[:, 1])}
    return {"name": name, "task": "Reward", "labels": 2, "outputs": scores.ravel().tolist(), "targets": len(scores), "figures": figures}


def neighbours(name: str, dimensions: int, rows: np.ndarray) -> dict:
    """Rows are pairs, the anchor first."""
    units = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosines, pairs = units[0::2] @ units[1::2].T, len(rows) // 2
    figures = {}
    for k in (1, 5, 10):
        nearest = np.argsort(-cosines, axis=1)[:, :k]
        figures[f"recall_at_{k}"] = share((nearest == np.arange(pairs)[:, None]).any(1))
        if k < pairs:
            assert abs(figures[f"recall_at_{k}"][0] - top_k_accuracy_score(np.arange(pairs), cosines, k=k, labels=np.arange(pairs))) < 1e-12
    return {"name": name, "task": "Embedding", "labels": 2 * dimensions, "outputs": rows.ravel().tolist(), "targets": pairs, "figures": figures}


def rounded(values: np.ndarray) -> np.ndarray:
    """Few digits keep the file small and make ties."""
    return values.round(2).astype(np.float32)


def main() -> None:
    random = np.random.default_rng(0)
    two = random.integers(0, 2, 120)
    four = random.choice(4, 90, p=[0.6, 0.25, 0.1, 0.05])
    absent = random.integers(0, 2, 40)
    sets = (random.random((80, 5)) < [0.5, 0.3, 0.2, 0.05, 0.0]).astype(int)
    values = random.normal(3, 2, 100).round(1)
    cases = [
        single("two labels", 2, rounded(random.normal(size=(120, 2)) + 1.5 * np.eye(2)[two]), two),
        single("four labels, some rare", 4, rounded(random.normal(size=(90, 4)) + 2 * np.eye(4)[four]), four),
        single("a label that no sample has", 3, rounded(random.normal(size=(40, 3)) + np.eye(3)[absent]), absent),
        single("one sample", 2, np.array([[0.5, 1.0]], dtype=np.float32), np.array([1])),
        several("several labels", 5, rounded(random.normal(size=(80, 5)) * 1.5 + 3 * sets - 1.5), sets),
        preferences("pairs", rounded(random.normal(size=(60, 2)) + [0.7, 0])),
        neighbours("embeddings", 6, rounded(np.repeat(random.normal(size=(40, 6)), 2, axis=0) + 0.8 * random.normal(size=(80, 6)))),
        numbers("numbers", rounded(0.7 * values + random.normal(size=100)), values),
    ]
    for case in cases:
        case["figures"] = {name: [float(value) for value in figure] for name, figure in case["figures"].items() if figure[0] is not None}
        # Whole numbers and short decimals, as they were rounded.
        case["outputs"] = [round(value, 2) for value in case["outputs"]]
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    path = pathlib.Path(__file__).parent / "fixtures" / "figures.json"
    path.write_text(text)
    print(f"{len(cases)} cases, {len(text)} bytes in {path}")


if __name__ == "__main__":
    main()
