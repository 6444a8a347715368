"""What `tandem eval` must say of the demo model: mean loss, accuracy and number of the tokens that are learned, by transformers, and
with an adapter by peft. Labels are found here by tokenising what comes before an answer. Run by scripts/fixtures."""

import json
import math
import pathlib

import torch
from make_fixtures import FIXTURES, write_json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = pathlib.Path(__file__).parents[2] / "server/demo"
TARGET = FIXTURES / "evaluation"
TOKENIZER = AutoTokenizer.from_pretrained(DEMO)


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def chat(row: dict) -> tuple[list[int], list[float]]:
    messages = row["messages"]
    ids, weights = tokens(TOKENIZER.apply_chat_template(messages, tokenize=False)), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = TOKENIZER.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            behind = TOKENIZER.apply_chat_template(messages[: i + 1], tokenize=False)
            weights += [0.0] * (len(tokens(before)) - len(weights))
            weights += [1.0] * (len(tokens(behind)) - len(weights))
    return ids, weights + [0.0] * (len(ids) - len(weights))


def completion(row: dict, of_prompt: float = 0.0) -> tuple[list[int], list[float]]:
    prompt = TOKENIZER(row["prompt"])["input_ids"]
    answer = tokens(row["completion"]) + [TOKENIZER.eos_token_id]
    return prompt + answer, [of_prompt] * len(prompt) + [1.0] * len(answer)


def text(row: dict) -> tuple[list[int], list[float]]:
    ids = TOKENIZER(row["text"])["input_ids"] + [TOKENIZER.eos_token_id]
    return ids, [1.0] * len(ids)


@torch.no_grad()
def evaluated(model, examples, max_seq_length: int) -> dict:
    loss, total, correct, labels = 0.0, 0.0, 0, 0
    for ids, weights in examples:
        ids, weights = torch.tensor(ids[:max_seq_length]), torch.tensor(weights[1:max_seq_length], dtype=torch.float64)
        logits = model(ids[None]).logits[0, :-1].double()
        log_probs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        loss -= float((weights * log_probs).sum())
        total += float(weights.sum())
        learned = weights != 0
        correct += int(((logits.argmax(-1) == ids[1:]) & learned).sum())
        labels += int(learned.sum())
    return {"loss": loss / total, "perplexity": math.exp(loss / total), "token_accuracy": correct / labels, "label_tokens": labels}


def main() -> None:
    rows = [json.loads(line) for line in (DEMO / "finetune.jsonl").read_text().splitlines()[:40]]
    two_turns = [{"messages": a["messages"] + b["messages"]} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    answers = [{"prompt": f"{r['messages'][0]['content']}\n", "completion": r["messages"][1]["content"]} for r in rows]
    texts = [{"text": " ".join(m["content"] for m in row["messages"])} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager").eval()
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager"), config
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(TARGET / "adapter", save_embedding_layers=False)
    (TARGET / "adapter/README.md").unlink(missing_ok=True)
    file = TARGET / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "server/demo"}, indent=1) + "\n")

    def case(name, model, rows, read, settings=(), max_seq_length=1024, adapter=False):
        made = evaluated(model, [read(row) for row in rows], max_seq_length)
        print(name, made, flush=True)
        return {"name": name, "rows": rows, "settings": list(settings), "adapter": adapter, **made}

    cases = [
        case("chat", model, rows, chat),
        case("two turns, with an adapter", adapted, two_turns, chat, adapter=True),
        case("completions", model, answers, completion),
        case("prompts, too", model, answers, lambda row: completion(row, 0.5), ["prompt_loss_weight=0.5"]),
        case("texts, cut", model, texts, text, ["max_seq_length=16"], 16),
    ]
    write_json(TARGET / "expected.json", {"cases": cases})


if __name__ == "__main__":
    main()
