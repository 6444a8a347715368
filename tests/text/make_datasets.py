"""Makes router/text/src/fixture/datasets.json: what other trainers make of rows of each format.

Prompts of instructions are torchtune 0.2.1's (its templates and its ShareGPT converter, loaded from their files: the package
itself wants libraries that play no part here), tokens and masks are TRL's SFTTrainer's, parts of a split are `datasets`', CSV is
Python's. The model is the demo model, whose tokenizer the test reads, too. Nothing of Tandem runs.
"""

import csv
import importlib.util
import io
import json
import pathlib
import sys
import tempfile
import types

import datasets
import transformers
import trl

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = ROOT / "router/text/src/fixture"
MODEL = ROOT / "server/demo"
LENGTH = 24

ALPACA = [
    {"instruction": "Name the baker.", "input": "", "output": "Rosa."},
    {"instruction": "Answer in one word.", "input": "Where does Felix live?", "output": "Mill."},
    {"instruction": "Greet \u00e9ve\n", "input": "a {brace}", "output": "Hello {there}"},
]
DIALOGUES = [
    {"id": 1, "dialogue": "A: Hi.\nB: Hello.", "summary": "They greet."},
    {"id": 2, "dialogue": "A: Bye.", "summary": "A leaves."},
]
SENTENCES = [{"input": "He go home.", "output": "He goes home."}, {"input": "I is.", "output": "I am."}]
CONVERSATIONS = [
    {"conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Where does Felix live?"},
        {"from": "gpt", "value": "In the mill."},
    ]},
    {"conversations": [{"from": "human", "value": "Who bakes?"}, {"from": "gpt", "value": "Rosa."}]},
]
TEXTS = [{"text": "Felix lives in the mill."}, {"text": "Rosa bakes."}, {"text": "The river is long and the road is wide."}]
PAIRS = [{"prompt": "Who bakes?", "completion": " Rosa."}, {"prompt": "", "completion": "Rosa bakes."}]


def torchtune():
    """Its modules of templates and converters, without its package."""
    folder = pathlib.Path(importlib.util.find_spec("torchtune").submodule_search_locations[0])
    modules = {}
    for name in ("torchtune", "torchtune.data"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name in ("_types", "_converters", "_instruct_templates"):
        spec = importlib.util.spec_from_file_location(f"torchtune.data.{name}", folder / "data" / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[name]
        spec.loader.exec_module(modules[name])
    return modules


def trained(rows, **settings):
    """Ids and loss mask of each example as TRL's trainer has them, in the order of the rows."""
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(output_dir=folder, report_to="none", use_cpu=True, bf16=False, shuffle_dataset=False, **settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        trainer = trl.SFTTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        batch = trainer.train_dataset
    return [{"tokens": row["input_ids"], "mask": [int(label != -100) for label in row["labels"]]} for row in batch]


def written(rows, header):
    text = io.StringIO()
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main():
    tune = torchtune()
    templates, converters = tune["_instruct_templates"], tune["_converters"]
    cases = []

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)

    def apart(pair, example):
        """torchtune encodes prompt and answer each by itself, which differs where a token of TRL's runs over the seam."""
        prompt = tokenizer(pair["prompt"])["input_ids"]
        if example["tokens"][: len(prompt)] == prompt:
            return example
        answer = tokenizer(pair["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        mask = example["mask"][:1] * len(prompt) + [1] * len(answer)
        return {"tokens": prompt + answer, "mask": mask}

    def instructions(name, template, rows, column_map, **settings):
        output = (column_map or {}).get("output", "output")
        pairs = [
            {"prompt": template.format(row, column_map), "completion": row[output]} for row in rows
        ]
        asked = {"template": f"torchtune.data.{template.__name__}", **settings}
        if column_map:
            asked["column_map"] = column_map
        cases.append({"name": name, "settings": asked, "rows": rows, "pairs": pairs, "examples": [apart(*both) for both in zip(pairs, trained(pairs, max_length=256))]})
        learned = [apart(*both) for both in zip(pairs, trained(pairs, max_length=256, completion_only_loss=False))]
        cases.append({
            "name": f"{name}, inputs learned", "settings": {**asked, "train_on_input": True}, "rows": rows, "pairs": pairs,
            "examples": [{"tokens": row["tokens"], "mask": [1] * len(row["tokens"])} for row in learned],
        })

    instructions("alpaca", templates.AlpacaInstructTemplate, ALPACA, None)
    instructions("summaries", templates.SummarizeTemplate, DIALOGUES, {"output": "summary"})
    renamed = [{"document": row["dialogue"], "gist": row["summary"]} for row in DIALOGUES]
    instructions("summaries of other columns", templates.SummarizeTemplate, renamed, {"dialogue": "document", "output": "gist"})
    instructions("grammar", templates.GrammarErrorCorrectionTemplate, SENTENCES, {"sentence": "input"})

    chats = []
    for row in CONVERSATIONS:
        messages = [{"role": m.role, "content": m.content} for m in converters.get_sharegpt_messages(row)]
        chats.append({"prompt": messages[:-1], "completion": messages[-1:]})
    cases.append({"name": "ShareGPT", "settings": {}, "rows": CONVERSATIONS, "examples": trained(chats, max_length=256)})
    cases.append({"name": "messages as prompt and completion", "settings": {}, "rows": chats, "examples": trained(chats, max_length=256)})
    cases.append({"name": "prompt and completion", "settings": {}, "rows": PAIRS, "examples": trained(PAIRS, max_length=256)})
    cases.append({"name": "texts", "settings": {}, "rows": TEXTS, "examples": trained(TEXTS, max_length=256)})
    other = [{"body": row["text"]} for row in TEXTS]
    cases.append({"name": "a text column", "settings": {"dataset_text_field": "body"}, "rows": other,
                  "examples": trained(other, max_length=256, dataset_text_field="body")})
    cases.append({"name": "blocks", "settings": {"packing_strategy": "wrapped", "max_seq_length": LENGTH}, "rows": TEXTS,
                  "examples": trained(TEXTS, max_length=LENGTH, packing=True, packing_strategy="wrapped")})

    numbers = [{"text": str(n)} for n in range(57)]
    whole = datasets.Dataset.from_list(numbers)
    splits = []
    with tempfile.TemporaryDirectory() as folder:
        whole.to_json(f"{folder}/rows.jsonl")
        for split in ["train", "train[:1%]", "train[:10%]", "train[50%:]", "train[-10%:]", "train[10:20]", "train[:2]",
                      "train[-3:]", "train[5%:15%]", "train[33%:66%]", "train[:-10%]", "train[40:]"]:
            part = datasets.load_dataset("json", data_files=f"{folder}/rows.jsonl", split=split, cache_dir=folder)
            splits.append({"split": split, "rows": [row["text"] for row in part]})

    nasty = [
        {"prompt": 'a "quote", a comma', "completion": "two\nlines"},
        {"prompt": " spaces ", "completion": "\u00e9;\t|"},
        {"prompt": '""', "completion": ","},
    ]
    tables = [{"text": written(nasty, ["prompt", "completion"]), "rows": nasty}]

    result = {"cases": cases, "splits": {"rows": numbers, "parts": splits}, "tables": tables}
    (FIXTURES / "datasets.json").write_text(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
