"""Makes tests/numerics/fixtures/preferences: what TRL's trainers make of a tiny model (fixtures/gqa_tied) with each
objective that learns from preferences, from Tandem's initial adapter (or a given one) in Tandem's order of rows.

The trainers run as they are, on the CPU in float32. Only rows are given as tokens, and losses are written down as they are
returned, because logs round them.
"""

import copy
import json
import pathlib
import tempfile

import numpy
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from families import SPLIT
from make_fixtures import FIXTURES, batches, start_from_tandems_adapter, write_json

MODEL = FIXTURES / "gqa_tied"
TARGET = FIXTURES / "preferences"
ROWS = 8
HYPER = dict(
    n_epochs=3,
    batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    lr_scheduler="linear",
    warmup_steps=2,
    weight_decay=0.01,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    seed=13,
)
LORA = dict(r=4, lora_alpha=8.0, target_modules=[part for _, parts in SPLIT for part in parts])

# Name: Tandem's objective, settings under TRL's names.
DPO_LOSSES = "hinge ipo nca_pair bco_pair sppo_hard apo_zero apo_down sigmoid_norm".split()
CASES = {
    "dpo": ("dpo", dict(beta=0.3)),
    "dpo_from_adapter": ("dpo", dict(beta=0.3)),
    **{f"dpo_{loss}": ("dpo", dict(beta=0.3, loss_type=loss)) for loss in DPO_LOSSES},
    "dpo_robust": ("dpo", dict(beta=0.3, loss_type="robust", label_smoothing=0.1)),
    "dpo_exo_pair": ("dpo", dict(beta=0.3, loss_type="exo_pair", label_smoothing=0.01)),
    "kto": ("kto", dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.75)),
    "orpo": ("orpo", dict(beta=0.4)),
    "cpo": ("cpo", dict(beta=0.2, label_smoothing=0.1)),
    "cpo_hinge": ("cpo", dict(beta=0.2, loss_type="hinge", cpo_alpha=0.5)),
    "cpo_ipo": ("cpo", dict(beta=0.2, loss_type="ipo")),
    "simpo": ("cpo", dict(beta=2.0, loss_type="simpo", simpo_gamma=1.0, cpo_alpha=0.0)),
}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
}
METRICS = "rewards/ logps/ kl nll_loss log_odds".split()


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    draw = numpy.random.default_rng(5)
    tokens = lambda low, high: draw.integers(3, 288, int(draw.integers(low, high))).tolist()
    pairs = [dict(prompt=tokens(3, 12), chosen=tokens(2, 14), rejected=tokens(2, 14)) for _ in range(ROWS)]
    judged = [dict(prompt=pair["prompt"], completion=pair["chosen"], label=bool(i % 3)) for i, pair in enumerate(pairs)]
    numbers, tensors = dict(hyper=HYPER, lora=LORA, pairs=pairs, judged=judged, cases={}), {}
    for name, (objective, settings) in CASES.items():
        report, model = train(name, objective, settings, judged if objective == "kto" else pairs)
        numbers["cases"][name] = dict(objective=objective, settings=settings, **report)
        for key, value in get_peft_model_state_dict(model, adapter_name="default").items():
            tensors[f"{name}.{key}"] = value.detach().clone().contiguous()
        print(name, report["losses"], flush=True)
    write_json(TARGET / "expected.json", numbers)
    save_file(tensors, TARGET / "expected.safetensors")


def train(name: str, objective: str, settings: dict, rows: list[dict], folder=MODEL, hyper=HYPER, lora=LORA):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if name.endswith("from_adapter"):
        model = PeftModel.from_pretrained(base, folder / "adapter-all", is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora))
        start_from_tandems_adapter(model, hyper["seed"], SPLIT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or "<unk>"
    order = [row for step in batches(len(rows), hyper) for micro_batch in step for row in micro_batch]
    trainer_of, config_of = TRAINERS[objective]
    losses, logs = [], []

    class Recorded(trainer_of):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def log(self, values, *args, **kwargs):
            super().log(values, *args, **kwargs)
            logs.append(dict(values) | self.state.log_history[-1])

        def _prepare_dataset(self, dataset, *args):
            return dataset

        def tokenize_row(self, feature, model=None):
            return feature

    with tempfile.TemporaryDirectory() as place:
        config = config_of(
            output_dir=place,
            per_device_train_batch_size=hyper["batch_size"],
            gradient_accumulation_steps=hyper["gradient_accumulation_steps"],
            num_train_epochs=1,
            learning_rate=hyper["learning_rate"],
            lr_scheduler_type=hyper["lr_scheduler"],
            warmup_steps=hyper["warmup_steps"],
            weight_decay=hyper["weight_decay"],
            adam_beta1=hyper["adam_beta1"],
            adam_beta2=hyper["adam_beta2"],
            adam_epsilon=hyper["adam_epsilon"],
            max_grad_norm=hyper["max_grad_norm"],
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **copy.deepcopy(settings),
        )
        rows = [row_of(objective, rows[i]) for i in order]
        if objective == "kto":
            # As its _prepare_dataset does: each prompt with the completion of the row before it in the micro-batch.
            for start in range(0, len(rows), hyper["batch_size"]):
                batch = rows[start : start + hyper["batch_size"]]
                for i, row in enumerate(batch):
                    row["KL_completion_ids"] = batch[i - 1]["completion_ids"]
        dataset = Dataset.from_list(rows)
        trainer = Recorded(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
    accumulation = hyper["gradient_accumulation_steps"]
    steps = [losses[i : i + accumulation] for i in range(0, len(losses), accumulation)]
    logs = [log for log in logs if "grad_norm" in log]
    metrics = [{key: log[key] for key in log if any(key.startswith(known) for known in METRICS)} for log in logs]
    return dict(
        losses=[sum(step) / len(step) for step in steps],
        grad_norms=[float(log["grad_norm"]) for log in logs],
        metrics=metrics,
    ), trainer.model


def row_of(objective: str, row: dict) -> dict:
    if objective == "dpo":
        return dict(prompt_ids=row["prompt"], chosen_ids=row["chosen"], rejected_ids=row["rejected"])
    if objective == "kto":
        return dict(prompt_ids=row["prompt"], completion_ids=row["completion"], label=row["label"])
    features = dict(prompt="", chosen="", rejected="", **sequence("prompt", row["prompt"], len(row["prompt"])))
    for answer in ("chosen", "rejected"):
        features |= sequence(answer, row["prompt"] + row[answer], len(row["prompt"]))
    return features


def sequence(name: str, tokens: list[int], masked: int) -> dict:
    labels = [-100] * masked + tokens[masked:]
    return {f"{name}_input_ids": tokens, f"{name}_attention_mask": [1] * len(tokens), f"{name}_labels": labels}


if __name__ == "__main__":
    main()
