"""Steps of whole models whose first layer is frozen, as llama-recipes freezes it (freeze_transformer_layers), by torch.optim.AdamW in
Tandem's order of examples. Run by scripts/fixtures."""

import json

import torch
from make_fixtures import FIXTURES, steps_of, write_json
from transformers import AutoModelForCausalLM

# A tied head; norms behind sublayers and caps; norms and linears with biases.
NAMES = ("gqa_tied", "gemma2", "starcoder2")
FROZEN_LAYERS = 1


def run(name: str, plain: dict) -> dict:
    hyper = plain["hyper"]
    model = AutoModelForCausalLM.from_pretrained(
        FIXTURES / name, dtype=torch.float32, attn_implementation="eager"
    ).train()
    for layer in model.model.layers[:FROZEN_LAYERS]:
        layer.requires_grad_(False)
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in trainable if p.dim() > 1], "weight_decay": hyper["weight_decay"]},
        {"params": [p for _, p in trainable if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=hyper["learning_rate"], betas=(hyper["adam_beta1"], hyper["adam_beta2"]), eps=hyper["adam_epsilon"]
    )
    # Special tokens are the first three: torch's embedding learns nothing of the one that pads.
    own = model.config.vocab_size - 3
    examples = [
        example | {"tokens": [3 + token % own for token in example["tokens"]]} for example in plain["examples"]
    ]
    report = steps_of(optimizer, model, trainable, hyper, examples)
    trained = sum(parameter.numel() for _, parameter in trainable)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    return {
        "fixture": name, "frozen_layers": FROZEN_LAYERS, "trained": trained, "frozen": frozen, "hyper": hyper,
        "examples": examples, **report,
    }


def main() -> None:
    plain = json.loads((FIXTURES / "gqa_tied/expected.json").read_text())["full_training"]
    runs = [run(name, plain) for name in NAMES]
    for report in runs:
        first, *_, last = report["losses"]
        print(f"{report['fixture']}: {first:.4f} to {last:.4f}", flush=True)
    write_json(FIXTURES / "frozen.json", runs)


if __name__ == "__main__":
    main()
