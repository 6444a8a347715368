"""Staying up: what once stopped a server, for others or for good. See prove_trust.py."""
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse

import h2_client
from prove import DEMO, TANDEM
from prove_chaos import small_disk
from prove_ledger import ADMIN, chat, rows
from trust_server import (
    ITEMS, JSON, Server, adapter, answers, demand, end_of, item, job_of, raw, request, serving, under_way, words,
)


@item("HTTP/2 with window 0, 200 streams of n = 3", "all others 429 while it stays")
def window_0():
    with serving() as server:
        body = json.dumps(chat("tandem-demo", "Tell me about the village.") | {"stream": True, "n": 3, "ignore_eos": True, "max_tokens": 400}).encode()
        with h2_client.connect(server.base, window=0) as connection:
            for _ in range(200):
                connection.post("/v1/chat/completions", body, [("authorization", f"Bearer {ADMIN}"), ("content-type", JSON)])
            time.sleep(2)
            held = under_way(server)
            demand(held > 0, "no stream was taken in")
            other = server.key_of("infer", "other")
            took = [answers(server, key=key) for key in (other, ADMIN) for _ in range(3)]
            return f"{held:.0f} choices under way; others, and the same key on another connection, are answered within {max(took):.2f} s"


@item("24 sockets that never read, n = 32", "all others 429 while they stay")
def never_reads():
    with serving() as server:
        body = json.dumps(chat("tandem-demo", "Tell me about the village.") | {"stream": True, "n": 32, "ignore_eos": True, "max_tokens": 900}).encode()
        sockets = [raw(server, request("POST", "/v1/chat/completions", body), buffer=2048) for _ in range(24)]
        time.sleep(3)
        held = under_way(server)
        demand(held > 0, "no stream was taken in")
        other = server.key_of("infer", "other")
        took = [answers(server, key=other) for _ in range(3)]
        for one in sockets:
            one.close()
        return f"{held:.0f} choices under way; another key is answered within {max(took):.2f} s"


@item("1,100 idle sockets under ulimit -n 1024, and a job", "a panic; the job running for ever")
def idle_sockets():
    # The server may raise its own limit up to the hard one, so that one is set.
    with serving(limit="-n 1024") as server:
        url, sockets = urllib.parse.urlsplit(server.base), []
        with contextlib.suppress(OSError):
            while len(sockets) < 1100:
                sockets.append(socket.create_connection((url.hostname, url.port), timeout=5))
        time.sleep(1)
        for one in sockets[:len(sockets) // 2]:  # so that a job may be created at all
            one.close()
        server.client.until_answered("GET", "/health")
        state = end_of(server, job_of(server, max_steps=3))
        demand(state["status"] == "succeeded", state)
        demand("panicked" not in server.said(), "a panic")
        demand(server.call("GET", "/ready")[0] == 200)
        return f"{len(sockets)} sockets came in, half of them stayed: the job succeeded, no panic"


@item("a disk that is full for a moment", "24 to 100 % of writes fail until a restart, the job frozen, DELETE 500")
def full_disk():
    with small_disk() as (root, is_own):
        demand(is_own, "needs root")
        server = Server(root)
        try:
            file = json.loads(server.client.upload(b'{"text": "x"}\n', "fine-tune")[1])["id"]
            job = job_of(server, max_steps=400, save_steps=5, learning_rate=1e-3)
            filler = root / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as content:
                while True:
                    content.write(bytes(1 << 20))
            full = words(server.client.upload(b'{"text": "' + b"x" * (2 << 20) + b'"}\n', "fine-tune"))
            time.sleep(2)
            ready = server.call("GET", "/ready")
            deleted = server.call("DELETE", f"/v1/files/{file}")[0]
            demand(full.startswith("507") and deleted == 200, full, deleted)
            filler.unlink()
            time.sleep(3)
            statuses = [server.client.upload(b'{"text": "x"}\n', "fine-tune")[0] for _ in range(40)]
            demand(set(statuses) == {200}, statuses)
            state = end_of(server, job, 180)
            demand(state["status"] == "succeeded", state["status"], state["error"])
            return f"full: {full}; /ready {ready[0]}, DELETE {deleted}; then 40 of 40 uploads, and the job succeeded, without a restart"
        finally:
            server.process.kill()
            server.process.wait()


@item("a training file of one talk of 4,000 turns, and of 100,000", "37 s, and hours; other jobs blocked, cancel ignored, SIGTERM 75 s")
def many_turns():
    def talk(turns):
        pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        return json.dumps({"messages": pair * (turns // 2)}).encode() + b"\n"

    with serving() as server:
        took = {}
        for turns in (4000, 100_000):
            began = time.monotonic()
            state = end_of(server, job_of(server, talk(turns) * 4, max_steps=1), 60)
            took[turns] = f"{turns}: {state['status']} after {time.monotonic() - began:.1f} s" + (f" ({state['error']['message'][:60]})" if state["error"] else "")
        long = job_of(server, talk(100_000) * 40, max_steps=1)
        other = job_of(server, max_steps=1)
        began = time.monotonic()
        demand(end_of(server, other)["status"] == "succeeded")
        beside = time.monotonic() - began
        server.call("POST", f"/v1/fine_tuning/jobs/{long}/cancel")
        state = end_of(server, long, 20)["status"]
        job_of(server, talk(100_000) * 40, max_steps=1)
        began = time.monotonic()
        demand(server.end() == 0)
        ended = time.monotonic() - began
        demand(ended < 10 and beside < 30, ended, beside)
        return "; ".join(took.values()) + f"; another job beside one of 4 million turns {beside:.1f} s, cancelled: {state}; SIGTERM {ended:.1f} s"


@item("a job's start with 30 MB beside a stream", "streams stall for 6 s")
def large_start():
    row = rows("sft")
    with serving() as server:
        body = json.dumps(chat("tandem-demo", "Tell me about the village.") | {"stream": True, "ignore_eos": True, "max_tokens": 900}).encode()
        gaps, done = [0.0], threading.Event()

        def read():
            while not done.is_set():
                with raw(server, request("POST", "/v1/chat/completions", body, Connection="close")) as one:
                    last = time.monotonic()
                    while one.recv(1 << 16):
                        gaps.append(time.monotonic() - last)
                        last = time.monotonic()

        reader = threading.Thread(target=read)
        reader.start()
        job = job_of(server, row * (30_000_000 // len(row)), max_steps=2)
        state = end_of(server, job)["status"]
        done.set()
        reader.join()
        demand(state == "succeeded" and max(gaps) < 1, state, max(gaps))
        return f"{state}; the longest gap of the stream {1000 * max(gaps):.0f} ms"


def template(text):
    def ask():
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
            file.write(text)
            file.flush()
            with serving("--chat-template", file.name, limit="-v 6000000") as server:
                began = time.monotonic()
                answer = server.call("POST", "/v1/chat/completions", chat("tandem-demo", "Hi"), timeout=60)
                took = time.monotonic() - began
                demand(answer[0] == 400, answer[:2])
                demand(server.call("GET", "/health", timeout=2)[0] == 200)
                peak = next(int(line.split()[1]) for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
                began = time.monotonic()
                demand(server.end() == 0)
                return f"{words(answer)[:150]} after {took:.1f} s; peak {peak >> 10} MiB; SIGTERM {time.monotonic() - began:.1f} s"

    return ask


ITEMS += [
    ("a chat template of nested loops", "stops /health and SIGTERM",
     template("{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}")),
    ("a chat template that doubles a string", "aborts the process",
     template("{% set ns = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}")),
    ("a chat template with tojson(indent=1e9)", "aborts the process", template("{{ messages | tojson(indent=1000000000) }}")),
]


def refused(path, make, status=400):
    def ask():
        with serving(limit="-v 8000000") as server:
            began = time.monotonic()
            answer = server.call("POST", path, make(), timeout=60)
            took = time.monotonic() - began
            demand(answer[0] == status, answer[0], answer[1][:200])
            return f"{words(answer)[:200]} after {took:.2f} s; then answers in {answers(server):.2f} s"

    return ask


PROMPTS = {"model": "tandem-demo", "max_tokens": 1}
ITEMS += [
    ("stop of 10 MB with 1,000 prompts", "aborts by memory", refused("/v1/completions", lambda: PROMPTS | {"prompt": ["x"] * 1000, "stop": "y" * 10_000_000})),
    ("stop_token_ids of 20 MB", "aborts by memory", refused("/v1/completions", lambda: PROMPTS | {"prompt": ["x"] * 1000, "stop_token_ids": [1] * 10_000_000})),
    ("a model's name of 20 MB with 1,000 prompts", "(found now) aborts by memory",
     refused("/v1/completions", lambda: PROMPTS | {"prompt": ["x"] * 1000, "model": "y" * 20_000_000}, 404)),
    ("/tokenize of 30 MB", "silences all routes for 11 s", refused("/tokenize", lambda: {"model": "tandem-demo", "prompt": "word " * 6_000_000})),
    ("add_special_tokens: false with 30 MB", "silences all routes for 11 s",
     refused("/v1/completions", lambda: PROMPTS | {"prompt": "word " * 6_000_000, "add_special_tokens": False})),
    ("1,024 prompts on an idle server", "429 busy", refused("/v1/completions", lambda: PROMPTS | {"prompt": ["x"] * 1024}, 200)),
    ("repetition_penalty: 1e-308", "500", refused("/v1/completions", lambda: PROMPTS | {"prompt": "x", "repetition_penalty": 1e-308})),
]


def evil_adapter(change):
    def ask():
        with serving() as server:
            folder = adapter(server.folder / "one")
            change(folder)
            began = time.monotonic()
            answer = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": str(folder)}, timeout=20)
            took = time.monotonic() - began
            demand(answer[0] in (400, 404) and took < 5, answer[:2], took)
            used = sum(path.stat().st_blocks for path in server.data.rglob("*") if path.is_file()) // 2048
            return f"{words(answer)[:200]} after {took:.2f} s; {used} MiB in the data folder"

    return ask


def sparse(folder):
    os.truncate(folder / "adapter_model.safetensors", 200 << 30)


def fifo(folder):
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


ITEMS += [
    ("a sparse adapter of 200 GB", "copied before it is looked at", evil_adapter(sparse)),
    ("a FIFO as an adapter's weights", "hangs", evil_adapter(fifo)),
]


def evil_model(change):
    def ask():
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(shutil.copytree(DEMO, f"{folder}/model"))
            change(model)
            began = time.monotonic()
            done = subprocess.run([TANDEM, "serve", "--port", "0", "--data-dir", f"{folder}/data", model], capture_output=True, text=True, timeout=20)
            demand(done.returncode > 0, done.returncode, done.stderr[-200:])
            return f"exit {done.returncode} after {time.monotonic() - began:.1f} s: {done.stderr.splitlines()[-1][:200]}"

    return ask


def many_layers(model):
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10 ** 9}
    (model / "config.json").write_text(json.dumps(config))


def fifo_model(model):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    os.mkfifo(model / "model.safetensors")


ITEMS += [
    ("a config with 1e9 layers", "aborts", evil_model(many_layers)),
    ("a FIFO as a model's weights", "hangs the start", evil_model(fifo_model)),
]
