"""The steps of scripts/gpu-prove. Standard library only.

usage: gpu_prove.py [--dry] DEVICE OUT
"""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACK = ROOT / "target/gpu-prove/pack.tar.xz"
# The largest model, an 8B of random weights, is written where memory is a disk.
MODELS = pathlib.Path("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())


class Run:
    def __init__(self, device, out, dry):
        self.device, self.out, self.dry = device, out, dry
        self.began = time.monotonic()
        self.budget = float(os.environ.get("GPU_PROVE_SECONDS", 780))
        self.failed, self.left_out = [], []
        out.mkdir(parents=True, exist_ok=True)
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="gpu-prove-"))
        with tarfile.open(PACK) as pack:
            pack.extractall(self.home, filter="data")
        # Libraries of the wheel that is there; the GPU's is not among those a program built for the CPU asks for.
        torch = importlib.util.find_spec("torch") if not dry else None
        libraries = pathlib.Path(torch.origin).parent / "lib" if torch else ROOT / "third_party/libtorch/lib"
        self.environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "TANDEM_TEST_DEVICE": device,
                            "TANDEM_TEST_FIXTURES": str(ROOT / "tests/numerics/fixtures")}
        if torch:
            self.environment["LD_PRELOAD"] = str(libraries / "libtorch_cuda.so")

    def bin(self, name):
        return self.home / "bin" / name

    def write(self, result):
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, name, seconds, *command, environment=None, expect=None):
        """One command; whether it ended well within its time, and what it printed last as JSON, if that is some."""
        if time.monotonic() - self.began + seconds > self.budget:
            self.left_out.append(name)
            self.write({"step": name, "left_out": "no time left"})
            return False
        log, began, timed_out = self.out / f"{name.replace(' ', '-')}.log", time.monotonic(), False
        with open(log, "w") as output:
            # A group of its own, so that what it started ends with it.
            process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                                       env={**self.environment, **(environment or {})}, start_new_session=True)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        ok = process.returncode == 0 and not timed_out and (expect is None or expect in text)
        result = {"step": name, "ok": ok, "rc": process.returncode, "seconds": round(time.monotonic() - began, 1)}
        if timed_out:
            result["timed_out"] = seconds
        lines = text.strip().splitlines()
        try:
            result["figures"] = json.loads(lines[-1])
        except (IndexError, json.JSONDecodeError):
            result["tail"] = "\n".join(lines[-3:])[-600:]
        self.write(result)
        print(f"{'ok    ' if ok else 'FAILED'} {name}, {result['seconds']} s", flush=True)
        if not ok:
            self.failed.append(name)
            print("    " + "\n    ".join(lines[-6:]), flush=True)
        return ok


def correctness(run):
    run.step("doctor", 60, run.bin("tandem"), "doctor", expect=None if run.dry else "GPUs seen by libtorch  1")
    run.step("kernel cases", 90, run.bin("gpu_cases"), "--device", run.device, *sorted((run.home / "cases").glob("*/*")))
    goldens = ["golden::logits", "golden::gradients_of_a", "training::ten_lora"]
    run.step("goldens", 180, run.bin("numerics"), "--test-threads", "1", *(goldens[2:] if run.dry else goldens))
    if not run.dry:
        run.step("server against the CPU", 120, sys.executable, "scripts/gpu_check.py", run.device, "compare", run.bin("tandem"))


def speed(run):
    device = ["--device", run.device]
    if run.dry:
        demo = ["--model", ROOT / "server/demo", *device, "--streams", "1", "--prompt-tokens", "4", "--new-tokens", "2"]
        return run.step("decode", 90, run.bin("engine"), *demo, "decode")
    run.step("ceilings", 60, run.bin("ceilings"), *device)
    model = MODELS / "tandem-8b"
    make = f"import sys; sys.path.insert(0, 'scripts'); import gpu_check, pathlib; gpu_check.make_model('C', pathlib.Path({str(model)!r}))"
    if not run.step("an 8B of random weights", 120, sys.executable, "-c", make):
        return
    engine = [run.bin("engine"), "--model", model, *device]
    run.step("prefill and decode at 1k", 120, *engine, "--streams", "1,8,64", "--prompt-tokens", "1024", "--new-tokens", "64", "prefill", "decode")
    run.step("decode at 128", 90, *engine, "--streams", "1,64,256", "--prompt-tokens", "128", "--new-tokens", "64", "decode")
    run.step("adapters", 90, *engine, "adapters")
    run.step("training", 90, *engine, "train")
    run.step("int8", 90, *engine, "--quantization", "int8", "--streams", "1,8", "decode")
    for name, script in (("transformers", "transformers_infer.py"), ("peft", "train_peft.py")):
        # With the wheel's own libraries, as everybody runs them.
        plain = {"LD_PRELOAD": "", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        run.step(f"peer {name}", 90, sys.executable, f"benches/peers/{script}", model, environment=plain)
    if shutil.which("ncu"):
        profile = ["ncu", "--kernel-name", "regex:attention_", "--launch-count", "4", "--set", "basic"]
        run.step("ncu of attention", 60, *profile, *engine, "--streams", "8", "--new-tokens", "2", "decode")
    shutil.rmtree(model)


def main():
    words = [word for word in sys.argv[1:] if word != "--dry"]
    if len(words) != 2:
        raise SystemExit(__doc__)
    run = Run(words[0], pathlib.Path(words[1]).resolve(), "--dry" in sys.argv)
    try:
        correctness(run)
        speed(run)
    finally:
        shutil.rmtree(run.home)
    print(f"{len(run.failed)} steps failed, {len(run.left_out)} left out; {run.out / 'results.jsonl'}")
    raise SystemExit(bool(run.failed))


if __name__ == "__main__":
    main()
