"""Random kills of whoever trains, by every method: each run ends with the bytes of one that nobody killed. Standard library only.

First a server whose jobs, up to four at a time, go through all methods that a server has; then runs of `tandem train` of what it
has alone, also on several ranks, of which any may be the one that is killed. Prints what was hit how often. See scripts/prove.

usage: prove_job_kills.py N SEED [server | runs]      N kills of the server, and N of runs
"""
import collections
import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from demo import Api, start
from methods import COMMON, METHODS, Method, arguments, written
from prove import trained_bytes

TANDEM = os.environ.get("PROVE_BINARY", "target/release/tandem")
# Long enough to be hit more than once.
LONGER = {"max_steps": 30, "save_steps": 5}
UNDER_WAY = 6
JOBS = {name: method for name, method in METHODS.items() if not method.alone} | {
    "a sweep of four": Method({"lora_r": [4, 8], "learning_rate": [1e-3, 2e-3]}),
}
TWO_RANKS = {"data_parallel_size": 2, "gradient_accumulation_steps": 1}
RUNS = {name: method for name, method in METHODS.items() if method.alone} | {
    "LoRA on two ranks": Method(alone=TWO_RANKS),
    "LoRA, FULL_SHARD": Method(alone=TWO_RANKS | {"sharding_strategy": "FULL_SHARD"}),
    "QLoRA nf4, FULL_SHARD": Method(alone=TWO_RANKS | {"sharding_strategy": "FULL_SHARD", "quantization": "nf4"}),
    "full, FULL_SHARD": Method({"learning_rate": 2e-4}, alone=TWO_RANKS | {"sharding_strategy": "FULL_SHARD", "method": "full"}),
    "DPO on two ranks": Method({"objective": "dpo"}, "pairs", TWO_RANKS),
}


def main(kills, seed, *only):
    rng = random.Random(int(seed))
    with tempfile.TemporaryDirectory(prefix="tandem-job-kills-") as place:
        parts = {"server": of_server, "runs": of_runs}
        wrong = [line for name in only or parts for line in parts[name](int(kills), rng, pathlib.Path(place))]
    print("wrong:", "; ".join(wrong) if wrong else "nothing")
    return not wrong


def tell(what, hits, done, wrong):
    print(f"\n| {what} | killed while it trained | ended, with the same bytes |\n|---|---|---|")
    for name in done:
        print(f"| {name} | {hits[name]} | {done[name] - sum(line.startswith(f'{name}:') for line in wrong)} of {done[name]} |")
    print(f"| all | {sum(hits.values())} | |\n", flush=True)
    return wrong


# ---- jobs of a server


@contextlib.contextmanager
def serving(data_dir):
    with contextlib.redirect_stdout(None):
        server, base = start(TANDEM, str(data_dir))
    try:
        yield server, Api(base)
    finally:
        server.kill()
        server.wait()


def of_server(kills, rng, place):
    data_dir = place / "undisturbed"
    data_dir.mkdir()
    with serving(data_dir) as (_, api):
        files = uploaded(api, place)
        jobs = {name: create(api, name, files) for name in JOBS}
        expected = {name: outcome(api, data_dir, job) for name, job in jobs.items()}
    # (The winner of a sweep may be the run of another.)
    alone = [outcome for name, outcome in expected.items() if not name.startswith("a sweep")]
    assert len(set(alone)) == len(alone), "methods differ"

    data_dir = place / "killed"
    data_dir.mkdir()
    hits, jobs, states = collections.Counter(), {}, {}
    began = time.monotonic()
    for kill in range(kills):
        with serving(data_dir) as (server, api):
            files = files if kill else uploaded(api, place)
            states = statuses(api, jobs)
            while sum(state not in ("succeeded", "failed") for state in states.values()) < UNDER_WAY:
                # Whoever was hit least, and is not about to be.
                waiting = collections.Counter(jobs[job] for job, state in states.items() if state != "succeeded")
                name = min(JOBS, key=lambda name: (hits[name] + 4 * waiting[name], rng.random()))
                job = create(api, name, files)
                jobs[job], states[job] = name, "queued"
            time.sleep(rng.uniform(0, 2))
            hits.update(jobs[job] for job, state in statuses(api, jobs).items() if state == "running")
    done, wrong = collections.Counter(), []
    with serving(data_dir) as (_, api):
        for job, name in jobs.items():
            done[name] += 1
            if (got := outcome(api, data_dir, job)) != expected[name]:
                wrong.append(f"{name}: {job}: {got}")
    print(f"{kills} kills of a server in {time.monotonic() - began:.0f} s, {len(jobs)} jobs")
    return tell("a job", hits, done, wrong)


def uploaded(api, place):
    kinds = sorted({method.rows for method in JOBS.values()})
    return {kind: api.upload(written(place, kind)) for kind in kinds}


def create(api, name, files):
    method = JOBS[name]
    body = {"model": "tandem-demo", "training_file": files[method.rows], **COMMON, **LONGER, **method.settings}
    return api.call("POST", "/v1/fine_tuning/jobs", body)["id"]


def statuses(api, jobs):
    return {job: api.call("GET", f"/v1/fine_tuning/jobs/{job}")["status"] for job in jobs}


def outcome(api, data_dir, job):
    """The digest of what it made, or what became of it."""
    path = f"/v1/fine_tuning/jobs/{job}"
    while (state := api.call("GET", path))["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.1)
    return trained_bytes(api, data_dir, state) if state["status"] == "succeeded" else f"{state['status']}: {state['error']}"


# ---- runs of `tandem train`


def of_runs(kills, rng, place):
    hits, done, wrong = collections.Counter(), collections.Counter(), []
    began = time.monotonic()
    for number, (name, method) in enumerate(RUNS.items()):
        once = time.monotonic()
        undisturbed = place / "run"
        assert run(method, undisturbed, place).wait() == 0, name
        expected, takes_s = made(method, undisturbed), time.monotonic() - once
        shutil.rmtree(undisturbed)
        folder = place / "killed-run"
        # Each method its part of N.
        while hits[name] < (number + 1) * kills // len(RUNS) - number * kills // len(RUNS):
            process = run(method, folder, place)
            try:
                ended = process.wait(rng.uniform(0, 1.2 * takes_s)) is not None
            except subprocess.TimeoutExpired:
                ended = False
                os.kill(rng.choice(family(process.pid)), 9)
                # A rank that is lost while ranks meet is noticed after a minute.
                process.wait(120)
                hits[name] += 1
            if ended:
                done[name] += 1
                wrong += judged(name, method, folder, process, expected)
        process = run(method, folder, place)
        process.wait()
        done[name] += 1
        wrong += judged(name, method, folder, process, expected)
        print(f"{name}: {hits[name]} kills; wrong until now: {len(wrong)}", file=sys.stderr, flush=True)
    print(f"{sum(hits.values())} kills of runs in {time.monotonic() - began:.0f} s")
    return tell("a run", hits, done, wrong)


def run(method, folder, place):
    command = [TANDEM, "train", "model=server/demo", f"training_file={written(place, method.rows)}", f"output_dir={folder}", "device=cpu",
               *arguments(method.all_settings | LONGER)]  # fmt: skip
    return subprocess.Popen(command, stdout=open(place / "log", "w"), stderr=subprocess.STDOUT)


def made(method, folder):
    file = "model.safetensors" if method.is_full else "adapter/adapter_model.safetensors"
    return hashlib.sha256((folder / file).read_bytes()).hexdigest()


def judged(name, method, folder, process, expected):
    """What is wrong with a run that ended by itself, which then makes place for the next."""
    if process.returncode:
        return [f"{name}: it ended with {process.returncode}: {(folder.parent / 'log').read_text()[-400:]}"]
    got = made(method, folder)
    shutil.rmtree(folder)
    return [f"{name}: {got}"] if got != expected else []


def family(pid):
    """A process and its children: the ranks of a run."""
    children = " ".join(task.read_text() for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *map(int, children.split())]


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
