#!/usr/bin/env python3
"""A base taught what it cannot do, by Tandem and by peft: the same rows, order, first numbers, rank, rate and steps; scores on
questions that neither was shown, times and memory.

    benches/adapter.py MODEL [--rows 320] [--held-out 100] [--epochs 1]

The task has one right answer: a day and a time of day in words, to be written as `MM-DD HH:MM`. MODEL is a folder of an instruction-tuned
base (SmolLM2-135M-Instruct). Wants torch, transformers and peft (tests/numerics/requirements.txt) and the release binary.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests/numerics")]
TANDEM = os.environ.get("PROVE_BINARY", ROOT / "target/release/tandem")
RANK, ALPHA, RATE, BATCH, SEED, WARMUP = 16, 32, 1e-3, 4, 7, 5
ORDINALS = ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth "
            "seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth twenty-fifth twenty-sixth "
            "twenty-seventh twenty-eighth").split()
MONTHS = "January February March April May June July August September October November December".split()
HOURS = "twelve one two three four five six seven eight nine ten eleven".split()
MINUTES = {5: "five", 10: "ten", 15: "a quarter", 20: "twenty", 25: "twenty-five"}
SENTENCES = [
    "We meet on {date} at {time}.",
    "The train leaves at {time} on {date}.",
    "Her appointment is at {time}, on {date}.",
    "On {date}, at {time}, the shop opens again.",
    "Please be there by {time} on {date}.",
]
ASK = "Answer with the day and the time as MM-DD HH:MM (24 hours) and nothing else."


def question(rng):
    day, month, hour, minute = rng.randrange(28), rng.randrange(12), rng.randrange(24), 5 * rng.randrange(12)
    spoken = HOURS[(hour + (minute > 30)) % 12]
    if minute == 0:
        words = f"{spoken} o'clock"
    elif minute == 30:
        words = f"half past {spoken}"
    else:
        words = f"{MINUTES[min(minute, 60 - minute)]} {'past' if minute < 30 else 'to'} {spoken}"
    part = "at night" if hour < 6 or hour > 21 else "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    date = rng.choice([f"the {ORDINALS[day]} of {MONTHS[month]}", f"{MONTHS[month]} the {ORDINALS[day]}"])
    asked = rng.choice(SENTENCES).format(date=date, time=f"{words} {part}")
    return asked, f"{month + 1:02}-{day + 1:02} {hour:02}:{minute:02}"


def questions(rows, held_out):
    """None of the held-out answers is one of a row that is learned."""
    rng, by_answer = random.Random(SEED), {}
    while len(by_answer) < rows + held_out:
        asked, answer = question(rng)
        by_answer.setdefault(answer, asked)
    both = [(asked, answer) for answer, asked in by_answer.items()]
    return both[:rows], both[rows:]


def chat(asked, answer=None):
    return [{"role": "system", "content": ASK}, {"role": "user", "content": asked}] + ([{"role": "assistant", "content": answer}] if answer else [])


def score(held_out, answers):
    """The share that is right to the character, and of dates and of times alone."""
    whole = sum(ours == answer for (_, answer), ours in zip(held_out, answers, strict=True))
    parts = [sum(answer.split()[i] in ours for (_, answer), ours in zip(held_out, answers)) for i in (0, 1)]
    return f"{whole} of {len(held_out)} (days {parts[0]}, times {parts[1]})"


def watched(command, log):
    """Seconds, and the largest resident set in MiB."""
    began = time.perf_counter()
    # Threads that wait do not spin: on a machine that others use, too, that costs peft most.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen([str(word) for word in command], stdout=open(log, "w"), stderr=subprocess.STDOUT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(pathlib.Path(log).read_text()[-4000:])
    return time.perf_counter() - began, usage.ru_maxrss / 1024


# ---- Tandem


def asked_of_a_server(model, adapters, held_out, place):
    from demo import Api, start

    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    server, base = start(str(TANDEM), str(place), "--model", str(model), "--served-model-name", "base", "--lora-modules", *modules)
    try:
        api = Api(base)
        told = {}
        for name in ("base", *adapters):
            began = time.perf_counter()
            body = {"model": name, "temperature": 0, "max_tokens": 20}
            ask = lambda row: api.call("POST", "/v1/chat/completions", body | {"messages": chat(row[0])})
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, held_out))
            told[name] = [answer["choices"][0]["message"]["content"].strip() for answer in answers]
            print(f"{name}, served by Tandem: {score(held_out, told[name])} in {time.perf_counter() - began:.0f} s; "
                  f"the first: {told[name][0]!r}", flush=True)  # fmt: skip
        return told
    finally:
        server.terminate()
        server.wait(30)


# ---- peft, in a process of its own


def by_peft(model, file, out, epochs):
    """A plain loop over peft's model in bfloat16, as transformers' Trainer makes it: padded batches, the mean over learned tokens."""
    import torch
    from make_fixtures import batches, start_from_tandems_adapter
    from families import SPLIT
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    targets = [part for _, parts in SPLIT for part in parts]
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets)).train()
    start_from_tandems_adapter(tuned, SEED, SPLIT)
    rows = []
    for line in pathlib.Path(file).read_text().splitlines():
        messages = json.loads(line)["messages"]
        # Up to the end of the turn: what the template writes behind it is not learned.
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids, masked = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, prompt))
        rows.append((ids, [-100] * len(masked) + ids[len(masked) :]))
    hyper = dict(n_epochs=epochs, batch_size=BATCH, gradient_accumulation_steps=1, seed=SEED)
    steps = batches(len(rows), hyper)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=WARMUP, num_training_steps=len(steps))
    began = time.perf_counter()
    for [micro_batch] in steps:
        chosen = [rows[i] for i in micro_batch]
        longest = max(len(ids) for ids, _ in chosen)
        padded = lambda values, filler: torch.tensor([row + [filler] * (longest - len(row)) for row in values])
        ids, labels = padded([ids for ids, _ in chosen], tokenizer.pad_token_id or 0), padded([labels for _, labels in chosen], -100)
        mask = padded([[1] * len(ids) for ids, _ in chosen], 0)
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.5f}", flush=True)
    print(f"trained in {time.perf_counter() - began:.1f} s")
    tuned.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    asked = parser.parse_args()
    learned, held_out = questions(asked.rows, asked.held_out)
    with tempfile.TemporaryDirectory(prefix="tandem-adapter-") as place:
        place = pathlib.Path(place)
        file = place / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": chat(*row)}) + "\n" for row in learned))
        print(f"{len(learned)} rows, for example {learned[0]}; {len(held_out)} held out", flush=True)
        settings = {"model": asked.model, "training_file": file, "output_dir": place / "ours", "n_epochs": asked.epochs, "batch_size": BATCH,
                    "learning_rate": RATE, "warmup_steps": WARMUP, "lora_r": RANK, "lora_alpha": ALPHA, "seed": SEED, "save_steps": 0}
        command = [TANDEM, "train", *(f"{key}={value}" for key, value in settings.items())]
        seconds, mib = watched(command, place / "ours.log")
        losses = [json.loads(line)["loss"] for line in (place / "ours/metrics.jsonl").read_text().splitlines()]
        print(f"tandem train: {seconds:.0f} s, {mib:.0f} MiB, losses {losses[0]:.4f} to {sum(losses[-10:]) / 10:.4f}", flush=True)
        command = [sys.executable, __file__, "--peft", asked.model, file, place / "theirs", asked.epochs]
        seconds, mib = watched(command, place / "theirs.log")
        log = (place / "theirs.log").read_text()
        theirs = [float(line.split()[1]) for line in log.splitlines() if line.startswith("loss ")]
        print(f"peft: {seconds:.0f} s ({log.splitlines()[-1]}), {mib:.0f} MiB, losses {theirs[0]:.4f} to {sum(theirs[-10:]) / 10:.4f}")
        apart = [abs(a - b) for a, b in zip(losses, theirs, strict=True)]
        print(f"losses of {len(apart)} steps apart by {sum(apart) / len(apart):.4f} in the mean, {max(apart):.4f} at most", flush=True)
        adapters = {"ours": place / "ours/adapter", "theirs": place / "theirs"}
        told = asked_of_a_server(asked.model, adapters, held_out, place)
        same = sum(a == b for a, b in zip(told["ours"], told["theirs"]))
        print(f"both adapters answer the same to {same} of {len(held_out)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peft"]:
        by_peft(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
