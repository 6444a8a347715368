"""What our path should come to on a GPU: bytes over bandwidth, operations over rate, launches times what one costs.

usage: scripts/gpu-kernels estimate, which counts the launches (tests/tests/numerics/device.rs) and pipes them here.

Shapes come from the configuration of an 8B model, launches from the count; what is assumed of a device and of how much of
it kernels reach is written below and printed. Nothing of this was measured on a GPU.
"""

import json
import re
import sys

from gpu_check import SHAPES

# Of the data sheets: memory in bytes/s, dense bfloat16 and float32 (no TF32) in operations/s.
# Assumed: seconds that the host needs to queue one launch, and that the device needs between two that wait for each other, queued
# one by one and of a graph.
DEVICES = {
    "H200": {"memory": 4.8e12, "bf16": 989e12, "f32": 67e12, "queue": 5e-6, "gap": 3e-6, "graph": 1.5e-6},
    "MI300X": {"memory": 5.3e12, "bf16": 1307e12, "f32": 163e12, "queue": 7e-6, "gap": 5e-6, "graph": 2.5e-6},
}
# Assumed: the part of each that kernels reach. Products of many rows are libtorch's; attention is plain tiles of ours.
REACHED = {"memory": 0.85, "products": {"H200": 0.70, "MI300X": 0.45}, "attention": 0.35, "f32": 0.7}
GOALS = {
    "decode, 1 stream": {"H200": 245, "MI300X": 230},
    "decode, 64 streams": {"H200": 8000, "MI300X": 8000},
    "prefill, 512 tokens": {"H200": 40000, "MI300X": 40000},
    "prefill at 8k": {"H200": 35000, "MI300X": 35000},
    "LoRA training, 2k packed": {"H200": 15500, "MI300X": 15500},
}
CONTEXT = 1024
F32, BF16 = 4, 2


class Model:
    def __init__(self, shape):
        self.hidden, self.layers, (heads, kv_heads), self.inner, self.vocab, tied = SHAPES[shape]
        self.heads, self.head_dim = heads, self.hidden // heads
        self.q, self.kv = self.hidden, kv_heads * self.head_dim
        self.linears = self.layers * (self.hidden * (self.q + 2 * self.kv) + self.q * self.hidden + 3 * self.hidden * self.inner)
        self.head = self.vocab * self.hidden
        # Read and written of one row in one layer, float32: norm, qkv, rope and write, attention, output onto the residual, norm,
        # gate and up, activation, down onto the residual; products of many rows round x first.
        qkv = self.q + 2 * self.kv
        parts = [2 * self.hidden, self.hidden + qkv, 2 * qkv, 2 * self.q, self.q + 2 * self.hidden, 2 * self.hidden,
                 self.hidden + 2 * self.inner, 3 * self.inner, self.inner + 2 * self.hidden]
        self.row_bytes = F32 * sum(parts)
        self.rounding_bytes = (F32 + 2 * BF16) * (self.hidden + self.q + self.hidden + self.inner)
        self.kv_bytes = 2 * self.kv * BF16  # of a token in a layer

    def attention(self, tokens, context):
        """Operations of `tokens` rows that see `context` keys on average, in all layers."""
        return 4 * self.q * context * tokens * self.layers


def seconds(device, name, *, memory=0, products=0, attention=0, f32=0, launches=0):
    """With every launch queued by the host, and as a graph: (eager, graph)."""
    work = memory / (device["memory"] * REACHED["memory"])
    work += products / (device["bf16"] * REACHED["products"][name]) + attention / (device["bf16"] * REACHED["attention"])
    work += f32 / (device["f32"] * REACHED["f32"])
    return max(work + launches * device["gap"], launches * device["queue"]), work + launches * device["graph"]


def counts(text):
    """{what: (launches, layers, {name: launches} or None)} of the lines that the tests print."""
    found = {}
    for streams, adapters, launches, layers in re.findall(r"(\d+) streams, (\d+) adapters: (\d+) launches of (\d+) layers", text):
        found[f"decode {streams}/{adapters}"] = (int(launches), int(layers), None)
    for what, layers, names in re.findall(r"^(prefill|training step) of (\d+) layers: (\{.*\})$", text, re.M):
        names = json.loads(names)
        found[what] = (sum(names.values()), int(layers), names)
    return found


def scaled(found, what, model):
    """As many a layer as the fixture's, its embedding and head shared out among them: a little too many."""
    launches, layers, _ = found[what]
    return launches / layers * model.layers


def rows(found, model):
    for name, device in DEVICES.items():
        both = lambda tokens, **work: (name, [tokens / s for s in seconds(device, name, **work)])
        for streams in (1, 8, 64):
            memory = BF16 * (model.linears + model.head) + streams * model.layers * (CONTEXT * model.kv_bytes + model.row_bytes)
            memory += streams * model.vocab * F32 * 3
            many = streams > 16  # Then libtorch's products, beside the reading of the weights.
            what = f"decode, {streams} stream{'s' if streams > 1 else ''}"
            products = 2 * (model.linears + model.head) * streams if many else 0
            yield what, *both(streams, memory=memory, products=products, launches=scaled(found, f"decode {streams}/0", model))
        for what, tokens, context in (("prefill, 512 tokens", 512, 256), ("prefill at 8k", 2048, 7168)):
            memory = tokens * model.layers * (model.row_bytes + model.rounding_bytes)
            memory += BF16 * model.linears + model.layers * model.kv_bytes * 2 * context
            yield what, *both(tokens, memory=memory, products=2 * model.linears * tokens, attention=model.attention(tokens, context),
                              launches=scaled(found, "prefill", model))
        tokens = 2048
        launches, names = scaled(found, "training step", model), found["training step"][2]
        passes = 3  # Forward, forward again (2 GiB keep few sublayers of 8B), backward.
        products = 2 * (model.linears * passes + model.head * 2) * tokens
        memory = passes * tokens * model.layers * (model.row_bytes + model.rounding_bytes) + tokens * model.vocab * F32 * 5
        scores = any(name.startswith(("aten::bmm", "aten::_softmax", "aten::softmax")) for name in names)
        square = model.heads * tokens * tokens * model.layers
        if scores:  # Whole scores in float32: of two products forward and four back, about fourteen readings and writings of them.
            work = {"f32": 2 * 6 * square * model.head_dim, "memory": memory + 14 * square * F32}
        else:
            work = {"attention": 7 * square * model.head_dim, "memory": memory}
        yield "LoRA training, 2k packed", *both(tokens, products=products, launches=launches, **work)


def main():
    found = counts(sys.stdin.read())
    missing = {"decode 1/0", "decode 8/0", "decode 64/0", "prefill", "training step"} - found.keys()
    if missing:
        sys.exit(f"the count has no {', '.join(sorted(missing))}")
    model = Model("C")
    print(f"8B: {(model.linears + model.head) / 1e9:.2f}e9 numbers read a token, {model.layers} layers; launches a layer: " +
          ", ".join(f"{what} {launches / layers:.1f}" for what, (launches, layers, _) in found.items()))
    print("assumed reached:", json.dumps(REACHED))
    for name, device in DEVICES.items():
        print(f"assumed of {name}:", json.dumps(device))
    print("\n| tokens/s | device | launch by launch | as a graph | goal | reaches it |\n|---|---|---|---|---|---|")
    for what, name, (eager, graph) in rows(found, model):
        goal = GOALS.get(what, {}).get(name)
        reaches = "" if goal is None else "yes" if eager >= goal else "as a graph" if graph >= goal else "no"
        print(f"| {what} | {name} | {eager:,.0f} | {graph:,.0f} | {f'{goal:,}' if goal else ''} | {reaches} |")


if __name__ == "__main__":
    main()
