"""Prompts of a matrix of conversations by many chat templates, from transformers' `apply_chat_template`.

The templates of others are downloaded (`fetch.py`); those in `templates/` are our own and use what theirs do.
"""

import datetime
import hashlib
import json
import os
import pathlib

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from common import HERE

PUBLISHED = pathlib.Path(os.environ.get("CARRYON_VOCABULARIES", pathlib.Path.home() / ".cache/carry-on/vocabularies")) / "templates"
NOW = 1_722_000_000  # noon of 26 July 2024, about
user, assistant, system, tool = (lambda content, role=role, **others: {"role": role, "content": content, **others} for role in ("user", "assistant", "system", "tool"))
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Väder <now> & 'then'", "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "A \"city\""}, "days": {"type": "integer", "default": 1}, "unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["place"]}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}}
call = lambda name, number=1, **arguments: {"type": "function", "id": f"call{number:05d}", "function": {"name": name, "arguments": arguments}}
answer = lambda content, number=1: tool(content, name="weather", tool_call_id=f"call{number:05d}")
ASKED = [user("Malmö?"), assistant("", tool_calls=[call("weather", place="Malmö", days=2)]), answer('{"sun": true}')]
CONVERSATIONS = [
    {"messages": [user("Hello!")]},
    {"messages": [system("You answer in one word."), user("Which colour is the sky?")]},
    {"messages": [user("2+2?"), assistant("4"), user("And twice that?")]},
    {"messages": [system("Be brief."), user("2+2?"), assistant("4"), user("Thrice?"), assistant("12"), user("Thanks")]},
    {"messages": [user("2+2?"), assistant("4")]},
    {"messages": [system(""), user("")]},
    {"messages": [user("  blanks \n\n"), assistant("\ttabs\t"), user("\n"), assistant(" x ")]},
    {"messages": [user("Räksmörgås 🦐 日本語 — “quotes” & <tags> \\n {{ braces }} {% raw %} 'a' \"b\"")]},
    {"messages": [system("👩‍🚀"), user("one\ntwo\r\nthree"), assistant("<|im_end|> inside </s>"), user("<s>[INST] <|eot_id|><start_of_turn>")]},
    {"messages": [assistant("An answer first"), user("then a question")]},
    {"messages": [user("a"), user("b")]},
    {"messages": [user("a"), system("late"), user("b")]},
    {"messages": [system("only")]},
    {"messages": [user("Think."), assistant("<think>\nhm\n</think>\n\nYes"), user("More?")]},
    {"messages": [user("Think."), assistant("Yes", reasoning_content="hm, well\n"), user("More?"), assistant("No", reasoning_content="so")]},
    {"messages": [user("Hi")], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [system("/no_think Be kind."), user("Hi /think")], "chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}},
    {"messages": [user("a"), assistant("b"), user("c")], "chat_template_kwargs": {"enable_thinking": False, "thinking": False, "date_string": "1 Jan 2025", "xml_tools": False}},
    {"messages": [user("Malmö?")], "tools": [WEATHER]},
    {"messages": [system("Use tools."), user("Malmö?")], "tools": [WEATHER, CLOCK]},
    {"messages": ASKED, "tools": [WEATHER]},
    {"messages": [*ASKED, assistant("Sun."), user("And Lund?")], "tools": [WEATHER, CLOCK]},
    {"messages": [system("S"), *ASKED, assistant("Sun.")], "tools": [WEATHER]},
    {"messages": [user("Both?"), assistant("I look.", tool_calls=[call("weather", 1, place="Å", unit="C"), call("clock", 2)]), answer("1"), answer("[2, 3]", 2)], "tools": [WEATHER, CLOCK]},
    {"messages": [user("x"), assistant("", tool_calls=[call("weather", place="é\n\"q\"", days=[1, 2.5, None, True], unit={"a": {"b": "c"}})])], "tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": ASKED},
    {"messages": [user("x", name="eve"), assistant("y"), user("z")]},
    {"messages": [user("long " * 300), assistant("answer " * 200), user("?")]},
    {"messages": [user(str(n)) if n % 2 == 0 else assistant(str(n)) for n in range(13)]},
    {"messages": [user("<tool_response>\nx\n</tool_response>"), assistant("<think>a</think>b<think>c</think>d"), user("e")]},
]


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, tz)


def templates() -> dict[str, str]:
    files = [*sorted(PUBLISHED.glob("*.jinja")), *sorted((HERE / "templates").glob("*.jinja"))]
    return {file.stem: file.read_text() for file in files}


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def render(tokenizer: PreTrainedTokenizerFast, template: str, conversation: dict, **ending) -> str:
    """The prompt's digest, or `!` and why the template refuses."""
    try:
        text = tokenizer.apply_chat_template(
            conversation["messages"], chat_template=template, tools=conversation.get("tools"), tokenize=False, **conversation.get("chat_template_kwargs", {}), **ending
        )
    except TemplateError as error:
        return f"!{error.message}" if type(error) is TemplateError else "!"
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return "!"
    return short(text)


def generate_prompts(folder: pathlib.Path) -> None:
    chat_template_utils.datetime = Clock
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    found, count = {}, 0
    for name, template in templates().items():
        found[name] = [
            [render(tokenizer, template, conversation, add_generation_prompt=prompt) for prompt in (True, False)]
            + ([render(tokenizer, template, conversation, continue_final_message=True)] if conversation["messages"][-1]["role"] == "assistant" else [])
            for conversation in CONVERSATIONS
        ]
        count += sum(len(row) for row in found[name])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows, ensure_ascii=False, separators=(',', ':'))}" for name, rows in found.items())
    conversations = ",\n".join(json.dumps(json.dumps(conversation, ensure_ascii=False), ensure_ascii=False) for conversation in CONVERSATIONS)
    (folder / "prompts.json").write_text(f'{{"now": {NOW}, "conversations": [\n{conversations}\n], "prompts": {{\n{lines}\n}}}}\n')
    print(f"  {len(found)} templates, {count} prompts")
