#!/usr/bin/env python3
"""Two training clients and a fine-tune job beside four streams: the same digests as alone, and what the streams notice.

usage: beside.py MODEL [--steps N] [--seconds N] [--rows N] [--tokens N]
(wants tinker and openai, and the release binary)

First each client and the job train alone, then all three together beside four clients that stream answers one after the
other. Adapters must have the digests they had alone. Prints the gaps between tokens of the streams: without training, and beside it;
and how many slices shared passes. (Those of 256 tokens together can: calls of few rows.)
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request

import openai
import tinker

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = "".join(json.dumps({"prompt": f"What is {i} and {i}?", "completion": f" It is {2 * i}."}) + "\n" for i in range(16))


class Work:
    def __init__(self, url, steps, rows, tokens):
        os.environ |= {"TINKER_API_KEY": "tml-none", "TINKER_TELEMETRY": "0"}
        self.url, self.steps, self.rows, self.tokens = url, steps, rows, tokens
        self.openai = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=1200)
        self.base = self.openai.models.list().data[0].id

    def digest(self, name):
        return next(model.root for model in self.openai.models.list().data if model.id == name)

    def client(self, seed):
        service = tinker.ServiceClient(base_url=self.url)
        model = service.create_lora_training_client(self.base, rank=8, seed=seed).result()
        texts = random.Random(seed)
        for _ in range(self.steps):
            rows = [[texts.randrange(100, 5000) for _ in range(self.tokens + 1)] for _ in range(self.rows)]
            data = [
                tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1]),
                             loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * self.tokens})
                for row in rows
            ]
            model.forward_backward(data, "cross_entropy")
            model.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        return self.digest(model.save_weights_for_sampler("end").result().path)

    def job(self):
        file = self.openai.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune")
        extra = {"max_steps": self.steps, "batch_size": 4, "seed": 7}
        job = self.openai.fine_tuning.jobs.create(training_file=file.id, model=self.base, extra_body=extra)
        while job.status not in ("succeeded", "failed"):
            time.sleep(0.2)
            job = self.openai.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        return self.digest(job.fine_tuned_model)

    def shared(self):
        lines = urllib.request.urlopen(self.url + "/metrics").read().decode().splitlines()
        value = lambda name: sum(float(line.split()[-1]) for line in lines if line.startswith(name))
        return value("tandem:train_shared_slices_total"), value("tandem:train_shared_passes_total")

    def streams(self, stop):
        """Gaps between tokens of four streams until `stop` is set."""
        gaps = []

        def stream(number):
            while not stop.is_set():
                question = f"Tell me a story about number {random.randrange(1000)}."
                messages = [{"role": "user", "content": question}]
                before = None
                for _ in self.openai.chat.completions.create(
                    model=self.base, messages=messages, max_tokens=64, stream=True, extra_body={"ignore_eos": True}
                ):
                    now = time.monotonic()
                    if before:
                        gaps.append(now - before)
                    before = now

        threads = [threading.Thread(target=stream, args=[number]) for number in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return gaps


def told(name, gaps):
    hundredths = statistics.quantiles(gaps, n=100)
    print(f"{name}: gaps of {len(gaps)} tokens p50 {1e3 * hundredths[49]:.1f}, p99 {1e3 * hundredths[98]:.1f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=63)
    arguments = parser.parse_args()
    command = [ROOT / "target/release/tandem", "serve", arguments.model, "--port", "0", "--data-dir", tempfile.mkdtemp()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        work = Work(server.stdout.readline().split()[-1], arguments.steps, arguments.rows, arguments.tokens)
        tasks = {"one client": lambda: work.client(1), "another": lambda: work.client(2), "job": work.job}
        stop = threading.Event()
        threading.Timer(arguments.seconds, stop.set).start()
        told("streams alone", work.streams(stop))
        alone = {}
        for name, task in tasks.items():
            began = time.monotonic()
            alone[name] = task()
            print(f"{name} alone: {time.monotonic() - began:.1f} s")
        beside, stop = {}, threading.Event()

        def run(name, task):
            began = time.monotonic()
            beside[name] = task()
            print(f"{name} beside all: {time.monotonic() - began:.1f} s")

        threads = [threading.Thread(target=run, args=task) for task in tasks.items()]

        def end():
            [thread.join() for thread in threads]
            stop.set()

        [thread.start() for thread in threads]
        threading.Thread(target=end).start()
        told("streams beside training", work.streams(stop))
        print("{:.0f} slices in {:.0f} shared passes".format(*work.shared()))
        print("digests as alone:", {name: beside.get(name) == digest for name, digest in alone.items()})
        assert alone == beside
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
