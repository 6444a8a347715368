"""Adapters of the output layer and of the embedding as peft makes, saves and trains them, on fixtures that are there: tied to the embedding and not,
with a cap and with a factor on logits. Run by scripts/fixtures."""

import json
import shutil

import torch
from families import SPLIT
from make_fixtures import (
    FIXTURES,
    adamw,
    draw_adapter,
    logits,
    save_adapter,
    start_from_tandems_adapter,
    weighted_loss,
    write_json,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FOLDER = FIXTURES / "head"
# Of each the fixture, what is adapted, and whether ten steps are trained.
CASES = {
    "gqa_tied": ("gqa_tied", ["q_proj", "down_proj", "lm_head"], True),
    "head_dim": ("head_dim", ["lm_head"], False),
    "sharded": ("sharded", ["k_proj", "lm_head"], False),
    "gemma2": ("gemma2", ["o_proj", "lm_head"], False),
    "granite": ("granite", ["lm_head"], False),
    "embed_tied": ("gqa_tied", ["v_proj", "embed_tokens"], True),
    "embed_untied": ("head_dim", ["embed_tokens"], False),
    "embed_scaled": ("gemma2", ["embed_tokens"], False),
    "embed_multiplied": ("granite", ["k_proj", "embed_tokens"], False),
    "both": ("gqa_tied", ["embed_tokens", "lm_head"], False),
}


def adapted(name: str, targets: list[str], **options):
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, target_modules=targets, **options)
    return get_peft_model(base, config)


def answers(name: str, fixture: str, targets: list[str], tensors: dict) -> dict:
    """An adapter as peft saves it, its logits, its loss and the gradients of that."""
    asked = json.loads((FIXTURES / fixture / "expected.json").read_text())
    model = adapted(fixture, targets, r=4, lora_alpha=8).eval()
    draw_adapter(model, sum((name + "head").encode()))
    save_adapter(model, FOLDER / name)
    with torch.no_grad():
        tensors[f"{name}.logits.long"] = logits(model, asked["prompts"]["long"])
        with model.disable_adapter():
            far = (tensors[f"{name}.logits.long"] - logits(model, asked["prompts"]["long"])).abs().max().item()
    assert far > 0.1, f"{name}: the adapter changes nothing"
    loss = weighted_loss(model, asked["examples"])
    loss.backward()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            tensors[f"{name}.grad.{key.replace('.default', '')}"] = parameter.grad
    print(f"{name}: logits move by {far:.2f}, loss {loss.item():.6f}", flush=True)
    return {"loss": loss.item()}


def training(name: str, fixture: str, targets: list[str], tensors: dict) -> dict:
    """Ten steps from Tandem's initial adapter in Tandem's order of examples."""
    plain = json.loads((FIXTURES / fixture / "expected.json").read_text())["lora_training"]
    hyper, examples = plain["hyper"], plain["examples"]
    linears = [(module, [part for part in parts if part in targets]) for module, parts in SPLIT]
    model = adapted(fixture, targets, r=4, lora_alpha=8.0).train()
    start_from_tandems_adapter(model, hyper["seed"], linears)
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    report = adamw(model, trainable, lambda _: True, hyper, examples)
    for key, value in get_peft_model_state_dict(model).items():
        if "lora_" in key:
            tensors[f"{name}.final.{key}"] = value.detach().clone()
    lora = {"r": 4, "lora_alpha": 8.0, "target_modules": targets}
    return {"training": {"hyper": hyper, "lora": lora, "examples": examples, **report}}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    numbers, tensors = {}, {}
    for name, (fixture, targets, is_trained) in CASES.items():
        numbers[name] = answers(name, fixture, targets, tensors)
        if is_trained:
            numbers[name] |= training(name, fixture, targets, tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / "expected.safetensors")
    write_json(FOLDER / "expected.json", numbers)


if __name__ == "__main__":
    main()
