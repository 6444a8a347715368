"""Clients that use a server, or a fleet of them, while others break it, and a ledger of what was acknowledged, kept outside. At the
end the ledger is held against what is there. Not here: what breaks. Standard library only.

A call without an answer may have been done or not: what it asked for is then allowed, not demanded.
"""
import collections
import contextlib
import hashlib
import http.client
import json
import pathlib
import random
import subprocess
import threading
import time
import urllib.parse

from prove import DEMO, QUESTIONS, TANDEM, random_adapter

ADMIN = "the-admin"
VERSIONS, NAMES = 3, 3
JOB = {"max_steps": 24, "save_steps": 4, "learning_rate": 1e-3, "batch_size": 2, "seed": 7}
# What jobs differ in.
KINDS = {
    "sft": {},
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "packed": {"packing": True, "loraplus_lr_ratio": 4, "neftune_noise_alpha": 5},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "orpo": {"objective": "orpo"},
}
# What a call may come back with while things break: busy, away, full. Anything else that is no success is a fault.
PASSING = {429, 499, 502, 503, 504, 507}
# Jobs and batches that may be under way, so that all end soon after the faults do.
MOST_JOBS, MOST_BATCHES = 4, 2
ENDED = ("succeeded", "failed", "cancelled")


def rows(kind):
    """A training file of its kind: the demo's, whose answers are those that are preferred to their neighbours'."""
    lines = (DEMO / "finetune.jsonl").read_text().splitlines()[:40]
    talks = [json.loads(line)["messages"] for line in lines]

    def row(i):
        *asked, answer = talks[i]
        other = talks[i - 1][-1]
        if KINDS[kind].get("objective") in ("dpo", "orpo"):
            return {"prompt": asked, "chosen": [answer], "rejected": [other]}
        if KINDS[kind].get("objective") == "kto":
            return {"prompt": asked, "completion": [answer if i % 2 else other], "label": bool(i % 2)}
        return {"messages": talks[i]}

    return "".join(json.dumps(row(i)) + "\n" for i in range(len(talks))).encode()


def chat(model, question):
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}


class Away(Exception):
    """No answer: who asked knows nothing."""


class Client:
    """Calls to a server, or to any of several. `adapters` is the folder of those that are published; `database` says to
    `tandem keys` where they are kept."""

    def __init__(self, bases, adapters, database):
        self.bases, self.adapters, self.database = bases, pathlib.Path(adapters), database
        self.refused = threading.local()  # what the last call of a thread was refused with

    def call(self, method, path, body=None, kind="application/json", timeout=30, key=ADMIN):
        """Status, body and headers."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(random.choice(self.bases())).netloc, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {"Authorization": f"Bearer {key}"} | ({"Content-Type": kind} if data else {}))
            response = connection.getresponse()
            answer = response.read()
            self.refused.words = answer[:300] if response.status >= 400 else b""
            return response.status, answer, response.headers
        except (OSError, http.client.HTTPException) as error:
            raise Away(repr(error)) from error
        finally:
            connection.close()

    def until_answered(self, *args, seconds=60):
        """For the end, when all is well again: parts may take a moment to see each other."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Away):
                answer = self.call(*args)
                if answer[0] not in PASSING or time.monotonic() > until:
                    return answer
            if time.monotonic() > until:
                return 0, b"", {}
            time.sleep(0.2)

    def ask(self, model, question):
        """Status, text and adapter of a whole answer."""
        status, answer, headers = self.call("POST", "/v1/chat/completions", chat(model, question))
        if status != 200:
            return status, None, None
        return 200, json.loads(answer)["choices"][0]["message"]["content"], headers.get("x-tandem-adapter")

    def upload(self, content, purpose):
        part = f'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--b\r\nContent-Disposition: form-data; ' \
               f'name="file"; filename="x.jsonl"\r\n\r\n'
        return self.call("POST", "/v1/files", part.encode() + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")

    def train(self, kind):
        """Status and answer of a job that is created, or of its file."""
        status, answer, _ = self.upload(rows(kind), "fine-tune")
        if status != 200:
            return status, answer
        body = {"model": "tandem-demo", "training_file": json.loads(answer)["id"], **JOB, **KINDS[kind]}
        return self.call("POST", "/v1/fine_tuning/jobs", body)[:2]

    def load(self, name, folder):
        return self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": True})[0]

    def keys(self, *words):
        """What `tandem keys` prints, or nothing where it fails."""
        done = subprocess.run([TANDEM, "keys", *words, *self.database], capture_output=True, text=True)
        return (done.stdout.strip(), done.stderr) if done.returncode == 0 else None

    def bytes_of(self, job):
        body = chat(job["fine_tuned_model"], QUESTIONS[0])
        status, _, headers = self.until_answered("POST", "/v1/chat/completions", body)
        if status != 200:
            return f"its model answers {status}"
        file = self.adapters / headers["x-tandem-adapter"] / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def ended(self, path, ends=ENDED, seconds=180):
        until = time.monotonic() + seconds
        while True:
            status, answer, _ = self.until_answered("GET", path)
            state = json.loads(answer) if status == 200 else {"status": f"GET answers {status}", "error": None}
            if state["status"] in ends or time.monotonic() > until:
                return state
            time.sleep(0.2)

    def listed(self, path):
        """The ids of all pages."""
        after = ""
        while True:
            page = json.loads(self.until_answered("GET", path + after)[1])
            yield from (entry["id"] for entry in page["data"])
            if not page.get("has_more"):
                return
            after = f"&after={page['data'][-1]['id']}"


class Ledger:
    def __init__(self):
        self.lock = threading.Lock()
        self.counts, self.wrong = collections.Counter(), []
        self.excused = None  # a fault that is none for a while
        self.files, self.gone = {}, set()  # id -> digest; ids
        self.names = {}  # name -> digests that may answer to it
        self.jobs, self.cancelled, self.may_be_cancelled = {}, set(), set()  # id -> kind; ids
        self.models_gone, self.jobs_without_model = set(), set()  # names; ids of jobs whose model may be gone
        self.batches = {}  # id -> question by custom_id
        self.responses = {}  # id -> text
        self.keys, self.revoked = set(), set()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def fault(self, what, words=b""):
        with self.lock:
            if what != self.excused:
                self.wrong.append(f"{what} {words.decode(errors='replace')}")

    def __str__(self):
        jobs = ", ".join(f"{kind} {n}" for kind, n in sorted(collections.Counter(self.jobs.values()).items()))
        return f"{len(self.files)} files, {len(self.gone)} deleted, {len(self.jobs)} jobs ({jobs}; cancelled {len(self.cancelled)}), " \
               f"{len(self.names)} names, {len(self.models_gone)} models deleted, {len(self.batches)} batches, " \
               f"{len(self.responses)} responses, {len(self.keys)} keys, {len(self.revoked)} revoked"


class Peers:
    """Who uses the server, each a thread. `pause` is what they wait between calls."""

    def __init__(self, client, ledger, expected, folders, seed, pause=0.0):
        self.client, self.ledger, self.expected, self.folders, self.pause = client, ledger, expected, folders, pause
        self.done = threading.Event()
        kinds = [self.asks] * 3 + [self.files, self.jobs, self.swaps, self.batches, self.responses, self.keys]
        self.threads = [threading.Thread(target=self.run, args=(kind, random.Random(f"{seed} {i}")), daemon=True)
                        for i, kind in enumerate(kinds)]
        for thread in self.threads:
            thread.start()

    def run(self, kind, rng):
        while not self.done.wait(self.pause * rng.uniform(0.5, 1.5)):
            try:
                status = kind(rng)
                self.ledger.count(f"{kind.__name__} {status}")
                if status != 200 and status not in PASSING:
                    self.ledger.fault(f"{kind.__name__}: {status}", self.client.refused.words)
            except Away:
                self.ledger.count(f"{kind.__name__} no answer")
                time.sleep(0.2)

    def stop(self):
        self.done.set()
        for thread in self.threads:
            thread.join(90)

    def asks(self, rng):
        question, names = rng.choice(QUESTIONS), ["tandem-demo", *(f"swapped-{i}" for i in range(NAMES))]
        status, text, digest = self.client.ask(rng.choice(names), question)
        if status == 200 and self.expected.get((digest, question)) != text:
            self.ledger.fault(f"a wrong answer of {digest}: {text!r}")
        return status

    def files(self, rng):
        ledger, time_to_go = self.ledger, rng.random() < 0.3
        if time_to_go and ledger.files:
            file = rng.choice(sorted(ledger.files))
            del ledger.files[file]  # from now on it may be gone
            status = self.client.call("DELETE", f"/v1/files/{file}")[0]
            if status == 200:
                ledger.gone.add(file)
            return status
        content = json.dumps({"text": f"{rng.random()} " * rng.randrange(1, 4000)}).encode() + b"\n"
        status, answer, _ = self.client.upload(content, "fine-tune")
        if status == 200:
            ledger.files[json.loads(answer)["id"]] = hashlib.sha256(content).hexdigest()
        return status

    def swaps(self, rng):
        name, (digest, folder) = f"swapped-{rng.randrange(NAMES)}", rng.choice(self.folders)
        self.ledger.names[name].add(digest)
        status = self.client.load(name, folder)
        if status == 200:
            self.ledger.names[name] = {digest}
        time.sleep(0.1)
        return status

    def jobs(self, rng):
        time.sleep(1)
        status, answer, _ = self.client.call("GET", "/v1/fine_tuning/jobs?limit=100")
        if status != 200:
            return status
        ledger, jobs = self.ledger, {job["id"]: job for job in json.loads(answer)["data"]}
        under_way = [job for job in ledger.jobs if jobs.get(job, {}).get("status") not in ENDED and job not in ledger.cancelled]
        with_model = [id for id in ledger.jobs if jobs.get(id, {}).get("status") == "succeeded" and id not in ledger.jobs_without_model]
        if with_model and rng.random() < 0.1:
            id = rng.choice(with_model)
            ledger.jobs_without_model.add(id)
            model = jobs[id]["fine_tuned_model"]
            status = self.client.call("DELETE", f"/v1/models/{model}")[0]
            if status == 200:
                ledger.models_gone.add(model)
            return status
        if len(under_way) >= MOST_JOBS:
            return 200
        kind = rng.choice(list(KINDS))
        status, answer = self.client.train(kind)
        if status != 200:
            return status
        job = json.loads(answer)["id"]
        ledger.jobs[job] = kind
        if rng.random() < 0.1:
            ledger.may_be_cancelled.add(job)
            status, answer, _ = self.client.call("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
            if status == 200 and json.loads(answer)["status"] == "cancelled":
                ledger.cancelled.add(job)
        return status

    def batches(self, rng):
        time.sleep(1)
        status, answer, _ = self.client.call("GET", "/v1/batches?limit=100")
        if status != 200:
            return status
        ended = {batch["id"] for batch in json.loads(answer)["data"] if batch["status"] in ("completed", "failed", "expired")}
        if len(set(self.ledger.batches) - ended) >= MOST_BATCHES:
            return 200
        asked = {f"line-{i}": rng.choice(QUESTIONS) for i in range(rng.randrange(1, 20))}
        lines = [{"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": chat("tandem-demo", question)}
                 for id, question in asked.items()]
        status, answer, _ = self.client.upload("".join(json.dumps(line) + "\n" for line in lines).encode(), "batch")
        if status != 200:
            return status
        body = {"input_file_id": json.loads(answer)["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        status, answer, _ = self.client.call("POST", "/v1/batches", body)
        if status == 200:
            self.ledger.batches[json.loads(answer)["id"]] = asked
        return status

    def responses(self, rng):
        body = {"model": "tandem-demo", "input": rng.choice(QUESTIONS), "max_output_tokens": 16}
        status, answer, _ = self.client.call("POST", "/v1/responses", body)
        if status == 200:
            answer = json.loads(answer)
            if answer["store"]:  # else it says that it could not be kept
                self.ledger.responses[answer["id"]] = answer["output"]
        time.sleep(0.3)
        return status

    def keys(self, rng):
        time.sleep(rng.uniform(1, 3))
        ledger = self.ledger
        if ledger.keys and rng.random() < 0.3:
            id, key = rng.choice(sorted(ledger.keys))
            ledger.keys.remove((id, key))  # from now on it may be gone
            if not self.client.keys("revoke", id):
                return 503
            ledger.revoked.add(key)
            return 200
        made = self.client.keys("create", "--role", "infer", "--tenant", "someone")
        if not made:
            return 503
        row = next(line for line in made[1].splitlines() if line.startswith("key-"))
        ledger.keys.add((row.split("\t")[0], made[0]))
        return 200


def undisturbed(client, folder):
    """Answers by adapter and question, the versions with their digests, and the bytes of each kind of job."""
    expected, folders = {}, []
    for question in QUESTIONS:
        _, text, digest = client.ask("tandem-demo", question)
        expected[digest, question] = text
    config = json.loads((DEMO / "config.json").read_text())
    for version in range(VERSIONS):
        random_adapter(folder / f"version-{version}", config, version)
        status = client.load(f"reference-{version}", folder / f"version-{version}")
        assert status == 200, status
        for question in QUESTIONS:
            _, text, digest = client.ask(f"reference-{version}", question)
            expected[digest, question] = text
        folders.append((digest, folder / f"version-{version}"))
    jobs, made = {}, {}
    for kind in KINDS:
        status, answer = client.train(kind)
        assert status == 200, answer
        jobs[kind] = json.loads(answer)["id"]
    for kind, job in jobs.items():
        job = client.ended(f"/v1/fine_tuning/jobs/{job}")
        assert job["status"] == "succeeded", job
        made[kind] = client.bytes_of(job)
    return expected, folders, made


def first_names(client, ledger, folders):
    for i in range(NAMES):
        assert client.load(f"swapped-{i}", folders[i][1]) == 200
        ledger.names[f"swapped-{i}"] = {folders[i][0]}


def judge(client, ledger, expected, made):
    """What is not as it was acknowledged."""
    yield from ledger.wrong
    for file, digest in ledger.files.items():
        status, content, _ = client.until_answered("GET", f"/v1/files/{file}/content")
        if status != 200 or hashlib.sha256(content).hexdigest() != digest:
            yield f"{file} was uploaded: {status}"
    for file in ledger.gone & set(client.listed("/v1/files?limit=1000")):
        yield f"{file} was deleted and is there"
    for name, digests in ledger.names.items():
        status, _, headers = client.until_answered("POST", "/v1/chat/completions", chat(name, QUESTIONS[0]))
        if headers.get("x-tandem-adapter") not in digests:
            yield f"{name} answers {status} with {headers.get('x-tandem-adapter')}, not one of {digests}"
    for job, kind in ledger.jobs.items():
        yield from judge_job(client, ledger, job, kind, made)
    models = {model["id"] for model in json.loads(client.until_answered("GET", "/v1/models")[1])["data"]}
    for model in ledger.models_gone:
        status, _, _ = client.until_answered("POST", "/v1/chat/completions", chat(model, QUESTIONS[0]))
        if status != 404 or model in models:
            yield f"{model} was deleted: {status}"
    for batch, asked in ledger.batches.items():
        yield from judge_batch(client, batch, asked, expected)
    for id, output in ledger.responses.items():
        status, answer, _ = client.until_answered("GET", f"/v1/responses/{id}")
        if status != 200 or json.loads(answer)["output"] != output:
            yield f"{id} was answered: {status}"
    time.sleep(3)  # keys count everywhere by then
    for keys, wanted in ((ledger.revoked, 401), ({key for _, key in ledger.keys}, 200)):
        for key in keys:
            status = client.call("GET", "/v1/models", key=key)[0]
            if status != wanted:
                yield f"a key opens with {status}, not {wanted}"


def judge_job(client, ledger, job, kind, made):
    path = f"/v1/fine_tuning/jobs/{job}"
    state = client.ended(path)
    if job in ledger.may_be_cancelled and state["status"] == "cancelled":
        return
    if state["status"] != "succeeded" or job in ledger.cancelled:
        yield f"{job} ({kind}) {state['status']}: {state['error']}"
        return
    events = json.loads(client.until_answered("GET", path + "/events?limit=100")[1])["data"]
    ends = sum("successfully completed" in event["message"] for event in events)
    if ends != 1:
        yield f"{job} ({kind}) ended {ends} times"
    if job not in ledger.jobs_without_model and (got := client.bytes_of(state)) != made[kind]:
        yield f"{job} ({kind}) made other bytes: {got}"


def judge_batch(client, batch, asked, expected):
    state = client.ended(f"/v1/batches/{batch}", ("completed", "failed", "expired", "cancelled"))
    if state["status"] != "completed":
        yield f"{batch} {state['status']}: {state.get('errors')}"
        return
    lines = client.until_answered("GET", f"/v1/files/{state['output_file_id']}/content")[1].splitlines()
    texts = [(line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"]) for line in map(json.loads, lines)]
    if sorted(texts) != sorted((id, expected[None, question]) for id, question in asked.items()):
        yield f"{batch} answered otherwise: {len(texts)} lines of {len(asked)}"
