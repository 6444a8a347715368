"""Proofs of a router in front of two backends, with the real binary. Standard library only. See scripts/prove.

usage: prove_fleet.py kill|roll|hop [MODEL_FOLDER]
"""
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

TANDEM = "target/release/tandem"
LOAD = "target/release/load"
STREAMS = 16
QUESTION = "Tell me about the village."
SECONDS = 12


def get(base, path):
    with urllib.request.urlopen(base + path, timeout=10) as response:
        return response.read().decode()


def ready(base):
    try:
        get(base, "/ready")
        return True
    except OSError:
        return False


class Process:
    """One `tandem` process with its own log; `base` is its URL once it listens."""

    def __init__(self, folder, name, *args):
        self.args, self.log = args, pathlib.Path(folder) / f"{name}.log"
        self.started = time.perf_counter()
        self.process = subprocess.Popen([TANDEM, *args], stdout=open(self.log, "w"), stderr=subprocess.STDOUT)
        while not (found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", self.log.read_text())):
            if self.process.poll() is not None or time.perf_counter() - self.started > 60:
                raise SystemExit(f"{args} did not start:\n{self.log.read_text()}")
            time.sleep(0.005)
        self.base = found[1]

    def end(self, with_signal=signal.SIGTERM):
        self.process.send_signal(with_signal)
        return self.process.wait(60)


class Fleet:
    def __init__(self, model=()):
        self.folder = tempfile.TemporaryDirectory(prefix="tandem-fleet-")
        self.data = ["--data-dir", self.folder.name + "/data"]
        self.model = list(model)
        self.backends = [self.backend(i, "127.0.0.1:0") for i in range(2)]
        urls = ",".join(backend.base for backend in self.backends)
        self.router = Process(self.folder.name, "router", "router", "--port", "0", "--backend", urls, *self.data)
        while sum(self.up(i) for i in range(2)) < 2:
            time.sleep(0.005)

    def backend(self, i, listen):
        return Process(self.folder.name, f"backend-{i}", "backend", "--listen", listen, *self.model, *self.data)

    def again(self, i):
        self.backends[i] = self.backend(i, self.backends[i].base.removeprefix("http://"))

    def metric(self, name, **labels):
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in get(self.router.base, "/metrics").splitlines():
            if line.startswith(name + "{") and all(label in line for label in wanted):
                return float(line.rsplit(" ", 1)[1])
        raise SystemExit(f"{name} {labels} is not in the metrics")

    def up(self, i):
        return self.metric("tandem:replica_up", replica=self.backends[i].base) == 1

    def until(self, i, state):
        while self.up(i) != state:
            time.sleep(0.002)
        return time.perf_counter()

    def close(self):
        self.router.end()
        for backend in self.backends:
            if backend.process.poll() is None:
                backend.end()
        self.folder.cleanup()


def stream(base, model, max_tokens):
    """How one streamed chat ended: `whole`, `cut` after it had begun, or what the refusal said."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": True,
            "max_tokens": max_tokens, "ignore_eos": True}
    request = urllib.request.Request(base + "/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    begun = False
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if b'"error"' in line:
                    return "cut" if begun else f"failed before it began: {line}"
                begun = begun or b'"content"' in line
                if line.strip() == b"data: [DONE]":
                    return "whole"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()[:200]}"
    except OSError as error:
        return "cut" if begun else repr(error)
    return "cut" if begun else "closed without a word"


class Streams:
    """So many streams at any time until told to stop; how each ended."""

    def __init__(self, fleet, max_tokens=128):
        self.model = json.loads(get(fleet.router.base, "/v1/models"))["data"][0]["id"]
        self.ends, self.done = [], threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(fleet, max_tokens)) for _ in range(STREAMS)]
        for thread in self.threads:
            thread.start()

    def run(self, fleet, max_tokens):
        while not self.done.is_set():
            self.ends.append(stream(fleet.router.base, self.model, max_tokens))

    def stop(self):
        self.done.set()
        for thread in self.threads:
            thread.join()
        whole, cut = self.ends.count("whole"), self.ends.count("cut")
        others = [end for end in self.ends if end not in ("whole", "cut")]
        for other in others[:3]:
            print("  ", other)
        return whole, cut, len(others)


def kill():
    """One of two backends killed under 16 streams, then started again."""
    fleet = Fleet()
    try:
        streams = Streams(fleet)
        time.sleep(SECONDS / 3)
        live = fleet.metric("tandem:replica_live", replica=fleet.backends[0].base)
        killed = time.perf_counter()
        fleet.backends[0].process.kill()
        ejected = fleet.until(0, False) - killed
        fleet.backends[0].process.wait()
        time.sleep(SECONDS / 3)
        fleet.again(0)
        began = fleet.backends[0].started
        listens = time.perf_counter() - began
        returned = fleet.until(0, True) - began
        time.sleep(SECONDS / 3)
        whole, cut, others = streams.stop()
        print(f"killed one of two backends under {STREAMS} streams, {live:.0f} of them there: {whole} whole, {cut} cut after "
              f"they had begun, {others} failed otherwise; ejected {1e3 * ejected:.0f} ms after the kill; back "
              f"{returned:.2f} s after its start (it listened after {listens:.2f} s)")
        return others == 0 and cut <= live and whole > 0
    finally:
        fleet.close()


def roll():
    """Every backend stopped and started again, one after the other, under 16 streams."""
    fleet = Fleet()
    try:
        streams = Streams(fleet)
        took = []
        for _ in range(2):
            for i in range(2):
                time.sleep(1)
                began = time.perf_counter()
                code = fleet.backends[i].end()
                if code != 0:
                    raise SystemExit(f"a backend ended with {code}\n{fleet.backends[i].log.read_text()}")
                fleet.again(i)
                took.append(fleet.until(i, True) - began)
        whole, cut, others = streams.stop()
        print(f"rolling restart, twice, of two backends under {STREAMS} streams: {whole} whole, {cut} cut, {others} failed "
              f"otherwise; a backend was away {max(took):.2f} s at most (it ends its streams first)")
        return cut == 0 and others == 0 and whole > 0
    finally:
        fleet.close()


def percentile(buckets, q):
    """From cumulative (bound, count): the bucket's bound that holds it, interpolated."""
    total, below, low = buckets[-1][1], 0, 0.0
    for bound, count in buckets:
        if count >= q * total:
            return low + (bound - low) * (q * total - below) / max(count - below, 1)
        below, low = count, bound
    return float("inf")


def histogram(text, name):
    """Summed over all series of the name."""
    sums = {}
    for line in text.splitlines():
        found = re.match(re.escape(name) + r'_bucket\{.*le="([^"]+)"\} (\d+)', line)
        if found:
            bound = float("inf") if found[1] == "+Inf" else float(found[1])
            sums[bound] = sums.get(bound, 0) + int(found[2])
    return sorted(sums.items())


def load(base, requests):
    model = json.loads(get(base, "/v1/models"))["data"][0]["id"]
    output = subprocess.run([LOAD, "--url", base, "--model", model, "--concurrency", "8", "--requests", str(requests),
                             "--prompt-tokens", "64", "--max-tokens", "128"], capture_output=True, text=True, check=True)
    return json.loads(output.stdout.strip().splitlines()[-1])


def hop(model, pairs=4, requests=24):
    """The same load, 8 streams, on `serve` and through `router` to one `backend`, in turn."""
    model = ["--model", model] if model else []
    ratios, gaps = [], []
    with tempfile.TemporaryDirectory(prefix="tandem-hop-") as folder:
        for pair in range(pairs):
            figures = {}
            for kind in (["direct", "routed"] if pair % 2 == 0 else ["routed", "direct"]):
                data = ["--data-dir", f"{folder}/{kind}"]
                if kind == "direct":
                    processes = [Process(folder, kind, "serve", "--port", "0", *model, *data)]
                else:
                    backend = Process(folder, "backend", "backend", "--listen", "127.0.0.1:0", *model, *data)
                    processes = [Process(folder, kind, "router", "--port", "0", "--backend", backend.base, *data), backend]
                figures[kind] = load(processes[0].base, requests)
                if kind == "routed":
                    text = get(processes[0].base, "/metrics")
                for process in processes:
                    process.end()
            direct, routed = figures["direct"], figures["routed"]
            ratios.append(routed["tokens_per_s"] / direct["tokens_per_s"])
            gaps.append((routed["itl_ms"]["p50"] - direct["itl_ms"]["p50"]) * 1e3)
            hops, admissions = (histogram(text, f"tandem:{name}_seconds") for name in ("replica_hop", "admission"))
            print(f"pair {pair + 1}: direct {direct['tokens_per_s']:.1f} tokens/s, routed "
                  f"{routed['tokens_per_s']:.1f}; ITL p50 {direct['itl_ms']['p50']:.2f} and "
                  f"{routed['itl_ms']['p50']:.2f} ms; hop p50 {1e6 * percentile(hops, 0.5):.0f} us, p99 "
                  f"{1e6 * percentile(hops, 0.99):.0f} us ({hops[-1][1]} probes); admission p50 "
                  f"{1e6 * percentile(admissions, 0.5):.0f} us", flush=True)
    ratios.sort()
    print(f"throughput routed / direct: median {ratios[len(ratios) // 2]:.3f} (goal 0.98)")
    return True


if __name__ == "__main__":
    proofs = {"kill": kill, "roll": roll, "hop": lambda: hop(sys.argv[2] if len(sys.argv) > 2 else None)}
    if len(sys.argv) < 2 or sys.argv[1] not in proofs:
        raise SystemExit(__doc__)
    held = proofs[sys.argv[1]]()
    print("held" if held else "DID NOT HOLD")
    sys.exit(0 if held else 1)
