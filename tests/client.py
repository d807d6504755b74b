"""Asks a gateway through the official `openai` client and checks what it gets. usage: client.py URL MODEL"""

import sys

import openai

url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=url, api_key="not-needed", max_retries=0)
names = [entry.id for entry in client.models.list()]
assert model in names and f"{model}-base" in names, names

messages = [{"role": "user", "content": "Repeat: smörgås 🦐. Then count to five."}]
asked = {"messages": messages, "temperature": 0, "max_tokens": 24}
for name in (model, f"{model}-base"):
    whole = client.chat.completions.create(model=name, **asked)
    chunks = list(client.chat.completions.create(model=name, stream=True, stream_options={"include_usage": True}, **asked))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content, (pieces, whole)
    assert len(pieces) > 2, "not streamed in pieces"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 24
    assert whole.choices[0].finish_reason in ("stop", "length")

text = client.completions.create(model=model, prompt="One, two, three,", max_tokens=8, temperature=0, logprobs=2, echo=True)
logprobs = text.choices[0].logprobs
assert text.choices[0].text.startswith("One, two, three,")
assert "".join(logprobs.tokens) == text.choices[0].text and logprobs.token_logprobs[0] is None
assert all(value <= 0 for value in logprobs.token_logprobs[1:])

# α = 0 is the base.
prompt = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
bypassed = client.completions.create(model=model, extra_body={"alpha": 0}, **prompt)
assert bypassed.choices[0].text == client.completions.create(model=f"{model}-base", **prompt).choices[0].text

stopped = client.completions.create(model=model, prompt="1 2 3 4 5 6", max_tokens=20, temperature=0, stop=[" ", "\n", "0"])
assert not any(mark in stopped.choices[0].text for mark in " \n0"), stopped
seeded = [client.completions.create(model=model, prompt="Once", max_tokens=8, temperature=1.0, seed=7).choices[0].text for _ in range(2)]
assert seeded[0] == seeded[1], seeded

# Several answers, several prompts: each has its place, and one seed gives one set of answers.
drawn = {"n": 3, "seed": 5, "max_tokens": 8, "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"0": -100}}
drawn["extra_body"] = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
several = [client.chat.completions.create(model=model, messages=messages, **drawn) for _ in range(2)]
texts = [choice.message.content for choice in several[0].choices]
assert texts == [choice.message.content for choice in several[1].choices] and len(set(texts)) > 1, several
assert [choice.index for choice in several[0].choices] == [0, 1, 2], several
pieces = ["", "", ""]
for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, **drawn):
    for choice in chunk.choices:
        pieces[choice.index] += choice.delta.content or ""
assert pieces == texts, (pieces, texts)
batch = client.completions.create(model=model, prompt=["One, two,", "A, B,"], n=2, best_of=2, seed=5, max_tokens=4)
assert [choice.index for choice in batch.choices] == [0, 1, 2, 3], batch
second = client.completions.create(model=model, prompt="A, B,", n=2, seed=5, max_tokens=4)
assert [choice.text for choice in batch.choices[2:]] == [choice.text for choice in second.choices], (batch, second)

for wrong, word in [({"frequency_penalty": 2.5}, "frequency_penalty"), ({"n": 129}, "n"), ({"logit_bias": {"x": 1}}, "logit_bias")]:
    try:
        client.chat.completions.create(model=model, **asked, **wrong)
        raise AssertionError(f"{wrong} was accepted")
    except openai.BadRequestError as error:
        assert word in str(error), error
try:
    client.chat.completions.create(model="nothing", **asked)
    raise AssertionError("an unknown model was accepted")
except openai.NotFoundError:
    pass
print("ok")
