#!/usr/bin/env python3
"""What a sweep of four learning rates costs: against one of its trials alone, and against all four in turn.

    benches/sweep.py MODEL [--steps 16] [--rows 64]

Each is a `tandem train` of its own, its start included. Adapters must have the bytes they have alone.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
TANDEM = os.environ.get("PROVE_BINARY", ROOT / "target/release/tandem")
RATES = [3e-4, 6e-4, 1.2e-3, 2.4e-3]


def run(model, file, out, steps, rates, **more):
    """Seconds."""
    settings = {"model": model, "training_file": file, "output_dir": out, "max_steps": steps, "batch_size": 4, "lora_r": 8, "seed": 7,
                "save_steps": 0, "learning_rate": rates, **more}  # fmt: skip
    began = time.perf_counter()
    command = [str(TANDEM), "train", *(f"{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - began


def digest(folder):
    return hashlib.sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64)
    asked = parser.parse_args()
    lines = (ROOT / "server/demo/finetune.jsonl").read_text().splitlines()[: asked.rows]
    with tempfile.TemporaryDirectory(prefix="tandem-sweep-") as place:
        place = pathlib.Path(place)
        file = place / "rows.jsonl"
        file.write_text("\n".join(lines))
        alone = [run(asked.model, file, place / f"alone-{i}", asked.steps, rate) for i, rate in enumerate(RATES)]
        tokens = [json.loads(line)["num_tokens"] for line in (place / "alone-0/metrics.jsonl").read_text().splitlines()][-1]
        one, four = sum(alone) / len(alone), sum(alone)
        print(f"a trial of {asked.steps} steps, {tokens:.0f} tokens; alone {', '.join(f'{seconds:.1f}' for seconds in alone)} s\n")
        print("| four rates | s | x one trial | x four in turn | the winner |\n|---|---|---|---|---|")
        print(f"| in turn | {four:.1f} | {four / one:.2f} | 1 | |")
        for name, factor in [("halving", 2), ("all to their ends", 1)]:
            out = place / f"sweep-{factor}"
            seconds = run(asked.model, file, out, asked.steps, "[" + ",".join(map(str, RATES)) + "]", reduction_factor=factor)
            won = [i for i in range(len(RATES)) if digest(place / f"alone-{i}") == digest(out)]
            winner = f"{RATES[won[0]]}, the bytes of its run alone" if won else "OTHER BYTES"
            print(f"| {name} | {seconds:.1f} | {seconds / one:.2f} | {seconds / four:.2f} | {winner} |", flush=True)
        steps = [len(re.findall(r'"loss"', (place / f"sweep-2/trial-{i}/metrics.jsonl").read_text())) for i in range(1, 5)]
        print(f"\nsteps of the trials under halving: {steps}")


if __name__ == "__main__":
    main()
