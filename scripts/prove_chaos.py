"""Everything at once, while things break: answers, jobs, uploads, deletions and swaps of adapters against one server that is killed,
stopped, frozen, run out of disk and descriptors, crowded with idle sockets and has its jobs' states damaged. Afterwards what was
acknowledged is there, and no answer was wrong. Standard library only. See scripts/prove.

usage: prove_chaos.py SECONDS SEED
"""
import collections
import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

from demo import start
from prove import DEMO, QUESTIONS, TANDEM, random_adapter, rss_kib

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
DISK_MIB = 256
# What a call may come back with while things break: busy, away, full. Anything else that is no success is a fault.
PASSING = {429, 499, 502, 503, 504, 507}
# Jobs that may be under way, so that all end soon after the faults do.
MOST_JOBS = 4


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


class Away(Exception):
    """No answer: who asked knows nothing."""


class Server:
    def __init__(self, folder, options):
        self.folder, self.options, self.base = folder, options, None
        self.begin()

    def begin(self):
        with contextlib.redirect_stdout(None):
            self.process, self.base = start(TANDEM, str(self.folder), *self.options)

    def call(self, method, path, body=None, kind="application/json", timeout=30):
        """Status, body and headers."""
        host = urllib.parse.urlsplit(self.base).netloc
        connection = http.client.HTTPConnection(host, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {"Content-Type": kind} if data else {})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        except (OSError, http.client.HTTPException) as error:
            raise Away(repr(error)) from error
        finally:
            connection.close()

    def ask(self, model, question):
        """Text and adapter of a whole answer."""
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
        status, answer, headers = self.call("POST", "/v1/chat/completions", body)
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

    def bytes_of(self, job):
        digest = self.ask(job["fine_tuned_model"], QUESTIONS[0])[2]
        file = self.folder / "adapters" / digest / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()


class Ledger:
    """What the server has acknowledged. What it may have done without a word is allowed, not wanted."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.wrong = []
        self.files, self.gone = {}, set()
        self.names = {}  # name -> digests that may answer to it
        self.jobs = {}  # id -> kind

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def fault(self, what):
        with self.lock:
            self.wrong.append(what)


class Peers:
    """Who uses the server, each a thread."""

    def __init__(self, server, ledger, expected, folders, seed):
        self.server, self.ledger, self.expected, self.folders = server, ledger, expected, folders
        self.done = threading.Event()
        kinds = [self.asks] * 4 + [self.files, self.jobs] + [self.swaps]
        self.threads = [threading.Thread(target=self.run, args=(kind, random.Random(f"{seed} {i}")), daemon=True)
                        for i, kind in enumerate(kinds)]
        for thread in self.threads:
            thread.start()

    def run(self, kind, rng):
        while not self.done.is_set():
            try:
                status = kind(rng)
                self.ledger.count(f"{kind.__name__} {status}")
                if status != 200 and status not in PASSING:
                    self.ledger.fault(f"{kind.__name__}: {status}")
            except Away:
                self.ledger.count(f"{kind.__name__} no answer")
                time.sleep(0.2)

    def asks(self, rng):
        question, names = rng.choice(QUESTIONS), ["tandem-demo", *(f"swapped-{i}" for i in range(NAMES))]
        status, text, digest = self.server.ask(rng.choice(names), question)
        if status == 200 and self.expected.get((digest, question)) != text:
            self.ledger.fault(f"a wrong answer of {digest}: {text!r}")
        return status

    def files(self, rng):
        ledger, time_to_go = self.ledger, rng.random() < 0.4
        if time_to_go and ledger.files:
            file = rng.choice(sorted(ledger.files))
            del ledger.files[file]  # from now on it may be gone
            status = self.server.call("DELETE", f"/v1/files/{file}")[0]
            if status == 200:
                ledger.gone.add(file)
            return status
        content = json.dumps({"text": f"{rng.random()} " * rng.randrange(1, 4000)}).encode() + b"\n"
        status, answer, _ = self.server.upload(content, "fine-tune")
        if status == 200:
            ledger.files[json.loads(answer)["id"]] = hashlib.sha256(content).hexdigest()
        return status

    def swaps(self, rng):
        name, (digest, folder) = f"swapped-{rng.randrange(NAMES)}", rng.choice(self.folders)
        self.ledger.names[name].add(digest)
        status = self.server.load(name, folder)
        if status == 200:
            self.ledger.names[name] = {digest}
        time.sleep(0.1)
        return status

    def jobs(self, rng):
        time.sleep(1)
        status, answer, _ = self.server.call("GET", "/v1/fine_tuning/jobs?limit=100")
        if status != 200:
            return status
        ended = {job["id"] for job in json.loads(answer)["data"] if job["status"] in ("succeeded", "failed", "cancelled")}
        if len(set(self.ledger.jobs) - ended) >= MOST_JOBS:
            return 200
        kind = rng.choice(list(KINDS))
        status, answer = self.server.train(kind)
        if status == 200:
            self.ledger.jobs[json.loads(answer)["id"]] = kind
        return status


class Faults:
    """What breaks, each for a moment."""

    def __init__(self, server, disk, rng):
        self.server, self.disk, self.rng = server, disk, rng

    def kill(self):
        self.server.process.kill()
        self.server.process.wait()
        self.server.begin()

    def stop(self):
        self.server.process.terminate()
        self.server.process.wait(60)
        self.server.begin()

    def freeze(self):
        self.server.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.5, 3))
        self.server.process.send_signal(signal.SIGCONT)

    def fill_the_disk(self):
        if not self.disk:
            return
        filler = self.server.folder / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        time.sleep(self.rng.uniform(0.5, 3))
        filler.unlink()

    def idle_sockets(self):
        host, port = urllib.parse.urlsplit(self.server.base).netloc.split(":")
        sockets = []
        with contextlib.suppress(OSError):
            for i in range(400):
                sockets.append(socket.create_connection((host, int(port)), timeout=2))
                if i % 2:
                    sockets[-1].send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        time.sleep(self.rng.uniform(0.5, 3))
        for open_socket in sockets:
            open_socket.close()

    def few_descriptors(self):
        pid = self.server.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 2, hard))
        time.sleep(self.rng.uniform(0.5, 3))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))

    def damage_a_state(self):
        """And have it read."""
        self.server.process.kill()
        self.server.process.wait()
        states = sorted(self.server.folder.glob("jobs/*/life-*/state.safetensors"))
        if states:
            state = self.rng.choice(states)
            content = bytearray(state.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            state.write_bytes(content)
        self.server.begin()

    ALL = (kill, stop, freeze, fill_the_disk, idle_sockets, few_descriptors, damage_a_state)


@contextlib.contextmanager
def small_disk():
    """A folder, and whether it is a disk of its own that may be filled."""
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", folder]
        is_own = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        if not is_own:
            print("not root, or nothing may be mounted: the disk is not filled")
        try:
            yield pathlib.Path(folder), is_own
        finally:
            if is_own:
                subprocess.run(["umount", "-l", folder], check=True)


def undisturbed(server, folder):
    """Answers by adapter and question, the versions with their digests, and the bytes of each job."""
    expected, folders = {}, []
    for question in QUESTIONS:
        _, text, digest = server.ask("tandem-demo", question)
        expected[digest, question] = text
    config = json.loads((DEMO / "config.json").read_text())
    for version in range(VERSIONS):
        random_adapter(folder / f"version-{version}", config, version)
        assert server.load(f"reference-{version}", folder / f"version-{version}") == 200
        for question in QUESTIONS:
            _, text, digest = server.ask(f"reference-{version}", question)
            expected[digest, question] = text
        folders.append((digest, folder / f"version-{version}"))
    made = {}
    for kind in KINDS:
        status, answer = server.train(kind)
        assert status == 200, answer
        job = ended(server, json.loads(answer)["id"])
        assert job["status"] == "succeeded", job
        made[kind] = server.bytes_of(job)
    return expected, folders, made


def ended(server, job, seconds=180):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job_now = json.loads(server.call("GET", f"/v1/fine_tuning/jobs/{job}")[1])
        if job_now["status"] in ("succeeded", "failed", "cancelled"):
            return job_now
        time.sleep(0.1)
    return job_now


def listed(server, path):
    """The ids of all pages."""
    after = ""
    while True:
        page = json.loads(server.call("GET", path + after)[1])
        yield from (entry["id"] for entry in page["data"])
        if not page.get("has_more"):
            return
        after = f"&after={page['data'][-1]['id']}"


def judge(server, ledger, made):
    """What is not as it was acknowledged."""
    for file, digest in ledger.files.items():
        status, content, _ = server.call("GET", f"/v1/files/{file}/content")
        if status != 200 or hashlib.sha256(content).hexdigest() != digest:
            yield f"{file} was uploaded: {status}"
    for file in ledger.gone & set(listed(server, "/v1/files?limit=1000")):
        yield f"{file} was deleted and is there"
    for name, digests in ledger.names.items():
        status, _, digest = server.ask(name, QUESTIONS[0])
        if digest not in digests:
            yield f"{name} answers {status} with {digest}, not one of {digests}"
    for job, kind in ledger.jobs.items():
        job = ended(server, job)
        if job["status"] != "succeeded":
            yield f"{job['id']} ({kind}) {job['status']}: {job['error']}"
        elif server.bytes_of(job) != made[kind]:
            yield f"{job['id']} ({kind}) made other bytes"


def main(seconds, seed):
    rng, ledger, broke = random.Random(seed), Ledger(), collections.Counter()
    with small_disk() as (root, is_own_disk), tempfile.TemporaryDirectory() as outside:
        data = root / "data"
        data.mkdir()
        server = Server(data, ["--lora-root", outside, "--max-connections", "2000", "--max-connections-per-address", "2000"])
        try:
            expected, folders, made = undisturbed(server, pathlib.Path(outside))
            for i in range(NAMES):
                assert server.load(f"swapped-{i}", folders[i][1]) == 200
                ledger.names[f"swapped-{i}"] = {folders[i][0]}
            calm = rss_kib(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/fd"))
            peers, faults = Peers(server, ledger, expected, folders, seed), Faults(server, is_own_disk, rng)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(rng.uniform(0.5, 4))
                fault = rng.choice(Faults.ALL)
                fault(faults)
                broke[fault.__name__] += 1
            peers.done.set()
            for thread in peers.threads:
                thread.join(60)
            problems = ledger.wrong + list(judge(server, ledger, made))
            after = rss_kib(server.process.pid), len(os.listdir(f"/proc/{server.process.pid}/fd"))
        finally:
            server.process.kill()
            server.process.wait()
    print("broke:", ", ".join(f"{name} {n}" for name, n in sorted(broke.items())))
    print("heard:", ", ".join(f"{what} {n}" for what, n in sorted(ledger.counts.items())))
    jobs = ", ".join(f"{kind} {n}" for kind, n in sorted(collections.Counter(ledger.jobs.values()).items()))
    print(f"kept: {len(ledger.files)} files, {len(ledger.gone)} deleted, {len(ledger.jobs)} jobs ({jobs}), {len(ledger.names)} names; "
          f"{calm[0] >> 10} MiB and {calm[1]} descriptors before, {after[0] >> 10} and {after[1]} at the end")
    if after[1] > calm[1] + 50 or after[0] > 1.5 * calm[0]:
        problems.append("memory or descriptors grew")
    for problem in problems[:20]:
        print("  ", problem)
    return not problems and len(ledger.jobs) > 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    held = main(float(sys.argv[1]), int(sys.argv[2]))
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
