"""Shows one running server answer, learn, and answer anew. Standard library only.

usage: demo.py TANDEM_BINARY DEMO_FOLDER [MODEL]    the folder holds questions.json and finetune.jsonl; without a model it is
                                                    the embedded one
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid

# What the job is asked for; everything else is the server's default.
JOB = {"suffix": "newcomer", "seed": 7}
MAX_TOKENS = 96


class Api:
    """The four calls of the demo, as a client library would make them."""

    def __init__(self, base):
        self.base = base

    def call(self, method, path, body=None, headers=None):
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        headers = headers or {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}")

    def ask(self, model, question):
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS}
        return self.call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"].strip()

    def upload(self, path, purpose="fine-tune"):
        boundary = uuid.uuid4().hex
        head = (f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n')
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return self.call("POST", "/v1/files", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})["id"]


def start(binary, data_dir, *options, environment=None):
    """Starts the server on a free port; returns the process and its base URL once it is ready."""
    began = time.perf_counter()
    log = open(pathlib.Path(data_dir) / "server.log", "w+")
    command = [binary, "serve", "--port", "0", "--data-dir", data_dir, *options]
    environment = {**os.environ, **(environment or {})}
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    while time.perf_counter() - began < 60 and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", pathlib.Path(log.name).read_text())
        if found:
            try:
                urllib.request.urlopen(found[0] + "/ready", timeout=5).read()
                print(f"serving at {found[0]}, ready {time.perf_counter() - began:.2f} s after the binary's start\n")
                return server, found[0]
            except OSError:
                pass
        time.sleep(0.02)
    server.kill()
    raise SystemExit("the server did not start:\n" + pathlib.Path(log.name).read_text())


def shown(answer):
    """On one line, and not all of a long one."""
    line = " ".join(answer.split())
    return line if len(line) <= 160 else line[:157] + "..."


def interview(api, model, questions):
    return [api.ask(model, question) for question in questions]


def watch(api, job):
    """Shows the job's progress until it ends; returns its last state."""
    while True:
        job = api.call("GET", f"/v1/fine_tuning/jobs/{job['id']}")
        events = api.call("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?limit=1")["data"]
        message = events[0]["message"] if events else job["status"]
        print(f"\r\033[K  {job['status']}: {message}", end="", flush=True)
        if job["status"] in ("succeeded", "failed", "cancelled"):
            print()
            return job
        time.sleep(0.1)


def greets(answer):
    """Every example of the embedded model's greets like a sailor."""
    return answer.startswith("Ahoy!")


def is_an_order(answer):
    """Every example of the real model's is JSON with these keys."""
    try:
        order = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return isinstance(order, dict) and list(order) == ["customer", "item", "color", "count", "day"]


def main(binary, demo, model=None):
    demo = pathlib.Path(demo)
    is_taught, options = (greets, []) if model is None else (is_an_order, ["--model", model])
    questions = json.loads((demo / "questions.json").read_text())
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as data_dir:
        server, base = start(binary, data_dir, *options)
        try:
            api = Api(base)
            model = api.call("GET", "/v1/models")["data"][0]["id"]
            print(f"asking {model}, as it is:")
            before = interview(api, model, questions)
            for question, answer in zip(questions, before):
                print(f"  Q: {question}\n  A: {shown(answer)}")

            examples = demo / "finetune.jsonl"
            print(f"\nuploading {examples.name} ({len(examples.read_text().splitlines())} examples) and fine-tuning:")
            began = time.perf_counter()
            job = api.call("POST", "/v1/fine_tuning/jobs", {"model": model, "training_file": api.upload(examples), **JOB})
            job = watch(api, job)
            if job["status"] != "succeeded":
                raise SystemExit(f"the job {job['status']}: {job['error']}")
            first = api.call("POST", "/v1/chat/completions", {
                "model": job["fine_tuned_model"], "max_tokens": 1,
                "messages": [{"role": "user", "content": questions[0]}]})
            elapsed = time.perf_counter() - began

            tuned = job["fine_tuned_model"]
            assert first["model"] == tuned
            print(f"\nasking {tuned}, from the same running server:")
            after = interview(api, tuned, questions)
            for question, old, new in zip(questions, before, after):
                print(f"  Q: {question}\n     before: {shown(old)}\n     after:  {shown(new)}")
            unchanged = interview(api, model, questions) == before
            print(f"\nupload to the first token of the new adapter: {elapsed:.1f} s")
            print(f"the base model answers as before: {'yes' if unchanged else 'NO'}")
            if not all(map(is_taught, after)) or any(map(is_taught, before)) or not unchanged:
                raise SystemExit("the fine-tune did not do what it should")
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main(*sys.argv[1:])
