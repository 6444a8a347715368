"""The smallest input of each hole that was found once in a server, against the server of now, and what comes of it; as lines of a table. What
takes no process (types that cannot be forged, tables) is a test's. Standard library only; root for the full disk.

usage: prove_trust.py [WORDS]    the items whose name has them, or all
"""
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import h2_client
from demo import start
from prove import DEMO, QUESTIONS, TANDEM, random_adapter
from prove_chaos import small_disk
from prove_ledger import ADMIN, Away, Client, chat, rows

ITEMS = []
JSON = "application/json"


class Wrong(Exception):
    """What came is not what should."""


def item(name, before):
    return lambda do: ITEMS.append((name, before, do))


def demand(condition, *what):
    if not condition:
        raise Wrong(" ".join(map(str, what))[:300])


class Server:
    """One in a folder; its client is an admin."""

    def __init__(self, folder, *options, key=ADMIN, limit=None):
        self.folder, self.data = pathlib.Path(folder), pathlib.Path(folder) / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.options, self.key, self.binary = [*options, "--threads", "1", "--lora-root", str(folder)], key, TANDEM
        if limit:
            self.binary = str(self.folder / "tandem")
            pathlib.Path(self.binary).write_text(f'#!/bin/sh\nulimit {limit}\nexec "{os.path.abspath(TANDEM)}" "$@"\n')
            os.chmod(self.binary, 0o755)
        self.begin()

    def begin(self):
        keys = ["--api-key", self.key] if self.key else []
        with contextlib.redirect_stdout(None):
            self.process, self.base = start(self.binary, str(self.data), *self.options, *keys)
        self.client = Client(lambda: [self.base], self.data / "adapters", ["--data-dir", str(self.data)])
        self.call = self.client.call

    def end(self, by=signal.SIGTERM):
        self.process.send_signal(by)
        return self.process.wait(60)

    def said(self):
        return (self.data / "server.log").read_text()

    def refuses_to_start(self):
        done = subprocess.run([TANDEM, "serve", "--port", "0", "--data-dir", self.data, *self.options], capture_output=True, text=True, timeout=20)
        demand(done.returncode, "it started")
        return f"exit {done.returncode}: " + next(line for line in done.stderr.splitlines() if line.startswith("tandem: "))[8:]

    def key_of(self, role, tenant, *more):
        key = self.client.keys("create", "--role", role, "--tenant", tenant, *more)[0]
        until = time.monotonic() + 10
        while self.call("GET", "/v1/models", key=key)[0] != 200 and time.monotonic() < until:
            time.sleep(0.1)
        return key


@contextlib.contextmanager
def serving(*options, **more):
    with tempfile.TemporaryDirectory(prefix="tandem-trust-") as folder:
        server = Server(folder, *options, **more)
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.process.kill()
            server.process.wait()


def words(answer):
    """Status and message of an answer."""
    try:
        return f"{answer[0]} {json.loads(answer[1])['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer[0]} {answer[1][:120]!r}"


def answers(server, seconds=10, key=ADMIN):
    """How long a plain request takes."""
    began = time.monotonic()
    status, text, _ = server.call("POST", "/v1/chat/completions", chat("tandem-demo", QUESTIONS[0]), timeout=seconds, key=key)
    demand(status == 200, "others hear", status, text[:100])
    return time.monotonic() - began


def under_way(server):
    """Choices that the engine has, running and waiting."""
    lines = server.call("GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{")))


def adapter(folder, seed=0):
    random_adapter(folder, json.loads((DEMO / "config.json").read_text()), seed)
    return folder


def job_of(server, content=None, key=ADMIN, **settings):
    status, answer, _ = server.client.upload(content or rows("sft"), "fine-tune")
    demand(status == 200, answer)
    body = {"model": "tandem-demo", "training_file": json.loads(answer)["id"], "seed": 7, **settings}
    status, answer, _ = server.call("POST", "/v1/fine_tuning/jobs", body)
    demand(status == 200, answer)
    return json.loads(answer)["id"]


def end_of(server, job, seconds=120):
    return server.client.ended(f"/v1/fine_tuning/jobs/{job}", seconds=seconds)


def filled(server):
    server.client.upload(b'{"text": "kept"}\n', "fine-tune")
    demand(server.client.load("one", adapter(server.folder / "one")) == 200)


def counted(server):
    return len(list((server.data / "files").iterdir())), len(list((server.data / "adapters").iterdir()))


# 1. Data


@item("start on a lost database", "adapters 5 -> 0, files 2 -> 0")
def lost_database():
    with serving() as server:
        filled(server)
        before = counted(server)
        server.end(signal.SIGKILL)
        for file in server.data.glob("tandem.db*"):
            file.unlink()
        said = server.refuses_to_start()
        demand(counted(server) == before, "files and adapters", before, counted(server))
        server.options.append("--quarantine-strays")
        server.begin()
        moved = [path for path in (server.data / "quarantine").rglob("*") if path.is_file()]
        demand(len(moved) >= 3, moved)
        return f"{said}; all {sum(before)} are there; with --quarantine-strays they move to quarantine/"


@item("a database copied without its -wal", "adapters 5 -> 0, files 2 -> 0")
def database_without_wal():
    with serving() as server:
        shutil.copy(server.data / "tandem.db", server.folder / "old.db")
        filled(server)
        before = counted(server)
        server.end(signal.SIGKILL)
        for file in server.data.glob("tandem.db*"):
            file.unlink()
        shutil.copy(server.folder / "old.db", server.data / "tandem.db")
        said = server.refuses_to_start()
        demand(counted(server) == before, counted(server))
        return f"{said}; all {sum(before)} are there"


@item("tandem backup and restore, of a server at work", "there was none")
def backup():
    with serving() as server:
        filled(server)
        text = server.client.ask("one", QUESTIONS[0])
        for command in (["backup", "--data-dir", server.data, server.folder / "copy"],
                        ["restore", "--data-dir", server.folder / "again/data", server.folder / "copy"]):
            done = subprocess.run([TANDEM, *command], capture_output=True, text=True)
            demand(done.returncode == 0, command[0], done.stderr[-300:])
        server.end(signal.SIGKILL)
        server.data = server.folder / "again/data"
        server.begin()
        demand(server.client.ask("one", QUESTIONS[0]) == text and counted(server) == (1, 1), "other answers")
        return "the copy answers the same, 1 file and 1 adapter are there"


def disturbed(name, damage):
    """A job that is killed, has a file damaged, and goes on."""
    settings = {"max_steps": 60, "save_steps": 5, "learning_rate": 1e-3, "batch_size": 2}
    with serving() as server:
        expected = server.client.bytes_of(end_of(server, job_of(server, **settings)))
        job = job_of(server, **settings)
        files = server.data / "jobs" / job
        while not list(files.glob("life-*/state.safetensors")):
            time.sleep(0.005)
        server.end(signal.SIGKILL)
        found = sorted(files.glob(name))
        for file in found:
            content = bytearray(file.read_bytes())
            file.write_bytes(damage(content))
        server.begin()
        state = end_of(server, job)
        demand(state["status"] == "succeeded" and server.client.bytes_of(state) == expected, state["status"], state["error"])
        said = [line.split("WARN ")[1][:110] for line in server.said().splitlines() if "WARN " in line and ("damaged" in line or "again" in line)]
        demand(said, "nothing was noticed")
        return f"noticed ({said[0]}); the job ends with the undisturbed bytes"


def flip(content):
    content[len(content) // 2] ^= 1
    return content


ITEMS += [
    ("one flipped byte in state.safetensors", "unnoticed", lambda: disturbed("life-*/state.safetensors", flip)),
    ("one flipped byte in train.tokens", "unnoticed", lambda: disturbed("train.tokens", flip)),
    ("state.safetensors cut in half", "the job failed for good", lambda: disturbed("life-*/state.safetensors", lambda c: c[: len(c) // 2])),
]


@item("a corrupt SQLite", "\"pool timed out\"")
def corrupt_sqlite():
    with serving() as server:
        filled(server)
        server.end()
        database = server.data / "tandem.db"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray(database.read_bytes())
        content[4096 * 5:4096 * 8] = os.urandom(4096 * 3)
        database.write_bytes(content)
        return server.refuses_to_start()


@item("a job that diverges (lr 1, alpha 1e6, one step)", "published, its requests 500; its first checkpoint stays a model")
def diverges():
    with serving() as server:
        state = end_of(server, job_of(server, learning_rate=1, lora_alpha=1e6, max_steps=1, save_steps=1, batch_size=1))
        models = json.loads(server.call("GET", "/v1/models")[1])["data"]
        if state["status"] == "succeeded":
            status = server.call("POST", "/v1/chat/completions", chat(state["fine_tuned_model"], QUESTIONS[0]))[0]
            demand(status == 200, "published, and answers", status)
            return "succeeded, and its model answers 200"
        demand(len(models) == 1, [model["id"] for model in models])
        return f"{state['status']}: {state['error']['message']}; no model, no checkpoint"


@item("lora_alpha: 1e39", "loaded")
def endless_alpha():
    with serving() as server:
        folder = adapter(server.folder / "one")
        config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 1e39}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        answer = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": str(folder)})
        demand(answer[0] == 400, answer[:2])
        return words(answer)


# 2. Staying up


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


def request(method, path, body=b"", kind=JSON, key=ADMIN, **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"] + ([f"Content-Type: {kind}"] if kind else [])
    lines += [f"Authorization: Bearer {key}"] * bool(key) + [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def raw(server, content, buffer=None):
    one = socket.socket()
    if buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    url = urllib.parse.urlsplit(server.base)
    one.connect((url.hostname, url.port))
    one.sendall(content)
    return one


def heard(server, content):
    """The status line of what comes back."""
    with raw(server, content) as one:
        one.settimeout(10)
        return one.recv(1 << 16).decode(errors="replace")


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

# 3. Who may do what


@item("keys with roles and tenants: make, list, rotate, revoke", "one key opens everything")
def keys():
    with serving() as server:
        infer, train = server.key_of("infer", "a"), server.key_of("train", "b")
        statuses = [server.call("GET", "/v1/files", key=key)[0] for key in (infer, train)]
        demand(statuses == [403, 200], statuses)
        listed = server.client.keys("list")
        demand(infer not in listed[0] + listed[1], "the list shows a key")
        database = b"".join(path.read_bytes() for path in server.data.glob("tandem.db*"))
        demand(infer.encode() not in database, "a key is kept as it is")
        id = next(word for line in (listed[0] + listed[1]).splitlines() if "infer" in line for word in line.split() if word.startswith("key-"))
        rotated = server.client.keys("rotate", id)[0]
        time.sleep(3)
        statuses = [server.call("GET", "/v1/models", key=key)[0] for key in (infer, rotated)]
        server.client.keys("revoke", next(word for line in "".join(server.client.keys("list")).splitlines() if "infer" in line and "revoked" not in line
                                          for word in line.split() if word.startswith("key-")))
        time.sleep(3)
        statuses.append(server.call("GET", "/v1/models", key=rotated)[0])
        return f"infer asks for files: 403; after rotate the old and the new: {statuses[0]}, {statuses[1]}; revoked: {statuses[2]}; the database holds no key"


@item("another tenant's file, job and model", "seen and deleted by every key")
def tenants():
    with serving() as server:
        a, b = server.key_of("train", "a"), server.key_of("train", "b")
        form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\nContent-Disposition: form-data; name="file"; ' \
               b'filename="x.jsonl"\r\n\r\n' + rows("sft") + b"\r\n--b--\r\n"
        file = json.loads(server.call("POST", "/v1/files", form, "multipart/form-data; boundary=b", key=a)[1])["id"]
        job = json.loads(server.call("POST", "/v1/fine_tuning/jobs", {"model": "tandem-demo", "training_file": file, "max_steps": 2}, key=a)[1])["id"]
        model = end_of(server, job)["fine_tuned_model"]
        asked = [("GET", f"/v1/files/{file}"), ("DELETE", f"/v1/files/{file}"), ("GET", f"/v1/files/{file}/content"),
                 ("GET", f"/v1/fine_tuning/jobs/{job}"), ("POST", f"/v1/fine_tuning/jobs/{job}/cancel"), ("DELETE", f"/v1/models/{model}"),
                 ("GET", f"/v1/models/{model}")]
        statuses = [server.call(*one, key=b)[0] for one in asked] + [server.call("POST", "/v1/chat/completions", chat(model, "Hi"), key=b)[0]]
        demand(set(statuses) == {404}, statuses)
        demand(server.call("GET", f"/v1/files/{file}", key=a)[0] == server.call("GET", f"/v1/files/{file}")[0] == 200)
        return f"{len(statuses)} calls of another tenant: all 404; its owner and an admin: 200"


@item("cached_tokens across tenants, and cache_salt", "they tell what another key sent")
def cache():
    with serving() as server:
        def cached(key, **more):
            body = chat("tandem-demo", "A long question that is asked twice. " * 20) | more
            return json.loads(server.call("POST", "/v1/chat/completions", body, key=key)[1])["usage"]["prompt_tokens_details"]["cached_tokens"]

        a, b = server.key_of("infer", "a"), server.key_of("infer", "b")
        counts = cached(a), cached(a), cached(b), cached(a, cache_salt="x"), cached(a, cache_salt="x")
        demand(counts[0] == counts[2] == counts[3] == 0 and counts[1] > 0 and counts[4] > 0, counts)
        return f"the same key twice {counts[0]}, {counts[1]}; another tenant {counts[2]}; the first with a salt {counts[3]}, {counts[4]}"


@item("limits of a key", "none")
def limits():
    with serving() as server:
        key = server.key_of("infer", "a", "--requests-per-minute", "3")
        answers_ = [server.call("POST", "/v1/chat/completions", chat("tandem-demo", "Hi"), key=key) for _ in range(5)]
        demand([answer[0] for answer in answers_] == [200, 200, 200, 429, 429], [answer[0] for answer in answers_])
        tokens = server.key_of("infer", "a", "--tokens-per-minute", "30")
        statuses = [server.call("POST", "/v1/chat/completions", chat("tandem-demo", "Hi"), key=tokens)[0] for _ in range(6)]
        demand(statuses[0] == 200 and statuses[-1] == 429, statuses)
        return f"3 requests a minute: the fourth {words(answers_[3])[:90]} (retry-after {answers_[3][2]['retry-after']}); 30 tokens: {statuses}"


@item("an audit log", "none")
def audit():
    with tempfile.NamedTemporaryFile() as log, serving("--audit-log", log.name) as server:
        filled(server)
        key = server.key_of("infer", "a")
        server.call("GET", "/v1/files", key=key)
        server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"}, key=key)
        lines = [json.loads(line) for line in open(log.name)]
        demand(any("adapter.load" in json.dumps(line) for line in lines) and key not in json.dumps(lines), lines)
        return f"{len(lines)} lines: " + ", ".join(f"{line.get('action', line.get('what'))} {line.get('status', line.get('outcome'))}" for line in lines)


def wrong_start(environment, *options):
    def ask():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([TANDEM, *options, "--data-dir", folder], capture_output=True, text=True, timeout=30, env={**os.environ, **environment})
            demand(done.returncode > 0, "it started")
            return f"exit {done.returncode}: {done.stderr.splitlines()[-1][:220]}"

    return ask


ITEMS += [
    ('TANDEM_API_KEY=""', "an open server", wrong_start({"TANDEM_API_KEY": ""}, "serve", "--port", "0")),
    ('TANDEM_API_KEY=","', "an open server", wrong_start({"TANDEM_API_KEY": ","}, "serve", "--port", "0")),
    ("a backend on 0.0.0.0 without a token", "speaks to anyone", wrong_start({}, "backend", "--listen", "0.0.0.0:0")),
]


@item("adapters outside of --lora-root, by ../, a symlink, and /etc/passwd", "read, and its content echoed")
def outside():
    with serving() as server, tempfile.TemporaryDirectory() as elsewhere:
        secret = adapter(pathlib.Path(elsewhere) / "secret")
        (secret / "adapter_config.json").write_text("SECRET-WORDS")
        (server.folder / "link").symlink_to(secret)
        paths = [str(secret), str(server.folder / "link"), f"{server.folder}/../{secret.parent.name}/secret", "/etc"]
        got = [server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}) for path in paths]
        demand(all(answer[0] in (400, 403, 404) and b"SECRET" not in answer[1] for answer in got), [words(answer) for answer in got])
        inside = adapter(server.folder / "inside")
        (inside / "adapter_config.json").write_text("SECRET-WORDS")
        broken = server.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(inside)})
        demand(broken[0] == 400 and b"SECRET" not in broken[1] and str(server.data).encode() not in broken[1], broken[1])
        return f"{', '.join(str(answer[0]) for answer in got)}: {words(got[0])[4:150]}; a broken config inside: {words(broken)[:120]}"


@item("Host, Origin and content types without a key", "any page commands the server")
def origins():
    with serving(key=None) as server:
        body = json.dumps(chat("tandem-demo", "Hi")).encode()
        host = urllib.parse.urlsplit(server.base).netloc

        def status(kind=JSON, **headers):
            lines = request("POST", "/v1/chat/completions", body, kind, None, **headers)
            return int(heard(server, lines).split()[1])

        got = {"plain": status(), "Origin of elsewhere": status(Origin="http://evil.example"), "its own": status(Origin=f"http://{host}"),
               "text/plain": status("text/plain"), "no type": status(None)}
        got["Host of elsewhere"] = int(heard(server, request("POST", "/v1/chat/completions", body, JSON, None).replace(b"Host: localhost", b"Host: evil.example")).split()[1])
        demand(got["plain"] == got["its own"] == 200 and got["Origin of elsewhere"] == got["Host of elsewhere"] == 403 and got["text/plain"] == 415, got)
        return ", ".join(f"{name} {value}" for name, value in got.items())


def main(wanted):
    failed = 0
    print("| item | before | now | |\n|---|---|---|---|")
    for name, before, do in ITEMS:
        if wanted not in name:
            continue
        try:
            now, mark = do(), "holds"
        except (Wrong, Away, SystemExit, subprocess.TimeoutExpired, StopIteration) as error:
            now, mark, failed = repr(error)[:300], "DOES NOT HOLD", failed + 1
        now = re.sub(r"/tmp/tandem-trust-\w+", "DIR", " ".join(now.split()).replace("|", "/"))
        print(f"| {name} | {before} | {now} | {mark} |", flush=True)
    print(f"\n{failed} of {len(ITEMS)} do not hold" if not wanted else "")
    return not failed


if __name__ == "__main__":
    sys.exit(0 if main(" ".join(sys.argv[1:])) else 1)
