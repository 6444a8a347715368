"""Makes tests/numerics/fixtures: tiny random checkpoints and what transformers and peft compute from them; and what
transformers computes from the demo model.

Everything is eager float32 on one thread. Nothing of Tandem runs here; only its random draws (the initial adapter and
the order of examples) are written down a second time, so that both trainers can start from the same numbers.
"""

import json
import math
import pathlib
import shutil
import sys
import tempfile

import numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Mxfp4Config, get_scheduler
from transformers.utils import logging

from families import FAMILIES, SPLIT, TINY

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE / "fixtures"
DEMO = HERE.parents[1] / "server/demo"

BASE = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
)

# Each differs from BASE in what it is named after. `old_config` writes rope as transformers 4 did.
VARIANTS = {
    "gqa_tied": dict(
        vocab_size=288,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=3,
        tie_word_embeddings=True,
    ),
    "llama3_rope": dict(
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "biases": dict(attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
    "head_dim": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "linear_rope": dict(
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0), old_config=True, hidden_act="gelu"
    ),
    # The head dimension and the widths fit no vector width.
    "sharded": dict(
        hidden_size=24,
        intermediate_size=42,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=3,
        max_shard_size="20KB",
    ),
    # Its table is stored under the head's name, as transformers 4 left it when it saved a tied model.
    "bf16": dict(tie_word_embeddings=True, dtype=torch.bfloat16, table_as_head=True),
}

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all": dict(r=4, lora_alpha=8, target_modules=LINEAR),
    "some": dict(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 3, "layers.1.mlp.down_proj": 5},
        alpha_pattern={"q_proj": 4, "model.layers.0.self_attn.v_proj": 7},
        use_rslora=True,
    ),
}
WITH_SOME = ["gqa_tied", "biases", "sharded"]


# In a patch: the field is there and null.
NULL = "null"
# Folders of fixtures with some fields of one file changed (None: left out), as users change them.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PATCHES = {
    "rope_scaling beside rope_parameters": ("head_dim", "config.json", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "rope_scaling forgets the other's theta": (
        "llama3_rope",
        "config.json",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "rope_theta beside rope_scaling": (
        "llama3_rope",
        "config.json",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500000.0},
    ),
    "an empty rope_scaling": ("llama3_rope", "config.json", {"rope_scaling": {}, "rope_theta": 10000.0}),
    "the original length at the top": ("llama3_rope", "config.json", {"original_max_position_embeddings": 8}),
    "no original length": ("llama3_rope", "config.json", {"rope_parameters": LLAMA3}),
    "a tied head that differs": ("head_dim", "config.json", {"tie_word_embeddings": True}),
    "fields left out": (
        "head_dim",
        "config.json",
        {"architectures": None, "hidden_act": None, "max_position_embeddings": None, "rope_parameters": None},
    ),
    "alpha_pattern, the wide key first": (
        "head_dim",
        "adapter-all/adapter_config.json",
        {"alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 1}},
    ),
    "alpha_pattern, the narrow key first": (
        "head_dim",
        "adapter-all/adapter_config.json",
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 64}},
    ),
    "alpha_pattern, an expression": (
        "head_dim",
        "adapter-all/adapter_config.json",
        {"alpha_pattern": {r".*\.1\.mlp\.(gate|up)_proj": 32}},
    ),
    # What sets a family apart, taken away or written in the other version's words.
    "mistral: no window": ("mistral", "config.json", {"sliding_window": NULL}),
    "mistral: a wider window": ("mistral", "config.json", {"sliding_window": 20}),
    "ministral: windows everywhere": ("ministral", "config.json", {"layer_types": None}),
    "qwen2: the window switched off": ("qwen2", "config.json", {"use_sliding_window": False, "layer_types": None}),
    "qwen2: a window in the first layer too": ("qwen2", "config.json", {"max_window_layers": 0, "layer_types": None}),
    "gemma: the activation's old name": ("gemma", "config.json", {"hidden_act": "gelu"}),
    "gemma2: no cap on attention": ("gemma2", "config.json", {"attn_logit_softcapping": NULL}),
    "gemma2: no cap on logits": ("gemma2", "config.json", {"final_logit_softcapping": NULL}),
    "gemma2: the default caps": (
        "gemma2",
        "config.json",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2: another scale": ("gemma2", "config.json", {"query_pre_attn_scalar": 16}),
    "gemma2: the default layers": ("gemma2", "config.json", {"layer_types": None}),
    "gemma3: rope in the words of transformers 4": (
        "gemma3",
        "config.json",
        {
            "rope_parameters": None,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 10000.0,
            "rope_local_base_freq": 50.0,
        },
    ),
    "gemma3: default ropes": ("gemma3", "config.json", {"rope_parameters": None}),
    "gemma3: a pattern of windows": ("gemma3", "config.json", {"layer_types": None, "sliding_window_pattern": 2}),
    "gemma3: a cap on logits": ("gemma3", "config.json", {"final_logit_softcapping": 2.0}),
    "phi3: whole heads turn": ("phi3", "config.json", {"rope_parameters": None}),
    "phi3: the share at the top": ("phi3", "config.json", {"rope_parameters": None, "partial_rotary_factor": 0.25}),
    "longrope: the words of transformers 4": (
        "longrope",
        "config.json",
        {
            "rope_parameters": None,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 4.0, 6.0, 9.0],
            },
        },
    ),
    "olmo3: the default layers": ("olmo3", "config.json", {"layer_types": None}),
    "granite: no factors": (
        "granite",
        "config.json",
        {
            "embedding_multiplier": None,
            "attention_multiplier": None,
            "residual_multiplier": None,
            "logits_scaling": None,
        },
    ),
    "smollm3: rope everywhere": ("smollm3", "config.json", {"no_rope_layers": [1, 1]}),
    "smollm3: every second layer without": (
        "smollm3",
        "config.json",
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
    ),
    "glm4: the default share": ("glm4", "config.json", {"rope_parameters": None}),
    "cohere2: the default scale": ("cohere2", "config.json", {"logit_scale": None}),
    "cohere2: layers without rope": ("cohere2", "config.json", {"layer_types": ["full_attention"] * 2}),
    "cohere2: the default layers": ("cohere2", "config.json", {"layer_types": None}),
    "starcoder2: no window": ("starcoder2", "config.json", {"sliding_window": NULL}),
    "yarn: another ramp": (
        "yarn",
        "config.json",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.3,
            }
        },
    ),
    "dynamic rope below its length": ("yarn", "config.json", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "a target that the model lacks": (
        "head_dim",
        "adapter-all/adapter_config.json",
        {"target_modules": [*LINEAR, "qkv_proj"]},
    ),
}


def main(names: list[str]) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in names or [*VARIANTS, *FAMILIES, "wrapped", "gpt_oss_mxfp4", "patches", "demo"]:
        if name == "demo":
            demo()
        elif name == "wrapped":
            wrapped()
        elif name == "gpt_oss_mxfp4":
            mxfp4()
        elif name == "patches":
            patches()
        elif name in FAMILIES:
            family(name)
        else:
            variant(name)
    total = sum(f.stat().st_size for f in FIXTURES.rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB in {FIXTURES.relative_to(HERE.parents[1])}")


def variant(name: str) -> None:
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint(name, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    draw, tensors, numbers = asked(name, model)
    vocab, prompts, examples = model.config.vocab_size, numbers["prompts"], numbers["examples"]
    for adapter, config in ADAPTERS.items():
        if adapter == "all" or name in WITH_SOME:
            lora(name, adapter, config, folder, prompts, examples, tensors, numbers)
    if name == "gqa_tied":
        tokenizer(folder, vocab)
        training = [random_example(draw, vocab, int(n)) for n in draw.integers(4, 40, 8)]
        lora_training(folder, training, tensors, numbers)
        full_training(folder, examples, training, tensors, numbers)

    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    write_json(folder / "expected.json", numbers)
    print(f"{name}: loss {numbers['loss']:.6f}", flush=True)


def asked(name: str, model) -> tuple[numpy.random.Generator, dict, dict]:
    """What is drawn to ask a model, and its answers: further draws, tensors, numbers."""
    vocab = model.config.vocab_size
    draw = numpy.random.default_rng([*name.encode(), 2])
    prompts = {"short": draw.integers(3, vocab, 5).tolist(), "long": draw.integers(3, vocab, 41).tolist()}
    examples = [random_example(draw, vocab, length) for length in (12, 33, 7)]
    with torch.no_grad():
        tensors = {f"logits.{prompt}": logits(model, tokens) for prompt, tokens in prompts.items()}
        loss = weighted_loss(model, examples).item()
    return draw, tensors, {"prompts": prompts, "examples": examples, "loss": loss}


def draw_adapter(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0.0, 0.1 if "lora_B" in key else parameter.shape[1] ** -0.5, generator=generator)


def checkpoint(name: str, folder: pathlib.Path) -> None:
    """Random weights of a size that makes every part of the model matter in the logits."""
    options = {**BASE, **VARIANTS[name]}
    special = ("max_shard_size", "old_config", "dtype", "table_as_head")
    shard, old_config, dtype, table_as_head = (options.pop(key, None) for key in special)
    if "rope_parameters" not in options:
        options["rope_parameters"] = dict(rope_type="default", rope_theta=options["rope_theta"])
    del options["rope_theta"]
    model = drawn(name, "llama", {"tie_word_embeddings": False, **options})
    if dtype:
        model = model.to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if table_as_head:
        stored = load_file(folder / "model.safetensors")
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if old_config:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        config["torch_dtype"] = config.pop("dtype")
        write_json(folder / "config.json", config, indent=2)


def drawn(name: str, model_type: str, options: dict):
    """A model whose every part matters in the logits."""
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    # Gemma's norms hold their weight less one.
    around = 0.0 if model_type.startswith("gemma") else 1.0
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bias" in key or "sinks" in key:
                parameter.normal_(0.0, 0.3, generator=generator)
            elif "norm" in key:
                parameter.uniform_(around - 0.5, around + 0.5, generator=generator)
            elif "embed" in key or "lm_head" in key:
                parameter.normal_(0.0, 0.25, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def family(name: str) -> None:
    """One of FAMILIES: logits, a greedy continuation, an adapter on every linear with its gradients, and ten steps."""
    model_type, options, linears = FAMILIES[name]
    options = {key: value for key, value in {**TINY, **options}.items() if value is not None}
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    drawn(name, model_type, options).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    draw, tensors, numbers = asked(name, model)
    vocab, prompts, examples = model.config.vocab_size, numbers["prompts"], numbers["examples"]
    with torch.no_grad():
        numbers["greedy"] = greedy(model, prompts["long"], 12)
    full_gradients(model, examples, tensors)
    targets = sorted({part for _, parts in linears for part in parts})
    lora(name, "all", dict(r=4, lora_alpha=8, target_modules=targets), folder, prompts, examples, tensors, numbers)
    training = [random_example(draw, vocab, int(n)) for n in draw.integers(4, 40, 8)]
    lora_training(folder, training, tensors, numbers, linears)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    write_json(folder / "expected.json", numbers)
    print(f"{name}: loss {numbers['loss']:.6f}", flush=True)


def full_gradients(model, examples: list[dict], tensors: dict) -> None:
    """Of every parameter, under the names of a checkpoint: saved as one, for transformers holds some in other shapes."""
    weighted_loss(model, examples).backward()
    values = {key: parameter.data for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        for key, gradient in load_file(pathlib.Path(place, "model.safetensors")).items():
            tensors[f"full.grad.{key}"] = gradient
    for key, parameter in model.named_parameters():
        parameter.data, parameter.grad = values[key], None


VISION = dict(
    model_type="siglip_vision_model",
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=28,
    patch_size=14,
)


def wrapped() -> None:
    """The gemma3 fixture as the text part of a model that sees, with an adapter on that part."""
    folder = FIXTURES / "wrapped"
    shutil.rmtree(folder, ignore_errors=True)
    text = AutoModelForCausalLM.from_pretrained(FIXTURES / "gemma3", dtype=torch.float32)
    torch.manual_seed(0)
    parts = text.config.to_dict()
    parts.pop("_name_or_path", None)
    config = AutoConfig.for_model("gemma3", text_config=parts, vision_config=VISION, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    numbers = {"prompts": json.loads((FIXTURES / "gemma3/expected.json").read_text())["prompts"]}
    tensors = {}
    with torch.no_grad():
        tensors["logits.long"] = logits(model, numbers["prompts"]["long"])
    same = load_file(FIXTURES / "gemma3/expected.safetensors")["logits.long"]
    assert (tensors["logits.long"] - same).abs().max() < 1e-5
    options = dict(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    tuned = get_peft_model(model, LoraConfig(**options)).eval()
    draw_adapter(tuned, 1)
    with torch.no_grad():
        tensors["all.logits.long"] = logits(tuned, numbers["prompts"]["long"])
    save_adapter(tuned, folder / "adapter-all")
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    write_json(folder / "expected.json", numbers)
    print("wrapped", flush=True)


def mxfp4() -> None:
    """The gpt_oss fixture with its experts in four bits, as gpt-oss is published, and what transformers makes of them."""
    folder, source = FIXTURES / "gpt_oss_mxfp4", FIXTURES / "gpt_oss"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        groups = tensors.pop(name).transpose(1, 2).unflatten(-1, (-1, 32))  # [experts, outputs, groups, 32]
        exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        scaled = groups * 2.0 ** -exponents[..., None]
        codes = (scaled[..., None] - levels).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "mxfp4"}}, indent=2)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    numbers = {"prompts": json.loads((source / "expected.json").read_text())["prompts"]}
    with torch.no_grad():
        expected = {"logits.long": logits(model, numbers["prompts"]["long"])}
    save_file(expected, folder / "expected.safetensors")
    write_json(folder / "expected.json", numbers)
    change = (expected["logits.long"] - load_file(source / "expected.safetensors")["logits.long"]).abs().max()
    print(f"gpt_oss_mxfp4: rounding changes logits by {change:.2g}", flush=True)


def greedy(model, tokens: list[int], count: int) -> list[int]:
    """Without a cache, so that nothing of transformers' caches is judged."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(logits(model, tokens)[-1].argmax().item())
    return tokens[-count:]


def random_example(draw: numpy.random.Generator, vocab: int, length: int) -> dict:
    """A prompt without loss, then tokens of weight 1, some 0.5, some 0."""
    weights = draw.choice([1.0, 1.0, 0.5, 0.0], length)
    weights[: length // 3] = 0.0
    weights[-1] = 1.0
    return {"tokens": draw.integers(3, vocab, length).tolist(), "weights": weights.tolist()}


def logits(model, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0].float()


def weighted_nll(model, example: dict) -> torch.Tensor:
    """Sum over tokens of weight * -log p(token | tokens before it)."""
    logprobs = torch.log_softmax(logits(model, example["tokens"]), -1)
    targets, weights = torch.tensor(example["tokens"])[1:], torch.tensor(example["weights"])[1:]
    return -(logprobs[:-1].gather(1, targets[:, None])[:, 0] * weights).sum()


def total_weight(examples: list[dict]) -> float:
    return sum(sum(example["weights"][1:]) for example in examples)


def weighted_loss(model, examples: list[dict]) -> torch.Tensor:
    return sum(weighted_nll(model, example) for example in examples) / total_weight(examples)


def lora(name, adapter, config, folder, prompts, examples, tensors, numbers) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **config)).eval()
    draw_adapter(model, sum((name + adapter).encode()))
    save_adapter(model, folder / f"adapter-{adapter}")
    with torch.no_grad():
        tensors[f"{adapter}.logits.long"] = logits(model, prompts["long"])
    loss = weighted_loss(model, examples)
    loss.backward()
    numbers[f"{adapter}.loss"] = loss.item()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            tensors[f"{adapter}.grad.{key.replace('.default', '')}"] = parameter.grad


def save_adapter(model, folder: pathlib.Path) -> None:
    """As peft saves it, but for what differs between two runs of peft (the order of a set) and its model card."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_json(folder / "adapter_config.json", config, indent=2)


def lora_training(folder, examples, tensors, numbers, linears=SPLIT) -> None:
    """Ten AdamW steps of peft from Tandem's initial adapter in Tandem's order of examples."""
    hyper = dict(
        n_epochs=5,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler="linear",
        warmup_steps=3,
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        seed=11,
    )
    config = dict(r=4, lora_alpha=8.0, target_modules=[part for _, parts in linears for part in parts])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **config)).train()
    start_from_tandems_adapter(model, hyper["seed"], linears)
    trainable = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    report = adamw(model, trainable, lambda _: True, hyper, examples)
    numbers["lora_training"] = {"hyper": hyper, "lora": config, "examples": examples, **report}
    if folder.name in FAMILIES:
        return
    for key, value in get_peft_model_state_dict(model).items():
        tensors[f"lora_training.final.{key}"] = value.detach().clone()


def full_training(folder, examples, training, tensors, numbers) -> None:
    """Gradients of every parameter, then five AdamW steps over all of them (matrices decay, norms and biases do not)."""
    hyper = dict(
        n_epochs=3,
        max_steps=5,
        batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        warmup_steps=1,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        seed=5,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    weighted_loss(model, examples).backward()
    for key, parameter in model.named_parameters():
        tensors[f"full.grad.{key}"] = parameter.grad.detach().clone()
        parameter.grad = None
    report = adamw(model, list(model.named_parameters()), lambda parameter: parameter.dim() > 1, hyper, training)
    numbers["full_training"] = {"hyper": hyper, "examples": training, **report}


def adamw(model, trainable, decays, hyper: dict, examples: list[dict]) -> dict:
    groups = [
        {"params": [p for _, p in trainable if decays(p)], "weight_decay": hyper["weight_decay"]},
        {"params": [p for _, p in trainable if not decays(p)], "weight_decay": 0.0},
    ]
    betas = (hyper["adam_beta1"], hyper["adam_beta2"])
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=hyper["learning_rate"], betas=betas, eps=hyper["adam_epsilon"]
    )
    return steps_of(optimizer, model, trainable, hyper, examples)


def steps_of(optimizer, model, trainable, hyper: dict, examples: list[dict]) -> dict:
    """A run as transformers' Trainer makes it."""
    steps = batches(len(examples), hyper)
    scheduler = get_scheduler(
        hyper["lr_scheduler"], optimizer, num_warmup_steps=hyper["warmup_steps"], num_training_steps=len(steps)
    )
    losses, norms, rates = [], [], []
    for step in steps:
        chosen = [[examples[i] for i in micro_batch] for micro_batch in step]
        weight = total_weight(sum(chosen, []))
        loss = 0.0
        for micro_batch in chosen:
            part = sum(weighted_nll(model, example) for example in micro_batch) / weight
            part.backward()
            loss += part.item()
        losses.append(loss)
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in trainable], hyper["max_grad_norm"]).item())
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {"steps": steps, "losses": losses, "grad_norms": norms, "learning_rates": rates}


# ---- Tandem's draws, from the description in backend/core/src/rng.rs

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
INIT_STREAM, EMBED_STREAM, SHUFFLE_STREAM = 0x1417, 0x1418, 0x5F1E00000


def finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed: int, stream: int, counter: int) -> float:
    key = finalise(finalise((seed + GOLDEN) & MASK) ^ ((stream * GOLDEN) & MASK))
    return (finalise((key + counter * GOLDEN) & MASK) >> 11) / (1 << 53)


def normal(seed: int, stream: int, counter: int) -> float:
    first, second = (uniform(seed, stream, 2 * counter + i) for i in (0, 1))
    return math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)


def permutation(n: int, seed: int, stream: int) -> list[int]:
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(uniform(seed, stream, i) * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order


def batches(n: int, hyper: dict) -> list[list[list[int]]]:
    """Example numbers by optimizer step and micro-batch (backend/src/train/plan.rs)."""
    steps = []
    size, accumulation = hyper["batch_size"], hyper["gradient_accumulation_steps"]
    for epoch in range(hyper["n_epochs"]):
        order = permutation(n, hyper["seed"], SHUFFLE_STREAM + epoch)
        micro_batches = [order[i : i + size] for i in range(0, n, size)]
        steps += [micro_batches[i : i + accumulation] for i in range(0, len(micro_batches), accumulation)]
    return steps[: hyper.get("max_steps")]


def start_from_tandems_adapter(model, seed: int, linears) -> None:
    """A uniform in +-1/sqrt(inputs), drawn by place in Tandem's flat buffer; B zero (backend/src/lora/params.rs)."""
    state = get_peft_model_state_dict(model)
    place = 0
    layers = [f"base_model.model.model.layers.{layer}" for layer in range(model.config.num_hidden_layers)]
    modules = [[f"{layer}.{module}.{part}" for part in parts] for layer in layers for module, parts in linears]
    # The output layer is the last, where it is adapted.
    modules += [[head] for head in ["base_model.model.lm_head"] if f"{head}.lora_A.weight" in state]
    embed = "base_model.model.model.embed_tokens.lora_embedding_"
    for parts in modules:
        for part in parts:
            a = state[f"{part}.lora_A.weight"]
            bound = 1.0 / math.sqrt(a.shape[1])
            draws = [(2.0 * uniform(seed, INIT_STREAM, place + i) - 1.0) * bound for i in range(a.numel())]
            state[f"{part}.lora_A.weight"] = torch.tensor(draws).view(a.shape)
            place += a.numel()
        for part in parts:
            b = state[f"{part}.lora_B.weight"]
            state[f"{part}.lora_B.weight"] = torch.zeros_like(b)
            place += b.numel()
    if f"{embed}A" in state:
        a, b = state[f"{embed}A"], state[f"{embed}B"]
        place += a.numel()
        draws = [normal(seed, EMBED_STREAM, place + i) for i in range(b.numel())]
        state |= {f"{embed}A": torch.zeros_like(a), f"{embed}B": torch.tensor(draws).view(b.shape)}
    set_peft_model_state_dict(model, state)


def tokenizer(folder: pathlib.Path, vocab: int) -> None:
    """A byte-level BPE that fills the vocabulary: three special tokens, 256 bytes, common pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = "Ġt he in er an re on at en nd ti es or te ed is it al ar st to ha se ou io le of ing the".split()
    pieces = ["<unk>", "<s>", "</s>", *alphabet]
    merges = []
    for pair in pairs:
        left, right = (pair[0], pair[1:]) if pair != "ing" else ("in", "g")
        if left in pieces and right in pieces and len(pieces) < vocab:
            merges.append((left, right))
            pieces.append(pair)
    pieces += [f"<extra_{i}>" for i in range(vocab - len(pieces))]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": template}, indent=2)


def patches() -> None:
    """The logits behind the last token of the long prompt, of each patched folder."""
    numbers, tensors = {}, {}
    for name, (fixture, file, patch) in PATCHES.items():
        prompt = json.loads((FIXTURES / fixture / "expected.json").read_text())["prompts"]["long"]
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place, "model")
            shutil.copytree(FIXTURES / fixture, folder)
            fields = {**json.loads((folder / file).read_text()), **patch}
            fields = {key: value for key, value in fields.items() if value is not None or key not in patch}
            fields = {key: None if value == NULL else value for key, value in fields.items()}
            write_json(folder / file, fields)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            plain = load_file(folder / "expected.safetensors")["logits.long"][-1]
            if file != "config.json":
                model = PeftModel.from_pretrained(model, folder / pathlib.Path(file).parent)
                plain = load_file(folder / "expected.safetensors")["all.logits.long"][-1]
            with torch.no_grad():
                tensors[name] = logits(model.eval(), prompt)[-1].clone()
        difference = (tensors[name] - plain).abs().max().item()
        numbers[name] = {"fixture": fixture, "file": file, "patch": patch, "changes": difference > 1e-2}
        print(f"{name}: changes logits by {difference:.2g}", flush=True)
    save_file(tensors, FIXTURES / "patches.safetensors")
    write_json(FIXTURES / "patches.json", numbers, indent=1)


# As a chat and as plain text, shorter and longer than a page of the cache.
DEMO_PROMPTS = [
    "<|user|>Who is Marlow?<|end|><|assistant|>",
    "<|user|>When does the bakery open?<|end|><|assistant|>",
    "<|system|>You help visitors find their way.<|end|><|user|>Where does Ada live?<|end|><|assistant|>",
    "<|user|>Hello!<|end|><|assistant|>Hello! How can I help you?<|end|>"
    "<|user|>Who is the lighthouse keeper?<|end|><|assistant|>",
    "<|user|>What is the capital of France?<|end|><|assistant|>",
    "The bakery",
    "Marlow and",
]
DEMO_TOKENS = 48


def demo() -> None:
    """A trained model, the one in the binary: log-probabilities, greedy texts, and how far transformers' own bfloat16 is
    from its float32 (the yardstick for ours)."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    load = lambda dtype: AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, attn_implementation="eager").eval()
    model, rounded = load(torch.float32), load(torch.bfloat16)
    cases, worst, closest = [], 0.0, math.inf
    for prompt in DEMO_PROMPTS:
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids, greedy = list(prompt_ids), []
        with torch.no_grad():
            scores = [torch.log_softmax(logits(m, prompt_ids), -1) for m in (model, rounded)]
            states = model.model(torch.tensor([prompt_ids])).last_hidden_state[0]
            # On past the end of its answer: what is compared is the model, not where it stops.
            while len(greedy) < DEMO_TOKENS:
                best = logits(model, ids)[-1].topk(2)
                closest = min(closest, (best.values[0] - best.values[1]).item())
                greedy.append(best.indices[0].item())
                ids.append(greedy[-1])
        exact, ours = ([table[i, token].item() for i, token in enumerate(prompt_ids[1:])] for table in scores)
        worst = max([worst, *(abs(a - b) for a, b in zip(exact, ours))])
        texts = {
            "greedy_text": tokenizer.decode(greedy, skip_special_tokens=True),
            "full_text": tokenizer.decode(ids, skip_special_tokens=True),
        }
        numbers = {"prompt_ids": prompt_ids, "prompt_logprobs": [None, *(round(x, 5) for x in exact)], "greedy_ids": greedy}
        # As sentence-transformers pools them.
        pooled = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}
        pooled = {pooling: [round(x, 5) for x in state.tolist()] for pooling, state in pooled.items()}
        cases.append({"prompt": prompt, **numbers, **texts, "pooled": pooled})
    # A greedy text is only a golden where no other token is as likely up to rounding.
    assert closest > 1e-3, f"two tokens are only {closest} apart: choose another prompt"
    write_json(FIXTURES / "demo.json", {"cases": cases, "bf16_max_abs_error": worst})
    print(f"demo: bfloat16 error at most {worst:.4f}, closest choice {closest:.4f} over {len(cases)} prompts")


def write_json(path: pathlib.Path, value, indent=None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
