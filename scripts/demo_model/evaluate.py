"""Asks a running server every held-out question and counts the answers that are exactly right.

Usage: python3 scripts/demo_model/evaluate.py HELDOUT.jsonl [--url http://127.0.0.1:8000] [--model NAME]
                                              [--json FILE] [--at-least SHARE] [--wrong N]

Prints a table by kind of question and, with --json, writes the same as JSON. Exits with 1 if any
kind stays below --at-least. Standard library only; it knows nothing of the village and starts no
server.
"""

import argparse
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def answer(url, model, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 160}
    return call(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]


def count(lines, answers):
    """Kind -> how many were asked, how many were right, and their share."""
    kinds = {}
    for line, given in zip(lines, answers):
        kind = kinds.setdefault(line["kind"], {"asked": 0, "right": 0})
        kind["asked"] += 1
        kind["right"] += given == line["messages"][-1]["content"]
    return {name: kind | {"exact": round(kind["right"] / kind["asked"], 4)} for name, kind in kinds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--at-least", type=float, default=0.0)
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong answers to show")
    args = parser.parse_args()

    url = args.url.rstrip("/")
    model = args.model or call(f"{url}/v1/models")["data"][0]["id"]
    lines = [json.loads(line) for line in args.heldout.read_text(encoding="utf-8").splitlines()]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda line: answer(url, model, line["messages"][:-1]), lines))

    kinds = count(lines, answers)
    total = sum(kind["right"] for kind in kinds.values())
    for name, kind in kinds.items():
        print(f"{name:16} {kind['right']:4} of {kind['asked']:4}  {kind['exact']:7.1%}")
    print(f"{'all':16} {total:4} of {len(lines):4}  {total / len(lines):7.1%}")

    wrong = [(line["messages"], given) for line, given in zip(lines, answers) if given != line["messages"][-1]["content"]]
    for messages, given in wrong[: args.wrong]:
        print(f"\n  asked:  {messages[-2]['content']}\n  right:  {messages[-1]['content']}\n  given:  {given}")
    if args.json:
        report = {"asked": len(lines), "right": total, "exact": round(total / len(lines), 4), "kinds": kinds}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    low = [name for name, kind in kinds.items() if kind["exact"] < args.at_least]
    if low:
        sys.exit(f"below {args.at_least:.0%}: {', '.join(low)}")


if __name__ == "__main__":
    main()
