"""Tiny quantised checkpoints, and what their matrices stand for, for tests/tests/numerics/quantised.rs:

    python tests/numerics/make_quantised.py [tests/numerics/fixtures/quantised]

Each folder is a Llama of one layer with random weights: config.json, model.safetensors as the scheme's own packages write
it, expected.safetensors with its matrices in float32 as they read it. Who wrote and read what:

- bitsandbytes (nf4, nf4 with double quantisation, fp4): transformers with bitsandbytes saves, bitsandbytes dequantises.
- compressed-tensors (int8 by rows, int4 in groups with and without zero points): its own compressors.
- fp8: torch converts to and from float8_e4m3fn; scales as in transformers' integrations/finegrained_fp8.py.
- MXFP4: transformers' integrations/mxfp4.py dequantises.
- bitsandbytes int8, GPTQ, AWQ: from the definition of the format in numpy (GPTQModel's qlinear/__init__.py, AutoAWQ's
  modules/linear/gemm.py, bitsandbytes' LLM.int8): codes, zero points and scales are drawn, packed, and multiplied out.

Needs torch, transformers, accelerate, bitsandbytes, compressed-tensors.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, VOCAB = 64, 128, 64
LAYER = "model.layers.0."
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# Of these expected.safetensors has the numbers.
SHOWN = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]


def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


BASE = model()


def write(folder, quantization, linears, expected):
    """`linears`: module -> its tensors by suffix; everything else is the base's, in bfloat16."""
    folder.mkdir()
    config = BASE.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    linear = tuple(f"{LAYER}{name}.weight" for name in SHAPES)
    tensors = {name: t for name, t in BASE.state_dict().items() if name not in linear and name != "lm_head.weight"}
    for module, parts in linears.items():
        tensors |= {f"{LAYER}{module}{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    numbers = {f"{LAYER}{module}.weight": number.float().contiguous() for module, number in expected.items() if module in SHOWN}
    save_file(numbers, folder / "expected.safetensors")


def weight(module):
    return BASE.state_dict()[f"{LAYER}{module}.weight"]


def each(make):
    """`make(weight)` gives the tensors of a module, and what they stand for."""
    made = {module: make(weight(module).float()) for module in SHAPES}
    return {module: parts for module, (parts, _) in made.items()}, {module: number for module, (_, number) in made.items()}


def bitsandbytes(folder, **options):
    import bitsandbytes.functional as F

    with tempfile.TemporaryDirectory() as plain:
        BASE.save_pretrained(plain)
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        quantised = LlamaForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
    quantised.save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    expected = {}
    for module in SHOWN:
        parameter = quantised.get_submodule(LAYER + module).weight
        state = parameter.quant_state
        state.dtype = torch.float32
        expected[f"{LAYER}{module}.weight"] = F.dequantize_4bit(parameter.data, state).float().contiguous()
    save_file(expected, folder / "expected.safetensors")


def bitsandbytes_int8(folder):
    def make(number):
        largest = number.abs().amax(1)
        codes = torch.round(number * (127 / largest).unsqueeze(1)).to(torch.int8)
        return {".weight": codes, ".SCB": largest}, codes.float() * largest.unsqueeze(1) / 127

    write(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True}, *each(make))


def compressed(folder, format, args):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**args)
    compressor = BaseCompressor.get_value_from_registry(format)

    def make(number):
        number = number.to(torch.bfloat16)
        group = args.group_size or number.shape[1]
        groups = number.view(number.shape[0], -1, group)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        parts = {"weight": number, "weight_scale": scale.to(torch.bfloat16)}
        if not args.symmetric:
            parts["weight_zero_point"] = zero.to(torch.int8)
        scheme = SCHEME(args, format)
        packed = compressor.compress(dict(parts), scheme)
        numbers = compressor.decompress({name: tensor.clone() for name, tensor in packed.items()}, scheme)
        return {f".{name}": tensor for name, tensor in packed.items()}, numbers["weight"]

    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": format}},
    }
    write(folder, config, *each(make))


def SCHEME(args, format):
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=args, format=format)


def fp8(folder, block):
    def make(number):
        n, k = number.shape
        if block is None:
            scale = number.abs().amax(1, keepdim=True) / 448
            codes = (number / scale).to(torch.float8_e4m3fn)
            return {".weight": codes, ".weight_scale": scale}, codes.float() * scale
        height, width = block
        rows, columns = -(-n // height), -(-k // width)
        scale = torch.zeros(rows, columns)
        spread = torch.zeros(n, k)
        for i in range(rows):
            for j in range(columns):
                part = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
                scale[i, j] = number[part].abs().max() / 448
                spread[part] = scale[i, j]
        codes = (number / spread).to(torch.float8_e4m3fn)
        return {".weight": codes, ".weight_scale_inv": scale}, codes.float() * spread

    config = {"quant_method": "fp8" if block else "fbgemm_fp8"}
    if block:
        config |= {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
    write(folder, config, *each(make))


def packed(codes, bits, axis):
    """Codes of `bits` bits into 32-bit numbers along `axis`, the first in the lowest bits."""
    per = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint64), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, per)
    words = sum(codes[..., i] << np.uint64(bits * i) for i in range(per)).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def drawn(number, bits, group, symmetric, seed):
    """Codes, zero points and scales that stand for about `number` [N, K]."""
    n, k = number.shape
    most = 2**bits - 1
    groups = number.numpy().reshape(n, -1, group)
    low, high = groups.min(-1), groups.max(-1)
    if symmetric:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    scale = ((high - low) / most).astype(np.float16).astype(np.float32)
    zero = np.full(scale.shape, (most + 1) // 2) if symmetric else np.clip(np.round(-low / scale), 1, most)
    codes = np.clip(np.round(groups / scale[..., None]) + zero[..., None], 0, most).reshape(n, k)
    return codes, zero, scale


def gptq(folder, bits=4, symmetric=True, version="gptq", act_order=False):
    group = 32

    def make(number):
        n, k = number.shape
        codes, zero, scale = drawn(number, bits, group, symmetric, 1)
        index = np.arange(k) // group
        if act_order:
            index = np.random.default_rng(k).permutation(index)
        numbers = (codes - zero[:, index]) * scale[:, index]
        stored_zero = zero.T - (1 if version == "gptq" else 0)
        parts = {
            ".qweight": packed(codes.T, bits, 0),
            ".qzeros": packed(stored_zero, bits, 1),
            ".scales": torch.from_numpy(scale.T.copy()).to(torch.float16),
            ".g_idx": torch.from_numpy(index.astype(np.int32)),
        }
        return parts, torch.from_numpy(numbers)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    write(folder, config | {"checkpoint_format": version}, *each(make))


def awq(folder):
    group, order = 32, [0, 2, 4, 6, 1, 3, 5, 7]

    def make(number):
        codes, zero, scale = drawn(number, 4, group, False, 1)
        numbers = (codes - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)

        def ordered(columns):
            return columns.reshape(columns.shape[0], -1, 8)[:, :, order].reshape(columns.shape)

        parts = {
            ".qweight": packed(ordered(codes.T.copy()), 4, 1),
            ".qzeros": packed(ordered(zero.T.copy()), 4, 1),
            ".scales": torch.from_numpy(scale.T.copy()).to(torch.float16),
        }
        return parts, torch.from_numpy(numbers)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    write(folder, config, *each(make))


def mxfp4(folder):
    """Two experts' gate_up_proj; not a whole model."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder.mkdir()
    generator = np.random.default_rng(5)
    blocks = torch.from_numpy(generator.integers(0, 256, (2, 64, 4, 16), dtype=np.uint8))
    scales = torch.from_numpy(generator.integers(118, 130, (2, 64, 4), dtype=np.uint8))
    name = LAYER + "mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, folder / "model.safetensors")
    numbers = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)  # [E, K, R]
    save_file({name: numbers.transpose(1, 2).reshape(128, 128).contiguous()}, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}) + "\n")


def main():
    to = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "fixtures" / "quantised")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    bitsandbytes(to / "bnb-nf4", bnb_4bit_quant_type="nf4")
    bitsandbytes(to / "bnb-nf4-double", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    bitsandbytes(to / "bnb-fp4", bnb_4bit_quant_type="fp4")
    bitsandbytes_int8(to / "bnb-int8")
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    compressed(to / "ct-int4", "pack-quantized", int4 | {"symmetric": True})
    compressed(to / "ct-int4-asymmetric", "pack-quantized", int4 | {"symmetric": False})
    compressed(to / "ct-int8", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True})
    compressed(to / "ct-fp8", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True})
    fp8(to / "fp8-blocks", [32, 64])
    fp8(to / "fp8-rows", None)
    gptq(to / "gptq")
    gptq(to / "gptq-8", bits=8)
    gptq(to / "gptq-asymmetric", symmetric=False)
    gptq(to / "gptq-v2", symmetric=False, version="gptq_v2")
    gptq(to / "gptq-desc-act", symmetric=False, act_order=True)
    awq(to / "awq")
    mxfp4(to / "mxfp4")
    for folder in sorted(to.iterdir()):
        tensors = load_file(folder / "model.safetensors")
        print(folder.name, sum(t.nbytes for t in tensors.values()), "bytes")


main()
