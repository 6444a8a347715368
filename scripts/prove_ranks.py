"""Proofs of replicas of several ranks, with the real binary. Standard library only. See scripts/prove.

usage: prove_ranks.py ranks|hosts [MODEL_FOLDER]   (default: the demo model; `hosts` wants root and iproute2)
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

TANDEM = os.environ.get("PROVE_BINARY", "target/release/tandem")
PROMPTS = ["Who is the baker?", "Tell me about the village.", "Once upon a time there was", "The"]
CLOSE = 1e-4
PORT = 29571


class Process:
    """One `tandem serve`; `base` is its URL once it listens (a rank beside rank 0 never does)."""

    def __init__(self, folder, name, *args, before=(), variables=None, listens=True):
        self.log, self.data = pathlib.Path(folder) / f"{name}.log", pathlib.Path(folder) / name
        command = [*before, TANDEM, "serve", "--port", "0", "--data-dir", str(self.data), "--dtype", "float32",
                   "--lora-root", "/", *args]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=open(self.log, "w"), stderr=subprocess.STDOUT,
                                        env={**os.environ, **(variables or {})})
        while listens and not (found := re.search(r"listening on (http://[\d.]+:\d+)", self.log.read_text())):
            if self.process.poll() is not None or time.perf_counter() - self.started > 120:
                raise SystemExit(f"{args} did not start:\n{self.log.read_text()}")
            time.sleep(0.01)
        self.base = found[1] if listens else None

    def end(self, with_signal=signal.SIGTERM):
        self.process.send_signal(with_signal)
        return self.process.wait(60)


def call(base, path, body=None, headers=None, timeout=120):
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, headers or {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def model_of(base):
    return call(base, "/v1/models")["data"][0]["id"]


def answer(base, model, prompt, max_tokens=48):
    """Text and the log-probability of every token of prompt and answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 1,
            "ignore_eos": True}
    choice = call(base, "/v1/completions", body)["choices"][0]
    return choice["text"], [number for number in choice["logprobs"]["token_logprobs"] if number is not None]


def load(base, name, folder):
    body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
    request = urllib.request.Request(base + "/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()


def train(base, name):
    """Ten steps; the losses and the finished model's name."""
    rows = [{"prompt": f"Question {i}: what is {i} plus {i}? ", "completion": f"It is {2 * i}."} for i in range(80)]
    text = "\n".join(map(json.dumps, rows)).encode()
    boundary = uuid.uuid4().hex
    part = (f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}\r\n'
            f'Content-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n').encode()
    form = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    file = call(base, "/v1/files", part + text + f"\r\n--{boundary}--\r\n".encode(), form)["id"]
    job = call(base, "/v1/fine_tuning/jobs", {"model": name, "training_file": file, "seed": 7,
                                              "hyperparameters": {"n_epochs": 1, "batch_size": 8}})
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.05)
        job = call(base, f"/v1/fine_tuning/jobs/{job['id']}")
    if job["status"] != "succeeded":
        raise SystemExit(f"the job {job['status']}: {job.get('error')}")
    events = call(base, f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100")["data"]
    losses = {event["data"]["step"]: event["data"]["train_loss"] for event in events
              if event.get("type") == "metrics" and "train_loss" in (event.get("data") or {})}
    return [losses[step] for step in sorted(losses)], job["fine_tuned_model"]


def children(pid):
    text = " ".join(task.read_text() for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in text.split()]


def resident_mib(pid):
    """Anonymous memory: what is this process's own."""
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) / 1024


class Expected:
    """What one rank says, and what others are held against."""

    def __init__(self, server):
        self.model = model_of(server.base)
        self.answers = [answer(server.base, self.model, prompt) for prompt in PROMPTS]
        self.losses, made = train(server.base, self.model)
        self.tuned = [answer(server.base, made, prompt) for prompt in PROMPTS]
        # The adapter as a PEFT folder, for everybody.
        tensors = server.data.rglob("adapter_model.safetensors")
        # Checkpoints lie beside it; the job's result is the youngest.
        self.adapter = max(tensors, key=lambda file: file.stat().st_mtime_ns).parent

    def compare(self, server, trains=True):
        """Largest differences of base, adapter, training losses and of the adapter that was trained there."""
        load(server.base, "theirs", self.adapter)
        worst = {"base": self.worst(server, self.model, self.answers), "adapter": self.worst(server, "theirs", self.tuned)}
        if trains:
            losses, made = train(server.base, self.model)
            assert len(losses) == len(self.losses) >= 10, (losses, self.losses)
            worst["losses"] = max(abs(a - b) for a, b in zip(losses, self.losses))
            worst["trained"] = self.worst(server, made, self.tuned)
        return worst

    def worst(self, server, model, expected):
        worst = 0.0
        for prompt, (text, numbers) in zip(PROMPTS, expected):
            ours, our_numbers = answer(server.base, model, prompt)
            assert ours == text and len(numbers) == len(our_numbers), f"{ours!r} is not {text!r}"
            worst = max([worst, *(abs(a - b) for a, b in zip(numbers, our_numbers))])
        return worst


def ranks(model):
    # The demo model's 2 KV heads and 6 heads are divided by 2, not by 4.
    sizes = (2, 4) if model else (2,)
    args = ["--model", model] if model else []
    rows, failed = [], []
    with tempfile.TemporaryDirectory(prefix="tandem-ranks-") as folder:
        alone = Process(folder, "alone", *args)
        expected = Expected(alone)
        rows.append(("1 rank", None, [resident_mib(alone.process.pid)], weights(alone)))
        for size in sizes:
            for kind in ("thread", "mp"):
                flags = ["--tensor-parallel-size", str(size), "--distributed-executor-backend", kind]
                server = Process(folder, f"{size}-{kind}", *args, *flags)
                worst = expected.compare(server)
                memory = [resident_mib(pid) for pid in [server.process.pid, *children(server.process.pid)]]
                rows.append((f"{size} {kind}", worst, memory, weights(server)))
                failed += [f"{size} {kind}: {what} differs by {by:.1e}" for what, by in worst.items() if by > CLOSE]
                if kind == "mp":
                    killed(server, expected.model, expected.answers[0])
                server.end()
        alone.end()
    print(f"\n{'ranks':10} {'base':>9} {'adapter':>9} {'losses':>9} {'trained':>9}  weights of each rank   own memory (MiB)")
    for name, worst, memory, held in rows:
        numbers = " ".join(f"{by:9.1e}" for by in worst.values()) if worst else " " * 39
        print(f"{name:10} {numbers}  {held:20}  {', '.join(f'{mib:.0f}' for mib in memory)}")
    if failed:
        raise SystemExit("\n".join(failed))


def weights(server):
    held = re.findall(r"rank=(\d+) .*weight_bytes=(\d+)", re.sub(r"\x1b\[\d+m", "", server.log.read_text()))
    return ", ".join(f"{int(size) / 1e6:.2f} MB" for _, size in sorted(held)) or "all"


def killed(server, model, expected):
    """kill -9 of the last rank under 8 streams: how the streams end, and when the replica answers again."""
    ends, lock, begun = [], threading.Lock(), threading.Barrier(9)

    def stream():
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(server.base + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        end, waits = None, True
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                for line in response:
                    if waits:
                        waits = begun.wait(60) < 0
                    if b'"error"' in line:
                        end = "cut with replica_lost" if b"replica_lost" in line else line.decode()
                    elif b"[DONE]" in line:
                        end = end or "whole"
        except (OSError, urllib.error.HTTPError) as error:
            end = repr(error)
        with lock:
            ends.append((time.perf_counter(), end))

    threads = [threading.Thread(target=stream) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    victim = children(server.process.pid)[-1]
    began = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    while True:
        try:
            text, _ = answer(server.base, model, PROMPTS[0])
            break
        except OSError:
            time.sleep(0.02)
    again = time.perf_counter() - began
    assert text == expected[0], f"{text!r} is not {expected[0]!r}"
    lost = [at - began for at, end in ends if end and end.startswith("cut")]
    kinds = {end: sum(1 for _, other in ends if other == end) for _, end in ends}
    last = f"{max(lost):.2f} s" if lost else "never"
    print(f"{server.log.stem}: a rank killed under 8 streams: {kinds}; last word {last}, next answer after {again:.2f} s")


def shell(*command):
    subprocess.run(command, check=True)


def hosts(model):
    """Two hosts: network namespaces joined by a veth pair, one rank in each, started by the environment."""
    args = ["--model", model] if model else []
    names = ["tandem-a", "tandem-b"]
    subprocess.run(f"ip netns del {names[0]}; ip netns del {names[1]}", shell=True, stderr=subprocess.DEVNULL)
    for name in names:
        shell("ip", "netns", "add", name)
        shell("ip", "-n", name, "link", "set", "lo", "up")
    try:
        shell("ip", "link", "add", "tandem0", "netns", names[0], "type", "veth", "peer", "name", "tandem0", "netns", names[1])
        for i, name in enumerate(names):
            shell("ip", "-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "tandem0")
            shell("ip", "-n", name, "link", "set", "tandem0", "up")
        two_hosts(args, names)
        train_on_two_hosts(names)
    finally:
        for name in names:
            shell("ip", "netns", "del", name)


def two_hosts(args, names):
    with tempfile.TemporaryDirectory(prefix="tandem-hosts-") as folder:
        alone = Process(folder, "alone", *args)
        expected = Expected(alone)
        alone.end()

        def rank(i, life=0):
            variables = {"RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(PORT)}
            before = ["ip", "netns", "exec", names[i]]
            return Process(folder, f"host-{i}-{life}", *args, "--threads", "1", before=before, variables=variables, listens=False)

        other, first = rank(1), rank(0)
        while not (found := re.search(r"listening on (http://[\d.]+:\d+)", first.log.read_text())):
            if first.process.poll() is not None:
                raise SystemExit(first.log.read_text())
            time.sleep(0.05)
        first.base = found[1]
        report = ask_inside(names[0], first, expected)
        print("two hosts against one rank:", ", ".join(f"{what} {by:.1e}" for what, by in report.items()))
        if any(by > CLOSE for by in report.values()):
            raise SystemExit("too far")
        # The other host goes away and comes back.
        began = time.perf_counter()
        other.end(signal.SIGKILL)
        other = rank(1, life=1)
        while True:
            try:
                ask_inside(names[0], first, expected, trains=False)
                break
            except SystemExit:
                time.sleep(0.2)
        print(f"a host's rank killed and started again: the replica answers as before after {time.perf_counter() - began:.1f} s")
        assert first.end() == 0, first.log.read_text()
        assert other.process.wait(60) == 0, other.log.read_text()
        print("rank 0 ended in order, and the other host's rank with it")


def train_on_two_hosts(names):
    """Data parallel, each host with its own copy of the model, against one rank with all of the micro-batches."""
    with tempfile.TemporaryDirectory(prefix="tandem-train-") as folder:
        folder = pathlib.Path(folder)
        models = [shutil.copytree("server/demo", folder / f"model-{i}") for i in range(2)]

        def run(i, out, *more, before=(), variables=None):
            settings = [f"model={models[i]}", "training_file=server/demo/finetune.jsonl", f"output_dir={folder / out}", "max_steps=20",
                        "batch_size=2", "dtype=float32", "device=cpu", *more]
            return subprocess.Popen([*before, TANDEM, "train", *settings], env={**os.environ, **(variables or {})}, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

        def on_both(out):
            """Exit codes and what was said."""
            ranks = []
            for i, name in enumerate(names):
                variables = {"RANK": str(i), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1",
                             "MASTER_PORT": str(PORT), "LOCAL_WORLD_SIZE": "1"}
                ranks.append(run(i, out, before=["ip", "netns", "exec", name], variables=variables))
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
            return [rank.returncode for rank in ranks], said

        def losses(out):
            lines = map(json.loads, (folder / out / "metrics.jsonl").read_text().splitlines())
            return [line["loss"] for line in lines if "loss" in line]

        alone = run(0, "alone", "gradient_accumulation_steps=2")
        assert alone.wait(300) == 0, alone.stdout.read()
        codes, said = on_both("together")
        assert codes == [0, 0], said
        expected, got = losses("alone"), losses("together")
        assert len(expected) == len(got) == 20
        worst = max(abs(a - b) for a, b in zip(expected, got))
        print(f"trained on two hosts against one rank: 20 losses within {worst:.1e}")
        assert worst < CLOSE
        # A host whose model is another's is refused, and the run ends on both.
        weights = models[1] / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-2] ^= 1
        weights.write_bytes(content)
        codes, said = on_both("unlike")
        assert 0 not in codes and "copy of the model is" in said[1], (codes, said)
        print("another model on one host: refused, and the run ends on both")


def ask_inside(namespace, server, expected, trains=True):
    """Its port is reached from inside its host only: a copy of this script asks there."""
    facts = {"base": server.base, "model": expected.model, "answers": expected.answers, "losses": expected.losses,
             "tuned": expected.tuned, "adapter": str(expected.adapter), "trains": trains}
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, "inside"]
    asked = subprocess.run(command, input=json.dumps(facts), capture_output=True, text=True)
    if asked.returncode != 0:
        raise SystemExit(asked.stderr)
    return json.loads(asked.stdout)


def inside():
    facts = json.load(sys.stdin)
    expected = Expected.__new__(Expected)
    expected.model, expected.losses, expected.adapter = facts["model"], facts["losses"], facts["adapter"]
    expected.answers = [tuple(entry) for entry in facts["answers"]]
    expected.tuned = [tuple(entry) for entry in facts["tuned"]]
    server = type("Server", (), {"base": facts["base"]})
    if facts["trains"]:
        print(json.dumps(expected.compare(server)))
    else:
        print(json.dumps({"base": expected.worst(server, expected.model, expected.answers)}))


if __name__ == "__main__":
    mode, rest = sys.argv[1], sys.argv[2:]
    if mode == "inside":
        inside()
    else:
        {"ranks": ranks, "hosts": hosts}[mode](rest[0] if rest else None)
