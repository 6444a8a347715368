"""A server for the smallest inputs of holes (prove_trust.py), what one sends to it, and the list that they are put on."""
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse

from demo import start
from prove import DEMO, QUESTIONS, TANDEM, random_adapter
from prove_ledger import ADMIN, Client, chat, rows

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
