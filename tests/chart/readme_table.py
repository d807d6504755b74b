"""The table of values in the chart's README, made from values.yaml: a comment, the value below it, its default."""

import json
import re

BEGIN, END = "<!-- values -->", "<!-- /values -->"


def rows(values_yaml, values):
    """(path, default, comment) of every value; a value without a comment is an error."""
    found, path, comment = [], [], None
    for line in values_yaml.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if text.startswith("#"):
            comment = text.removeprefix("#").strip()
        elif match := re.match(r"([A-Za-z]+):", text):
            path = path[: indent // 2] + [match[1]]
            default = values
            for key in path:
                default = default[key]
            inside_a_value = any(path[: len(row[0])] == row[0] for row in found)
            is_group = isinstance(default, dict) and default and comment is None
            if inside_a_value or is_group:
                continue
            if comment is None:
                raise ValueError(f"{'.'.join(path)} has no comment")
            found.append((path, default, comment))
            comment = None
        elif not text:
            comment = None
    return [(".".join(path), default, comment) for path, default, comment in found]


def table(values_yaml, values):
    lines = ["| value | meaning | default |", "|---|---|---|"]
    for path, default, comment in rows(values_yaml, values):
        lines.append(f"| `{path}` | {comment} | `{json.dumps(default)}` |")
    return "\n".join(lines)


def replace(readme, table_text):
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table_text}\n{END}{after}"
