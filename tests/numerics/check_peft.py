"""Adapters that Tandem trained score the same texts the same, whether peft or Tandem's server reads them (float32)."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MODEL = pathlib.Path(__file__).parent / "fixtures/gqa_tied"
LIMIT = 1e-4
# What is trained, by the adapter's name. The model ties its head to its embedding.
ADAPTERS = {"layers": "all-linear", "head": "all-linear,lm_head"}
TEXTS = [
    "The cat sat on the mat.",
    "user: Where is the cat?</s>assistant: On the mat.",
    "In the end, nothing else is as it seems; 42 reasons to listen.",
    "naïve café ☕",
]
EXAMPLES = [
    {"messages": [{"role": "user", "content": f"Where is the {who}?"}, {"role": "assistant", "content": f"On the {where}."}]}
    for who in ("cat", "dog", "hen", "rat")
    for where in ("mat", "sea", "tree")
]


def main() -> None:
    logging.disable_progress_bar()
    tandem = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        adapters = {name: train(tandem, folder, name, modules) for name, modules in ADAPTERS.items()}
        ours = served(tandem, folder, adapters)
    worst = 0.0
    for name, (texts, expected) in ours.items():
        difference = max(abs(a - b) for theirs, our in zip(expected, texts, strict=True) for a, b in zip(theirs, our, strict=True))
        print(f"{name}: {sum(map(len, texts))} log-probabilities, largest difference {difference:.2e}")
        worst = max(worst, difference)
    scores = [texts for texts, _ in ours.values()]
    far = lambda one, other: max(abs(a - b) for x, y in zip(one, other) for a, b in zip(x, y))
    moved = min(far(one, other) for i, one in enumerate(scores) for other in scores[:i])
    print(f"training moved log-probabilities by up to {moved:.2f} and more")
    if worst > LIMIT or moved < 0.1:
        sys.exit(f"failed: the difference must be at most {LIMIT:.0e}, the effect of training at least 0.1")


def train(tandem: pathlib.Path, folder: pathlib.Path, name: str, modules: str) -> pathlib.Path:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    settings = dict(
        model=MODEL, training_file=data, output_dir=folder / name, n_epochs=5, batch_size=4, learning_rate=5e-3, lora_r=4,
        lora_alpha=8, lora_target_modules=modules, dtype="float32", device="cpu",
    )  # fmt: skip
    subprocess.run([tandem, "train", *(f"{key}={value}" for key, value in settings.items())], check=True)
    return folder / name / "adapter"


def served(tandem: pathlib.Path, folder: pathlib.Path, adapters: dict[str, pathlib.Path]) -> dict:
    """Log-probabilities of every text, the server's and peft's, of the base and of each adapter."""
    command = [tandem, "serve", "--model", MODEL, "--dtype", "float32", "--device", "cpu", "--port", "0"]
    modules = [f"{name}={adapter}" for name, adapter in adapters.items()]
    command += ["--served-model-name", "base", "--lora-modules", *modules, "--data-dir", folder / "data"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = listening(server)
        texts = {name: [server_scores(url, name, text) for text in TEXTS] for name in ("base", *adapters)}
    finally:
        server.terminate()
        server.wait(30)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected = {"base": [scores(base, tokenizer, text) for text in TEXTS]}
    for name, adapter in adapters.items():
        # A model of its own: what one adapter left behind would be another's base.
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
        tuned = PeftModel.from_pretrained(base, adapter).eval()
        expected[name] = [scores(tuned, tokenizer, text) for text in TEXTS]
    return {name: (texts[name], expected[name]) for name in texts}


def listening(server: subprocess.Popen) -> str:
    log = ""
    for line in server.stdout:
        log += line
        if found := re.search(r"listening on (http://\S+)", line):
            return found[1]
    sys.exit(f"the server ended before it listened:\n{log}")


def server_scores(url: str, model: str, text: str) -> list[float]:
    body = {"model": model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["logprobs"]["token_logprobs"][1:]


@torch.inference_mode()
def scores(model, tokenizer, text: str) -> list[float]:
    ids = tokenizer(text, return_tensors="pt").input_ids
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()
