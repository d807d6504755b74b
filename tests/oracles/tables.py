"""Writes the tables that Rust is checked against with the libraries that users write theirs with; `--write` commits new ones.

Runs in an environment with datasets, pandas and pyarrow (`make oracles`). The same rows are beside them as JSON Lines, by Python's json.
"""

import filecmp
import json
import pathlib
import shutil
import sys
import tempfile

import datasets
import pandas
import pyarrow
import pyarrow.parquet

COMMITTED = pathlib.Path(__file__).parent / "tables"

CALL = {"type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
CHAT = [
    {"messages": [{"role": "user", "content": "What is å + 1?"}, {"role": "assistant", "content": "A letter.\nNo number. 🙂"}], "source": "a"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]},
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two", "weight": 0}, {"role": "user", "content": "three"},
                  {"role": "assistant", "content": "four", "weight": 1}], "source": "b"},
    {"messages": [{"role": "user", "content": "1 + 2, by the tool"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"},
                  {"role": "assistant", "content": "3"}]},
    {"messages": [{"role": "user", "content": "\"quoted\" \\ and \t"}, {"role": "assistant", "content": "\u2028"}], "source": "c"},
]
LABEL = [{"text": text, "label": label} for text, label in [("buy å", "spam"), ("hello", "ham"), ("", "ham"), ("win 🙂", "spam"), ("a\nb", "ham")]]


def write(folder: pathlib.Path) -> None:
    for name, rows in [("chat", CHAT), ("label", LABEL)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    chat, label = datasets.Dataset.from_list(CHAT), datasets.Dataset.from_list(LABEL)
    (folder / "hub" / "data").mkdir(parents=True)
    chat.select(range(3)).to_parquet(folder / "hub" / "data" / "train-00000-of-00002.parquet")
    chat.select(range(3, 5)).to_parquet(folder / "hub" / "data" / "train-00001-of-00002.parquet")
    datasets.DatasetDict({"train": chat, "test": label}).save_to_disk(folder / "saved")
    pandas.DataFrame(LABEL).to_parquet(folder / "pandas.parquet")
    large = pyarrow.Table.from_pylist(LABEL, schema=pyarrow.schema([("text", pyarrow.large_string()), ("label", pyarrow.string_view())]))
    pyarrow.parquet.write_table(large, folder / "zstd.parquet", compression="zstd", row_group_size=2, data_page_version="2.0")
    coded = pyarrow.Table.from_pylist(LABEL).to_pydict()
    coded = pyarrow.table({"text": coded["text"], "label": pyarrow.array(coded["label"]).dictionary_encode()})
    pyarrow.parquet.write_table(coded, folder / "dictionary.parquet", compression="none")


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        fresh = pathlib.Path(temporary)
        write(fresh)
        if "--write" in sys.argv:
            shutil.rmtree(COMMITTED, ignore_errors=True)
            shutil.copytree(fresh, COMMITTED)
            return 0
        names = sorted(str(path.relative_to(folder)) for folder in [fresh, COMMITTED] for path in folder.rglob("*") if path.is_file())
        differ = [name for name in dict.fromkeys(names) if not ((fresh / name).exists() and (COMMITTED / name).exists())]
        # Libraries write their own versions into what they write; rows and kinds are what is compared.
        differ += [name for name in names if name.endswith("jsonl") and name not in differ and not filecmp.cmp(fresh / name, COMMITTED / name, shallow=False)]
    print("\n".join(differ) or "the committed tables are those of these libraries")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
