"""What scripts/gpu-check prints after the goldens: the running server on a device against the CPU, and shares of the
device's measured ceilings. Standard library only.

usage: gpu_check.py DEVICE SHAPE
       gpu_check.py DEVICE compare BINARY     the comparison alone
"""
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

from demo import Api, start, watch

RELEASE = pathlib.Path("target/release")
DEMO = pathlib.Path("server/demo")
PROMPTS = ["Who is the baker?", "Tell me about the village.", "Where does Ada live?", "The mill stands", "1 2 3"]
# Sums in another order; what a wrong kernel or a rounding too many would exceed by far.
LOGPROB_LIMIT = 1e-3
LOSS_LIMIT = 1e-3
# hidden, layers, (heads, kv heads), inner, vocabulary, tied
SHAPES = {
    "A": (576, 30, (9, 3), 1536, 49152, True),
    "B": (2048, 22, (32, 4), 5632, 32000, False),
    "C": (4096, 32, (32, 8), 14336, 128256, False),
}


class Report:
    def __init__(self):
        self.failed = 0

    def judge(self, what, value, limit):
        """A difference and the most it may be."""
        good = value <= limit
        self.failed += not good
        print(f"  {what:44} {value:9.2e}  limit {limit:.0e}{'' if good else '  <-- too far'}")

    def say(self, what, text):
        print(f"  {what:44} {text}")


def scores(api, model, prompt):
    """Log-probabilities of the prompt's tokens."""
    body = {"model": model, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    return api.call("POST", "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:]


def greedy(api, model, prompt):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 48, "ignore_eos": True}
    return api.call("POST", "/v1/completions", body)["choices"][0]["text"]


def largest(a, b):
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


def trained(api, base):
    """A LoRA job's losses, its adapter's name and its median speed."""
    file = api.upload(DEMO / "finetune.jsonl")
    options = {"seed": 7, "learning_rate": 1e-3, "max_steps": 20, "batch_size": 4}
    job = watch(api, api.call("POST", "/v1/fine_tuning/jobs", {"model": base, "training_file": file, **options}))
    if job["status"] != "succeeded":
        raise SystemExit(f"the job {job['status']}: {job['error']}")
    events = api.call("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100")["data"]
    steps = {event["data"]["step"]: event["data"] for event in events
             if event["type"] == "metrics" and "train_loss" in event["data"]}
    rates = sorted(step["tokens_per_second"] for step in steps.values())
    return [steps[step]["train_loss"] for step in sorted(steps)], job["fine_tuned_model"], rates[len(rates) // 2]


def observe(device, binary):
    """What a server on `device` says, float32: base, adapter, training."""
    with tempfile.TemporaryDirectory(prefix="tandem-gpu-") as data_dir:
        server, url = start(binary, data_dir, "--device", device, "--dtype", "float32")
        try:
            api = Api(url)
            base = api.call("GET", "/v1/models")["data"][0]["id"]
            losses, adapter, rate = trained(api, base)
            seen = {"losses": losses, "tokens_per_second": rate}
            for name, model in (("base", base), ("adapter", adapter)):
                seen[name] = [(scores(api, model, prompt), greedy(api, model, prompt)) for prompt in PROMPTS]
            return seen
        finally:
            server.terminate()
            server.wait(60)


def compare(report, device, binary=RELEASE / "tandem"):
    print(f"\n==== the server, float32, demo model: {device} against cpu")
    ours, expected = observe(device, binary), observe("cpu", binary)
    for name in ("base", "adapter"):
        pairs = list(zip(ours[name], expected[name]))
        difference = max(largest(a, b) for (a, _), (b, _) in pairs)
        report.judge(f"log-probabilities, {name}", difference, LOGPROB_LIMIT)
        different = sum(a != b for (_, a), (_, b) in pairs)
        report.judge(f"greedy answers that differ, {name} (of {len(pairs)})", different, 0)
    report.judge("losses of a LoRA job of 20 steps", largest(ours["losses"], expected["losses"]), LOSS_LIMIT)
    report.say("first and last loss", f"{ours['losses'][0]:.4f} -> {ours['losses'][-1]:.4f}")
    rates = [f"{seen['tokens_per_second']:.0f} tokens/s" for seen in (ours, expected)]
    report.say("LoRA job, demo model", f"{rates[0]} on {device}, {rates[1]} on cpu")


def make_model(shape, folder):
    """Random weights by the megabyte: speed does not depend on them."""
    hidden, layers, (heads, kv_heads), inner, vocab, tied = SHAPES[shape]
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": tied, "attention_bias": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kv = hidden // heads * kv_heads
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        for name, size in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = size
    header, end = {}, 0
    for name, size in tensors.items():
        count = size[0] * (size[1] if len(size) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    numbers = random.Random(0)
    block = b"".join(struct.pack("<f", numbers.gauss(0.0, 0.02))[2:] for _ in range(1 << 19))
    one = struct.pack("<f", 1.0)[2:]
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            start_at, end_at = entry["data_offsets"]
            if len(entry["shape"]) == 1:
                file.write(one * entry["shape"][0])
                continue
            # Each matrix begins elsewhere in the block, so that no two are alike.
            turn = 2 * numbers.randrange(len(block) // 2)
            size, rows = end_at - start_at, block[turn:] + block[:turn]
            for _ in range(size // len(rows)):
                file.write(rows)
            file.write(rows[: size % len(rows)])
    (folder / "complete").touch()


def measured(*command):
    """The JSON that a benchmark ends with."""
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    print("  " + "\n  ".join(result.stdout.splitlines()[:-1]))
    if result.returncode != 0:
        raise SystemExit(f"{command[0]} failed")
    return json.loads(result.stdout.splitlines()[-1])


def shares(report, device, shape):
    print(f"\n==== what {device} reaches with libtorch's own ops: best (median)")
    ceilings = measured(RELEASE / "ceilings", "--device", device)
    print(f"\n==== the engine, bfloat16, shape {shape}, random weights")
    model = pathlib.Path("target/bench-models") / f"gpu-check-{shape}"
    make_model(shape, model)
    engine = measured(RELEASE / "engine", "--model", model, "--device", device, "train", "prefill", "decode")
    print("\n==== shares")
    read = engine["weight_bytes"] * engine["decode_1"] / 1e9
    report.say("decode, 1 stream: weights read", f"{read:.1f} GB/s, {read / ceilings['read']:.1%} of the bandwidth")
    work = 2 * engine["parameters"] * engine["prefill_512"] / 1e9
    share = work / ceilings["bfloat16"]
    report.say("prefill, 512 tokens", f"{work:.0f} GFLOP/s, {share:.1%} of the bfloat16 matmul rate")
    # The frozen base: forward, and the gradient of its inputs.
    work = 4 * engine["parameters"] * engine["train_tok_s"] / 1e9
    share = work / ceilings["bfloat16"]
    report.say("LoRA training, 4 x 512 tokens a step",
               f"{engine['train_tok_s']:.0f} tokens/s, {work:.0f} GFLOP/s, {share:.1%} of the matmul rate")


def main(device, shape, binary=RELEASE / "tandem"):
    report = Report()
    compare(report, device, pathlib.Path(binary).resolve())
    if shape != "compare":
        shares(report, device, shape)
    print(f"\n{report.failed} of the comparisons failed" if report.failed else "\nevery comparison passed")
    raise SystemExit(report.failed != 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
