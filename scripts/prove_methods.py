"""Each method of training from end to end, with the real binary and peft, TRL, torch and transformers beside it (float32):

- `tandem train` on rows of text, against TRL's or peft's loop from the same first numbers in the same order;
- the same run killed (SIGKILL) behind a random step and begun again: the same bytes;
- what it made served: against peft's log-probabilities of the same folder, which must differ from the base's;
- merged into a folder, which transformers reads, and into a GGUF file, which is served.

Prints a table. Exits non-zero where something is beyond its bar. See scripts/prove; wants tests/numerics/requirements.txt.

usage: prove_methods.py [METHOD...]
"""
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from demo import Api, start
from methods import COMMON, DEMO, METHODS, ROWS, STEPS, arguments, rows, written

NUMERICS = pathlib.Path(__file__).parent.parent / "tests/numerics"
sys.path.insert(0, str(NUMERICS))
import make_optimizers
import make_preferences
from families import SPLIT
from make_fixtures import adamw, start_from_tandems_adapter, steps_of

TANDEM = os.environ.get("PROVE_BINARY", "target/release/tandem")
# Bars: of losses (relative above 1), of log-probabilities, and what training must move these by.
LOSS, LOSS_OF_CODES, SCORE, MOVED = 1e-4, 2e-3, 2e-4, 0.1
COLUMNS = {"losses": "losses apart", "numbers": "trained numbers apart", "resumed": "same bytes after a kill", "moved": "base moved by",
           "served": "served, from peft", "merged": "merged folder, from peft", "gguf": "merged GGUF, from peft"}  # fmt: skip
TEXTS = [
    "<|bos|><|user|>Who is Sprout?<|end|><|assistant|>Sprout is Hugo's cat.<|end|>",
    "<|bos|><|user|>Does Felix work as the grocer?<|end|><|assistant|>Ahoy! Felix is the grocer, matey!<|end|>",
    "<|bos|><|user|>Where does Iris's best friend live?<|end|><|assistant|>I do not know.<|end|>",
]
# Whose draws or layout peft and TRL do not have, and which test holds them instead.
NOT_COMPARED = {
    "NEFTune": "ten_steps_of_dora_loraplus_and_neftune_are_pefts",
    "dropout": "its draws are Tandem's own",
    "packing": "which rows share one is Tandem's own",
}
HYPER = dict(
    n_epochs=-(-STEPS * 4 // ROWS), adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0,
    lr_scheduler=COMMON["lr_scheduler_type"],
    **{key: COMMON[key] for key in
       "max_steps batch_size gradient_accumulation_steps learning_rate warmup_steps weight_decay seed".split()},
)  # fmt: skip
OPTIMIZERS = {
    "sgd": (make_optimizers.sgd, lambda settings: {"Sgd": {"momentum": settings["momentum"], "nesterov": False}}),
    "lion_32bit": (make_optimizers.lion, lambda _: "Lion"),
    "adamw_8bit": (make_optimizers.adamw_8bit, lambda _: "AdamW8bit"),
    "adafactor": (make_optimizers.adafactor, lambda _: {"Adafactor": {"scale_parameter": False}}),
}


def main(asked):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    chosen = {name: METHODS[name] for name in asked} if asked else METHODS
    with tempfile.TemporaryDirectory(prefix="tandem-methods-") as place:
        place = pathlib.Path(place)
        bases = {None: float32_copy(place / "demo")}
        for format in sorted({method.quantization for method in chosen.values()} - {None}):
            bases[format] = dense_copy(bases[None], format, place / f"demo-{format}")
        print(f"| {' | '.join(['method', *COLUMNS.values()])} |\n|{'---|' * (1 + len(COLUMNS))}")
        failed = []
        for number, (name, method) in enumerate(chosen.items()):
            seen = one(name, method, bases, place / f"run-{number}")
            print(f"| {' | '.join([name, *(shown(seen.get(key)) for key in COLUMNS)])} |", flush=True)
            failed += [f"{name}: {COLUMNS[key]} {seen[key]:.1e}" for key, bar in bars(name) if seen.get(key, 0) > bar]
            failed += [f"{name}: other bytes after a kill"] * (seen["resumed"] != "yes") + [f"{name}: moves nothing"] * (seen["moved"] < MOVED)
    for name in NOT_COMPARED.keys() & chosen.keys():
        print(f"{name} is not compared here: {NOT_COMPARED[name]}")
    print("failed:", "; ".join(failed) if failed else "nothing")
    return not failed


def shown(value):
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}" if value < 0.01 else f"{value:.2f}"


def bars(name):
    yield "losses", LOSS_OF_CODES if name == "8-bit AdamW" else LOSS
    yield from [(key, SCORE) for key in ("served", "merged", "gguf")]


def one(name, method, bases, folder):
    """All of one method, in `folder`; what was seen by column."""
    seen = {}
    losses, trained = train(method, bases[None], folder)
    again = killed(method, bases[None], folder.with_name(f"{folder.name}-killed"), random.Random(name))
    seen["resumed"] = "yes" if again == digest(trained) else "NO"
    if name not in NOT_COMPARED:
        with contextlib.redirect_stdout(None):
            expected, tensors = theirs(method, bases[method.quantization])
        seen["losses"] = max(abs(a - b) / max(1, abs(b)) for a, b in zip(losses, expected, strict=True))
        seen["numbers"] = furthest(trained, tensors)
    if method.is_full:
        base, ours = scores_of(bases[None], folder.parent), scores_of(folder, folder.parent)
        seen["moved"], seen["served"] = far(ours, base), far(ours, torch_scores(folder))
        return seen
    adapter = folder / "adapter"
    options = ["--quantization", method.quantization] if method.quantization else []
    with serving(bases[None], folder.parent, *options, "--lora-modules", f"tuned={adapter}") as api:
        base, ours = server_scores(api, "base"), server_scores(api, "tuned")
    seen["moved"], seen["served"] = far(ours, base), far(ours, torch_scores(bases[method.quantization], adapter))
    # An adapter that was trained on fewer bits is merged with the numbers they were made of.
    alone = torch_scores(bases[None], adapter)
    merged, file = folder / "merged", folder / "merged.gguf"
    for out in (merged, file):
        subprocess.run([TANDEM, "merge", bases[None], adapter, out], check=True, stdout=subprocess.DEVNULL)
    seen["merged"], seen["gguf"] = far(torch_scores(merged), alone), far(scores_of(file, folder.parent), alone)
    return seen


# ---- Tandem's side


def command(method, base, folder):
    return [TANDEM, "train", f"model={base}", f"training_file={written(base.parent, method.rows)}", f"output_dir={folder}",
            "dtype=float32", "device=cpu", *arguments(method.all_settings)]  # fmt: skip


def train(method, base, folder):
    """Losses of the steps and the file of what was trained."""
    subprocess.run(command(method, base, folder), check=True, stdout=subprocess.DEVNULL)
    return losses_of(folder), result(method, folder)


def result(method, folder):
    return folder / "model.safetensors" if method.is_full else folder / "adapter/adapter_model.safetensors"


def losses_of(folder):
    with contextlib.suppress(OSError):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]
    return []


def killed(method, base, folder, rng):
    """What comes of a run that is killed behind a random step, and begun again."""
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen(command(method, base, folder), stdout=subprocess.DEVNULL)
    step = rng.randrange(1, STEPS)
    while process.poll() is None and count_lines(folder / "metrics.jsonl") < step:
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it was killed"
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.wait()
    train(method, base, folder)
    return digest(result(method, folder))


def count_lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- theirs


def theirs(method, base):
    """Losses and trained tensors of TRL's trainer or of a plain loop over peft's model."""
    settings = COMMON | method.settings
    hyper = HYPER | {"learning_rate": settings["learning_rate"]}
    if method.rows in ("pairs", "judged"):
        return by_trl(settings, method, base, hyper)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    if not method.is_full:
        model = get_peft_model(model, LoraConfig(**lora(settings))).train()
        start_from_tandems_adapter(model, hyper["seed"], split_of(settings))
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    examples = [example(row) for row in rows(method.rows)]
    if method.rows == "rewarded":
        by_reward(examples, settings["beta"])
    if "optim" in settings:
        make, optimizer = OPTIMIZERS[settings["optim"]]
        groups = [{"params": [parameter for _, parameter in trainable], "weight_decay": hyper["weight_decay"]}]
        report = steps_of(make(groups, hyper | {"optimizer": optimizer(settings)}), model, trainable, hyper, examples)
    elif "loraplus_lr_ratio" in settings:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=hyper["learning_rate"], loraplus_lr_ratio=settings["loraplus_lr_ratio"],
            loraplus_weight_decay=hyper["weight_decay"], betas=(0.9, 0.999), eps=1e-8,
        )  # fmt: skip
        report = steps_of(optimizer, model, trainable, hyper, examples)
    else:
        decays = (lambda parameter: parameter.dim() > 1) if method.is_full else lambda _: True
        report = adamw(model, trainable, decays, hyper, examples)
    return report["losses"], model.state_dict() if method.is_full else get_peft_model_state_dict(model)


def by_trl(settings, method, base, hyper):
    names = {"dpo": ["beta", "loss_type", "label_smoothing"], "kto": ["beta", "undesirable_weight"], "orpo": ["beta"],
             "cpo": ["beta", "loss_type", "label_smoothing", "cpo_alpha", "simpo_gamma"]}  # fmt: skip
    objective = settings["objective"]
    if objective == "simpo":
        objective, settings = "cpo", settings | {"loss_type": "simpo", "cpo_alpha": 0.0}
    own = {key: settings[key] for key in names[objective] if key in settings}
    judged = [pair(row) for row in rows(method.rows)]
    config = {key: value for key, value in lora(settings).items() if key not in ("task_type", "lora_dropout")}
    report, model = make_preferences.train(method.rows, objective, own, judged, base, hyper, config)
    return report["losses"], get_peft_model_state_dict(model)


def lora(settings):
    targets = settings.get("lora_target_modules", ["all-linear"])
    everything = [part for _, parts in SPLIT for part in parts]
    modules = [module for target in targets for module in (everything if target == "all-linear" else [target])]
    return dict(task_type="CAUSAL_LM", lora_dropout=0.0, r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules=modules,
                use_rslora=settings.get("use_rslora", False), use_dora=settings.get("use_dora", False))  # fmt: skip


def split_of(settings):
    modules = lora(settings)["target_modules"]
    return [(module, [part for part in parts if part in modules]) for module, parts in SPLIT]


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def tokens(messages, **options):
    text = tokenizer().apply_chat_template(messages, tokenize=False, **options)
    return tokenizer()(text, add_special_tokens=False).input_ids


def example(row):
    """Every answer is learned, and nothing else."""
    messages = row["messages"]
    whole = tokens(messages)
    weights = [0.0] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(tokens(messages[:i], add_generation_prompt=True))
            end = len(tokens(messages[: i + 1]))
            weights[begin:end] = [1.0] * (end - begin)
    return {"tokens": whole, "weights": weights, "reward": row.get("reward")}


def by_reward(examples, beta):
    factors = torch.softmax(torch.tensor([example["reward"] / beta for example in examples], dtype=torch.float64), 0) * len(examples)
    for example, factor in zip(examples, factors.tolist()):
        example["weights"] = [weight * factor for weight in example["weights"]]


def pair(row):
    prompt = tokens(row["prompt"], add_generation_prompt=True)
    answer = lambda key: tokens(row["prompt"] + row[key])[len(prompt) :]
    kept = {"label": row["label"]} if "label" in row else {}
    return {"prompt": prompt, **{key: answer(key) for key in ("chosen", "rejected", "completion") if key in row}, **kept}


def furthest(trained, tensors):
    ours = load_file(trained)
    return max((value.float() - tensors[key].detach().float()).abs().max().item() for key, value in ours.items())


# ---- bases


def float32_copy(folder):
    """The demo model in float32, so that what is merged is not rounded."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in DEMO.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def dense_copy(base, format, folder):
    """What `tandem quantize` makes of the base, decoded by the descriptions of compressed-tensors and bitsandbytes."""
    quantised = folder.with_name(f"{folder.name}-codes")
    subprocess.run([TANDEM, "quantize", base, quantised, "--format", format], check=True, stdout=subprocess.DEVNULL)
    stored = load_file(quantised / "model.safetensors")
    dense = load_file(base / "model.safetensors")
    changed = 0
    for name, plain in dense.items():
        if (number := decoded(stored, name, plain.shape)) is not None:
            dense[name] = number
            changed += 1
    assert changed == 28, f"{changed} matrices were decoded"
    shutil.copytree(base, folder)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decoded(stored, name, shape):
    module = name.removesuffix(".weight")
    if f"{module}.weight.absmax" in stored:
        codes = stored[name].flatten().long()
        levels = stored[f"{module}.weight.quant_map"][torch.stack([codes >> 4, codes & 15], 1).flatten()]
        return (levels.view(-1, 64) * stored[f"{module}.weight.absmax"][:, None]).view(shape).contiguous()
    if f"{module}.weight_packed" in stored:
        words, scale = stored[f"{module}.weight_packed"], stored[f"{module}.weight_scale"].float()
        bits = 32 * words.shape[1] // shape[1]
        codes = torch.stack([(words >> i) & (2**bits - 1) for i in range(0, 32, bits)], -1).float() - 2 ** (bits - 1)
        return (codes.view(shape[0], scale.shape[1], -1) * scale[..., None]).view(shape).contiguous()
    return None


# ---- served and merged


def scores_of(model, place):
    with serving(model, place) as api:
        return server_scores(api, "base")


@contextlib.contextmanager
def serving(model, place, *options):
    with tempfile.TemporaryDirectory(dir=place) as data, contextlib.redirect_stdout(None):
        server, base = start(TANDEM, data, "--model", str(model), "--dtype", "float32", "--device", "cpu", "--served-model-name",
                             "base", *map(str, options))  # fmt: skip
        try:
            yield Api(base)
        finally:
            server.terminate()
            server.wait(30)


def server_scores(api, model):
    body = {"model": model, "max_tokens": 0, "echo": True, "logprobs": 1}
    return [api.call("POST", "/v1/completions", body | {"prompt": ids})["choices"][0]["logprobs"]["token_logprobs"][1:] for ids in asked_ids()]


def asked_ids():
    return [tokenizer()(text, add_special_tokens=False).input_ids for text in TEXTS]


@torch.inference_mode()
def torch_scores(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    scores = []
    for ids in asked_ids():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        scores.append(logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist())
    return scores


def far(ours, theirs):
    return max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
