"""Runs lm-eval's `local-completions`, unchanged, against a gateway, and compares with requests of one prompt each.
usage: client_lm_eval.py URL MODEL TOKENIZER, a folder with the base's tokenizer.json"""

import functools
import json
import os
import pathlib
import sys
import tempfile
import urllib.request

url, model, tokenizer = sys.argv[1:4]
folder = pathlib.Path(tempfile.mkdtemp())
# Nothing is asked of a hub.
os.environ |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval  # noqa: E402
import lm_eval.tasks  # noqa: E402
import transformers  # noqa: E402

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}
rows = [{"question": f"The capital of {country} is", "choices": list(CAPITALS.values()), "answer": index} for index, country in enumerate(CAPITALS)]
data = folder / "capitals.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))

source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", "doc_to_text": "{{question}}"}
choice = {"task": "capitals", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer", **source}
rolling = {"task": "whole", "output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}], **source}
generate = {
    "task": "continue",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": [".", "\n", "<|im_end|>", "!", "?"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    **source,
}


manager = lm_eval.tasks.TaskManager(include_defaults=False)


def evaluate(task, batch_size, **arguments):
    """Each request's answer, by what was asked."""
    asked = {"base_url": f"{url}/completions", "model": model, "tokenizer": tokenizer, "max_length": 512, "max_retries": 1, **arguments}
    results = lm_eval.simple_evaluate(
        "local-completions", model_args=asked, tasks=[dict(task)], task_manager=manager, batch_size=batch_size, bootstrap_iters=0
    )
    samples = results["samples"][task["task"]]
    return {tuple(map(str, arguments)): answer for sample in samples for arguments, answer in zip(sample["arguments"], unpacked(sample["resps"]))}


def unpacked(answers):
    return [answer[0] for answer in answers]


@functools.cache
def scored(ids):
    """Log probabilities of a prompt asked for alone."""
    return complete(prompt=ids, max_tokens=0, echo=True, logprobs=1)["logprobs"]


def complete(**body):
    request = urllib.request.Request(f"{url}/completions", json.dumps({"model": model, **body}).encode(), {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


os.environ.setdefault("OPENAI_API_KEY", "not-needed")
encode = transformers.AutoTokenizer.from_pretrained(tokenizer).encode
for batch_size, tokenized in [(7, True), (1, False)]:
    scores = evaluate(choice, batch_size, tokenized_requests=tokenized)
    assert len(scores) == 16, scores
    for (context, continuation), (score, greedy) in scores.items():
        alone, start = scored(tuple(encode(context + continuation))), len(encode(context))
        logprobs, best = alone["token_logprobs"][start:], [max(top.values()) for top in alone["top_logprobs"][start:]]
        assert (score, greedy) == (sum(logprobs), logprobs == best), (context, continuation, score, alone)

until = generate["generation_kwargs"]["until"]
for (context, _), text in evaluate(generate, 3).items():
    assert text == complete(prompt=encode(context), max_tokens=8, temperature=0, stop=until)["text"], (context, text)
assert len(evaluate(rolling, 3)) == 4
print("ok")
