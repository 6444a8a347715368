"""The methods of training that proofs go through: for each its settings and what its rows look like. Standard library only."""
import dataclasses
import json
import pathlib

DEMO = pathlib.Path(__file__).parent.parent / "server/demo"
ROWS = 40
STEPS = 12
COMMON = {"max_steps": STEPS, "save_steps": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
          "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "lora_r": 8, "lora_alpha": 16,
          "seed": 7}


@dataclasses.dataclass
class Method:
    settings: dict = dataclasses.field(default_factory=dict)
    rows: str = "chats"  # chats, pairs, judged or rewarded
    # Settings of `tandem train` alone: a server has the format of its base, and one replica.
    alone: dict = dataclasses.field(default_factory=dict)

    @property
    def is_full(self):
        return self.alone.get("method") == "full"

    @property
    def all_settings(self):
        """Of `tandem train`."""
        common = {key: value for key, value in COMMON.items() if not (self.is_full and key.startswith("lora_"))}
        return common | self.settings | self.alone

    @property
    def quantization(self):
        return self.alone.get("quantization")


def dpo(**settings):
    return Method({"objective": "dpo", "beta": 0.3, **settings}, "pairs")


def cpo(**settings):
    return Method({"objective": "cpo", "beta": 0.2, **settings}, "pairs")


# TRL's names of the losses of DPO, but for `sigmoid`, which is `dpo` itself.
DPO_LOSSES = ["hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm"]
METHODS = {
    "LoRA": Method(),
    "rsLoRA": Method({"use_rslora": True}),
    "DoRA": Method({"use_dora": True}),
    "LoRA+": Method({"loraplus_lr_ratio": 4}),
    "NEFTune": Method({"neftune_noise_alpha": 5}),
    "dropout": Method({"lora_dropout": 0.1}),
    "packing": Method({"packing": True, "max_seq_length": 128}),
    "q_proj and v_proj": Method({"lora_target_modules": ["q_proj", "v_proj"]}),
    "lm_head too": Method({"lora_target_modules": ["all-linear", "lm_head"]}),
    "embed_tokens too": Method({"lora_target_modules": ["all-linear", "embed_tokens"]}),
    "SGD": Method({"optim": "sgd", "momentum": 0.9, "learning_rate": 0.05}),
    "Lion": Method({"optim": "lion_32bit", "learning_rate": 3e-4}),
    "Adafactor": Method({"optim": "adafactor"}),
    # Its small matrices keep 32 bits, as with bitsandbytes.
    "8-bit AdamW": Method({"optim": "adamw_8bit", "lora_r": 32, "lora_alpha": 64}),
    "QLoRA nf4": Method(alone={"quantization": "nf4"}),
    "QLoRA int8": Method(alone={"quantization": "int8"}),
    "QLoRA int4": Method(alone={"quantization": "int4"}),
    "full": Method({"learning_rate": 2e-4}, alone={"method": "full"}),
    "DPO": dpo(),
    **{f"DPO {loss}": dpo(loss_type=loss) for loss in DPO_LOSSES},
    "DPO robust": dpo(loss_type="robust", label_smoothing=0.1),
    "DPO exo_pair": dpo(loss_type="exo_pair", label_smoothing=0.01),
    "KTO": Method({"objective": "kto", "beta": 0.5, "undesirable_weight": 0.75}, "judged"),
    "ORPO": Method({"objective": "orpo", "beta": 0.4}, "pairs"),
    "CPO": cpo(label_smoothing=0.1),
    "CPO hinge": cpo(loss_type="hinge", cpo_alpha=0.5),
    "CPO ipo": cpo(loss_type="ipo"),
    "SimPO": Method({"objective": "simpo", "beta": 2.0, "simpo_gamma": 1.0}, "pairs"),
    "reward-weighted": Method({"objective": "reward_weighted", "beta": 0.5}, "rewarded"),
}


def rows(kind, count=ROWS):
    """Rows of the demo's; an answer is preferred to its neighbour's."""
    lines = (DEMO / "finetune.jsonl").read_text().splitlines()[:count]
    talks = [json.loads(line)["messages"] for line in lines]

    def row(i):
        *asked, answer = talks[i]
        other = talks[i - 1][-1]
        if kind == "pairs":
            return {"prompt": asked, "chosen": [answer], "rejected": [other]}
        if kind == "judged":
            return {"prompt": asked, "completion": [answer if i % 2 else other], "label": bool(i % 2)}
        if kind == "rewarded":
            return {"messages": talks[i], "reward": (i % 5) / 4}
        return {"messages": talks[i]}

    return [row(i) for i in range(len(talks))]


def written(folder, kind):
    """The file of these rows."""
    path = pathlib.Path(folder) / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    return path


def arguments(settings):
    """As `tandem train` takes them."""
    return [f"{key}={','.join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value}"
            for key, value in settings.items()]
