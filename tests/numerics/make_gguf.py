"""Makes tests/numerics/fixtures/gguf with the gguf and sentencepiece packages (scripts/fixtures calls it):

types.gguf         a matrix of random bits in every type that is read; types.safetensors is what gguf.quants makes of it
<fixture>.gguf     the fixture's checkpoint, converted as llama.cpp's convert_hf_to_gguf.py does (names and keys are the
                   gguf package's; a pair of numbers of a head is turned there where neighbours are, so rows of Llama's q
                   and k change places, and Gemma's norms have one added)
<fixture>.json     where a GGUF cannot say all that the fixture's config.json says: the config.json that is said
spm.gguf, spm.json a SentencePiece tokenizer, and what sentencepiece makes of some texts with it
"""

import io
import json
import math
import pathlib
import sys

import gguf
import numpy
import sentencepiece
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from safetensors.numpy import save_file
from safetensors.torch import load_file

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OUT = FIXTURES / "gguf"

PLAIN = ["F32", "F16", "BF16"]
# Where the float16 scales of a group are; other bytes can have any bits.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
ROWS, COLUMNS = 6, 512

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
}
# A fixture, and what llama.cpp knows without a key instead of its config.json.
MODELS = {
    "gqa_tied": {},
    "head_dim": {},
    "bf16": {},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": None},
    "phi3": {},
    "longrope": {},
}

# docs/gguf.md, tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def types() -> None:
    draw = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(OUT / "types.gguf", "llama")
    expected = {}
    for name in [*PLAIN, *SCALES]:
        kind = GGMLQuantizationType[name]
        if name in PLAIN:
            data = gguf.quants.quantize(draw.normal(0, 1, (ROWS, COLUMNS)).astype(numpy.float32), kind)
        else:
            group, size = gguf.GGML_QUANT_SIZES[kind]
            groups = draw.integers(0, 256, (ROWS * COLUMNS // group, size), dtype=numpy.uint8)
            for at in SCALES[name]:
                scales = draw.normal(0, 0.1, len(groups)).astype(numpy.float16)
                groups[:, at : at + 2] = scales.view(numpy.uint8).reshape(-1, 2)
            data = groups.reshape(ROWS, -1)
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = gguf.quants.dequantize(data, kind).astype(numpy.float32).reshape(ROWS, COLUMNS)
    write(writer)
    save_file(expected, OUT / "types.safetensors")


def model(name: str) -> None:
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    if MODELS[name]:
        config = {**config, **MODELS[name]}
        (OUT / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    metadata(writer, config)
    if (folder / "tokenizer.json").exists():
        byte_level(writer, folder)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    is_gemma = config["model_type"].startswith("gemma")
    for key, tensor in load_file(folder / "model.safetensors").items():
        is_bf16 = str(tensor.dtype) == "torch.bfloat16"
        data = tensor.float().numpy()
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            key = "model.embed_tokens.weight"  # the one table, under its other name
        if architecture == MODEL_ARCH.LLAMA and ".q_proj." in key:
            data = pair(data, config["num_attention_heads"])
        if architecture == MODEL_ARCH.LLAMA and ".k_proj." in key:
            data = pair(data, config["num_key_value_heads"])
        if is_gemma and key.endswith("norm.weight"):
            data = data + 1
        if is_bf16 and data.ndim > 1:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(names.get_name(key, (".weight", ".bias")), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(key, (".weight", ".bias")), data)
    write(writer)


def pair(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    everywhere = rope.get("full_attention", rope)
    writer.add_rope_freq_base(everywhere.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = everywhere.get("rope_type", everywhere.get("type", "default"))
    factor = everywhere.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(head_dim * factor))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(everywhere["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(everywhere["original_max_position_embeddings"])
    if kind == "longrope":
        original = everywhere["original_max_position_embeddings"]
        stretched = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretched) / math.log(original)))
        writer.add_rope_scaling_orig_ctx_len(original)
        for length in ("short", "long"):
            writer.add_tensor(f"rope_factors_{length}.weight", numpy.float32(everywhere[f"{length}_factor"]))
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])


def byte_level(writer: gguf.GGUFWriter, folder: pathlib.Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    kinds = [NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED for _, i in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_chat_template(settings["chat_template"])


TEXTS = [
    "",
    "Hello world",
    " two  spaces   and\ttabs\n\nlines ",
    "Ünïcödé, naïve café, ελληνικά, 漢字かな交じり文, 🦙🦙 e\u0301",
    "1234567890 3.14159 0x1F",
    "def f(x):\n    return x ** 2  # a comment\n",
    "the the the, aaaa aaaaaaa",
    "\u0000\u2581 \u00a0\u3000",
    "</s> <s> in text",
]


def sentences() -> list[str]:
    """Enough text to train a tokenizer of some hundred pieces, and one that does not change: the licence."""
    text = (FIXTURES.parents[2] / "LICENSE").read_text()
    return [line for line in text.splitlines() if line.strip()]


def spm() -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mark>"],
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    writer = gguf.GGUFWriter(OUT / "spm.gguf", "llama")
    ids = range(processor.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([piece_type(processor, i) for i in ids])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_space_prefix(True)
    write(writer)
    texts = [text for text in TEXTS if "<s>" not in text]  # sentencepiece takes control symbols for text
    expected = [{"text": text, "ids": processor.encode(text)} for text in [*texts, *sentences()[:40]]]
    (OUT / "spm.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0) + "\n")


def piece_type(processor, i: int) -> int:
    if processor.is_unknown(i):
        return UNKNOWN
    if processor.is_control(i):
        return CONTROL
    if processor.is_byte(i):
        return BYTE
    if processor.is_unused(i):
        return UNUSED
    return USER_DEFINED if processor.id_to_piece(i) == "<mark>" else NORMAL


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    names = sys.argv[1:] or ["types", "spm", *MODELS]
    for which in names:
        {"types": types, "spm": spm}.get(which, lambda which=which: model(which))()
        print(f"gguf/{which}")
