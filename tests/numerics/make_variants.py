"""Ten steps of variants of LoRA training, on the gqa_tied fixture: peft's create_loraplus_optimizer and its DoRA, transformers'
NEFTune, from Tandem's initial adapter in Tandem's order of examples. Run by scripts/fixtures."""

import json
import math
import shutil
from unittest.mock import patch

import torch
from families import SPLIT
from make_fixtures import (
    FIXTURES,
    GOLDEN,
    MASK,
    batches,
    finalise,
    logits,
    save_adapter,
    start_from_tandems_adapter,
    total_weight,
    weighted_nll,
    write_json,
)
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.integrations.neftune import activate_neftune

FOLDER = FIXTURES / "gqa_tied"
# backend/src/train/noise.rs
NOISE_STREAM = 0x4EF700000000


def draws(seed: int, stream: int, first: int, n: int) -> torch.Tensor:
    """core::rng's uniform draws from a counter on."""
    key = finalise(finalise((seed + GOLDEN) & MASK) ^ ((stream * GOLDEN) & MASK))
    bits = (finalise((key + counter * GOLDEN) & MASK) >> 11 for counter in range(first, first + n))
    return torch.tensor([bit / (1 << 53) for bit in bits], dtype=torch.float64)


class Noise:
    """Stands in for the generator that transformers' hook draws from."""

    def __init__(self, seed: int, width: int):
        self.seed, self.width = seed, width
        self.step = self.row = 0

    def uniform_(self, tensor: torch.Tensor, low, high) -> torch.Tensor:
        _, tokens, width = tensor.shape
        assert width == self.width
        # A row's last token predicts nothing, and is no input of Tandem's.
        uniform = draws(self.seed, NOISE_STREAM + self.step, self.row * width, (tokens - 1) * width)
        self.row += tokens - 1
        tensor.zero_()
        tensor[0, :-1] = (low + (high - low) * uniform).view(tokens - 1, width).float()
        return tensor


def train(name: str, hyper: dict, config: dict, examples: list[dict]) -> dict:
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **config)).train()
    start_from_tandems_adapter(model, hyper["seed"], SPLIT)
    noise = Noise(hyper["seed"], base.config.hidden_size)
    if (alpha := hyper.get("neftune_noise_alpha")) is not None:
        activate_neftune(model, alpha)
    betas = (hyper["adam_beta1"], hyper["adam_beta2"])
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=hyper["learning_rate"],
        loraplus_lr_ratio=hyper.get("loraplus_lr_ratio", 1.0),
        loraplus_weight_decay=hyper["weight_decay"],
        betas=betas,
        eps=hyper["adam_epsilon"],
    )
    steps = batches(len(examples), hyper)
    scheduler = get_scheduler(
        hyper["lr_scheduler"], optimizer, num_warmup_steps=hyper["warmup_steps"], num_training_steps=len(steps)
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms, rates = [], [], []
    for number, step in enumerate(steps):
        noise.step, noise.row = number, 0
        chosen = [examples[i] for micro_batch in step for i in micro_batch]
        with patch.object(torch.Tensor, "uniform_", lambda tensor, low, high: noise.uniform_(tensor, low, high)):
            loss = sum(weighted_nll(model, example) for example in chosen) / total_weight(chosen)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, hyper["max_grad_norm"]).item())
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(map(math.isfinite, losses))
    if config.get("use_dora"):
        keep(name, model.eval())
    return {"hyper": hyper, "lora": config, "examples": examples, "steps": steps, "losses": losses} | {
        "grad_norms": norms,
        "learning_rates": rates,
    }


def keep(name: str, model) -> None:
    """What was trained, and what it answers."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder)
    prompt = json.loads((FOLDER / "expected.json").read_text())["prompts"]["long"]
    with torch.no_grad():
        answer = logits(model, prompt)
        merged = logits(model.merge_and_unload(), prompt)
    assert (answer - merged).abs().max() < 1e-4
    save_file({"logits.long": answer.contiguous()}, folder / "expected.safetensors")


def main() -> None:
    plain = json.loads((FOLDER / "expected.json").read_text())["lora_training"]
    # Of each what is beside the plain run's settings and its adapter's.
    variants = {
        "dora": ({"loraplus_lr_ratio": 2.0}, {"use_dora": True}),
        "loraplus": ({"loraplus_lr_ratio": 4.0}, {}),
        "neftune": ({"neftune_noise_alpha": 5.0}, {}),
        "plain": ({}, {}),
    }
    runs = {
        name: train(name, plain["hyper"] | hyper, plain["lora"] | lora, plain["examples"])
        for name, (hyper, lora) in variants.items()
    }
    # The same loop makes the fixture's own run.
    assert all(abs(a - b) < 1e-5 for a, b in zip(runs.pop("plain")["losses"], plain["losses"], strict=True))
    for name, run in runs.items():
        far = max(abs(a - b) for a, b in zip(run["losses"], plain["losses"], strict=True))
        assert far > 1e-2, f"{name} changes nothing"
        print(f"{name}: losses are {far:.3f} from plain LoRA's", flush=True)
    write_json(FIXTURES / "variants.json", runs)


if __name__ == "__main__":
    main()
