"""Steps of optimizers other than AdamW on the gqa_tied fixture: torch's SGD, Lion and AdamW with 8-bit moments of bitsandbytes
(its CPU kernels), transformers' Adafactor, set up as transformers' Trainer does. Run by scripts/fixtures."""

import json

import bitsandbytes
import torch
from families import SPLIT
from make_fixtures import FIXTURES, start_from_tandems_adapter, steps_of, write_json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

FOLDER = FIXTURES / "gqa_tied"


def sgd(groups, hyper):
    numbers = hyper["optimizer"]["Sgd"]
    return torch.optim.SGD(groups, lr=hyper["learning_rate"], **numbers)


def betas(hyper) -> tuple[float, float]:
    return hyper["adam_beta1"], hyper["adam_beta2"]


def lion(groups, hyper):
    return bitsandbytes.optim.Lion(groups, lr=hyper["learning_rate"], betas=betas(hyper))


def adamw_8bit(groups, hyper):
    return bitsandbytes.optim.AdamW8bit(
        groups, lr=hyper["learning_rate"], betas=betas(hyper), eps=hyper["adam_epsilon"]
    )


def adafactor(groups, hyper):
    numbers = hyper["optimizer"]["Adafactor"]
    return Adafactor(groups, lr=hyper["learning_rate"], relative_step=False, **numbers)


def run(make, plain: dict, changed: dict) -> dict:
    hyper = plain["hyper"] | changed
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").train()
    # Most of its matrices have more numbers than bitsandbytes leaves in 32 bits, some have less.
    lora = plain["lora"] | {"r": 96, "lora_alpha": 192.0} if "lora" in plain else None
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora)).train()
        start_from_tandems_adapter(model, hyper["seed"], SPLIT)
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    decays = {key for key, parameter in trainable if lora or parameter.dim() > 1}
    groups = [
        {"params": [p for key, p in trainable if key in decays], "weight_decay": hyper["weight_decay"]},
        {"params": [p for key, p in trainable if key not in decays], "weight_decay": 0.0},
    ]
    optimizer = make([group for group in groups if group["params"]], hyper)
    report = steps_of(optimizer, model, trainable, hyper, plain["examples"])
    if make is adamw_8bit:
        kinds = {state["state1"].dtype for state in optimizer.state.values()}
        assert kinds == {torch.uint8, torch.float32}, kinds
    return {"hyper": hyper, "lora": lora, "examples": plain["examples"], **report}


def main() -> None:
    numbers = json.loads((FOLDER / "expected.json").read_text())
    lora, full = numbers["lora_training"], numbers["full_training"]
    momentum = {"Sgd": {"momentum": 0.9, "nesterov": False}}
    nesterov = {"Sgd": {"momentum": 0.8, "nesterov": True}}
    plain = {"Sgd": {"momentum": 0.0, "nesterov": False}}
    scaled, unscaled = [{"Adafactor": {"scale_parameter": scaled}} for scaled in (True, False)]
    runs = {
        "sgd": run(sgd, lora, {"optimizer": plain, "learning_rate": 0.5}),
        "sgd_momentum": run(sgd, lora, {"optimizer": momentum, "learning_rate": 0.2}),
        "sgd_nesterov_full": run(sgd, full, {"optimizer": nesterov, "learning_rate": 0.1}),
        "lion": run(lion, lora, {"optimizer": "Lion", "learning_rate": 5e-4}),
        "adamw_8bit": run(adamw_8bit, lora, {"optimizer": "AdamW8bit"}),
        "adafactor": run(adafactor, lora, {"optimizer": unscaled}),
        "adafactor_full": run(adafactor, full, {"optimizer": unscaled}),
        "adafactor_scaled_full": run(adafactor, full, {"optimizer": scaled, "learning_rate": 0.05}),
    }
    for name, report in runs.items():
        first, *_, last = report["losses"]
        print(f"{name}: {first:.4f} to {last:.4f}", flush=True)
        assert first - last > 0.02, f"{name} learns nothing"
    write_json(FIXTURES / "optimizers.json", runs)


if __name__ == "__main__":
    main()
