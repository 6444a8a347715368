#!/usr/bin/env python3
"""What a rank of `tandem train` holds when ranks share: its largest anonymous memory, for each way of sharing.

    benches/shards.py MODEL [--ranks 2] [--steps 3] [--save] [--ways sharing|groups|divided]

MODEL is a folder of a base (SmolLM2-135M takes a minute a line). Losses are printed beside, to be compared: sharing changes none. On one
machine ranks divide its cores, so times say nothing of ranks that have a device each. With --save a state is written at the end of each
step, which rank 0 gathers. `groups` that share, with copies between them, are of
twice as many ranks; models that are `divided` over two ranks each want an even number of heads.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time

TANDEM = os.environ.get("PROVE_BINARY", pathlib.Path(__file__).parent.parent / "target/release/tandem")
GROUPS, DIVIDED = ["sharding_group_size=N"], ["tensor_parallel_size=2", "dtype=float32"]
WAYS = {
    "sharing": [
        ("lora", "1", "NO_SHARD", []),
        ("lora", "N", "NO_SHARD", []),
        ("lora", "N", "FULL_SHARD", []),
        ("lora", "N", "FULL_SHARD", ["quantization=nf4"]),
        ("full", "1", "NO_SHARD", []),
        ("full", "N", "NO_SHARD", []),
        ("full", "N", "SHARD_GRAD_OP", []),
        ("full", "N", "FULL_SHARD", []),
    ],
    "groups": [
        ("lora", "1", "NO_SHARD", []),
        ("lora", "2N", "HYBRID_SHARD", GROUPS),
        ("full", "1", "NO_SHARD", []),
        ("full", "2N", "HYBRID_SHARD_ZERO2", GROUPS),
        ("full", "2N", "HYBRID_SHARD", GROUPS),
    ],
    # In bfloat16 halves of a sum would be rounded before they are added.
    "divided": [
        ("lora", "1", "NO_SHARD", ["dtype=float32"]),
        ("lora", "N", "NO_SHARD", DIVIDED),
        ("lora", "2N", "NO_SHARD", DIVIDED),
        ("lora", "2N", "FULL_SHARD", DIVIDED),
    ],
}


def rows(path):
    def row(a, b):
        answer = f"{a} plus {b} is {a + b}, as anyone who can count on fingers will tell you."
        return {"messages": [{"role": "user", "content": f"What is {a} plus {b}?"},
                             {"role": "assistant", "content": answer}]}

    path.write_text("\n".join(json.dumps(row(a, b)) for a in range(4) for b in range(8)))


def with_children(pid):
    yield pid
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from with_children(int(child))


def watch(process):
    """The largest RssAnon of each process, in MiB, rank 0 first."""
    largest = {}
    while process.poll() is None:
        try:
            for pid in with_children(process.pid):
                status = pathlib.Path(f"/proc/{pid}/status").read_text()
                anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1024
                largest[pid] = max(largest.get(pid, 0), anonymous)
        except (OSError, TypeError):
            pass  # It ended meanwhile.
        time.sleep(0.05)
    return list(largest.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--ways", choices=WAYS, default="sharing")
    asked = parser.parse_args()
    print("| method | ranks | sharing | rank 0, MiB | others, MiB | s a step | losses |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        rows(place / "rows.jsonl")
        for method, ranks, sharing, more in WAYS[asked.ways]:
            ranks = {"1": 1, "N": asked.ranks, "2N": 2 * asked.ranks}[ranks]
            models = ranks // 2 if more is DIVIDED else ranks
            more = [setting.replace("=N", f"={asked.ranks}") for setting in more]
            out = place / "out"
            command = [TANDEM, "train", f"model={asked.model}", f"training_file={place / 'rows.jsonl'}", f"output_dir={out}",
                       "overwrite_output_dir=true", f"method={method}", f"max_steps={asked.steps}", "batch_size=1",
                       f"gradient_accumulation_steps={2 * asked.ranks // models}", "learning_rate=1e-5", "seed=1",
                       f"save_steps={1 if asked.save else 0}", f"data_parallel_size={models}", f"sharding_strategy={sharing}",
                       *more]
            log = (place / "log").open("w+")
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            held = watch(process)
            if process.returncode:
                raise SystemExit((place / "log").read_text())
            reports = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            losses = [report["loss"] for report in reports if "loss" in report]
            text = (place / "log").read_text()
            speeds = [float(speed) for speed in re.findall(r"([\d.]+) tokens/s", text)]
            tokens = max(report.get("num_tokens", 0) for report in reports) / asked.steps
            seconds = tokens / (sum(speeds) / len(speeds)) if speeds else float("nan")
            name = " ".join([method, *(setting.removeprefix("quantization=") for setting in more)])
            others = max(held[1:], default=0)
            print(f"| {name} | {ranks} | {sharing} | {held[0]} | {others or ''} | {seconds:.1f} | "
                  f"{' '.join(f'{loss:.5f}' for loss in losses)} |", flush=True)


if __name__ == "__main__":
    main()
