"""Makes router/text/src/fixture/prompts.json: which tokens of prompts and completions TRL trains, where a token lies in both.

TRL's SFTTrainer and DPOTrainer prepare the rows (they tokenise the prompt, and the prompt with its completion, and compare). The
model is the demo model, with templates of several manners. Nothing of Tandem runs.
"""

import json
import pathlib
import tempfile

import datasets
import transformers
import trl

ROOT = pathlib.Path(__file__).parents[2]
FIXTURE = ROOT / "router/text/src/fixture/prompts.json"
MODEL = ROOT / "server/demo"

# With a newline behind the end of turn, as ChatML; with a prompt that is answered otherwise than one that waits, as R1; one
# whose prompt ends within a word.
TEMPLATES = {
    "newline": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
               "{% if add_generation_prompt %}assistant: {% endif %}",
    "opens": "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
             "{% if add_generation_prompt %}assistant: <think>\n{% endif %}",
    "word": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %} The "
            "ba{% endif %}{% endfor %}",
}

TEXTS = [
    ("Who bakes?", " Rosa."),
    ("Who bakes? ", "Rosa."),
    ("Where does Fel", "ix live?"),
    ("Felix lives in the mi", "ll."),
    ("The bak", "er and the baker"),
    ("one\n", "\ntwo"),
    ("", "Rosa bakes."),
    # What OpenAI's guide of 2021 asks for.
    ("Who bakes?\n\n###\n\n", " Rosa. END"),
    ("Who bakes? ->", " Rosa.\n"),
    ("Who bakes?", " Rosa.</s>"),
]
PAIRS = [
    ("Who bakes?", " Rosa.", " Felix."),
    ("Who bakes? ", "Rosa.", "Felix."),
    ("Felix lives in the mi", "ll.", "ne."),
    # One merges with the prompt and the other does not: the prompt of both is the shorter.
    ("The bak", "er.", "! What?"),
]
SAID = [
    ("Who bakes?", "Rosa."),
    ("Where does Felix live?", "In the mill."),
    ("Name a trade.", "ker."),
]


def message(role, content):
    return {"role": role, "content": content}


def conversations(extra=()):
    rows = [{"prompt": [message("user", asked)], "completion": [message("assistant", said)]} for asked, said in SAID]
    rows.append({
        "prompt": [message("user", "Who bakes?"), message("assistant", "Rosa."), message("user", "Sure?")],
        "completion": [message("assistant", "Yes.")],
    })
    return rows


def prepared(trainer, config, rows, tokenizer, **settings):
    with tempfile.TemporaryDirectory() as folder:
        args = config(output_dir=folder, report_to="none", use_cpu=True, bf16=False, max_length=256, **settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
        made = trainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        return list(made.train_dataset)


def supervised(rows, tokenizer):
    made = prepared(trl.SFTTrainer, trl.SFTConfig, rows, tokenizer, shuffle_dataset=False)
    return [[{"tokens": row["input_ids"], "mask": [int(label != -100) for label in row["labels"]]}] for row in made]


def preferred(rows, tokenizer):
    def example(row, answer):
        return {
            "tokens": row["prompt_ids"] + row[answer],
            "mask": [0] * len(row["prompt_ids"]) + [1] * len(row[answer]),
        }

    made = prepared(trl.DPOTrainer, trl.DPOConfig, rows, tokenizer)
    return [[example(row, answer) for answer in ("chosen_ids", "rejected_ids")] for row in made]


def main():
    cases = []

    def case(name, rows, learn, objective, template=None):
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        if template:
            tokenizer.chat_template = TEMPLATES[template]
        # Copies: TRL appends EOS to rows.
        examples = learn(json.loads(json.dumps(rows)), tokenizer)
        cases.append({
            "name": name, "objective": objective, "template": TEMPLATES.get(template), "rows": rows, "examples": examples,
        })

    texts = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]
    case("texts", texts, supervised, "sft")
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    case("pairs of texts", pairs, preferred, "dpo")
    for template in [None, *TEMPLATES]:
        chats = conversations()
        case(f"messages, {template}", chats, supervised, "sft", template)
        pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": [message("assistant", "king.")]} for row in chats]
        case(f"pairs of messages, {template}", pairs, preferred, "dpo", template)
    FIXTURE.write_text(json.dumps({"cases": cases}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
