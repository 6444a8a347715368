"""Runs Tandem's engine benchmark and its peers in turn and prints the median of the pairs' ratios.

Two identical runs on a quiet machine differ by 10-25 %, so a single pair says little: pairs alternate, and each ratio
is taken within its pair. Standard library only.
"""

import argparse
import json
import statistics
import subprocess
import sys

BIGGER_IS_WORSE = {"train_peak_rss_mb"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ours", required=True, help="command line that ends with a JSON line")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()
    pairs = []
    for number in range(arguments.pairs):
        # Who goes first changes, so that a drifting clock or a warm cache favours neither.
        order = ["ours", "peer"] if number % 2 == 0 else ["peer", "ours"]
        pairs.append({who: run(getattr(arguments, who)) for who in order})
        print(f"pair {number + 1} of {arguments.pairs}: {json.dumps(pairs[-1])}", file=sys.stderr, flush=True)
    print(f"{arguments.title}\n{'':18}{'ours':>10}{'peer':>10}{'ratio':>8}   (medians of {len(pairs)}; ratio within pairs)")
    for key in pairs[0]["ours"]:
        if key in pairs[0]["peer"]:
            ours, peer = ([pair[who][key] for pair in pairs] for who in ("ours", "peer"))
            ratio = statistics.median(a / b for a, b in zip(ours, peer))
            note = "  (less is better)" if key in BIGGER_IS_WORSE else ""
            print(f"{key:18}{statistics.median(ours):10.1f}{statistics.median(peer):10.1f}{ratio:8.2f}{note}")


def run(command: str) -> dict:
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
