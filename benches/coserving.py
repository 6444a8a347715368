#!/usr/bin/env python3
"""A fine-tune beside streams at several loads: here, and with two processes that share the cores.

usage: coserving.py MODEL [--loads 0,20,40,60,80] [--seconds 40] [--who nobody,...] [--flags "--target-itl-ms 60"]
(wants the release binaries `tandem` and `load`)

100 % is what sixteen streams at once get done. At each load (requests come by a Poisson process) what clients feel is measured
three times: with nobody training; beside a job of the same server; beside `tandem train` in a process of its own, with the same
rows and settings. Training is said in tokens a second and as a part of what the job does at no load at all.
"""
import argparse
import json
import pathlib
import random
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
BIN = ROOT / "target/release"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
WORDS = "river stone window garden letter market evening bridge silver morning people water house music".split()
SETTINGS = {"batch_size": 8, "lora_r": 16, "n_epochs": 1000, "learning_rate": 1e-4}


def rows(path, n, words):
    """Rows of a length that chats have: a third of it is the answer."""
    draw = random.Random(1)
    with open(path, "w") as file:
        for _ in range(n):
            text = [draw.choice(WORDS) for _ in range(words)]
            cut = words * 2 // 3
            file.write(json.dumps({"prompt": " ".join(text[:cut]), "completion": " " + " ".join(text[cut:])}) + "\n")


def ask(method, path, body=None, content_type="application/json"):
    request = urllib.request.Request(URL + path, body, {"content-type": content_type}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


class Server:
    def __init__(self, model, folder, flags):
        command = [BIN / "tandem", "serve", model, "--port", str(PORT), "--data-dir", folder / "data", "--served-model-name", "m", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(folder / "server.log", "w"))
        for _ in range(600):
            try:
                ask("GET", "/ready")
                return
            except OSError:
                time.sleep(0.1)
        raise SystemExit("the server does not start")

    def trained(self):
        lines = ask("GET", "/metrics").decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem:train_tokens_total"))

    def start(self, data):
        boundary = "coserving"
        part = f'--{boundary}\r\ncontent-disposition: form-data; name="{{}}"{{}}\r\n\r\n'
        body = part.format("purpose", "") + "fine-tune\r\n" + part.format("file", '; filename="rows.jsonl"') + data.read_text()
        body += f"\r\n--{boundary}--\r\n"
        file = json.loads(ask("POST", "/v1/files", body.encode(), f"multipart/form-data; boundary={boundary}"))["id"]
        job = {"model": "m", "training_file": file, "seed": 1, **SETTINGS}
        self.job = json.loads(ask("POST", "/v1/fine_tuning/jobs", json.dumps(job).encode()))["id"]
        while self.trained() == 0:
            time.sleep(0.2)

    def cancel(self):
        ask("POST", f"/v1/fine_tuning/jobs/{self.job}/cancel", b"")


class Trainer:
    """`tandem train`, beside the server."""

    def __init__(self, model, folder, data):
        words = [f"{name}={value}" for name, value in SETTINGS.items()]
        self.out = folder / "out"
        command = [BIN / "tandem", "train", f"model={model}", f"training_file={data}", f"output_dir={self.out}", "seed=1", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(folder / "train.log", "w"))
        while self.trained() == 0:
            time.sleep(0.2)

    def trained(self):
        try:
            return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["num_tokens"]
        except (OSError, IndexError, ValueError):
            return 0

    def cancel(self):
        self.process.kill()
        self.process.wait()


def load(options, *arguments):
    command = [BIN / "load", "--url", URL, "--model", "m", "--prompt-tokens", str(options.prompt), "--max-tokens", str(options.tokens)]
    command += ["--vocab", str(min(options.vocab, 10000)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or json.loads(done.stdout.splitlines()[-1])["errors"]:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options, rate, trainer):
    """What clients feel at `rate`, and tokens a second of who trains meanwhile."""
    # Other prompts each time: none is found in the prefix cache.
    options.seed += 1
    before, began = trainer and trainer.trained(), time.monotonic()
    if rate:
        felt = load(options, "--rate", rate, "--requests", max(8, round(rate * options.seconds)), "--warmup", 0, "--seed", options.seed)
    else:
        felt = None
        time.sleep(options.seconds)
    return felt, trainer and (trainer.trained() - before) / (time.monotonic() - began)


def said(felt):
    if felt is None:
        return "- | -"
    p = lambda name: f"{felt[name]['p50']:.1f}, {felt[name]['p99']:.1f}"
    return f"{p('itl_ms')} | {p('ttft_ms')}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--loads", default="0,20,40,60,80", help="percent")
    parser.add_argument("--seconds", type=float, default=40, help="of each measurement")
    parser.add_argument("--prompt", type=int, default=80, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--words", type=int, default=120, help="of a row")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--who", default="nobody,the server,a process beside it", help="trains, in turn")
    parser.add_argument("--flags", default="", help="of the server")
    options = parser.parse_args()
    model = pathlib.Path(options.model).resolve()
    options.vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        data = folder / "rows.jsonl"
        rows(data, 512, options.words)
        server = Server(model, folder, shlex.split(options.flags))
        try:
            load(options, "--concurrency", 4, "--requests", 8)
            whole = load(options, "--concurrency", 16, "--requests", 64)["tokens_per_s"] / options.tokens
            print(f"100 % is {whole:.2f} requests a second of {options.prompt} + {options.tokens} tokens")
            print("load | who trains | ITL p50, p99 ms | TTFT p50, p99 ms | tokens/s trained | of the job alone")
            loads = [int(part) for part in options.loads.split(",")]
            alone = None
            for who in options.who.split(","):
                if who == "the server":
                    server.start(data)
                    trainer = server
                elif who == "a process beside it":
                    trainer = Trainer(model, folder, data)
                else:
                    trainer = None
                for percent in loads:
                    if percent == 0 and trainer is None:
                        continue
                    felt, rate = measured(options, whole * percent / 100, trainer)
                    alone = alone or rate
                    share = f"{rate:.0f} | {rate / alone:.2f}" if trainer else "- | -"
                    print(f"{percent} % | {who} | {said(felt)} | {share}", flush=True)
                if trainer:
                    trainer.cancel()
        finally:
            server.process.terminate()
            server.process.wait()


if __name__ == "__main__":
    main()
