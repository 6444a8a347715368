"""Writes a Llama checkpoint with random bfloat16 weights in one of the shapes the figures are taken on.

  make_shape.py A FOLDER      135M: 30 layers of 576, vocabulary 49152, tied
  make_shape.py B FOLDER      1.1B: 22 layers of 2048, vocabulary 32000
  make_shape.py C FOLDER      0.5B: 24 layers of 896, vocabulary 151936, tied (its qkv biases are left out: Llama has none)

Speed does not depend on the weights' values. The tokenizer is a byte-level BPE of the right size whose merges join
letters in alphabetical order: English words become a few tokens, as with a real one.
"""

import argparse
import itertools
import json
import pathlib

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES = {
    "A": dict(hidden_size=576, num_hidden_layers=30, heads=(9, 3), intermediate_size=1536, vocab_size=49152, tied=True),
    "B": dict(hidden_size=2048, num_hidden_layers=22, heads=(32, 4), intermediate_size=5632, vocab_size=32000, tied=False),
    "C": dict(hidden_size=896, num_hidden_layers=24, heads=(14, 2), intermediate_size=4864, vocab_size=151936, tied=True),
}
SPECIAL = ["<unk>", "<s>", "</s>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[arguments.shape]
    write_config(shape, arguments.folder)
    write_tokenizer(shape["vocab_size"], arguments.folder)
    parameters = write_weights(shape, arguments.folder)
    print(f"shape {arguments.shape}: {parameters / 1e6:.1f} M parameters in {arguments.folder}")


def write_config(shape: dict, folder: pathlib.Path) -> None:
    heads, kv_heads = shape["heads"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape["tied"],
        "torch_dtype": "bfloat16",
        "vocab_size": shape["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(shape: dict, folder: pathlib.Path) -> int:
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads = shape["heads"]
    kv = hidden // heads * kv_heads
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, 0.02, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    if not shape["tied"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        for name, size in linears.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(*size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def write_tokenizer(vocab: int, folder: pathlib.Path) -> None:
    pieces = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = []
    # Words' beginnings first: space + letter, then every run of two, three, four letters, with and without the space.
    for length in (1, 2, 3, 4):
        for run in itertools.product(letters, repeat=length):
            for start in ("Ġ", ""):
                left, right = start + "".join(run[:-1]), run[-1]
                if left and len(pieces) < vocab:
                    merges.append((left, right))
                    pieces.append(left + right)
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    bpe.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
