"""Makes router/text/src/fixture/parquet: files as pandas, pyarrow and `datasets` write them, and their rows as pyarrow reads them.

What a struct does not have is null in all libraries; rows.json leaves such keys out. Nothing of Tandem runs.
"""

import json
import pathlib

import datasets
import pandas
import pyarrow
import pyarrow.parquet

FOLDER = pathlib.Path(__file__).parents[2] / "router/text/src/fixture/parquet"

MESSAGES = [
    {"messages": [{"role": "user", "content": f"Who is number {n}?", "weight": None},
                  {"role": "assistant", "content": f"Number {n} it is.", "weight": 1 if n % 2 else None}]}
    for n in range(5)
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
CALLS = [
    {"messages": [{"role": "user", "content": "Weather?", "tool_calls": None},
                  {"role": "assistant", "content": None, "tool_calls": [CALL]}], "note": None},
    {"messages": [{"role": "user", "content": "Hi.", "tool_calls": None},
                  {"role": "assistant", "content": "Hello.", "tool_calls": None}], "note": "\u00e9t\u00e9"},
]
PAIRS = [{"prompt": f"Question {n % 3}?", "completion": f" Answer {n % 2}." if n != 4 else None} for n in range(40)]
NUMBERS = [{"text": f"row {n}", "label": n % 2 == 0, "reward": n / 4, "count": n, "tags": ["a", "b"][: n % 3]} for n in range(6)]

# Its one row is a list of one long entry, a hundred times.
REFUSED = "repeated.parquet"


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist
    write = pyarrow.parquet.write_table
    # Dictionary pages and snappy are the defaults of all three.
    pandas.DataFrame(PAIRS).to_parquet(FOLDER / "pandas.parquet")
    write(table(PAIRS), FOLDER / "zstd.parquet", compression="zstd", use_dictionary=False, row_group_size=7, data_page_version="2.0")
    write(table(PAIRS), FOLDER / "gzip.parquet", compression="gzip")
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.large_string(), nullable=False), pyarrow.field("completion", pyarrow.string())])
    write(pyarrow.Table.from_pylist(PAIRS, schema=schema), FOLDER / "required.parquet", compression="none")
    write(table(CALLS), FOLDER / "calls.parquet")
    write(table(NUMBERS), FOLDER / "numbers.parquet", use_compliant_nested_type=False)
    datasets.Dataset.from_list(MESSAGES).to_parquet(str(FOLDER / "datasets.parquet"))
    rows = {path.name: without_nulls(pyarrow.parquet.read_table(path).to_pylist()) for path in sorted(FOLDER.glob("*.parquet")) if path.name != REFUSED}
    text = json.dumps({"pyarrow": pyarrow.__version__, "files": rows}, indent=None)
    (FOLDER / "rows.json").write_text(text + "\n")
    entry = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), pyarrow.array(["y" * 300_000]))
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 100], pyarrow.int32()), entry)
    write(pyarrow.table({"messages": lists}), FOLDER / REFUSED, compression="zstd")


main()
