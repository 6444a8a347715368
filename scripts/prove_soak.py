"""A long light load of everything a server does, and a look at the process every half minute: memory, descriptors and threads must
stay flat, the waits of streams too, and no call may come back with what it should not. Standard library only. See scripts/prove.

usage: prove_soak.py SECONDS [SEED] [--rate R] [--every S] [--binary FILE] [--report FILE]
"""
import argparse
import collections
import hashlib
import http.client
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse

from demo import start
from prove import DEMO, QUESTIONS, TANDEM, random_adapter
from prove_ledger import KINDS, rows
from tinker_wire import forward_backward

ADMIN = "soak-admin"
TEMPLATE = pathlib.Path("tests/clients/tools.jinja")
# Small caches, so that they are full long before the second half.
OPTIONS = ["--threads", "1", "--kv-cache-memory-bytes", "64M", "--response-store-bytes", "4M", "--chat-template", str(TEMPLATE),
           "--tool-call-parser", "hermes"]
SCHEMA = {"type": "object", "properties": {"who": {"enum": ["Ada", "Ben"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["who", "age"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
JOB = {"max_steps": 12, "save_steps": 4, "learning_rate": 1e-3, "batch_size": 2, "seed": 7}
# What may be added between the middle and the end, by the straight line through the second half's samples.
BOUNDS = {"anonymous MiB": 8.0, "descriptors": 8.0, "threads": 4.0}


class Wrong(Exception):
    """Not what should have come back."""


class Peer:
    """One client with its key. What comes back is checked at once."""

    def __init__(self, base, key):
        self.host, self.key = urllib.parse.urlsplit(base).netloc, key

    def open(self, method, path, body=None, kind="application/json"):
        connection = http.client.HTTPConnection(self.host, timeout=60)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Authorization": f"Bearer {self.key}"} | ({"Content-Type": kind} if data else {})
        connection.request(method, path, data, headers)
        return connection, connection.getresponse()

    def raw(self, method, path, body=None, kind="application/json", status=200):
        connection, response = self.open(method, path, body, kind)
        try:
            answer = response.read()
            if response.status != status:
                raise Wrong(f"{method} {path.split('?')[0]}: {response.status}, not {status}: {answer[:200]}")
            return answer, response.headers
        finally:
            connection.close()

    def call(self, *args, **more):
        return json.loads(self.raw(*args, **more)[0])

    def upload(self, content, purpose="fine-tune"):
        part = f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b\r\nContent-Disposition: form-data; ' \
               f'name="file"; filename="x.jsonl"\r\n\r\n'
        body = part.encode() + content + b"\r\n--b--\r\n"
        return self.call("POST", "/v1/files", body, "multipart/form-data; boundary=b")["id"]

    def until(self, path, ends):
        while (state := self.call("GET", path))["status"] not in ends:
            time.sleep(0.5)
        return state


def chat(model, question, **more):
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24} | more


class Soak:
    """What is asked, by whom, and what came of it."""

    def __init__(self, base, data, adapters, binary, seed):
        self.base, self.data, self.adapters, self.binary = base, data, adapters, binary
        self.admin = Peer(base, ADMIN)
        self.train = Peer(base, self.create_key("train")[1])
        time.sleep(3)  # by then the server has seen it
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.counts, self.wrong = collections.Counter(), []
        self.firsts, self.gaps = [], []
        self.made = {}  # kind of job -> bytes of the first
        self.model = self.admin.call("GET", "/v1/models")["data"][0]["id"]
        body = {"model": self.model, "input": QUESTIONS}
        self.embedded = self.train.call("POST", "/v1/embeddings", body)["data"]
        self.answers = {question: self.whole(self.model, question) for question in QUESTIONS}

    def whole(self, model, question):
        answer = self.train.call("POST", "/v1/chat/completions", chat(model, question, temperature=0))
        return answer["choices"][0]["message"]["content"]

    def create_key(self, role):
        command = [self.binary, "keys", "create", "--tenant", "soak", "--role", role, "--data-dir", self.data]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = next(line for line in done.stderr.splitlines() if line.startswith("key-"))
        return row.split("\t")[0], done.stdout.strip()

    def counted(self, do, rng):
        try:
            do(rng)
            what = do.__name__
        except Exception as error:
            what = f"{do.__name__}: wrong"
            kind = repr(error) if isinstance(error, (Wrong, OSError)) else traceback.format_exc()
            with self.lock:
                self.wrong.append(f"{time.strftime('%H:%M:%S')} {do.__name__}: {kind}")
        with self.lock:
            self.counts[what] += 1

    # Short calls, so many a second.

    def stream(self, rng, leave_after=None, **more):
        """Text of a stream, whose waits are kept."""
        question = more.pop("question", rng.choice(QUESTIONS))
        began = last = time.perf_counter()
        connection, response = self.train.open("POST", "/v1/chat/completions", chat(self.model, question, stream=True, **more))
        pieces, finish, gaps, texts = 0, None, [], collections.defaultdict(str)
        try:
            if response.status != 200:
                raise Wrong(f"a stream: {response.status} {response.read()[:200]}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise Wrong(f"in a stream: {chunk['error']}")
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
                    if not (content := choice["delta"].get("content")):
                        continue
                    now = time.perf_counter()
                    gaps.append(now - last)
                    last, pieces = now, pieces + 1
                    texts[choice["index"]] += content
                if leave_after and pieces >= leave_after:
                    return None
            if finish is None:
                raise Wrong("a stream was cut")
        finally:
            connection.close()
        if gaps:
            with self.lock:
                self.firsts.append(gaps[0])
                self.gaps.extend(gaps[1:])
        return texts

    def short_stream(self, rng):
        question = rng.choice(QUESTIONS)
        if (text := self.stream(rng, question=question, temperature=0)[0]) != self.answers[question]:
            raise Wrong(f"{question}: {text!r}")

    def long_stream(self, rng):
        self.stream(rng, max_tokens=200, ignore_eos=True, seed=rng.randrange(1 << 30), question=f"{rng.random()} " * 20)

    def several_choices(self, rng):
        self.stream(rng, n=3, temperature=1, seed=rng.randrange(1 << 30))

    def aborted(self, rng):
        self.stream(rng, leave_after=rng.randrange(1, 8), max_tokens=400, ignore_eos=True)

    def by_schema(self, rng):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = chat(self.model, rng.choice(QUESTIONS), response_format=form, seed=rng.randrange(1 << 30), max_tokens=120)
        choice = self.train.call("POST", "/v1/chat/completions", body)["choices"][0]
        if choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) != {"who", "age"}:
            raise Wrong(choice)

    def by_tool(self, rng):
        body = chat(self.model, rng.choice(QUESTIONS), tools=[TOOL], tool_choice="required", seed=rng.randrange(1 << 30), max_tokens=120)
        choice = self.train.call("POST", "/v1/chat/completions", body)["choices"][0]
        if choice["finish_reason"] == "tool_calls" and "who" not in json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]):
            raise Wrong(choice)

    def embeddings(self, _):
        if self.train.call("POST", "/v1/embeddings", {"model": self.model, "input": QUESTIONS})["data"] != self.embedded:
            raise Wrong("other vectors")

    def responses(self, rng):
        body = {"model": self.model, "input": rng.choice(QUESTIONS), "max_output_tokens": 16}
        first = self.train.call("POST", "/v1/responses", body)["id"]
        self.train.call("POST", "/v1/responses", body | {"previous_response_id": first})
        if rng.random() < 0.5:
            self.train.call("DELETE", f"/v1/responses/{first}")
            self.train.raw("GET", f"/v1/responses/{first}", status=404)

    def messages(self, rng):
        body = {"model": self.model, "max_tokens": 16, "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}]}
        self.train.call("POST", "/v1/messages", body)

    def files(self, rng):
        content = json.dumps({"text": f"{rng.random()} " * rng.randrange(1, 20_000)}).encode() + b"\n"
        file = self.train.upload(content)
        if self.train.raw("GET", f"/v1/files/{file}/content")[0] != content:
            raise Wrong("other bytes")
        self.train.call("DELETE", f"/v1/files/{file}")
        self.train.raw("GET", f"/v1/files/{file}", status=404)

    def refused(self, rng):
        self.train.raw("POST", "/v1/chat/completions", chat(self.model, "x", temperature=9), status=400)
        self.train.raw("POST", "/v1/chat/completions", chat("nobody", "x"), status=404)
        self.train.raw("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, status=403)
        Peer(self.base, f"{rng.random()}").raw("GET", "/v1/models", status=401)

    # Longer ones, one after the other, each kind by a thread of its own.

    def job(self, rng):
        kind = rng.choice(list(KINDS))
        file = self.train.upload(rows(kind))
        job = self.train.call("POST", "/v1/fine_tuning/jobs", {"model": self.model, "training_file": file, **JOB, **KINDS[kind]})
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        if rng.random() < 0.1:
            self.train.call("POST", path + "/cancel")
        job = self.train.until(path, ("succeeded", "failed", "cancelled"))
        if job["status"] == "failed":
            raise Wrong(f"{kind}: {job['error']}")
        if job["status"] == "succeeded":
            model = job["fine_tuned_model"]
            _, headers = self.train.raw("POST", "/v1/chat/completions", chat(model, QUESTIONS[0]))
            tensors = pathlib.Path(self.data) / "adapters" / headers["x-tandem-adapter"] / "adapter_model.safetensors"
            digest = hashlib.sha256(tensors.read_bytes()).hexdigest()
            if self.made.setdefault(kind, digest) != digest:
                raise Wrong(f"{kind}: other bytes than before")
            self.train.call("DELETE", f"/v1/models/{model}")
            self.train.raw("POST", "/v1/chat/completions", chat(model, QUESTIONS[0]), status=404)
            left = [entry["id"] for entry in self.train.call("GET", "/v1/models")["data"] if entry["id"].startswith(model)]
            if left:
                raise Wrong(f"{left} of a deleted model")
        self.train.call("DELETE", f"/v1/files/{file}")
        time.sleep(rng.uniform(0, 8))

    def adapter(self, rng):
        name = f"guest-{rng.randrange(4)}"
        self.admin.raw("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": rng.choice(self.adapters), "load_inplace": True})
        for question in QUESTIONS:
            self.admin.call("POST", "/v1/chat/completions", chat(name, question))
        self.admin.raw("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        time.sleep(rng.uniform(0, 4))

    def batch(self, rng):
        lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": chat(self.model, rng.choice(QUESTIONS))}
                 for i in range(rng.randrange(1, 30))]
        file = self.train.upload("".join(json.dumps(line) + "\n" for line in lines).encode(), "batch")
        made = self.train.call("POST", "/v1/batches", {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"})
        made = self.train.until(f"/v1/batches/{made['id']}", ("completed", "failed", "expired", "cancelled"))
        if made["request_counts"] != {"total": len(lines), "completed": len(lines), "failed": 0}:
            raise Wrong(made)
        for old in (file, made["output_file_id"]):
            self.train.call("DELETE", f"/v1/files/{old}")
        time.sleep(rng.uniform(5, 20))

    def upload_in_parts(self, rng):
        parts = [rng.randbytes(rng.randrange(1, 1 << 18)) for _ in range(3)]
        body = {"filename": "x", "purpose": "assistants", "bytes": sum(map(len, parts)), "mime_type": "text/plain"}
        upload = self.train.call("POST", "/v1/uploads", body)["id"]
        ids = []
        for part in parts:
            form = b'--b\r\nContent-Disposition: form-data; name="data"; filename="x"\r\n\r\n' + part + b"\r\n--b--\r\n"
            ids.append(self.train.call("POST", f"/v1/uploads/{upload}/parts", form, "multipart/form-data; boundary=b")["id"])
        if rng.random() < 0.3:
            self.train.call("POST", f"/v1/uploads/{upload}/cancel")
        else:
            file = self.train.call("POST", f"/v1/uploads/{upload}/complete", {"part_ids": ids})["file"]["id"]
            if self.train.raw("GET", f"/v1/files/{file}/content")[0] != b"".join(parts):
                raise Wrong("other bytes")
            self.train.call("DELETE", f"/v1/files/{file}")
        time.sleep(rng.uniform(2, 10))

    def key(self, rng):
        id, key = self.create_key(rng.choice(["infer", "train"]))
        time.sleep(3)
        Peer(self.base, key).call("GET", "/v1/models")
        subprocess.run([self.binary, "keys", "revoke", id, "--data-dir", self.data], capture_output=True, check=True)
        time.sleep(3)
        Peer(self.base, key).raw("GET", "/v1/models", status=401)
        time.sleep(rng.uniform(10, 40))

    def tinker(self, rng):
        peer = self.train

        def come_of(future):
            body = {"request_id": future["request_id"]}
            while b"try_again" in (answer := peer.raw("POST", "/api/v1/retrieve_future", body)[0]):
                time.sleep(0.2)
            if b'"category"' in answer:
                raise Wrong(answer[:300])
            return answer

        session = peer.call("POST", "/api/v1/create_session", {"tags": []})["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": self.model, "lora_config": {"rank": 4, "seed": 1}}
        model = json.loads(come_of(peer.call("POST", "/api/v1/create_model", body)))["model_id"]
        for step in range(3):
            tokens = [rng.randrange(10, 200) for _ in range(rng.randrange(8, 60))]
            message = forward_backward(model, 2 * step + 1, tokens)
            come_of(peer.call("POST", "/api/v1/forward_backward", message, "application/x-protobuf"))
            come_of(peer.call("POST", "/api/v1/optim_step", {"model_id": model, "seq_id": 2 * step + 2, "adam_params": {"learning_rate": 1e-3}}))
        body = {"model_id": model, "seq_id": 7, "sampling_session_seq_id": 0}
        sampler = json.loads(come_of(peer.call("POST", "/api/v1/save_weights_for_sampler", body)))["sampling_session_id"]
        come_of(peer.call("POST", "/api/v1/asample", {
            "sampling_session_id": sampler, "seq_id": 0, "num_samples": 2, "sampling_params": {"max_tokens": 16},
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]}}))
        peer.raw("POST", f"/api/v1/sessions/{session}/finish", {"reason": {"type": "success"}}, status=204)
        time.sleep(rng.uniform(5, 20))

    SHORT = [short_stream] * 4 + [several_choices] * 2 + [long_stream, aborted, aborted, by_schema, by_tool, embeddings, responses,
                                                          messages, files, refused]
    LONG = [job, adapter, batch, upload_in_parts, key, tinker]


def size_kib(folder):
    return sum(path.lstat().st_blocks for path in pathlib.Path(folder).rglob("*") if path.is_file()) // 2


def sample(pid, soak, began):
    """A row of the table. What the clients measured since the last one is taken."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    spent = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    data = pathlib.Path(soak.data)
    with soak.lock:
        firsts, gaps, soak.firsts, soak.gaps = sorted(soak.firsts), sorted(soak.gaps), [], []
        calls, wrong = sum(soak.counts.values()), len(soak.wrong)

    def ms(times, q):
        return round(1000 * times[min(int(q * len(times)), len(times) - 1)], 2) if times else None

    return {"s": round(time.monotonic() - began), "calls": calls, "wrong": wrong, "CPU s": (int(spent[11]) + int(spent[12])) / 100,
            "RSS MiB": round(int(status["VmRSS"].split()[0]) / 1024, 1), "anonymous MiB": round(int(status["RssAnon"].split()[0]) / 1024, 1),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"]),
            "TTFT p50": ms(firsts, 0.5), "TTFT p99": ms(firsts, 0.99), "ITL p50": ms(gaps, 0.5), "ITL p99": ms(gaps, 0.99),
            "data KiB": size_kib(data), "database KiB": sum(path.stat().st_size for path in data.glob("tandem.db*")) // 1024}


def added(samples, column):
    """What the straight line through the second half adds from its begin to its end."""
    half = samples[len(samples) // 2:]
    times, values = [row["s"] for row in half], [row[column] for row in half]
    return statistics.linear_regression(times, values).slope * (times[-1] - times[0])


def main(options):
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as root:
        data = pathlib.Path(root) / "data"
        data.mkdir()
        config, folders = json.loads((DEMO / "config.json").read_text()), []
        for version in range(3):
            random_adapter(pathlib.Path(root) / f"adapter-{version}", config, version)
            folders.append(f"{root}/adapter-{version}")
        server, base = start(options.binary, str(data), *OPTIONS, "--api-key", ADMIN, "--lora-root", root)
        try:
            soak = Soak(base, str(data), folders, options.binary, options.seed)
            samples = ask(soak, server, options)
        finally:
            server.terminate()
            code = server.wait(60)
        return report(options, soak, samples, code)


def ask(soak, server, options):
    began, done, samples = time.monotonic(), threading.Event(), []

    def again_and_again(do, rng):
        while not done.is_set():
            soak.counted(do, rng)
            done.wait(1)

    def arrivals(rng):
        while not done.wait(rng.expovariate(options.rate)):
            threading.Thread(target=soak.counted, args=(getattr(soak, rng.choice(Soak.SHORT).__name__), random.Random(rng.random()))).start()

    threads = [threading.Thread(target=again_and_again, args=(getattr(soak, do.__name__), random.Random(f"{options.seed} {do.__name__}")))
               for do in Soak.LONG]
    threads.append(threading.Thread(target=arrivals, args=(soak.rng,)))
    for thread in threads:
        thread.start()
    try:
        while time.monotonic() < began + options.seconds and server.poll() is None:
            time.sleep(options.every)
            samples.append(sample(server.pid, soak, began))
            print(json.dumps(samples[-1]), flush=True)
            for wrong in soak.wrong[samples[-2]["wrong"] if len(samples) > 1 else 0:][:5]:
                print("  ", wrong, flush=True)
    finally:
        done.set()
        for thread in threads:
            thread.join(90)
    return samples


def report(options, soak, samples, code):
    problems = [f"the server ended with {code}"] if code else []
    growth = {column: added(samples, column) for column in BOUNDS}
    problems += [f"{column}: {more:+.1f} in the second half" for column, more in growth.items() if more > BOUNDS[column]]
    problems += soak.wrong
    lines = ["calls: " + ", ".join(f"{what} {n}" for what, n in sorted(soak.counts.items())),
             "second half, by the line through it: " + ", ".join(f"{column} {more:+.2f} (bound {BOUNDS[column]})" for column, more in growth.items())]
    columns = list(samples[0])
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    step = max(len(samples) // 40, 1)
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in samples[::step]]
    print("\n".join(lines))
    if options.report:
        pathlib.Path(options.report).write_text("\n".join(lines + problems[:50]) + "\n")
    for problem in problems[:20]:
        print("  ", problem)
    return not problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int, nargs="?", default=1)
    parser.add_argument("--rate", type=float, default=4, help="short calls a second")
    parser.add_argument("--every", type=float, default=30, help="seconds between two looks")
    parser.add_argument("--binary", default=TANDEM)
    parser.add_argument("--report")
    held = main(parser.parse_args())
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
