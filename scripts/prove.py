"""Crash, swap and load proofs against the real binary. Standard library only. See scripts/prove."""
import hashlib
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import prove_state
from demo import Api, start, watch

TANDEM = os.environ.get("PROVE_BINARY", "target/release/tandem")
DEMO = pathlib.Path("server/demo")
STREAMS = 8
QUESTIONS = ["Who is the baker?", "Tell me about the village.", "Where does Ada live?", "Who are you?"]


def stream(api, model, question, max_tokens=64):
    """One streamed chat. Returns the text and the adapter digest that answered."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True,
            "max_tokens": max_tokens}
    request = urllib.request.Request(api.base + "/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    text, finish = "", None
    with urllib.request.urlopen(request, timeout=120) as response:
        digest = response.headers.get("x-tandem-adapter")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
    if finish is None:
        raise RuntimeError("the stream was cut")
    return text, digest


class Load:
    """Threads that stream until told to be done, whatever becomes of the server."""

    def __init__(self, api, models):
        self.api, self.models, self.done = api, models, threading.Event()
        for i in range(STREAMS):
            threading.Thread(target=self.run, args=(i,), daemon=True).start()

    def run(self, turn):
        while not self.done.is_set():
            turn += 1
            try:
                stream(self.api, self.models[turn % len(self.models)], QUESTIONS[turn % len(QUESTIONS)])
            except Exception:  # it was killed, as it should
                time.sleep(0.05)


def create_job(api, **options):
    file = api.upload(DEMO / "finetune.jsonl")
    model = api.call("GET", "/v1/models")["data"][0]["id"]
    began = time.perf_counter()
    job = api.call("POST", "/v1/fine_tuning/jobs", {"model": model, "training_file": file, "seed": 7, **options})
    return job, began


MAX_TOKENS = 128


def measured(what, base, model, *load):
    """Streams by our load generator. Returns its report."""
    command = ["target/release/load", "--url", base, "--model", model, "--prompt-tokens", "24", "--warmup", "16",
               "--max-tokens", str(MAX_TOKENS), *map(str, load)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(printed.splitlines()[-1])
    itl, ttft = report["itl_ms"], report["ttft_ms"]
    print(f"{what:34} {report['tokens_per_s']:6.0f} tokens/s   ITL p50 {itl['p50']:.2f} p95 {itl['p95']:.2f} p99 {itl['p99']:.2f} ms"
          f"   TTFT p50 {ttft['p50']:.1f} ms   whole {report['requests']}   errors and cut {report['errors']}", flush=True)
    return report


def streams():
    with tempfile.TemporaryDirectory(prefix="tandem-streams-") as data_dir:
        server, base = start(TANDEM, data_dir)
        try:
            api = Api(base)
            model = api.call("GET", "/v1/models")["data"][0]["id"]
            closed = ["--concurrency", STREAMS, "--requests", 1000]
            reports = [measured(f"{STREAMS} streams", base, model, *closed)]
            rate = 0.4 * reports[0]["tokens_per_s"] / MAX_TOKENS
            opened = ["--rate", f"{rate:.1f}", "--requests", int(8 * rate)]
            reports.append(measured("arrivals at 40 % of that", base, model, *opened))

            job, began = create_job(api, n_epochs=30)
            path = f"/v1/fine_tuning/jobs/{job['id']}"
            while api.call("GET", path)["status"] in ("validating_files", "queued"):
                time.sleep(0.002)
            print(f"POST of the job to running: {time.perf_counter() - began:.3f} s")
            _, alone = paced(api, job, lambda: time.sleep(4))
            for what, load, without in [(f"{STREAMS} streams", closed, 0), ("arrivals at 40 %", opened, 1)]:
                report, steps = paced(api, job, lambda: measured(f"{what}, with the job", base, model, *load))
                ratio = report["itl_ms"]["p99"] / reports[without]["itl_ms"]["p99"]
                print(f"    ITL p99 x {ratio:.2f}; the job makes {steps:.1f} steps/s, x {steps / alone:.2f} of alone")
                reports.append(report)
            held = api.call("GET", path)["status"] == "running" and not any(report["errors"] for report in reports)
            api.call("POST", path + "/cancel")
            return held
        finally:
            server.terminate()
            server.wait(30)


def paced(api, job, do):
    """What `do` returns, and the job's steps per second meanwhile."""
    began, before = time.perf_counter(), steps_done(api, job)
    result = do()
    return result, (steps_done(api, job) - before) / (time.perf_counter() - began)


def trained_bytes(api, data_dir, job):
    """SHA-256 of the finished adapter's tensors, from the store."""
    model = job["fine_tuned_model"]
    _, digest = stream(api, model, QUESTIONS[0], max_tokens=1)
    path = pathlib.Path(data_dir) / "adapters" / digest / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def crash():
    options = {"n_epochs": 2, "save_steps": 5, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory(prefix="tandem-crash-") as undisturbed:
        server, base = start(TANDEM, undisturbed)
        api = Api(base)
        job = watch(api, create_job(api, **options)[0])
        expected = trained_bytes(api, undisturbed, job)
        server.terminate()
        server.wait(30)
    print("undisturbed:", expected)
    with tempfile.TemporaryDirectory(prefix="tandem-crash-") as data_dir:
        server, base = start(TANDEM, data_dir)
        api = Api(base)
        job, _ = create_job(api, **options)
        folder = pathlib.Path(data_dir) / "jobs" / job["id"]
        for kill, moment in enumerate(["between steps", "while a checkpoint is written", "between steps"]):
            model = api.call("GET", "/v1/models")["data"][0]["id"]
            load = Load(api, [model])
            steps = steps_done(api, job)
            while moment == "between steps" and steps_done(api, job) < steps + 12 + 7 * kill:
                time.sleep(0.01)
            partial = []
            while moment != "between steps" and not partial:
                partial = list(folder.glob("life-*/.*.partial"))
            server.send_signal(signal.SIGKILL)
            server.wait()
            load.done.set()
            left = [path.name for path in folder.glob("life-*/.*.partial")]
            print(f"kill {kill + 1}, {moment}: {STREAMS} streams running, half-written files left: {left}")
            server, base = start(TANDEM, data_dir)
            api = Api(base)
        job = watch(api, job)
        got = trained_bytes(api, data_dir, job)
        server.terminate()
        server.wait(30)
    print("killed three times:", got)
    return got == expected


def steps_done(api, job):
    events = api.call("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?limit=20")["data"]
    return max([event["data"].get("step", 0) for event in events if event.get("data")], default=0)


def random_adapter(folder, config, seed):
    """A PEFT folder of random numbers, strong enough to change every answer."""
    rng = random.Random(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rank, tensors = 4 + 4 * (seed % 3), {}
    for layer in range(config["num_hidden_layers"]):
        for name, n, k in [("mlp.gate_proj", inner, hidden), ("mlp.down_proj", hidden, inner)]:
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[path + ".lora_A.weight"] = ([rank, k], [rng.gauss(0, 0.1) for _ in range(rank * k)])
            tensors[path + ".lora_B.weight"] = ([n, rank], [rng.gauss(0, 0.05) for _ in range(n * rank)])
    header, data = {}, b""
    for name, (shape, numbers) in sorted(tensors.items()):
        raw = struct.pack(f"<{len(numbers)}f", *numbers)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["gate_proj", "down_proj"],
        "base_model_name_or_path": "demo", "bias": "none", "task_type": "CAUSAL_LM"}))


def rss_kib(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])


def swap(operations=1000, versions=6, names=4):
    with tempfile.TemporaryDirectory(prefix="tandem-swap-") as data_dir:
        server, base = start(TANDEM, data_dir, "--lora-root", data_dir)
        try:
            api = Api(base)
            config = json.loads((DEMO / "config.json").read_text())
            folders, expected = [], {}
            for version in range(versions):
                folder = pathlib.Path(data_dir) / f"version-{version}"
                random_adapter(folder, config, version)
                folders.append(folder)
                load_adapter(api, f"reference-{version}", folder)
                for question in QUESTIONS:
                    text, digest = stream(api, f"reference-{version}", question, max_tokens=24)
                    expected[digest, question] = text
            assert len(expected) == versions * len(QUESTIONS), "the versions must differ"
            for name in range(names):
                load_adapter(api, f"swapped-{name}", folders[name])
            wrong, failed, answers, done = [], [], [0], threading.Event()

            def ask_on(model, question):
                text, digest = stream(api, model, question, max_tokens=24)
                answers[0] += 1
                if expected.get((digest, question)) != text:
                    wrong.append((model, question, text))

            def worker(i):
                turn = i
                while not done.is_set():
                    turn += 1
                    try:
                        ask_on(f"swapped-{turn % names}", QUESTIONS[turn % len(QUESTIONS)])
                    except Exception as error:  # counted
                        failed.append(repr(error))

            threads = [threading.Thread(target=worker, args=(i,)) for i in range(STREAMS)]
            for thread in threads:
                thread.start()
            rng, rss, n = random.Random(1), {}, 0
            while n < operations:
                load_adapter(api, f"swapped-{rng.randrange(names)}", rng.choice(folders), replace=True)
                n += 1
                if n % 5 == 0:  # a name that comes, answers, and goes while its answer streams
                    passing = f"passing-{n}"
                    load_adapter(api, passing, rng.choice(folders))
                    guest = threading.Thread(target=lambda: ask_on(passing, QUESTIONS[0]))
                    guest.start()
                    guest.join(0.002 * rng.randrange(10))
                    if guest.is_alive():
                        time.sleep(0.05)  # admitted by now
                    plain(api, "/v1/unload_lora_adapter", {"lora_name": passing})
                    guest.join()
                    n += 2
                for mark in (100, operations):
                    if n >= mark and mark not in rss:
                        rss[mark] = rss_kib(server.pid)
            done.set()
            for thread in threads:
                thread.join(60)
            ratio = rss[operations] / rss[100]
            print(f"{n} loads, replacements and unloads; {answers[0]} answers, {len(failed)} failed, {len(wrong)} of a wrong "
                  f"version; RSS {rss[100] / 1024:.1f} MiB after 100, x {ratio:.3f} after {operations}")
            for problem in (failed + wrong)[:5]:
                print("  ", problem)
            return not failed and not wrong and ratio <= 1.02
        finally:
            server.terminate()
            server.wait(30)


def load_adapter(api, name, folder, replace=False):
    plain(api, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), "load_inplace": replace})


def plain(api, path, body):
    request = urllib.request.Request(api.base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


if __name__ == "__main__":
    proofs = {"streams": streams, "crash": crash, "swap": swap,
              "state": lambda: prove_state.state(TANDEM, create_job, trained_bytes)}
    if len(sys.argv) != 2 or sys.argv[1] not in proofs:
        raise SystemExit(f"usage: prove.py {'|'.join(proofs)}")
    held = proofs[sys.argv[1]]()
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
