#!/usr/bin/env python3
"""Rows of mixed lengths, as chats have them, trained by Tandem and by peft: real tokens a second, one after the other, in turns.

    benches/ragged.py MODEL [--rounds 3] [--steps 12]

Four rows a step, in the order of the file; lengths are log-normal, 15 to 350 words. peft's rows are padded to the longest of a step (a
mask, and no loss there), as its users' collators do; LoRA of rank 16 on all linears in bfloat16, AdamW. MODEL is a folder of a base. Wants
torch, transformers and peft (tests/numerics/requirements.txt) and the release binary.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
TANDEM = os.environ.get("PROVE_BINARY", ROOT / "target/release/tandem")
WORDS = "river stone window garden letter market evening bridge silver morning people water house music".split()
ROWS, WARM = 4, 2


def rows(n):
    draw = random.Random(5)
    lengths = [min(350, max(15, round(draw.lognormvariate(4.5, 0.8)))) for _ in range(n)]
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths]


def peft(model, file, steps):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    texts = [json.loads(line)["text"] for line in open(file)]
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    tokens, seconds = 0, 0.0
    for step in range(steps):
        some = ids[step * ROWS : (step + 1) * ROWS]
        longest = max(map(len, some))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in some])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some])
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            tuned(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARM:
            tokens += sum(map(len, some))
            seconds += time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"tokens": tokens, "rate": tokens / seconds, "mib": peak}))


def tandem(model, file, steps, folder):
    settings = {"model": model, "training_file": file, "output_dir": folder / "out", "max_steps": steps, "batch_size": ROWS}
    settings |= {"lora_r": 16, "lora_alpha": 32, "learning_rate": 1e-4, "shuffle": "false", "overwrite_output_dir": "true", "dtype": "bfloat16"}
    command = [TANDEM, "train", *(f"{name}={value}" for name, value in settings.items())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("tandem train failed")
    told = [json.loads(line) for line in open(folder / "out/metrics.jsonl")]
    told = [step for step in told if "tokens_per_second" in step]
    before = told[WARM - 1]["num_tokens"]
    each = [now["num_tokens"] - last["num_tokens"] for last, now in zip(told[WARM - 1 :], told[WARM:])]
    seconds = sum(tokens / step["tokens_per_second"] for tokens, step in zip(each, told[WARM:]))
    tokens = told[-1]["num_tokens"] - before
    return {"tokens": tokens, "rate": tokens / seconds, "mib": used.ru_maxrss / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peft", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft:
        return peft(options.model, options.peft, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows(options.steps * ROWS)))
        print("Tandem tokens/s | peft tokens/s | x | Tandem MiB | peft MiB")
        ratios = []
        for _ in range(options.rounds):
            ours = tandem(options.model, file, options.steps, folder)
            command = [sys.executable, __file__, options.model, "--steps", str(options.steps), "--peft", file]
            theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            if abs(ours["tokens"] - theirs["tokens"]) > options.steps * ROWS:
                raise SystemExit(f"not the same rows: {ours['tokens']} and {theirs['tokens']} tokens")
            ratios.append(ours["rate"] / theirs["rate"])
            print(f"{ours['rate']:.0f} | {theirs['rate']:.0f} | {ratios[-1]:.2f} | {ours['mib']:.0f} | {theirs['mib']:.0f}", flush=True)
        print(f"median x {statistics.median(ratios):.2f}, {ours['tokens']} tokens in {options.steps - WARM} steps of {ROWS} rows")


if __name__ == "__main__":
    main()
